"""The state-space operations against naive float64 loops: values, states, gradients, and the choice of backend."""

import importlib
import importlib.util
import logging
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import naive_causal_conv1d, naive_selective_scan, naive_ssd_scan

from cab_hf.models import s6_scan, ssm_ops
from cab_hf.models import ssd_scan as ssd_chunks
from cab_hf.models.ssm_ops import (
    backend_for,
    causal_conv1d,
    causal_conv1d_update,
    selective_scan,
    selective_scan_update,
    ssd_scan,
    ssd_scan_update,
)


BATCH = 2
CONTEXTS = ("alone", "continued", "packed")
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def default_backend(monkeypatch):
    monkeypatch.delenv(ssm_ops.BACKEND_VARIABLE, raising=False)


def sequence_index(t: int) -> torch.Tensor:
    """One-token, short and long sequences; the second row returns to an index that it had before."""
    index = torch.zeros(BATCH, t, dtype=torch.long)
    index[0, 1:], index[0, 2:], index[0, t // 2 :] = 1, 2, 5
    index[1, t // 3 : 2 * t // 3] = 3
    return index


def conv_arguments(t: int, context: str = "alone", d: int = 5, k: int = 4, bias: bool = True) -> dict:
    generator = torch.Generator().manual_seed(t)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    arguments = {"x": draw(BATCH, t, d + 3)[..., 1 : d + 1], "weight": draw(d, k)}
    if bias:
        arguments["bias"] = draw(d)
    return arguments | with_context(context, t, initial_states=draw(BATCH, d, k))


def s6_arguments(t: int, context: str = "alone", d: int = 5, n: int = 3) -> dict:
    generator = torch.Generator().manual_seed(t)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    arguments = {"x": draw(BATCH, t, d), "dt": draw(BATCH, t, d).exp() / 2, "A": -draw(d, n).exp()}
    arguments |= {"B": draw(BATCH, t, n), "C": draw(BATCH, t, n), "D": draw(d)}
    return arguments | with_context(context, t, initial_state=draw(BATCH, d, n))


def ssd_arguments(t: int, context: str = "alone", h: int = 4, g: int = 2, p: int = 3, n: int = 5) -> dict:
    generator = torch.Generator().manual_seed(t)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    arguments = {"x": draw(BATCH, t, h, p), "dt": draw(BATCH, t, h).exp() / 2, "A": -draw(h).exp()}
    arguments |= {"B": draw(BATCH, t, g, n), "C": draw(BATCH, t, g, n), "D": draw(h)}
    return arguments | with_context(context, t, initial_state=draw(BATCH, h, p, n))


def with_context(context: str, t: int, **initial: torch.Tensor) -> dict:
    return {"alone": {}, "continued": initial, "packed": {"seq_idx": sequence_index(t)}}[context]


def values_and_gradients(operation, arguments: dict) -> dict[str, torch.Tensor]:
    """All outputs of `operation`, and the gradients of one random sum of them for every floating-point argument."""
    leaves = {}
    for name, value in arguments.items():
        if torch.is_tensor(value) and value.is_floating_point():
            leaves[name] = value.clone().requires_grad_()
    outputs = operation(**(arguments | leaves))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(7)
    loss = 0.0
    for output in outputs:
        weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        loss = loss + (output.double() * weights.to(output.device)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    values = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    return values | {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients)}


def assert_matches(operation, truth, arguments: dict, tolerance: float = 1e-4, **options) -> None:
    actual = values_and_gradients(lambda **tensors: operation(**tensors, **options), arguments)
    expected = values_and_gradients(truth, arguments)
    for name, value in expected.items():
        assert torch.isfinite(actual[name]).all(), name
        atol = tolerance * max(1.0, value.abs().max().item())
        torch.testing.assert_close(
            actual[name].double(),
            value.double(),
            rtol=tolerance,
            atol=atol,
            msg=lambda text, name=name: f"{name}: {text}",
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


def test_errors_name_the_argument_and_both_values():
    conv, s6, ssd = conv_arguments(5), s6_arguments(5), ssd_arguments(5)
    with pytest.raises(ValueError, match=r"weight has shape \(4, 4\), expected \(5, 4\)"):
        causal_conv1d(conv["x"], conv["weight"][:4])
    with pytest.raises(ValueError, match="activation='gelu'.*silu"):
        causal_conv1d(**conv, activation="gelu")
    with pytest.raises(ValueError, match="initial_states or seq_idx, not both"):
        causal_conv1d(**conv, initial_states=torch.zeros(BATCH, 5, 4), seq_idx=sequence_index(5))
    with pytest.raises(ValueError, match=r"B has shape \(2, 4, 3\), expected \(2, 5, 3\)"):
        selective_scan(**(s6 | {"B": s6["B"][:, 1:]}))
    with pytest.raises(ValueError, match="initial_state has shape"):
        ssd_scan(**ssd, initial_state=torch.zeros(BATCH, 4, 5, 3))
    with pytest.raises(ValueError, match="4 heads and B 3 groups"):
        ssd_scan(**(ssd | {"B": torch.zeros(BATCH, 5, 3, 5), "C": torch.zeros(BATCH, 5, 3, 5)}))
    with pytest.raises(ValueError, match="chunk_size=0"):
        ssd_scan(**ssd, chunk_size=0)


CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def fresh_dispatch(monkeypatch):
    for name, empty in (("_kernels", {}), ("_unusable", {}), ("_reported", set())):
        monkeypatch.setattr(ssm_ops, name, empty)
    for name in [name for name in sys.modules if name.partition(".")[0] in ssm_ops._PACKAGES]:
        monkeypatch.delitem(sys.modules, name)
    for name in ssm_ops._PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)


def test_unknown_backend_and_operation(monkeypatch):
    with pytest.raises(ValueError, match="operation='attention' is unknown.*ssd_scan"):
        backend_for("attention", CPU, torch.float32)
    monkeypatch.setenv("CAB_SSM_BACKEND", "cuda")
    with pytest.raises(ValueError, match="CAB_SSM_BACKEND='cuda' is unknown.*auto, torch, mamba_ssm, fla"):
        ssd_scan(**ssd_arguments(3))


@pytest.mark.parametrize("operation", ssm_ops.OPERATIONS)
def test_without_kernel_packages_everything_runs_on_torch(fresh_dispatch, operation):
    assert backend_for(operation, CPU, torch.float32) == "torch"
    assert backend_for(operation, CUDA, torch.bfloat16) == "torch"


def test_explicit_wishes_raise_when_they_cannot_be_met(monkeypatch, fresh_dispatch):
    monkeypatch.setenv("CAB_SSM_BACKEND", "mamba_ssm")
    with pytest.raises(
        ValueError, match="CAB_SSM_BACKEND=mamba_ssm can't run this selective_scan.*on cpu.*auto or torch"
    ):
        selective_scan(**s6_arguments(3))
    with pytest.raises(ImportError, match="mamba-ssm is not installed"):
        backend_for("ssd_scan", CUDA, torch.bfloat16)
    with pytest.raises(ImportError, match="causal-conv1d is not installed"):
        backend_for("causal_conv1d", CUDA, torch.bfloat16)
    with pytest.raises(ValueError, match="neither initial_state nor seq_idx"):
        backend_for("selective_scan", CUDA, torch.float32, mamba_ssm_lacks="takes neither initial_state nor seq_idx")
    with pytest.raises(ValueError, match="float64"):
        backend_for("ssd_scan", CUDA, torch.float64)
    monkeypatch.setenv("CAB_SSM_BACKEND", "fla")
    with pytest.raises(ValueError, match="has no S6 scan"):
        backend_for("selective_scan", CUDA, torch.float32, fla_lacks="it has no S6 scan")
    with pytest.raises(ImportError, match="flash-linear-attention is not installed"):
        backend_for("ssd_scan", CUDA, torch.float32)
    assert backend_for("causal_conv1d", CUDA, torch.float32) == "torch"
    monkeypatch.setenv("CAB_SSM_BACKEND", "torch")
    assert backend_for("ssd_scan", CUDA, torch.float32) == "torch"


def test_importable_kernels_are_taken_when_they_support_the_call(monkeypatch, fresh_dispatch):
    kernel = types.ModuleType("causal_conv1d")
    kernel.causal_conv1d_fn = kernel.causal_conv1d_update = print
    monkeypatch.setitem(sys.modules, "causal_conv1d", kernel)
    assert backend_for("causal_conv1d", CUDA, torch.bfloat16) == "mamba_ssm"
    assert backend_for("causal_conv1d", CUDA, torch.bfloat16, mamba_ssm_lacks="5 taps") == "torch"
    assert backend_for("causal_conv1d", CUDA, torch.float64) == "torch"
    assert backend_for("causal_conv1d", CPU, torch.float32) == "torch"


def test_a_broken_kernel_package_warns_once_and_falls_back(monkeypatch, fresh_dispatch, caplog):
    def broken_import(name):
        raise OSError(f"undefined symbol in {broken_import.__name__}")

    monkeypatch.setattr(ssm_ops.importlib, "import_module", broken_import)
    with caplog.at_level(logging.WARNING, logger=ssm_ops.logger.name):
        for _ in range(2):
            assert backend_for("selective_scan", CUDA, torch.float32) == "torch"
            assert backend_for("ssd_scan", CUDA, torch.float32) == "torch"
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "mamba-ssm is installed but broken (OSError: undefined symbol" in warnings[0]


def test_one_line_says_which_backend_runs(fresh_dispatch, caplog):
    with caplog.at_level(logging.INFO, logger=ssm_ops.logger.name):
        for _ in range(2):
            selective_scan(**s6_arguments(3))
            ssd_scan(**ssd_arguments(3))
    assert [record.message for record in caplog.records] == [
        "selective_scan runs on torch: the tensors are on cpu, the kernels need cuda.",
        "ssd_scan runs on torch: the tensors are on cpu, the kernels need cuda.",
    ]


def rows_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(1, 2)


def fake_conv(x, weight, bias=None, seq_idx=None, initial_states=None, activation=None):
    """Stands for causal_conv1d_fn: x (b, d, t), initial_states (b, d, k - 1), with the checks of its C++ code."""
    b, d, t = x.shape
    channel_last = x.stride(1) == 1 and x.stride(2) > 1
    assert x.stride(2) == 1 or x.stride(1) == 1
    assert not channel_last or (d % 8 == 0 and x.stride(0) % 8 == 0 and x.stride(2) % 8 == 0)
    assert bias is None or bias.dtype == weight.dtype
    if seq_idx is not None:
        assert channel_last and seq_idx.dtype == torch.int32 and seq_idx.is_contiguous()
    if initial_states is not None:
        assert channel_last and initial_states.dtype == x.dtype and initial_states.stride(1) == 1
        assert initial_states.shape == (b, d, weight.shape[1] - 1)
        initial_states = torch.cat([torch.full_like(initial_states[..., :1], torch.nan), initial_states], dim=-1)
    y = naive_causal_conv1d(rows_last(x), weight, bias, activation, initial_states, seq_idx)
    return rows_last(y.to(x.dtype))


def fake_conv_update(x, conv_state, weight, bias=None, activation=None):
    assert x.dtype == conv_state.dtype
    y = naive_causal_conv1d(x[:, None], weight, bias, activation, conv_state)
    conv_state.copy_(torch.cat([conv_state[..., 1:], x[..., None]], dim=-1))
    return y[:, 0].to(x.dtype)


def fake_selective_scan(u, delta, A, B, C, D=None, return_last_state=False):
    """Stands for selective_scan_fn: (b, d, t) and (b, n, t) of one dtype; no gradient through the last state."""
    assert u.dtype == delta.dtype == B.dtype == C.dtype and A.dtype == torch.float32
    assert all(tensor.stride(-1) == 1 for tensor in (u, delta, B, C))
    y, state = naive_selective_scan(rows_last(u), rows_last(delta), A, rows_last(B), rows_last(C), D)
    return rows_last(y.to(u.dtype)), state.detach().float()


def fake_state_update(state, x, dt, A, B, C, D=None, dt_bias=None):
    """Stands for selective_state_update: with heads or without, D and dt_bias needed, float32 states."""
    assert D is not None and dt_bias is not None and not dt_bias.any() and state.dtype == torch.float32
    assert dt.shape == x.shape and D.shape == dt_bias.shape == A.shape[:-1]
    if state.dim() == 4:
        assert A.stride(-1) == A.stride(-2) == dt.stride(-1) == dt_bias.stride(-1) == 0
        B, C = (tensor.repeat_interleave(x.shape[1] // B.shape[1], dim=1)[:, :, None] for tensor in (B, C))
    else:
        B, C = B[:, None], C[:, None]
    state.copy_(state * torch.exp(dt[..., None] * A) + (dt * x)[..., None] * B)
    return ((state * C).sum(-1) + D * x).to(x.dtype)


def fake_ssd(x, dt, A, B, C, chunk_size, D=None, initial_states=None, seq_idx=None, **options):
    assert options == {"dt_softplus": False, "return_final_states": True}
    assert x.dtype == B.dtype == C.dtype and dt.dtype == A.dtype == torch.float32
    assert chunk_size in (16, 32, 64, 128, 256)
    if seq_idx is not None:
        assert seq_idx.dtype == torch.int32 and not seq_idx[:, 0].any()
    y, state = naive_ssd_scan(x, dt, A, B, C, D, initial_states, seq_idx)
    return y.to(x.dtype), state.float()


def fake_gla(q, k, v, g, scale, initial_state, output_final_state):
    """Stands for chunk_simple_gla: all of h heads, states (b, h, n, p)."""
    assert scale == 1.0 and output_final_state and q.shape == k.shape and g.dtype == torch.float32
    state = None if initial_state is None else initial_state.transpose(2, 3)
    # exp(1 * g) with a unit step: fold g into the decay, token by token
    outputs, running = [], torch.zeros(*v.shape[:1], *v.shape[2:], q.shape[-1]) if state is None else state
    for token in range(q.shape[1]):
        entry = v[:, token, :, :, None].float() * k[:, token, :, None].float()
        running = running * g[:, token, :, None, None].exp() + entry
        outputs.append((running * q[:, token, :, None].float()).sum(-1))
    return torch.stack(outputs, dim=1).to(v.dtype), running.transpose(2, 3)


@pytest.fixture
def fake_kernels(monkeypatch):
    """The calls that a CUDA device would get, answered by naive code that checks what the kernels demand."""
    fakes = {"causal_conv1d_fn": fake_conv, "causal_conv1d_update": fake_conv_update}
    fakes |= {"selective_scan_fn": fake_selective_scan, "selective_state_update": fake_state_update}
    fakes |= {"mamba_chunk_scan_combined": fake_ssd, "chunk_simple_gla": fake_gla}
    monkeypatch.setattr(ssm_ops, "_kernels", fakes)
    monkeypatch.setattr(ssm_ops, "_choose_backend", lambda *arguments: "mamba_ssm")
    return fakes


@pytest.mark.parametrize("context", CONTEXTS)
def test_convolution_kernel_gets_what_it_demands(fake_kernels, context):
    assert_matches(causal_conv1d, naive_causal_conv1d, conv_arguments(7, context, d=8) | {"activation": "silu"})


def test_convolution_kernel_at_an_odd_width(fake_kernels):
    assert_matches(causal_conv1d, naive_causal_conv1d, conv_arguments(7, d=5))


def test_s6_kernel_gets_what_it_demands(fake_kernels):
    # also the gradient through the final state, which the kernel itself does not have
    assert_matches(selective_scan, naive_selective_scan, s6_arguments(40))
    low = {name: value if name in ("dt", "A") else value.bfloat16() for name, value in s6_arguments(9).items()}
    assert selective_scan(**low)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("context", CONTEXTS)
def test_ssd_kernel_gets_what_it_demands(fake_kernels, context):
    assert_matches(ssd_scan, naive_ssd_scan, ssd_arguments(20, context), chunk_size=24)
    low = {
        name: value.bfloat16() if name in ("x", "B", "D") else value
        for name, value in ssd_arguments(9, context).items()
    }
    y, state = ssd_scan(**low)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("context", ["alone", "continued"])
def test_fla_kernel_gets_what_it_demands(fake_kernels, monkeypatch, context):
    monkeypatch.setattr(ssm_ops, "_choose_backend", lambda *arguments: "fla")
    assert_matches(ssd_scan, naive_ssd_scan, ssd_arguments(20, context))


@pytest.mark.parametrize("skip", [True, False])
def test_one_step_kernels_get_what_they_demand(fake_kernels, monkeypatch, skip):
    conv = conv_arguments(1, "continued") | {"activation": "silu"}
    states = [conv.pop("initial_states").clone() for _ in range(1)]
    states.append(states[0].clone())
    x = conv.pop("x")[:, 0]
    results = [causal_conv1d_update(x, states[0], **conv)]
    for update, arguments in ((selective_scan_update, s6_arguments), (ssd_scan_update, ssd_arguments)):
        tensors = arguments(1, "continued")
        step = {name: tensors[name][:, 0] for name in ("x", "dt", "B", "C")} | {"A": tensors["A"]}
        step["D"] = tensors["D"] if skip else None
        states += [tensors["initial_state"].clone(), tensors["initial_state"].clone()]
        results.append((update, step, update(states[-2], **step)))
    monkeypatch.setattr(ssm_ops, "_choose_backend", lambda *arguments: "torch")
    torch.testing.assert_close(results[0], causal_conv1d_update(x, states[1], **conv))
    for (update, step, y), state in zip(results[1:], (states[3], states[5])):
        torch.testing.assert_close(y, update(state, **step))
    for kernel_state, torch_state in zip(states[::2], states[1::2]):
        torch.testing.assert_close(kernel_state, torch_state)


def on_cuda(arguments: dict, dtype: torch.dtype) -> dict:
    return {
        name: value.cuda() if name in ("dt", "A", "D", "seq_idx", "initial_state") else value.cuda().to(dtype)
        for name, value in arguments.items()
    }


def assert_backends_agree(monkeypatch, operation, arguments: dict, backend: str, tolerance: float) -> None:
    monkeypatch.setenv("CAB_SSM_BACKEND", "torch")
    expected = values_and_gradients(operation, arguments)
    monkeypatch.setenv("CAB_SSM_BACKEND", backend)
    actual = values_and_gradients(operation, arguments)
    for name, value in expected.items():
        error = (actual[name].float() - value.float()).norm() / value.float().norm().clamp(min=1e-6)
        assert error < tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("context", CONTEXTS)
def test_convolution_kernel_agrees_on_a_gpu(monkeypatch, context, dtype):
    pytest.importorskip("causal_conv1d")
    arguments = on_cuda(conv_arguments(70, context, d=24), dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    assert_backends_agree(monkeypatch, causal_conv1d, arguments, "mamba_ssm", tolerance)


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_s6_kernel_agrees_on_a_gpu(monkeypatch, dtype):
    pytest.importorskip("mamba_ssm")
    arguments = on_cuda(s6_arguments(70, d=24, n=16), dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    assert_backends_agree(monkeypatch, selective_scan, arguments, "mamba_ssm", tolerance)


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("context", CONTEXTS)
def test_ssd_kernel_agrees_on_a_gpu(monkeypatch, context, dtype):
    pytest.importorskip("mamba_ssm")
    arguments = on_cuda(ssd_arguments(300, context, h=4, g=2, p=32, n=16), dtype)
    # the Triton kernels multiply float32 in TF32
    assert_backends_agree(monkeypatch, ssd_scan, arguments, "mamba_ssm", 2e-2)


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("context", ["alone", "continued"])
def test_fla_agrees_on_a_gpu(monkeypatch, context):
    pytest.importorskip("fla")
    arguments = on_cuda(ssd_arguments(130, context, h=4, g=2, p=32, n=32), torch.bfloat16)
    monkeypatch.setenv("CAB_SSM_BACKEND", "torch")
    expected = ssd_scan(**arguments)
    monkeypatch.setenv("CAB_SSM_BACKEND", "fla")
    for actual, value in zip(ssd_scan(**arguments), expected):
        assert (actual.float() - value.float()).norm() / value.float().norm() < 2e-2


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_step_kernels_agree_on_a_gpu(monkeypatch, dtype):
    pytest.importorskip("mamba_ssm")
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for update, arguments in ((selective_scan_update, s6_arguments), (ssd_scan_update, ssd_arguments)):
        tensors = on_cuda(arguments(1, "continued"), dtype)
        step = {name: tensors[name][:, 0] for name in ("x", "dt", "B", "C")} | {"A": tensors["A"]}
        for skip in (tensors["D"], None):
            results, states = [], []
            for backend in ("torch", "mamba_ssm"):
                monkeypatch.setenv("CAB_SSM_BACKEND", backend)
                states.append(tensors["initial_state"].clone())
                results.append(update(states[-1], **step, D=skip))
            torch.testing.assert_close(results[1], results[0], **tolerance)
            torch.testing.assert_close(states[1], states[0], **tolerance)
