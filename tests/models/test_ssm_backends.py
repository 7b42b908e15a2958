"""The choice of a backend for the state-space operations, what kernels are given, and what they give on a GPU."""

import logging
import sys
import types

import pytest
import torch
from reference import naive_causal_conv1d, naive_selective_scan, naive_ssd_scan
from tiny_ssm import (
    CONTEXTS,
    assert_matches,
    conv_arguments,
    default_backend,  # noqa: F401, of every test here
    s6_arguments,
    ssd_arguments,
    values_and_gradients,
)

from cab_hf.models import ssm_kernels
from cab_hf.models.ssm_kernels import backend_for
from cab_hf.models.ssm_ops import (
    causal_conv1d,
    causal_conv1d_update,
    selective_scan,
    selective_scan_update,
    ssd_scan,
    ssd_scan_update,
)


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def fresh_dispatch(monkeypatch):
    for name, empty in (("_kernels", {}), ("_unusable", {}), ("_reported", set())):
        monkeypatch.setattr(ssm_kernels, name, empty)
    for name in [name for name in sys.modules if name.partition(".")[0] in ssm_kernels._PACKAGES]:
        monkeypatch.delitem(sys.modules, name)
    for name in ssm_kernels._PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)


def test_unknown_backend(monkeypatch):
    monkeypatch.setenv("CAB_SSM_BACKEND", "cuda")
    with pytest.raises(ValueError, match="CAB_SSM_BACKEND='cuda' is unknown.*auto, torch, mamba_ssm, fla"):
        ssd_scan(**ssd_arguments(3))


@pytest.mark.parametrize("operation", ssm_kernels.OPERATIONS)
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

    monkeypatch.setattr(ssm_kernels.importlib, "import_module", broken_import)
    with caplog.at_level(logging.WARNING, logger=ssm_kernels.logger.name):
        for _ in range(2):
            assert backend_for("selective_scan", CUDA, torch.float32) == "torch"
            assert backend_for("ssd_scan", CUDA, torch.float32) == "torch"
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "mamba-ssm is installed but broken (OSError: undefined symbol" in warnings[0]


def test_one_line_says_which_backend_runs(fresh_dispatch, caplog):
    with caplog.at_level(logging.INFO, logger=ssm_kernels.logger.name):
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
    monkeypatch.setattr(ssm_kernels, "_kernels", fakes)
    monkeypatch.setattr(ssm_kernels, "_choose_backend", lambda *arguments: "mamba_ssm")
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
    monkeypatch.setattr(ssm_kernels, "_choose_backend", lambda *arguments: "fla")
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
    monkeypatch.setattr(ssm_kernels, "_choose_backend", lambda *arguments: "torch")
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
