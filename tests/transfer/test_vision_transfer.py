"""A vision student of a teacher: its function with the teacher's attention put back, its projections without."""

import copy

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassClassValidationError
from tiny_models import largest_difference, random_images
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    BeitConfig,
    BeitForImageClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
)

from cab_hf.models import CABVisionMambaConfig, CABVisionMambaForImageClassification, CABVisionMambaModel
from cab_hf.teachers.teacher import Teacher
from cab_hf.transfer import (
    VISION_FAMILIES,
    calibrate_output_norm,
    copy_vision_teacher_weights,
    fit_output_projection,
    student_from_teacher,
    vision_family_of,
    vision_student_config,
)


LABELS = {0: "cat", 1: "dog", 2: "emu", 3: "fox", 4: "gnu"}
SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 12,
    "patch_size": 4,
    "id2label": LABELS,
    "label2id": {label: index for index, label in LABELS.items()},
}
PLAIN = {**SIZES, "intermediate_size": 20}
TEACHERS = {
    "vit": (ViTForImageClassification, ViTConfig(**PLAIN, layer_norm_eps=1e-3)),
    "vit-plain": (
        ViTForImageClassification,
        ViTConfig(**PLAIN | {"image_size": (8, 12), "num_channels": 1}, qkv_bias=False, hidden_act="relu"),
    ),
    "deit": (DeiTForImageClassification, DeiTConfig(**PLAIN)),
    "deit-two-heads": (DeiTForImageClassificationWithTeacher, DeiTConfig(**PLAIN)),
    "dinov2": (Dinov2ForImageClassification, Dinov2Config(**SIZES, mlp_ratio=2, hidden_act="gelu_new")),
    "dinov2-swiglu": (Dinov2ForImageClassification, Dinov2Config(**SIZES, use_swiglu_ffn=True, layerscale_value=0.3)),
    "dinov2_with_registers": (
        Dinov2WithRegistersForImageClassification,
        Dinov2WithRegistersConfig(**SIZES, mlp_ratio=2, num_register_tokens=3),
    ),
}
IMAGES = random_images(2, 3, 12, 12)
FIRST_OF_FAMILY = ["vit", "deit-two-heads", "dinov2", "dinov2_with_registers"]


def shaken(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * (0.15 if parameter.ndim == 2 else 0.4))
    return model.eval()


def make(name, seed=0):
    kind, config = TEACHERS[name]
    torch.manual_seed(seed)
    return shaken(kind(copy.deepcopy(config)), seed)


