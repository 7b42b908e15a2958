"""The kernels of one token, interpreted on a CPU, where each begins before the one before it has ended."""

import functools
import inspect
import sys

import pytest
import torch
from tiny_models import VARIANTS, largest_difference, random_ids, tiny_model
from torch import nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from cab_hf.models import attention_kernel, decode_kernels, decoding


OTHERS_WRITE = {
    "_linear_kernel": ("x", "residual"),
    "_linears_kernel": ("x",),
    "_norm_kernel": ("x",),
    "_conv_kernel": ("stream",),
    "_ssd_kernel": ("stream", "convolved"),
    "_s6_kernel": ("stream", "convolved", "projected", "steps"),
    "_rotate_kernel": ("query", "key", "cosines", "sines"),
    "_keep_kernel": ("new_keys", "new_values"),
    "_attend_kernel": ("query", "key", "value"),
    "_gather_kernel": ("parts", "peaks", "totals"),
}
WRITTEN = {  # others: "out"
    "_rotate_kernel": ("rotated_query", "rotated_key"),
    "_keep_kernel": ("keys", "values"),
    "_attend_kernel": ("parts", "peaks", "totals"),
}


pytestmark = [
    pytest.mark.skipif(decode_kernels.triton is None, reason="needs Triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles where there is a GPU"),
]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def step(model, tokens, position, table, real):
    positions = torch.full((len(tokens), 1), position)
    return decoding.step_logits(model, tokens[:, position : position + 1], positions, table, real)


class Launches:
    def __init__(self, launch):
        self.launch = launch

    def __getitem__(self, grid):
        return functools.partial(self.launch, grid)


class Overlap:
    """What other kernels write is nothing but NaN until a program has waited, as if they still ran."""

    def __init__(self, monkeypatch):
        self.launched, self.begun, self.waited, self.states = set(), 0, 0, []
        cuda = decode_kernels.tl.extra.cuda
        monkeypatch.setattr(cuda, "gdc_launch_dependents", self.begin)
        monkeypatch.setattr(cuda, "gdc_wait", self.wait)
        monkeypatch.setattr(decode_kernels, "_fetch", lambda *given, **sizes: None)
        for module in (decode_kernels, attention_kernel):
            monkeypatch.setattr(module, "overlapping", lambda device: {"OVERLAP": True})
        for name in OTHERS_WRITE:
            module = decode_kernels if hasattr(decode_kernels, name) else attention_kernel
            launch = functools.partial(self.launch, name, getattr(module, name))
            monkeypatch.setattr(module, name, Launches(launch))

    def begin(self, **_):
        self.begun += 1
        self.theirs = [one.clone() for one in self.read]
        self.before = [one.clone() for one in self.written]
        for one in self.read:
            one.fill_(float("nan"))

    def wait(self, **_):
        self.waited += 1
        for one, value in zip(self.written, self.before):
            torch.testing.assert_close(one, value, rtol=0, atol=0, equal_nan=True)
        for one, value in zip(self.read, self.theirs):
            one.copy_(value)

    def launch(self, name, kernel, grid, *args, **sizes):
        given = dict(zip(inspect.signature(kernel.fn).parameters, args))
        self.read = [given[one] for one in OTHERS_WRITE[name] if given[one] is not None]
        self.written, begun = [*(given[one] for one in WRITTEN.get(name, ("out",))), *self.states], self.begun
        kernel[grid](*args, **sizes)
        assert self.begun == self.waited > begun  # every program waits, once
        self.launched.add(name)


