"""How long a text may get: loss by position, what is found again at each length, and up to where a student holds.

Shapes: `b` batch, `t` token, `n` rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cab_hf.evaluation.language import logits_in_pieces
from cab_hf.evaluation.metrics import mean_interval
from cab_hf.evaluation.needles import key_value_recall, key_value_rows, needle_recall, needle_rows
from cab_hf.evaluation.recall import copying_recall
from cab_hf.inference import check_causal, evaluating, num_positions


SHARE = 0.9
"""Of the teacher's recall: what a student must find again where it holds."""

FINDS = 0.1
"""Recall of a teacher below which a test is no measure of its student."""

REFERENCE = 512
"""Tokens: where a student holds, its loss is not further above its teacher's than just before here."""

RETRIEVAL = ("needle", "needles", "key-value", "copying")

_NEEDLES = {"needle": {"n": 64}, "needles": {"needles": 4, "n": 32}}
_ROWS = 16
_SPAN = 64
_CHUNK = 512


def limits_of(models: Mapping[str, PreTrainedModel]) -> dict[str, int | None]:
    """Tokens of a row that "teacher" and "student" are measured at: a teacher's positions, a student's only where they
    are learned. What rotary positions make of a longer row is the student's own affair, and shown."""
    limits = {who: num_positions(model) for who, model in models.items()}
    config = models["student"].config.get_text_config()
    return limits | ({"student": None} if getattr(config, "rope_parameters", None) else {})


def check_lengths(tokenizer: PreTrainedTokenizerBase, text: Tensor, lengths: Sequence[int]) -> None:
    """That rows of the lengths have room for every test of `retrieval`, and the text for `loss_by_position`.

    Raises:
        ValueError: They have not; the message says how many tokens are needed.
    """
    shortest = min(lengths)
    _row_length(text, max(lengths))
    if shortest < 2 * _SPAN:
        raise ValueError(f"A length for retrieval is {shortest}, but copying takes {2 * _SPAN} tokens. Use more.")
    for settings in _NEEDLES.values():
        needle_rows(tokenizer, text, shortest, **settings)
    key_value_rows(tokenizer, text, shortest)


def retrieval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Sequence[int],
    text: Tensor,
    length: int,
    *,
    batch_size: int = 8,
) -> dict[str, dict[str, Any]]:
    """What a model finds again in rows of a length.

    Args:
        model: Any causal language model.
        tokenizer: Its tokenizer.
        tokens: Token ids of its vocabulary, without special ones, for random sequences.
        text: Token ids (t,) of a text, for needles and pairs.
        length: Tokens of a row.
        batch_size: Rows a forward pass.

    Returns:
        `needle`, one in a text, and `needles`, four (`needle_recall`); `key-value`, eight lines before a text
        (`key_value_recall`); `copying` of 64 random tokens over others (`copying_recall`).

    Raises:
        ValueError: As `check_lengths`.
    """
    options = {"batch_size": batch_size}
    return {
        **{
            name: needle_recall(model, tokenizer, text, length, **settings, **options)
            for name, settings in _NEEDLES.items()
        },
        "key-value": key_value_recall(model, tokenizer, text, length, **options),
        "copying": copying_recall(model, tokens, length - 2 * _SPAN, length=_SPAN, **options),
    }


