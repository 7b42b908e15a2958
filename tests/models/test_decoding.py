"""The captured step of one token: its kernels, by Triton's interpreter where there is no GPU, and when it is used."""

import copy
from contextlib import contextmanager

import pytest
import torch
from tiny_models import VARIANTS, largest_difference, random_ids, tiny_model
from transformers.generation import CompileConfig


pytest.importorskip("triton")

from cab_hf.models import attention_kernel, decode_kernels, decoding  # noqa: E402


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VARIANTS = VARIANTS | {
    "a group a head, silu": {"mixer_type": "mamba2", "n_groups": 8, "intermediate_size": 48},
    "odd sizes": {"mixer_type": "mamba2", "n_groups": 3, "head_dim": 10, "expand": 30 / 32, "state_size": 11},
}


def steps(model, cache, ids, mask=None, positions=None):
    """Logits `(b, t, V)` of tokens `(b, t)`, each by the captured step's own code."""
    states = decoding.states_of(cache, len(model.backbone.layers))
    table = torch.tensor([one.data_ptr() for one in states], device=ids.device)
    logits = []
    for t in range(ids.shape[1]):
        real = torch.ones(len(ids), dtype=torch.int8, device=ids.device) if mask is None else mask[:, t].to(torch.int8)
        place = torch.full_like(ids[:, :1], 0 if positions is None else positions + t)
        logits.append(decoding.step_logits(model, ids[:, t : t + 1], place, table, real))
    return torch.stack(logits, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_kernels_step_is_the_models(variant, rows, monkeypatch):
    monkeypatch.setenv("CAB_SSM_BACKEND", "torch")
    model = tiny_model(**VARIANTS[variant]).to(DEVICE)
    ids = random_ids(rows, 12).to(DEVICE)
    ours, theirs = (model(ids[:, :7], use_cache=True).cache for _ in range(2))
    got = steps(model, ours, ids[:, 7:10], positions=7)
    mask = torch.ones_like(ids)
    right = [model(ids[:, t : t + 1], cache=theirs, attention_mask=mask[:, : t + 1]).logits for t in range(7, 10)]
    assert largest_difference(got, torch.cat(right, dim=1)) < 1e-4
    for one, other in zip(*(decoding.states_of(cache, 2) for cache in (ours, theirs))):
        assert largest_difference(one, other) < 1e-5
    # a longer piece goes on behind these steps
    got, right = (model(ids[:, 10:], cache=cache, attention_mask=mask).logits for cache in (ours, theirs))
    assert largest_difference(got, right) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("rows", [2, 16, 19])
@pytest.mark.parametrize("norm", [None, torch.nn.RMSNorm, torch.nn.LayerNorm])
def test_few_rows_are_projected_by_one_kernel(norm, rows):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter multiplies no bfloat16
    for width, features in ((64, 33), (576, 40)):
        linear = torch.nn.Linear(width, features, bias=rows == 2).to(DEVICE, dtype)
        gate = torch.nn.Linear(width, features, bias=False).to(DEVICE, dtype)
        normed = torch.nn.Identity() if norm is None else norm(width, eps=1e-5).to(DEVICE, dtype)
        x = torch.randn(rows, width + 7).to(DEVICE, dtype)[:, :width]
        residual = torch.randn(rows, features).to(DEVICE, dtype)
        given = normed if norm else None
        got = decode_kernels.linear(x, linear, given, residual=residual)
        right = residual + linear(normed(x))
        assert largest_difference(got, right) < 0.01 * right.abs().max()
        got = decode_kernels.linear(x, linear, given, gate=gate)
        right = torch.nn.functional.silu(gate(normed(x))) * linear(normed(x))
        assert largest_difference(got, right) < 0.01 * right.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("shape", [(2, 3, 3, 16, 16, 256), (1, 2, 1, 24, 40, 384), (3, 1, 5, 8, 8, 100)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_attention_in_pieces_is_attention(dtype, shape):
    torch.manual_seed(0)
    rows, heads, queries, width, out_width, length = shape
    query = torch.randn(rows, heads, queries, width)
    key, value = torch.randn(rows, heads, length, width), torch.randn(rows, heads, length, out_width)
    given = [one.to(DEVICE, dtype) for one in (query, key, value)]
    at = torch.arange(length, device=DEVICE)
    for mask in (torch.rand(rows, length, device=DEVICE) < 0.5, (at < 7).expand(rows, -1), (at >= length - 3)[None]):
        mask = mask[:, None, None]
        got = attention_kernel.attend(*given, mask, width**-0.5)
        right = torch.nn.functional.scaled_dot_product_attention(*map(torch.Tensor.float, given), attn_mask=mask)
        assert largest_difference(got.float(), right) < (1e-5 if dtype == torch.float32 else 5e-3)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["a group a head, silu", "ssd 2 groups, gated mlp", "s6"])
def test_padding_leaves_a_rows_states_alone(variant, monkeypatch):
    monkeypatch.setenv("CAB_SSM_BACKEND", "torch")
    model, ids = tiny_model(**VARIANTS[variant]).to(DEVICE), random_ids(2, 9).to(DEVICE)
    cache = model(ids[:, :7], use_cache=True).cache
    before = [state.clone() for state in decoding.states_of(cache, 2)]
    steps(model, cache, ids[:, 7:8], mask=torch.tensor([[1], [0]], device=DEVICE))
    for was, now in zip(before, decoding.states_of(cache, 2)):
        assert torch.equal(was[1], now[1]) and not torch.equal(was[0], now[0])


def uncaptured(model, input_ids, attention_mask, position_ids, cache):
    """What `one_token` gives, by the same code without a graph."""
    states = decoding.states_of(cache, len(model.backbone.layers))
    if states is None:
        return None
    table = torch.tensor([one.data_ptr() for one in states], device=input_ids.device)
    real = torch.ones_like(input_ids[:, 0]) if attention_mask is None else attention_mask[:, -1] != 0
    return decoding.step_logits(model, input_ids, position_ids, table, real.to(torch.int8))[:, None]


@torch.no_grad()
@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("variant", ["s6", "ssd 2 groups, gated mlp"])
def test_generate_goes_through_the_step(variant, way, monkeypatch):
    if DEVICE == "cuda" and "cache_implementation" in way:
        pytest.skip("a GPU compiles the step, as the torch backend can't be captured")
    monkeypatch.setenv("CAB_SSM_BACKEND", "torch")
    model, prompt = tiny_model(**VARIANTS[variant]).to(DEVICE), random_ids(2, 7).to(DEVICE)
    left = torch.ones_like(prompt)
    left[0, :3] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **way}
    masks = (torch.ones_like(prompt), left)
    right = [model.generate(prompt, attention_mask=mask, **options) for mask in masks]
    calls = []
    monkeypatch.setattr(
        "cab_hf.models.modeling_cab_mamba.one_token", lambda *given: calls.append(1) or uncaptured(*given)
    )
    for mask, tokens in zip(masks, right):
        assert torch.equal(model.generate(prompt, attention_mask=mask, **options), tokens)
    assert len(calls) == 8  # four tokens behind each prompt


def test_a_static_cache_compiles_no_step_that_is_captured(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    for captured in (True, False):
        monkeypatch.setattr("cab_hf.models.modeling_cab_mamba.captures", lambda model, captured=captured: captured)
        assert (model.get_compiled_call(None) == model.__call__) is captured
    monkeypatch.setattr("cab_hf.models.modeling_cab_mamba.captures", lambda model: True)
    assert model.get_compiled_call(CompileConfig(mode="default")) != model.__call__  # asked for, so compiled


def with_another_parameter(model):
    model.backbone.norm_f.weight = torch.nn.Parameter(model.backbone.norm_f.weight.clone())


def with_another_module(model):
    model.backbone.layers[0].mixer.out_proj = copy.deepcopy(model.backbone.layers[0].mixer.out_proj)


def rebound(model):
    model.backbone.layers[1].mixer.A_log.data = model.backbone.layers[1].mixer.A_log.data.clone()


def doubled(model):
    model.double()


def with_a_bias(model):
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(99))


def hooked(model):
    model.backbone.layers[0].mixer.in_proj.register_forward_hook(lambda module, given, output: output)


@pytest.mark.parametrize(
    "change", [with_another_parameter, with_another_module, rebound, doubled, with_a_bias, hooked]
)
def test_what_no_longer_is_the_captured_model_is_told(change):
    model = tiny_model(mixer_type="mamba2")
    watch = decoding.Watch(model)
    with torch.no_grad():  # what changes in place is read anew
        model.load_state_dict({name: 0.5 * value for name, value in model.state_dict().items()})
        model.lm_head.weight.mul_(2)
    hook = torch.nn.Linear(1, 1).register_forward_hook(print)  # of another model
    assert watch.holds()
    hook.remove()
    change(model)
    assert not watch.holds()


def test_a_hook_that_is_gone_hinders_no_more():
    model = tiny_model(mixer_type="mamba2")
    hook = model.backbone.layers[0].mlp or model.backbone.layers[0].mixer
    hook = hook.register_forward_pre_hook(lambda module, given: None)
    watch = decoding.Watch(model)
    assert watch.hooked and watch.holds()
    hook.remove()
    assert not watch.holds() and decoding.Watch(model).holds()


@pytest.mark.filterwarnings("default::FutureWarning")  # peft's own
def test_adapters_that_are_switched_are_told():
    peft = pytest.importorskip("peft")
    model = tiny_model(mixer_type="mamba2")
    before = decoding.Watch(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["in_proj", "out_proj"], r=4)).eval()
    assert not before.holds()
    watch = decoding.Watch(model)
    assert watch.holds()
    with adapted.disable_adapter():
        assert not watch.holds()
    assert watch.holds()
    adapted.merge_adapter()
    assert not watch.holds()


