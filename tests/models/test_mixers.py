"""Mixers: against naive float64 truths, their projections and maps, and how they start."""

import math

import pytest
import torch
import torch.nn.functional as F
from reference import naive_causal_conv1d, naive_selective_scan, naive_ssd_scan
from tiny_models import MIXER_TYPES, largest_difference, random_ids, shake, tiny_config, tiny_model

from cab_hf.models import mixers
from cab_hf.models.mixers import MIXERS, S6Mixer, SSDMixer, projected
from cab_hf.models.modeling_cab_mamba import CABMambaForCausalLM


KINDS = [("mamba", 1), ("mamba2", 1), ("mamba2", 2), ("mamba2", 4)]
SEQ_IDX = torch.tensor([[0, 0, 0, 1, 1, 0, 0, 0, 0], [0, 1, 2, 2, 2, 2, 2, 3, 3]])


def shaken_mixer(mixer_type: str, groups: int = 1, **overrides) -> S6Mixer | SSDMixer:
    model = tiny_model(mixer_type=mixer_type, n_groups=groups, num_hidden_layers=1, **overrides)
    return model.backbone.layers[0].mixer


def fresh_mixer(mixer_type: str, **overrides) -> S6Mixer | SSDMixer:
    torch.manual_seed(0)
    return (
        CABMambaForCausalLM(tiny_config(mixer_type=mixer_type, num_hidden_layers=1, **overrides))
        .backbone.layers[0]
        .mixer
    )


def inputs(batch: int = 2, tokens: int = 9, width: int = 32) -> torch.Tensor:
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(3))


def linear(module: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    y = x @ module.weight.double().T
    return y if module.bias is None else y + module.bias.double()


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def softplus(x: torch.Tensor) -> torch.Tensor:
    return torch.log1p(torch.exp(x))


def naive_mixer(mixer, x, mask=None, seq_idx=None) -> dict[str, torch.Tensor]:
    """What the mixer computes, in float64: B, C, time_step, the scan's input and output, y and the output."""
    config, width = mixer.config, mixer.config.mixer_width
    keep = torch.ones(x.shape[:2], dtype=torch.float64) if mask is None else mask.double()
    keep = keep[..., None]
    projected = linear(mixer.in_proj, x.double())
    weight = mixer.conv1d.weight[:, 0]

    def convolve(stream):
        return naive_causal_conv1d(stream * keep, weight, mixer.conv1d.bias, config.conv_activation, seq_idx=seq_idx)

    A, D = -torch.exp(mixer.A_log.double()), mixer.D.double()
    if isinstance(mixer, S6Mixer):
        stream, gate = projected[..., :width], projected[..., width:]
        stream = convolve(stream)
        low_rank, B, C = linear(mixer.x_proj, stream).split(
            [config.time_step_rank, config.state_size, config.state_size], dim=-1
        )
        dt = softplus(linear(mixer.dt_proj, low_rank)) * keep
        scanned, _ = naive_selective_scan(stream, dt, A, B, C, D, seq_idx=seq_idx)
        y, B, C = scanned * silu(gate), B[:, :, None], C[:, :, None]
    else:
        states = config.n_groups * config.state_size
        gate, stream, dt = projected.split([width, width + 2 * states, config.num_heads], dim=-1)
        dt = softplus(dt + mixer.dt_bias.double()).clamp(*config.time_step_limit) * keep
        stream, B, C = convolve(stream).split([width, states, states], dim=-1)
        stream = stream.unflatten(-1, (config.num_heads, config.head_dim))
        B, C = (part.unflatten(-1, (config.n_groups, config.state_size)) for part in (B, C))
        scanned, _ = naive_ssd_scan(stream, dt, A, B, C, D, seq_idx=seq_idx)
        gated = (scanned.flatten(-2) * silu(gate)).unflatten(-1, (config.n_groups, -1))
        scale = (gated.square().mean(dim=-1, keepdim=True) + config.layer_norm_epsilon).sqrt()
        y = (gated / scale).flatten(-2) * mixer.norm.weight.double()
    return {
        "B": B, "C": C, "time_step": dt, "scan_input": stream, "scan_output": scanned, "y": y,
        "output": linear(mixer.out_proj, y),
    }  # fmt: skip


@pytest.mark.parametrize("mixer_type, groups", KINDS)
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"use_bias": True, "use_conv_bias": False, "time_step_limit": (0.4, 0.9)},
        {"conv_activation": None, "conv_kernel": 3, "chunk_size": 2},
    ],
    ids=["default", "biases, limit", "linear conv"],
)
@torch.no_grad()
def test_a_mixer_computes_what_the_equations_say(mixer_type, groups, overrides):
    mixer, x = shaken_mixer(mixer_type, groups, **overrides), inputs()
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    mask[1, 6:] = 0
    for options in ({}, {"attention_mask": mask}, {"seq_idx": SEQ_IDX}):
        truth = naive_mixer(mixer, x, options.get("attention_mask"), options.get("seq_idx"))
        output, projections = mixer(x, **options)
        for name in ("B", "C", "time_step"):
            assert largest_difference(getattr(projections, name), truth[name]) < 1e-5, name
        real = options.get("attention_mask", torch.ones_like(mask)).bool()
        assert largest_difference(projections.output[real], truth["y"][real]) < 1e-4
        assert largest_difference(output[real], truth["output"][real]) < 1e-4


