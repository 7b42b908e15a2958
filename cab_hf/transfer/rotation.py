"""Reads by how much a teacher's queries and keys turn from token to token: no family is known here.

Of hidden states that are alike at all places, queries and keys differ by their rotation alone.

Shapes: `b` batch, `h` head, `t` token, `p` features of a head, `r` pairs.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from cab_hf.inference import evaluating
from cab_hf.models.state_rotation import rotate
from cab_hf.models.students import body_of
from cab_hf.teachers.attention_interface import collected_calls
from cab_hf.teachers.examination import attending, recorded, tiny_batch
from cab_hf.teachers.rotary import relative_error
from cab_hf.transfer.reading import called


logger = logging.get_logger(__name__)

_TOKENS = 6


class Rotation(NamedTuple):
    """How queries and keys of an attention turn.

    Attributes:
        frequencies: radians a token, one a pair `(r,)`, float32.
        interleaved: whether pairs are features 2 i and 2 i + 1, in place of i and i + r.
    """

    frequencies: Tensor
    interleaved: bool


@torch.no_grad()
def read_rotations(model: PreTrainedModel) -> dict[str, Rotation | None]:
    """How each attention of a model turns, by the module's path inside its body, in the order of their calls.

    Args:
        model: any model of transformers that reads tokens, whole; left as it was.

    Example:
        >>> from cab_hf.teachers.demo import random_llama
        >>> rotations = read_rotations(random_llama()[0])
        >>> rotations["layers.0.self_attn"].frequencies
        tensor([1.0000, 0.1000, 0.0100, 0.0010])
    """
    body = body_of(model)
    if model.main_input_name != "input_ids":
        return {}  # images are turned by two coordinates
    tokens = tiny_batch(model, body)["input_ids"][:1, :1].expand(1, _TOKENS)
    plain = {"use_cache": False} if "use_cache" in inspect.signature(body.forward).parameters else {}
    rotations: dict[str, Rotation | None] = {}
    with evaluating(model), recorded(body):
        with collected_calls() as calls, called(dict(body.named_modules())) as sites:
            body(input_ids=tokens, **plain)
        shown, _ = attending(body, calls)
        known = [one.float() for name, one in body.named_buffers() if name.endswith("inv_freq") and one.ndim == 1]
        for path in shown:
            site = sites[path]
            with collected_calls() as calls:
                site.again(site.hidden_states[:, :1].expand_as(site.hidden_states))
            query, key, _ = calls[0][1].attention
            rotations[path] = _rotation_of(query, key, known)
    return rotations


def kept_rotations(teacher: PreTrainedModel) -> dict[str, Rotation | None]:
    """`read_rotations` for a student that is to keep them; a line of the log tells where there are none."""
    rotations = read_rotations(teacher)
    if not any(rotations.values()):
        logger.warning(
            f"`keep_rotary` is True, but no rotation was read of the attention of this {type(teacher).__name__}: no "
            "state of the student turns."
        )
    return rotations


def rotary_fields(turning: Sequence[Rotation | None]) -> dict[str, Any]:
    """Fields of a student's config whose layers turn so: nothing where none does.

    Raises:
        ValueError: some turn pairs of neighbours, and others halves.
    """
    ways = {one.interleaved for one in turning if one is not None}
    if not ways:
        return {}
    if len(ways) > 1:
        raise ValueError(
            "`keep_rotary` is True, but the teacher's layers rotate in two ways, neighbours and halves: leave it out."
        )
    frequencies = [[] if one is None else one.frequencies.tolist() for one in turning]
    same = all(one == frequencies[0] for one in frequencies)
    return {"rotary_frequencies": frequencies[0] if same else frequencies, "rotary_interleaved": ways.pop()}


def _rotation_of(query: Tensor, key: Tensor, known: list[Tensor]) -> Rotation | None:
    """The rotation of queries and keys `(1, h, t, p)` of one token at t places; None where there is none.

    Args:
        known: frequencies that modules of the model hold. What half precision shows is too coarse for far tokens.
    """
    rows = torch.cat((query[0], key[0])).double()  # (h, t, p)
    exact = query.dtype in (torch.float32, torch.float64)
    width, least = rows.shape[-1], 1e-4 if exact else 3e-2
    if relative_error(rows, rows[:, :1].expand_as(rows)) < (1e-6 if exact else 1e-3):
        return None
    best, error = None, math.inf
    for interleaved, pairs in [(False, width // 2), (True, width // 2), *((False, r) for r in range(1, width // 2))]:
        turning = rows[..., : 2 * pairs]
        parts = turning.unflatten(-1, (pairs, 2) if interleaved else (2, pairs))
        z = torch.complex(*parts.unbind(-1 if interleaved else -2))  # (h, t, r)
        frequencies = (z[:, 1:] * z[:, :-1].conj()).sum((0, 1)).angle()
        angles = torch.arange(rows.shape[1], device=rows.device)[:, None] * frequencies
        here = relative_error(rotate(rows[:, :1].expand_as(rows), angles, interleaved), rows)
        if here < error / 2:
            best, error = Rotation(frequencies.float().cpu(), interleaved), here
    if not error < least:
        return None
    for one in known:
        rest = best.frequencies.clone()
        if len(one) <= len(rest) and (best.interleaved or len(one) == len(rest)):
            rest[: len(one)] -= one.cpu()
            if bool((rest.abs() < 10 * least).all()):
                return Rotation(one.cpu(), best.interleaved)
    return best if exact else None
