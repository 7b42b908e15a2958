"""A prompt's state as a file: going on from it, and the files that are refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VARIANTS, largest_difference, random_ids, tiny_model

from cab_hf.models.states import FORMAT, fingerprint


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_state_goes_on(variant, tmp_path):
    model, ids = tiny_model(**VARIANTS[variant]), random_ids(2, 12)
    model.save_state(model(ids[:, :8], use_cache=True).cache, tmp_path / "prompt.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["prompt.safetensors"]
    cache = model.load_state(tmp_path / "prompt.safetensors")
    got = model(ids[:, 8:], cache=cache, attention_mask=torch.ones_like(ids)).logits
    assert largest_difference(got, model(ids).logits[:, 8:]) < 1e-4
    # `generate` knows what has been read: the whole text or its end may be given
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    right = model.generate(ids, **options)[:, 12:]
    for tokens in (ids, ids[:, 8:]):
        cache = model.load_state(tmp_path / "prompt.safetensors")
        assert torch.equal(model.generate(tokens, cache=cache, **options)[:, tokens.shape[1] :], right)


def test_what_is_no_state_of_the_model_is_refused_in_a_line(tmp_path):
    model, path = tiny_model(mixer_type="mamba2"), tmp_path / "prompt.safetensors"
    with pytest.raises(ValueError, match="has read nothing"):
        model.save_state(type(model(random_ids(1, 3), use_cache=True).cache)(config=model.config), path)
    with pytest.raises(FileNotFoundError, match="no state in"):
        model.load_state(path)
    model.save_state(model(random_ids(1, 8), use_cache=True).cache, path)
    whole, tensors = path.read_bytes(), load_file(path)
    facts = {"format": FORMAT, "model": fingerprint(model), "tokens": "8"}

    def refused(reason, by=model):
        with pytest.raises(ValueError, match=reason) as refusal:
            by.load_state(path)
        assert "\n" not in str(refusal.value)

    for length in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused("is cut or no safetensors file")
    save_file(tensors, path)
    refused("its format is None")
    path.write_bytes(whole)
    refused("made by other weights", tiny_model(seed=1, mixer_type="mamba2"))
    refused("made by other weights", tiny_model(mixer_type="mamba2").double())
    for name, wrong in (("1.conv", None), ("0.recurrent", tensors["0.recurrent"].half())):
        changed = {key: value for key, value in (tensors | {name: wrong}).items() if value is not None}
        save_file(changed, path, metadata=facts)
        refused(f"as the {name[2:]} state of layer {name[0]}")
    save_file(tensors | {"2.conv": tensors["1.conv"].clone()}, path, metadata=facts)
    refused("holds 2.conv")
