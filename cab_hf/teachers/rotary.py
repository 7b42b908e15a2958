"""Takes a teacher's rotary position embedding off its queries and keys, with the teacher's own angles.

Shapes: `b` batch, `t` token, `h` head, `p` head_dim.

Source: rotary position embedding, arXiv 2104.09864.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class RotaryLayout(NamedTuple):
    """Where a model keeps what it rotates.

    Attributes:
        pairs: features rotated together: "halves" (i and i + n/2) or "interleaved" (2i and 2i + 1).
        columns: the columns of the cosine table that belong to the pairs: the "first" half, the "even" ones, or "all".
    """

    pairs: str
    columns: str


LAYOUTS = (
    RotaryLayout("halves", "first"),
    RotaryLayout("interleaved", "first"),
    RotaryLayout("interleaved", "even"),
    RotaryLayout("halves", "all"),
    RotaryLayout("interleaved", "all"),
)


class RotaryPlan(NamedTuple):
    """How to undo a teacher's rotation.

    Attributes:
        layout: that of all layers.
        tables: for each layer, which of the tables computed in a forward pass it uses; None for a layer without.
        error: largest relative difference that a shift of all positions leaves in unrotated queries or keys.
    """

    layout: RotaryLayout
    tables: tuple[int | None, ...]
    error: float


def relative_error(x: Tensor, target: Tensor) -> float:
    """Norm of the difference over the norm of `target`."""
    x, target = x.float(), target.float()
    return float((x - target).norm() / target.norm().clamp_min(1e-12))


@contextmanager
def recorded_tables(model: nn.Module) -> Iterator[list[Any]]:
    """Collects, in order, what the model's `rotary_emb` modules return inside the block: its own angles."""
    tables: list[Any] = []
    handles = [
        module.register_forward_hook(lambda module, args, output: tables.append(output))
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "rotary_emb"
    ]
    try:
        yield tables
    finally:
        for handle in handles:
            handle.remove()


def undo_rotary(x: Tensor, table: tuple[Tensor, Tensor], layout: RotaryLayout) -> Tensor:
    """Rotates queries or keys back.

    Args:
        x: `(b, h, t, p)`.
        table: cosine and sine, `(b or 1, t, r)` each. Features past the rotated ones (partial rotary) stay.
        layout: which features and columns belong together.

    Returns:
        `(b, h, t, p)` in the dtype of `x`.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    columns = table[0].shape[-1]
    selected = {"first": slice(0, columns // 2), "even": slice(0, None, 2), "all": slice(None)}[layout.columns]
    cos, sin = (part[..., selected].unsqueeze(1).to(x.device, dtype) for part in table)  # (b, 1, t, pairs)
    rotated = 2 * cos.shape[-1]
    if layout.pairs == "halves":
        first, second = x[..., : rotated // 2].to(dtype), x[..., rotated // 2 : rotated].to(dtype)
    else:
        first, second = x[..., 0:rotated:2].to(dtype), x[..., 1:rotated:2].to(dtype)
    # The inverse of what was applied: a rounded table, and the scaling of long-context variants, are part of it.
    norm = cos.square() + sin.square()
    pair = (first * cos + second * sin) / norm, (second * cos - first * sin) / norm
    straight = torch.cat(pair, dim=-1) if layout.pairs == "halves" else torch.stack(pair, dim=-1).flatten(-2)
    return torch.cat((straight.to(x.dtype), x[..., rotated:]), dim=-1)


def find_plan(
    runs: Sequence[Sequence[tuple[Tensor, Tensor]]], tables: Sequence[Sequence[tuple[Tensor, Tensor]]]
) -> RotaryPlan:
    """Finds the layout, and each layer's table, with which a shift of all positions leaves no trace.

    A model that knows positions by rotation only sees distances, which a shift does not change: what differs between
    its queries (keys) in two shifted runs of the same tokens is the rotation.

    Args:
        runs: two forward passes at shifted positions, each with `(query, key)` `(b, h, t, p)` of every layer.
        tables: for each of the two, what `recorded_tables` collected.
    """
    first_run, second_run = runs

    def error(layer: int, index: int | None, layout: RotaryLayout) -> float:
        pairs = [(x, y) for x, y in zip(first_run[layer], second_run[layer], strict=True)]
        if index is not None:
            a, b = tables[0][index], tables[1][index]
            pairs = [(undo_rotary(x, a, layout), undo_rotary(y, b, layout)) for x, y in pairs]
        return max(relative_error(x, y) for x, y in pairs)

    plans = []
    for layout in LAYOUTS:
        chosen, errors = [], []
        for layer, (query, _) in enumerate(first_run):
            fitting = [i for i, table in enumerate(tables[0]) if _fits(table, layout, query.shape[-1])]
            options = [(error(layer, index, layout), index) for index in [*fitting, None]]
            smallest, index = min(options, key=lambda option: option[0])
            chosen.append(index)
            errors.append(smallest)
        plans.append(RotaryPlan(layout, tuple(chosen), max(errors)))
    return min(plans, key=lambda plan: plan.error)


def _fits(table: Any, layout: RotaryLayout, head_dim: int) -> bool:
    """Whether a rotary module returned cosine and sine `(b or 1, t, r)` that can rotate a head in this layout."""
    if not isinstance(table, tuple) or len(table) != 2 or table[0].ndim != 3:
        return False
    columns = table[0].shape[-1]
    if layout.columns == "all":
        return 2 * columns <= head_dim
    return columns <= head_dim and columns % 2 == 0
