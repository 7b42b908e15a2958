"""A hybrid's captured token: what lives in it, who moves in and out, and when it is used; without a graph on a CPU."""

import contextlib
import copy
import logging
from collections import Counter

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache
from transformers.models.llama import modeling_llama


pytest.importorskip("triton")

from cab_hf.evaluation.tiny_families import tiny_model, tiny_tokens  # noqa: E402
from cab_hf.models import decode_kernels, decoding, fewer_kernels, hybrid_decoding, mixers  # noqa: E402
from cab_hf.transfer.hybrid import hybrid_from_teacher  # noqa: E402


GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
FAMILIES = ["llama", "gemma2", "gpt_oss", "mixtral", "cohere2", "gpt2", "opt", "phi3", "gpt_neox"]


class Rerun:
    """In a graph's place: the same function, run anew."""

    count = 0

    def __init__(self, run, device):
        run()
        run()
        self.run = run

    def follow(self):
        pass

    def replay(self):
        Rerun.count += 1
        return self.run()


@pytest.fixture(autouse=True)
def without_a_device(monkeypatch):
    monkeypatch.setenv("CAB_SSM_BACKEND", "auto")
    monkeypatch.setattr(hybrid_decoding, "Graph", Rerun)
    monkeypatch.setattr(hybrid_decoding, "is_captured_on", lambda device: True)
    monkeypatch.setattr(decoding.ModelSteps, "alone", lambda steps, device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    obstacle = hybrid_decoding.part_obstacle
    monkeypatch.setattr(
        hybrid_decoding, "part_obstacle", lambda *given: said if "is on cpu" not in (said := obstacle(*given)) else ""
    )
    Rerun.count = 0
    with torch.no_grad():
        yield


def by_torch(step, adapter, hidden_states):
    """What the kernels do, by the mixer itself: `test_decoding.py` compares them, and Triton's interpreter is slow."""
    room = step.layers[adapter.cache_layer]
    room.has_previous_state = room.is_conv_states_initialized = room.is_recurrent_states_initialized = {0: True}
    room.conv_kernel_size = {0: room.conv_states[0].shape[-1]}
    cache = Cache(layers=step.layers)
    return adapter.mixer(hidden_states, cache=cache, attention_mask=step.real[:, None])[0]


class AsItIs:
    """In the place of kernels that Triton's interpreter is slow to run."""

    def __init__(self, inner):
        self.a_pass = contextlib.nullcontext


def kept_by_torch(held, new, places):
    for one, tensor in zip(held, new, strict=True):
        one[torch.arange(len(places)), :, places] = tensor[:, :, 0]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(hybrid_decoding.HybridStep, "mix", by_torch)
    monkeypatch.setattr(hybrid_decoding, "FewerKernels", AsItIs)
    monkeypatch.setattr(hybrid_decoding, "keep", kept_by_torch)


def hybrid(family="llama", kept=(1, 3), window=0):
    options = {"accept_inexact": 1.0, "attention_window": window, "attention_sinks": 2}
    return hybrid_from_teacher(tiny_model(family), keep_attention=list(kept), **options).eval()


def eagerly(function, *given, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(decoding.DECODE_VARIABLE, "eager")
        return function(*given, **options)


def sizes(student):
    held = decoding._steps.get(student.inner)
    return [] if held is None else list(held.steps)


@pytest.mark.parametrize(
    ("family", "window", "norms", "products", "in_groups"),
    [("llama", 0, 9, 17, 13), ("qwen3", 0, 13, 17, 13), ("llama", 5, 9, 25, 15)],  # qwen3 norms every head, too
)
def test_the_kernels_give_the_modules_tokens(family, window, norms, products, in_groups, monkeypatch):
    monkeypatch.setattr(decode_kernels, "_LINEAR_PROGRAMS", 1)  # each of which takes an interpreter a millisecond
    student, tokens, called = hybrid(family, (1, 3), window), tiny_tokens()[:1], Counter()
    for name in ("attend", "rms_normed", "rotate", "linear", "linears", "keep"):
        module = hybrid_decoding if name == "keep" else fewer_kernels
        kernel = getattr(module, name)

        def noted(*given, name=name, kernel=kernel, **options):
            called[name] += 1
            return kernel(*given, **options)

        monkeypatch.setattr(module, name, noted)
    got = student.generate(tokens, **GREEDY | {"max_new_tokens": 4})
    assert Rerun.count and not decoding._steps[student.inner].obstacle
    assert not any("forward" in vars(module) for module in student.modules())
    assert not hasattr(modeling_llama.apply_rotary_pos_emb, "func")
    passes, attending = Rerun.count + 2, 4 if window else 2
    each = {"attend": attending, "rotate": attending, "rms_normed": norms, "linear": 4, "keep": 2 if window else 0}
    assert {name: called[name] for name in each} == {name: passes * count for name, count in each.items()}
    assert called["linears"] == products + (passes - 1) * in_groups  # the first pass shows what belongs together
    assert torch.equal(got, eagerly(student.generate, tokens, **GREEDY | {"max_new_tokens": 4}))


@pytest.mark.parametrize(("kept", "window"), [((), 0), ((1, 3), 0), ((1,), 5)])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_goes_through_the_step_and_gives_the_same(family, kept, window, quick):
    student, tokens = hybrid(family, kept, window), tiny_tokens()
    left = torch.ones_like(tokens)
    left[0, :4] = 0
    for ways in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        for mask in (torch.ones_like(tokens), left):
            Rerun.count = 0
            got = student.generate(tokens, attention_mask=mask, **GREEDY, **ways)
            assert Rerun.count >= 4, sizes(student)
            ways.pop("cache_implementation", None)
            assert torch.equal(got, eagerly(student.generate, tokens, attention_mask=mask, **GREEDY, **ways))
    assert sorted(sizes(student)) == [(2, 256), (6, 256)]
    assert not decoding._steps[student.inner].obstacle


def logits_of(student, tokens, cache):
    parts = [student(tokens[:, t : t + 1], cache=cache).logits for t in range(tokens.shape[1])]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_caches_take_turns_and_keep_what_they_read(family, quick):
    student, tokens = hybrid(family), tiny_tokens()
    whole = [eagerly(student, ids).logits[:, 6:] for ids in (tokens, tokens.flip(1))]
    caches = [DynamicCache(config=student.config) for _ in range(2)]
    for ids, cache in zip((tokens, tokens.flip(1)), caches):
        student(ids[:, :6], cache=cache)
    got = ([], [])
    for t in range(6, 9):
        for ids, cache, logits in zip((tokens, tokens.flip(1)), caches, got):
            logits.append(logits_of(student, ids[:, t : t + 1], cache))
    assert Rerun.count == 6 and len(sizes(student)) == 1
    twin = copy.deepcopy(caches[0])
    # several tokens at once leave the graph's place, and single ones come back to it
    for ids, cache, logits in zip((tokens, tokens.flip(1)), caches, got):
        logits.append(student(ids[:, 9:11], cache=cache).logits)
        logits.append(logits_of(student, ids[:, 11:], cache))
    assert Rerun.count == 8
    for logits, right in zip(got, whole):
        torch.testing.assert_close(torch.cat(logits, 1), right, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits_of(student, tokens[:, 9:], twin), whole[0][:, 3:], rtol=1e-4, atol=1e-4)
    assert [cache.get_seq_length() for cache in (*caches, twin)] == [12, 12, 12]


def test_a_longer_row_moves_to_more_room_and_few_graphs_are_kept(quick):
    student, tokens = hybrid(), tiny_tokens()
    cache = DynamicCache(config=student.config)
    student(tokens.repeat(1, 22)[:, :254], cache=cache)
    right = copy.deepcopy(cache)
    more = tokens[:, :6]
    torch.testing.assert_close(logits_of(student, more, cache), eagerly(logits_of, student, more, right))
    assert sizes(student) == [(2, 256), (2, 384)] and cache.layers[1].keys.shape[2] == 260
    for rows in range(3, 7):
        logits_of(student, tokens[:1, :2].expand(rows, 2), student(tokens[:1, :5].expand(rows, 5)).cache)
    assert sizes(student) == [(rows, 256) for rows in range(3, 7)]
    decoding.release_graphs(student)
    assert not sizes(student)


def test_what_is_asked_beside_logits_runs_eagerly(quick):
    student, tokens = hybrid(), tiny_tokens()
    token = {"input_ids": tokens[:, :1], "cache": student(tokens).cache}
    assert student(**token, output_hidden_states=True).hidden_states is not None
    assert student(**token, labels=tokens[:, :1]).loss is not None
    assert len(student(**token, output_projections=True).projections) == 2
    assert not isinstance(student(**token, return_dict=False), dict)
    student(**token, attention_mask=torch.ones(2, 17, dtype=torch.long))  # positions are the model's to count
    with torch.enable_grad():
        assert student(**token).logits.requires_grad
    student.train()
    student(**token)
    student.eval()
    assert not sizes(student) and Rerun.count == 0
    student(**token)
    assert sizes(student) == [(2, 256)], decoding._steps[student.inner].obstacle


def test_a_step_that_gives_something_else_is_not_used(monkeypatch, caplog):
    student, tokens = hybrid(), tiny_tokens()
    right = eagerly(student.generate, tokens, **GREEDY)
    monkeypatch.setattr(hybrid_decoding.HybridStep, "mix", lambda *given: 1.5 * by_torch(*given))
    with caplog.at_level(logging.WARNING, "transformers"):
        logging.getLogger("transformers").propagate = True
        assert torch.equal(student.generate(tokens, **GREEDY), right)
    assert "of the largest logit away" in decoding._steps[student.inner].obstacle and not sizes(student)


def test_a_model_that_changes_is_captured_again(quick):
    student, tokens = hybrid(), tiny_tokens()
    student.generate(tokens, **GREEDY)
    first = decoding._steps[student.inner]
    student.generate(tokens, **GREEDY)
    assert decoding._steps[student.inner] is first
    student.mixer_list[0].in_proj.weight = torch.nn.Parameter(2 * student.mixer_list[0].in_proj.weight)
    got = student.generate(tokens, **GREEDY)
    assert decoding._steps[student.inner] is not first
    assert torch.equal(got, eagerly(student.generate, tokens, **GREEDY))
    hook = student.mixer_list[1].in_proj.register_forward_hook(lambda module, given, output: 0.5 * output)
    hooked = student.generate(tokens, **GREEDY)
    assert not sizes(student) and torch.equal(hooked, eagerly(student.generate, tokens, **GREEDY))
    hook.remove()
    student.generate(tokens, **GREEDY)
    assert sizes(student)


def test_another_attention_is_captured_anew(quick):
    student, tokens = hybrid(), tiny_tokens()
    student.generate(tokens, **GREEDY)
    first = decoding._steps[student.inner]
    student.set_attn_implementation("eager")
    student.generate(tokens, **GREEDY)
    assert decoding._steps[student.inner] is not first and sizes(student)


@pytest.mark.filterwarnings("default::FutureWarning")  # peft's own
def test_adapters_are_switched_within_one_call_of_generate(quick):
    peft = pytest.importorskip("peft")
    student, tokens, seen = hybrid(), tiny_tokens(), []
    settings = peft.LoraConfig(target_modules=["in_proj", "up_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(student, settings).eval()

    def contrast(ids, scores):
        with adapted.disable_adapter():
            student(tokens[:, :1], cache=student(tokens).cache)
        seen.append(decoding._steps[student.inner])
        return scores

    adapted.generate(input_ids=tokens, **GREEDY, logits_processor=[contrast])
    assert len(set(map(id, seen))) == len(seen) == 6


def test_the_older_name_of_the_cache_is_captured_too(quick):
    student, tokens = hybrid(), tiny_tokens()
    cache = student(tokens, use_cache=True).past_key_values
    right = eagerly(student, tokens[:, :1], past_key_values=copy.deepcopy(cache)).logits
    got = student(tokens[:, :1], past_key_values=cache)
    torch.testing.assert_close(got.logits, right)
    student(tokens[:, :1], past_key_values=got.past_key_values)
    assert sizes(student) == [(2, 256)] and cache.get_seq_length() == tokens.shape[1] + 2


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_a_row_that_overflows_leaves_nothing_to_later_ones(family, quick):
    student, tokens = hybrid(family), tiny_tokens()
    student.set_attn_implementation("eager")
    broken, cache = student(tokens, use_cache=True).cache, student(tokens[:, :4], use_cache=True).cache
    student(tokens[:, :1], cache=copy.deepcopy(cache))
    right = eagerly(student, tokens[:, :1], cache=copy.deepcopy(cache)).logits
    for name in ("keys", "values"):
        getattr(broken.layers[1], name)[:, :, 6:] = float("inf")
    assert not student(tokens[:, :1], cache=broken).logits.isfinite().any()
    torch.testing.assert_close(student(tokens[:, :1], cache=cache).logits, right)


def test_a_cache_that_is_read_eagerly_is_out_of_another_token_s_way(quick, monkeypatch):
    student, tokens = hybrid(), tiny_tokens()
    one, other = (student(ids[:, :6], use_cache=True).cache for ids in (tokens, tokens.flip(1)))
    logits_of(student, tokens[:, 6:8], one)
    right = eagerly(student, tokens[:, 8:11], cache=copy.deepcopy(one)).logits
    given, meanwhile = mixers.recurrent_state, []

    def state_of(cache, layer):
        state = given(cache, layer)
        if cache is one and not meanwhile:  # as a second thread may
            meanwhile.append(student(tokens[:, :1], cache=other))
        return state

    monkeypatch.setattr(mixers, "recurrent_state", state_of)
    torch.testing.assert_close(student(tokens[:, 8:11], cache=one).logits, right)
    assert meanwhile


def test_replicas_run_their_own_weights_and_another_s_forward_stays(quick):
    student, tokens = hybrid(), tiny_tokens()
    right = student.generate(tokens, **GREEDY)
    replica = copy.copy(student)
    replica._modules = {"hybrid": copy.copy(student.inner)}
    replica.inner._modules = student.inner._modules | {"lm_head": copy.deepcopy(student.inner.lm_head)}
    replica.inner.lm_head.weight = torch.nn.Parameter(-student.inner.lm_head.weight)
    assert torch.equal(replica(tokens).logits, -student(tokens).logits)
    calls, forward = [], student.inner.forward
    student.inner.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    assert torch.equal(student.generate(tokens, **GREEDY), right) and len(calls) == 6
    assert student.inner.forward is not forward


def test_copies_have_graphs_of_their_own(quick):
    student, tokens = hybrid(), tiny_tokens()
    twin = copy.deepcopy(student)
    with torch.no_grad():
        twin.inner.lm_head.weight.mul_(-1)
    got = [one.generate(tokens, **GREEDY) for one in (student, twin)]
    assert torch.equal(got[1], eagerly(twin.generate, tokens, **GREEDY)) and not torch.equal(*got)


def test_what_no_step_can_hold_is_told():
    assert "compiles no" in hybrid_decoding.hybrid_obstacle(hybrid("gpt_neo").inner)
    student = hybrid()
    assert not hybrid_decoding.hybrid_obstacle(student.inner)
    student.inner.config._attn_implementation = "flex_attention"
    assert "flex_attention" in hybrid_decoding.hybrid_obstacle(student.inner)