def loss_by_position(
    models: Mapping[str, PreTrainedModel],
    text: Tensor,
    length: int,
    *,
    limits: Mapping[str, int | None] | None = None,
    batch_size: int = 1,
) -> dict[str, Any]:
    """Loss of the tokens by how many stand before them, in nats, averaged between powers of two.

    Args:
        models: "student" and "teacher", or one of them.
        text: Token ids (t,) of a text. It is cut into rows, 16 at most.
        length: Tokens of a row; halved until the text has two rows.
        limits: Tokens of a row's beginning that a model reads, by its name; None: all.
        batch_size: Rows a forward pass.

    Returns:
        `length` of the rows, `n_rows`, and `buckets`: `from` and `to`, the tokens before the predicted ones; `student`
        and `teacher`, each `nll` and `ci95` over rows, or None beyond its limit; `difference`, student less teacher;
        after 512 `rise`, the student's loss less that before 512, and `difference_rise`, the same of the difference.
        Each of these has its interval over rows as `..._ci95`.

    Raises:
        ValueError: The text has fewer than two rows of 64 tokens.
    """
    length = _row_length(text, length)
    rows = text[: len(text) // length * length].view(-1, length)
    # Spread over the text, as its parts may differ.
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(_ROWS, len(rows))).round().astype(int))]
    edges = [0, *(2**power for power in range(6, 31) if 2**power < length), length]
    sums: dict[str, np.ndarray] = {}
    for who, model in models.items():
        check_causal(model)
        shown = rows[:, : (limits or {}).get(who)]
        losses = []
        with evaluating(model):
            for batch in tqdm(shown.split(batch_size), desc=f"Loss by position, {who}"):
                losses.append(_losses(model, batch))
        losses = np.concatenate(losses)  # (n, t - 1), at [t] of token t + 1, which t + 1 tokens stand before
        sums[who] = np.stack(
            [
                losses[:, max(start - 1, 0) : end - 1].mean(axis=1)
                if end <= shown.shape[1]
                else np.full(len(rows), np.nan)
                for start, end in zip(edges, edges[1:])
            ]
        )  # (buckets, n)
    if len(sums) == 2:
        sums["difference"] = sums["student"] - sums["teacher"]
    buckets = []
    before = edges.index(REFERENCE) - 1 if REFERENCE in edges else None
    for index, (start, end) in enumerate(zip(edges, edges[1:])):
        bucket: dict[str, Any] = {"from": max(start, 1), "to": end}
        measured = {who: values for who, values in sums.items() if not np.isnan(values[index]).any()}
        for who in models:
            bucket[who] = _interval("nll", measured[who][index], "ci95") if who in measured else None
        if "difference" in measured:
            bucket |= _interval("difference", measured["difference"][index])
        if before is not None and index > before:
            for who, name in (("student", "rise"), ("difference", "difference_rise")):
                bucket |= _interval(name, measured[who][index] - measured[who][before]) if who in measured else {}
        buckets.append(bucket)
    return {"length": length, "n_rows": len(rows), "buckets": buckets}


def held_length(lengths: Sequence[int], found: Mapping[str, Any], loss: Mapping[str, Any]) -> dict[str, int]:
    """Up to which length a student holds: the longest one where it does at that length and at all shorter ones.

    Retrieval holds where the student finds at least `SHARE` of what its teacher finds; beyond the teacher's positions,
    of what it finds at the longest length that it was measured at. Where a teacher finds less than `FINDS`, a
    test says nothing any more, and holds no further. Loss holds where the student's distance to its teacher at the
    last tokens of the length is not above that before `REFERENCE` tokens, beyond its paired 95 % interval; beyond the
    teacher's positions the student's own loss is taken.

    Args:
        lengths: What was measured.
        found: Name of a test -> length -> {"teacher": ... or None, "student": ...}, each with `recall`.
        loss: What `loss_by_position` returns.

    Returns:
        Each test -> its length, also `loss`, and `all`, the smallest of them. 0: not even the shortest.
    """
    lengths, held = sorted(lengths), {}
    for test, by_length in found.items():
        held[test], wanted = 0, 1.0
        for length in lengths:
            row = by_length[str(length)]
            if row["teacher"] is not None:
                if row["teacher"]["recall"] < FINDS:
                    break
                wanted = row["teacher"]["recall"]
            if row["student"] is None or row["student"]["recall"] < SHARE * wanted:
                break
            held[test] = length
    held["loss"] = 0
    for length in lengths:
        last = next((bucket for bucket in loss["buckets"] if bucket["from"] < length <= bucket["to"]), None)
        if last is None or last["student"] is None:
            break
        if last.get("difference_rise_ci95", last.get("rise_ci95", [0.0]))[0] > 0:
            break
        held["loss"] = length
    return held | {"all": min(held.values())}


def _row_length(text: Tensor, length: int) -> int:
    """Tokens of a row, of which the text has two at least."""
    while length > len(text) // 2:
        length //= 2
    if length < 64:
        raise ValueError(f"The text has {len(text)} tokens, too few to see how loss changes. Give at least 128.")
    return length


def _losses(model: PreTrainedModel, tokens: Tensor) -> np.ndarray:
    """Loss of each token of rows (b, t) but the first, in nats: (b, t - 1)."""
    parts = []
    for start, logits in logits_in_pieces(model, tokens):
        targets = tokens[:, start + 1 : start + logits.shape[1] + 1].to(logits.device)
        for chunk, own in zip(logits.split(_CHUNK, 1), targets.split(_CHUNK, 1)):
            chunk = chunk[:, : own.shape[1]].float()
            parts.append(F.cross_entropy(chunk.transpose(1, 2), own, reduction="none").double().cpu())
    return torch.cat(parts, dim=1).numpy()


def _interval(name: str, values: np.ndarray, bounds: str | None = None) -> dict[str, Any]:
    mean, low, high = mean_interval(values)
    return {name: mean, bounds or f"{name}_ci95": [low, high]}