def images_for(teacher, count=2, size=None, seed=0):
    config = teacher.config
    height, width = size or ((config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size)
    return random_images(count, config.num_channels, height, width, seed=seed)


def attentions_of(teacher):
    base = teacher.base_model
    blocks = base.encoder.layer if "dinov2" in base.config.model_type else base.layers
    return [block.attention for block in blocks]


class AttentionAsMixer(nn.Module):
    """A teacher's attention where a mixer was, with the call of a mixer."""

    def __init__(self, attention):
        super().__init__()
        self.attention = [attention]

    def forward(self, hidden_states, output_projections=False):
        return self.attention[0](hidden_states)[0], (None,) * 7


def with_attention_of(teacher, student):
    for block, attention in zip(student.backbone.layers, attentions_of(teacher), strict=True):
        block.mixer = AttentionAsMixer(attention)
    return student


@pytest.mark.parametrize("class_token", ["first", "middle"])
@pytest.mark.parametrize("name", TEACHERS)
@torch.no_grad()
def test_with_the_teachers_attention_the_student_is_the_teacher(name, class_token):
    teacher = make(name)
    images = images_for(teacher)
    student = with_attention_of(teacher, student_from_teacher(teacher, class_token=class_token))
    expected = teacher(images).logits
    torch.testing.assert_close(student(images).logits, expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.3 and expected[0].sub(expected[1]).abs().max() > 0.1
    # Each of the things that are not the mixer's matters here.
    for key in ("class_token", "position_embeddings", "patch_embedding.bias"):
        broken = copy.deepcopy(student)
        broken.backbone.embeddings.get_parameter(key).flatten()[-7:].add_(0.5)
        assert largest_difference(broken(images).logits, expected) > 1e-3, key


@pytest.mark.parametrize("class_token", ["first", "middle"])
@pytest.mark.parametrize("size", [(8, 16), (20, 20)])
@pytest.mark.parametrize("name", ["vit", "deit", "deit-two-heads", "dinov2", "dinov2_with_registers"])
@torch.no_grad()
def test_images_of_another_size(name, size, class_token):
    teacher = make(name)
    images = images_for(teacher, size=size)
    expected = teacher(images, **({} if "dinov2" in name else {"interpolate_pos_encoding": True})).logits
    made_for_it = student_from_teacher(teacher, image_size=size, class_token=class_token)
    assert made_for_it.config.image_height_and_width == size
    torch.testing.assert_close(with_attention_of(teacher, made_for_it)(images).logits, expected, rtol=1e-5, atol=1e-5)
    resizing = with_attention_of(teacher, student_from_teacher(teacher, class_token=class_token))
    if VISION_FAMILIES[teacher.config.model_type].antialias:  # which a student's own resizing does not do
        assert largest_difference(resizing(images).logits, expected) < 0.5 * expected.std()
    else:
        torch.testing.assert_close(resizing(images).logits, expected, rtol=1e-5, atol=1e-5)


def normed_and_attention(teacher, images):
    """Normed input `(b, t, d)`, output `(b, t, d)`, and unscaled query and key `(b, t, h, p)` of each attention."""
    inputs, outputs = [], []

    def record(module, args, kwargs, output):
        inputs.append(args[0] if args else kwargs["hidden_states"])
        outputs.append(output[0])

    handles = [module.register_forward_hook(record, with_kwargs=True) for module in attentions_of(teacher)]
    teacher(images)
    for handle in handles:
        handle.remove()
    heads = [
        (attention.q_proj(x).unflatten(-1, (4, 6)), attention.k_proj(x).unflatten(-1, (4, 6)))
        for attention, x in zip(attentions_of(teacher), inputs, strict=True)
    ]
    return inputs, outputs, heads


def moving_average(B, C, x):
    """Linear attention of `x` `(b, t, h, p)`, with a decay of exp(-1 / memory) a token and weight 1 / memory."""
    memory = torch.logspace(torch.tensor(8.0).log10(), torch.tensor(512.0).log10(), x.shape[2])
    result = torch.zeros_like(x)
    for i in range(x.shape[1]):
        for j in range(i + 1):
            weight = torch.exp((j - i) / memory) / memory * (C[:, i] * B[:, j]).sum(-1)  # (b, h)
            result[:, i] += weight[..., None] * x[:, j]
    return result


@pytest.mark.parametrize("name", ["vit", "vit-plain", "deit", "dinov2-swiglu", "dinov2_with_registers"])
@torch.no_grad()
def test_both_directions_start_from_the_teachers_projections(name):
    teacher = make(name)
    student = student_from_teacher(teacher)
    inputs, _, heads = normed_and_attention(teacher, images_for(teacher))
    for block, attention, x, (query, key) in zip(
        student.backbone.layers, attentions_of(teacher), inputs, heads, strict=True
    ):
        _, mixed = block.mixer(x)
        for found, expected in (
            (mixed.B, key),
            (mixed.backward_B.flip(1), key),
            (mixed.C, query * 6**-0.5),
            (mixed.backward_C.flip(1), query * 6**-0.5),
        ):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        value = attention.v_proj(x).unflatten(-1, (4, 6))
        forward = moving_average(key, query * 6**-0.5, value)
        backward = moving_average(key.flip(1), query.flip(1) * 6**-0.5, value.flip(1)).flip(1)
        mean = (forward + backward) / 2
        normed = mean * torch.rsqrt(mean.square().mean(-1, keepdim=True) + teacher.config.layer_norm_eps)
        torch.testing.assert_close(mixed.output, normed.flatten(-2), rtol=2e-3, atol=2e-4)
        assert torch.equal(block.mixer.out_proj.weight, attention.o_proj.weight)
        assert torch.equal(block.mixer.out_proj.bias, attention.o_proj.bias)


@torch.no_grad()
def test_s6_takes_values_and_outputs():
    teacher = make("dinov2")
    student = student_from_teacher(teacher, mixer_type="mamba")
    assert student.config.state_size == 16
    for block, attention in zip(student.backbone.layers, attentions_of(teacher), strict=True):
        x = torch.randn(2, 5, 24)
        x_and_gate = block.mixer.in_proj(x)
        torch.testing.assert_close(x_and_gate[..., :24], attention.v_proj(x), rtol=1e-4, atol=1e-5)
        assert F.silu(x_and_gate[..., 24:]).sub(1).abs().max() < 1e-5
        assert torch.equal(block.mixer.out_proj.weight, attention.o_proj.weight)


@pytest.mark.parametrize("name", ["vit", "deit-two-heads", "dinov2-swiglu", "dinov2_with_registers"])
@torch.no_grad()
def test_student_round_trip(name, tmp_path):
    teacher = make(name)
    student = student_from_teacher(teacher, calibration_inputs={"pixel_values": IMAGES})
    student.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is CABVisionMambaForImageClassification
    assert loaded.config.id2label == LABELS and loaded.config.label2id["emu"] == 2
    for key, value in student.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert torch.equal(loaded(IMAGES).logits, student(IMAGES).logits)
    rebuilt = CABVisionMambaForImageClassification(CABVisionMambaConfig.from_pretrained(tmp_path))
    rebuilt.load_state_dict(student.state_dict(), strict=True)


@pytest.mark.parametrize("mixer_type", ["mamba", "mamba2"])
@pytest.mark.parametrize("name", FIRST_OF_FAMILY)
def test_untrained_students_train_in_bfloat16_autocast(name, mixer_type):
    student = student_from_teacher(make(name), mixer_type=mixer_type, class_token="middle").train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = student(IMAGES, labels=torch.tensor([0, 3]))
    assert torch.isfinite(output.logits).all() and output.logits.std() > 0
    output.loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in student.parameters())


@pytest.mark.parametrize(("name", "mixer_type"), [("vit", "mamba2"), ("dinov2_with_registers", "mamba")])
@pytest.mark.parametrize("class_token", ["first", "middle"])
@torch.no_grad()
def test_calibration_gives_the_outputs_the_teachers_size(name, mixer_type, class_token):
    teacher, inputs = make(name), {"pixel_values": IMAGES, "labels": torch.tensor([0, 1])}
    recorded = Teacher(make(name))(inputs, attentions=True).attentions
    kinds = {"mixer_type": mixer_type, "class_token": class_token}
    student = student_from_teacher(teacher, calibration_inputs=inputs, **kinds)
    before = student_from_teacher(teacher, **kinds)
    projections = student(IMAGES, output_projections=True).projections
    for index, (attention, projection) in enumerate(zip(recorded, projections, strict=True)):
        rms = projection.output.unflatten(-1, (4, 6)).square().mean(dim=(0, 1, 3)).sqrt()
        if mixer_type == "mamba":  # no norm: the scale sits in the output projection's columns
            found, start = (model.backbone.layers[index].mixer.out_proj.weight for model in (student, before))
            rms = rms * (found / start).unflatten(-1, (4, 6)).mean(dim=(0, 2))
        torch.testing.assert_close(rms, attention.output.square().mean(dim=(0, 1, 3)).sqrt(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit", {}),
        ("vit", {"class_token": "none"}),
        ("dinov2_with_registers", {"class_token": "middle"}),
        ("dinov2", {"bidirectional": False, "num_hidden_layers": 2, "layer_map": [2, 0]}),
    ],
)
@torch.no_grad()
def test_fitted_output_projections_are_least_squares(name, options):
    """Against `lstsq` on the tokens of the teacher's layers, moved by hand to the student's places."""
    teacher = make(name)
    pixels = images_for(teacher, count=12, seed=3)
    student = student_from_teacher(teacher, **options)
    layers = options.get("layer_map", range(3))
    before = copy.deepcopy(student.state_dict())
    fit_output_projection(
        student, teacher, ({"pixel_values": part} for part in pixels.split(6)), layer_map=list(layers), ridge=0.0
    )
    changed = {key for key, value in student.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all("out_proj" in key for key in changed)
    inputs, outputs, _ = normed_and_attention(teacher, pixels)
    # 9 patches; the teacher's tokens are class token, 3 registers in one family, patches.
    order = {
        "none": list(range(1, 10)),
        "middle": [4, 5, 6, 7, 0, 1, 2, 3, 8, 9, 10, 11, 12],
    }.get(student.config.class_token, slice(None))
    for block, layer in zip(student.backbone.layers, layers, strict=True):
        features = block.mixer(inputs[layer][:, order])[1].output.flatten(0, 1).double()
        target = outputs[layer][:, order].flatten(0, 1).double()
        features = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)
        best = features @ torch.linalg.lstsq(features, target).solution
        weight = torch.cat([block.mixer.out_proj.weight, block.mixer.out_proj.bias[:, None]], dim=1).double()
        error, least = (x.sub(target).square().mean() for x in (features @ weight.T, best))
        assert least < 0.9 * target.var()
        assert float(error / least) == pytest.approx(1.0, abs=1e-3)


def test_fewer_layers_take_the_mapped_ones():
    teacher = make("dinov2")
    blocks = teacher.dinov2.encoder.layer
    for kind, expected in (("floor", [0, 1]), ("last", [0, 2]), ("uniform", [0, 2]), ([2, 1], [2, 1])):
        student = student_from_teacher(teacher, num_hidden_layers=2, layer_map=kind)
        for block, layer in zip(student.backbone.layers, expected, strict=True):
            assert torch.equal(block.mlp.down_proj.weight, blocks[layer].mlp.fc2.weight)
            assert torch.equal(block.mlp_norm.bias, blocks[layer].norm2.bias)
            assert torch.equal(block.mixer_scale, blocks[layer].layer_scale1.lambda1)
            assert torch.equal(block.mlp_scale, blocks[layer].layer_scale2.lambda1)
            assert torch.equal(block.mixer.out_proj.weight, blocks[layer].attention.o_proj.weight)


@pytest.mark.parametrize("name", FIRST_OF_FAMILY)
def test_teacher_is_neither_changed_nor_shared(name):
    teacher = make(name).train()
    next(teacher.parameters()).requires_grad_(False)
    flags = [parameter.requires_grad for parameter in teacher.parameters()]
    before, implementation = copy.deepcopy(teacher.state_dict()), teacher.config._attn_implementation
    student = student_from_teacher(teacher, calibration_inputs={"pixel_values": IMAGES})
    fit_output_projection(student, teacher, [{"pixel_values": IMAGES}])
    for parameter in student.parameters():
        assert parameter.requires_grad
        parameter.data.add_(1.0)
    student.config.id2label[0] = "something else"
    assert teacher.config.id2label == LABELS
    assert teacher.training and all(module.training for module in teacher.modules())
    assert flags == [parameter.requires_grad for parameter in teacher.parameters()]
    assert teacher.config._attn_implementation == implementation
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


# What the classifier reads, and where it comes from


@pytest.fixture
def warnings(monkeypatch):
    found = []
    monkeypatch.setattr("cab_hf.transfer.vision.logger.warning", found.append)
    return found


@pytest.mark.parametrize(
    ("kind", "pooling"),
    [(ViTModel, "class_token"), (DeiTModel, "class_token"), (Dinov2Model, "class_token_and_mean")],
)
@torch.no_grad()
def test_a_teacher_without_a_classifier(kind, pooling, warnings):
    name = {ViTModel: "vit", DeiTModel: "deit", Dinov2Model: "dinov2"}[kind]
    teacher = shaken(kind(copy.deepcopy(TEACHERS[name][1])))
    student = student_from_teacher(teacher)
    assert student.config.pooling == pooling and student.config.id2label == LABELS
    assert len(warnings) == 1 and f"5 labels starts at random: {kind.__name__} has no classifier" in warnings[0]
    expected = teacher(IMAGES).last_hidden_state
    backbone = student_from_teacher(teacher, student_class=CABVisionMambaModel)
    assert len(warnings) == 1 and type(backbone) is CABVisionMambaModel
    for student_backbone in (student.backbone, backbone):
        for block, attention in zip(student_backbone.layers, attentions_of(teacher), strict=True):
            block.mixer = AttentionAsMixer(attention)
        torch.testing.assert_close(student_backbone(IMAGES).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_labels_and_pooling_of_the_users_choice(warnings):
    teacher = make("deit-two-heads")
    same = student_from_teacher(teacher, num_labels=5)
    assert same.config.id2label == LABELS and not warnings
    torch.testing.assert_close(
        same.classifier.weight,
        torch.cat([teacher.cls_classifier.weight, teacher.distillation_classifier.weight], dim=1) / 2,
    )
    other = student_from_teacher(teacher, num_labels=2)
    assert other.classifier.weight.shape == (2, 48) and other.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert "2 labels starts at random: the teacher's has 5 labels" in warnings.pop()
    assert isinstance(student_from_teacher(teacher, num_labels=0).classifier, nn.Identity) and not warnings
    plain = student_from_teacher(teacher, num_register_tokens=0, pooling="class_token")
    assert plain.backbone.embeddings.register_tokens is None and plain.classifier.weight.shape == (5, 24)
    assert "reads 'class_token_and_registers' and the student's 'class_token'" in warnings.pop()
    none = student_from_teacher(make("dinov2_with_registers"), class_token="none")
    assert (none.config.pooling, none.config.num_register_tokens) == ("mean", 0)
    positions = make("dinov2_with_registers").dinov2_with_registers.embeddings.position_embeddings[:, 1:]
    assert torch.equal(none.backbone.embeddings.position_embeddings, positions)
    assert "the student's 'mean'" in warnings.pop()
    headless = TEACHERS["vit"][0](ViTConfig(**{k: v for k, v in PLAIN.items() if "label" not in k}, num_labels=0))
    assert student_from_teacher(headless).config.num_labels == 0 and not warnings
    student_from_teacher(shaken(ViTForMaskedImageModeling(copy.deepcopy(TEACHERS["vit"][1]))))
    assert "ViTForMaskedImageModeling has no classifier" in warnings.pop()


@torch.no_grad()
def test_tokens_that_only_one_of_both_has():
    teacher = make("dinov2_with_registers")
    tokens = teacher.dinov2_with_registers.embeddings
    without = student_from_teacher(teacher, num_register_tokens=0).backbone.embeddings
    assert without.register_tokens is None and torch.equal(without.class_token, tokens.cls_token)
    unplaced = student_from_teacher(teacher, use_absolute_positions=False).backbone.embeddings
    assert unplaced.position_embeddings is None and torch.equal(unplaced.register_tokens, tokens.register_tokens)
    more = student_from_teacher(make("vit"), num_register_tokens=2, class_token="middle").backbone.embeddings
    assert more.register_tokens.std() > 0 and more(IMAGES).shape[1] == 12
    positions = make("vit").vit.embeddings.position_embeddings
    assert torch.equal(more.position_embeddings[:, 4], positions[:, 0])  # 9 patches: the middle is behind the fourth
    assert torch.equal(more.position_embeddings[:, 5], positions[:, 5])
    distilled = make("deit")
    register = student_from_teacher(distilled, class_token="middle").backbone.embeddings.register_tokens
    expected = distilled.deit.embeddings.distillation_token + distilled.deit.embeddings.position_embeddings[:, 1:2]
    torch.testing.assert_close(register, expected)


# Configuration


def test_config_follows_the_teacher_and_overrides():
    config = vision_student_config(make("vit"))
    assert (config.norm_type, config.layer_norm_epsilon, config.hidden_act) == ("layer_norm", 1e-3, "gelu")
    assert (config.intermediate_size, config.gated_mlp, config.mlp_bias) == (20, False, True)
    assert (config.n_groups, config.state_size, config.head_dim, config.expand) == (4, 6, 6, 1)
    assert (config.class_token, config.pooling, config.bidirectional) == ("first", "class_token", True)
    assert (config.transition_init, config.conv_init, config.gate_init) == ("moving_average",) + ("transparent",) * 2
    assert (config.image_size, config.patch_size, config.layer_scale_init) == (12, 4, None)
    config = vision_student_config(make("dinov2-swiglu"), transition_init="identity", drop_path_rate=0.1)
    assert (config.intermediate_size, config.gated_mlp, config.hidden_act) == (64, True, "silu")
    assert (config.transition_init, config.drop_path_rate, config.layer_scale_init) == ("identity", 0.1, 0.3)
    assert vision_student_config(make("vit-plain")).num_channels == 1
    assert {name.split("-")[0] for name in TEACHERS} == set(VISION_FAMILIES)


def test_dtype_and_steps_alone():
    teacher = make("vit")
    half = student_from_teacher(teacher, dtype=torch.bfloat16)
    mixer = half.backbone.layers[0].mixer
    assert mixer.in_proj.weight.dtype == half.backbone.embeddings.class_token.dtype == torch.bfloat16
    assert mixer.backward.A_log.dtype == mixer.backward.dt_bias.dtype == torch.float32
    assert torch.isfinite(half(IMAGES).logits).all()
    student = CABVisionMambaForImageClassification(vision_student_config(teacher))
    copy_vision_teacher_weights(student, teacher, [0, 1, 2])
    calibrate_output_norm(student, teacher, {"pixel_values": IMAGES})
    whole = student_from_teacher(teacher, calibration_inputs={"pixel_values": IMAGES})
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in student.state_dict().items())
    random = student_from_teacher(teacher, copy_weights=False)
    assert random.config.to_dict() == whole.config.to_dict()
    assert not torch.equal(random.classifier.weight, teacher.classifier.weight)
    no_attention = student_from_teacher(teacher, copy_attention=False)
    assert torch.equal(no_attention.classifier.weight, teacher.classifier.weight)
    mixer, attention = no_attention.backbone.layers[0].mixer, attentions_of(teacher)[0]
    assert not torch.equal(mixer.out_proj.weight, attention.o_proj.weight)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (SwinForImageClassification, SwinConfig(embed_dim=8, depths=[1], num_heads=[2], image_size=32)),
        (BeitForImageClassification, BeitConfig(**PLAIN)),
        (CLIPVisionModel, CLIPVisionConfig(**PLAIN)),
    ],
)
def test_unknown_families(kind, config):
    teacher = kind(config)
    known = "'deit', 'dinov2', 'dinov2_with_registers', 'vit'.*CABVisionMambaConfig"
    with pytest.raises(ValueError, match=f"'{config.model_type}'.*{known}"):
        student_from_teacher(teacher)
    with pytest.raises(ValueError, match=known):
        vision_family_of(AutoConfig.for_model("convnext"))


