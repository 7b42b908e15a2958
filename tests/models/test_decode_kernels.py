"""The kernels of one token, interpreted on a CPU: what the modules give. `test_gpu_decoding` runs them on a GPU."""

import pytest
import torch
from tiny_models import VARIANTS, largest_difference, random_ids, tiny_model
from torch import nn
from torch.nn import functional as F

from cab_hf.models import decode_kernels, decoding


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


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_token_is_what_the_whole_row_gives(variant, rows):
    model, tokens = tiny_model(**VARIANTS[variant]).eval(), random_ids(rows, 10)
    states = decoding.states_of(model(tokens[:, :8], use_cache=True).cache, len(model.backbone.layers))
    table, before = torch.tensor([state.data_ptr() for state in states]), [state.clone() for state in states]
    step(model, tokens, 8, table, torch.zeros(rows, dtype=torch.int8))
    assert all(map(torch.equal, states, before))  # padding
    got = [step(model, tokens, position, table, torch.ones(rows, dtype=torch.int8)) for position in (8, 9)]
    assert largest_difference(torch.stack(got, dim=1), model(tokens).logits[:, 8:]) < 1e-5


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("norm", [None, nn.RMSNorm(600, eps=1e-5), nn.LayerNorm(600)])
def test_a_projection_with_what_is_around_it(norm, rows):
    torch.manual_seed(0)
    linear, gate, x = nn.Linear(600, 70), nn.Linear(600, 70, bias=False), torch.randn(rows, 600)
    residual, read = torch.randn(rows, 70), x if norm is None else norm(x)
    added = decode_kernels.linear(x, linear, norm, residual=residual)
    assert largest_difference(added, residual + linear(read)) < 1e-4
    gated = decode_kernels.linear(x, linear, norm, gate=gate)
    assert largest_difference(gated, F.silu(gate(read)) * linear(read)) < 1e-4
