"""The attention bridge: its shapes, its loss against the paper's formula, and that it learns."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from reference import naive_error
from tiny_distillation import make_arguments, tiny_student, tiny_teacher

from cab_hf import Teacher
from cab_hf.distillation import bridge as bridge_module
from cab_hf.distillation.bridge import ROLES, AttentionBridge, BridgePair, bridge_targets
from cab_hf.distillation.modeling_distillation import DistillationModel, DistillationOutput
from cab_hf.distillation.training_args import LOSSES
from cab_hf.models import mixers


class Attention(NamedTuple):
    query: torch.Tensor
    key: torch.Tensor


def make_attention(batch=2, heads=4, key_heads=2, tokens=5, head_dim=3, dtype=torch.float32) -> Attention:
    return Attention(
        torch.randn(batch, heads, tokens, head_dim, dtype=dtype),
        torch.randn(batch, key_heads, tokens, head_dim, dtype=dtype),
    )


@pytest.mark.parametrize("kind", ["none", "relu"])
def test_targets_put_heads_side_by_side(kind):
    torch.manual_seed(0)
    attention = make_attention()
    attention.query.requires_grad_()
    targets = {role: target.flatten(2) for role, target in bridge_targets(attention, kind).items()}
    query, key = targets["query"], targets["key"]
    assert query.shape == (2, 5, 12) and key.shape == (2, 5, 6) and not query.requires_grad
    of = torch.relu if kind == "relu" else torch.clone
    for b, t, h, p in [(0, 0, 0, 0), (1, 4, 3, 2), (0, 3, 2, 1)]:
        assert query[b, t, h * 3 + p] == of(attention.query[b, h, t, p])
    assert key[1, 2, 1 * 3 + 2] == of(attention.key[1, 1, 2, 2])


def test_layers_may_have_different_sizes():
    bridge = AttentionBridge([6, 10], key_sizes=[4, 8], query_sizes=[8, 12], hidden_size=7)
    assert bridge(0, "key", torch.randn(2, 3, 6)).shape == (2, 3, 4)
    assert bridge(1, "key", torch.randn(2, 3, 2, 5)).shape == (2, 3, 8)  # (b, t, g, n)
    assert bridge(1, "query", torch.randn(2, 3, 10)).shape == (2, 3, 12)
    grouped = torch.randn(2, 3, 2, 5)
    torch.testing.assert_close(bridge(1, "key", grouped), bridge(1, "key", grouped.reshape(2, 3, 10)))


def test_every_layer_role_and_direction_has_its_own_mlp():
    torch.manual_seed(0)
    bridge = AttentionBridge([6, 6], [4, 4], [4, 4], hidden_size=5, num_directions=2)
    x = torch.randn(1, 2, 6)
    outputs = [bridge(layer, role, x, direction) for layer in (0, 1) for role in ROLES for direction in (0, 1)]
    for i, first in enumerate(outputs):
        for second in outputs[:i]:
            assert not torch.allclose(first, second)
    assert sum(p.numel() for p in bridge.parameters()) == 8 * (6 * 5 + 5 + 5 * 4 + 4)


def test_shared_roles_share_what_fits():
    one = AttentionBridge([6], [4], [4], hidden_size=5, shared_roles=True)
    x = torch.randn(1, 2, 6)
    assert torch.equal(one(0, "key", x), one(0, "query", x))
    assert sum(p.numel() for p in one.parameters()) == 6 * 5 + 5 + 5 * 4 + 4

    grouped = AttentionBridge([6], [4], [8], hidden_size=5, shared_roles=True)
    assert grouped(0, "key", x).shape[-1] == 4 and grouped(0, "query", x).shape[-1] == 8
    assert sum(p.numel() for p in grouped.parameters()) == 6 * 5 + 5 + (5 * 4 + 4) + (5 * 8 + 8)


@pytest.mark.parametrize(("query_size", "shared_roles"), [(4, False), (4, True), (8, True)])
def test_a_centered_bridge_starts_at_the_means(query_size, shared_roles):
    torch.manual_seed(0)
    bridge = AttentionBridge([6, 6], [4, 4], [query_size] * 2, 5, shared_roles, num_directions=2)
    sizes = {"key": 4, "query": query_size}
    means = {(layer, role): torch.randn(sizes[role]) for layer in (0, 1) for role in ROLES}
    bridge.center(means)
    for linear in (linear for layer in bridge.layers for mlps in layer for linear in mlps.down.values()):
        linear.weight.data.zero_()
    for (layer, role), mean in means.items():
        expected = (means[layer, "key"] + means[layer, "query"]) / 2 if shared_roles and query_size == 4 else mean
        for direction in (0, 1):
            assert torch.equal(bridge(layer, role, torch.randn(2, 3, 6), direction), expected.expand(2, 3, -1))


def test_state_dict_round_trips():
    torch.manual_seed(0)
    arguments = {
        "input_sizes": [6, 8],
        "key_sizes": [4, 4],
        "query_sizes": [8, 8],
        "hidden_size": 5,
        "num_directions": 2,
    }
    first, second = AttentionBridge(**arguments), AttentionBridge(**arguments)
    second.load_state_dict(first.state_dict(), strict=True)
    x = torch.randn(1, 3, 8)
    assert torch.equal(first(1, "query", x, 1), second(1, "query", x, 1))
    assert "layers.1.0.up.key.weight" in first.state_dict()


def paper_loss(bridge: AttentionBridge, Bs, Cs, attentions) -> torch.Tensor:
    """mean over layers of MSE(MLP(B), K) + MSE(MLP(C), Q), from the weights up."""
    layers = []
    for layer, (B, C, attention) in enumerate(zip(Bs, Cs, attentions)):
        total = 0.0
        for role, projection, states in (("key", B, attention.key), ("query", C, attention.query)):
            mlp = bridge.layers[layer][0]
            x = projection.flatten(2) @ mlp.up[role].weight.T + mlp.up[role].bias
            x = x / (1 + torch.exp(-x))
            prediction = x @ mlp.down[role].weight.T + mlp.down[role].bias
            target = torch.cat([states[:, h] for h in range(states.shape[1])], dim=-1)
            total = total + ((prediction - target) ** 2).mean()
        layers.append(total)
    return torch.stack(layers).mean()


def our_loss(bridge: AttentionBridge, Bs, Cs, attentions) -> torch.Tensor:
    pairs = []
    for layer, (B, C, attention) in enumerate(zip(Bs, Cs, attentions)):
        targets = bridge_targets(attention)
        pairs += [BridgePair(layer, "key", [B], targets["key"]), BridgePair(layer, "query", [C], targets["query"])]
    return bridge.loss(pairs) / (len(Bs) * Bs[0].shape[0] * Bs[0].shape[1])


def make_problem(layers=3, dtype=torch.float32):
    torch.manual_seed(0)
    bridge = AttentionBridge([8] * layers, [6] * layers, [12] * layers, hidden_size=16).to(dtype)
    Bs, Cs = ([torch.randn(2, 5, 2, 4, dtype=dtype, requires_grad=True) for _ in range(layers)] for _ in range(2))
    return bridge, Bs, Cs, [make_attention(dtype=dtype) for _ in range(layers)]


def test_heads_may_stand_apart():
    """Targets as attention has them, `(b, h, t, p)` seen as `(b, t, h, p)`, are read where they are and stay."""
    torch.manual_seed(0)
    bridge = AttentionBridge([8, 8], [12, 12], [12, 12])
    keys = [torch.randn(2, heads, 5, 12 // heads) for heads in (2, 3)]
    shown = [torch.randn(2, 5, 8)]
    apart = [BridgePair(layer, "key", shown, key.transpose(1, 2)) for layer, key in enumerate(keys)]
    flat = [pair._replace(target=pair.target.flatten(2)) for pair in apart]
    before = [pair.target.clone() for pair in (*apart, *flat)]
    torch.testing.assert_close(bridge.loss(apart), bridge.loss(flat))
    assert all(torch.equal(pair.target, old) for pair, old in zip((*apart, *flat), before))


def test_loss_is_the_papers():
    problem = make_problem(dtype=torch.float64)
    ours, paper = our_loss(*problem), paper_loss(*problem)
    torch.testing.assert_close(ours, paper, rtol=1e-12, atol=0)
    inputs = [*problem[0].parameters(), *problem[1], *problem[2]]
    for mine, theirs in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(paper, inputs)):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("shared_roles", [False, True])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("scaled_layers", [set(), {0, 1, 2, 3}, {1, 3}], ids=str)
@pytest.mark.parametrize("together", [1, 100, 2**23])
def test_loss_of_unlike_layers_masks_and_scales_equals_naive(
    shared_roles, directions, scaled_layers, together, monkeypatch
):
    monkeypatch.setattr(bridge_module, "PREDICTED_TOGETHER", together)
    torch.manual_seed(0)
    keys, queries, inputs = [6, 6, 6, 4], [6, 12, 12, 4], [8, 8, 8, 4]
    bridge = AttentionBridge(inputs, keys, queries, 5, shared_roles, directions).double()
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    pairs = []
    for layer, (n, *sizes) in enumerate(zip(inputs, keys, queries)):
        for role, size in zip(ROLES, sizes):
            shown = [torch.randn(2, 4, 2, n // 2, dtype=torch.float64, requires_grad=True) for _ in range(directions)]
            target = torch.randn(2, 4, size, dtype=torch.float64).masked_fill(mask[..., None] == 0, torch.nan)
            scale = torch.rand((), dtype=torch.float64) + 0.5 if layer in scaled_layers else None
            pairs.append(BridgePair(layer, role, shown, target, scale))
    ours, naive = bridge.loss(pairs, mask), naive_error(bridge, pairs, mask)
    torch.testing.assert_close(ours, naive, rtol=1e-12, atol=0)
    wanted = [*bridge.parameters(), *(x for pair in pairs for x in pair.projections)]
    # An upstream factor, as a loss weight is one.
    for mine, theirs in zip(torch.autograd.grad(3 * ours, wanted), torch.autograd.grad(3 * naive, wanted)):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(bridge.loss(pairs, mask), ours, rtol=1e-12, atol=0)


PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm", "baddbmm_")}


def count_products(run: Callable[[], object]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return sum(event.name in PRODUCTS for event in profile.events())


@pytest.mark.parametrize("layers", [1, 24])
def test_mlps_of_equal_sizes_are_one_product(layers):
    torch.manual_seed(0)
    bridge = AttentionBridge([8] * layers, [6] * layers, [6] * layers, num_directions=2)
    shown = [torch.randn(2, 5, 8, requires_grad=True) for _ in range(2)]
    pairs = [BridgePair(layer, role, shown, torch.randn(2, 5, 6)) for layer in range(layers) for role in ROLES]
    assert count_products(lambda: bridge.loss(pairs).backward()) == 6  # two forward, four backward
    with torch.no_grad():
        assert count_products(lambda: bridge.loss(pairs)) == 2


@pytest.mark.parametrize(("width", "kept"), [(6, 6), (64, 8)])
def test_of_each_token_the_narrower_gradient_is_kept(width, kept):
    """In a language model's layer B is wider than the bridge's hidden layer."""
    layers, tokens, features, hidden = 3, 1000, 32, 8
    bridge = AttentionBridge([width] * layers, [features] * layers, [features] * layers, hidden)
    shown = [torch.randn(1, tokens, width, requires_grad=True)]
    pairs = [
        BridgePair(layer, role, shown, torch.randn(1, tokens, features)) for layer in range(layers) for role in ROLES
    ]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        bridge.loss(pairs)
    of_weights = 2 * sum(parameter.numel() for parameter in bridge.parameters())
    assert 2 * layers * tokens * kept <= sum(saved) <= 2 * layers * tokens * kept + of_weights


def test_loss_under_autocast_is_near_float32_and_summed_in_float32():
    bridge, Bs, Cs, attentions = make_problem(layers=2)
    truth = our_loss(bridge, Bs, Cs, attentions)
    wanted = [*bridge.parameters(), *Bs, *Cs]
    expected = torch.autograd.grad(truth, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        loss = our_loss(bridge, Bs, Cs, attentions)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, truth, rtol=0.02, atol=0)
    for mine, theirs in zip(torch.autograd.grad(loss, wanted), expected):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() < 0.03 * theirs.norm()


@pytest.mark.parametrize("compiled", [False, True])
def test_constants_of_a_target_are_not_rounded(compiled):
    """Most of a teacher's key may be one constant vector; 16 bits of the sum would leave few for what varies."""
    torch.manual_seed(0)
    bridge = AttentionBridge([8, 8], [6, 6], [6, 6], hidden_size=16)
    constant = 100 * torch.randn(2, 6)
    bridge.center({(layer, role): constant[ROLES.index(role)] for layer in range(2) for role in ROLES})
    shown = [[torch.randn(2, 5, 8, requires_grad=True)] for _ in range(4)]
    pairs = [
        BridgePair(layer, role, shown[2 * layer + row], constant[row] + torch.randn(2, 5, 6))
        for layer in range(2)
        for row, role in enumerate(ROLES)
    ]
    wanted = [*bridge.parameters(), *(one for (one,) in shown)]
    exact = bridge.loss(pairs)
    expected = torch.autograd.grad(exact, wanted)
    loss_of = torch.compile(bridge.loss, backend="aot_eager") if compiled else bridge.loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(pairs)
    torch.testing.assert_close(loss, exact, rtol=0.01, atol=0)
    for mine, theirs in zip(torch.autograd.grad(loss, wanted), expected):
        assert (mine - theirs).norm() < 0.03 * theirs.norm()


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("is_trained", [True, False])
def test_compiles_to_one_graph(directions, layers, is_trained):
    torch.manual_seed(0)
    torch._dynamo.reset()
    bridge = AttentionBridge([8] * layers, [6] * layers, [12] * layers, num_directions=directions)
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    pairs = [
        BridgePair(layer, role, [torch.randn(2, 4, 8) for _ in range(directions)], torch.randn(2, 4, size))
        for layer in range(layers)
        for role, size in zip(ROLES, (6, 12))
    ]
    compiled = torch.compile(bridge.loss, backend="eager", fullgraph=True)
    with torch.set_grad_enabled(is_trained):
        torch.testing.assert_close(compiled(pairs, mask), bridge.loss(pairs, mask))


