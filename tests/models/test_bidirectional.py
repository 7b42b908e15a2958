"""Bidirectional mixers: against float64 loops that walk the tokens in both directions, and what symmetry demands."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import MIXER_TYPES, largest_difference, shake, tiny_vision_config

from cab_hf.models.mixers import (
    BIDIRECTIONAL_MIXERS,
    MIXERS,
    BidirectionalProjections,
    BidirectionalS6Mixer,
    BidirectionalSSDMixer,
    S6Branch,
    SSMProjections,
)
from cab_hf.models.modeling_cab_vision_mamba import CABVisionMambaModel


KINDS = [("mamba", 1), ("mamba2", 1), ("mamba2", 2)]
SETTINGS = {
    "default": {},
    "1 tap, biases": {"conv_kernel": 1, "use_bias": True},
    "2 taps, linear": {"conv_kernel": 2, "conv_activation": None},
    "3 taps, no bias, limit": {"conv_kernel": 3, "use_conv_bias": False, "time_step_limit": (0.4, 0.9)},
}
SEQ_IDX = torch.tensor([[0, 0, 0, 1, 1, 0, 0], [4, 4, 4, 4, 4, 4, 3]])


def shaken_mixer(mixer_type: str, groups: int = 1, **overrides) -> BidirectionalS6Mixer | BidirectionalSSDMixer:
    config = tiny_vision_config(
        mixer_type=mixer_type, **{"n_groups": groups, "num_hidden_layers": 1, "state_size": 3, **overrides}
    )
    torch.manual_seed(0)
    return shake(CABVisionMambaModel(config)).layers[0].mixer


def inputs(batch: int = 2, tokens: int = 7, width: int = 16, seed: int = 3) -> torch.Tensor:
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(seed))


class NaiveBranch:
    """One direction of a mixer in float64, a token after the other. Every result is in token order.

    Tokens are never reversed: `order` names them as they are read, and a document ends where its index changes.
    """

    def __init__(self, mixer, branch, stream, order, seq_idx):
        config, self.weights = mixer.config, weights_of(branch)
        batch, tokens, width = *stream.shape[:2], config.mixer_width
        starts = torch.ones(batch, tokens, dtype=torch.bool)  # by place in the order
        if seq_idx is not None and tokens > 1:
            read = seq_idx[:, order]
            starts[:, 1:] = read[:, 1:] != read[:, :-1]
        elif tokens > 1:
            starts[:, 1:] = False
        self.A, self.D = -torch.exp(self.weights["A_log"]), self.weights["D"]
        if isinstance(branch, S6Branch):
            x = self.convolve(stream, order, starts, config)
            rank, n = config.time_step_rank, config.state_size
            low_rank, B, C = (x @ self.weights["x_proj.weight"].T).split([rank, n, n], dim=-1)
            raw = low_rank @ self.weights["dt_proj.weight"].T + self.weights["dt_proj.bias"]
            dt = torch.log1p(torch.exp(raw))  # (b, t, d)
            self.B, self.C, self.dt, self.x = B[:, :, None], C[:, :, None], dt, x
            A = self.A  # (d, n)
            Bs = B[:, :, None].expand(-1, -1, width, -1)
            Cs = C[:, :, None].expand(-1, -1, width, -1)
            steps, D = dt, self.D
        else:
            states = config.n_groups * config.state_size
            xBC, raw = stream[..., : width + 2 * states], stream[..., width + 2 * states :]
            x, B, C = self.convolve(xBC, order, starts, config).split([width, states, states], dim=-1)
            dt = torch.log1p(torch.exp(raw + self.weights["dt_bias"])).clamp(*config.time_step_limit)
            groups = (config.n_groups, config.state_size)
            self.B, self.C, self.dt, self.x = B.unflatten(-1, groups), C.unflatten(-1, groups), dt, x
            head = torch.arange(width) // config.head_dim
            group = head // (config.num_heads // config.n_groups)
            A, Bs, Cs = self.A[head][:, None], self.B[:, :, group], self.C[:, :, group]
            steps, D = dt[..., head], self.D[head]
        h = torch.zeros(batch, width, config.state_size, dtype=torch.float64)
        outputs: list = [None] * tokens
        for place, token in enumerate(order):
            h = torch.where(starts[:, place, None, None], 0.0, h)
            step = steps[:, token, :, None]  # (b, d, 1)
            h = torch.exp(step * A) * h + step * Bs[:, token] * x[:, token, :, None]
            outputs[token] = (Cs[:, token] * h).sum(-1) + D * x[:, token]
        self.y = torch.stack(outputs, dim=1)  # (b, t, d)

    def convolve(self, stream, order, starts, config):
        taps, bias = self.weights["conv1d.weight"][:, 0], self.weights.get("conv1d.bias")
        outputs: list = [None] * len(order)
        for place, token in enumerate(order):
            total, alive = torch.zeros_like(stream[:, token]), torch.ones(len(stream), 1, dtype=torch.float64)
            for back in range(min(config.conv_kernel, place + 1)):
                total = total + alive * taps[:, config.conv_kernel - 1 - back] * stream[:, order[place - back]]
                alive = alive * ~starts[:, place - back, None]
            outputs[token] = total if bias is None else total + bias
        y = torch.stack(outputs, dim=1)
        return y / (1 + torch.exp(-y)) if config.conv_activation == "silu" else y


def weights_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.double() for name, parameter in module.named_parameters()}


def naive_mixer(mixer, hidden_states, seq_idx=None):
    """The output `(b, t, d)`, the projections with the backward ones in token order, and both branches."""
    config, weights = mixer.config, weights_of(mixer)
    projected = hidden_states.double() @ weights["in_proj.weight"].T + weights.get("in_proj.bias", 0.0)
    width, tokens = config.mixer_width, hidden_states.shape[1]
    s6 = isinstance(mixer, BidirectionalS6Mixer)
    stream, gate = (projected[..., :width], projected[..., width:]) if s6 else (
        projected[..., width:],
        projected[..., :width],
    )  # fmt: skip
    ahead = NaiveBranch(mixer, mixer, stream, list(range(tokens)), seq_idx)
    back = NaiveBranch(mixer, mixer.backward, stream, list(range(tokens - 1, -1, -1)), seq_idx)
    y = (ahead.y + back.y) / 2 * gate / (1 + torch.exp(-gate))
    if not s6:
        grouped = y.unflatten(-1, (config.n_groups, -1))
        scale = (grouped.square().mean(dim=-1, keepdim=True) + config.layer_norm_epsilon).sqrt()
        y = (grouped / scale).flatten(-2) * weights["norm.weight"]
    output = y @ weights["out_proj.weight"].T + weights.get("out_proj.bias", 0.0)
    return output, BidirectionalProjections(ahead.B, ahead.C, ahead.dt, y, back.B, back.C, back.dt), ahead, back


def in_token_order(projections: BidirectionalProjections) -> BidirectionalProjections:
    return BidirectionalProjections(*projections[:4], *(field.flip(1) for field in projections[4:]))


@pytest.mark.parametrize("mixer_type, groups", KINDS)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("tokens", [1, 7])
def test_a_mixer_is_two_loops_over_tokens(mixer_type, groups, setting, tokens):
    """Outputs, projections, and the gradients of everything that is returned."""
    mixer = shaken_mixer(mixer_type, groups, **SETTINGS[setting])
    parameters = dict(mixer.named_parameters())
    # a loss in which every entry of everything that is returned has a weight of its own
    generator, results = torch.Generator().manual_seed(1), []
    weights = None
    for forward in (lambda x: naive_mixer(mixer, x)[:2], mixer):
        x = inputs(tokens=tokens).requires_grad_()
        output, projections = forward(x)
        shown = in_token_order(projections) if forward is mixer else projections
        everything = (output, *shown)
        if weights is None:
            weights = [torch.randn(value.shape, generator=generator, dtype=torch.float64) for value in everything]
        loss = sum((weight * value).sum() for weight, value in zip(weights, everything))
        gradients = torch.autograd.grad(loss, [x, *parameters.values()])
        results.append((everything, dict(zip(["x", *parameters], gradients))))
    (truth, true_gradients), (found, found_gradients) = results
    for name, expected, value in zip(("result", *BidirectionalProjections._fields), truth, found, strict=True):
        assert largest_difference(value, expected) < 1e-5 * max(1.0, float(expected.detach().abs().max())), name
    for name, expected in true_gradients.items():
        scale = max(1.0, float(expected.abs().max()))
        assert largest_difference(found_gradients[name], expected) < 1e-4 * scale, name
    # a convolution of one token never reads its earlier taps; all else takes part
    assert {name for name, gradient in true_gradients.items() if not bool(gradient.any())} == set() or tokens == 1


@pytest.mark.parametrize("mixer_type, groups", KINDS)
@torch.no_grad()
def test_packed_sequences_do_not_leak_in_either_direction(mixer_type, groups):
    mixer, x = shaken_mixer(mixer_type, groups), inputs()
    output, projections = mixer(x, seq_idx=SEQ_IDX)
    expected, shown, *_ = naive_mixer(mixer, x, SEQ_IDX)
    assert largest_difference(output, expected) < 1e-5
    for found, truth in zip(in_token_order(projections), shown):
        assert largest_difference(found, truth) < 1e-5
    alone = [mixer(x[:1, start:end])[0] for start, end in ((0, 3), (3, 5), (5, 7))]
    assert largest_difference(output[:1], torch.cat(alone, dim=1)) < 1e-5
    assert largest_difference(output[1:, 6:], mixer(x[1:, 6:])[0]) < 1e-5
    assert largest_difference(output, mixer(x)[0]) > 1e-2
    attention_map = mixer.attention_map(*projections[:3], *projections[4:], SEQ_IDX)
    other_document = torch.ones(7, 7, dtype=torch.bool)
    for start, end in ((0, 3), (3, 5), (5, 7)):
        other_document[start:end, start:end] = False
    assert float(attention_map[0][:, other_document].abs().max()) == 0.0
    assert float(attention_map[0][:, ~other_document].abs().min()) > 0.0


@pytest.mark.parametrize("mixer_type, groups", KINDS)
@torch.no_grad()
def test_every_token_reads_every_other_one(mixer_type, groups):
    mixer = shaken_mixer(mixer_type, groups)
    for token in (0, 3, 6):
        x = inputs()
        before = mixer(x)[0]
        x[:, token] += 1.0
        assert bool(((mixer(x)[0] - before).abs().amax(dim=(0, 2)) > 1e-5).all())


def swapped(mixer: BidirectionalS6Mixer | BidirectionalSSDMixer) -> dict[str, torch.Tensor]:
    """The state with both directions' weights exchanged."""
    state = mixer.state_dict()
    own = {name.removeprefix("backward.") for name in state if name.startswith("backward.")}
    return {
        name: state[f"backward.{name}" if name in own else name.removeprefix("backward.")].clone() for name in state
    }


