"""State-space operations of the students: causal convolution, S6 scan (Mamba-1) and SSD scan (Mamba-2).

Every operation is token-first, computes in float32 (float64 for float64 inputs), returns its output in `x.dtype` and its
states in float32 (float64). Each call picks its backend by `backend_for`; the torch paths run on any device and are the
reference that the kernels are tested against.

Shape legend: `b` batch, `t` token, `d` width, `k` convolution taps, `h` head, `p` head_dim, `g` group, `n` state.
"""

import importlib
import os
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

BACKEND_VARIABLE = "CAB_SSM_BACKEND"
BACKENDS = ("auto", "torch", "mamba_ssm", "fla")
OPERATIONS = ("causal_conv1d", "selective_scan", "ssd_scan")

# S6: tokens that one chunk walks through one after the other, and the size (elements of one state tensor) up to which
# chunks are walked side by side. Measured on CPU; results do not depend on either.
SCAN_CHUNK = 32
SCAN_STATE_ELEMENTS = 2**18
# SSD: the torch path's largest chunk (measured on CPU) and how many chunks one decay matrix spans.
SSD_CHUNK = 64
SSD_CHUNKS_PER_BLOCK = 16

# (operation, backend) -> where its kernels live
_KERNEL_MODULES = {
    ("causal_conv1d", "mamba_ssm"): ("causal_conv1d",),
    ("selective_scan", "mamba_ssm"): (
        "mamba_ssm.ops.selective_scan_interface",
        "mamba_ssm.ops.triton.selective_state_update",
    ),
    ("ssd_scan", "mamba_ssm"): ("mamba_ssm.ops.triton.ssd_combined", "mamba_ssm.ops.triton.selective_state_update"),
    ("ssd_scan", "fla"): ("fla.ops.simple_gla",),
}
_PACKAGES = {"causal_conv1d": "causal-conv1d", "mamba_ssm": "mamba-ssm", "fla": "flash-linear-attention"}
_kernels: dict[str, Callable] = {}
_unusable: dict[tuple[str, str], str] = {}
_reported: set[str] = set()


def _load_kernels(operation: str, backend: str) -> str | None:
    """Imports an operation's kernels once into `_kernels`; returns None, or why they can't be used."""
    key = (operation, backend)
    if key in _unusable:
        return _unusable[key]
    for module_name in _KERNEL_MODULES[key]:
        package = module_name.partition(".")[0]
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name == package:
                _unusable[key] = f"{_PACKAGES[package]} is not installed"
                return _unusable[key]
            _unusable[key] = f"{_PACKAGES[package]} is installed but broken: {error}"
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            _unusable[key] = f"{_PACKAGES[package]} is installed but broken: {error}"
        else:
            _kernels.update({name: value for name, value in vars(module).items() if name in _KERNEL_NAMES})
            continue
        logger.warning(f"{_unusable[key]}. {operation} runs on torch instead; reinstall or remove the package.")
        return _unusable[key]
    return None


_KERNEL_NAMES = (
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "selective_scan_fn",
    "selective_state_update",
    "mamba_chunk_scan_combined",
    "chunk_simple_gla",
)


@torch.compiler.assume_constant_result
def _choose_backend(operation: str, device: str, dtype: str, mamba_ssm_lacks: str, fla_lacks: str) -> str:
    wish = os.environ.get(BACKEND_VARIABLE, "auto")
    if wish not in BACKENDS:
        raise ValueError(f"{BACKEND_VARIABLE}={wish!r} is unknown; choose one of {', '.join(BACKENDS)}.")
    if wish == "fla" and operation == "causal_conv1d":
        backend, reason = "torch", "fla serves the SSD scan only, its convolution is torch's"
    elif wish == "torch":
        backend, reason = "torch", f"{BACKEND_VARIABLE}=torch"
    else:
        backend = "mamba_ssm" if wish == "auto" else wish
        lacks = mamba_ssm_lacks if backend == "mamba_ssm" else fla_lacks
        if device != "cuda":
            obstacle: str | None = f"the tensors are on {device} and the kernels need cuda"
        elif dtype == "float64":
            obstacle = "the kernels have no float64"
        else:
            obstacle = lacks or None
        missing = _load_kernels(operation, backend) if obstacle is None else None
        way_out = f"Set {BACKEND_VARIABLE}=auto or torch."
        if wish != "auto" and obstacle:
            raise ValueError(f"{BACKEND_VARIABLE}={wish} can't run this {operation}: {obstacle}. {way_out}")
        if wish != "auto" and missing:
            raise ImportError(f"{BACKEND_VARIABLE}={wish} can't run {operation}: {missing}. Install it, or s{way_out[1:]}")
        if obstacle or missing:
            backend, reason = "torch", obstacle or missing
        else:
            reason = "CUDA tensors and importable kernels" if wish == "auto" else f"{BACKEND_VARIABLE}={wish}"
    if operation not in _reported:
        _reported.add(operation)
        logger.info(f"{operation} runs on {backend}: {reason}.")
    return backend