def test_errors_teach():
    teacher = make("vit")
    for options, message in (
        ({"patch_size": 2}, r"patch_embedding.weight is \(24, 3, 2, 2\), the teacher's is \(24, 3, 4, 4\)"),
        ({"n_groups": 2}, "n_groups=2 and state_size=6, the teacher 4 query heads.*copy_attention=False"),
        ({"intermediate_size": 10}, r"mlp.up_proj.weight is \(10, 24\), the teacher's is \(20, 24\)"),
        ({"use_bias": False, "gate_init": "usual"}, "in_proj.bias, but the student has none"),
        ({"layer_map": [0]}, "lists 1 teacher layers for 3"),
    ):
        with pytest.raises(ValueError, match=message):
            student_from_teacher(teacher, **options)
    with pytest.raises(StrictDataclassClassValidationError, match=r"13 x 13 pixels(.|\n)*image_size=\(12, 12\)"):
        student_from_teacher(teacher, image_size=13)
    with pytest.raises(ValueError, match="layer_scale_init is None"):
        student_from_teacher(make("dinov2"), layer_scale_init=None)
    with pytest.raises(ValueError, match=r"register_tokens is \(1, 2, 24\), the teacher's is \(1, 3, 24\)"):
        student_from_teacher(make("dinov2_with_registers"), num_register_tokens=2)
    with pytest.raises(ValueError, match="4 x 6 pixels, but a student's are square"):
        vision_student_config(ViTForImageClassification(ViTConfig(**PLAIN | {"patch_size": (4, 6)})))
    student = student_from_teacher(teacher, num_register_tokens=1)
    with pytest.raises(ValueError, match="1 register tokens and the teacher 0"):
        fit_output_projection(student, teacher, [{"pixel_values": IMAGES}])


def test_a_borrowed_teacher_stays_anothers():
    """Calibration leaves a model readable that a `Teacher` holds already."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    model = ViTForImageClassification(ViTConfig(**sizes))
    images = torch.randn(2, 3, 8, 8)
    holder = Teacher(model)
    fit_output_projection(student_from_teacher(model), model, [{"pixel_values": images}])
    assert len(holder({"pixel_values": images}, attentions=True).attentions) == 2