@pytest.mark.parametrize("mixer_type, groups", KINDS)
@torch.no_grad()
def test_the_model_shows_each_layers_projections(mixer_type, groups):
    model = tiny_model(mixer_type=mixer_type, n_groups=groups)
    ids, seen = random_ids(2, 7), []
    for layer in model.backbone.layers:
        layer.mixer.register_forward_hook(lambda module, args, output: seen.append((module, args[0], output)))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    projections = model(ids, attention_mask=mask, output_projections=True).projections
    steps = 8 if mixer_type == "mamba2" else 64
    for (mixer, x, (output, _)), shown in zip(seen, projections, strict=True):
        shapes = [tuple(field.shape) for field in shown]
        assert shapes == [(2, 7, groups, 6), (2, 7, groups, 6), (2, 7, steps), (2, 7, 64)]
        assert shown.time_step.dtype == torch.float32
        assert float(shown.time_step[0, :2].abs().max()) == 0.0 and float(shown.time_step[1].min()) > 0
        truth = naive_mixer(mixer, x, mask)
        assert largest_difference(shown.C, truth["C"]) < 1e-5
        assert torch.equal(mixer.out_proj(shown.output), output)


@pytest.mark.parametrize("mixer_type, groups", KINDS)
def test_gradients_flow_from_each_projection(mixer_type, groups):
    for field in ("B", "C", "time_step", "output"):
        model = tiny_model(mixer_type=mixer_type, n_groups=groups, num_hidden_layers=1)
        mixer = model.backbone.layers[0].mixer
        shown = model(random_ids(2, 7), output_projections=True).projections[0]
        getattr(shown, field).square().sum().backward()
        source = mixer.x_proj if mixer_type == "mamba" else mixer.in_proj
        assert float(source.weight.grad.abs().max()) > 0, field
        assert float(mixer.in_proj.weight.grad.abs().max()) > 0, field
        assert float(model.get_input_embeddings().weight.grad.abs().max()) > 0, field


def naive_channel_maps(truth: dict[str, torch.Tensor], mixer, seq_idx=None) -> torch.Tensor:
    """`(b, d, t, t)`: for each channel `d` the matrix that the scan applies, entry by entry."""
    config = mixer.config
    A, D = -torch.exp(mixer.A_log.double()), mixer.D.double()
    B, C, dt = truth["B"], truth["C"], truth["time_step"]
    batch, tokens = dt.shape[:2]
    maps = torch.zeros(batch, config.mixer_width, tokens, tokens, dtype=torch.float64)
    for row in range(batch):
        for channel in range(config.mixer_width):
            head = channel // config.head_dim
            step = head if isinstance(mixer, SSDMixer) else channel
            group = head // (config.num_heads // config.n_groups) if isinstance(mixer, SSDMixer) else 0
            rate = A[step]  # a number, or one a state
            for i in range(tokens):
                for j in range(i, -1, -1):
                    if seq_idx is not None and not bool((seq_idx[row, j : i + 1] == seq_idx[row, i]).all()):
                        break
                    decay = torch.exp(rate * dt[row, j + 1 : i + 1, step].sum())
                    entry = (C[row, i, group] * decay * B[row, j, group]).sum() * dt[row, j, step]
                    maps[row, channel, i, j] = entry + (D[step] if i == j else 0.0)
    return maps