@pytest.mark.parametrize("mixer_type, groups", KINDS)
@torch.no_grad()
def test_reversed_tokens_and_exchanged_directions_reverse_the_output(mixer_type, groups):
    mixer, other, x = shaken_mixer(mixer_type, groups), shaken_mixer(mixer_type, groups), inputs()
    other.load_state_dict(swapped(mixer))
    output, projections = mixer(x)
    reversed_output, reversed_projections = other(x.flip(1))
    assert largest_difference(reversed_output.flip(1), output) < 1e-6
    assert largest_difference(reversed_projections.output.flip(1), projections.output) < 1e-6
    # each scan reads the same tokens in the same order as the other did before
    for own, others in ((0, 4), (1, 5), (2, 6), (4, 0), (5, 1), (6, 2)):
        assert largest_difference(reversed_projections[own], projections[others]) < 1e-6
    maps = [
        module.attention_map(*shown[:3], *shown[4:])
        for module, shown in ((mixer, projections), (other, reversed_projections))
    ]
    assert largest_difference(maps[1].flip(-2, -1), maps[0]) < 1e-6
    # the directions are not alike, so the test can fail
    assert largest_difference(mixer(x.flip(1))[0].flip(1), output) > 1e-2


def one_direction_twice(mixer_type: str, **overrides):
    """A causal mixer, fresh, and a bidirectional one with its weights in both directions."""
    config = tiny_vision_config(mixer_type=mixer_type, hidden_size=32, **overrides)
    torch.manual_seed(0)
    model = CABVisionMambaModel(config)
    mixer, causal = model.layers[0].mixer, MIXERS[mixer_type](config, 0)
    state = mixer.state_dict()
    for name in state:
        if name.startswith("backward."):
            state[name] = state[name.removeprefix("backward.")]
    mixer.load_state_dict(state)
    causal.load_state_dict({name: value for name, value in state.items() if not name.startswith("backward.")})
    return mixer, causal