def backend_for(
    operation: str, device: torch.device, dtype: torch.dtype, mamba_ssm_lacks: str = "", fla_lacks: str = ""
) -> str:
    """Names the backend that one call runs on: "torch", "mamba_ssm" or "fla".

    The environment variable `CAB_SSM_BACKEND` (auto, torch, mamba_ssm, fla) is read at every call (under torch.compile
    at trace time). `auto` takes mamba_ssm and causal_conv1d for CUDA tensors where they are importable and support the
    call, else torch. The first call of each operation logs one line that says which backend runs and why.

    Args:
        operation: one of `OPERATIONS`; the one-step forms belong to their scan or convolution.
        device, dtype: of the operation's `x`.
        mamba_ssm_lacks, fla_lacks: what of this call that backend has no support for, in words; empty if nothing.

    Raises:
        ValueError: for an unknown operation or value of the variable, and for an explicit wish that this call can't have.
        ImportError: for an explicit wish whose package is missing or broken.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"operation={operation!r} is unknown; choose one of {', '.join(OPERATIONS)}.")
    return _choose_backend(operation, device.type, str(dtype).removeprefix("torch."), mamba_ssm_lacks, fla_lacks)


def _check_shape(name: str, tensor: Tensor | None, expected: tuple[int, ...], legend: str) -> None:
    if tensor is not None and tuple(tensor.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {expected} = {legend}.")


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _run_numbers(seq_idx: Tensor) -> Tensor:
    # counting the changes makes an index that comes back later a new sequence, here and in every kernel
    changes = seq_idx[:, 1:] != seq_idx[:, :-1]
    return F.pad(changes.cumsum(1), (1, 0)).to(torch.int32)  # (b, t)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """Depthwise causal convolution over tokens: `y_t = act(bias + sum_j weight[:, k-1-j] * x_{t-j})`.

    Args:
        x: `(b, t, d)`, may be a non-contiguous slice.
        weight: `(d, k)`, the last tap is the current token's.
        bias: `(d,)`.
        activation: None or "silu".
        initial_states: `(b, d, k)`, the last k inputs before x (transformers' cache layout; column 0 is not read).
        seq_idx: `(b, t)` integers of packed sequences; taps never cross a change of index.

    Returns:
        `(b, t, d)` in `x.dtype`.

    Raises:
        ValueError: for shapes that don't fit, another activation, or `initial_states` together with `seq_idx`.
    """
    b, t, d = x.shape
    k = weight.shape[-1]
    _check_convolution(weight, bias, activation, d)
    _check_shape("initial_states", initial_states, (b, d, k), "(b, d, k)")
    _check_shape("seq_idx", seq_idx, (b, t), "(b, t)")
    if seq_idx is not None:
        if initial_states is not None:
            raise ValueError("causal_conv1d takes initial_states or seq_idx, not both; run the first sequence apart.")
        seq_idx = _run_numbers(seq_idx)
    if backend_for("causal_conv1d", x.device, x.dtype, _conv_kernel_lacks(t, d, k, initial_states, seq_idx)) != "torch":
        return _causal_conv1d_kernel(x, weight, bias, activation, initial_states, seq_idx)

    dtype = _compute_dtype(x)
    weight = weight.to(dtype)
    if initial_states is None:
        padded = F.pad(x.to(dtype), (0, 0, k - 1, 0))
    else:
        padded = torch.cat([initial_states[..., 1:].transpose(1, 2).to(dtype), x.to(dtype)], dim=1)  # (b, k-1+t, d)
    y = torch.zeros_like(padded[:, k - 1 :]) if bias is None else bias.to(dtype).expand(b, t, d)
    for tap in range(k):
        shifted = padded[:, tap : tap + t]
        if seq_idx is not None:
            source = F.pad(seq_idx, (k - 1, 0), value=-1)[:, tap : tap + t]
            shifted = shifted * (source == seq_idx).unsqueeze(-1)
        y = torch.addcmul(y, shifted, weight[:, tap])
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """One token of `causal_conv1d`, without gradients.

    Args:
        x: `(b, d)`.
        conv_state: `(b, d, k)`, the last k inputs; shifted in place, x becomes the last column.
        weight, bias, activation: as for `causal_conv1d`.

    Returns:
        `(b, d)` in `x.dtype`.

    Raises:
        ValueError: for shapes that don't fit or another activation.
    """
    b, d = x.shape
    k = weight.shape[-1]
    _check_convolution(weight, bias, activation, d)
    _check_shape("conv_state", conv_state, (b, d, k), "(b, d, k)")
    lacks = _conv_kernel_lacks(1, d, k, None, None)
    if conv_state.dtype != x.dtype:
        lacks = f"conv_state is {conv_state.dtype}, x is {x.dtype}"
    if backend_for("causal_conv1d", x.device, x.dtype, lacks) != "torch":
        return _causal_conv1d_update_kernel(x, conv_state, weight, bias, activation)
    dtype = _compute_dtype(x)
    conv_state.copy_(torch.cat([conv_state[..., 1:], x.unsqueeze(-1).to(conv_state.dtype)], dim=-1))
    y = (conv_state.to(dtype) * weight.to(dtype)).sum(-1)
    if bias is not None:
        y = y + bias.to(dtype)
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)


def _check_convolution(weight: Tensor, bias: Tensor | None, activation: str | None, d: int) -> None:
    _check_shape("weight", weight, (d, weight.shape[-1]), "(d, k)")
    _check_shape("bias", bias, (d,), "(d,)")
    if activation not in (None, "silu"):
        raise ValueError(f'activation={activation!r} is unknown; choose None or "silu".')


def _conv_kernel_lacks(t: int, d: int, k: int, initial_states: Tensor | None, seq_idx: Tensor | None) -> str:
    if t == 0:
        return "there are no tokens"
    if not 2 <= k <= 4:
        return f"its convolution has 2 to 4 taps, weight has {k}"
    if (initial_states is not None or seq_idx is not None) and (d % 8 or t < 2):
        return f"initial_states and seq_idx need a width divisible by 8 and 2 tokens, x has width {d} and {t} tokens"
    return ""


@torch.compiler.disable
def _causal_conv1d_kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
) -> Tensor:
    if x.shape[1] > 1 and x.shape[2] % 8 == 0:
        # channel-last: a slice of a projection is read in place when its strides are aligned
        if x.stride(2) != 1 or x.stride(1) % 8 or x.stride(0) % 8 or x.data_ptr() % 16:
            x = x.contiguous()
        x = x.transpose(1, 2)
    else:
        x = x.transpose(1, 2).contiguous()
    if initial_states is not None:
        history = initial_states[..., 1:].to(x.dtype)
        initial_states = history.transpose(1, 2).contiguous().transpose(1, 2)  # (b, d, k-1), channel-last
    bias = None if bias is None else bias.to(weight.dtype)
    y = _kernels["causal_conv1d_fn"](
        x, weight.contiguous(), bias, seq_idx=seq_idx, initial_states=initial_states, activation=activation
    )
    return y.transpose(1, 2)


@torch.compiler.disable
def _causal_conv1d_update_kernel(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    bias = None if bias is None else bias.to(weight.dtype)
    return _kernels["causal_conv1d_update"](x, conv_state, weight.contiguous(), bias, activation)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S6 scan: `h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t`, `y_t = C_t h_t + D x_t`, each channel with its own state.

    Args:
        x: `(b, t, d)`.
        dt: `(b, t, d)` step sizes after softplus; 0 leaves the state untouched (a padded token).
        A: `(d, n)`, negative.
        B, C: `(b, t, n)`.
        D: `(d,)`.
        initial_state: `(b, d, n)`; zeros if None. It belongs to the first packed sequence.
        seq_idx: `(b, t)` integers of packed sequences; the state starts from zero where the index changes.

    Returns:
        The output `(b, t, d)` in `x.dtype` and the state after the last token, `(b, d, n)` in float32.

    Raises:
        ValueError: for shapes that don't fit.

    Source: recurrence of arXiv 2510.19266, section 3 (Mamba's `h_t = A_t h_{t-1} + B_t x_t`, `y_t = C_t h_t`).
    """
    b, t, d = x.shape
    n = A.shape[-1]
    _check_shape("A", A, (d, n), "(d, n)")
    _check_shape("dt", dt, (b, t, d), "(b, t, d)")
    _check_shape("B", B, (b, t, n), "(b, t, n)")
    _check_shape("C", C, (b, t, n), "(b, t, n)")
    _check_shape("D", D, (d,), "(d,)")
    _check_shape("initial_state", initial_state, (b, d, n), "(b, d, n)")
    _check_shape("seq_idx", seq_idx, (b, t), "(b, t)")
    lacks = ""
    if initial_state is not None or seq_idx is not None:
        lacks = "its S6 scan takes neither initial_state nor seq_idx"
    elif t == 0 or n > 256:
        lacks = f"it needs 1 token or more and a state of at most 256, got {t} and {n}"
    backend = backend_for("selective_scan", x.device, x.dtype, lacks, "it has no S6 scan")
    dtype = _compute_dtype(x)
    u, dt, A, B, C = (tensor.to(dtype) for tensor in (x, dt, A, B, C))
    if backend == "mamba_ssm":
        y, final_state = _selective_scan_kernel(u, dt, A, B, C)
    else:
        state = x.new_zeros(b, n, d, dtype=dtype) if initial_state is None else initial_state.to(dtype).transpose(1, 2)
        keep = None
        if seq_idx is not None:
            runs = _run_numbers(seq_idx)
            keep = F.pad(runs[:, 1:] == runs[:, :-1], (1, 0), value=True).to(dtype)  # (b, t)
        y, final_state, _ = _scan(u * dt, dt, A.t(), B, C, state, keep)
        final_state = final_state.transpose(1, 2).contiguous()  # (b, d, n)
    if D is not None:
        y = torch.addcmul(y, u, D.to(dtype))
    return y.to(x.dtype), final_state


@torch.no_grad()
def selective_scan_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None
) -> Tensor:
    """One token of `selective_scan`, without gradients.

    Args:
        state: `(b, d, n)` float32, updated in place.
        x, dt: `(b, d)`.
        A: `(d, n)`.
        B, C: `(b, n)`.
        D: `(d,)`.

    Returns:
        `(b, d)` in `x.dtype`.

    Raises:
        ValueError: for shapes that don't fit.
    """
    b, d = x.shape
    n = A.shape[-1]
    _check_shape("state", state, (b, d, n), "(b, d, n)")
    _check_shape("dt", dt, (b, d), "(b, d)")
    _check_shape("B", B, (b, n), "(b, n)")
    _check_shape("C", C, (b, n), "(b, n)")
    _check_shape("D", D, (d,), "(d,)")
    backend = backend_for("selective_scan", x.device, x.dtype, "", "it has no S6 scan")
    dtype = _compute_dtype(x)
    A, dt = A.to(dtype), dt.to(dtype)
    if backend == "mamba_ssm":
        return _state_update_kernel(state, x, dt, A, B, C, D)
    x_wide = x.to(dtype)
    state.mul_(torch.exp(dt.unsqueeze(-1) * A)).add_((dt * x_wide).unsqueeze(-1) * B.to(dtype).unsqueeze(1))
    y = (state * C.to(dtype).unsqueeze(1)).sum(-1)
    return (y if D is None else y + x_wide * D.to(dtype)).to(x.dtype)


