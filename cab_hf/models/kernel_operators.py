"""Kernels as operators of `torch.library`, so that `torch.compile(fullgraph=True)` takes them, and their gradients.

A compiler can't look into a kernel. It calls the operator, and knows the shapes of what comes back. Eager code calls
the kernel itself, because an operator made in Python costs the host tens of microseconds a call.
"""

import zlib
from collections.abc import Callable

import torch
from torch import Tensor


# Of this copy of the file: a checkpoint brings its own, whose operators must not take the place of these.
NAMESPACE = f"cab_hf_{zlib.crc32(__name__.encode()):08x}"

Tensors = list[Tensor | None]


def kernel_operator(
    name: str,
    tensors: int,
    results: int,
    kernel: Callable[[Tensors, int], tuple[Tensor, ...]],
    gradient: Callable[[Tensors, Tensors, list[Tensor], int], Tensors],
    fake: Callable[[Tensors, int], tuple[Tensor, ...]],
    kept: tuple[int, ...] = (),
) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """Registers `NAMESPACE::NAME` and `NAMESPACE::NAME_backward`.

    Args:
        name: of the operator.
        tensors, results: how many the kernel takes and returns.
        kernel: of tensors (or nothing in their place) and one number.
        gradient: of the results' gradients (nothing in place of one that nobody used), the tensors, the kept results
            and the number; one gradient for each floating tensor, None for zeros.
        fake: makes empty tensors of the shapes and dtypes that the kernel returns, contiguous.
        kept: indices of the results that the gradient needs.

    Returns:
        The operator, of the tensors one by one and the number.

    Example:
        >>> import torch
        >>> from cab_hf.models.kernel_operators import kernel_operator
        >>> def scaled(tensors, number):
        ...     return (tensors[0] * number,)
        >>> def gradient(grads, tensors, kept, number):
        ...     return [grads[0] * number]
        >>> scale = kernel_operator("example", 1, 1, scaled, gradient, lambda given, _: (torch.empty_like(given[0]),))
        >>> x = torch.ones(2, requires_grad=True)
        >>> scale(x, 2).sum().backward()  # the same in a compiled function
        >>> x.grad
        tensor([2., 2.])
    """

    # Autograd does not see into lists.
    arguments = ", ".join(f"Tensor? given{index}" for index in range(tensors))
    returned = "Tensor" if results == 1 else f"({', '.join(['Tensor'] * results)})"

    @torch.library.custom_op(
        f"{NAMESPACE}::{name}", mutates_args=(), schema=f"({arguments}, int number) -> {returned}"
    )
    def forward(*given):
        return _returned([one.contiguous() for one in kernel(list(given[:-1]), given[-1])])

    @forward.register_fake
    def _(*given):
        return _returned(list(fake(list(given[:-1]), given[-1])))

    @torch.library.custom_op(f"{NAMESPACE}::{name}_backward", mutates_args=())
    def backward(
        grads: list[Tensor | None], tensors: list[Tensor | None], results: list[Tensor], number: int
    ) -> list[Tensor]:
        found = gradient(grads, tensors, results, number)
        pairs = zip(_floating(tensors), found, strict=True)
        found = [torch.zeros_like(one) if grad is None else grad.to(one.dtype) for one, grad in pairs]
        # what an operator returns is no argument of it
        return [grad.clone() if any(grad is one for one in grads) else grad.contiguous() for grad in found]

    @backward.register_fake
    def _(grads, tensors, results, number):
        return [torch.empty_like(one, memory_format=torch.contiguous_format) for one in _floating(tensors)]

    def keep(ctx, inputs, output):
        ctx.set_materialize_grads(False)  # a gradient of zeros would be one to compute
        *given, ctx.number = inputs
        ctx.are_given = [one is not None for one in given]
        output = (output,) if isinstance(output, Tensor) else output
        ctx.save_for_backward(*(output[index] for index in kept), *(one for one in given if one is not None))

    def differentiate(ctx, *grads):
        saved = iter(ctx.saved_tensors)
        results = [next(saved) for _ in kept]
        given = [next(saved) if is_given else None for is_given in ctx.are_given]
        found = iter(backward(list(grads), given, results, ctx.number))
        return *(next(found) if one is not None and one.is_floating_point() else None for one in given), None

    forward.register_autograd(differentiate, setup_context=keep)
    return forward


def _returned(results: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
    return results[0] if len(results) == 1 else tuple(results)


def _floating(tensors: Tensors) -> list[Tensor]:
    return [one for one in tensors if one is not None and one.is_floating_point()]