@pytest.mark.parametrize("mixer_type, groups", KINDS)
@torch.no_grad()
def test_the_attention_map_is_what_the_scan_applies(mixer_type, groups):
    mixer, x = shaken_mixer(mixer_type, groups, state_size=3, hidden_size=16), inputs(width=16)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :2] = 0
    for options in ({}, {"attention_mask": mask}, {"seq_idx": SEQ_IDX}):
        seq_idx = options.get("seq_idx")
        truth = naive_mixer(mixer, x, options.get("attention_mask"), seq_idx)
        maps = naive_channel_maps(truth, mixer, seq_idx)
        applied = torch.einsum("bdij,bjd->bid", maps, truth["scan_input"].reshape(2, 9, 32))
        assert largest_difference(applied, truth["scan_output"].reshape(2, 9, 32)) < 1e-9, "the test's own maps"
        _, projections = mixer(x, **options)
        attention_map = mixer.attention_map(*projections[:3], seq_idx)
        expected = maps.unflatten(1, (4, 8)).mean(dim=2)
        assert attention_map.dtype == torch.float32
        assert largest_difference(attention_map, expected) < 1e-5
        assert float(attention_map.triu(1).abs().max()) == 0.0
        if mixer_type == "mamba2":
            heads = truth["scan_input"].float()
            output = torch.einsum("bhij,bjhp->bihp", attention_map, heads)
            assert largest_difference(output, truth["scan_output"]) < 1e-4


@torch.no_grad()
def test_an_s6_mixer_that_heads_do_not_divide_has_one_map():
    mixer, x = shaken_mixer("mamba", state_size=3, hidden_size=15), inputs(width=15)
    truth = naive_mixer(mixer, x)
    _, projections = mixer(x)
    attention_map = mixer.attention_map(*projections[:3])
    assert attention_map.shape == (2, 1, 9, 9)
    assert largest_difference(attention_map[:, 0], naive_channel_maps(truth, mixer).mean(dim=1)) < 1e-5


@torch.no_grad()
def test_the_model_returns_the_maps():
    for mixer_type in MIXER_TYPES:
        model, ids = tiny_model(mixer_type=mixer_type), random_ids(2, 9)
        output = model(ids, output_attentions=True, output_projections=True, seq_idx=SEQ_IDX)
        for layer, shown, attention_map in zip(model.backbone.layers, output.projections, output.attentions):
            assert attention_map.shape == (2, 8, 9, 9)
            assert torch.equal(attention_map, layer.mixer.attention_map(*shown[:3], SEQ_IDX))


@torch.no_grad()
def test_a_map_stays_finite_where_decays_are_extreme():
    for mixer_type in MIXER_TYPES:
        mixer = shaken_mixer(mixer_type)
        mixer.A_log.fill_(9.0)
        _, projections = mixer(inputs())
        assert bool(mixer.attention_map(*projections[:3]).isfinite().all())


# How mixers start


@pytest.mark.parametrize("mixer_type", MIXER_TYPES)
@torch.no_grad()
def test_the_identity_start_remembers_everything(mixer_type):
    mixer = fresh_mixer(mixer_type, transition_init="identity")
    _, projections = mixer(10.0 * inputs())
    A = -torch.exp(mixer.A_log)
    decay = torch.exp(projections.time_step[..., None] * A)
    assert bool((A < 0).all())
    assert float((1 - decay).abs().max()) < 1e-6


def transparent(mixer_type: str, **overrides) -> S6Mixer | SSDMixer:
    settings = {"conv_init": "transparent", "gate_init": "transparent", "skip_init": "transparent"}
    overrides = {"conv_activation": None, "use_bias": True, "transition_init": "moving_average", **overrides}
    return fresh_mixer(mixer_type, **settings, **overrides)