# Opaque to torch.compile and torch.export, which see one node instead of a loop over positions. The namespace follows
# the module's name because a checkpoint's copy of this file may be loaded beside the package's.
_NAMESPACE = re.sub(r"\W", "_", __name__)


def _scan_layout(t: int, state_elements: int) -> tuple[int, int, int]:
    """Tokens in a chunk, chunks in all, and chunks walked side by side."""
    length = min(SCAN_CHUNK, max(t, 1))
    return length, -(-t // length), max(8, SCAN_STATE_ELEMENTS // max(state_elements, 1))


def _into_chunks(tensor: Tensor, length: int, value: float = 0.0) -> Tensor:
    padding = -tensor.shape[1] % length
    if padding:
        tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, padding), value=value)
    return tensor.unflatten(1, (-1, length)) if tensor.shape[1] else tensor.unsqueeze(2)  # (b, chunk, position, ...)


def _scan_decays(dt: Tensor, A: Tensor, keep: Tensor | None, out: Tensor | None = None) -> Tensor:
    out = torch.mul(dt.unsqueeze(-2), A, out=out).exp_()  # (b, chunk, n, d)
    return out if keep is None else out.mul_(keep[..., None, None])


@torch.library.custom_op(f"{_NAMESPACE}::selective_scan", mutates_args=())
def _scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Walks chunks side by side, position by position: once from zero for the chunks' own final states, then, with
    these carried on from chunk to chunk, from the true incoming states. Decays exist for one position at a time.

    u = dt * x and dt are (b, t, d), A (n, d), B and C (b, t, n), state (b, n, d), keep (b, t): 0 where a sequence starts.
    Returns y (b, t, d), the final state (b, n, d) and each chunk's incoming state (b, chunk, n, d) for the backward.
    """
    (b, t, d), n = u.shape, A.shape[0]
    length, chunks, side = _scan_layout(t, b * n * d)
    A = A.contiguous()
    state = state.clone(memory_format=torch.contiguous_format)
    incoming = u.new_empty(b, chunks, n, d)
    y = u.new_empty(b, chunks, length, d)
    u, dt, B, C = (_into_chunks(tensor, length) for tensor in (u, dt, B, C))
    keep = None if keep is None else _into_chunks(keep, length, 1.0)
    for block in (slice(first, first + side) for first in range(0, chunks, side)):
        enter = incoming[:, block]
        enter[:, 0] = state
        decay = torch.empty_like(enter, memory_format=torch.contiguous_format)
        for emit in (False, True):
            if emit:
                h = enter.clone(memory_format=torch.contiguous_format)
            elif enter.shape[1] > 1:
                h = torch.zeros_like(decay)
            else:
                continue
            for position in range(length):
                at = (slice(None), block, position)
                _scan_decays(dt[at], A, None if keep is None else keep[at], out=decay)
                h.mul_(decay).addcmul_(u[at].unsqueeze(-2), B[at].unsqueeze(-1))
                if emit:
                    y[at] = _contract_states(h, C[at])
            if not emit:
                across = _scan_decays(dt[:, block].sum(2), A, None if keep is None else keep[:, block].prod(2))
                for chunk in range(1, enter.shape[1]):
                    enter[:, chunk] = torch.addcmul(h[:, chunk - 1], across[:, chunk - 1], enter[:, chunk - 1])
        state = h[:, -1].contiguous()
    return y.flatten(1, 2)[:, :t].contiguous(), state, incoming


@_scan.register_fake
def _(u, dt, A, B, C, state, keep):
    b, t, d = u.shape
    n = A.shape[0]
    # -(-t // SCAN_CHUNK) counts the chunks also where t < SCAN_CHUNK is the chunk's length
    incoming = u.new_empty(b, -(-t // SCAN_CHUNK), n, d)
    return u.new_empty(b, t, d), u.new_empty(b, n, d), incoming


@torch.library.custom_op(f"{_NAMESPACE}::selective_scan_backward", mutates_args=())
def _scan_backward(
    grad_y: Tensor,
    grad_state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    incoming: Tensor,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Adjoint of `_scan` with states and decays of one block of chunks recomputed at a time.

    With `g_t = C_t grad_y_t + exp(dt_{t+1} A) g_{t+1}`: grad u = sum_n g B, grad B = sum_d g u, grad C = sum_d grad_y h,
    and `r_t = g_t exp(dt_t A) h_{t-1}` gives grad dt = sum_n r A, grad A = sum_bt r dt.
    """
    (b, t, d), n = u.shape, A.shape[0]
    length, chunks, side = _scan_layout(t, b * n * d)
    A = A.contiguous()
    grad_A, grad_state = torch.zeros_like(A), grad_state.clone(memory_format=torch.contiguous_format)
    u, dt, B, C, grad_y = (_into_chunks(tensor, length) for tensor in (u, dt, B, C, grad_y))
    keep = None if keep is None else _into_chunks(keep, length, 1.0)
    grad_u, grad_dt, grad_B, grad_C = (torch.empty_like(tensor) for tensor in (u, dt, B, C))
    for block in (slice(first, first + side) for first in reversed(range(0, chunks, side))):
        enter = incoming[:, block].contiguous()
        states = enter.new_empty(length, *enter.shape)
        decays = torch.empty_like(states)
        for position in range(length):
            at = (slice(None), block, position)
            _scan_decays(dt[at], A, None if keep is None else keep[at], out=decays[position])
            torch.mul(states[position - 1] if position else enter, decays[position], out=states[position])
            states[position].addcmul_(u[at].unsqueeze(-2), B[at].unsqueeze(-1))
            grad_C[at] = _contract_width(states[position], grad_y[at])

        leave = torch.empty_like(enter)  # adjoints of the chunks' final states
        leave[:, -1] = grad_state
        g = torch.zeros_like(enter)
        if enter.shape[1] > 1:
            for position in reversed(range(length)):
                at = (slice(None), block, position)
                g.addcmul_(grad_y[at].unsqueeze(-2), C[at].unsqueeze(-1)).mul_(decays[position])
            across = _scan_decays(dt[:, block].sum(2), A, None if keep is None else keep[:, block].prod(2))
            for chunk in reversed(range(enter.shape[1] - 1)):
                leave[:, chunk] = torch.addcmul(g[:, chunk + 1], across[:, chunk + 1], leave[:, chunk + 1])

        g = leave
        product, partial_A = torch.empty_like(g), torch.zeros_like(g)
        for position in reversed(range(length)):
            at = (slice(None), block, position)
            g.addcmul_(grad_y[at].unsqueeze(-2), C[at].unsqueeze(-1))
            grad_u[at] = _contract_states(g, B[at])
            grad_B[at] = _contract_width(g, u[at])
            g.mul_(decays[position])
            torch.mul(g, states[position - 1] if position else enter, out=product)
            partial_A.addcmul_(product, dt[at].unsqueeze(-2))
            grad_dt[at] = product.mul_(A).sum(-2)
        grad_A += partial_A.sum((0, 1))
        grad_state = g[:, 0].contiguous()
    grads = (tensor.flatten(1, 2)[:, :t].contiguous() for tensor in (grad_u, grad_dt, grad_B, grad_C))
    grad_u, grad_dt, grad_B, grad_C = grads
    return grad_u, grad_dt, grad_A, grad_B, grad_C, grad_state


