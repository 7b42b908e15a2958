"""States that turn: pairs of a state rotate by a fixed angle a token, as rotary positions turn queries and keys.

A state that decays and turns, `S_t = a_t S_{t-1} R + x_t B_t^T` read by `C_t`, gives `C_i^T R^(i-j) B_j`, what rotary
positions give of query and key. In whole rows B and C are rotated by their place instead, which is the same; a cached
state is turned to its last token, so that nothing has to count.

Shape legend: `b` batch, `t` token, `h` head, `p` head_dim, `g` group, `n` state.

Source: rotary position embedding, arXiv 2104.09864; complex states as in S4D, arXiv 2206.11893.
"""

import torch
from torch import Tensor


def rotate(x: Tensor, angles: Tensor, interleaved: bool = False) -> Tensor:
    """Turns pairs of the last dimension.

    Args:
        x: `(..., n)`.
        angles: radians, `(..., r)` with 2 r <= n, float32; broadcast against `x`. Features behind the first 2 r stay.
        interleaved: pairs are features 2 i and 2 i + 1, in place of i and i + r.

    Returns:
        `(..., n)` in the dtype of `x`.

    Example:
        >>> rotate(torch.tensor([1.0, 0.0]), torch.tensor([torch.pi / 2])).round()
        tensor([-0., 1.])
    """
    dtype, turning = torch.promote_types(x.dtype, torch.float32), 2 * angles.shape[-1]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    if interleaved:
        first, second = x[..., 0:turning:2].to(dtype), x[..., 1:turning:2].to(dtype)
    else:
        first, second = x[..., : turning // 2].to(dtype), x[..., turning // 2 : turning].to(dtype)
    pair = (first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return turned if turning == x.shape[-1] else torch.cat((turned, x[..., turning:]), dim=-1)


def places(tokens: int, attention_mask: Tensor | None, device: torch.device) -> Tensor:
    """How many real tokens a row has up to each, `(t,)` or with a mask `(b, t)`, float32."""
    if attention_mask is None:
        return torch.arange(1, tokens + 1, device=device, dtype=torch.float32)
    return (attention_mask != 0).cumsum(-1).float()
