"""On a CUDA device: a hybrid's captured tokens are its eager ones, in families, precisions and ways to generate."""

import copy
import gc

import pytest
import torch
from tiny_models import largest_difference

from cab_hf.evaluation.tiny_families import tiny_model, tiny_tokens
from cab_hf.models import decoding
from cab_hf.transfer.hybrid import hybrid_from_teacher


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SETTINGS = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.7},
    "beams": {"do_sample": False, "num_beams": 3},
    "static": {"do_sample": False, "cache_implementation": "static"},
}
FAMILIES = ["llama", "gemma2", "cohere2", "gpt2", "opt", "phi3", "gpt_neox", "qwen3", "olmo2"]
MAY_BE_EAGER = ["mixtral", "gpt_oss"]  # their experts may wait for the host


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.no_grad():
        yield
    torch.backends.cuda.matmul.allow_tf32 = before


def hybrid(family="llama", kept=(1, 3), dtype=torch.float32, window=0):
    options = {"accept_inexact": 1.0, "attention_window": window, "attention_sinks": 2}
    student = hybrid_from_teacher(tiny_model(family), keep_attention=list(kept), **options)
    for adapter in student.mixers.values() if window else ():
        torch.nn.init.normal_(adapter.mixer.norm.weight)  # else mixers say nothing
        for weight in adapter.mixer.out_proj.parameters():
            torch.nn.init.normal_(weight, std=0.1)
    return student.eval().to("cuda", dtype)


def eagerly(function, *given, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(decoding.DECODE_VARIABLE, "eager")
        return function(*given, **options)


def steps_of(student):
    held = decoding._steps.get(student.inner)
    return [] if held is None else list(held.steps)


def read(student, tokens, cache):
    return torch.cat([student(tokens[:, t : t + 1], cache=cache).logits for t in range(tokens.shape[1])], 1)


def read_eagerly(student, tokens, start):
    """Logits of eager steps behind `start` tokens: kernels of whole rows multiply in tf32."""
    return eagerly(read, student, tokens[:, start:], eagerly(student, tokens[:, :start]).cache)


@pytest.mark.parametrize("kept", [(), (1, 3)])
@pytest.mark.parametrize("family", [*FAMILIES, *MAY_BE_EAGER])
def test_tokens_behind_padding_are_the_eager_ones(family, kept):
    student, tokens = hybrid(family, kept), tiny_tokens().cuda()
    left = torch.ones_like(tokens)
    left[0, :4] = 0
    for mask in (torch.ones_like(tokens), left):
        options = SETTINGS | {"do_sample": False, "attention_mask": mask}
        assert torch.equal(student.generate(tokens, **options), eagerly(student.generate, tokens, **options))
    if family not in MAY_BE_EAGER:
        assert steps_of(student) == [(2, 256)], decoding._steps[student.inner].obstacle


@pytest.mark.parametrize("way", WAYS)
def test_generate_gives_the_eager_tokens(way):
    student, tokens = hybrid(), tiny_tokens().cuda()
    torch.manual_seed(0)
    got = student.generate(tokens, **SETTINGS, **WAYS[way])
    torch.manual_seed(0)
    plain = {name: value for name, value in WAYS[way].items() if name != "cache_implementation"}
    assert torch.equal(got, eagerly(student.generate, tokens, **SETTINGS, **plain)) and steps_of(student)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    student, tokens = hybrid(dtype=dtype), tiny_tokens().cuda()
    got = read(student, tokens[:, 6:], student(tokens[:, :6]).cache)
    right = read_eagerly(student, tokens, 6)
    assert steps_of(student) and largest_difference(got, right) < 0.03 * right.abs().max()


def test_a_long_row_changes_its_room():
    student, tokens = hybrid(), tiny_tokens().cuda().repeat(1, 40)[:, :400]
    cache = student(tokens[:, :240]).cache
    got = read(student, tokens[:, 240:], cache)
    assert steps_of(student) == [(2, 256), (2, 384), (2, 512)]
    assert largest_difference(got, read_eagerly(student, tokens, 240)) < 1e-3


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_caches_take_turns_and_are_copied(family):
    student, tokens = hybrid(family), tiny_tokens().cuda()
    rows = (tokens, tokens.flip(1))
    caches = [student(row[:, :6]).cache for row in rows]
    got = [[], []]
    for t in range(6, 9):
        for row, cache, logits in zip(rows, caches, got):
            logits.append(read(student, row[:, t : t + 1], cache))
    twin = copy.deepcopy(caches[0])
    for row, cache, logits in zip(rows, caches, got):
        logits.append(eagerly(read, student, row[:, 9:11], cache))  # leaves the graph, and comes back
        logits.append(read(student, row[:, 11:], cache))
        assert largest_difference(torch.cat(logits, 1), read_eagerly(student, row, 6)) < 1e-3
    right = read_eagerly(student, tokens, 6)[:, 3:]
    assert largest_difference(read(student, tokens[:, 9:], twin), right) < 1e-3


def test_no_graph_is_of_an_older_model_and_none_outlives_it():
    student, tokens = hybrid(), tiny_tokens().cuda()
    options = SETTINGS | {"do_sample": False}
    student.generate(tokens, **options)
    student.inner.lm_head.weight.mul_(-1)  # is read anew
    assert torch.equal(student.generate(tokens, **options), eagerly(student.generate, tokens, **options))
    first = decoding._steps[student.inner]
    student.mixer_list[0].in_proj.weight = torch.nn.Parameter(2 * student.mixer_list[0].in_proj.weight)
    assert torch.equal(student.generate(tokens, **options), eagerly(student.generate, tokens, **options))
    assert decoding._steps[student.inner] is not first
    gc.collect()
    held = len(decoding._steps)
    del student
    gc.collect()
    assert len(decoding._steps) == held - 1


@torch.inference_mode()
def test_inference_mode_changes_nothing():
    student, tokens = hybrid(), tiny_tokens().cuda()
    options = SETTINGS | {"do_sample": False}
    got = student.generate(tokens, **options)
    assert steps_of(student) and torch.equal(got, eagerly(student.generate, tokens, **options))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi3", "qwen3"])
def test_a_window_beside_each_mixer_is_captured_with_it(family):
    student, tokens = hybrid(family, (1,), window=5), tiny_tokens().cuda()
    left = torch.ones_like(tokens)
    left[0, :4] = 0
    for mask in (torch.ones_like(tokens), left):
        options = SETTINGS | {"do_sample": False, "attention_mask": mask}
        assert torch.equal(student.generate(tokens, **options), eagerly(student.generate, tokens, **options))
    assert steps_of(student) == [(2, 256)], decoding._steps[student.inner].obstacle
    options = SETTINGS | {"do_sample": False, "num_beams": 3}
    assert torch.equal(student.generate(tokens, **options), eagerly(student.generate, tokens, **options))


def test_caches_with_windows_take_turns():
    student, tokens = hybrid(window=5), tiny_tokens().cuda().repeat(1, 4)
    rows = (tokens, tokens.flip(1))
    caches = [student(row[:, :6]).cache for row in rows]
    got = [[], []]
    for t in range(6, 30):
        for row, cache, logits in zip(rows, caches, got):
            logits.append(student(row[:, t : t + 1], cache=cache).logits)
    assert steps_of(student)
    for row, logits in zip(rows, got):
        assert largest_difference(torch.cat(logits, 1), read_eagerly(student, row[:, :30], 6)) < 1e-3
