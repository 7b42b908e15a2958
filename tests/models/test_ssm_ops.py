"""The state-space operations against naive float64 loops: values, states and gradients."""

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import naive_causal_conv1d, naive_selective_scan, naive_ssd_scan
from tiny_ssm import (
    BATCH,
    CONTEXTS,
    assert_matches,
    conv_arguments,
    default_backend,  # noqa: F401, of every test here
    s6_arguments,
    sequence_index,
    ssd_arguments,
    values_and_gradients,
)

from cab_hf.models import s6_scan, ssm_ops
from cab_hf.models import ssd_scan as ssd_chunks
from cab_hf.models.ssm_ops import (
    causal_conv1d,
    causal_conv1d_update,
    selective_scan,
    selective_scan_update,
    ssd_scan,
    ssd_scan_update,
)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("t", [1, 2, 3, 7, 33])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_convolution_is_the_naive_one(t, context, activation):
    assert_matches(causal_conv1d, naive_causal_conv1d, conv_arguments(t, context) | {"activation": activation})


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_convolution_of_any_width_without_bias(k):
    assert_matches(
        causal_conv1d, naive_causal_conv1d, conv_arguments(9, "alone" if k == 1 else "continued", k=k, bias=False)
    )


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("t", [1, 2, 5, 31, 32, 33, 70])
def test_s6_is_the_naive_recurrence(t, context):
    assert_matches(selective_scan, naive_selective_scan, s6_arguments(t, context))


@pytest.mark.parametrize("context", CONTEXTS)
def test_s6_over_several_blocks_of_chunks(monkeypatch, context):
    monkeypatch.setattr(s6_scan, "SCAN_CHUNK", 4)
    monkeypatch.setattr(s6_scan, "SCAN_WHOLE", 0)
    monkeypatch.setattr(s6_scan, "SCAN_STATE_ELEMENTS", 0)
    assert_matches(selective_scan, naive_selective_scan, s6_arguments(75, context))


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("g", [1, 2, 4])
@pytest.mark.parametrize(("t", "chunk_size"), [(1, 256), (2, 2), (13, 4), (32, 8), (33, 8), (70, 256)])
def test_ssd_is_the_naive_recurrence(t, chunk_size, g, context):
    assert_matches(ssd_scan, naive_ssd_scan, ssd_arguments(t, context, g=g), chunk_size=chunk_size)


