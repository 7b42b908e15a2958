"""State-space operations of the students: causal convolution, S6 scan (Mamba-1) and SSD scan (Mamba-2).

Every operation is token-first, computes in float32 (float64 for float64 inputs), returns its output in `x.dtype` and
its states in float32 (float64). Each call takes its backend from `backend_for`; the torch paths run on any device and
are what the kernels are tested against. A compiler is given the kernels as operators, but the torch path of one token,
of which it makes faster code than a kernel is.

Shape legend: `b` batch, `t` token, `d` width, `k` convolution taps, `h` head, `p` head_dim, `g` group, `n` state.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .s6_scan import chunked_scan
from .ssd_scan import scan_chunks
from .ssm_kernels import (
    backend_for,
    conv_by_kernel,
    conv_kernel_lacks,
    conv_update_by_kernel,
    selective_scan_by_kernel,
    ssd_by_fla,
    ssd_by_kernel,
    state_update_by_kernel,
)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _run_numbers(seq_idx: Tensor) -> Tensor:
    # counting the changes makes an index that comes back later a new sequence, here and in every kernel
    changes = seq_idx[:, 1:] != seq_idx[:, :-1]
    return F.pad(changes.cumsum(1), (1, 0))[:, : seq_idx.shape[1]].to(torch.int32)  # (b, t)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """Depthwise causal convolution over tokens, `y_t = act(bias + sum_j weight[:, k-1-j] * x_{t-j})`.

    Args:
        x: `(b, t, d)`, may be a non-contiguous slice.
        weight: `(d, k)`; the last tap is the current token's.
        bias: `(d,)`.
        activation: None or "silu".
        initial_states: `(b, d, k)`, the last k inputs before x (transformers' cache layout; column 0 is not read).
        seq_idx: `(b, t)` integers of packed sequences; taps never cross a change of index.

    Returns:
        `(b, t, d)` in `x.dtype`.

    Raises:
        ValueError: for `initial_states` together with `seq_idx`.
    """
    (b, t, d), k = x.shape, weight.shape[-1]
    if initial_states is not None and seq_idx is not None:
        raise ValueError("causal_conv1d takes initial_states or seq_idx, not both; run the first sequence on its own.")
    runs = None if seq_idx is None else _run_numbers(seq_idx)
    lacks = "there are no tokens" if t == 0 else conv_kernel_lacks(k)
    if d % 8 and (initial_states is not None or runs is not None):
        lacks = f"with initial_states or seq_idx its width must be a multiple of 8, x has width {d}"
    if backend_for("causal_conv1d", x.device, x.dtype, lacks) == "mamba_ssm":
        return conv_by_kernel(x, weight, bias, activation, initial_states, runs)

    dtype = _compute_dtype(x)
    weight, wide = weight.to(dtype), x.to(dtype)
    if initial_states is None:
        padded = F.pad(wide, (0, 0, k - 1, 0))
    else:
        padded = torch.cat([initial_states[..., 1:].transpose(1, 2).to(dtype), wide], dim=1)  # (b, k-1+t, d)
    y = torch.zeros_like(wide) if bias is None else bias.to(dtype).expand(b, t, d)
    for tap in range(k):
        shifted = padded[:, tap : tap + t]
        if runs is not None:
            source_runs = F.pad(runs, (k - 1, 0), value=-1)[:, tap : tap + t]
            shifted = shifted * (source_runs == runs).unsqueeze(-1)
        y = torch.addcmul(y, shifted, weight[:, tap])
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """One token of [`causal_conv1d`], without gradients.

    Args:
        x: `(b, d)`.
        conv_state: `(b, d, k)`, the last k inputs; shifted in place, x becomes the last column.
        weight, bias, activation: as for [`causal_conv1d`].

    Returns:
        `(b, d)` in `x.dtype`.
    """
    lacks = conv_kernel_lacks(weight.shape[-1])
    if conv_state.dtype != x.dtype:
        lacks = f"conv_state is {conv_state.dtype} and x {x.dtype}, it needs one dtype"
    if not torch.compiler.is_compiling() and backend_for("causal_conv1d", x.device, x.dtype, lacks) == "mamba_ssm":
        return conv_update_by_kernel(x, conv_state, weight, bias, activation)
    dtype = _compute_dtype(x)
    inputs = torch.cat([conv_state[..., 1:], x.unsqueeze(-1).to(conv_state.dtype)], dim=-1)
    conv_state.copy_(inputs)
    y = (inputs.to(dtype) * weight.to(dtype)).sum(-1)
    if bias is not None:
        y = y + bias.to(dtype)
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)


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
    """S6 scan, `h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t` and `y_t = C_t h_t + D x_t`; each channel has its own state.

    Args:
        x: `(b, t, d)`.
        dt: `(b, t, d)`, step sizes after softplus; 0 leaves the state untouched (a padded token).
        A: `(d, n)`, negative.
        B, C: `(b, t, n)`.
        D: `(d,)`.
        initial_state: `(b, d, n)`, of the first packed sequence; None means zeros.
        seq_idx: `(b, t)` integers of packed sequences; the state starts from zero where the index changes.

    Returns:
        The output `(b, t, d)` in `x.dtype` and the state after the last token, `(b, d, n)` in float32.

    Source: Mamba's recurrence as in arXiv 2510.19266, with the step sizes of arXiv 2312.00752.
    """
    (b, t, d), n = x.shape, A.shape[-1]
    lacks = ""
    if initial_state is not None or seq_idx is not None:
        lacks = "its S6 scan takes neither initial_state nor seq_idx"
    elif t == 0 or n > 256:
        lacks = f"its S6 scan takes 1 token or more and a state of at most 256, got {t} and {n}"
    dtype = _compute_dtype(x)
    wide, dt, A, B, C = (tensor.to(dtype) for tensor in (x, dt, A, B, C))
    if backend_for("selective_scan", x.device, x.dtype, lacks, "it has no S6 scan") == "mamba_ssm":
        y, final_state = selective_scan_by_kernel(wide, dt, A, B, C)
    else:
        state = x.new_zeros(b, d, n, dtype=dtype) if initial_state is None else initial_state.to(dtype)
        keep = None
        if seq_idx is not None:
            keep = F.pad(seq_idx[:, 1:] == seq_idx[:, :-1], (1, 0), value=True)[:, :t].to(dtype)
        y, final_state, _ = chunked_scan(wide * dt, dt, A.t(), B, C, state.transpose(1, 2), keep)
        final_state = final_state.transpose(1, 2).contiguous()  # (b, d, n)
    if D is not None:
        y = torch.addcmul(y, wide, D.to(dtype))
    return y.to(x.dtype), final_state


@torch.no_grad()
def selective_scan_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None
) -> Tensor:
    """One token of [`selective_scan`], without gradients.

    Args:
        state: `(b, d, n)` in float32, updated in place.
        x, dt: `(b, d)`.
        A: `(d, n)`.
        B, C: `(b, n)`.
        D: `(d,)`.

    Returns:
        `(b, d)` in `x.dtype`.
    """
    dtype = _compute_dtype(x)
    lacks = {"fla_lacks": "it has no S6 scan"}
    if not torch.compiler.is_compiling() and backend_for("selective_scan", x.device, x.dtype, **lacks) == "mamba_ssm":
        return state_update_by_kernel(state, x, dt.to(dtype), A.to(dtype), B, C, D)
    wide, dt, A, B, C = (tensor.to(dtype) for tensor in (x, dt, A, B, C))
    state.mul_(torch.exp(dt.unsqueeze(-1) * A)).add_((dt * wide).unsqueeze(-1) * B.unsqueeze(1))
    y = (state * C.unsqueeze(1)).sum(-1)
    return (y if D is None else y + wide * D.to(dtype)).to(x.dtype)


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
    """SSD scan, `S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T` and `y_t = S_t C_t + D x_t`; each head has one decay.

    Args:
        x: `(b, t, h, p)`.
        dt: `(b, t, h)`, step sizes after softplus; 0 leaves the state untouched (a padded token).
        A: `(h,)`, negative.
        B, C: `(b, t, g, n)`; g divides h, neighbouring heads share a group.
        D: `(h,)`.
        chunk_size: the most tokens that one matrix product spans; results do not depend on it.
        initial_state: `(b, h, p, n)`, of the first packed sequence; None means zeros.
        seq_idx: `(b, t)` integers of packed sequences; the state starts from zero where the index changes.

    Returns:
        The output `(b, t, h, p)` in `x.dtype` and the state after the last token, `(b, h, p, n)` in float32.

    Source: Mamba's recurrence as in arXiv 2510.19266, with one decay a head and the chunks of arXiv 2405.21060.
    """
    (b, t, h, p), n = x.shape, B.shape[-1]
    runs = None if seq_idx is None else _run_numbers(seq_idx)
    lacks = "there are no tokens" if t == 0 else ""
    fla_lacks = "its scan takes no seq_idx" if lacks == "" and runs is not None else lacks
    backend = backend_for("ssd_scan", x.device, x.dtype, lacks, fla_lacks)
    if backend == "mamba_ssm":
        return ssd_by_kernel(x, dt, A, B, C, D, chunk_size, initial_state, runs)
    if backend == "fla":
        return ssd_by_fla(x, dt, A, B, C, D, initial_state)
    dtype = _compute_dtype(x)
    wide, dt, A, B, C = (tensor.to(dtype) for tensor in (x, dt, A, B, C))
    state = x.new_zeros(b, h, p, n, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    if t == 0:
        return x.clone(), state.clone()
    with torch.autocast(x.device.type, enabled=False):
        y, final_state = scan_chunks(wide, dt, A, B, C, chunk_size, state, runs)
        if D is not None:
            y = torch.addcmul(y, wide, D.to(dtype).unsqueeze(-1))
    return y.to(x.dtype), final_state


@torch.no_grad()
def ssd_scan_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None
) -> Tensor:
    """One token of [`ssd_scan`], without gradients.

    Args:
        state: `(b, h, p, n)` in float32, updated in place.
        x: `(b, h, p)`.
        dt: `(b, h)`.
        A, D: `(h,)`.
        B, C: `(b, g, n)`.

    Returns:
        `(b, h, p)` in `x.dtype`.
    """
    (b, h, p), (g, n) = x.shape, B.shape[-2:]
    dtype = _compute_dtype(x)
    if not torch.compiler.is_compiling() and backend_for("ssd_scan", x.device, x.dtype) == "mamba_ssm":
        # strides of 0 tell the kernel that a head's channels and states share one decay
        dt, A = dt.to(dtype).unsqueeze(-1).expand(b, h, p), A.to(dtype)[:, None, None].expand(h, p, n)
        return state_update_by_kernel(state, x, dt, A, B, C, None if D is None else D.unsqueeze(-1).expand(h, p))
    wide, dt, A = x.to(dtype), dt.to(dtype).unsqueeze(-1), A.to(dtype).unsqueeze(-1)
    B, C = (tensor.to(dtype).unsqueeze(2).expand(b, g, h // g, n).reshape(b, h, 1, n) for tensor in (B, C))
    state.mul_(torch.exp(dt * A).unsqueeze(-1)).addcmul_((dt * wide).unsqueeze(-1), B)
    y = (state * C).sum(-1)
    return (y if D is None else torch.addcmul(y, wide, D.to(dtype).unsqueeze(-1))).to(x.dtype)
