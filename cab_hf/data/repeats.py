"""Text to learn copying from: spans of training rows come again after a gap.

Perplexity on plain text hardly asks a student to copy from its context, and a distilled one does not learn it there.

Shape legend: `t` token.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from cab_hf.data.packing import IGNORE_INDEX


SHORTEST, LONGEST = 8, 128


def insert_repeats(blocks: Dataset, fraction: float, tokens: Sequence[int], *, seed: int = 0) -> Dataset:
    """Repeats spans in a share of packed rows; the other rows stay as they are.

    A chosen row is filled from its start: a span of 8 to 128 tokens, a gap of 1 token or more, the span again, and so
    on while there is room; lengths and gaps are log-uniform. Half of the spans are the row's own text, half random
    tokens, which only copying can predict. The row becomes one document, since no state crosses a document's border.

    Args:
        blocks: Rows of `pack_documents`, of at least 17 tokens each.
        fraction: Share of the rows, drawn by the seed.
        tokens: Token ids to draw random spans from: all but special ones.
        seed: Picks rows, places and tokens; a row's are its own whatever the other rows are.

    Returns:
        Rows of the same columns and length.

    Raises:
        ValueError: `fraction` outside [0, 1], no tokens, or rows too short for a span and its repeat.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction is {fraction}, outside [0, 1]. Give the share of rows; 0 leaves them all alone.")
    if fraction == 0.0:
        return blocks
    if len(tokens) == 0:
        raise ValueError("tokens is empty. Give the ids of the vocabulary without special tokens.")
    length = len(blocks[0]["input_ids"])
    if length <= 2 * SHORTEST:
        raise ValueError(
            f"Rows have {length} tokens, and a span of {SHORTEST}, a gap and the span again take {2 * SHORTEST + 1}. "
            "Use a larger block_size, or fraction=0."
        )
    pool = np.asarray(tokens)
    return blocks.map(
        _repeat,
        with_indices=True,
        fn_kwargs={"fraction": fraction, "pool": pool, "seed": seed},
        desc="Repeating spans",
    )


def _repeat(row: dict[str, list[int]], index: int, fraction: float, pool: np.ndarray, seed: int) -> dict[str, Any]:
    generator = np.random.default_rng([seed, index])
    # `insert_facts` takes the rows at the high end of the same draw.
    if generator.random() >= fraction:
        return row
    ids = np.array(row["input_ids"])
    start = 0
    while (room := len(ids) - start) > 2 * SHORTEST:
        length = log_uniform(generator, SHORTEST, min(LONGEST, (room - 1) // 2))
        gap = log_uniform(generator, 1, room - 2 * length)
        if generator.random() < 0.5:
            ids[start : start + length] = generator.choice(pool, length)
        end = start + 2 * length + gap
        ids[end - length : end] = ids[start : start + length]
        start = end
    labels = ids.copy()
    labels[0] = IGNORE_INDEX
    repeated = {"input_ids": ids, "labels": labels, "seq_idx": np.zeros_like(ids), "position_ids": np.arange(len(ids))}
    return {name: repeated[name] for name in row}


def log_uniform(generator: np.random.Generator, low: int, high: int) -> int:
    """From `low` to `high`, both included."""
    return min(high, math.floor(low * ((high + 1) / low) ** generator.random()))
