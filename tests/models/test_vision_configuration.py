"""CABVisionMambaConfig: Vim-Tiny by default, derived sizes, and messages with both numbers and a value that works."""

import ast
import json
import re

import pytest
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VISION_VARIANTS, tiny_vision_config

from cab_hf.models import CABMambaConfig, CABVisionMambaConfig
from cab_hf.models.configuration_cab_mamba import MixerConfig


def test_the_default_is_vim_tiny():
    config = CABVisionMambaConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.mixer_type) == (192, 24, "mamba")
    assert (config.state_size, config.mixer_width, config.time_step_rank, config.conv_kernel) == (16, 384, 12, 4)
    assert (config.norm_type, config.layer_norm_epsilon, config.residual_in_fp32) == ("rms_norm", 1e-5, True)
    assert (config.class_token, config.pooling, config.bidirectional) == ("middle", "class_token", True)
    assert config.grid == (14, 14) and config.num_patches == 196 and config.class_token_index(196) == 98
    assert config.transition_init == "identity" and config.intermediate_size is None
    assert config.drop_path_rate == 0.0 and config.layer_scale_init is None


def test_the_students_share_their_fields():
    shared = set(MixerConfig.__dataclass_fields__)
    assert {"mixer_types", "memory_range", "gated_mlp", "residual_in_fp32"} <= shared
    assert shared <= set(CABMambaConfig.__dataclass_fields__) & set(CABVisionMambaConfig.__dataclass_fields__)
    # neither student writes what only the other one reads
    assert not {"vocab_size", "max_position_embeddings", "shared_norm"} & set(CABVisionMambaConfig().to_dict())
    assert not {"image_size", "bidirectional", "class_token"} & set(CABMambaConfig().to_dict())


def test_derived_sizes():
    config = CABVisionMambaConfig(image_size=[32, 64], patch_size=8, hidden_size=10, class_token="first")
    assert config.grid == (4, 8) and config.num_patches == 32 and config.pooled_size == 10
    pooled = {"class_token": 10, "mean": 10, "class_token_and_mean": 20, "class_token_and_registers": 40}
    for pooling, size in pooled.items():
        assert CABVisionMambaConfig(hidden_size=10, num_register_tokens=3, pooling=pooling).pooled_size == size
    assert CABVisionMambaConfig(class_token="none").pooling == "mean"


@pytest.mark.parametrize(
    "class_token, places",
    [("first", [0, 0, 0, 0]), ("middle", [0, 2, 2, 98]), ("none", [None] * 4)],
)
def test_the_class_tokens_place(class_token, places):
    config = CABVisionMambaConfig(class_token=class_token)
    assert [config.class_token_index(patches) for patches in (1, 4, 5, 196)] == places


def test_stochastic_depth_grows_to_the_full_rate():
    config = CABVisionMambaConfig(num_hidden_layers=5, drop_path_rate=0.2)
    assert [config.drop_path_rate_of(layer) for layer in range(5)] == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])
    assert CABVisionMambaConfig(num_hidden_layers=1, drop_path_rate=0.2).drop_path_rate_of(0) == 0.2


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"image_size": 225}, ["225 x 225", "`patch_size` is 16"]),
        ({"image_size": (32, 40)}, ["32 x 40", "`patch_size` is 16"]),
        ({"image_size": 5}, ["5 x 5", "`patch_size` is 16"]),
        ({"image_size": 0}, ["0 x 0", "`patch_size` is 16"]),
        ({"class_token": "none", "pooling": "class_token"}, ["`pooling` is 'class_token'", "`class_token` is 'none'"]),
        ({"class_token": "none", "pooling": "class_token_and_mean"}, ["'class_token_and_mean'", "'none'"]),
        ({"class_token": "none", "num_register_tokens": 4}, ["`num_register_tokens` is 4", "`class_token` is 'none'"]),
        ({"pooling": "class_token_and_registers"}, ["'class_token_and_registers'", "`num_register_tokens` is 0"]),
    ],
    ids=str,
)
def test_what_does_not_fit_comes_with_what_does(arguments, words):
    with pytest.raises(StrictDataclassError) as error:
        CABVisionMambaConfig(**arguments)
    message = str(error.value)
    for word in words:
        assert word in message
    offers = re.findall(r"`(\w+)=([^`]+)`", message)
    assert offers
    for name, value in offers:
        CABVisionMambaConfig(**{**arguments, name: ast.literal_eval(value)})


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"image_size": (8, 8, 8)}, ["`image_size`", "(8, 8, 8)"]),
        ({"patch_size": 0}, ["`patch_size` must be at least 1, got 0"]),
        ({"num_channels": 0}, ["`num_channels` must be at least 1, got 0"]),
        ({"num_register_tokens": -1}, ["`num_register_tokens`", "-1"]),
        ({"drop_path_rate": 1.0}, ["`drop_path_rate`", "1.0"]),
        ({"drop_path_rate": -0.1}, ["`drop_path_rate`", "-0.1"]),
        ({"class_token": "last"}, ["last", "'middle', 'first', 'none'"]),
        ({"pooling": "max"}, ["max", "class_token_and_mean"]),
        # the mixers' own checks
        ({"mixer_types": ["mamba"]}, ["`mixer_types` names 1", "`num_hidden_layers` is 24"]),
        ({"mixer_type": "mamba2", "head_dim": 100}, ["3 * 100 = 300", "2 * 192 = 384"]),
        ({"gate_init": "transparent"}, ["`use_bias=True`"]),
        ({"hidden_size": 0}, ["`hidden_size` must be at least 1, got 0"]),
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_refused(arguments, words):
    with pytest.raises(StrictDataclassError) as error:
        CABVisionMambaConfig(**arguments)
    for word in words:
        assert word in str(error.value)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(height=st.integers(0, 70), width=st.integers(1, 70), patch_size=st.integers(1, 17))
def test_every_offered_image_size_works(height, width, patch_size):
    try:
        config = CABVisionMambaConfig(image_size=(height, width), patch_size=patch_size)
    except StrictDataclassError as error:
        offer = ast.literal_eval(re.search(r"`image_size=([^`]+)`", str(error)).group(1))
        config = CABVisionMambaConfig(image_size=offer, patch_size=patch_size)
        for side, offered in zip((height, width), offer):
            assert abs(side - offered) <= max(patch_size / 2, patch_size - side)
    assert config.num_patches >= 1


@pytest.mark.parametrize("name", VISION_VARIANTS)
def test_the_config_survives_json(name, tmp_path):
    config = tiny_vision_config(**VISION_VARIANTS[name], drop_path_rate=0.1)
    config.save_pretrained(tmp_path)
    again = CABVisionMambaConfig.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "cab_vision_mamba"
    assert (again.grid, again.num_labels, again.pooling) == ((2, 3), 7, config.pooling)
    assert json.loads(again.to_json_string()) == json.loads(config.to_json_string())
