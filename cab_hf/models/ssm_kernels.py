"""Kernels of other packages for the state-space operations: which backend a call runs on, and how each is called.

Eager code calls a kernel itself. A compiler is given an operator, or leaves its graph for the call.

Shape legend: `b` batch, `t` token, `d` width, `k` convolution taps, `h` head, `p` head_dim, `g` group, `n` state.
"""

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers.utils import logging

from .kernel_operators import kernel_operator
from .s6_scan import chunked_scan, chunked_scan_backward


logger = logging.get_logger(__name__)

BACKEND_VARIABLE = "CAB_SSM_BACKEND"
BACKENDS = ("auto", "torch", "mamba_ssm", "fla")
OPERATIONS = ("causal_conv1d", "selective_scan", "ssd_scan")

# Faster once compiled (184.6 k tokens/s for 177.6 k), but the compiler then takes minutes over all layers at once.
_TRAINS_BY_OPERATORS = os.environ.get("CAB_COMPILE_TRAINING") == "operators"

SELECTIVE_SCAN_CHUNK = 2048
"""Tokens from one state that mamba-ssm's selective scan keeps to the next."""

_STATE_UPDATE = {"selective_state_update": "mamba_ssm.ops.triton.selective_state_update"}
_KERNEL_MODULES = {
    ("causal_conv1d", "mamba_ssm"): dict.fromkeys(("causal_conv1d_fn", "causal_conv1d_update"), "causal_conv1d"),
    ("selective_scan", "mamba_ssm"): {
        "selective_scan_fn": "mamba_ssm.ops.selective_scan_interface",
        **_STATE_UPDATE,
    },
    ("ssd_scan", "mamba_ssm"): {
        "mamba_chunk_scan_combined": "mamba_ssm.ops.triton.ssd_combined",
        **_STATE_UPDATE,
    },
    ("ssd_scan", "fla"): {"chunk_simple_gla": "fla.ops.simple_gla"},
}
_PACKAGES = {"causal_conv1d": "causal-conv1d", "mamba_ssm": "mamba-ssm", "fla": "flash-linear-attention"}
_kernels: dict[str, Callable] = {}
_unusable: dict[tuple[str, str], str] = {}
_reported: set[str] = set()


def backend_for(
    operation: str, device: torch.device, dtype: torch.dtype, mamba_ssm_lacks: str = "", fla_lacks: str = ""
) -> str:
    """Names the backend that one call runs on: "torch", "mamba_ssm" or "fla".

    The environment variable `CAB_SSM_BACKEND` (auto, torch, mamba_ssm, fla) is read at every call, under torch.compile
    when the call is traced. `auto` takes mamba_ssm and causal_conv1d for CUDA tensors where they can be imported and
    support the call, else torch. Each operation's first call logs one line that says which backend runs and why.

    Args:
        operation: one of `OPERATIONS`; a one-step form belongs to its scan or convolution.
        device, dtype: those of the operation's `x`.
        mamba_ssm_lacks, fla_lacks: what this call needs and that backend has not, in words; empty if nothing.

    Raises:
        ValueError: for an unknown value of the variable, or an explicit wish that this call can't have.
        ImportError: for an explicit wish whose package is missing or broken.
    """
    return _choose_backend(operation, device.type, str(dtype).removeprefix("torch."), mamba_ssm_lacks, fla_lacks)


@torch.compiler.assume_constant_result
def _choose_backend(operation: str, device: str, dtype: str, mamba_ssm_lacks: str, fla_lacks: str) -> str:
    wish = os.environ.get(BACKEND_VARIABLE, "auto")
    if wish not in BACKENDS:
        raise ValueError(f"{BACKEND_VARIABLE}={wish!r} is unknown; choose one of {', '.join(BACKENDS)}.")
    backend = {"auto": "mamba_ssm"}.get(wish, wish)
    reason = f"{BACKEND_VARIABLE}={wish}"
    if wish == "fla" and operation == "causal_conv1d":
        backend, reason = "torch", "fla serves the SSD scan only, the convolution is torch's"
    elif wish != "torch":
        obstacle = mamba_ssm_lacks if backend == "mamba_ssm" else fla_lacks
        if device != "cuda":
            obstacle = f"the tensors are on {device}, the kernels need cuda"
        elif dtype == "float64":
            obstacle = "the tensors are float64, the kernels need float32, float16 or bfloat16"
        missing = "" if obstacle else _load_kernels(operation, backend)
        if wish != "auto" and (obstacle or missing):
            error = ValueError if obstacle else ImportError
            raise error(
                f"{reason} can't run this {operation}: {obstacle or missing}. Set {BACKEND_VARIABLE} to auto or torch."
            )
        if obstacle or missing:
            backend, reason = "torch", obstacle or missing
        elif wish == "auto":
            reason = "the tensors are on cuda and the kernels can be imported"
    if operation not in _reported:
        _reported.add(operation)
        logger.info(f"{operation} runs on {backend}: {reason}.")
    return backend