def test_no_tokens_are_no_error():
    bridge = AttentionBridge([8], [6], [12])
    shown = torch.zeros(0, 5, 8, requires_grad=True)
    loss = bridge.loss([BridgePair(0, role, [shown], torch.zeros(0, 5, 6 if role == "key" else 12)) for role in ROLES])
    loss.backward()
    assert loss == 0.0 and all(not parameter.grad.any() for parameter in bridge.parameters())


def test_a_bridge_may_be_more_precise_than_its_targets():
    bridge, Bs, Cs, attentions = make_problem(dtype=torch.float64)
    rounded = [Attention(*(states.float() for states in attention)) for attention in attentions]
    expected = our_loss(bridge, Bs, Cs, [Attention(*(states.double() for states in one)) for one in rounded])
    loss = our_loss(bridge, Bs, Cs, rounded)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_a_target_of_another_shape_is_an_error():
    bridge = AttentionBridge([8], [6], [12])
    shown = [torch.zeros(2, 5, 8)]
    with pytest.raises(ValueError, match=r"keys' target of layer 0 is \(2, 5, 7\).*predicts \(2, 5, 6\)"):
        bridge.loss([BridgePair(0, "key", shown, torch.zeros(2, 5, 7))])


def test_bridge_learns():
    bridge, Bs, Cs, attentions = make_problem(layers=2)
    before = {name: weight.clone() for name, weight in bridge.named_parameters()}
    optimizer = torch.optim.Adam(bridge.parameters(), lr=1e-2)
    losses = []
    for _ in range(100):
        loss = our_loss(bridge, Bs, Cs, attentions)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for name, weight in bridge.named_parameters():
        assert not torch.equal(weight, before[name]), name
    for projection in (*Bs, *Cs):
        assert projection.grad.abs().min() > 0


