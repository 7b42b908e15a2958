"""Memories that fit: each head of a mixer forgets, and looks back, as it explains its teacher's head best.

Shapes: `b` batch, `t` token, `h` head, `p` head_dim.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cab_hf.inference import evaluating
from cab_hf.models.mixers import BidirectionalMixer, SSDMixer, inverse_softplus
from cab_hf.models.students import MixerPreTrainedModel
from cab_hf.teachers.teacher import borrowed_teacher
from cab_hf.transfer.slots import Slot, slots


MEMORIES = tuple(2**power for power in range(11))
DELAYS = (0, 1)
MOST_TOKENS = 2048
RIDGE = 1e-3


@torch.no_grad()
def fit_memories(
    student: MixerPreTrainedModel,
    teacher: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    layer_map: str | Sequence[int] = "floor",
    memories: Sequence[float] = MEMORIES,
    delays: Sequence[int] = DELAYS,
) -> list[tuple[Tensor, Tensor]]:
    """Gives every head of a mixer one of some memories and delays, in place.

    A head forgets by a factor of e in as many tokens as its memory has, and reads nothing newer than its delay, as
    heads do that look at the token before. For each pair the mixer reads the teacher's hidden states of its layer; a
    head keeps the pair with which its output, by a linear map of its own, explains most of what the teacher's head
    says. Memories are the time steps' biases, delays stand in the taps of the convolution, which become one tap of
    their sum. States that turn take a delayed token for one that is so much newer. Only moving averages are fitted
    (`transition_init="moving_average"`), of language students' causal SSD mixers with as many heads as the teacher's
    attention has.

    Args:
        student: a language student with its attention's projections (`student_from_teacher`).
        teacher: left as it was.
        inputs: one batch: `input_ids` `(b, t)` and, if padded, `attention_mask` `(b, t)`. As many rows as hold
            `MOST_TOKENS` tokens decide, or so much of the first.
        layer_map: the teacher layer of each student layer, as in `student_from_teacher`.
        memories: to choose among, in tokens; longer ones than rows can hardly be told apart.
        delays: to choose among, in tokens; those that the convolution has no tap for are left out. A mixer whose
            convolution starts otherwise than transparent, or whose heads share their B, has none, and its taps stay.

    Returns:
        The memories and delays, `(h,)` each, of every mixer that was fitted.

    Example:
        >>> from cab_hf import student_from_teacher
        >>> from cab_hf.teachers.demo import random_llama
        >>> teacher, _ = random_llama()
        >>> student = student_from_teacher(teacher, data=())
        >>> chosen = fit_memories(student, teacher, {"input_ids": torch.arange(40).view(2, 20)})
        >>> memory, delay = chosen[0]
        >>> len(chosen), memory.shape, delay.shape
        (4, torch.Size([4]), torch.Size([4]))
    """
    if not any(map(_is_average, student.mixer_list)) or student.main_input_name != "input_ids":
        return []
    rows = max(MOST_TOKENS // inputs["input_ids"].shape[1], 1)
    inputs = {name: value[:rows, :MOST_TOKENS] for name, value in inputs.items() if value.ndim == 2}
    mask = inputs.get("attention_mask")
    mask = None if mask is None else mask.to(student.device)
    with borrowed_teacher(teacher) as borrowed, evaluating(student):
        found = slots(student, borrowed, inputs, layer_map)
        fitting = [one for one in found if _is_average(one.mixer) and len(one.mixer.dt_bias) == one.heads.shape[2]]
        chosen = [_best(slot, mask, _pairs(slot.mixer, memories, delays)) for slot in fitting]
    for slot, pair in zip(fitting, chosen):
        _start(slot.mixer, *pair)
    return chosen


def _is_average(mixer: nn.Module) -> bool:
    is_causal_ssd = isinstance(mixer, SSDMixer) and not isinstance(mixer, BidirectionalMixer)
    return is_causal_ssd and mixer.config.transition_init == "moving_average"


def _pairs(mixer: SSDMixer, memories: Sequence[float], delays: Sequence[int]) -> list[tuple[float, float]]:
    delays = [one for one in delays if one < mixer.config.conv_kernel] if _may_delay(mixer) else [0]
    return [(float(memory), float(delay)) for memory in memories for delay in delays]


def _may_delay(mixer: SSDMixer) -> bool:
    return mixer.config.conv_init == "transparent" and mixer.config.n_groups == mixer.config.num_heads


def _start(mixer: SSDMixer, memory: Tensor, delay: Tensor) -> None:
    """Sets memories and delays of a mixer's heads, `(h,)` each, in tokens."""
    mixer.dt_bias.copy_(inverse_softplus(1 / (memory * mixer.A_log.float().exp())))
    if not _may_delay(mixer):
        return
    config, taps = mixer.config, mixer.conv1d.weight.shape[-1]
    delays = torch.cat([delay.repeat_interleave(size) for size in (config.head_dim, config.state_size)])
    rows = mixer.conv1d.weight[: len(delays), 0]  # x and B, (d + h * n, k)
    size = rows.sum(-1, keepdim=True)
    rows.copy_(size * (torch.arange(taps, device=rows.device) == taps - 1 - delays[:, None]))


def _best(slot: Slot, mask: Tensor | None, pairs: Sequence[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    """The memory and the delay `(h,)` of each head, which nothing is left of in the mixer."""
    mixer, real = slot.mixer, slice(None) if mask is None else mask.bool()
    target = slot.heads[real].double().flatten(0, -3).transpose(0, 1)  # (h, t, p)
    before, taps, explained = mixer.dt_bias.clone(), mixer.conv1d.weight.clone(), []
    stream, gate = mixer.stream_and_gate(slot.hidden_states)
    try:
        for memory, delay in pairs:
            _start(mixer, torch.full_like(before, memory), torch.full_like(before, delay).long())
            y = mixer.gated(mixer.scan(stream, attention_mask=mask)[0], gate).unflatten(-1, (len(before), -1))
            y = y[real].double().flatten(0, -3).transpose(0, 1)
            gram, product = y.transpose(1, 2) @ y, y.transpose(1, 2) @ target  # (h, p, p)
            pull = RIDGE * gram.diagonal(dim1=1, dim2=2).mean(-1)[:, None] + 1e-30
            maps = torch.linalg.solve(gram + torch.diag_embed(pull.expand(-1, gram.shape[-1])), product)
            explained.append((maps * product).sum((1, 2)))
    finally:
        mixer.dt_bias.copy_(before)
        mixer.conv1d.weight.copy_(taps)
    best = torch.tensor(pairs, device=before.device)[torch.stack(explained).argmax(0)]  # (h, 2)
    return best[:, 0], best[:, 1].long()