def test_a_failed_capture_leaves_the_stream_and_says_what_failed_first(monkeypatch):
    stream, ended = ["before"], []

    class Stays:
        """As `torch.cuda.graph` does where what it captured failed."""

        def __init__(self, graph, pool, capture_error_mode):
            self.pool = pool

        def __enter__(self):
            stream[0] = "capture"

        def __exit__(self, *error):
            raise RuntimeError("operation failed due to a previous error during capture")

    @contextmanager
    def on(wanted):
        before, stream[0] = stream[0], wanted
        try:
            yield
        finally:
            stream[0] = before

    monkeypatch.setattr(torch.cuda, "graph", Stays)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream[0])
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *given: ended.append(given), raising=False)
    monkeypatch.setattr(decoding, "_failed", [])
    with pytest.raises(ValueError, match="the first"), decoding.capturing("graph"):
        raise ValueError("the first")
    with pytest.raises(RuntimeError, match="previous error"), decoding.capturing("graph"):
        pass
    assert stream == ["before"] and ended == [(3, (0, 7))] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_after_a_failed_capture_another_one_succeeds():
    stream, x = torch.cuda.current_stream(), torch.ones(8, device=DEVICE)
    with pytest.raises(RuntimeError, match="captur"), decoding.capturing(torch.cuda.CUDAGraph()):
        x.sum().item()
    assert torch.cuda.current_stream() == stream
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with decoding.capturing(graph):
        y = x + torch.ones_like(x)
    graph.replay()
    assert y.tolist() == [2.0] * 8 and torch.rand(8, device=DEVICE).sum() > 0


@torch.no_grad()
def test_only_what_is_known_is_captured(monkeypatch):
    class Custom(torch.nn.Linear):
        pass

    model = tiny_model(mixer_type="mamba2")
    assert "is on cpu" in decoding._obstacle(model)
    model.lm_head = Custom(32, 99)
    assert "lm_head is a Custom" in decoding._obstacle(model)
    cache = model(random_ids(1, 3), use_cache=True).cache
    assert decoding.one_token(model, random_ids(1, 1), None, None, cache) is None
    assert decoding.states_of(type(cache)(config=model.config), 2) is None
    for name, value in ((decoding.DECODE_VARIABLE, "eager"), ("CAB_SSM_BACKEND", "torch")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert not decoding.captures(tiny_model(mixer_type="mamba2"))
    again = copy.deepcopy(model)
    decoding.release_graphs(again)
