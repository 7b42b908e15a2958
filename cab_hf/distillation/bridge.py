"""The attention bridge: small MLPs that predict a teacher's keys and queries from a student's B and C.

Shape legend: `b` batch, `t` token, `h` head, `p` head_dim, `n` state, `g` group; `m` MLPs, `r` rows, `k` hidden
width, `f` features.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from cab_hf.distillation.bridge_error import BridgeError, rounded, stacked
from cab_hf.distillation.losses import TargetMap, target_map


Role = Literal["key", "query"]
ROLES: tuple[Role, Role] = ("key", "query")
PREDICTED_TOGETHER = 2**23
"""Numbers that MLPs predict side by side: fewer would be many small kernels, more memory."""


class BridgePair(NamedTuple):
    """What one layer and role of the student shows, and what its bridge shall make of it.

    Attributes:
        layer, role: of the student.
        projections: B or C `(b, t, g, n)` of each direction, in the token order of that direction's scan.
        target: `(b, t, f)` or, with heads apart, `(b, t, h, p)`, in the forward order; receives no gradient.
        scale: 0-dim, what the squared error is divided by (the target's mean square); None for 1.
    """

    layer: int
    role: Role
    projections: Sequence[Tensor]
    target: Tensor
    scale: Tensor | None = None


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
        """
        return self.layers[layer][direction](role, projection.flatten(2))

    @torch.no_grad()
    def center(self, means: Mapping[tuple[int, Role], Tensor]) -> None:
        """Starts the output biases at the targets' means, so that the MLPs and the student learn what varies.

        Most of a pretrained teacher's keys is one constant vector: adding it to all keys of a softmax changes nothing,
        so training leaves it anywhere. Biases move by one learning rate a step; B and C would have to carry the rest.

        Args:
            means: of each (layer, role), `(f,)`: the mean over tokens. A bias that both roles share gets their mean.
        """
        for layer, directions in enumerate(self.layers):
            for mlps in directions:
                for name, linear in mlps.down.items():
                    roles = [role for role in ROLES if mlps.down_names[role] == name]
                    linear.bias.copy_(torch.stack([means[layer, role] for role in roles]).mean(0))

    def loss(self, pairs: Iterable[BridgePair], mask: Tensor | None = None) -> Tensor:
        """Squared error of the predictions: mean over features, summed over pairs, directions and real tokens.

        MLPs of equal sizes run as one product, and a training step has their gradients before it comes back, so that
        no prediction outlives this call.

        Args:
            pairs: what to predict, taken some at a time; all targets cover the same batch and tokens.
            mask: `(b, t)`, non-zero at real tokens; None if all are real. A masked token counts for nothing, whatever
                its target holds.

        Returns:
            0-dim float32 (float64 for a float64 bridge).

        Raises:
            ValueError: a target of another shape than the MLPs have.

        Source: arXiv 2510.19266, section "Method": the backward scan learns from reversed keys and queries, here in
            its projections' reversed order, which is the same sum; the relative form: LoLCATs, arXiv 2410.10254.
        """
        weights = self._weights_of_products()
        return sum((self._group_loss(group, mask, weights) for group in self._groups(pairs)), start=0.0)

    def _groups(self, pairs: Iterable[BridgePair]) -> Iterator[list[BridgePair]]:
        """Neighbouring pairs whose MLPs have equal sizes."""
        groups, predicted = {}, 0
        for pair in pairs:
            self._check(pair)
            width = pair.projections[0].shape[2:].numel()
            groups.setdefault((width, pair.target.shape[2:]), []).append(pair)
            predicted += pair.target.numel() * self.num_directions
            if predicted >= PREDICTED_TOGETHER:
                yield from groups.values()
                groups, predicted = {}, 0
        yield from groups.values()

    def _weights_of_products(self) -> dict[nn.Linear, Tensor]:
        """All weights in the dtype in which products run, detached."""
        linears = [linear for directions in self.layers for mlps in directions for linear in mlps.linears()]
        weights = [linear.weight.detach() for linear in linears]
        device = weights[0].device.type
        if torch.is_autocast_enabled(device) and weights[0].dtype != torch.get_autocast_dtype(device):
            weights = rounded(weights, torch.get_autocast_dtype(device))
        return dict(zip(linears, weights))

    def _check(self, pair: BridgePair) -> None:
        tokens = pair.projections[0].shape[:2]
        mlps = self.layers[pair.layer][0]
        expected = (*tokens, mlps.down[mlps.down_names[pair.role]].out_features)
        shape = (*pair.target.shape[:2], pair.target.shape[2:].numel())
        if shape != expected:
            raise ValueError(
                f"the {pair.role}s' target of layer {pair.layer} is {shape}, but its bridge predicts "
                f"{tuple(expected)}: pass the teacher layer that the bridge was built for, and the same tokens."
            )

    def _group_loss(self, pairs: list[BridgePair], mask: Tensor | None, weights: dict[nn.Linear, Tensor]) -> Tensor:
        shown, ups, downs = [], [], []
        for direction in range(self.num_directions):
            for pair in pairs:
                x = pair.projections[direction].flatten(2)  # (b, t, n)
                shown.append(x.flip(1) if direction else x)
                mlps = self.layers[pair.layer][direction]
                ups.append(mlps.up[mlps.up_names[pair.role]])
                downs.append(mlps.down[mlps.down_names[pair.role]])
        scales = [pair.scale for pair in pairs if pair.scale is not None]
        if 0 < len(scales) < len(pairs):
            scales = [torch.ones_like(scales[0]) if pair.scale is None else pair.scale for pair in pairs]
        return BridgeError.apply(
            stacked(shown).flatten(1, 2),  # (directions * m, r, n)
            stacked([weights[linear] for linear in ups]),
            stacked([weights[linear] for linear in downs]),
            None if mask is None else (mask != 0).flatten(),
            torch.is_grad_enabled(),
            scales,
            [pair.target for pair in pairs],
            *(getattr(linear, name) for linears in (ups, downs) for name in ("weight", "bias") for linear in linears),
        )


class _RoleMLPs(nn.Module):
    """Linear, SiLU, Linear for the two roles of one layer and direction."""

    def __init__(self, input_size: int, key_size: int, query_size: int, hidden_size: int, shared_roles: bool):
        super().__init__()
        self.up_names = {role: "shared" if shared_roles else role for role in ROLES}
        one_output = shared_roles and key_size == query_size
        self.down_names = {role: "shared" if one_output else role for role in ROLES}
        sizes = {self.down_names["key"]: key_size, self.down_names["query"]: query_size}
        self.up = nn.ModuleDict(
            {name: nn.Linear(input_size, hidden_size) for name in dict.fromkeys(self.up_names.values())}
        )
        self.down = nn.ModuleDict({name: nn.Linear(hidden_size, size) for name, size in sizes.items()})

    def linears(self) -> list[nn.Linear]:
        return [*self.up.values(), *self.down.values()]

    def forward(self, role: Role, projection: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.silu(self.up[self.up_names[role]](projection))
        return self.down[self.down_names[role]](hidden)


class HasQueryKey(Protocol):
    """What a teacher's layer shows of its attention: query `(b, h, t, p)` and key `(b, h_kv, t, p)`."""

    query: torch.Tensor
    key: torch.Tensor


def bridge_targets(attention: HasQueryKey, kind: TargetMap = "none", mask: Tensor | None = None) -> dict[Role, Tensor]:
    """What a layer's bridge shall predict, detached.

    Args:
        attention: query `(b, h, t, p)`, key `(b, h_kv, t, p)`.
        kind: a map over them, [`target_map`].
        mask: `(b, t)`, non-zero at real tokens.

    Returns:
        of each role `(b, t, h * p)`; of the map `"none"` a view `(b, t, h, p)`, which the bridge reads where it is.
    """
    views = {role: getattr(attention, role).detach().transpose(1, 2) for role in ROLES}
    if kind == "none":
        return views
    return {role: target_map(view.flatten(2), kind, role, mask) for role, view in views.items()}