@pytest.mark.parametrize("mixer_type", MIXER_TYPES)
@pytest.mark.parametrize("start", ["identity", "s4d"])
@torch.no_grad()
def test_the_outputs_size_does_not_grow_with_the_directions(mixer_type, start):
    mixer, causal = one_direction_twice(mixer_type, transition_init=start)
    # the middle of a palindrome is the same from both ends
    half = inputs(tokens=8, width=32)
    palindrome = torch.cat([half, half[:, :-1].flip(1)], dim=1)
    both, one = mixer(palindrome)[0], causal(palindrome)[0]
    assert largest_difference(both[:, 7], one[:, 7]) < 1e-6
    assert largest_difference(both, both.flip(1)) < 1e-6
    # independent tokens: the mean of two directions varies at most as one does
    x = inputs(batch=8, tokens=33, width=32)
    ratio = float(mixer(x)[0].var() / causal(x)[0].var())
    assert 0.5 < ratio < 1.1


@pytest.mark.parametrize("mixer_type, groups", KINDS)
@torch.no_grad()
def test_the_attention_map_is_what_the_scans_apply(mixer_type, groups):
    # one S6 channel a head, so that no mean over channels hides a channel's map
    heads = {"head_dim": 1} if mixer_type == "mamba" else {}
    mixer, x = shaken_mixer(mixer_type, groups, **heads), inputs()
    _, _, ahead, back = naive_mixer(mixer, x)
    _, projections = mixer(x)
    head_dim = mixer.config.head_dim

    def applied(attention_map, scanned):
        by_head = scanned.unflatten(-1, (-1, head_dim))
        return torch.einsum("bhij,bjhp->bihp", attention_map.double(), by_head).flatten(-2)

    attention_map = mixer.attention_map(*projections[:3], *projections[4:])
    assert attention_map.dtype == torch.float32 and attention_map.shape == (2, 32 // head_dim, 7, 7)
    # a map for each direction, by making the other one silent: C = 0 leaves only its D on the diagonal
    silent = torch.zeros_like(projections.C)
    diagonal = torch.eye(7)
    skips = [branch.D[:: 1 if len(branch.D) != 32 else head_dim].detach() for branch in (mixer, mixer.backward)]
    without_back = mixer.attention_map(*projections[:3], projections[4], silent, projections[6])
    without_ahead = mixer.attention_map(projections[0], silent, projections[2], *projections[4:])
    ahead_map = 2 * without_back - skips[1][:, None, None] * diagonal
    back_map = 2 * without_ahead - skips[0][:, None, None] * diagonal
    assert float(ahead_map.triu(1).abs().max()) < 1e-6 and float(back_map.tril(-1).abs().max()) < 1e-6
    assert largest_difference(applied(ahead_map, ahead.x), ahead.y) < 1e-4
    assert largest_difference(applied(back_map, back.x), back.y) < 1e-4
    assert largest_difference((ahead_map + back_map) / 2, attention_map) < 1e-5


@pytest.mark.parametrize("mixer_type", MIXER_TYPES)
@torch.no_grad()
def test_one_map_serves_both_scans_where_they_read_the_same(mixer_type):
    """With transparent convolutions both scans read x itself, and the mean map gives the mean output."""
    starts = {"conv_init": "transparent", "conv_activation": None, "use_conv_bias": False}
    heads = {"head_dim": 1} if mixer_type == "mamba" else {"head_dim": 8}
    config = tiny_vision_config(mixer_type=mixer_type, num_hidden_layers=1, **starts, **heads)
    torch.manual_seed(0)
    mixer, x = CABVisionMambaModel(config).layers[0].mixer, inputs()
    _, projections = mixer(x)
    attention_map = mixer.attention_map(*projections[:3], *projections[4:])
    _, _, ahead, back = naive_mixer(mixer, x)
    assert largest_difference(ahead.x, back.x) == 0.0
    by_head = ahead.x.unflatten(-1, (-1, config.head_dim)).float()
    output = torch.einsum("bhij,bjhp->bihp", attention_map, by_head).flatten(-2)
    assert largest_difference(output, (ahead.y + back.y) / 2) < 1e-5
    assert float(ahead.y.abs().max()) > 0.05


@pytest.mark.parametrize("mixer_type, groups", KINDS)
def test_gradients_flow_from_each_projection_to_its_own_direction(mixer_type, groups):
    mixer = shaken_mixer(mixer_type, groups)
    _, projections = mixer(inputs())
    shared = {"in_proj.weight", "x"}
    for name, field in zip(projections._fields, projections):
        gradients = torch.autograd.grad(
            field.square().sum(), list(mixer.parameters()), retain_graph=True, allow_unused=True
        )
        reached = {
            key
            for (key, _), gradient in zip(mixer.named_parameters(), gradients)
            if gradient is not None and bool(gradient.any())
        }
        assert "in_proj.weight" in reached, name
        backward = {key for key in reached if key.startswith("backward.")}
        if name == "output":
            assert backward and reached - backward - shared
        else:
            assert bool(backward) == name.startswith("backward_"), name
            assert bool(reached - backward - shared) != name.startswith("backward_"), name


@pytest.mark.parametrize("mixer_type", MIXER_TYPES)
def test_a_bidirectional_mixer_is_the_causal_one_and_a_branch(mixer_type):
    config = tiny_vision_config(mixer_type=mixer_type)
    mixer, causal = BIDIRECTIONAL_MIXERS[mixer_type](config, 0), MIXERS[mixer_type](config, 0)
    assert isinstance(mixer, MIXERS[mixer_type])
    own = {name for name in mixer.state_dict() if not name.startswith("backward.")}
    assert own == set(causal.state_dict())
    branch = {name.removeprefix("backward.") for name in mixer.state_dict() if name.startswith("backward.")}
    scan = {"conv1d.weight", "conv1d.bias", "A_log", "D"}
    assert branch == scan | (
        {"x_proj.weight", "dt_proj.weight", "dt_proj.bias"} if mixer_type == "mamba" else {"dt_bias"}
    )
    assert BidirectionalProjections._fields[:4] == SSMProjections._fields


@pytest.mark.parametrize("mixer_type", MIXER_TYPES)
@torch.no_grad()
def test_both_directions_start_as_the_config_says(mixer_type):
    for start, expected in (("identity", {-20.0}), ("moving_average", {0.0})):
        config = tiny_vision_config(mixer_type=mixer_type, transition_init=start, skip_init="transparent")
        torch.manual_seed(0)
        for layer in CABVisionMambaModel(config).layers:
            for branch in (layer.mixer, layer.mixer.backward):
                assert set(branch.A_log.flatten().tolist()) == expected
                assert bool((branch.D == 0).all())
                assert 0.0 < float(branch.conv1d.weight.abs().max()) <= 0.5
                raw = branch.dt_proj.bias if mixer_type == "mamba" else branch.dt_bias
                low, high = (1 / 512, 1 / 8) if start == "moving_average" else (0.001, 0.1)
                steps = F.softplus(raw)
                assert low * 0.999 < float(steps.min()) <= float(steps.max()) < high * 1.001
            # directions start apart from each other where chance decides
            assert not torch.equal(layer.mixer.conv1d.weight, layer.mixer.backward.conv1d.weight)