@pytest.mark.parametrize("mixer_type", MIXER_TYPES)
@torch.no_grad()
def test_the_moving_average_start_averages_over_its_memory(mixer_type):
    """`h_t = exp(-1/m) h_{t-1} + x / m`, so a constant x gives `x (1 - exp(-t/m)) / (m (1 - exp(-1/m)))`."""
    mixer = transparent(mixer_type, memory_range=(2, 64))
    x = inputs(tokens=1).expand(-1, 40, -1)
    truth = naive_mixer(mixer, x)
    memory = torch.logspace(math.log10(2), math.log10(64), 8, dtype=torch.float64)
    ramp = 1 - torch.exp(-torch.arange(1, 41)[:, None] / memory)  # (t, h)
    average = ramp / (memory * (1 - torch.exp(-1 / memory)))
    score = (truth["B"] * truth["C"]).sum(dim=(-1, -2))  # (b, t), one group
    expected = score[..., None, None] * average[..., None] * truth["scan_input"].reshape(2, 40, 8, 8)
    _, projections = mixer(x)
    assert largest_difference(truth["scan_output"].reshape(2, 40, 8, 8), expected) < 1e-6 * float(expected.abs().max())
    # the weights of an average sum to one, up to what a step of 1 / m rounds away
    assert bool(((average[-1] / ramp[-1] - 1).abs() < 0.6 / memory).all())
    # memories as the mixer itself has them: the ratio of two neighbouring entries of a row of its map
    attention_map = mixer.attention_map(*projections[:3]).double()
    found = -1 / torch.log(attention_map[0, :, -1, -2] / attention_map[0, :, -1, -1])
    torch.testing.assert_close(found, memory, rtol=1e-3, atol=0)


