"""On a CUDA device: tokens from captured steps are those of eager ones, whatever happens to the model in between."""

import copy
import gc
import weakref

import pytest
import torch
from tiny_models import VARIANTS, largest_difference, random_ids, tiny_model

from cab_hf.models import decoding


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SETTINGS = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.7},
    "beams": {"do_sample": False, "num_beams": 3},
    "rows of a prompt": {"do_sample": True, "num_return_sequences": 3},
    "static": {"do_sample": False, "cache_implementation": "static"},
    "pieces": {"do_sample": False, "prefill_chunk_size": 4},
}


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.no_grad():
        yield
    torch.backends.cuda.matmul.allow_tf32 = before


def cuda_model(variant="ssd 4 groups, linear conv", **options):
    return tiny_model(**(VARIANTS[variant] | options)).cuda()


def ids(rows, length, seed=0):
    return random_ids(rows, length, seed=seed).cuda()


def steps(model, cache, tokens, **options):
    """Logits `(b, t, V)`, token by token."""
    one = (model(tokens[:, t : t + 1], cache=cache, **options).logits for t in range(tokens.shape[1]))
    return torch.cat(list(one), dim=1)


def eager_steps(model, tokens, start, **options):
    """Logits `(b, t - start, V)` of eager steps behind `start` tokens: kernels of whole rows multiply in tf32."""
    cache = model(tokens[:, :start], use_cache=True).cache
    return eagerly(steps, model, cache, tokens[:, start:], **options)


def eagerly(function, *given, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(decoding.DECODE_VARIABLE, "eager")
        return function(*given, **options)


def graphs(model):
    held = decoding._steps.get(model)
    return [] if held is None else list(held.steps)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_captured_steps_are_eager_steps(variant, rows):
    model, tokens = cuda_model(variant), ids(rows, 14)
    positions = {"position_ids": torch.tensor([[8]], device="cuda")} if model.config.max_position_embeddings else {}
    ours, theirs = (model(tokens[:, :8], use_cache=True).cache for _ in range(2))
    got = steps(model, ours, tokens[:, 8:12], **positions)
    assert graphs(model) == [rows]
    assert largest_difference(got, eagerly(steps, model, theirs, tokens[:, 8:12], **positions)) < 1e-4
    for one, other in zip(*(decoding.states_of(cache, 2) for cache in (ours, theirs))):
        assert largest_difference(one, other) < 1e-4
    mask = torch.ones_like(tokens)
    # a longer piece goes on behind these steps; Triton's float32 products are tf32
    got, right = (model(tokens[:, 12:], cache=cache, attention_mask=mask).logits for cache in (ours, theirs))
    assert (got - right).norm() < 3e-3 * right.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["s6", "ssd 4 groups, linear conv", "ssd 2 groups, gated mlp"])
@pytest.mark.parametrize("rows", [1, 2, 40, 70])
def test_captured_steps_in_half_precision(rows, variant, dtype):
    model, tokens = cuda_model(variant), ids(rows, 24)
    exact = model(tokens).logits[:, 8:]
    half = cuda_model(variant)
    for name, parameter in half.named_parameters():
        if not any(kept in name for kept in half._keep_in_fp32_modules_strict):
            parameter.data = parameter.data.to(dtype)
    errors = []
    for way in (lambda f, *given: f(*given), eagerly):
        cache = half(tokens[:, :8], use_cache=True).cache
        got = way(steps, half, cache, tokens[:, 8:]).float()
        errors.append(((got - exact).norm() / exact.norm()).item())
    assert graphs(half) and errors[0] < 1.5 * errors[1] + 1e-3


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", ["s6", "ssd 2 groups, gated mlp", "ssd parallel, shared norm"])
def test_generate_gives_the_eager_tokens(variant, way):
    model, prompt = cuda_model(variant), ids(2, 9)
    left = torch.ones_like(prompt)
    left[0, :4] = 0
    for mask in (torch.ones_like(prompt), left):
        torch.manual_seed(0)
        got = model.generate(prompt, attention_mask=mask, **SETTINGS, **WAYS[way])
        torch.manual_seed(0)
        options = {name: value for name, value in WAYS[way].items() if name != "cache_implementation"}
        assert torch.equal(got, eagerly(model.generate, prompt, attention_mask=mask, **SETTINGS, **options))
    assert graphs(model)


def test_a_conversation_goes_on_with_its_cache():
    model, whole = cuda_model(), ids(1, 20)
    first = model.generate(whole[:, :7], **SETTINGS, do_sample=False, return_dict_in_generate=True)
    more = torch.cat([first.sequences, ids(1, 3, seed=5)], dim=1)
    got = model.generate(more, cache=first.cache, **SETTINGS, do_sample=False)
    assert torch.equal(got, eagerly(model.generate, more, **SETTINGS, do_sample=False))


def test_caches_take_turns_are_copied_and_start_anew():
    model, tokens = cuda_model(), ids(3, 16)
    caches = [model(tokens[row : row + 1, :6], use_cache=True).cache for row in range(3)]
    got = [[] for _ in range(3)]
    for t in range(6, 14):
        if t == 9:
            caches[1] = copy.deepcopy(caches[1])
        for row, cache in enumerate(caches):
            got[row].append(model(tokens[row : row + 1, t : t + 1], cache=cache).logits)
    for row in range(3):
        right = eager_steps(model, tokens[row : row + 1, :14], 6)
        assert largest_difference(torch.cat(got[row], dim=1), right) < 1e-4
    caches[0].reset()
    again = [model(tokens[:1, t : t + 1], cache=caches[0]).logits for t in range(5)]
    right = model(tokens[:1, :5]).logits
    assert (torch.cat(again, dim=1) - right).norm() < 3e-3 * right.norm()
    assert graphs(model) == [1]


