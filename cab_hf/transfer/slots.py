"""What the teacher's attention reads and writes where a student's mixers stand.

Shapes: `b` batch, `t` token, `h` head, `p` head_dim, `d` width.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from cab_hf.models import CABVisionMambaPreTrainedModel
from cab_hf.models.mixers import S6Mixer, SSDMixer
from cab_hf.models.students import MixerPreTrainedModel, body_of
from cab_hf.models.window import WindowAttention
from cab_hf.teachers.alignment import align_with_student, taught_layers
from cab_hf.teachers.teacher import Teacher
from cab_hf.transfer.reading import Reading, Site, called, first


class Slot(NamedTuple):
    """
    Attributes:
        mixer: of the student.
        hidden_states: `(b, t, d)`, what the attention reads, behind its norm.
        heads: `(b, t, h, p)`, the attention's output before its output projection.
        output: `(b, t, d)`, behind it; None where the readings that it needs were not given. Of a mixer beside a
            window, what the window lacks of it.
    """

    mixer: SSDMixer | S6Mixer
    hidden_states: Tensor
    heads: Tensor
    output: Tensor | None


@torch.no_grad()
def slots(
    student: MixerPreTrainedModel,
    teacher: Teacher,
    inputs: Mapping[str, Tensor],
    layer_map: str | Sequence[int],
    readings: Sequence[Reading] | None = None,
) -> list[Slot]:
    """One slot for each mixer, of one batch.

    Args:
        student: whose mixers, and of an image student whose norms.
        teacher: in its place and dtype.
        inputs: one batch.
        layer_map: of `taught_layers`.
        readings: of an image teacher's layers, where outputs are wanted.
    """
    layers = taught_layers(student.config, teacher, layer_map)
    if isinstance(student, CABVisionMambaPreTrainedModel):
        return _image_slots(student, teacher, inputs, layers, readings)
    paths = [teacher.paths[layer] for layer in layers]
    body = body_of(teacher.model)
    with called({path: body.get_submodule(path) for path in paths}) as sites:
        attentions = teacher(inputs, attentions=True).attentions
    place = student.mixer_list[0].in_proj.weight
    windows = [getattr(one, "window", None) for one in getattr(student, "mixers", {}).values()] or [None] * len(paths)
    found = []
    for mixer, window, path, layer in zip(student.mixer_list, windows, paths, layers, strict=True):
        site, heads = sites[path], attentions[layer].output.to(place.device)
        hidden, output = site.hidden_states.to(place), first(site.output).to(place.device)
        if window is not None:
            output = output - _within(window, site, place, inputs.get("attention_mask"))
        found.append(Slot(mixer, hidden, heads, output))
    return found


def _within(window: WindowAttention, site: Site, place: Tensor, mask: Tensor | None) -> Tensor:
    """What a student's window makes of a call `(b, t, d)` of the teacher's attention."""

    def moved(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(moved, value))
        if isinstance(value, Tensor):
            return value.to(place) if value.is_floating_point() else value.to(place.device)
        return None if isinstance(value, Cache) else value

    args, kwargs = moved(site.args), {name: moved(value) for name, value in site.kwargs.items()}
    return window(site.hidden_states.to(place), args, kwargs, mask=None if mask is None else mask.to(place.device))


def _image_slots(
    student: CABVisionMambaPreTrainedModel,
    teacher: Teacher,
    inputs: Mapping[str, Tensor],
    layers: Sequence[int],
    readings: Sequence[Reading] | None,
) -> list[Slot]:
    """With the teacher's tokens at the places of the student's, as a mixer reads them in order."""
    size = inputs["pixel_values"].shape[-2:]
    seen = teacher(inputs, attentions=True, hidden_states=True)
    seen = align_with_student(seen, teacher.config.patch_size, size, student.config, size, layers)
    found = []
    for block, layer in zip(student.base_model.layers, layers, strict=True):
        hidden = block.norm(seen.hidden_states[layer].to(student.device, block.norm.weight.dtype))
        heads, output = seen.attentions[layer].output.to(student.device), None
        if readings is not None:
            weight, bias = (None if x is None else x.to(student.device).double() for x in readings[layer].output)
            output = nn.functional.linear(heads.flatten(-2).double(), weight, bias)
        found.append(Slot(block.mixer, hidden, heads, output))
    return found
