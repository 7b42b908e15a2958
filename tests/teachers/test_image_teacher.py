"""Image models as teachers."""

import pytest
import torch
from tiny_distillation import NO_LOSS
from tiny_images import image_rows, make_image_trainer, stacked, tiny_image_student
from tiny_teachers import IMAGES, PLAIN, TOWER, TOWERS, scaled_up
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    ViTConfig,
    ViTForMaskedImageModeling,
)

from cab_hf.teachers.teacher import Teacher


# Options, and tokens in front of the 4 patches.
CLASSIFIERS = {
    "vit": (IMAGES, 1),
    "vit_msn": (IMAGES, 1),
    "deit": ({**IMAGES, "architectures": ["DeiTForImageClassification"]}, 2),
    "beit": (IMAGES, 1),
    "ijepa": (IMAGES, 0),
    "dinov2": (IMAGES, 1),
    "dinov2_with_registers": ({**IMAGES, "num_register_tokens": 3}, 4),
    "clip": (TOWERS, 1),
    "metaclip_2": (TOWERS, 1),
    "siglip": (TOWERS, 0),
}
WITHOUT_LOGITS = {
    "dinov3_vit": ({**TOWER, "num_register_tokens": 2}, 3),
    "clip_vision_model": ({**TOWER, "projection_dim": 7}, 1),
    "siglip_vision_model": (TOWER, 0),
}


def vision_model(family, implementation="sdpa"):
    torch.manual_seed(0)
    options, _ = (CLASSIFIERS | WITHOUT_LOGITS)[family]
    config = AutoConfig.for_model(family, **options, attn_implementation=implementation)
    if family == "clip_vision_model":
        return scaled_up(CLIPVisionModelWithProjection(config).eval())
    auto = AutoModelForImageClassification if family in CLASSIFIERS else AutoModel
    return scaled_up(auto.from_config(config).eval())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", CLASSIFIERS | WITHOUT_LOGITS)
def test_vision(family, implementation):
    model, untouched = vision_model(family, implementation), vision_model(family, "eager")
    inputs = {"pixel_values": torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2))}
    with torch.no_grad():
        before = model(**inputs)
        maps = untouched(**inputs, output_attentions=True).attentions
    teacher = Teacher(model)
    assert teacher.has_logits == (family in CLASSIFIERS) and teacher.head is None
    output = teacher(inputs, attentions=True, hidden_states=True, logits=teacher.has_logits)
    if teacher.has_logits:
        assert torch.equal(output.logits, before.logits)
    else:
        assert torch.equal(output.last_hidden_state, before.last_hidden_state)
        with pytest.raises(ValueError, match=f"{type(model).__name__}.*has no head that gives logits"):
            teacher(inputs, logits=True)
    tokens = 4 + (CLASSIFIERS | WITHOUT_LOGITS)[family][1]
    for (query, key, written), scaling, attention_map in zip(output.attentions, teacher.scalings, maps, strict=True):
        assert query.shape == key.shape == (3, 4, tokens, 8) and written.shape == (3, tokens, 4, 8)
        if family != "beit":  # adds a bias to the scores
            scores = (query @ key.mT * scaling).softmax(-1)
            torch.testing.assert_close(scores, attention_map, rtol=1e-4, atol=1e-5)
    assert len(output.hidden_states) == 3 and not teacher.norms_last_hidden_state
    assert teacher(inputs).last_hidden_state.shape == (3, tokens, 32)
    assert (teacher.hidden_size, teacher.config.patch_size) == (32, 4)
    assert teacher.restore() is model
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], before[0])


def test_rotation_by_image_coordinates_stays():
    with pytest.raises(ValueError, match="remove_rotary=True, but .*DINOv3ViTModel.*takes no position_ids.*False"):
        Teacher(vision_model("dinov3_vit"), remove_rotary=True)


def test_a_masked_image_model_has_no_class_scores():
    assert not Teacher(ViTForMaskedImageModeling(ViTConfig(**IMAGES))).has_logits


def test_image_trainer_with_a_projection_and_with_a_tower(tmp_path):
    """A projection is no classifier: the bridge and labels teach. A classifier on a tower of two teaches all."""
    sizes = {**TOWER, "num_hidden_layers": 4}
    projection = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, projection_dim=7))
    wanted = NO_LOSS | {"bridge_weight": 1.0, "ce_weight": 1.0}
    with pytest.raises(ValueError, match="`kl_weight` is 1.0, but .*CLIPVisionModelWithProjection has no classifier"):
        make_image_trainer(tmp_path, teacher=projection, **(wanted | {"kl_weight": 1.0}))
    trainer, recorder = make_image_trainer(tmp_path, teacher=projection, eval_dataset=image_rows(4), **wanted)
    trainer.train()
    assert recorder.logs[0]["bridge"] > 0 and recorder.logs[0]["ce"] > 0
    assert "eval_kl" not in trainer.evaluate()

    images, _ = stacked(image_rows())
    for family, class_token in (("clip", "middle"), ("siglip", "none")):
        ours = tiny_image_student(class_token=class_token, pooling="mean")
        config = AutoConfig.for_model(family, vision_config=sizes, text_config=PLAIN, num_labels=7)
        torch.manual_seed(0)
        tower = scaled_up(AutoModelForImageClassification.from_config(config).eval())
        with torch.no_grad():
            p, q = (model(images).logits.softmax(-1) for model in (tower, ours))
        trainer, recorder = make_image_trainer(tmp_path, student=ours, teacher=tower, **(wanted | {"kl_weight": 1.0}))
        trainer.train()
        expected = float((p * (p.log() - q.log())).sum(-1).mean())
        assert recorder.logs[0]["kl"] == pytest.approx(expected, rel=1e-4) and expected > 0.01
