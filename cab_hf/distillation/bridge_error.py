"""The bridge's squared error as an autograd function that makes its gradients in the forward pass.

Shape legend: `b` batch, `t` token, `h` head, `p` head_dim, `n` state; `m` MLPs (one for each direction of each pair),
`r` rows, `k` hidden width, `f` features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cab_hf.distillation.chunked_kl import accumulation_dtype
from cab_hf.distillation.losses import SMALLEST_MEAN_SQUARE


try:
    from cab_hf.distillation.bridge_kernel import fits_kernel, fused_error
except ImportError:  # builds of torch for CPUs come without Triton

    def fits_kernel(x: Tensor, hidden_size: int, target: Tensor) -> bool:
        return False


class BridgeError(torch.autograd.Function):
    """Squared errors of `m` two-layer MLPs, which run as one product. Each is divided by its features and its scale.

    The result is their sum. Only gradients are kept for the backward pass. The input's gradient is `n` wide; where
    `k` is smaller, the gradient before the first linear layer is kept in its place.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,  # (m, r, n)
        up_weight: Tensor,  # (m, k, n), in the dtype of the products
        down_weight: Tensor,  # (m, f, k), likewise
        real: Tensor | None,  # (r,)
        is_trained: bool,
        scales: list[Tensor],  # as `bridge_gradients` has them
        targets: list[Tensor],  # likewise
        *parameters: Tensor,  # m weights and m biases of the first linear layers, then of the second ones
    ) -> Tensor:
        count = len(parameters) // 4
        groups = [parameters[start : start + count] for start in range(0, len(parameters), count)]
        _, up_bias, _, down_bias = groups
        ctx.dtypes = [x.dtype, *(group[0].dtype for group in groups)]
        with torch.autocast(x.device.type, enabled=False):
            sums, of_x, of_up, of_down = bridge_gradients(
                x.to(up_weight.dtype),
                up_weight,
                stacked(up_bias),
                down_weight,
                stacked(down_bias),
                real,
                is_trained,
                scales,
                targets,
            )
        if is_trained:
            ctx.is_narrow = is_narrow(x, up_weight)
            ctx.save_for_backward(of_x, of_up, of_down, sums, up_weight)
        return (sums[:, -1] * error_factors(scales, sums, down_weight.shape[1])).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        of_x, of_up, of_down, sums, up_weight = ctx.saved_tensors
        of_x = (of_x * gradient.view(1)).to(of_x.dtype)  # a loss scale may be too large for the dtype
        if not ctx.is_narrow:
            of_x = product(of_x, up_weight)
        features = of_down.shape[1]
        of_parameters = (of_up, sums[:, features:-1], of_down, sums[:, :features])
        x_dtype, *dtypes = ctx.dtypes
        groups = ((made.to(dtype) * gradient).unbind() for made, dtype in zip(of_parameters, dtypes))
        return of_x.to(x_dtype), *[None] * 6, *(one for group in groups for one in group)


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.stack`, without a copy where there is nothing to stack."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def error_factors(scales: list[Tensor], sums: Tensor, features: int) -> Tensor:
    """What each MLP's squared error is multiplied by: `(m,)` or, without scales, `(1,)`, in the dtype of `sums`."""
    if not scales:
        return sums.new_full((1,), 1 / features)
    factors = 1 / (features * torch.stack(scales).to(sums.dtype).clamp(min=SMALLEST_MEAN_SQUARE))
    return factors.repeat(len(sums) // len(scales))


# One operator, because a compiler would make each copy by a kernel of its own.
@torch.library.custom_op("cab_hf::rounded", mutates_args=())
def rounded(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies in another dtype, through which no gradient passes."""
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


@rounded.register_fake
def _(tensors, dtype):
    return [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]


# One operator, because a compiler would make the errors of all layers before it takes the first one's gradients.
@torch.library.custom_op("cab_hf::bridge_gradients", mutates_args=())
def bridge_gradients(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    real: Tensor | None,
    is_trained: bool,
    scales: list[Tensor],
    targets: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Squared error of each MLP, and the gradients of that error divided by its features and its scale.

    Args:
        x: `(m, r, n)`, in the dtype of both weights.
        up_weight, up_bias: `(m, k, n)`, `(m, k)`.
        down_weight, down_bias: `(m, f, k)`, `(m, f)`.
        real: `(r,)`, bool; None if all rows are real. Others count for nothing, whatever their target holds.
        is_trained: whether gradients are wanted.
        scales: 0-dim each; none for 1.
        targets: `(b, t, f)` or `(b, t, h, p)` each, of any dtype and strides, `b * t = r`. Where these and scales are
            fewer than MLPs, as with two directions, they come again.

    Returns:
        sums `(m, f + k + 1)`, float32 or float64: the gradients of `down_bias` and `up_bias`, then the squared error;
        and the gradients of `x`, `(m, r, n)` or, before the first linear layer, `(m, r, k)`, whichever is narrower, of
        `up_weight` and of `down_weight`. Without `is_trained` sums are `(m, 1)`, and the rest is empty.
    """
    fused = fits_kernel(x, up_weight.shape[1], targets[0])
    scales, targets = ([*one] * (len(x) // max(len(one), 1)) for one in (scales, targets))
    sums, hidden, error, before = (fused_error if fused else _error)(
        product(x, up_weight.mT), up_bias, down_weight, down_bias, real, is_trained, scales, targets
    )
    if not is_trained:
        return sums, *(x.new_empty(0) for _ in range(3))
    of_x = product(before, up_weight) if is_narrow(x, up_weight) else before
    return sums, of_x, product(before.mT, x), product(error.mT, hidden)


@bridge_gradients.register_fake
def _(x, up_weight, up_bias, down_weight, down_bias, real, is_trained, scales, targets):
    (m, k, n), f, dtype = up_weight.shape, down_weight.shape[1], accumulation_dtype(x.dtype)
    if not is_trained:
        return x.new_empty(m, 1, dtype=dtype), *(x.new_empty(0) for _ in range(3))
    of_x = x.new_empty(m, x.shape[1], n if is_narrow(x, up_weight) else k)
    return x.new_empty(m, f + k + 1, dtype=dtype), of_x, x.new_empty(m, k, n), x.new_empty(m, f, k)


def _error(
    before: Tensor,  # (m, r, k), which the activations' inputs overwrite
    up_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    real: Tensor | None,
    is_trained: bool,
    scales: list[Tensor],
    targets: list[Tensor],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The MLPs from their first product on.

    The bias, most of what is constant in a target, is taken from it before the rest is rounded.

    Returns:
        sums, as `bridge_gradients` has them; hidden `(m, r, k)`, the activations; and the gradients at the predictions
        `(m, r, f)` and before the activation `(m, r, k)`.
    """
    before += up_bias.to(before.dtype).unsqueeze(1)
    hidden = nn.functional.silu(before)
    error = hidden.new_empty(*hidden.shape[:2], weight.shape[1])
    for one, target, place in zip(bias, targets, error):
        torch.sub(target, one.view(target.shape[2:]), out=place.view(target.shape))
    error.baddbmm_(hidden, weight.mT, beta=-1)
    if real is not None:
        error.masked_fill_(~real.unsqueeze(-1), 0)
    dtype = accumulation_dtype(error.dtype)
    squares = torch.linalg.vector_norm(error, dim=(1, 2), dtype=dtype).square().unsqueeze(1)
    if not is_trained:
        return squares, None, None, None
    error *= 2 * error_factors(scales, squares, error.shape[2])[:, None, None]
    before = torch.ops.aten.silu_backward(product(error, weight), before)
    sums = [gradient.sum(1, dtype=dtype) for gradient in (error, before)]
    return torch.cat([*sums, squares], dim=1), hidden, error, before


def is_narrow(x: Tensor, up_weight: Tensor) -> bool:
    return x.shape[-1] <= up_weight.shape[1]


def product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` of `(m, i, j)` and `(m, j, k)`; one pair is no batch, whose sums over tokens are not split."""
    return (left[0] @ right[0]).unsqueeze(0) if len(left) == 1 else left @ right