@torch.no_grad()
def test_memories_span_the_range():
    mixer = transparent("mamba2", memory_range=(8.0, 512.0))
    steps = F.softplus(mixer.dt_bias)
    torch.testing.assert_close(1 / steps[[0, -1]], torch.tensor([8.0, 512.0]), rtol=1e-4, atol=0)
    assert float((steps.log().diff().diff()).abs().max()) < 1e-4
    assert bool((mixer.A_log == 0).all())
    s6 = transparent("mamba", memory_range=(8.0, 512.0))
    steps_of_channels = F.softplus(s6.dt_proj.bias).view(8, 8)
    torch.testing.assert_close(steps_of_channels, steps[:, None].expand(8, 8), rtol=1e-4, atol=0)
    # a width that heads do not divide still spans the range
    for odd_width in (35, 167):
        odd = transparent("mamba", memory_range=(8.0, 512.0), hidden_size=odd_width, expand=1)
        steps = F.softplus(odd.dt_proj.bias)
        torch.testing.assert_close(1 / steps[[0, -1]], torch.tensor([8.0, 512.0]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("mixer_type", MIXER_TYPES)
@torch.no_grad()
def test_the_transparent_start_is_as_if_absent(mixer_type):
    mixer, x = transparent(mixer_type), 3.0 * inputs()
    assert bool((mixer.D == 0).all())
    projected = mixer.in_proj(x)
    gate = projected[..., 64:] if mixer_type == "mamba" else projected[..., :64]
    assert float((F.silu(gate) - 1).abs().max()) < 1e-6
    stream = torch.randn(2, 9, mixer.conv1d.weight.shape[0])
    assert torch.equal(mixer.convolve(stream, None, None, None), stream)
    if mixer_type == "mamba":
        truth = naive_mixer(mixer, x)
        assert largest_difference(mixer(x)[1].output, truth["scan_output"]) < 1e-5


@pytest.mark.parametrize("mixer_type", MIXER_TYPES)
@torch.no_grad()
def test_the_usual_start_has_the_usual_ranges(mixer_type):
    mixer = fresh_mixer(
        mixer_type, hidden_size=256, time_step_min=0.01, time_step_max=0.02, transition_init="s4d", use_bias=True
    )
    width = 512
    assert bool((mixer.D == 1).all())
    taps = mixer.conv1d.weight
    assert float(taps.abs().max()) <= 0.5 and float(taps.std()) > 0.25  # uniform within 1 / sqrt(4 taps)
    assert bool((mixer.conv1d.bias == 0).all())
    bias = mixer.dt_bias if mixer_type == "mamba2" else mixer.dt_proj.bias
    steps = F.softplus(bias)
    assert 0.01 * 0.999 < float(steps.min()) < 0.0115 and 0.0185 < float(steps.max()) < 0.02 * 1.001
    for projection in (mixer.in_proj, mixer.out_proj):
        assert abs(float(projection.weight.std()) / 0.02 - 1) < 0.05
        assert bool((projection.bias == 0).all())
    if mixer_type == "mamba":
        torch.testing.assert_close(mixer.A_log, torch.arange(1.0, 7.0).log().expand(width, 6))
        rank = mixer.config.time_step_rank
        assert rank == 16 and 0.24 < float(mixer.dt_proj.weight.abs().max()) <= 0.25
    else:
        torch.testing.assert_close(mixer.A_log, torch.arange(1.0, 65.0).log())
        assert bool((mixer.norm.weight == 1).all())


@torch.no_grad()
def test_the_floor_of_time_steps_and_scaled_outputs():
    for mixer_type in MIXER_TYPES:
        mixer = fresh_mixer(mixer_type, time_step_min=1e-6, time_step_max=2e-6, time_step_floor=1e-4)
        steps = F.softplus(mixer.dt_bias if mixer_type == "mamba2" else mixer.dt_proj.bias)
        torch.testing.assert_close(steps, torch.full_like(steps, 1e-4), rtol=1e-3, atol=0)
        torch.manual_seed(0)
        config = tiny_config(
            mixer_type=mixer_type, hidden_size=128, num_hidden_layers=9, rescale_prenorm_residual=True
        )
        out_proj = CABMambaForCausalLM(config).backbone.layers[4].mixer.out_proj
        assert abs(float(out_proj.weight.std()) / (0.02 / 3) - 1) < 0.05


def test_a_seed_decides_the_start():
    for mixer_type in MIXER_TYPES:
        torch.manual_seed(0)
        config = tiny_config(mixer_type=mixer_type)
        again = CABMambaForCausalLM(config).state_dict()
        torch.manual_seed(0)
        for name, value in CABMambaForCausalLM(config).state_dict().items():
            assert torch.equal(value, again[name]), name


@pytest.mark.parametrize("mixer_type", MIXER_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_decays_steps_and_states_are_float32(mixer_type, dtype, monkeypatch):
    """Whatever the weights' dtype: what the scans get, and what they carry from token to token."""
    model = tiny_model(mixer_type=mixer_type).to(dtype)
    calls = []
    for name in ("ssd_scan", "ssd_scan_update", "selective_scan", "selective_scan_update"):
        scan = getattr(mixers, name)

        def record(*args, scan=scan, name=name, **kwargs):
            result = scan(*args, **kwargs)
            calls.append((name, args, result))
            return result

        monkeypatch.setattr(mixers, name, record)
    for autocast in (False, True):
        calls.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(random_ids(2, 7), use_cache=True, output_projections=True)
            model(random_ids(2, 1), cache=output.cache, use_cache=True)
        assert len(calls) == 4
        for name, args, result in calls:
            if name.endswith("update"):
                state, _, dt, A, *_ = args
            else:
                (_, dt, A, *_), state = args, result[1]
            assert dt.dtype == A.dtype == state.dtype == torch.float32, name
        for shown in output.projections:
            assert shown.time_step.dtype == torch.float32
        cached = [output.cache.get_recurrent_state(index) for index in range(2)]
        assert all(state.dtype == torch.float32 for state in cached)


@torch.no_grad()
def test_an_ssd_time_step_is_not_rounded_to_half_precision():
    mixer = shake(fresh_mixer("mamba2")).to(torch.bfloat16)
    x = inputs().to(torch.bfloat16)
    _, projections = mixer(x)
    raw = mixer.in_proj(x)[..., -8:].float()
    assert torch.equal(projections.time_step, F.softplus(raw + mixer.dt_bias.float()))
    assert not torch.equal(projections.time_step, projections.time_step.bfloat16().float())


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("threads", "rows"), [(2, 512), (3, 512), (4, 333)])
def test_a_row_meets_a_matrix_in_parts(threads, rows, bias, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    torch.manual_seed(0)
    module, x = torch.nn.Linear(256, rows, bias=bias), torch.randn(1, 1, 512)[..., ::2]
    right, two = module(x), module(x.expand(1, 2, -1))
    with monkeypatch.context() as patched:
        patched.setattr(F, "linear", None)  # it is not called
        assert largest_difference(projected(x, module), right) < 1e-6
    assert projected(x, module).shape == right.shape
    # what is not one plain row and one plain matrix goes the usual way
    assert torch.equal(projected(x.expand(1, 2, -1), module), two)
    with torch.enable_grad():
        assert projected(x, module).requires_grad
    module.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert largest_difference(projected(x, module), 2 * right) < 1e-6


def test_both_mixers_are_listed():
    assert MIXERS == {"mamba": S6Mixer, "mamba2": SSDMixer}