def _load_kernels(operation: str, backend: str) -> str:
    """Imports an operation's kernels once; returns why they can't be used, or an empty string."""
    if (operation, backend) in _unusable:
        return _unusable[operation, backend]
    # What Triton finds best for a GPU, a later process need not look for again.
    os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")
    kept = Path(os.environ.get("TRITON_CACHE_DIR") or Path(os.environ.get("TRITON_HOME") or Path.home(), ".triton"))
    if not kept.is_dir():
        logger.warning_once(f"Kernels are compiled and tuned at first use, for about a minute, and kept in {kept}.")
    for name, module_name in _KERNEL_MODULES[operation, backend].items():
        if name in _kernels:
            continue
        module_root = module_name.partition(".")[0]
        package = _PACKAGES[module_root]
        try:
            importlib.import_module(module_root)
            _kernels[name] = getattr(importlib.import_module(module_name), name)
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            if isinstance(error, ModuleNotFoundError) and error.name == module_root:
                problem = f"{package} is not installed"
            else:
                problem = f"{package} is installed but broken ({type(error).__name__}: {error})"
                logger.warning_once(f"{problem}; its operations run on torch. Reinstall or remove it.")
            _unusable[operation, backend] = problem
            return problem
    return ""


def conv_kernel_lacks(k: int) -> str:
    return "" if 2 <= k <= 4 else f"its convolution has 2 to 4 taps, weight has {k}"


def _is_operator() -> bool:
    """Whether a compiler sees a kernel as an operator: without gradients, or where `CAB_COMPILE_TRAINING` says so.

    Otherwise it leaves its graph around a kernel, whose own backward pass then runs.
    """
    return torch.compiler.is_compiling() and (_TRAINS_BY_OPERATORS or not torch.is_grad_enabled())


def conv_by_kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_states: Tensor | None,
    runs: Tensor | None,
) -> Tensor:
    """`causal_conv1d` of `ssm_ops`, by causal-conv1d; `runs` `(b, t)` number the packed sequences."""
    if _is_operator():
        return _conv_operator(x, weight, bias, initial_states, runs, int(activation == "silu"))
    return _conv_kernel(x, weight, bias, activation, initial_states, runs)


@torch.compiler.disable
def _conv_kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_states: Tensor | None,
    runs: Tensor | None,
) -> Tensor:
    x, bias, initial_states = _conv_inputs(x, weight, bias, initial_states)
    y = _kernels["causal_conv1d_fn"](
        x, weight.contiguous(), bias, seq_idx=runs, initial_states=initial_states, activation=activation
    )
    return y.transpose(1, 2)


def _conv_inputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_states: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x `(b, d, t)`, the bias and the states `(b, d, k-1)` as the kernel takes them."""
    if x.shape[2] % 8:
        x = x.transpose(1, 2).contiguous()
    else:
        # channel-last reads an aligned slice of a projection in place, in vectors of 16 bytes
        aligned = x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0 and x.data_ptr() % 16 == 0
        if x.stride(2) != 1 or x.stride(1) < x.shape[2] or not aligned:
            x = x.clone(memory_format=torch.contiguous_format)
        x = x.transpose(1, 2)
    if initial_states is not None:
        past = initial_states[..., 1:].to(x.dtype)
        initial_states = past.transpose(1, 2).contiguous().transpose(1, 2)  # (b, d, k-1), channel-last
    return x, None if bias is None else bias.to(weight.dtype), initial_states


def conv_update_by_kernel(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    bias = None if bias is None else bias.to(weight.dtype)
    return _kernels["causal_conv1d_update"](x, conv_state, weight.contiguous(), bias, activation)


class _FinalStateGradient(torch.autograd.Function):
    """Identity on the final state of a kernel without a gradient for it; the torch scan makes it when one arrives."""

    @staticmethod
    def forward(ctx, final_state, x, dt, A, B):
        ctx.save_for_backward(x, dt, A, B)
        return final_state.clone()

    @staticmethod
    def backward(ctx, grad_state):
        return None, *_final_state_gradient(grad_state, *ctx.saved_tensors)


def _final_state_gradient(
    grad_state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    u, A, no_C, grad_state = dt * x, A.t(), torch.zeros_like(B), grad_state.transpose(1, 2)
    *_, incoming = chunked_scan(u, dt, A, B, no_C, torch.zeros_like(grad_state), None)
    grad_u, grad_dt, grad_A, grad_B, *_ = chunked_scan_backward(
        torch.zeros_like(u), grad_state, u, dt, A, B, no_C, incoming, None
    )
    return grad_u * dt, grad_dt + grad_u * x, grad_A.t(), grad_B


def selective_scan_by_kernel(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """`selective_scan` of `ssm_ops` without D, by mamba-ssm: output and final state, all in float32."""
    if _is_operator():
        return _selective_scan_operator(x, dt, A, B, C, 0)[:2]
    return _selective_scan_kernel(x, dt, A, B, C)


@torch.compiler.disable
def _selective_scan_kernel(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    # The kernel takes one dtype for x, dt, B and C. They come in float32: a common bfloat16 would round dt.
    columns = [tensor.transpose(1, 2).contiguous() for tensor in (x, dt, B, C)]
    y, final_state = _kernels["selective_scan_fn"](*columns[:2], A.contiguous(), *columns[2:], return_last_state=True)
    return y.transpose(1, 2), _FinalStateGradient.apply(final_state.detach(), x, dt, A, B)


def state_update_by_kernel(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None
) -> Tensor:
    # without D and dt_bias the kernel's wrapper fails on the strides of None
    zeros = torch.zeros((), dtype=A.dtype, device=A.device).expand(A.shape[:-1])
    return _kernels["selective_state_update"](state, x, dt, A, B, C, D=zeros if D is None else D, dt_bias=zeros)


def ssd_by_kernel(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    chunk_size: int,
    initial_state: Tensor | None,
    runs: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`ssd_scan` of `ssm_ops`, by mamba-ssm; `runs` `(b, t)` number the packed sequences."""
    if _is_operator():
        return _ssd_operator(x, dt, A, B, C, D, initial_state, runs, chunk_size)
    return _ssd_kernel(x, dt, A, B, C, D, chunk_size, initial_state, runs)


