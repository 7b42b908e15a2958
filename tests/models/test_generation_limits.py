"""What a student's `generate` and caches must count: tokens read already, prefill in pieces, positions."""

import copy

import pytest
import torch
from tiny_models import MIXER_TYPES, largest_difference, random_ids, tiny_model


SETTINGS = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, "return_dict_in_generate": True}
TABLES = (None, 40)


def told(model, *given, **options):
    """Logits of the new tokens, `(4, b, V)`."""
    return torch.stack(model.generate(*given, **SETTINGS, output_logits=True, **options).logits)


@torch.no_grad()
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("mixer_type", MIXER_TYPES)
def test_a_text_beside_the_cache_of_its_start_is_read_once(mixer_type, table):
    model = tiny_model(mixer_type=mixer_type, max_position_embeddings=table)
    whole = random_ids(2, 11)
    ones, left = torch.ones_like(whole), torch.ones_like(whole)
    left[0, :3] = 0
    embeddings = model.get_input_embeddings()(whole)
    for mask in (ones, left):
        cache = model(whole[:, :8], attention_mask=mask[:, :8], use_cache=True).cache
        right = told(model, whole, attention_mask=mask)
        for given in ((whole,), (whole[:, 8:],)):
            got = told(model, *given, attention_mask=mask, cache=copy.deepcopy(cache))
            assert largest_difference(got, right) < 1e-4
        got = told(model, inputs_embeds=embeddings, attention_mask=mask, cache=copy.deepcopy(cache))
        assert largest_difference(got, right) < 1e-4
        with pytest.raises(ValueError, match="`cache` has read all 8 tokens of `input_ids`"):
            model.generate(whole[:, :8], attention_mask=mask[:, :8], cache=copy.deepcopy(cache))


@torch.no_grad()
@pytest.mark.parametrize("cache_implementation", [None, "static"])
def test_going_on_with_the_cache_that_generate_returned(cache_implementation):
    model, ids = tiny_model(), random_ids(2, 6)
    first = model.generate(ids, **SETTINGS, cache_implementation=cache_implementation)
    for new in (0, 3):
        whole = torch.cat([first.sequences, random_ids(2, new, seed=7)], dim=1)
        right = told(model, whole, attention_mask=torch.ones_like(whole))
        cache = copy.deepcopy(first.cache)
        assert largest_difference(told(model, whole, attention_mask=torch.ones_like(whole), cache=cache), right) < 1e-4
    # Longer than what was read, but not its continuation: these are new tokens, as ever.
    new = random_ids(2, 12, seed=8)
    new[:, 8] = (first.sequences[:, 8] + 1) % 99
    right = told(model, torch.cat([first.sequences[:, :9], new], dim=1))
    assert largest_difference(told(model, new, cache=first.cache), right) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("mixer_type", MIXER_TYPES)
def test_prefill_in_chunks_is_prefill(mixer_type, table):
    model, ids = tiny_model(mixer_type=mixer_type, max_position_embeddings=table), random_ids(2, 11)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for given in ({"attention_mask": mask}, {"attention_mask": torch.ones_like(ids)}):
        for size in (1, 3, 11, 30):
            got = told(model, ids, prefill_chunk_size=size, **given)
            assert largest_difference(got, told(model, ids, **given)) < 1e-4
    beams = {"do_sample": False, "max_new_tokens": 4, "num_beams": 3, "attention_mask": mask}
    assert torch.equal(model.generate(ids, prefill_chunk_size=4, **beams), model.generate(ids, **beams))


@torch.no_grad()
@pytest.mark.parametrize("mixer_type", MIXER_TYPES)
def test_positions_that_restart_do_not_share_a_cache(mixer_type):
    model, ids = tiny_model(mixer_type=mixer_type), random_ids(2, 6)
    rising, restarting = torch.arange(6).expand(2, -1), torch.tensor([[0, 1, 2, 0, 1, 2]]).expand(2, -1)
    cache = model(ids, use_cache=True).cache
    for options in ({"use_cache": True}, {"cache": cache}):
        for mask in (None, torch.ones_like(ids)):
            with pytest.raises(ValueError, match="`position_ids` that restart.*`use_cache=False`"):
                model(ids, position_ids=restarting, attention_mask=mask, **options)
    assert model(ids, position_ids=rising, use_cache=True).cache is not None
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    padded = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(ids, position_ids=padded, attention_mask=mask, use_cache=True).logits
    assert largest_difference(logits[0, 2:], model(ids[:1, 2:]).logits[0]) < 1e-4


@torch.no_grad()
def test_a_table_of_positions_ends():
    model, ids = tiny_model(max_position_embeddings=16), random_ids(2, 10)
    for options in ({"max_new_tokens": 8}, {"max_length": 18}, {"max_new_tokens": 8, "num_beams": 2}):
        with pytest.raises(ValueError, match=r"10 tokens and 8 new ones.*`max_position_embeddings` of 16.* at most 7"):
            model.generate(ids, eos_token_id=None, **options)
    assert model.generate(ids, max_new_tokens=7, eos_token_id=None).shape == (2, 17)
    mask = torch.ones_like(ids)
    mask[:, :3] = 0  # padding takes no positions
    assert model.generate(ids, attention_mask=mask, max_new_tokens=10, eos_token_id=None).shape == (2, 20)
    with pytest.raises(ValueError, match="`position_ids` go up to 16, but `max_position_embeddings` is 16"):
        model(ids, position_ids=torch.arange(7, 17)[None], use_cache=False)
    cache = model(ids, use_cache=True).cache
    with pytest.raises(ValueError, match="needs `position_ids`"):
        model.generate(ids[:, :2], cache=cache, max_new_tokens=2)