def halved(model):
    model.lm_head.weight.mul_(0.5)


def loaded(model):
    model.load_state_dict({name: 0.9 * value for name, value in model.state_dict().items()})


def rebound(model):
    model.backbone.layers[0].mixer.in_proj.weight.data = 0.9 * model.backbone.layers[0].mixer.in_proj.weight.data


def replaced(model):
    model.backbone.layers[1].mixer.out_proj = copy.deepcopy(model.backbone.layers[1].mixer.out_proj)
    model.backbone.layers[1].mixer.out_proj.weight.mul_(0.9)


def with_another_parameter(model):
    model.backbone.norm_f.weight = torch.nn.Parameter(0.9 * model.backbone.norm_f.weight)


def hooked(model):
    model.backbone.layers[0].mixer.out_proj.register_forward_hook(lambda module, given, output: 0.5 * output)


def doubled(model):
    model.double()


@pytest.mark.parametrize("change", [halved, loaded, rebound, replaced, with_another_parameter, hooked, doubled])
def test_no_graph_is_of_an_older_model(change):
    model, tokens = cuda_model(tie_word_embeddings=False), ids(1, 12)
    caches = [model(tokens[:, :6], use_cache=True).cache for _ in range(2)]
    for cache in caches:
        steps(model, cache, tokens[:, 6:8])
    change(model)
    if change is doubled:
        caches = [model(tokens[:, :8], use_cache=True).cache for _ in range(2)]
    got = steps(model, caches[0], tokens[:, 8:])
    right = eagerly(steps, model, caches[1], tokens[:, 8:])
    assert got.dtype == right.dtype and largest_difference(got, right) < 1e-4


@pytest.mark.filterwarnings("default::FutureWarning")  # peft's own
def test_adapters():
    peft = pytest.importorskip("peft")
    model, tokens = cuda_model(), ids(1, 12)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["in_proj", "out_proj"], r=4)).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    on = eager_steps(adapted, tokens, 6)
    with adapted.disable_adapter():
        off = eager_steps(adapted, tokens, 6)
    assert largest_difference(on, off) > 1e-2
    cache = adapted(tokens[:, :6], use_cache=True).cache
    assert largest_difference(steps(adapted, cache, tokens[:, 6:8]), on[:, :2]) < 1e-4
    assert graphs(model) == [1]
    with adapted.disable_adapter():
        cache = adapted(tokens[:, :6], use_cache=True).cache
        assert largest_difference(steps(adapted, cache, tokens[:, 6:]), off) < 1e-4
    assert torch.equal(
        adapted.generate(input_ids=tokens, **SETTINGS, do_sample=False),
        eagerly(adapted.generate, input_ids=tokens, **SETTINGS, do_sample=False),
    )
    merged = adapted.merge_and_unload()
    cache = merged(tokens[:, :6], use_cache=True).cache
    assert largest_difference(steps(merged, cache, tokens[:, 6:]), on) < 1e-4


def test_graphs_are_few_and_go_with_their_model():
    model = cuda_model()
    for rows in range(1, decoding.MOST_GRAPHS + 3):
        cache = model(ids(rows, 5), use_cache=True).cache
        steps(model, cache, ids(rows, 2))
    assert graphs(model) == list(range(3, decoding.MOST_GRAPHS + 3))
    again = copy.deepcopy(model)
    assert graphs(again) == []
    decoding.release_graphs(model)
    assert graphs(model) == []
    steps(model, model(ids(1, 5), use_cache=True).cache, ids(1, 2))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_what_can_not_be_captured_runs_eagerly(monkeypatch):
    model, tokens = cuda_model(), ids(1, 12)
    right = eager_steps(model, tokens, 6)
    told = []

    def waits_for_the_device(*given):
        return given[1].sum().item()

    monkeypatch.setattr(decoding, "step_logits", waits_for_the_device)
    monkeypatch.setattr(decoding.logger, "warning", told.append)
    cache = model(tokens[:, :6], use_cache=True).cache
    assert largest_difference(steps(model, cache, tokens[:, 6:]), right) < 1e-4
    assert graphs(model) == [] and len(told) == 1 and "can't be captured" in told[0]


def test_what_else_is_asked_runs_eagerly():
    model, tokens = cuda_model(), ids(1, 9)
    cache = model(tokens[:, :6], use_cache=True).cache
    output = model(tokens[:, 6:7], cache=cache, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    with torch.enable_grad():
        assert model(tokens[:, 7:8], cache=cache).logits.requires_grad
    with torch.autocast("cuda", torch.bfloat16):
        assert model(tokens[:, 8:9], cache=cache).logits.dtype == torch.bfloat16
    assert graphs(model) == []
    with torch.inference_mode():
        cache = model(tokens[:, :6], use_cache=True).cache
        got = steps(model, cache, tokens[:, 6:])
    assert graphs(model) == [1] and largest_difference(got, eager_steps(model, tokens, 6)) < 1e-4


def test_threads_share_a_model():
    from concurrent.futures import ThreadPoolExecutor

    model, prompts = cuda_model(), [ids(1, 7, seed=seed) for seed in range(4)]
    right = [eagerly(model.generate, one, **SETTINGS, do_sample=False) for one in prompts]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda one: model.generate(one, **SETTINGS, do_sample=False), prompts))
    assert all(torch.equal(one, other) for one, other in zip(got, right))
