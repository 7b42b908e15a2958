"""Triton kernels of attention for one token: it is rotated, kept, and reads a long row in pieces, side by side.

Shape legend: `b` batch, `h` head, `t` token, `q` query, `p` head_dim.
"""

import torch
from torch import Tensor

from .decode_kernels import PROGRAMS, overlapping, power_of_two


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

if triton is not None:
    from .decode_kernels import _let_the_next_begin, _wait

    @triton.jit
    def _rotate_head(source, to, p, partner, is_p, cosine, sine):
        own = tl.load(source + p, mask=is_p, other=0.0).to(tl.float32) * cosine
        other = tl.load(source + partner, mask=is_p, other=0.0).to(tl.float32) * sine
        # rounded where the modules round
        own, other = own.to(source.dtype.element_ty), other.to(source.dtype.element_ty)
        tl.store(to + p, own.to(tl.float32) + other.to(tl.float32), mask=is_p)

    @triton.jit
    def _rotate_kernel(
        query,  # (b, QUERIES, DIM), rows and heads apart
        key,  # (b, KEYS, DIM), rows and heads apart
        cosines,  # (b or 1, DIM), rows `of_angles` apart
        sines,  # the same
        rotated_query,  # (b, QUERIES, DIM), made
        rotated_key,  # (b, KEYS, DIM), made
        of_query_row,
        of_query,
        of_key_row,
        of_key,
        of_angles,
        QUERIES: tl.constexpr,
        KEYS: tl.constexpr,
        DIM: tl.constexpr,
        P: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        _let_the_next_begin(OVERLAP)
        row, head, p = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, P)
        is_p = p < DIM
        partner = tl.where(p < DIM // 2, p + DIM // 2, p - DIM // 2)
        sign = tl.where(p < DIM // 2, -1.0, 1.0)
        _wait(OVERLAP)
        cosine = tl.load(cosines + row * of_angles + p, mask=is_p, other=0.0).to(tl.float32)
        sine = tl.load(sines + row * of_angles + p, mask=is_p, other=0.0).to(tl.float32)
        if head < QUERIES:
            source, to = query + row * of_query_row + head * of_query, rotated_query + (row * QUERIES + head) * DIM
            _rotate_head(source, to, p, partner, is_p, cosine, sign * sine)
        else:
            head -= QUERIES
            source, to = key + row * of_key_row + head * of_key, rotated_key + (row * KEYS + head) * DIM
            _rotate_head(source, to, p, partner, is_p, cosine, sign * sine)

    @triton.jit
    def _keep_kernel(
        new_keys,  # (b, h, KEY_DIM), rows and heads apart
        new_values,  # (b, h, VALUE_DIM), rows and heads apart
        places,  # (b,), of int64
        keys,  # (b, h, LENGTH, KEY_DIM), contiguous
        values,  # (b, h, LENGTH, VALUE_DIM), contiguous
        of_key_row,
        of_key,
        of_value_row,
        of_value,
        heads,
        LENGTH: tl.constexpr,
        KEY_DIM: tl.constexpr,
        VALUE_DIM: tl.constexpr,
        P: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        _let_the_next_begin(OVERLAP)
        row, head, p = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, P)
        _wait(OVERLAP)
        place = (row * heads + head) * LENGTH + tl.load(places + row)
        key = tl.load(new_keys + row * of_key_row + head * of_key + p, mask=p < KEY_DIM, other=0.0)
        value = tl.load(new_values + row * of_value_row + head * of_value + p, mask=p < VALUE_DIM, other=0.0)
        tl.store(keys + place * KEY_DIM + p, key, mask=p < KEY_DIM)
        tl.store(values + place * VALUE_DIM + p, value, mask=p < VALUE_DIM)

    @triton.jit
    def _attend_kernel(
        query,  # (b h, QUERIES, KEY_DIM), contiguous
        key,  # (b h, LENGTH, KEY_DIM), contiguous
        value,  # (b h, LENGTH, VALUE_DIM), contiguous
        mask,  # (b, LENGTH), rows `of_mask` apart: whether a key is read
        parts,  # (b h, splits, QUERIES, VALUE_DIM), float32, made: weighted sums of values
        peaks,  # (b h, splits, QUERIES), float32, made: the largest score
        totals,  # (b h, splits, QUERIES), float32, made: sums of weights
        heads,
        of_mask,
        scale,
        QUERIES: tl.constexpr,
        LENGTH: tl.constexpr,
        KEY_DIM: tl.constexpr,
        VALUE_DIM: tl.constexpr,
        SPLIT: tl.constexpr,
        BLOCK: tl.constexpr,
        Q: tl.constexpr,
        P: tl.constexpr,
        V: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        _let_the_next_begin(OVERLAP)
        _wait(OVERLAP)
        head, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
        q, p, v = tl.arange(0, Q), tl.arange(0, P), tl.arange(0, V)
        is_query = (q < QUERIES)[:, None]
        of_query = head * QUERIES * KEY_DIM + q[:, None] * KEY_DIM + p[None, :]
        asked = tl.load(query + of_query, mask=is_query & (p < KEY_DIM)[None, :], other=0.0)
        peak = tl.full((Q,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((Q,), dtype=tl.float32)
        part = tl.zeros((Q, V), dtype=tl.float32)
        for start in range(0, SPLIT, BLOCK):
            at = split * SPLIT + start + tl.arange(0, BLOCK)
            is_read = tl.load(mask + head // heads * of_mask + at, mask=at < LENGTH, other=0) != 0
            of_key = (head * LENGTH + at[:, None]) * KEY_DIM + p[None, :]
            keys = tl.load(key + of_key, mask=is_read[:, None] & (p < KEY_DIM)[None, :], other=0.0)
            scores = tl.dot(asked, tl.trans(keys), input_precision="ieee") * scale
            scores = tl.where(is_read[None, :], scores, float("-inf"))
            higher = tl.maximum(peak, tl.max(scores, axis=1))
            shift = tl.where(higher == float("-inf"), 0.0, higher)  # nothing is read yet
            weights = tl.exp(scores - shift[:, None])
            fade = tl.exp(peak - shift)
            of_value = (head * LENGTH + at[:, None]) * VALUE_DIM + v[None, :]
            values = tl.load(value + of_value, mask=is_read[:, None] & (v < VALUE_DIM)[None, :], other=0.0)
            part = tl.dot(weights.to(values.dtype), values, part * fade[:, None], input_precision="ieee")
            total = total * fade + tl.sum(weights, axis=1)
            peak = higher
        to = (head * tl.num_programs(1) + split) * QUERIES + q
        tl.store(peaks + to, peak, mask=q < QUERIES)
        tl.store(totals + to, total, mask=q < QUERIES)
        tl.store(parts + to[:, None] * VALUE_DIM + v[None, :], part, mask=is_query & (v < VALUE_DIM)[None, :])

    @triton.jit
    def _gather_kernel(
        parts,  # (b h, splits, QUERIES, VALUE_DIM)
        peaks,  # (b h, splits, QUERIES)
        totals,  # (b h, splits, QUERIES)
        out,  # (b h, QUERIES, VALUE_DIM), made
        splits,
        QUERIES: tl.constexpr,
        VALUE_DIM: tl.constexpr,
        V: tl.constexpr,
        SOME: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        _let_the_next_begin(OVERLAP)
        _wait(OVERLAP)
        head, q, v = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, V)
        peak = float("-inf")
        for start in range(0, splits, SOME):
            split = start + tl.arange(0, SOME)
            place = (head * splits + split) * QUERIES + q
            peak = tl.maximum(peak, tl.max(tl.load(peaks + place, mask=split < splits, other=float("-inf"))))
        peak = tl.where(peak == float("-inf"), 0.0, peak)  # nothing is read
        total = tl.zeros((SOME,), dtype=tl.float32)
        gathered = tl.zeros((SOME, V), dtype=tl.float32)
        for start in range(0, splits, SOME):
            split = start + tl.arange(0, SOME)
            place = (head * splits + split) * QUERIES + q
            is_there = (split < splits)[:, None] & (v < VALUE_DIM)[None, :]
            weight = tl.exp(tl.load(peaks + place, mask=split < splits, other=float("-inf")) - peak)
            total += weight * tl.load(totals + place, mask=split < splits, other=0.0)
            part = tl.load(parts + place[:, None] * VALUE_DIM + v[None, :], mask=is_there, other=0.0)
            gathered += weight[:, None] * part
        whole = tl.sum(total)
        y = tl.sum(gathered, axis=0) / tl.where(whole == 0.0, 1.0, whole)
        tl.store(out + (head * QUERIES + q) * VALUE_DIM + v, y, mask=v < VALUE_DIM)


def rotate(query: Tensor, key: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys of one token a row, rotated by its position as Llama does: halves of a head together.

    Args:
        query, key: `(b, h, 1, p)`, each with heads of its own; the last dimension is dense.
        cosines, sines: `(b, 1, p)` or `(1, 1, p)`, of as many columns.
    """
    (rows, queries, _, width), keys = query.shape, key.shape[1]
    rotated = [torch.empty(one.shape, dtype=one.dtype, device=one.device) for one in (query, key)]
    angles = [one.contiguous() for one in (cosines, sines)]
    _rotate_kernel[(rows, queries + keys)](
        query,
        key,
        *angles,
        *rotated,
        *query.stride()[:2],
        *key.stride()[:2],
        width if len(cosines) > 1 else 0,
        QUERIES=queries,
        KEYS=keys,
        DIM=width,
        P=power_of_two(width),
        **overlapping(query.device),
    )
    return tuple(rotated)


def keep(held: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], places: Tensor) -> None:
    """Writes the key and value `(b, h, 1, p)` of one token a row to its place among those `(b, h, t, p)` held.

    Args:
        held: contiguous.
        new: the last dimension is dense.
        places: `(b,)`.
    """
    (keys, values), (key, value) = held, new
    rows, heads, length, width = keys.shape
    _keep_kernel[(rows, heads)](
        key,
        value,
        places,
        keys,
        values,
        *key.stride()[:2],
        *value.stride()[:2],
        heads,
        LENGTH=length,
        KEY_DIM=width,
        VALUE_DIM=values.shape[-1],
        P=power_of_two(max(width, values.shape[-1])),
        **overlapping(keys.device),
    )


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention of few queries to a long row, whose pieces are read side by side.

    Args:
        query: `(b, h, q, p)`, at most 16 of them.
        key, value: `(b, h, t, p)`, contiguous.
        mask: `(b, 1, 1, t)`, true where a key is read; where none is, the result is zero, as PyTorch's.
        scale: of the products.

    Returns:
        `(b, h, q, p)`.
    """
    (rows, heads, queries, width), (length, out_width) = query.shape, value.shape[2:]
    blocks = rows * heads
    split = max(min(power_of_two(length * blocks // (4 * PROGRAMS)), 4096), 64)
    splits = triton.cdiv(length, split)
    mask = mask.expand(rows, 1, 1, length)
    query = query.contiguous()
    parts = torch.empty(blocks, splits, queries, out_width, dtype=torch.float32, device=query.device)
    peaks, totals = (torch.empty(blocks, splits, queries, dtype=torch.float32, device=query.device) for _ in range(2))
    out = torch.empty(rows, heads, queries, out_width, dtype=query.dtype, device=query.device)
    sizes = {"QUERIES": queries, "VALUE_DIM": out_width, "V": max(power_of_two(out_width), 16)}
    sizes |= overlapping(query.device)
    _attend_kernel[(blocks, splits)](
        query,
        key,
        value,
        mask.view(torch.uint8) if mask.dtype == torch.bool else mask,
        parts,
        peaks,
        totals,
        heads,
        mask.stride(0),
        scale,
        LENGTH=length,
        KEY_DIM=width,
        SPLIT=split,
        BLOCK=64,
        Q=16,
        P=max(power_of_two(width), 16),
        **sizes,
    )
    _gather_kernel[(blocks, queries)](parts, peaks, totals, out, splits, SOME=16, **sizes)
    return out
