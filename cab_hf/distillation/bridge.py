"""The attention bridge: small MLPs that predict a teacher's keys and queries from a student's B and C.

Shape legend: `b` batch, `t` token, `h` head, `p` head_dim, `n` state, `g` group.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import nn


Role = Literal["key", "query"]
ROLES: tuple[Role, Role] = ("key", "query")


class AttentionBridge(nn.Module):
    """One two-layer MLP for each student layer, role and direction; trained with the student, shipped without it.

    The role `"key"` predicts the teacher's K from the student's B, the role `"query"` its Q from C: both write and
    read the same kind of memory, `h_t = A_t h_{t-1} + B_t x_t, y_t = C_t h_t` against `h_t = h_{t-1} + k_t v_t,
    y_t = q_t h_t`. A bidirectional student has one bridge a direction, whose projections and targets both run in
    that direction's token order.

    Args:
        input_sizes: `g * n` of each student layer, the width of its B and of its C.
        key_sizes: `h_kv * p` of the teacher layer that each student layer learns from.
        query_sizes: `h * p` of that teacher layer.
        hidden_size: width between the two linear layers.
        shared_roles: one MLP serves both roles of a layer and direction (a row of table 3). Where keys and queries
            differ in width, as with grouped-query attention, only the first linear layer is shared.
        num_directions: 1 for a causal student, 2 for a bidirectional one.

    Raises:
        ValueError: lists of different lengths, no layer at all, or a size below 1.

    Source: arXiv 2510.19266, section "Method" and table 3.
    """

    def __init__(
        self,
        input_sizes: Sequence[int],
        key_sizes: Sequence[int],
        query_sizes: Sequence[int],
        hidden_size: int = 128,
        shared_roles: bool = False,
        num_directions: int = 1,
    ):
        super().__init__()
        if not len(input_sizes) == len(key_sizes) == len(query_sizes):
            raise ValueError(
                f"input_sizes names {len(input_sizes)} layers, key_sizes {len(key_sizes)} and query_sizes "
                f"{len(query_sizes)}: give each list one size for each student layer."
            )
        if len(input_sizes) == 0:
            raise ValueError("input_sizes is empty: a bridge needs the width of at least one student layer.")
        smallest = min(*input_sizes, *key_sizes, *query_sizes, hidden_size, num_directions)
        if smallest < 1:
            raise ValueError(f"a size of the bridge is {smallest}: all sizes and num_directions are at least 1.")
        self.num_directions = num_directions
        self.layers = nn.ModuleList(
            nn.ModuleList(
                _RoleMLPs(input_size, key_size, query_size, hidden_size, shared_roles) for _ in range(num_directions)
            )
            for input_size, key_size, query_size in zip(input_sizes, key_sizes, query_sizes, strict=True)
        )

    def forward(self, layer: int, role: Role, projection: torch.Tensor, direction: int = 0) -> torch.Tensor:
        """What the student's projection says about the teacher's.

        Args:
            layer: the student's layer, from 0.
            role: `"key"` for B, `"query"` for C.
            projection: `(b, t, g, n)` or `(b, t, g * n)`, that layer's B or C.
            direction: which direction of a bidirectional student.

        Returns:
            `(b, t, h_kv * p)` for keys, `(b, t, h * p)` for queries: all of the teacher's heads, flattened.

        Raises:
            ValueError: a layer, role or direction that the bridge lacks, or a projection of another width.
        """
        if not 0 <= layer < len(self.layers):
            raise ValueError(f"layer is {layer}, but the bridge was built for layers 0 to {len(self.layers) - 1}.")
        if not 0 <= direction < self.num_directions:
            raise ValueError(
                f"direction is {direction}, but the bridge was built with num_directions={self.num_directions}."
            )
        return self.layers[layer][direction](role, projection.flatten(2))


class _RoleMLPs(nn.Module):
    """Linear, SiLU, Linear for the two roles of one layer and direction."""

    def __init__(self, input_size: int, key_size: int, query_size: int, hidden_size: int, shared_roles: bool):
        super().__init__()
        self.input_size = input_size
        self.up_names = {role: "shared" if shared_roles else role for role in ROLES}
        one_output = shared_roles and key_size == query_size
        self.down_names = {role: "shared" if one_output else role for role in ROLES}
        sizes = {self.down_names["key"]: key_size, self.down_names["query"]: query_size}
        self.up = nn.ModuleDict(
            {name: nn.Linear(input_size, hidden_size) for name in dict.fromkeys(self.up_names.values())}
        )
        self.down = nn.ModuleDict({name: nn.Linear(hidden_size, size) for name, size in sizes.items()})

    def forward(self, role: Role, projection: torch.Tensor) -> torch.Tensor:
        if role not in self.up_names:
            raise ValueError(f"role is {role!r}: a bridge has the roles 'key' (for B) and 'query' (for C).")
        if projection.shape[-1] != self.input_size:
            raise ValueError(
                f"projection is {projection.shape[-1]} wide, but this layer's bridge was built for "
                f"{self.input_size}: pass B or C of the layer that input_sizes described."
            )
        hidden = nn.functional.silu(self.up[self.up_names[role]](projection))
        return self.down[self.down_names[role]](hidden)


class HasQueryKey(Protocol):
    """What a teacher's layer shows of its attention: query `(b, h, t, p)` and key `(b, h_kv, t, p)`."""

    query: torch.Tensor
    key: torch.Tensor


def bridge_targets(attention: HasQueryKey) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's query and key in the bridge's layout: heads side by side, detached.

    Args:
        attention: query `(b, h, t, p)`, key `(b, h_kv, t, p)`.

    Returns:
        query `(b, t, h * p)`, key `(b, t, h_kv * p)`.
    """
    query, key = (states.detach().transpose(1, 2).flatten(2) for states in (attention.query, attention.key))
    return query, key