@torch.compiler.disable
def _ssd_kernel(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    chunk_size: int,
    initial_state: Tensor | None,
    runs: Tensor | None,
) -> tuple[Tensor, Tensor]:
    y, final_state = _kernels["mamba_chunk_scan_combined"](
        *_ssd_inputs(x, dt, A, B, C),
        _ssd_chunk(chunk_size),
        D=None if D is None else D.float(),
        initial_states=None if initial_state is None else initial_state.float(),
        seq_idx=runs,
        dt_softplus=False,
        return_final_states=True,
    )
    return y, final_state.float()


def _ssd_inputs(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, ...]:
    return x, dt.float(), A.float(), B.to(x.dtype), C.to(x.dtype)


def _ssd_chunk(chunk_size: int) -> int:
    # tiles are powers of two, and a tensor-core product has 16 rows or more
    return min(max(1 << (chunk_size - 1).bit_length(), 16), 256)


@torch.compiler.disable
def ssd_by_fla(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    dt, heads_per_group = dt.float(), x.shape[2] // B.shape[2]
    B, C = (tensor.to(x.dtype).repeat_interleave(heads_per_group, dim=2) for tensor in (B, C))  # (b, t, h, n)
    y, final_state = _kernels["chunk_simple_gla"](
        q=C,
        k=B,
        v=(dt.unsqueeze(-1) * x).to(x.dtype),
        g=dt * A.float(),
        scale=1.0,
        initial_state=None if initial_state is None else initial_state.float().transpose(2, 3).contiguous(),
        output_final_state=True,
    )
    if D is not None:
        y = torch.addcmul(y.float(), x.float(), D.float().unsqueeze(-1))
    return y.to(x.dtype), final_state.float().transpose(2, 3).contiguous()


def _conv(tensors: list[Tensor | None], is_silu: int) -> tuple[Tensor]:
    x, weight, bias, initial_states, runs = tensors
    return (_conv_kernel(x, weight, bias, "silu" if is_silu else None, initial_states, runs),)


def _conv_gradient(
    grads: list[Tensor | None], tensors: list[Tensor | None], _: list[Tensor], is_silu: int
) -> list[Tensor | None]:
    x, weight, bias, states, runs = tensors
    x, kernel_bias, past = _conv_inputs(x, weight, bias, states)
    grad = grads[0].transpose(1, 2)
    if grad.stride(1) != x.stride(1):  # both channel-last, or neither
        grad = grad.contiguous()
    backward = importlib.import_module("causal_conv1d.cpp_functions").causal_conv1d_bwd_function
    grad_x, *rest, grad_past = backward(
        x, weight.contiguous(), kernel_bias, grad, runs, past, None, None, past is not None, bool(is_silu)
    )
    found = [grad_x.transpose(1, 2), *rest] if bias is not None else [grad_x.transpose(1, 2), rest[0]]
    return found if states is None else [*found, F.pad(grad_past, (1, 0))]


def _selective_scan(tensors: list[Tensor | None], number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Output, final state, and the states `(b, d, chunks, 2 n)` that the gradient starts from."""
    y, states, *_ = importlib.import_module("selective_scan_cuda").fwd(*_columns(tensors), None, None, None, False)
    return y.transpose(1, 2), states[:, :, -1, 1::2], states


def _columns(tensors: list[Tensor | None]) -> list[Tensor]:
    """x, dt `(b, d, t)`, A `(d, n)`, B and C `(b, 1, n, t)` as the kernel takes them."""
    x, dt, A, B, C = tensors
    columns = [one.transpose(1, 2).contiguous() for one in (x, dt)]
    return columns + [A.contiguous(), *(one.transpose(1, 2).contiguous().unsqueeze(1) for one in (B, C))]


def _selective_scan_gradient(
    grads: list[Tensor | None], tensors: list[Tensor | None], results: list[Tensor], number: int
) -> list[Tensor | None]:
    (x, dt, A, B, _), (states,) = tensors, results
    found = [None] * 5
    if grads[0] is not None:
        grad = grads[0].transpose(1, 2).contiguous()
        given = (*_columns(tensors), None, None, None, grad, states, None, None, False, False)
        grad_x, grad_dt, grad_A, grad_B, grad_C, *_ = importlib.import_module("selective_scan_cuda").bwd(*given)
        found = [grad_x.transpose(1, 2), grad_dt.transpose(1, 2), grad_A]
        found += [one.squeeze(1).transpose(1, 2) for one in (grad_B, grad_C)]
    if grads[1] is not None:
        of_state = [*_final_state_gradient(grads[1], x, dt, A, B), None]
        found = [one if two is None else two if one is None else one + two for one, two in zip(found, of_state)]
    return found


class _SumsOfOne(TorchFunctionMode):
    """Leaves out sums over a dimension of size one, which mamba-ssm makes where each head has its own B and C."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = kwargs or {}
        if function is Tensor.sum:
            summed, *dims = args
            dims = dims or [given.get("dim")]
            if (
                len(dims) == 1
                and isinstance(dims[0], int)
                and not given.keys() - {"dim"}
                and summed.shape[dims[0]] == 1
            ):
                return summed.squeeze(dims[0])
        return function(*args, **given)


def _ssd_gradient(
    grads: list[Tensor | None], tensors: list[Tensor | None], results: list[Tensor], chunk_size: int
) -> list[Tensor | None]:
    backward = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")._mamba_chunk_scan_combined_bwd
    (x, dt, A, B, C, D, state, runs), (grad, grad_state), (y,) = tensors, grads, results
    with _SumsOfOne():
        grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, _, _, grad_initial = backward(
            torch.zeros_like(y) if grad is None else grad,
            *_ssd_inputs(x, dt, A, B, C),
            y,
            _ssd_chunk(chunk_size),
            D=None if D is None else D.float(),
            initial_states=None if state is None else state.float(),
            dfinal_states=grad_state,
            seq_idx=runs,
            dt_softplus=False,
        )
    found = [grad_x, grad_dt, grad_A, grad_B, grad_C]
    return found + [one for given, one in ((D, grad_D), (state, grad_initial)) if given is not None]


def _empty_scan(tensors: list[Tensor | None], number: int) -> tuple[Tensor, Tensor]:
    """The shapes of a scan's output and of its final state, for S6 and SSD."""
    x, _, _, B = tensors[:4]
    state = (x.shape[0], *x.shape[2:], B.shape[-1])
    return x.new_empty(x.shape), x.new_empty(state, dtype=torch.float32)


def _empty_selective_scan(tensors: list[Tensor | None], number: int) -> tuple[Tensor, Tensor, Tensor]:
    y, state = _empty_scan(tensors, number)
    rows, width, states = state.shape
    return y, state, state.new_empty(rows, width, -(-y.shape[1] // SELECTIVE_SCAN_CHUNK), 2 * states)


_conv_operator = kernel_operator(
    "causal_conv1d",
    5,
    1,
    _conv,
    lambda *given: _conv_gradient(*given),
    lambda tensors, _: (tensors[0].new_empty(tensors[0].shape),),
)
_selective_scan_operator = kernel_operator(
    "selective_scan",
    5,
    3,
    lambda *given: _selective_scan(*given),
    lambda *given: _selective_scan_gradient(*given),
    _empty_selective_scan,
    kept=(2,),
)
_ssd_operator = kernel_operator(
    "ssd_scan",
    8,
    2,
    lambda tensors, chunk_size: _ssd_kernel(*tensors[:6], chunk_size, *tensors[6:]),
    lambda *given: _ssd_gradient(*given),
    _empty_scan,
    kept=(0,),
)
