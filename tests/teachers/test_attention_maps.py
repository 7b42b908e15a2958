"""Maps are those that a teacher applies: windows, softcaps, sinks, biases and padding are in them.

The truth is what transformers' eager attention returns as its map.
"""

import copy

import pytest
import torch
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from cab_hf.distillation.losses import attention_loss
from cab_hf.teachers import Teacher
from cab_hf.teachers.attention_interface import _answer_map


BASE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**BASE, "vocab_size": 61, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.5}
WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": ["full_attention"] * 2}
IMAGE = {**BASE, "image_size": 32, "patch_size": 8, "initializer_range": 0.5}
TEACHERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TEXT)),
    "window": lambda: MistralForCausalLM(MistralConfig(**TEXT, sliding_window=4)),
    "window in one layer": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**TEXT, **WINDOW)),
    "softcap": lambda: Gemma2ForCausalLM(
        Gemma2Config(**TEXT, sliding_window=64, attn_logit_softcapping=1.0, attn_implementation="eager")
    ),
    "sinks": lambda: GptOssForCausalLM(GptOssConfig(**TEXT, **EXPERTS, attn_implementation="eager")),
    "both directions": lambda: BertForMaskedLM(BertConfig(**BASE, vocab_size=61, initializer_range=0.5)),
    "relative bias": lambda: BeitForImageClassification(BeitConfig(**IMAGE, use_relative_position_bias=True)),
    "images": lambda: ViTForImageClassification(ViTConfig(**IMAGE)),
}
LEFT = torch.tensor([[1] * 16, [0] * 5 + [1] * 11])


def make(name):
    torch.manual_seed(0)
    model = TEACHERS[name]().eval()
    for parameter_name, parameter in model.named_parameters():
        if "relative_position" in parameter_name or "sinks" in parameter_name:
            torch.nn.init.normal_(parameter, std=3.0)
    return model


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("name", TEACHERS)
@torch.no_grad()
def test_maps_are_the_teachers_own(name, is_padded):
    model = make(name)
    generator = torch.Generator().manual_seed(0)
    batch = {"input_ids": torch.randint(1, 61, (2, 16), generator=generator)}
    if model.main_input_name == "pixel_values":
        if is_padded:
            pytest.skip("images have no padding")
        batch = {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    elif is_padded:
        batch["attention_mask"] = LEFT
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    truth = eager(**batch, output_attentions=True).attentions
    answer = Teacher(model)(batch, maps=True)
    assert len(answer.maps) == len(truth) == 2
    real = LEFT if is_padded else torch.ones(truth[0].shape[0], truth[0].shape[2])
    for make_map, expected in zip(answer.maps, truth):
        expected = expected[..., : expected.shape[2]]  # without a sink's own column
        assert attention_loss(make_map(), expected, real) < 1e-8
        assert attention_loss(make_map().flip(1), expected, real) > 1e-3  # heads differ, so that it says something


def test_a_map_comes_in_pieces_where_values_have_one_width():
    torch.manual_seed(0)
    weights = torch.rand(2, 4, 11, 11)

    def attention(value):
        assert value.shape == (2, 2, 11, 4)
        return (weights @ value.repeat_interleave(2, dim=1)).transpose(1, 2), None

    made = _answer_map(attention, torch.randn(2, 2, 11, 4), whole=False)
    torch.testing.assert_close(made, weights)
