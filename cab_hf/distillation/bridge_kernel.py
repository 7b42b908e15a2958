"""A Triton kernel that makes the bridge's error, and its gradient before the activation, in one pass over the targets.

Shape legend: `m` MLPs, `r` rows (batch * token), `k` hidden width, `f` features, `s` blocks of rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


ROWS, FEATURES, STAGES, WARPS = 64, 64, 2, 4
LARGEST_HIDDEN_SIZE = 256
"""Columns that a block of rows can keep in registers."""


@triton.jit
def _bridge_error_kernel(
    product,  # (r, k), contiguous
    up_bias,  # (k,)
    weight,  # (f, k), contiguous
    bias,  # (f,)
    slope,  # (1,)
    target,  # any strides over batch, token, head, head_dim
    real,  # (r,) or nothing
    hidden,  # (r, k), made
    error,  # (r, f), made
    grad,  # (r, k), made
    sums,  # (s, f + k + 1), made
    rows,
    tokens,
    of_batch,
    of_token,
    of_head,
    of_column,
    HEAD_DIM: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    IS_MASKED: tl.constexpr,
    IS_TRAINED: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    row = block * R + tl.arange(0, R)
    column = tl.arange(0, K)
    is_row, is_column = row < rows, column < HIDDEN_SIZE
    is_hidden = is_row[:, None] & is_column[None, :]
    hidden_place = row[:, None] * HIDDEN_SIZE + column[None, :]
    before = tl.load(product + hidden_place, mask=is_hidden, other=0.0).to(tl.float32)
    before += tl.load(up_bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    gate = tl.sigmoid(before)
    activated = (before * gate).to(weight.dtype.element_ty)
    is_real = is_row
    if IS_MASKED:
        is_real = is_row & (tl.load(real + row, mask=is_row, other=0) != 0)
    target_row = target + (row // tokens) * of_batch + (row % tokens) * of_token
    factor = tl.load(slope)
    sums += block * (WIDTH + HIDDEN_SIZE + 1 if IS_TRAINED else 1)
    slopes = tl.zeros((R, K), dtype=tl.float32)
    squares = tl.zeros((R,), dtype=tl.float32)
    for start in range(0, WIDTH, F):
        feature = start + tl.arange(0, F)
        is_feature = feature < WIDTH
        weights = tl.load(
            weight + feature[:, None] * HIDDEN_SIZE + column[None, :],
            mask=is_feature[:, None] & is_column[None, :],
            other=0.0,
        )
        is_counted = is_real[:, None] & is_feature[None, :]
        feature_place = (feature // HEAD_DIM) * of_head + (feature % HEAD_DIM) * of_column
        wanted = tl.load(target_row[:, None] + feature_place[None, :], mask=is_counted, other=0.0).to(tl.float32)
        constant = tl.load(bias + feature, mask=is_feature, other=0.0).to(tl.float32)
        difference = tl.dot(activated, tl.trans(weights)) - (wanted - constant[None, :])
        difference = tl.where(is_counted, difference, 0.0)
        squares += tl.sum(difference * difference, axis=1)
        if IS_TRAINED:
            scaled = (difference * factor).to(weight.dtype.element_ty)
            place = row[:, None] * WIDTH + feature[None, :]
            tl.store(error + place, scaled, mask=is_row[:, None] & is_feature[None, :])
            tl.store(sums + feature, tl.sum(scaled.to(tl.float32), axis=0), mask=is_feature)
            slopes += tl.dot(scaled, weights)
    if IS_TRAINED:
        slopes = (slopes * gate * (1.0 + before * (1.0 - gate))).to(weight.dtype.element_ty)
        tl.store(grad + hidden_place, slopes, mask=is_hidden)
        tl.store(hidden + hidden_place, activated, mask=is_hidden)
        tl.store(sums + WIDTH + column, tl.sum(slopes.to(tl.float32), axis=0), mask=is_column)
        sums += WIDTH + HIDDEN_SIZE
    tl.store(sums, tl.sum(squares))


def fits_kernel(dtype: torch.dtype, hidden_size: int) -> bool:
    return dtype in (torch.float16, torch.bfloat16) and hidden_size <= LARGEST_HIDDEN_SIZE


@torch.library.custom_op("cab_hf::bridge_error", mutates_args=())
def bridge_error(
    product: Tensor,
    up_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    slopes: Tensor,
    real: Tensor | None,
    targets: list[Tensor],
    is_trained: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The second half of `m` MLPs, their squared error, and what its gradient is made of.

    Args:
        product: `(m, r, k)`, bfloat16 or float16: the input times the first weight.
        up_bias: `(m, k)`, of the first linear layer.
        weight, bias: `(m, f, k)` in the dtype of `product`, `(m, f)`: of the second one.
        slopes: `(m,)`, float32: what the gradient is multiplied by.
        real: `(r,)`, bool; None if all rows are.
        targets: `m` of `(b, t, f)` or `(b, t, h, p)`, of any strides and dtype.
        is_trained: whether anything but the squared error is wanted.

    Returns:
        hidden `(m, r, k)`: the activations; error `(m, r, f)` and grad `(m, r, k)`: the gradient before the second and
        the first layer's bias; sums `(m, s, f + k + 1)`, float32: of each block of rows the sum of `error` and of
        `grad`, and the squared error. Without `is_trained` nothing but the last is filled, of width 1.
    """
    hidden, error, grad, sums = _outputs(product, weight, is_trained)
    rows, hidden_size = product.shape[1:]
    product, weight, bias, up_bias = (tensor.contiguous() for tensor in (product, weight, bias, up_bias))
    for i, target in enumerate(targets):
        strides = target.stride() if target.dim() == 4 else (*target.stride()[:2], 0, target.stride(2))
        _bridge_error_kernel[(sums.shape[1],)](
            product[i],
            up_bias[i],
            weight[i],
            bias[i],
            slopes[i : i + 1],
            target,
            slopes if real is None else real,
            hidden[i] if is_trained else hidden,
            error[i] if is_trained else error,
            grad[i] if is_trained else grad,
            sums[i],
            rows,
            target.shape[1],
            *strides,
            HEAD_DIM=target.shape[-1],
            HIDDEN_SIZE=hidden_size,
            WIDTH=weight.shape[1],
            IS_MASKED=real is not None,
            IS_TRAINED=is_trained,
            R=ROWS,
            K=max(16, triton.next_power_of_2(hidden_size)),
            F=FEATURES,
            num_warps=WARPS if hidden_size <= 128 else 8,
            num_stages=STAGES,
        )
    return hidden, error, grad, sums


@bridge_error.register_fake
def _(product, up_bias, weight, bias, slopes, real, targets, is_trained):
    return _outputs(product, weight, is_trained)


def _outputs(product: Tensor, weight: Tensor, is_trained: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mlps, rows, hidden_size = product.shape
    width, blocks = weight.shape[1], (rows + ROWS - 1) // ROWS
    if not is_trained:
        nothing = [product.new_empty(0) for _ in range(3)]
        return *nothing, product.new_empty(mlps, blocks, 1, dtype=torch.float32)
    return (
        product.new_empty(mlps, rows, hidden_size),
        product.new_empty(mlps, rows, width),
        product.new_empty(mlps, rows, hidden_size),
        product.new_empty(mlps, blocks, width + hidden_size + 1, dtype=torch.float32),
    )
