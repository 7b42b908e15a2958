"""Packed documents: logits and gradients of a packed row are those of its documents apart."""

import pytest
import torch
from tiny_models import VARIANTS, largest_difference, random_ids, tiny_model


LENGTHS = [4, 1, 6, 1, 1, 3]


def documents(seed: int = 0) -> list[torch.Tensor]:
    return list(random_ids(1, sum(LENGTHS), seed=seed).split(LENGTHS, dim=1))


def packings() -> dict[str, dict[str, torch.Tensor]]:
    """The ways to say where documents begin."""
    numbers = torch.cat([torch.full((length,), index) for index, length in enumerate(LENGTHS)])
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    mask = torch.ones(1, sum(LENGTHS), dtype=torch.long)
    return {
        "seq_idx": {"seq_idx": numbers[None]},
        "seq_idx that comes back": {"seq_idx": (numbers % 2)[None].to(torch.int32)},
        "position_ids": {"position_ids": positions},
        "both": {"seq_idx": numbers[None], "position_ids": positions},
        "position_ids and mask": {"position_ids": positions, "attention_mask": mask},
        "seq_idx and mask": {"seq_idx": numbers[None], "attention_mask": mask},
    }


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_equals_apart(name):
    model, parts = tiny_model(**VARIANTS[name]), documents()
    direction = torch.randn(1, sum(LENGTHS), 99, generator=torch.Generator().manual_seed(1))
    logits = [model(part, use_cache=False).logits for part in parts]
    apart = torch.cat(logits, dim=1)
    (apart * direction).sum().backward()
    expected = gradients(model)
    for way, inputs in packings().items():
        packed = model(torch.cat(parts, dim=1), **inputs).logits
        assert largest_difference(packed, apart) < 1e-4, way
        (packed * direction).sum().backward()
        for parameter, gradient in gradients(model).items():
            tolerance = 1e-4 * max(1.0, float(expected[parameter].abs().max()))
            assert largest_difference(gradient, expected[parameter]) < tolerance, (way, parameter)


@torch.no_grad()
def test_documents_leak_when_nobody_says_where_they_begin():
    """The comparison above can fail."""
    for name in ("s6", "ssd 2 groups, gated mlp"):
        model, parts = tiny_model(**VARIANTS[name]), documents()
        apart = torch.cat([model(part).logits for part in parts], dim=1)
        assert largest_difference(model(torch.cat(parts, dim=1)).logits, apart) > 1e-2


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_a_packed_row_may_end_in_padding(name):
    model, parts = tiny_model(**VARIANTS[name]), documents()
    ids = torch.cat([*parts, random_ids(1, 3, seed=8)], dim=1)
    apart = torch.cat([model(part).logits for part in parts], dim=1)
    length = sum(LENGTHS)
    mask = (torch.arange(length + 3) < length).long()[None]
    for way, inputs in packings().items():
        inputs = {key: torch.cat([value, value[:, -1:].expand(-1, 3)], dim=1) for key, value in inputs.items()}
        packed = model(ids, **{**inputs, "attention_mask": mask}).logits[:, :length]
        assert largest_difference(packed, apart) < 1e-4, way


@torch.no_grad()
def test_rows_of_a_batch_are_packed_each_in_its_own_way():
    for name in ("s6", "ssd parallel, shared norm"):
        model, ids = tiny_model(**VARIANTS[name]), random_ids(2, 9)
        seq_idx = torch.tensor([[0] * 2 + [1] * 7, [0] * 6 + [1] * 3])
        packed = model(ids, seq_idx=seq_idx).logits
        for row, cut in enumerate((2, 6)):
            apart = [model(part).logits for part in ids[row : row + 1].split([cut, 9 - cut], dim=1)]
            assert largest_difference(packed[row : row + 1], torch.cat(apart, dim=1)) < 1e-4
        # one index for all rows
        shared = model(ids, seq_idx=seq_idx[:1]).logits
        assert largest_difference(shared, model(ids, seq_idx=seq_idx[:1].expand(2, -1)).logits) == 0.0


@torch.no_grad()
def test_learned_positions_count_from_each_document_on():
    """Long rows are fine as long as no document is longer than the table."""
    model = tiny_model(**{**VARIANTS["ssd parallel, shared norm"], "max_position_embeddings": 6})
    parts = documents()
    packed = model(torch.cat(parts, dim=1), **packings()["seq_idx"]).logits
    assert largest_difference(packed, torch.cat([model(part).logits for part in parts], dim=1)) < 1e-4
    with pytest.raises(ValueError, match="7 tokens.*`max_position_embeddings` is 6"):
        model(random_ids(1, 9), seq_idx=torch.tensor([[0] * 2 + [1] * 7]))


@torch.no_grad()
def test_a_cache_and_packing_exclude_each_other():
    model, ids = tiny_model(**VARIANTS["s6"]), random_ids(1, 6)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1]])
    assert model(ids, seq_idx=seq_idx).cache is None
    cache = model(ids, use_cache=True).cache
    for inputs in ({"use_cache": True}, {"cache": cache}):
        with pytest.raises(ValueError, match="`seq_idx`.*cache.*`use_cache=False`"):
            model(ids, seq_idx=seq_idx, **inputs)
    # with a cache, positions say where a row continues, not where documents begin
    positions = torch.arange(6)[None]
    with_positions = model(ids, position_ids=positions, use_cache=True)
    assert largest_difference(with_positions.logits, model(ids).logits) < 1e-6
    assert with_positions.cache is not None
