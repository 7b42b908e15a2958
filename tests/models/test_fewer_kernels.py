"""What a captured hybrid makes by kernels of its own: which parts are asked for, and what they do beside captures."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from tiny_models import largest_difference
from torch import nn
from transformers import LlamaConfig
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as rotates_neighbours
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as rotates_a_part
from transformers.models.llama import modeling_llama
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision as rotates_in_float32


pytest.importorskip("triton")

from cab_hf.models import fewer_kernels  # noqa: E402
from cab_hf.models.decode_kernels import linears  # noqa: E402
from cab_hf.models.fewer_kernels import FewerKernels  # noqa: E402
from cab_hf.models.mixer_adapter import HandedOver, handing_over  # noqa: E402


pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles where there is a GPU")


SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 9}


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


class Mlp(modeling_llama.LlamaMLP):
    def __init__(self, act="silu", bias=False):
        super().__init__(LlamaConfig(**SIZES, hidden_act=act, mlp_bias=bias))


class Scaled(Mlp):
    def forward(self, x):
        return super().forward(x) * 1.01


class TwoInputs(Mlp):
    def forward(self, x, gate):
        return super().forward(x) * gate


class Limited(Mlp):
    def __init__(self, limit):
        super().__init__()
        self.limit = limit

    def forward(self, x):
        gate, up = self.gate_proj(x).clamp(max=self.limit), self.up_proj(x).clamp(-self.limit, self.limit)
        return self.down_proj(self.act_fn(gate) * up)


class Learned(Mlp):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return super().forward(x) * self.scale


class Doubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(16, 8), nn.Linear(16, 12, bias=False), nn.Linear(8, 16)

    def forward(self, x, order=(0, 1), again=False):
        parts = [self.first, self.second]
        x = self.third(parts[order[0]](x)[..., :8]) + self.third(parts[order[1]](x)[..., :8])
        return self.first(x.mul_(2.0)) if again else x


@pytest.mark.parametrize(
    ("mlp", "is_gated"),
    [(Mlp(), True), *((one, False) for one in (Mlp("gelu"), Mlp(bias=True), Scaled(), TwoInputs(), Learned()))],
    ids=["llama", "gelu", "bias", "scaled", "two inputs", "learned"],
)
def test_an_mlp_is_asked_whether_it_is_llamas(mlp, is_gated):
    kernels, x = FewerKernels(mlp), torch.randn(1, 1, 16)
    assert [module for module, _ in kernels.forwards] == [mlp] * is_gated
    if is_gated:
        with handing_over(HandedOver(step=lambda *_: None)), kernels.a_pass():
            got = mlp(x)
        assert largest_difference(got, mlp(x)) < 1e-6
    assert "forward" not in vars(mlp)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_limit_of_one_layer_is_found(dtype):
    mlps = nn.ModuleList([Limited(float("inf")), Limited(16.0)]).to(dtype)
    assert [module for module, _ in FewerKernels(mlps).forwards] == [mlps[0]]


def test_modules_may_be_called_by_name_and_rotate_one_tensor():
    def rotates(q, k=None, cos=None, sin=None):
        return modeling_llama.apply_rotary_pos_emb(q, q if k is None else k, cos, sin)

    model = nn.ModuleList([Mlp(), modeling_llama.LlamaRMSNorm(16)])
    kernels, x, angles = FewerKernels(model), torch.randn(1, 1, 16), torch.ones(1, 1, 16)
    assert len(kernels.forwards) == 2
    right = model[0](model[1](x))
    with handing_over(HandedOver(step=lambda *_: None)), kernels.a_pass():
        assert largest_difference(model[0](x=model[1](hidden_states=x)), right) < 1e-6
        for given in ({"cos": angles, "sin": angles}, {"k": None, "cos": angles, "sin": angles}):
            assert torch.equal(fewer_kernels._rotated(rotates, x[None], **given)[0], rotates(x[None], **given)[0])
        assert torch.equal(
            fewer_kernels._rotated(rotates, x[None], None, angles, angles)[0], rotates(x[None], **given)[0]
        )


def test_weights_that_a_pass_makes_are_left_to_the_library(monkeypatch):
    """A kernel reads weights before those of earlier kernels are sure to be there."""
    model, x, called = Doubled().half(), torch.randn(1, 1, 16).half(), []
    monkeypatch.setattr(fewer_kernels, "linears", lambda x, *given: called.append(x.dtype) or linears(x, *given))
    first, many = model.first, nn.Parameter(torch.randn(2, 8, 16).half())
    kernels = FewerKernels(model)
    for _ in range(2):
        called.clear()
        with kernels.a_pass():
            nn.functional.linear(x.float(), first.weight.float())
            nn.functional.linear(x, first.weight, first.bias * 2)
            nn.functional.linear(x[0, 0], first.weight)
            assert not called
            got = [nn.functional.linear(x, one) for one in many]
        assert called == [torch.float16] * 2
        assert all(largest_difference(one, x @ weight.T) < 0.01 for one, weight in zip(got, many, strict=True))


def test_a_part_that_is_compiled_gives_the_same():
    model, x = nn.ModuleList([Mlp(), nn.Linear(16, 4)]), torch.randn(1, 1, 16)
    right, kernels = model[1](model[0](x)), FewerKernels(model)
    model[0].compile(backend="eager")
    for _ in range(3):
        with handing_over(HandedOver(step=lambda *_: None)), kernels.a_pass():
            assert largest_difference(model[1](model[0](x)), right) < 1e-6


def test_a_rotation_is_asked_whether_it_is_llamas():
    asked = fewer_kernels._rotates_halves
    assert asked(modeling_llama.apply_rotary_pos_emb)
    assert not any(map(asked, (rotates_neighbours, rotates_a_part, rotates_in_float32, None, torch.add)))


def test_a_rotation_is_replaced_for_the_passes_that_are_captured_alone():
    models = [modeling_llama.LlamaModel(LlamaConfig(**SIZES)) for _ in range(2)]
    before, kernels = modeling_llama.apply_rotary_pos_emb, list(map(FewerKernels, models))
    query, key, angles = torch.randn(2, 3, 1, 8), torch.randn(2, 1, 1, 8), torch.randn(2, 1, 8)
    given = (query, key, angles.cos(), angles.sin())
    with handing_over(HandedOver(step=lambda *_: None)), kernels[0].a_pass():
        with kernels[1].a_pass():
            pass
        replaced, elsewhere = modeling_llama.apply_rotary_pos_emb, []
        assert replaced is not before
        got = replaced(*given)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fewer_kernels, "rotate", None)  # no other thread may ask for it
            thread = threading.Thread(target=lambda: elsewhere.append(replaced(*given)))
            thread.start()
            thread.join()
        longer = replaced(query.expand(2, 3, 2, 8), key.expand(2, 1, 2, 8), *given[2:])
    assert modeling_llama.apply_rotary_pos_emb is before
    for one, other, right in zip(got, elsewhere[0], before(*given), strict=True):
        assert largest_difference(one, right) < 1e-6 and torch.equal(other, right)
    assert longer[0].shape == (2, 3, 2, 8)


def test_products_of_one_tensor_are_made_together_until_a_pass_asks_otherwise(monkeypatch):
    model, called = Doubled(), []

    def noted(x, weights, biases, make=fewer_kernels.linears):
        called.append(len(weights))
        return make(x, weights, biases)

    monkeypatch.setattr(fewer_kernels, "linears", noted)
    kernels = FewerKernels(model)
    for options, counts in (
        ({}, [1, 1, 1, 1]),  # the first pass shows
        ({}, [2, 1, 1]),
        ({"order": (1, 0)}, [1, 1, 1, 1]),  # other weights than planned
        ({"again": True}, [2, 1, 1, 1]),  # one product more
    ):
        x = torch.randn(1, 1, 16)
        called.clear()
        with kernels.a_pass():
            got = model(x, **options)
        assert called == counts
        assert largest_difference(got, model(x, **options)) < 1e-5


def test_a_tensor_that_changes_in_between_is_read_anew():
    class Changes(Doubled):
        def forward(self, x):
            first = self.first(x)
            return first[..., :8] + self.second(x.mul_(2.0))[..., :8]

    model, x = Changes(), torch.randn(1, 1, 16)
    kernels, right = FewerKernels(model), model(x.clone())
    for _ in range(2):
        with kernels.a_pass():
            assert largest_difference(model(x.clone()), right) < 1e-5


KERNELS_COMPILE = """
import inspect, sys
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from cab_hf.models import attention_kernel, decode_kernels