@pytest.mark.parametrize("context", CONTEXTS)
def test_ssd_over_several_blocks_of_chunks(monkeypatch, context):
    monkeypatch.setattr(ssd_chunks, "SSD_CHUNKS_PER_BLOCK", 3)
    assert_matches(ssd_scan, naive_ssd_scan, ssd_arguments(41, context), chunk_size=4)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    t=st.integers(1, 33),
    d=st.integers(1, 9),
    n=st.integers(1, 6),
    groups=st.sampled_from([(1, 1), (3, 1), (3, 3), (4, 2), (6, 2), (6, 3)]),
    chunk_size=st.integers(1, 40),
    context=st.sampled_from(CONTEXTS),
)
def test_any_shape(t, d, n, groups, chunk_size, context):
    h, g = groups
    assert_matches(causal_conv1d, naive_causal_conv1d, conv_arguments(t, context, d=d))
    assert_matches(selective_scan, naive_selective_scan, s6_arguments(t, context, d=d, n=n))
    ssd = ssd_arguments(t, context, h=h, g=g, p=d, n=n)
    assert_matches(ssd_scan, naive_ssd_scan, ssd, chunk_size=chunk_size)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(
    ("operation", "arguments"),
    [(causal_conv1d, conv_arguments), (selective_scan, s6_arguments), (ssd_scan, ssd_arguments)],
)
def test_finite_differences(monkeypatch, operation, arguments, context):
    monkeypatch.setattr(s6_scan, "SCAN_CHUNK", 3)
    monkeypatch.setattr(s6_scan, "SCAN_WHOLE", 0)
    monkeypatch.setattr(ssd_chunks, "SSD_CHUNK", 3)
    tensors = arguments(7, context)
    names = [name for name, value in tensors.items() if value.is_floating_point()]
    fixed = {name: value for name, value in tensors.items() if name not in names}
    leaves = [tensors[name].double().contiguous().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(lambda *values: operation(**dict(zip(names, values)), **fixed), leaves)


@pytest.mark.parametrize("scan_and_arguments", [(selective_scan, s6_arguments), (ssd_scan, ssd_arguments)])
@pytest.mark.parametrize("split", [8, 1])
def test_a_scan_continues_from_its_state(scan_and_arguments, split):
    scan, arguments = scan_and_arguments[0], scan_and_arguments[1](13, "continued")
    sequences = ("x", "dt", "B", "C")
    whole, whole_state = scan(**arguments)
    head, state = scan(**(arguments | {name: arguments[name][:, :split] for name in sequences}))
    rest = {name: arguments[name][:, split:] for name in sequences}
    tail, final_state = scan(**(arguments | rest | {"initial_state": state}))
    torch.testing.assert_close(torch.cat([head, tail], dim=1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(final_state, whole_state, rtol=1e-5, atol=1e-5)


def test_the_convolution_continues_from_its_state():
    arguments = conv_arguments(13, "continued")
    inputs = torch.cat([arguments["initial_states"], arguments["x"].transpose(1, 2)], dim=-1)  # (b, d, k + t)
    head = causal_conv1d(**(arguments | {"x": arguments["x"][:, :8]}))
    tail = causal_conv1d(**(arguments | {"x": arguments["x"][:, 8:], "initial_states": inputs[..., 8 : 8 + 4]}))
    torch.testing.assert_close(torch.cat([head, tail], dim=1), causal_conv1d(**arguments))


@pytest.mark.parametrize(
    ("operation", "make_arguments", "sequences"),
    [
        (causal_conv1d, conv_arguments, ("x",)),
        (selective_scan, s6_arguments, ("x", "dt", "B", "C")),
        (ssd_scan, ssd_arguments, ("x", "dt", "B", "C")),
    ],
)
def test_packed_sequences_equal_separate_ones(operation, make_arguments, sequences):
    arguments = make_arguments(40)
    seq_idx = torch.tensor([0] * 1 + [1] * 25 + [0] * 14).expand(BATCH, 40)
    packed = operation(**arguments, seq_idx=seq_idx)
    parts = []
    for part in (slice(0, 1), slice(1, 26), slice(26, 40)):
        parts.append(operation(**(arguments | {name: arguments[name][:, part] for name in sequences})))
    if operation is causal_conv1d:
        torch.testing.assert_close(packed, torch.cat(parts, dim=1))
    else:
        torch.testing.assert_close(packed[0], torch.cat([y for y, _ in parts], dim=1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(packed[1], parts[-1][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("scan", "update", "make_arguments"),
    [(selective_scan, selective_scan_update, s6_arguments), (ssd_scan, ssd_scan_update, ssd_arguments)],
)
def test_one_step_form_equals_the_scan(scan, update, make_arguments):
    arguments = make_arguments(9, "continued")
    whole, final_state = scan(**arguments)
    state = arguments.pop("initial_state").clone()
    address = state.data_ptr()
    for token in range(9):
        step = {name: arguments[name][:, token] for name in ("x", "dt", "B", "C")}
        y = update(state, A=arguments["A"], D=arguments["D"], **step)
        torch.testing.assert_close(y, whole[:, token], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, final_state, rtol=1e-5, atol=1e-5)
    assert state.data_ptr() == address


def test_one_step_convolution_equals_the_convolution():
    arguments = conv_arguments(9, "continued") | {"activation": "silu"}
    whole = causal_conv1d(**arguments)
    state, x = arguments.pop("initial_states").clone(), arguments.pop("x")
    for token in range(9):
        torch.testing.assert_close(causal_conv1d_update(x[:, token], state, **arguments), whole[:, token])
    assert torch.equal(state, x[:, -4:].transpose(1, 2))


@pytest.mark.parametrize("scan_and_arguments", [(selective_scan, s6_arguments), (ssd_scan, ssd_arguments)])
def test_zero_time_step_leaves_the_state(scan_and_arguments):
    scan, arguments = scan_and_arguments[0], scan_and_arguments[1](12, "continued")
    arguments["dt"][:, 7:] = 0.0
    _, state = scan(**arguments)
    short = {name: arguments[name][:, :7] for name in ("x", "dt", "B", "C")}
    torch.testing.assert_close(state, scan(**(arguments | short))[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scan_and_arguments", [(selective_scan, s6_arguments), (ssd_scan, ssd_arguments)])
def test_no_tokens(scan_and_arguments):
    scan, arguments = scan_and_arguments[0], scan_and_arguments[1](3, "continued")
    arguments |= {name: arguments[name][:, :0] for name in ("x", "dt", "B", "C")}
    y, state = scan(**arguments)
    assert y.shape == arguments["x"].shape
    assert torch.equal(state, arguments["initial_state"])
    assert state.data_ptr() != arguments["initial_state"].data_ptr()
    _, state = scan(**(arguments | {"initial_state": None, "seq_idx": torch.zeros(BATCH, 0, dtype=torch.long)}))
    assert not state.any()


def test_no_tokens_in_a_convolution():
    arguments = conv_arguments(3)
    assert causal_conv1d(**(arguments | {"x": arguments["x"][:, :0]})).shape == (BATCH, 0, 5)


@pytest.mark.parametrize(
    ("scan", "truth", "make_arguments"),
    [(selective_scan, naive_selective_scan, s6_arguments), (ssd_scan, naive_ssd_scan, ssd_arguments)],
)
@pytest.mark.parametrize(("large", "small", "scale"), [(50.0, 50.0, 16.0), (50.0, 0.01, 16.0), (1.0, 1e-3, 1e-6)])
def test_extreme_decays(scan, truth, make_arguments, large, small, scale):
    arguments = make_arguments(70)
    arguments["dt"] = torch.where(arguments["dt"] > 0.5, large, small)
    arguments["A"] = arguments["A"] * scale
    assert_matches(scan, truth, arguments)


@pytest.mark.parametrize(
    ("operation", "make_arguments"),
    [(causal_conv1d, conv_arguments), (selective_scan, s6_arguments), (ssd_scan, ssd_arguments)],
)
def test_bfloat16_inputs(operation, make_arguments):
    arguments = make_arguments(40, "continued")
    low = {name: value if name in ("dt", "A") else value.bfloat16() for name, value in arguments.items()}
    actual = values_and_gradients(operation, low)
    expected = values_and_gradients(operation, {name: value.float() for name, value in low.items()})
    for name, value in expected.items():
        assert torch.isfinite(actual[name]).all()
        torch.testing.assert_close(actual[name].float(), value, rtol=1e-2, atol=1e-2 * value.abs().max().item())
    assert actual["output 0"].dtype == torch.bfloat16
    if operation is not causal_conv1d:
        assert actual["output 1"].dtype == torch.float32


@pytest.mark.parametrize("scan_and_arguments", [(selective_scan, s6_arguments), (ssd_scan, ssd_arguments)])
def test_autocast_does_not_lower_the_precision(scan_and_arguments):
    scan, arguments = scan_and_arguments[0], scan_and_arguments[1](40)
    y, state = scan(**arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_autocast, state_autocast = scan(**arguments)
    assert torch.equal(y, y_autocast)
    assert torch.equal(state, state_autocast)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("context", ["continued", "packed"])
@pytest.mark.parametrize(
    ("operation", "make_arguments"),
    [(causal_conv1d, conv_arguments), (selective_scan, s6_arguments), (ssd_scan, ssd_arguments)],
)
def test_compiles_without_graph_breaks(operation, make_arguments, context, backend):
    torch.compiler.reset()
    arguments = make_arguments(40, context)
    compiled = torch.compile(lambda **tensors: operation(**tensors), fullgraph=True, backend=backend)
    actual, expected = values_and_gradients(compiled, arguments), values_and_gradients(operation, arguments)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-4)


class Scan(torch.nn.Module):
    def __init__(self, operation):
        super().__init__()
        self.operation = operation

    def forward(self, x, dt, A, B, C):
        return self.operation(x, dt, A, B, C)


@pytest.mark.parametrize("scan_and_arguments", [(selective_scan, s6_arguments), (ssd_scan, ssd_arguments)])
def test_exports(scan_and_arguments):
    scan, arguments = scan_and_arguments[0], scan_and_arguments[1](40)
    inputs = tuple(arguments[name] for name in ("x", "dt", "A", "B", "C"))
    with torch.no_grad():
        program = torch.export.export(Scan(scan), inputs)
        for actual, expected in zip(program.module()(*inputs), scan(*inputs)):
            torch.testing.assert_close(actual, expected)


def test_s6_exports_with_any_length():
    inputs = tuple(s6_arguments(5)[name] for name in ("x", "dt", "A", "B", "C"))
    longer = tuple(s6_arguments(70)[name] for name in ("x", "dt", "A", "B", "C"))
    length = torch.export.Dim("t", min=2, max=4096)
    dynamic_shapes = ({1: length}, {1: length}, None, {1: length}, {1: length})
    with torch.no_grad():
        program = torch.export.export(Scan(selective_scan), inputs, dynamic_shapes=dynamic_shapes)
        for actual, expected in zip(program.module()(*longer), selective_scan(*longer)):
            torch.testing.assert_close(actual, expected)


def test_a_copy_of_the_module_works_beside_it(monkeypatch):
    folder = Path(ssm_ops.__file__).parent
    package = types.ModuleType("a_checkpoint")
    package.__path__ = [str(folder)]
    monkeypatch.setitem(sys.modules, "a_checkpoint", package)
    copy = importlib.import_module("a_checkpoint.ssm_ops")
    assert copy.chunked_scan is not ssm_ops.chunked_scan
    arguments = s6_arguments(40)
    expected = values_and_gradients(selective_scan, arguments)
    for name, value in values_and_gradients(copy.selective_scan, arguments).items():
        assert torch.equal(value, expected[name])


def test_packed_sequences_have_no_past():
    with pytest.raises(ValueError, match="initial_states or seq_idx, not both"):
        causal_conv1d(**conv_arguments(5), initial_states=torch.zeros(BATCH, 5, 4), seq_idx=sequence_index(5))
