"""A gate that starts as nearly constant one without a bias: weights fitted to a teacher's hidden states.

The norm behind an SSD mixer's gate divides by the size of each group. So a gate that is the same for all channels of a
group has no effect there, as long as it is positive.

Shapes: `b` batch, `t` token, `d` width.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cab_hf.inference import num_positions
from cab_hf.models.mixers import UNIT_GATE, SSDMixer
from cab_hf.models.students import MixerPreTrainedModel
from cab_hf.teachers.teacher import borrowed_teacher
from cab_hf.transfer.slots import slots


RANDOM_ROWS, RANDOM_LENGTH = 8, 256


@torch.no_grad()
def fit_gate(
    student: MixerPreTrainedModel,
    teacher: PreTrainedModel,
    inputs: Mapping[str, Tensor] | None = None,
    layer_map: str | Sequence[int] = "floor",
    ridge: float = 1e-4,
) -> None:
    """Makes every mixer's gate nearly one, in place: all its rows become the `w` that fits `w x = 1`, scaled.

    Args:
        student: a language student with the teacher's norms.
        teacher: a model of a known family, left as it was.
        inputs: one batch: `input_ids` `(b, t)` and, if padded, `attention_mask` `(b, t)`. Without, random tokens: what
            states have in common they mostly have in any text.
        layer_map: the teacher layer of each student layer, as in `student_from_teacher`.
        ridge: pull of `w` towards zero, relative to the mean energy of a feature.
    """
    inputs = _random_tokens(teacher) if inputs is None else inputs
    mask = inputs.get("attention_mask")
    real = slice(None) if mask is None else mask.bool().to(student.device)
    with borrowed_teacher(teacher) as borrowed:
        found = slots(student, borrowed, inputs, layer_map)
    for slot in found:
        normed = slot.hidden_states[real].flatten(0, -2).double()  # (t, d)
        gram = normed.T @ normed
        pull = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        row = torch.linalg.solve(gram + pull, normed.sum(0))  # (d,)
        width, weight = slot.mixer.config.mixer_width, slot.mixer.in_proj.weight
        gate = weight[:width] if isinstance(slot.mixer, SSDMixer) else weight[width:]
        gate.copy_(UNIT_GATE * row.expand_as(gate))


def _random_tokens(teacher: PreTrainedModel) -> dict[str, Tensor]:
    config = teacher.config.get_text_config()
    shape = (RANDOM_ROWS, min(RANDOM_LENGTH, num_positions(teacher) or RANDOM_LENGTH))
    tokens = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens.to(teacher.device)}
