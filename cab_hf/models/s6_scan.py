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


def _rows(tensor: Tensor, block: slice) -> Tensor:
    """A block of chunks, position by position: (b, chunk, position, ...) -> (position, m, ...), m = b * chunk."""
    return tensor[:, block].movedim(2, 0).flatten(1, 2).contiguous()


def _unrows(rows: Tensor, b: int) -> Tensor:
    """The inverse of `_rows`: (position, m, ...) -> (b, chunk, position, ...)."""
    return rows.unflatten(1, (b, -1)).movedim(0, 2)


def _scan_decay(dt: Tensor, A: Tensor, keep: Tensor | None, out: Tensor | None = None) -> Tensor:
    out = torch.mul(dt, A, out=out).exp_()  # (m, 1, d), (n, d) -> (m, n, d)
    return out if keep is None else out.mul_(keep)


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
        u_rows, dt_rows, C_rows = (_rows(tensor, block).unsqueeze(2) for tensor in (u, dt, C))
        B_rows = _rows(B, block).unsqueeze(3)
        kept_rows = None if keep is None else _rows(keep, block)[..., None, None]
        keeps = [None] * length if kept_rows is None else kept_rows.unbind()
        y_rows = torch.empty_like(u_rows)
        inputs = list(zip(u_rows.unbind(), dt_rows.unbind(), B_rows.unbind(), keeps))
        decay = u.new_empty(u_rows.shape[1], n, d)

        if enter.shape[1] > 1:
            own = torch.zeros_like(decay)
            for u_row, dt_row, B_row, kept in inputs:
                own.mul_(_scan_decay(dt_row, A, kept, out=decay)).addcmul_(u_row, B_row)
            across = _scan_decay(dt_rows.sum(0), A, None if kept_rows is None else kept_rows.prod(0))
            own, across = (tensor.unflatten(0, (b, -1)) for tensor in (own, across))
            for chunk in range(1, enter.shape[1]):
                enter[:, chunk] = torch.addcmul(own[:, chunk - 1], across[:, chunk - 1], enter[:, chunk - 1])
        h = enter.flatten(0, 1).clone(memory_format=torch.contiguous_format)
        for (u_row, dt_row, B_row, kept), C_row, y_row in zip(inputs, C_rows.unbind(), y_rows.unbind()):
            h.mul_(_scan_decay(dt_row, A, kept, out=decay)).addcmul_(u_row, B_row)
            torch.bmm(C_row, h, out=y_row)  # the sum over states: (m, 1, n) @ (m, n, d)
        y[:, block] = _unrows(y_rows.squeeze(2), b)
        state = h.unflatten(0, (b, -1))[:, -1].contiguous()
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
    grads = [tensor.new_empty(tensor.shape) for tensor in (u, dt, B, C)]
    workspace = u.new_empty(2, length, b * min(side, chunks) * n * d)
    for block in (slice(first, first + side) for first in reversed(range(0, chunks, side))):
        enter = incoming[:, block].contiguous()
        u_rows, dt_rows, y_rows = (_rows(tensor, block).unsqueeze(2) for tensor in (u, dt, grad_y))
        B_rows, C_rows = (_rows(tensor, block).unsqueeze(3) for tensor in (B, C))
        kept_rows = None if keep is None else _rows(keep, block)[..., None, None]
        sums = [torch.empty_like(rows) for rows in (u_rows, dt_rows, B_rows, C_rows)]  # of the block's gradients
        u_sums, dt_sums, B_sums, C_sums = (rows.unbind() for rows in sums)
        states, decays = (rows.unflatten(-1, (-1, n, d)) for rows in workspace[..., : enter.numel()])
        states, decays = states.unbind(), _scan_decay(dt_rows, A, kept_rows, out=decays).unbind()
        previous = [enter.flatten(0, 1), *states[:-1]]
        inputs = list(zip(u_rows.unbind(), dt_rows.unbind(), B_rows.unbind(), C_rows.unbind(), y_rows.unbind()))
        for (u_row, _, B_row, _, y_row), h, before, decay, C_sum in zip(inputs, states, previous, decays, C_sums):
            torch.mul(before, decay, out=h).addcmul_(u_row, B_row)
            torch.bmm(h, y_row.mT, out=C_sum)  # the sum over the width: (m, n, d) @ (m, d, 1)

        leave = torch.empty_like(enter)  # the adjoints of the chunks' final states
        leave[:, -1] = grad_state
        if enter.shape[1] > 1:
            g = torch.zeros_like(states[0])
            for (_, _, _, C_row, y_row), decay in zip(reversed(inputs), reversed(decays)):
                g.addcmul_(y_row, C_row).mul_(decay)
            across = _scan_decay(dt_rows.sum(0), A, None if kept_rows is None else kept_rows.prod(0))
            g, across = (tensor.unflatten(0, (b, -1)) for tensor in (g, across))
            for chunk in reversed(range(enter.shape[1] - 1)):
                leave[:, chunk] = torch.addcmul(g[:, chunk + 1], across[:, chunk + 1], leave[:, chunk + 1])

        g = leave.flatten(0, 1)
        r, sum_A = torch.empty_like(g), torch.zeros_like(g)
        for (u_row, dt_row, B_row, C_row, y_row), before, decay, u_sum, dt_sum, B_sum in zip(
            *map(reversed, (inputs, previous, decays, u_sums, dt_sums, B_sums))
        ):
            g.addcmul_(y_row, C_row)
            torch.bmm(B_row.mT, g, out=u_sum)
            torch.bmm(g, u_row.mT, out=B_sum)
            torch.mul(g.mul_(decay), before, out=r)
            sum_A.addcmul_(r, dt_row)
            torch.sum(r.mul_(A), 1, keepdim=True, out=dt_sum)
        grad_A += sum_A.sum(0)
        grad_state = g.unflatten(0, (b, -1))[:, 0].contiguous()
        for grad, rows in zip(grads, sums):
            grad[:, block] = _unrows(rows.flatten(2), b)
    grad_u, grad_dt, grad_B, grad_C = (grad.flatten(1, 2)[:, :t].contiguous() for grad in grads)
    return grad_u, grad_dt, grad_A, grad_B, grad_C, grad_state


@chunked_scan_backward.register_fake
def _(grad_y, grad_state, u, dt, A, B, C, incoming, keep):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (u, dt, A, B, C, grad_state))


def _save_scan(ctx, inputs, output) -> None:
    u, dt, A, B, C, _, keep = inputs
    ctx.save_for_backward(u, dt, A, B, C, output[2], keep)


def _differentiate_scan(ctx, grad_y, grad_state, _):
    return *chunked_scan_backward(grad_y, grad_state, *ctx.saved_tensors), None


chunked_scan.register_autograd(_differentiate_scan, setup_context=_save_scan)
