"""The S6 scan of the torch path: chunks side by side, one operator for the compiler, its own backward pass.

Shape legend: `b` batch, `t` token, `d` width, `n` state.
"""

import re

import torch
import torch.nn.functional as F
from torch import Tensor


# No result depends on these: the most positions that a chunk walks through, the length up to which a sequence is one
# chunk (one walk instead of two), and the elements of one state tensor up to which chunks are walked side by side.
SCAN_CHUNK = 16
SCAN_WHOLE = 32
SCAN_STATE_ELEMENTS = 2**17


def into_chunks(tensor: Tensor, chunks: int, length: int, value: float = 0.0) -> Tensor:
    padding = chunks * length - tensor.shape[1]
    if torch.compiler.is_compiling() or padding:
        tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, padding), value=value)
    return tensor.unflatten(1, (chunks, length))  # (b, chunk, position, ...)


def _scan_layout(t: int, state_elements: int) -> tuple[int, int, int]:
    """Positions in a chunk, chunks in all, and chunks walked side by side."""
    chunks = min(t, 1) if t <= SCAN_WHOLE else -(-t // SCAN_CHUNK)
    return -(-t // max(chunks, 1)), chunks, max(8, SCAN_STATE_ELEMENTS // max(state_elements, 1))


def _saved_elements(b: int, t: int, n: int, d: int) -> int:
    """Room for the incoming states of the most chunks; no branch on a length, which may be a symbol."""
    return b * -(-t // SCAN_CHUNK) * n * d


def _scan_decay(dt: Tensor, A: Tensor, keep: Tensor | None, out: Tensor | None = None) -> Tensor:
    out = torch.mul(dt.unsqueeze(-2), A, out=out).exp_()  # (b, chunk, n, d)
    return out if keep is None else out.mul_(keep[..., None, None])


def _sum_over_states(h: Tensor, weights: Tensor) -> Tensor:
    with torch.autocast(h.device.type, enabled=False):
        return (weights.unsqueeze(-2) @ h).squeeze(-2)  # (b, chunk, n, d), (b, chunk, n) -> (b, chunk, d)


def _sum_over_width(h: Tensor, weights: Tensor) -> Tensor:
    with torch.autocast(h.device.type, enabled=False):
        return (h @ weights.unsqueeze(-1)).squeeze(-1)  # (b, chunk, n, d), (b, chunk, d) -> (b, chunk, n)


# An operator of its own, so that torch.compile and torch.export see one node instead of a loop over positions. Its
# namespace follows the module's name: a checkpoint's copy of this file may be loaded beside the package's. Their names
# hold the chunks, on which the saved states' size depends: a compiled graph on disk must not meet others.
_NAMESPACE = re.sub(r"\W", "_", __name__)
_CHUNKS = f"{SCAN_WHOLE}_or_{SCAN_CHUNK}"


@torch.library.custom_op(f"{_NAMESPACE}::selective_scan_by_{_CHUNKS}", mutates_args=())
def chunked_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Walks chunks side by side, position by position: once from zero for the chunks' own final states, then, with
    these carried on from chunk to chunk, from the true incoming states. Decays exist for one position at a time.

    u = dt * x, dt: (b, t, d); A: (n, d); B, C: (b, t, n); state: (b, n, d); keep: (b, t), 0 where a sequence starts.
    Returns y (b, t, d), the final state (b, n, d) and, flat, every chunk's incoming state (b, chunk, n, d).
    """
    (b, t, d), n = u.shape, A.shape[0]
    length, chunks, side = _scan_layout(t, b * n * d)
    A, state = A.contiguous(), state.clone(memory_format=torch.contiguous_format)
    saved, y = u.new_empty(_saved_elements(b, t, n, d)), u.new_empty(b, chunks, length, d)
    incoming = saved[: b * chunks * n * d].view(b, chunks, n, d)
    u, dt, B, C = (into_chunks(tensor, chunks, length) for tensor in (u, dt, B, C))
    keep = None if keep is None else into_chunks(keep, chunks, length, 1.0)
    for block in (slice(first, first + side) for first in range(0, chunks, side)):
        enter = incoming[:, block]
        enter[:, 0] = state
        decay = enter.new_empty(enter.shape)

        def walk(h: Tensor, emit: bool, block: slice = block, decay: Tensor = decay) -> Tensor:
            for position in range(length):
                at = (slice(None), block, position)
                _scan_decay(dt[at], A, None if keep is None else keep[at], out=decay)
                h.mul_(decay).addcmul_(u[at].unsqueeze(-2), B[at].unsqueeze(-1))
                if emit:
                    y[at] = _sum_over_states(h, C[at])
            return h

        if enter.shape[1] > 1:
            own = walk(torch.zeros_like(decay), emit=False)
            across = _scan_decay(dt[:, block].sum(2), A, None if keep is None else keep[:, block].prod(2))
            for chunk in range(1, enter.shape[1]):
                enter[:, chunk] = torch.addcmul(own[:, chunk - 1], across[:, chunk - 1], enter[:, chunk - 1])
        state = walk(enter.clone(memory_format=torch.contiguous_format), emit=True)[:, -1].contiguous()
    return y.flatten(1, 2)[:, :t].contiguous(), state, saved


@chunked_scan.register_fake
def _(u, dt, A, B, C, state, keep):
    (b, t, d), n = u.shape, A.shape[0]
    return u.new_empty(b, t, d), u.new_empty(b, n, d), u.new_empty(_saved_elements(b, t, n, d))


@torch.library.custom_op(f"{_NAMESPACE}::selective_scan_by_{_CHUNKS}_backward", mutates_args=())
def chunked_scan_backward(
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
    """Adjoint of `chunked_scan`; states and decays are made again for one block of chunks at a time.

    With `g_t = C_t grad_y_t + exp(dt_{t+1} A) g_{t+1}`: grad u = sum_n g B, grad B = sum_d g u, grad C = sum_d grad_y
    h; with `r_t = g_t exp(dt_t A) h_{t-1}`: grad dt = sum_n r A, grad A = sum_bt r dt.
    """
    (b, t, d), n = u.shape, A.shape[0]
    length, chunks, side = _scan_layout(t, b * n * d)
    A, incoming = A.contiguous(), incoming[: b * chunks * n * d].view(b, chunks, n, d)
    grad_A, grad_state = torch.zeros_like(A), grad_state.clone(memory_format=torch.contiguous_format)
    u, dt, B, C, grad_y = (into_chunks(tensor, chunks, length) for tensor in (u, dt, B, C, grad_y))
    keep = None if keep is None else into_chunks(keep, chunks, length, 1.0)
    grad_u, grad_dt, grad_B, grad_C = (tensor.new_empty(tensor.shape) for tensor in (u, dt, B, C))
    workspace = u.new_empty(2, length, b * min(side, chunks) * n * d)
    for block in (slice(first, first + side) for first in reversed(range(0, chunks, side))):
        at = [(slice(None), block, position) for position in range(length)]
        enter = incoming[:, block].contiguous()
        states, decays = ([row.view_as(enter) for row in rows] for rows in workspace[..., : enter.numel()])
        previous = [enter, *states[:-1]]
        for here, h, before, decay in zip(at, states, previous, decays):
            _scan_decay(dt[here], A, None if keep is None else keep[here], out=decay)
            torch.mul(before, decay, out=h).addcmul_(u[here].unsqueeze(-2), B[here].unsqueeze(-1))
            grad_C[here] = _sum_over_width(h, grad_y[here])

        leave = torch.empty_like(enter)  # the adjoints of the chunks' final states
        leave[:, -1] = grad_state
        if enter.shape[1] > 1:
            g = torch.zeros_like(enter)
            for here, decay in zip(reversed(at), reversed(decays)):
                g.addcmul_(grad_y[here].unsqueeze(-2), C[here].unsqueeze(-1)).mul_(decay)
            across = _scan_decay(dt[:, block].sum(2), A, None if keep is None else keep[:, block].prod(2))
            for chunk in reversed(range(enter.shape[1] - 1)):
                leave[:, chunk] = torch.addcmul(g[:, chunk + 1], across[:, chunk + 1], leave[:, chunk + 1])

        g, r, sum_A = leave, torch.empty_like(leave), torch.zeros_like(leave)
        for here, before, decay in zip(reversed(at), reversed(previous), reversed(decays)):
            g.addcmul_(grad_y[here].unsqueeze(-2), C[here].unsqueeze(-1))
            grad_u[here] = _sum_over_states(g, B[here])
            grad_B[here] = _sum_over_width(g, u[here])
            torch.mul(g.mul_(decay), before, out=r)
            sum_A.addcmul_(r, dt[here].unsqueeze(-2))
            grad_dt[here] = r.mul_(A).sum(-2)
        grad_A += sum_A.sum((0, 1))
        grad_state = g[:, 0].contiguous()
    grads = [grad.flatten(1, 2)[:, :t].contiguous() for grad in (grad_u, grad_dt, grad_B, grad_C)]
    return grads[0], grads[1], grad_A, grads[2], grads[3], grad_state


@chunked_scan_backward.register_fake
def _(grad_y, grad_state, u, dt, A, B, C, incoming, keep):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (u, dt, A, B, C, grad_state))


def _save_scan(ctx, inputs, output) -> None:
    u, dt, A, B, C, _, keep = inputs
    ctx.save_for_backward(u, dt, A, B, C, output[2], keep)


def _differentiate_scan(ctx, grad_y, grad_state, _):
    return *chunked_scan_backward(grad_y, grad_state, *ctx.saved_tensors), None


chunked_scan.register_autograd(_differentiate_scan, setup_context=_save_scan)
