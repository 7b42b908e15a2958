"""The SSD scan of the torch path: products within chunks, and one product that carries states from chunk to chunk.

Shape legend: `b` batch, `t` token, `c` chunk, `l` position in a chunk, `h` head, `p` head_dim, `g` group, `n` state.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .s6_scan import into_chunks


# No result depends on these: the largest chunk, and chunks in one decay matrix.
SSD_CHUNK = 64
SSD_CHUNKS_PER_BLOCK = 16


def scan_chunks(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, state: Tensor, runs: Tensor | None
) -> tuple[Tensor, Tensor]:
    (b, t, h, p), (g, n) = x.shape, B.shape[-2:]
    # a traced graph has full chunks, so that it serves any number of tokens
    length = min(chunk_size, SSD_CHUNK) if torch.compiler.is_compiling() else min(chunk_size, SSD_CHUNK, t)
    c = -(-t // length)
    u, log_decay, B, C = (into_chunks(tensor, c, length) for tensor in (x * dt.unsqueeze(-1), dt * A, B, C))
    u = u.unflatten(3, (g, h // g))  # (b, c, l, g, h/g, p)
    log_decay = log_decay.unflatten(3, (g, h // g)).permute(0, 1, 3, 4, 2)  # (b, c, g, h/g, l)
    B, C = B.transpose(2, 3), C.transpose(2, 3)  # (b, c, g, l, n)
    total = log_decay.cumsum(-1)
    from_start = total.exp().permute(0, 1, 4, 2, 3).unsqueeze(-1)  # (b, c, l, g, h/g, 1)
    same_run = chunk_runs = None
    if runs is not None:
        # padding belongs to the last sequence
        runs = torch.cat([runs, runs[:, -1:].expand(b, c * length - t)], dim=1).view(b, c, length)
        same_run = (runs.unsqueeze(-1) == runs.unsqueeze(-2))[:, :, None, None]  # (b, c, 1, 1, l, l)
        chunk_runs = F.pad(runs[..., -1], (1, 0))  # (b, 1+c), the initial state's first
        from_start = from_start * (runs == chunk_runs[:, :-1, None])[..., None, None, None]

    decay = _decay_matrix(log_decay, same_run)  # (b, c, g, h/g, l, l)
    scores = (C @ B.transpose(-1, -2)).unsqueeze(3) * decay
    y = (scores @ u.permute(0, 1, 3, 4, 2, 5)).permute(0, 1, 4, 2, 3, 5)  # (b, c, l, g, h/g, p)

    to_end = decay[..., -1, :].permute(0, 1, 4, 2, 3).unsqueeze(-1)  # (b, c, l, g, h/g, 1)
    states = B.transpose(-1, -2) @ (u * to_end).transpose(2, 3).flatten(-2)  # (b, c, g, n, h/g * p)
    states = states.unflatten(-1, (h // g, p)).transpose(3, 4).reshape(b, c, h, n, p)
    entering, state = _carry_states(states, total[..., -1].flatten(-2), state.transpose(2, 3), chunk_runs)
    entering = entering.unflatten(2, (g, h // g)).transpose(3, 4).flatten(-2)  # (b, c, g, n, h/g * p)
    carried = (C @ entering).transpose(2, 3).unflatten(-1, (h // g, p))  # (b, c, l, g, h/g, p)
    y = torch.addcmul(y, carried, from_start).reshape(b, c * length, h, p)[:, :t]
    return y, state.transpose(2, 3).contiguous()


def _carry_states(
    states: Tensor, log_decay: Tensor, state: Tensor, chunk_runs: Tensor | None
) -> tuple[Tensor, Tensor]:
    """From the chunks' own final states `(b, c, h, n, p)` to their incoming states, and the state after the last one.

    log_decay: `(b, c, h)`, of whole chunks; chunk_runs: `(b, 1+c)`, the sequence at each chunk's end, the initial
    state's first. One product for a block of chunks, so that the cost stays linear in the number of tokens.
    """
    if states.shape[1] > SSD_CHUNKS_PER_BLOCK and not torch.compiler.is_compiling():  # a traced graph has no loop
        entering = []
        for first in range(0, states.shape[1], SSD_CHUNKS_PER_BLOCK):
            block = slice(first, first + SSD_CHUNKS_PER_BLOCK)
            block_runs = None if chunk_runs is None else chunk_runs[:, first : block.stop + 1]
            block_entering, state = _carry_states(states[:, block], log_decay[:, block], state, block_runs)
            entering.append(block_entering)
        return torch.cat(entering, dim=1), state
    same_run = None
    if chunk_runs is not None:
        same_run = (chunk_runs.unsqueeze(-1) == chunk_runs.unsqueeze(-2)).unsqueeze(1)  # (b, 1, 1+c, 1+c)
    decay = _decay_matrix(F.pad(log_decay, (0, 0, 1, 0)).transpose(1, 2), same_run)  # (b, h, 1+c, 1+c)
    states = torch.cat([state.unsqueeze(1), states], dim=1)  # (b, 1+c, h, n, p)
    reached = (decay @ states.transpose(1, 2).flatten(-2)).transpose(1, 2).view_as(states)
    return reached[:, :-1], reached[:, -1]


def _decay_matrix(log_decay: Tensor, same_run: Tensor | None) -> Tensor:
    """`(..., l, s)`: exp of `log_decay` `(..., l)` summed over positions s+1..l; 0 for s > l and across sequences."""
    # In float32 a difference of running sums, and its gradient, loses what a large decay before both has swallowed.
    # The cast comes first: cumsum(dtype=...) would round its gradient to the input's dtype before it sums.
    total = log_decay.to(log_decay.dtype if log_decay.device.type == "mps" else torch.float64).cumsum(-1)
    difference = (total.unsqueeze(-1) - total.unsqueeze(-2)).to(log_decay.dtype)
    future = torch.ones(difference.shape[-2:], dtype=torch.bool, device=log_decay.device).triu(1)
    return difference.masked_fill_(future if same_run is None else future | ~same_run, -torch.inf).exp_()
