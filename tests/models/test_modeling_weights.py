"""Weights: saved and loaded bit by bit, whole or with holes, tied or not, resized, rounded."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_models import MIXER_TYPES, VARIANTS, random_ids, shake, tiny_config, tiny_model

from cab_hf.models import CABMambaConfig, CABMambaForCausalLM, CABMambaModel
from cab_hf.models.mixers import UNIT_GATE


FLOAT32_NAMES = ("A_log", "D", "dt_bias", "dt_proj.weight", "dt_proj.bias")
STARTS = {
    "usual": {"transition_init": "identity", "use_bias": True, "intermediate_size": 24},
    "transparent": {
        "transition_init": "moving_average",
        "conv_init": "transparent",
        "gate_init": "transparent",
        "skip_init": "transparent",
        "use_bias": True,
        "norm_type": "layer_norm",
        "max_position_embeddings": 12,
        "tie_word_embeddings": False,
        "lm_head_bias": True,
    },
}


def assert_same_weights(model, expected: dict[str, torch.Tensor], but: str = "") -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, value in state.items():
        if name != but:
            assert value.dtype == expected[name].dtype and torch.equal(value, expected[name]), name


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_save_and_load_is_exact(name, tmp_path):
    model, ids = tiny_model(**VARIANTS[name]), random_ids(2, 7)
    model.save_pretrained(tmp_path)
    loaded, report = CABMambaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_weights(loaded, model.state_dict())
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    tied = model.config.tie_word_embeddings
    assert (loaded.lm_head.weight is loaded.backbone.embeddings.weight) == tied
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (not tied)
    # the base model out of the whole one's folder, and back
    backbone = CABMambaModel.from_pretrained(tmp_path)
    assert torch.equal(backbone(ids).last_hidden_state, model.backbone(ids).last_hidden_state)
    # a model built from config.json alone takes the weights
    rebuilt = CABMambaForCausalLM(CABMambaConfig.from_pretrained(tmp_path)).eval()
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(rebuilt(ids).logits, model(ids).logits)


def test_tied_weights_stay_tied_under_training(tmp_path):
    model = tiny_model(mixer_type="mamba2").train()
    model(random_ids(2, 7), labels=random_ids(2, 7)).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert torch.equal(model.lm_head.weight, model.backbone.embeddings.weight)
    assert not any(name.startswith("lm_head") for name, _ in model.named_parameters())
    untied = tiny_model(mixer_type="mamba2", tie_word_embeddings=False)
    assert not torch.equal(untied.lm_head.weight, untied.backbone.embeddings.weight)


def assert_fresh(name: str, value: torch.Tensor, config: CABMambaConfig) -> None:
    """The parameter `name` is as a new model has it."""
    assert bool(value.isfinite().all()), name
    transparent = config.conv_init == "transparent"
    if name.endswith("A_log"):
        assert bool((value == (0.0 if config.transition_init == "moving_average" else -20.0)).all())
    elif name.endswith(".D"):
        assert bool((value == (0.0 if transparent else 1.0)).all())
    elif name.endswith(("dt_bias", "dt_proj.bias")):
        steps = F.softplus(value)
        low, high = (1 / 512, 1 / 8) if transparent else (0.001, 0.1)
        assert low * 0.999 < float(steps.min()) <= float(steps.max()) < high * 1.001
    elif name.endswith("in_proj.bias"):
        gate = value[64:] if value.numel() == 128 else value[:64]
        assert bool((gate == (UNIT_GATE if transparent else 0.0)).all()) or gate.std() < 1e-6
        assert float(value.sum()) == pytest.approx(64 * UNIT_GATE if transparent else 0.0, rel=1e-5)
    elif name.endswith("norm.weight") or "norm_f.weight" in name:
        assert bool((value == 1).all())
    elif name.endswith("bias"):
        assert bool((value == 0).all()), name
    elif name.endswith("conv1d.weight"):
        if transparent:
            assert bool((value[..., -1] == 1).all()) and bool((value[..., :-1] == 0).all())
        else:
            assert float(value.abs().max()) <= 0.5
    elif name.endswith("dt_proj.weight"):
        assert float(value.abs().max()) <= (0.0 if transparent else config.time_step_rank**-0.5)
    else:
        # shaken weights have a deviation of 0.2
        assert 0.01 < float(value.std()) < 0.03, (name, float(value.std()))


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("mixer_type", MIXER_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_missing_key_starts_anew_and_leaves_the_others_alone(mixer_type, start, dtype, tmp_path):
    model = tiny_model(mixer_type=mixer_type, num_hidden_layers=1, **STARTS[start])
    model.save_pretrained(tmp_path)
    expected = CABMambaForCausalLM.from_pretrained(tmp_path, dtype=dtype).state_dict()
    weights = load_file(tmp_path / "model.safetensors")
    for name in weights:
        kept = {key: value for key, value in weights.items() if key != name}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        loaded, report = CABMambaForCausalLM.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
        assert name in report["missing_keys"]
        found = loaded.state_dict()
        others = dict(expected)
        if name == "backbone.embeddings.weight" and model.config.tie_word_embeddings:
            others["lm_head.weight"] = found[name]
        assert_same_weights(loaded, others, but=name)
        if dtype == torch.float32:
            assert_fresh(name, found[name], model.config)
        else:
            assert found[name].dtype == expected[name].dtype and bool(found[name].isfinite().all())


def test_several_missing_keys_of_one_mixer(tmp_path):
    model = tiny_model(mixer_type="mamba2", num_hidden_layers=1)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    gone = [name for name in weights if name.endswith(("in_proj.weight", "dt_bias", "conv1d.weight"))]
    save_file(
        {key: value for key, value in weights.items() if key not in gone},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    loaded = CABMambaForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded[name], value) == (name not in gone), name


@pytest.mark.parametrize(
    "name", ["s6", "s6 untied, biases", "ssd 2 groups, gated mlp", "ssd post norms, scaled embeddings"]
)
@pytest.mark.parametrize("new_size", [120, 50])
@torch.no_grad()
def test_resize_token_embeddings(name, new_size, tmp_path):
    model, ids = tiny_model(**VARIANTS[name]), random_ids(2, 7, vocab_size=50)
    before = model(ids).logits
    model.resize_token_embeddings(new_size, mean_resizing=False)
    assert model.config.vocab_size == model.lm_head.out_features == new_size
    assert model.get_output_embeddings() is model.lm_head
    kept = min(new_size, 99)
    assert torch.equal(model(ids).logits[..., :kept], before[..., :kept])
    new_ids = random_ids(2, 7, vocab_size=new_size)
    output = model(new_ids, labels=new_ids)
    assert output.logits.shape == (2, 7, new_size) and bool(output.loss.isfinite())
    tied = model.lm_head.weight is model.backbone.embeddings.weight
    assert tied == model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    loaded = CABMambaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(new_ids).logits, output.logits)


@pytest.mark.parametrize("mixer_type", MIXER_TYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_what_decides_the_transition(mixer_type, dtype, tmp_path):
    model = tiny_model(mixer_type=mixer_type, intermediate_size=24)
    model.save_pretrained(tmp_path)
    loaded = CABMambaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    found = {name: value for name, value in loaded.state_dict().items() if value.dtype == torch.float32}
    assert sorted(found) == sorted(name for name in model.state_dict() if name.endswith(FLOAT32_NAMES))
    assert len(found) == (8 if mixer_type == "mamba" else 6)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value if name in found else value.to(dtype)), name
    # and once more through a file
    loaded.save_pretrained(tmp_path / "again")
    again = CABMambaForCausalLM.from_pretrained(tmp_path / "again", dtype=dtype)
    assert_same_weights(again, loaded.state_dict())
    with torch.no_grad():
        ids = random_ids(2, 7)
        assert loaded(ids).logits.dtype == dtype
        error = (loaded(ids).logits.float() - model(ids).logits).std() / model(ids).logits.std()
    assert float(error) < 0.05


@pytest.mark.parametrize("name", VARIANTS)
def test_the_config_survives_json(name, tmp_path):
    config = tiny_config(**VARIANTS[name])
    config.save_pretrained(tmp_path)
    again = CABMambaConfig.from_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "cab_mamba"
    for key, value in config.to_dict().items():
        other = again.to_dict()[key]
        assert (list(other) if isinstance(value, tuple) else other) == (
            list(value) if isinstance(value, tuple) else value
        )
    assert again.layer_mixer_types == config.layer_mixer_types


def test_weights_of_another_seed_differ():
    """The comparisons above can fail."""
    first, second = tiny_model(seed=0).state_dict(), shake(tiny_model(seed=0), seed=1).state_dict()
    assert not any(torch.equal(first[name], second[name]) for name in first)