def test_compiles_once_for_all_layers_where_kernels_break_the_graph(tmp_path, monkeypatch):
    # Where a scan's kernel is outside the graph, each layer is compiled alone; its number must be no constant.
    monkeypatch.setattr(mixers, "ssd_scan", torch.compiler.disable(mixers.ssd_scan))
    model, keywords = make_step(tmp_path)
    expected = model(**keywords).parts
    torch._dynamo.reset()
    # transformers 5.24 wraps the __init__ of all outputs in one code object, which is compiled once for each class.
    torch._dynamo.eval_frame.skip_code(DistillationOutput.__init__.__code__)
    with torch._dynamo.config.patch(error_on_recompile=True):
        parts = torch.compile(model, backend="eager")(**keywords).parts
    torch.testing.assert_close(parts, expected)
    assert parts[2] > 0 and parts[3] > 0


@pytest.mark.filterwarnings("default::FutureWarning")  # peft's own
@pytest.mark.parametrize("adapted", [False, True])
def test_a_whole_step_is_one_graph(tmp_path, adapted):
    model, keywords = make_step(tmp_path, attention_weight=1.0, hidden_weight=1.0)
    if adapted:
        peft, core = pytest.importorskip("peft"), model.core
        model.student = peft.get_peft_model(core, peft.LoraConfig(target_modules=["in_proj"]))
        assert model.core is core
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)(**keywords)
    torch.testing.assert_close(compiled.parts, model(**keywords).parts)
    assert (compiled.parts[[0, 2, 3, 4, 5]] > 0).all()


def make_step(tmp_path, **weights: float) -> tuple[DistillationModel, dict]:
    """A model of three layers, and what its forward pass takes."""
    teacher = Teacher(tiny_teacher(num_hidden_layers=3))
    weights = {"kl_weight": 1.0, "bridge_weight": 1.0, "output_weight": 1.0} | weights
    args = make_arguments(tmp_path, **weights)
    model = DistillationModel(tiny_student(num_hidden_layers=3), teacher, args)
    inputs = {"input_ids": torch.arange(12).view(2, 6)}
    active = frozenset(name.removesuffix("_weight") for name in weights)
    return model, {
        "targets": teacher(inputs, attentions=True, maps="attention" in active, hidden_states="hidden" in active),
        "teacher_head": teacher.head,
        "weights": torch.tensor([float(name in active) for name in LOSSES]),
        "active": active,
        "num_tokens": torch.tensor(12),
        "num_labels": torch.tensor(0),
        **inputs,
    }