@_scan_backward.register_fake
def _(grad_y, grad_state, u, dt, A, B, C, incoming, keep):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (u, dt, A, B, C, grad_state))


def _contract_states(h: Tensor, weights: Tensor) -> Tensor:
    with torch.autocast(h.device.type, enabled=False):
        return (weights.unsqueeze(-2) @ h).squeeze(-2)  # (b, chunk, n, d), (b, chunk, n) -> (b, chunk, d)


def _contract_width(h: Tensor, weights: Tensor) -> Tensor:
    with torch.autocast(h.device.type, enabled=False):
        return (h @ weights.unsqueeze(-1)).squeeze(-1)  # (b, chunk, n, d), (b, chunk, d) -> (b, chunk, n)


def _save_scan(ctx, inputs, output) -> None:
    u, dt, A, B, C, _, keep = inputs
    ctx.save_for_backward(u, dt, A, B, C, output[2], keep)


def _differentiate_scan(ctx, grad_y, grad_state, _):
    return *_scan_backward(grad_y, grad_state, *ctx.saved_tensors), None


_scan.register_autograd(_differentiate_scan, setup_context=_save_scan)


class _FinalStateGradient(torch.autograd.Function):
    """Identity on a final state whose kernel has no gradient for it: the backward runs the torch scan, only if needed."""

    @staticmethod
    def forward(ctx, final_state, u, dt, A, B):
        ctx.save_for_backward(u, dt, A, B)
        return final_state.clone()

    @staticmethod
    def backward(ctx, grad_state):
        u, dt, A, B = ctx.saved_tensors
        state = torch.zeros_like(grad_state).transpose(1, 2)
        *_, incoming = _scan(u, dt, A.t(), B, torch.zeros_like(B), state, None)
        grad_u, grad_dt, grad_A, grad_B, _, _ = _scan_backward(
            torch.zeros_like(u), grad_state.transpose(1, 2), u, dt, A.t(), B, torch.zeros_like(B), incoming, None
        )
        return None, grad_u, grad_dt, grad_A.t(), grad_B