def compile(kernel, pointers, integers, floats=(), **constants):
    names = list(inspect.signature(kernel.fn).parameters)
    kinds = dict.fromkeys(pointers.split(), "*bf16") | dict.fromkeys(integers.split(), "i32")
    kinds |= dict.fromkeys(floats, "fp32")
    kinds |= {"places": "*i64", "mask": "*u8", "parts": "*fp32", "peaks": "*fp32", "totals": "*fp32"}
    kinds = {name: kinds.get(name, "constexpr") for name in names}
    given = {(at,): constants.get(name) for at, name in enumerate(names) if kinds[name] == "constexpr"}
    source = ASTSource(kernel, kinds, given)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"launch_pdl": True})
    assert "griddepcontrol.wait" in compiled.asm["ptx"] and compiled.asm["cubin"]
    print(kernel.fn.__name__)

row = dict(WIDTH=576, COLUMNS=1024, FEATURES=2, ROWS=1, LINES=1, OVERLAP=True)
rows = dict(WIDTH=576, COLUMNS=256, FEATURES=32, ROWS=16, LINES=512, OVERLAP=True)
sizes = decode_kernels._sizes(torch.zeros(2, 8), 16)  # as of a small adapter
narrow = {name: sizes[name] for name in sizes if name != "num_warps"} | {"OVERLAP": True}
narrow |= dict(OUT=16, SECOND=3, THIRD=0, FOURTH=0)
compile(decode_kernels._linears_kernel, "x weight second out", "rows of_row", **narrow)
all = dict(OUT=1000, SECOND=576, THIRD=192, FOURTH=192)
for cut in (row, rows):
    gated = "x weight gate_weight norm residual out"
    compile(decode_kernels._linear_kernel, gated, "rows of_row", ["eps"], OUT=1536, NORM=1, **cut)
    together = "x weight second third fourth bias out"
    compile(decode_kernels._linears_kernel, together, "rows of_row", **all, **cut)
head = dict(P=64, OVERLAP=True)
rotated = "query key cosines sines rotated_query rotated_key"
places = "of_query_row of_query of_key_row of_key of_angles"
compile(attention_kernel._rotate_kernel, rotated, places, QUERIES=9, KEYS=3, DIM=64, **head)
kept = "of_key_row of_key of_value_row of_value heads"
sizes = dict(LENGTH=261, KEY_DIM=64, VALUE_DIM=64)
compile(attention_kernel._keep_kernel, "new_keys new_values places keys values", kept, **sizes, **head)
cut = dict(QUERIES=3, SPLIT=64, BLOCK=64, Q=16, V=64)
compile(attention_kernel._attend_kernel, "query key value mask", "heads of_mask", ["scale"], **cut, **sizes, **head)
compile(attention_kernel._gather_kernel, "out", "splits", QUERIES=3, VALUE_DIM=64, V=64, SOME=16, OVERLAP=True)
"""


def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(fewer_kernels.__file__).parents[2])}
    file = tmp_path / "compiled_kernels.py"  # Triton reads the source of what it compiles
    file.write_text(KERNELS_COMPILE)
    run = subprocess.run([sys.executable, str(file)], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert len(run.stdout.split()) == 9
