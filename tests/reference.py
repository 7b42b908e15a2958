"""Naive float64 truths for the tests, written as the equations read: one sequence at a time, token after token.

Shape legend: `b` batch, `t` token, `d` width, `k` convolution taps, `h` head, `p` head_dim, `g` group, `n` state.
"""

import torch
from torch import Tensor

from cab_hf.distillation.bridge import AttentionBridge, BridgePair


def naive_causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """x (b, t, d), weight (d, k), bias (d,), initial_states (b, d, k), seq_idx (b, t) -> (b, t, d) in float64."""
    b, t, d = x.shape
    k = weight.shape[1]
    rows = []
    for i in range(b):
        outputs = []
        for token in range(t):
            total = torch.zeros(d, dtype=torch.float64)
            for back in range(k):
                source = token - back
                if source >= 0:
                    between = seq_idx is None or bool((seq_idx[i, source : token + 1] == seq_idx[i, token]).all())
                    if between:
                        total = total + weight[:, k - 1 - back].double() * x[i, source].double()
                elif initial_states is not None:
                    total = total + weight[:, k - 1 - back].double() * initial_states[i, :, k + source].double()
            if bias is not None:
                total = total + bias.double()
            outputs.append(total * torch.sigmoid(total) if activation == "silu" else total)
        rows.append(torch.stack(outputs) if outputs else torch.zeros(0, d, dtype=torch.float64))
    return torch.stack(rows)


def naive_selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x, dt (b, t, d), A (d, n), B, C (b, t, n), D (d,) -> y (b, t, d), final state (b, d, n), both float64."""
    x, dt, A, B, C = (tensor.double() for tensor in (x, dt, A, B, C))
    b, t, d = x.shape
    outputs, states = [], []
    for i in range(b):
        h = torch.zeros(d, A.shape[1], dtype=torch.float64) if initial_state is None else initial_state[i].double()
        row = []
        for token in range(t):
            if seq_idx is not None and token > 0 and seq_idx[i, token] != seq_idx[i, token - 1]:
                h = torch.zeros_like(h)
            step = dt[i, token][:, None]
            h = torch.exp(step * A) * h + step * x[i, token][:, None] * B[i, token][None, :]
            y = h @ C[i, token]
            row.append(y if D is None else y + D.double() * x[i, token])
        outputs.append(torch.stack(row) if row else torch.zeros(0, d, dtype=torch.float64))
        states.append(h)
    return torch.stack(outputs), torch.stack(states)


def naive_ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x (b, t, h, p), dt (b, t, h), A, D (h,), B, C (b, t, g, n) -> y (b, t, h, p), state (b, h, p, n) in float64."""
    x, dt, A, B, C = (tensor.double() for tensor in (x, dt, A, B, C))
    b, t, h, p = x.shape
    g, n = B.shape[2:]
    outputs, states = [], []
    for i in range(b):
        head_outputs, head_states = [], []
        for head in range(h):
            group = head // (h // g)
            state = torch.zeros(p, n, dtype=torch.float64)
            if initial_state is not None:
                state = initial_state[i, head].double()
            row = []
            for token in range(t):
                if seq_idx is not None and token > 0 and seq_idx[i, token] != seq_idx[i, token - 1]:
                    state = torch.zeros_like(state)
                step = dt[i, token, head]
                entry = torch.outer(x[i, token, head], B[i, token, group])
                state = torch.exp(step * A[head]) * state + step * entry
                y = state @ C[i, token, group]
                row.append(y if D is None else y + D[head].double() * x[i, token, head])
            head_outputs.append(torch.stack(row) if row else torch.zeros(0, p, dtype=torch.float64))
            head_states.append(state)
        outputs.append(torch.stack(head_outputs, dim=1))
        states.append(torch.stack(head_states))
    return torch.stack(outputs), torch.stack(states)


def naive_error(bridge: AttentionBridge, pairs: list[BridgePair], mask: torch.Tensor) -> torch.Tensor:
    """One row at a time, by the forward pass; the backward scan reads the tokens in reverse."""
    total = 0.0
    for layer, role, projections, target, scale in pairs:
        batch, tokens, features = target.shape
        for direction, projection in enumerate(projections):
            predicted = bridge(layer, role, projection, direction)
            for b, t in mask.nonzero().tolist():
                error = predicted[b, tokens - 1 - t if direction else t] - target[b, t]
                total = total + error.square().sum() / features / (1.0 if scale is None else scale)
    return total
