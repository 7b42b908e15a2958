"""Models that can not teach, and what they are told."""

import pytest
import torch
from tiny_teachers import GQA, IDS, IMAGES, SIZES, TOWER, TOWERS, batch, make
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    BloomConfig,
    CLIPModel,
    Dinov2Backbone,
    Dinov2Config,
    FalconConfig,
    GPT2Config,
    Qwen3NextConfig,
    Siglip2VisionModel,
    T5Config,
    T5ForConditionalGeneration,
)

from cab_hf.teachers.examination import tiny_batch
from cab_hf.teachers.teacher import Teacher


def image_classifier(family, **options):
    return AutoModelForImageClassification.from_config(AutoConfig.for_model(family, **options))


CONVOLUTIONS = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}
WINDOWS = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: T5ForConditionalGeneration(
                T5Config(d_model=32, num_layers=2, num_heads=4, vocab_size=99, decoder_start_token_id=0, **IDS)
            ),
            "encoder-decoder",
        ),
        (lambda: torch.nn.Linear(2, 2), "Linear.*PreTrainedModel"),
        (lambda: Dinov2Backbone(Dinov2Config(**IMAGES)), "Dinov2Backbone.*last_hidden_state.*only .*feature_maps"),
        (
            lambda: Siglip2VisionModel(AutoConfig.for_model("siglip2_vision_model", **TOWER, num_patches=4)),
            "Siglip2VisionModel.*fails on a tiny batch.*pixel_attention_mask.*'pixel_values' alone",
        ),
        (lambda: CLIPModel(AutoConfig.for_model("clip", **TOWERS)), "CLIPModel.*fails on .*'input_ids' alone"),
    ],
)
def test_teachers_that_can_not_teach_raise(model, message):
    with pytest.raises(ValueError, match=message):
        Teacher(model())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: make(BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=99, **IDS), "eager"),
            "'bloom'.*hides its attention",
        ),
        (lambda: make(FalconConfig(**SIZES)), "FalconForCausalLM .*hides its attention.*Llama"),
        (
            lambda: make(AutoConfig.for_model("mamba", **SIZES), None),
            "MambaForCausalLM.* 0 of its 0 attention outputs",
        ),
        (lambda: image_classifier("resnet", **CONVOLUTIONS), "ResNetForImageClassification.* 0 of its 0 attention"),
        (lambda: image_classifier("swin", **WINDOWS), "SwinForImageClassification.*inside 8 windows of 2 inputs"),
    ],
)
def test_hidden_attention_is_refused_where_it_is_asked_for_and_no_sooner(model, message):
    teacher = Teacher(model())
    inputs = tiny_batch(teacher.model, teacher.model)
    assert teacher(inputs).last_hidden_state is not None and teacher.paths == ()
    assert torch.equal(teacher(inputs, logits=True).logits, teacher.model(**inputs).logits)
    with pytest.raises(ValueError, match=message):
        teacher(inputs, attentions=True)


def test_a_teacher_that_attends_in_part_shows_that_part():
    config = Qwen3NextConfig(
        **GQA,
        head_dim=16,
        layer_types=["linear_attention", "full_attention"],
        num_experts=2,
        num_experts_per_tok=1,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    teacher = Teacher(make(config))
    assert teacher.paths == ("layers.1.self_attn",) and teacher.layer_numbers == (1,)
    (attention,) = teacher(batch(), attentions=True).attentions
    assert attention.query.shape == (2, 4, 7, 16) and attention.key.shape == (2, 2, 7, 16)
    with pytest.raises(ValueError, match="shows attention in 1 modules, not layer by layer.*bridge_weight"):
        teacher(batch(), maps=True)


def test_projections_of_usual_names_teach_where_a_module_attends_itself():
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 99, **IDS}
    model = make(AutoConfig.for_model("gpt_neo", **sizes, attention_types=[[["global"], 2]]), "eager")
    teacher = Teacher(model)
    assert teacher.paths == ("h.0.attn.attention", "h.1.attn.attention")
    seen = teacher(batch(), attentions=True)
    attention = model.transformer.h[0].attn.attention
    normed = model.transformer.h[0].ln_1(seen_embeddings(model, batch()["input_ids"]))
    torch.testing.assert_close(seen.attentions[0].key.transpose(1, 2).flatten(2), attention.k_proj(normed))


def seen_embeddings(model, tokens):
    return model.transformer.wte(tokens) + model.transformer.wpe(torch.arange(tokens.shape[1]))


def test_attention_that_depends_on_the_implementations_name_raises():
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=99, reorder_and_upcast_attn=True, scale_attn_weights=False, **IDS
    )
    model = make(config, "eager")
    # The upcast branch of eager GPT-2 gives the same numbers in float32; make it differ to see that it is noticed.
    model.transformer.h[0].attn._upcast_and_reordered_attn = lambda q, k, v, mask: (v.transpose(1, 2), None)
    with pytest.raises(ValueError, match="gives another output.*'eager' specially"):
        Teacher(model)


def test_the_encoder_of_an_encoder_decoder_teaches():
    sizes = {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "vocab_size": 99}
    teacher = Teacher(T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, **IDS)).get_encoder())
    assert len(teacher.paths) == 2 and not teacher.is_causal
    assert teacher(batch(), attentions=True).attentions[1].key.shape == (2, 4, 7, 8)
