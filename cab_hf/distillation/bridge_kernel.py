"""A Triton kernel that makes the bridge's error, and its gradient before the activation, in one pass over the targets.

Shape legend: `m` MLPs, `r` rows (batch * token), `k` hidden width, `f` features, `s` blocks of rows.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from transformers.utils import logging

from cab_hf.distillation.losses import SMALLEST_MEAN_SQUARE


logger = logging.get_logger(__name__)

ROWS, FEATURES, STAGES, WARPS = 64, 64, 3, 4
SMALLEST_PRODUCT = tl.constexpr(16)
LARGEST_HIDDEN_SIZE = 128
"""Columns that a block of rows can keep in registers, and its weights in the shared memory of any GPU since Ampere."""


@triton.jit
def _before_activation(product, up_bias, is_hidden, is_column):
    bias = tl.load(up_bias, mask=is_column, other=0.0).to(tl.float32)
    return tl.load(product, mask=is_hidden, other=0.0).to(tl.float32) + bias[None, :]


@triton.jit(do_not_specialize_on_alignment=["scale"])
def _bridge_error_kernel(
    product,  # (r, k), contiguous
    up_bias,  # (k,)
    weight,  # (f, k), contiguous
    bias,  # (f,)
    scale,  # 0-dim or nothing
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
    SMALLEST_SCALE: tl.constexpr,
    IS_MASKED: tl.constexpr,
    IS_EVEN: tl.constexpr,
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
    before = _before_activation(product + hidden_place, up_bias + column, is_hidden, is_column)
    activated = (before * tl.sigmoid(before)).to(weight.dtype.element_ty)
    if IS_TRAINED:
        tl.store(hidden + hidden_place, activated, mask=is_hidden)
    is_real = is_row
    if IS_MASKED:
        is_real = is_row & (tl.load(real + row, mask=is_row, other=0) != 0)
    target_row = target + (row // tokens) * of_batch + (row % tokens) * of_token
    slope = 2.0 / WIDTH
    if scale is not None:
        slope /= tl.maximum(tl.load(scale).to(tl.float32), SMALLEST_SCALE)
    sums += block * (WIDTH + HIDDEN_SIZE + 1 if IS_TRAINED else 1)
    grads = tl.zeros((R, K), dtype=tl.float32)
    squares = tl.zeros((R,), dtype=tl.float32)
    ones = tl.full((SMALLEST_PRODUCT, R), 1.0, dtype=weight.dtype.element_ty)
    is_first = tl.arange(0, SMALLEST_PRODUCT) == 0
    for start in range(0, WIDTH, F):
        feature = start + tl.arange(0, F)
        is_feature = feature < WIDTH
        weights = tl.load(
            weight + feature[:, None] * HIDDEN_SIZE + column[None, :],
            mask=is_feature[:, None] & is_column[None, :],
            other=0.0,
        )
        is_counted = is_real[:, None] & is_feature[None, :]
        feature_place = (feature // HEAD_DIM).to(tl.int64) * of_head + (feature % HEAD_DIM).to(tl.int64) * of_column
        wanted = tl.load(target_row[:, None] + feature_place[None, :], mask=is_counted, other=0.0).to(tl.float32)
        constant = tl.load(bias + feature, mask=is_feature, other=0.0).to(tl.float32)
        difference = tl.dot(activated, tl.trans(weights)) - (wanted - constant[None, :])
        if not IS_EVEN:
            difference = tl.where(is_counted, difference, 0.0)
        squares += tl.sum(difference * difference, axis=1)
        if IS_TRAINED:
            difference *= slope
            scaled = difference.to(weight.dtype.element_ty)
            place = row[:, None] * WIDTH + feature[None, :]
            tl.store(error + place, scaled, mask=is_row[:, None] & is_feature[None, :])
            # The product's rows are all the same sums; `tl.sum` over rows would wait for all warps.
            sums_place = tl.broadcast_to(sums + feature[None, :], (SMALLEST_PRODUCT, F))
            tl.store(sums_place, tl.dot(ones, scaled), mask=is_first[:, None] & is_feature[None, :])
            grads = tl.dot(scaled, weights, grads)
    if IS_TRAINED:
        # Read again rather than kept in registers.
        before = _before_activation(product + hidden_place, up_bias + column, is_hidden, is_column)
        gate = tl.sigmoid(before)
        grads = (grads * gate * (1.0 + before * (1.0 - gate))).to(weight.dtype.element_ty)
        tl.store(grad + hidden_place, grads, mask=is_hidden)
        tl.store(sums + WIDTH + column, tl.sum(grads.to(tl.float32), axis=0), mask=is_column)
        sums += WIDTH + HIDDEN_SIZE
    tl.store(sums, tl.sum(squares))


def fits_kernel(x: Tensor, hidden_size: int, target: Tensor) -> bool:
    """Whether `fused_error` can take rows like those of `x` `(m, r, n)` through MLPs of that hidden width."""
    halves = x.dtype in (torch.float16, torch.bfloat16)
    fits = x.is_cuda and target.device == x.device and halves and hidden_size <= LARGEST_HIDDEN_SIZE and x.shape[1] > 0
    fits = fits and torch.cuda.get_device_capability(x.device) >= (8, 0)
    return fits and _runs_on(x.device, x.dtype, target.dtype, hidden_size)


@functools.cache
def _runs_on(device: torch.device, dtype: torch.dtype, target_dtype: torch.dtype, hidden_size: int) -> bool:
    """Tries the kernel, which needs a compiler of the system, as it is largest: masked and in a loop."""
    rows = torch.zeros(1, 3 * FEATURES, hidden_size, device=device, dtype=dtype)
    up_bias, bias, scale = (torch.ones(1, size, device=device) for size in (hidden_size, 3 * FEATURES, 1))
    target = torch.zeros(1, *2 * (3 * FEATURES,), device=device, dtype=target_dtype)
    try:
        fused_error(rows, up_bias, rows, bias, target[0, 0] == 0, True, [scale[0, 0]], [target])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        logger.warning(f"The bridge runs without its Triton kernel, which fails here: {error}")
        return False
    return True


def fused_error(
    before: Tensor,
    up_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    real: Tensor | None,
    is_trained: bool,
    scales: list[Tensor],
    targets: list[Tensor],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """As `bridge_error._error`, by one kernel for each MLP."""
    mlps, rows, hidden_size = before.shape
    width, blocks = weight.shape[1], triton.cdiv(rows, ROWS)
    sums = before.new_empty(mlps, blocks, width + hidden_size + 1 if is_trained else 1, dtype=torch.float32)
    before, weight, bias, up_bias = (tensor.contiguous() for tensor in (before, weight, bias, up_bias))
    hidden, error, grad = None, None, None
    if is_trained:
        hidden, error, grad = torch.empty_like(before), before.new_empty(mlps, rows, width), torch.empty_like(before)
    with torch.cuda.device_of(before):
        for i, target in enumerate(targets):
            target = target.unsqueeze(2) if target.dim() == 3 else target.flatten(3)  # (b, t, h, p)
            _bridge_error_kernel[(blocks,)](
                before[i],
                up_bias[i],
                weight[i],
                bias[i],
                scales[i] if scales else None,
                target,
                real,
                *(None if tensor is None else tensor[i] for tensor in (hidden, error, grad)),
                sums[i],
                rows,
                target.shape[1],
                *target.stride(),
                HEAD_DIM=target.shape[-1],
                HIDDEN_SIZE=hidden_size,
                WIDTH=width,
                SMALLEST_SCALE=SMALLEST_MEAN_SQUARE,
                IS_MASKED=real is not None,
                IS_EVEN=real is None and rows % ROWS == 0 and width % FEATURES == 0,
                IS_TRAINED=is_trained,
                R=ROWS,
                K=max(16, triton.next_power_of_2(hidden_size)),
                F=FEATURES,
                num_warps=WARPS,
                num_stages=STAGES,
            )
    return sums.sum(1), hidden, error, grad
