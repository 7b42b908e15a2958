"""What `inspect` reports, against counts and maps made by hand."""

import json

import pytest
import torch
from tiny_distillation import tiny_student, tiny_teacher
from tiny_models import random_ids, random_images, tiny_model, tiny_vision_model
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from cab_hf.evaluation.inspection import attention_similarity, inspect, layer_table, parameter_table, plot_attention
from cab_hf.teachers.demo import random_llama
from cab_hf.transfer import student_from_teacher


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of two maps `(t, t)`, entry by entry."""
    a, b = a.double().flatten(), b.double().flatten()
    return float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt())


def tiny_vit(**overrides) -> ViTForImageClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 24}
    images = {"image_size": (8, 12), "patch_size": 4, "num_labels": 7, "initializer_range": 0.5}
    return ViTForImageClassification(ViTConfig(**{**sizes, **images, **overrides})).eval()


@pytest.mark.parametrize("settings", [{"mixer_type": "mamba"}, {"mixer_type": "mamba2", "intermediate_size": 24}])
def test_the_parts_add_up_to_all_parameters(settings):
    student = tiny_model(**settings, tie_word_embeddings=False, use_bias=True)
    table = {part: count for part, count, _ in parameter_table(student)}
    assert sum(table.values()) == student.num_parameters()
    assert sum(share for *_, share in parameter_table(student)) == pytest.approx(1)
    assert table["head"] == table["embeddings"] == 99 * 32
    assert table.get("MLPs", 0) == (2 * 3 * 24 * 32 if "intermediate_size" in settings else 0)
    out_projections = [block.mixer.out_proj for block in student.backbone.layers]
    assert table["mixers: output projection"] == sum(p.weight.numel() + p.bias.numel() for p in out_projections)
    assert ("mixers: output norm" in table) == (settings["mixer_type"] == "mamba2")
    tied = {part: count for part, count, _ in parameter_table(tiny_model(**settings))}
    assert "head" not in tied and tied["embeddings"] == 99 * 32


def test_image_students_have_both_directions_in_the_tables():
    student = tiny_vision_model(mixer_type="mamba2", n_groups=2, layer_scale_init=0.5)
    table = {part: count for part, count, _ in parameter_table(student)}
    assert sum(table.values()) == student.num_parameters()
    convolutions = [name for name, _ in student.named_parameters() if ".conv1d." in name]
    assert any(".backward." in name for name in convolutions)
    assert table["mixers: convolution"] == sum(student.get_parameter(name).numel() for name in convolutions)
    assert table["head"] == 7 * 16 + 7
    rows = layer_table(student, [1, 3])
    assert [(row.directions, row.groups, row.teacher_layer) for row in rows] == [(2, 2, 1), (2, 2, 3)]


@pytest.mark.parametrize("mixer_type", ["mamba", "mamba2"])
def test_similarity_of_text_is_that_of_eager_attention(mixer_type):
    teacher, student, ids = tiny_teacher(), tiny_student(mixer_type), random_ids(2, 9, vocab_size=61)
    student.train()
    found = attention_similarity(student, teacher, {"input_ids": ids}, "last")
    assert student.training and found.teacher_layers == [1, 3]
    eager = tiny_teacher()
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = eager(ids, output_attentions=True).attentions
        ours = student.eval()(ids, output_attentions=True).attentions
    for index, layer in enumerate([1, 3]):
        pairs = [(ours[index][row].mean(0), theirs[layer][row].mean(0)) for row in range(2)]
        assert found.cosine[index] == pytest.approx(sum(cosine(*pair) for pair in pairs) / 2, abs=1e-5)
        torch.testing.assert_close(found.teacher_maps[index], pairs[0][1])
    assert teacher.config._attn_implementation == "sdpa"


def test_similarity_of_images_compares_tokens_at_the_students_places():
    teacher, student, images = tiny_vit(), tiny_vision_model(), random_images(2)
    found = attention_similarity(student, teacher, {"pixel_values": images})
    eager = tiny_vit()
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = eager(images, output_attentions=True).attentions
        ours = student(images, output_attentions=True).attentions
    order = [1, 2, 3, 0, 4, 5, 6]  # the class token goes from the front to the middle of 6 patches
    for index, layer in enumerate([0, 2]):
        moved = theirs[layer].mean(1)[:, order][:, :, order]
        expected = [cosine(ours[index][row].mean(0), moved[row]) for row in range(2)]
        assert found.cosine[index] == pytest.approx(sum(expected) / 2, abs=1e-5)


def test_the_picture_is_1600_pixels_wide(tmp_path):
    teacher, student = tiny_teacher(), tiny_student()
    found = attention_similarity(student, teacher, {"input_ids": random_ids(1, 9, vocab_size=61)})
    header = plot_attention(found, tmp_path / "new" / "maps.png").read_bytes()[:24]
    assert header[1:4] == b"PNG" and int.from_bytes(header[16:20]) == 1600


def test_inspect_a_language_student(tmp_path):
    teacher, tokenizer = random_llama()
    student_from_teacher(teacher).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    (tmp_path / "text.txt").write_text("A student attends like its teacher, or it does not. " * 20)
    options = {"data": str(tmp_path / "text.txt"), "tokens": 24}
    report = inspect(tmp_path / "student", "random-llama", output=tmp_path / "report", **options)
    assert json.loads((tmp_path / "report/inspection.json").read_text()) == report
    assert len(report["attention_cosine"]) == len(report["layers"]) == teacher.config.num_hidden_layers
    assert all(-1 <= value <= 1 for value in report["attention_cosine"])
    assert (tmp_path / "report/attention.png").is_file()
    with pytest.raises(ValueError, match="No text in .* has 5000 tokens"):
        inspect(tmp_path / "student", "random-llama", data=options["data"], tokens=5000)

    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(tmp_path / "student")
    with pytest.raises(ValueError, match="different tokenizers"):
        inspect(tmp_path / "student", "random-llama", **options)


def test_inspect_an_image_student(tmp_path):
    tiny_vit(image_size=8).save_pretrained(tmp_path / "teacher")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "teacher")
    tiny_vision_model(image_size=8).save_pretrained(tmp_path / "student")
    report = inspect(tmp_path / "student", str(tmp_path / "teacher"), output=tmp_path, examples=2)
    assert report["data"] == "digits" and len(report["attention_cosine"]) == 2
    assert (tmp_path / "attention.png").is_file()