@torch.compiler.disable
def _selective_scan_kernel(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    # The kernel wants one dtype for all of x, dt, B and C; float32 keeps dt exact where a common bfloat16 would round it.
    y, final_state = _kernels["selective_scan_fn"](
        *(tensor.transpose(1, 2).contiguous() for tensor in (x, dt)),
        A.contiguous(),
        *(tensor.transpose(1, 2).contiguous() for tensor in (B, C)),
        return_last_state=True,
    )
    return y.transpose(1, 2), _FinalStateGradient.apply(final_state.detach(), dt * x, dt, A, B)


@torch.compiler.disable
def _state_update_kernel(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None
) -> Tensor:
    # without D and dt_bias the Triton wrapper fails on their missing strides
    zeros = torch.zeros_like(A[..., 0])
    return _kernels["selective_state_update"](state, x, dt, A, B, C, D=zeros if D is None else D, dt_bias=zeros)


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    chunk_size: int = 256,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """SSD scan: `S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T`, `y_t = S_t C_t + D x_t`, one scalar decay for each head.

    Args:
        x: `(b, t, h, p)`.
        dt: `(b, t, h)` step sizes after softplus; 0 leaves the state untouched (a padded token).
        A: `(h,)`, negative.
        B, C: `(b, t, g, n)`; h must be a multiple of g, consecutive heads share a group.
        D: `(h,)`.
        chunk_size: upper bound of the chunk that is computed as one matrix product; results don't depend on it.
        initial_state: `(b, h, p, n)`; zeros if None. It belongs to the first packed sequence.
        seq_idx: `(b, t)` integers of packed sequences; the state starts from zero where the index changes.

    Returns:
        The output `(b, t, h, p)` in `x.dtype` and the state after the last token, `(b, h, p, n)` in float32.

    Raises:
        ValueError: for shapes that don't fit.

    Source: the recurrence of arXiv 2510.19266 with a scalar `A_t`, whose map `C_i prod(A) B_j` the bridge aligns.
    """
    b, t, h, p = x.shape
    g, n = B.shape[-2:]
    _check_ssd(A, D, g, h, n, (b, t), dt, B, C)
    _check_shape("initial_state", initial_state, (b, h, p, n), "(b, h, p, n)")
    _check_shape("seq_idx", seq_idx, (b, t), "(b, t)")
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be 1 or more.")
    runs = None if seq_idx is None else _run_numbers(seq_idx)
    lacks = "there are no tokens" if t == 0 else ""
    fla_lacks = lacks or ("" if seq_idx is None else "its scan takes no seq_idx")
    backend = backend_for("ssd_scan", x.device, x.dtype, lacks, fla_lacks)
    if backend == "mamba_ssm":
        return _ssd_scan_mamba_ssm(x, dt, A, B, C, D, chunk_size, initial_state, runs)
    if backend == "fla":
        return _ssd_scan_fla(x, dt, A, B, C, D, initial_state)
    dtype = _compute_dtype(x)
    wide, dt, A, B, C = (tensor.to(dtype) for tensor in (x, dt, A, B, C))
    state = x.new_zeros(b, h, p, n, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    if t == 0:
        return x.clone(), state.clone()
    with torch.autocast(x.device.type, enabled=False):
        y, final_state = _ssd_chunks(wide, dt, A, B, C, chunk_size, state, runs)
        if D is not None:
            y = torch.addcmul(y, wide, D.to(dtype).unsqueeze(-1))
    return y.to(x.dtype), final_state


@torch.no_grad()
def ssd_scan_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None
) -> Tensor:
    """One token of `ssd_scan`, without gradients.

    Args:
        state: `(b, h, p, n)` float32, updated in place.
        x: `(b, h, p)`.
        dt: `(b, h)`.
        A, D: `(h,)`.
        B, C: `(b, g, n)`.

    Returns:
        `(b, h, p)` in `x.dtype`.

    Raises:
        ValueError: for shapes that don't fit.
    """
    b, h, p = x.shape
    g, n = B.shape[-2:]
    _check_ssd(A, D, g, h, n, (b,), dt, B, C)
    _check_shape("state", state, (b, h, p, n), "(b, h, p, n)")
    dtype = _compute_dtype(x)
    A, dt = A.to(dtype), dt.to(dtype)
    if backend_for("ssd_scan", x.device, x.dtype) == "mamba_ssm":
        dt, A = dt.unsqueeze(-1).expand(b, h, p), A[:, None, None].expand(h, p, n)
        D = None if D is None else D.unsqueeze(-1).expand(h, p)
        return _state_update_kernel(state, x, dt, A, B, C, D)
    wide = x.to(dtype)
    B, C = (tensor.to(dtype).repeat_interleave(h // g, dim=1) for tensor in (B, C))  # (b, h, n)
    state.mul_(torch.exp(dt * A)[..., None, None]).add_((dt.unsqueeze(-1) * wide).unsqueeze(-1) * B.unsqueeze(2))
    y = (state * C.unsqueeze(2)).sum(-1)
    return (y if D is None else y + wide * D.to(dtype).unsqueeze(-1)).to(x.dtype)


def _check_ssd(
    A: Tensor, D: Tensor | None, g: int, h: int, n: int, tokens: tuple[int, ...], dt: Tensor, B: Tensor, C: Tensor
) -> None:
    legend = "b, t" if len(tokens) == 2 else "b"
    _check_shape("A", A, (h,), "(h,)")
    _check_shape("D", D, (h,), "(h,)")
    _check_shape("dt", dt, (*tokens, h), f"({legend}, h)")
    _check_shape("B", B, (*tokens, g, n), f"({legend}, g, n)")
    _check_shape("C", C, (*tokens, g, n), f"({legend}, g, n)")
    if h % g:
        raise ValueError(f"x has {h} heads, which the {g} groups of B and C don't divide; take a divisor of {h}.")


def _decay_matrix(log_decay: Tensor, same_run: Tensor | None) -> Tensor:
    """`(..., l, s)`: exp of the sum of `log_decay` over positions s+1..l, 0 for s > l and across sequences."""
    length = log_decay.shape[-1]
    # The difference of two running sums loses what a large decay between them swallows. Carrying the float64 sum as a
    # float32 pair keeps it exact at float32's price; where the device has no float64 the second half is zero.
    total = log_decay.cumsum(-1, dtype=log_decay.dtype if log_decay.device.type == "mps" else torch.float64)
    coarse = total.to(log_decay.dtype)
    fine = (total.detach() - coarse.detach()).to(log_decay.dtype)
    difference = coarse.unsqueeze(-1) - coarse.unsqueeze(-2) + (fine.unsqueeze(-1) - fine.unsqueeze(-2))
    mask = torch.ones(length, length, dtype=torch.bool, device=log_decay.device).tril()
    if same_run is not None:
        mask = mask & same_run
    return difference.masked_fill(~mask, -torch.inf).exp()


def _ssd_chunks(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, state: Tensor, runs: Tensor | None
) -> tuple[Tensor, Tensor]:
    b, t, h, p = x.shape
    g, n = B.shape[2:]
    # a traced graph keeps the full chunk, so that it does not depend on the number of tokens
    length = min(chunk_size, SSD_CHUNK) if torch.compiler.is_compiling() else min(chunk_size, SSD_CHUNK, t)
    c = -(-t // length)
    u, log_decay, B, C = (_into_chunks(tensor, length) for tensor in (x * dt.unsqueeze(-1), dt * A, B, C))
    u = u.unflatten(3, (g, h // g))  # (b, c, l, g, h/g, p)
    log_decay = log_decay.unflatten(3, (g, h // g)).permute(0, 1, 3, 4, 2)  # (b, c, g, h/g, l)
    B, C = B.transpose(2, 3), C.transpose(2, 3)  # (b, c, g, l, n)
    same_run = enters = chunk_runs = None
    if runs is not None:
        # padded tokens belong to the last sequence
        runs = torch.cat([runs, runs[:, -1:].expand(b, c * length - t)], dim=1).view(b, c, length)
        chunk_runs = F.pad(runs[..., -1], (1, 0))  # (b, 1+c), the initial state's first
        same_run = (runs.unsqueeze(-1) == runs.unsqueeze(-2))[:, :, None, None]  # (b, c, 1, 1, l, l)
        enters = (runs == chunk_runs[:, :-1, None])[:, :, :, None, None]  # (b, c, l, 1, 1)

    decay = _decay_matrix(log_decay, same_run)  # (b, c, g, h/g, l, l)
    scores = (C @ B.transpose(-1, -2)).unsqueeze(3) * decay
    y = (scores @ u.permute(0, 1, 3, 4, 2, 5)).permute(0, 1, 4, 2, 3, 5)  # (b, c, l, g, h/g, p)

    to_end = decay[..., -1, :].permute(0, 1, 4, 2, 3).unsqueeze(-1)  # (b, c, l, g, h/g, 1)
    states = B.transpose(-1, -2) @ (u * to_end).transpose(2, 3).flatten(-2)  # (b, c, g, n, h/g * p)
    states = states.unflatten(-1, (h // g, p)).transpose(3, 4).reshape(b, c, h, n, p)
    total = log_decay.cumsum(-1)
    entering, state = _carry_states(states, total[..., -1].reshape(b, c, h), state.transpose(2, 3), chunk_runs)
    entering = entering.unflatten(2, (g, h // g)).transpose(3, 4).reshape(b, c, g, n, -1)  # (b, c, g, n, h/g * p)
    from_start = total.exp().permute(0, 1, 4, 2, 3).unsqueeze(-1)  # (b, c, l, g, h/g, 1)
    if enters is not None:
        from_start = from_start * enters.unsqueeze(-1)
    carried = (C @ entering).transpose(2, 3).unflatten(-1, (h // g, p))  # (b, c, l, g, h/g, p)
    y = torch.addcmul(y, carried, from_start).reshape(b, c * length, h, p)[:, :t]
    return y, state.transpose(2, 3).contiguous()


def _carry_states(
    states: Tensor, log_decay: Tensor, state: Tensor, chunk_runs: Tensor | None
) -> tuple[Tensor, Tensor]:
    """From the chunks' own final states (b, c, h, n, p) to their incoming states, and the state after the last chunk.

    log_decay: (b, c, h) of whole chunks; chunk_runs: (b, 1+c) sequence number at each chunk's end, the initial state's
    first. One product for a block of chunks, so that the cost stays linear in the number of tokens.
    """
    c = states.shape[1]
    entering = []
    for first in range(0, c, SSD_CHUNKS_PER_BLOCK):
        block = slice(first, min(first + SSD_CHUNKS_PER_BLOCK, c))
        same_run = None
        if chunk_runs is not None:
            block_runs = chunk_runs[:, block.start : block.stop + 1]
            same_run = (block_runs.unsqueeze(-1) == block_runs.unsqueeze(-2)).unsqueeze(1)
        decay = _decay_matrix(F.pad(log_decay[:, block], (0, 0, 1, 0)).transpose(1, 2), same_run)  # (b, h, 1+c, 1+c)
        block_states = torch.cat([state.unsqueeze(1), states[:, block]], dim=1).transpose(1, 2)  # (b, h, 1+c, n, p)
        reached = (decay @ block_states.flatten(-2)).view_as(block_states).transpose(1, 2)
        entering.append(reached[:, :-1])
        state = reached[:, -1]
    return torch.cat(entering, dim=1), state


@torch.compiler.disable
def _ssd_scan_mamba_ssm(
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
    # Triton's tiles are powers of two, and a tensor-core product has 16 rows or more
    chunk_size = min(max(1 << (chunk_size - 1).bit_length(), 16), 256)
    y, final_state = _kernels["mamba_chunk_scan_combined"](
        x,
        dt.float(),
        A.float(),
        B.to(x.dtype),
        C.to(x.dtype),
        chunk_size,
        D=None if D is None else D.float(),
        initial_states=None if initial_state is None else initial_state.float(),
        seq_idx=runs,
        dt_softplus=False,
        return_final_states=True,
    )
    return y, final_state.float()


@torch.compiler.disable
def _ssd_scan_fla(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    dt, heads_per_group = dt.float(), x.shape[2] // B.shape[2]
    B, C = (tensor.to(x.dtype).repeat_interleave(heads_per_group, dim=2) for tensor in (B, C))  # (b, t, h, n)
    y, final_state = _kernels["chunk_simple_gla"](
        q=C,
        k=B,
        v=(dt.unsqueeze(-1) * x.float()).to(x.dtype),
        g=dt * A.float(),
        scale=1.0,
        initial_state=None if initial_state is None else initial_state.float().transpose(2, 3).contiguous(),
        output_final_state=True,
    )
    if D is not None:
        y = torch.addcmul(y.float(), x.float(), D.float().unsqueeze(-1))
    return y.to(x.dtype), final_state.float().transpose(2, 3).contiguous()
