"""Gives mixers the output size of a teacher's attention, and a teacher for the time that this takes.

Shapes: `b` batch, `t` token, `h` head, `p` head_dim, `d` width.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cab_hf.models.mixers import BidirectionalProjections, S6Mixer, SSDMixer, SSMProjections
from cab_hf.models.students import MixerPreTrainedModel
from cab_hf.teachers.alignment import taught_layers
from cab_hf.teachers.teacher import borrowed_teacher


@torch.no_grad()
def calibrate_output_norm(
    student: MixerPreTrainedModel,
    teacher: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    layer_map: str | Sequence[int] = "floor",
) -> None:
    """Gives every mixer head the output size of the teacher's attention head on one batch, in place.

    What is scaled is the weight of an SSD mixer's output norm, and the columns of an S6 mixer's output projection,
    which has no norm before it: by the ratio of the RMS of teacher and student, over real tokens, from the first layer
    to the last. (The norm alone does not make the RMS one: a head of long memory starts with outputs so small that
    the norm's epsilon counts.)

    Args:
        student: the student to calibrate.
        teacher: the teacher, left as it was.
        inputs: one batch as both read it: `input_ids` `(b, t)` and, if padded, `attention_mask` `(b, t)`; or
            `pixel_values` `(b, c, height, width)`. No order of tokens matters here.
        layer_map: the teacher layer of each student layer, as in `student_from_teacher`.
    """
    mask = inputs.get("attention_mask")
    with borrowed_teacher(teacher) as borrowed:
        teacher_rms = [_rms(attention.output, mask) for attention in borrowed(inputs, attentions=True).attentions]
        layers = taught_layers(student.config, borrowed, layer_map)

    training, handles = student.training, []
    for mixer, layer in zip(student.mixer_list, layers, strict=True):
        handles.append(mixer.register_forward_hook(_scaling_hook(teacher_rms[layer].to(student.device), mask)))
    try:
        read = (student.main_input_name, "attention_mask")
        arguments = {name: inputs[name].to(student.device) for name in read if name in inputs}
        # Image students have no cache and take no notice.
        student.eval().read(**arguments, use_cache=False)
    finally:
        student.train(training)
        for handle in handles:
            handle.remove()


def _scaling_hook(teacher_rms: Tensor, mask: Tensor | None) -> Callable:
    """Scales a mixer's output when the mixer runs, for good and in that very pass, which later layers read."""

    def scale(
        mixer: SSDMixer | S6Mixer, args: tuple, result: tuple[Tensor, SSMProjections | BidirectionalProjections]
    ) -> tuple[Tensor, SSMProjections | BidirectionalProjections]:
        y = result[1].output  # (b, t, d)
        heads = len(teacher_rms) if y.shape[-1] % len(teacher_rms) == 0 else 1
        wanted = teacher_rms if heads > 1 else teacher_rms.square().mean().sqrt()[None]
        own = _rms(y.unflatten(-1, (heads, -1)), mask)  # (h,)
        # A head that is silent on this batch says nothing about its scale.
        ratio = torch.where(own > 0, wanted / own.clamp_min(1e-30), 1.0)
        channels = ratio.repeat_interleave(y.shape[-1] // heads).to(y.dtype)  # (d,)
        if isinstance(mixer, SSDMixer):
            mixer.norm.weight.mul_(channels)
            y = y * channels
        else:
            mixer.out_proj.weight.mul_(channels)
        return mixer.out_proj(y), result[1]._replace(output=y)

    return scale


def _rms(output: Tensor, mask: Tensor | None) -> Tensor:
    """Root mean square `(h,)` of `(b, t, h, p)` over real tokens and features."""
    energy = output.float().square().mean(dim=-1)  # (b, t, h)
    weight = torch.ones_like(energy[..., :1]) if mask is None else mask.to(energy.device)[..., None].ne(0).float()
    # Padding may hold anything, infinities included.
    energy = torch.where(weight > 0, energy, 0.0)
    return (energy.sum(dim=(0, 1)) / weight.sum()).sqrt()