def test_nothing_of_other_kernels_is_read_or_written_before_the_wait(monkeypatch):
    overlap = Overlap(monkeypatch)
    several = [VARIANTS[name] for name in ("s6", "ssd 2 groups, gated mlp", "ssd post norms, scaled embeddings")]
    own = {"mixer_type": "mamba2", "n_groups": 8}  # heads have their own B and C
    turning = [own | {"rotary_frequencies": [0.9, 0.2], "rotary_interleaved": pairs} for pairs in (False, True)]
    for options in (*several, own, *turning, VARIANTS["ssd turning states"]):
        model, tokens = tiny_model(**options).eval(), random_ids(2, 9)
        states = decoding.states_of(model(tokens[:, :8], use_cache=True).cache, len(model.backbone.layers))
        overlap.states, table = states, torch.tensor([state.data_ptr() for state in states])
        got = step(model, tokens, 8, table, torch.ones(2, dtype=torch.int8))
        assert largest_difference(got, model(tokens).logits[:, 8]) < 1e-5
    overlap.states = []
    linear, gate = nn.Linear(600, 70), nn.Linear(600, 70, bias=False)
    for rows, norm in ((1, nn.RMSNorm(600, eps=1e-5)), (1, None), (3, nn.LayerNorm(600)), (3, None)):
        x, residual = torch.randn(rows, 600), torch.randn(rows, 70)
        read = x if norm is None else norm(x)
        added = decode_kernels.linear(x, linear, norm, residual=residual)
        assert largest_difference(added, residual + linear(read)) < 1e-4
        gated = decode_kernels.linear(x, linear, norm, gate=gate)
        assert largest_difference(gated, F.silu(gate(read)) * linear(read)) < 1e-4
    for rows, sizes in ((1, (70, 33, 129)), (3, (70, 33)), (2, (40, 40, 40, 7)), (1, (40,))):
        x, modules = torch.randn(rows, 600), [nn.Linear(600, size, bias=size % 2 == 0) for size in sizes]
        biases = [one.bias for one in modules]
        for got, one in zip(decode_kernels.linears(x, [one.weight for one in modules], biases), modules, strict=True):
            assert largest_difference(got, one(x)) < 1e-4
    for rows in (1, 3):
        query, key = (torch.randn(rows, 1, heads, 48)[..., 8:].transpose(1, 2) for heads in (3, 2))
        angles = torch.randn(1 if rows == 1 else 3, 1, 40)
        got = attention_kernel.rotate(query, key, angles.cos(), angles.sin())
        for one, right in zip(got, apply_rotary_pos_emb(query, key, angles.cos(), angles.sin()), strict=True):
            assert largest_difference(one, right) < 1e-6
        held = torch.randn(rows, 2, 9, 40), torch.randn(rows, 2, 9, 24)
        value, places = torch.randn(rows, 1, 2, 24).transpose(1, 2), torch.tensor([4, 0, 8])[:rows]
        rights = [one.clone() for one in held]
        for right, new in zip(rights, (key, value), strict=True):
            right[torch.arange(rows), :, places] = new[:, :, 0]
        attention_kernel.keep(held, (key, value), places)
        assert all(map(torch.equal, held, rights))
        query, mask = torch.randn(rows, 2, 3, 40), torch.arange(9) < torch.tensor([5, 0, 9])[:rows, None, None, None]
        got = attention_kernel.attend(query, *held, mask, 0.2)
        assert largest_difference(got, F.scaled_dot_product_attention(query, *held, mask, scale=0.2)) < 1e-5
    assert overlap.launched == OTHERS_WRITE.keys()


def test_frequencies_that_were_cast_turn_states_too():
    model, tokens = tiny_model(**VARIANTS["ssd turning states"]).eval().half(), random_ids(2, 9)
    states = decoding.states_of(model(tokens[:, :8], use_cache=True).cache, len(model.backbone.layers))
    table = torch.tensor([state.data_ptr() for state in states])
    got = step(model, tokens, 8, table, torch.ones(2, dtype=torch.int8))
    assert largest_difference(got, model(tokens).logits[:, 8]) < 0.05


def test_a_build_for_other_gpus_launches_one_kernel_after_another(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setitem(sys.modules, "triton.backends.nvidia.compiler", None)  # which it need not have
    assert decode_kernels.overlapping.__wrapped__(torch.device("cuda", 0)) == {"OVERLAP": False}
