"""Whole runs of image recipes: a teacher finetuned, a student distilled, compared, carded, loaded elsewhere."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import DatasetDict
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from cab_hf.data.image_sources import images_to_dataset
from cab_hf.data.images import make_image_processor, processor_side
from cab_hf.evaluation.images import compare_images
from cab_hf.recipes import parse_recipe
from cab_hf.runs.images import load_rows
from cab_hf.runs.report import evaluate
from cab_hf.runs.run import run_recipe


ROOT = Path(__file__).parents[2]
QUIET = ["--use_cpu", "true", "--disable_tqdm", "true"]
NAMES = ["dark", "light", "striped"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three classes of 8 x 8 images that a tiny model can tell apart, and the recipes of a teacher and a student."""
    path = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 60), ("test", 21)):
        labels = np.arange(count) % 3
        images = rng.integers(0, 60, (count, 8, 8, 3))
        images[labels == 1] += 190
        images[labels == 2, ::2] += 190
        images_to_dataset(images.astype(np.uint8), labels, NAMES).save_to_disk(path / "data" / split)
    (path / "data" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    shared = {
        "task": "image-classification", "dataset": [str(path / "data")], "rand_augment_num": 0, "random_erasing": 0.0,
        "per_device_train_batch_size": 12, "learning_rate": 0.003, "save_strategy": "no", "report_to": "none",
    }  # fmt: skip
    sizes = {"image_size": 8, "patch_size": 2, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    teacher = shared | {
        "finetune": True, "teacher_config": sizes | {"model_type": "vit", "intermediate_size": 16}, "max_steps": 60,
        "mixup": 0.0, "cutmix": 0.0,
    }  # fmt: skip
    student = shared | {
        "method": "CAB", "teacher": str(path / "teacher"), "teacher_recipe": str(path / "teacher.yaml"),
        "student_from": "config", "mixer_type": "mamba", "license": "mit", "max_steps": 6,
        "student_config": {"patch_size": 2, "hidden_size": 16, "num_hidden_layers": 3},
        "bridge_weight": 3.0, "train_fraction": 0.5, "validation_fraction": 0.2,
        "baselines": [{"name": "soft KD", "bridge_weight": 0.0}],
    }  # fmt: skip
    (path / "teacher.yaml").write_text(yaml.safe_dump(teacher))
    (path / "student.yaml").write_text(yaml.safe_dump(student))
    run_recipe(parse_recipe([str(path / "teacher.yaml"), "--output_dir", str(path / "teacher"), *QUIET]))
    return path


def recipe(folder: Path, output: Path, *options: str):
    return parse_recipe([str(folder / "student.yaml"), "--output_dir", str(output), *QUIET, *options])


def test_a_finetuned_teacher(folder):
    report = json.loads((folder / "teacher/report.json").read_text())
    (after,) = report["after"].values()
    assert after["n_images"] == 21 and after["student_top1"] > 0.9
    model = AutoModelForImageClassification.from_pretrained(folder / "teacher")
    assert [model.config.id2label[index] for index in range(3)] == NAMES
    assert processor_side(AutoImageProcessor.from_pretrained(folder / "teacher")) == 8


def test_a_student_is_distilled_compared_and_loaded(folder, tmp_path):
    run = recipe(folder, tmp_path / "student", "--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy",
                 "steps", "--save_steps", "2", "--load_best_model_at_end", "true",
                 "--metric_for_best_model", "accuracy", "--ema_decay", "0.5")  # fmt: skip
    report = run_recipe(run)
    (after,), (baseline,) = report["after"].values(), report["baselines"]["soft KD"]["after"].values()
    assert (report["train_images"], report["available_images"]) == (24, 60)  # half of what validation leaves
    assert report["images_seen"] == 6 * 12
    evaluations = [entry for entry in report["stages"][0]["log"] if "eval_accuracy" in entry]
    assert [entry["eval_images"] for entry in evaluations] == [12, 12, 12]
    assert all("eval_ema_accuracy" in entry for entry in evaluations)
    assert after["kl"] > 0 and baseline["kl"] > 0 and after != baseline
    assert after["teacher_top1"] == baseline["teacher_top1"] > 0.9
    assert all(entry["eval_bridge"] > 0 for entry in evaluations)

    card = ModelCard.load(tmp_path / "student/README.md")
    assert card.data.pipeline_tag == "image-classification" and card.data.license == "mit"
    assert "| soft KD |" in card.text and "AutoImageProcessor" in card.text and "/tmp" not in card.text
    for place in (tmp_path / "student", tmp_path / "student/ema"):
        classifier = pipeline("image-classification", model=str(place))
        answer = classifier(Image.fromarray(np.full((8, 8, 3), 240, dtype=np.uint8)), top_k=3)
        assert {one["label"] for one in answer} == set(NAMES)
    again = run_recipe(run)  # nothing is trained twice
    assert again["after"] == report["after"]


def test_the_report_is_what_the_saved_student_does(folder, tmp_path):
    run = recipe(folder, tmp_path / "student")
    (after,) = run_recipe(run)["after"].values()
    model = AutoModelForImageClassification.from_pretrained(run.output_dir).eval()
    processor = AutoImageProcessor.from_pretrained(run.output_dir)
    _, rows = load_rows(run.data, run.images)
    with torch.no_grad():
        logits = model(**processor([row["image"] for row in rows], return_tensors="pt")).logits
    right = (logits.argmax(-1) == torch.tensor(rows["label"][:])).sum().item()
    assert right / len(rows) == pytest.approx(after["student_top1"])


def test_a_student_of_the_teachers_shape_and_size(folder, tmp_path):
    options = ["--student_from", "teacher", "--student_config", "{}", "--mixer_type", "mamba2"]
    report = run_recipe(recipe(folder, tmp_path / "shaped", *options))
    (before,) = report["before"].values()
    assert before["kl"] < 3.0
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "shaped")
    assert model.config.class_token == "first" and model.config.num_hidden_layers == 2
    with pytest.raises(ValueError, match="calibration.*16.*8"):
        run_recipe(recipe(folder, tmp_path / "larger", *options, "--image_size", "16"))
    larger = recipe(folder, tmp_path / "larger16", "--image_size", "16", "--repeats", "2")
    run_recipe(larger)  # from a config, with images of two sizes, each image twice in a row
    assert AutoModelForImageClassification.from_pretrained(larger.output_dir).config.image_size == 16


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 0, 2]])
def test_a_data_set_with_its_labels_in_another_order(folder, tmp_path, order):
    """The student has the teacher's labels at the teacher's places, whatever the data's order; so has a report."""
    names = [NAMES[index] for index in order]
    data = DatasetDict.load_from_disk(str(folder / "data"))
    for split, rows in data.items():
        images = np.stack([np.asarray(image) for image in rows["image"]])
        labels = [order.index(label) for label in rows["label"]]
        images_to_dataset(images, labels, names).save_to_disk(tmp_path / "other" / split)
    (tmp_path / "other/dataset_dict.json").write_text(json.dumps({"splits": list(data)}))
    (plain,) = run_recipe(recipe(folder, tmp_path / "plain"))["after"].values()
    run = recipe(folder, tmp_path / "student", "--dataset", str(tmp_path / "other"))
    (after,) = run_recipe(run)["after"].values()
    assert after["teacher_top1"] == plain["teacher_top1"] > 0.9
    assert list(AutoModelForImageClassification.from_pretrained(run.output_dir).config.id2label.values()) == NAMES
    again = evaluate(run.output_dir, folder / "teacher", data=[str(tmp_path / "other")], repeats=1)
    (later,) = again["images"].values()
    assert later["teacher_top1"] == after["teacher_top1"] and later["student_top1"] == after["student_top1"]


def test_class_folders_of_one_channel_without_a_test(folder, tmp_path):
    """Grey images straight from folders: a teacher of one channel, a student of it, a fifth held out."""
    rows = DatasetDict.load_from_disk(str(folder / "data"))["train"]
    for index, (image, label) in enumerate(zip(rows["image"], rows["label"])):
        path = tmp_path / "pictures" / NAMES[label] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.convert("L").save(path)
    options = ["--dataset", str(tmp_path / "pictures"), "--max_steps", "4"]
    teacher = yaml.safe_load((folder / "teacher.yaml").read_text())
    config = json.dumps(teacher["teacher_config"] | {"num_channels": 1})
    made = parse_recipe([str(folder / "teacher.yaml"), "--output_dir", str(tmp_path / "teacher"), *QUIET, *options,
                         "--teacher_config", config])  # fmt: skip
    assert run_recipe(made)["after"]["pictures test images"]["n_images"] == 12
    student = ["--student_from", "teacher", "--student_config", "{}", "--mixer_type", "mamba2"]
    run = recipe(folder, tmp_path / "student", *options, *student, "--teacher", str(tmp_path / "teacher"))
    report = run_recipe(run)
    assert report["available_images"] == 48 and report["after"]["pictures test images"]["n_images"] == 12
    assert AutoModelForImageClassification.from_pretrained(run.output_dir).config.num_channels == 1


def test_comparing_counts_by_hand():
    class Fixed(torch.nn.Module):
        def forward(self, pixel_values):
            class Output:
                logits = pixel_values.flatten(1)[:, :3]

            return Output

    images = torch.zeros(4, 1, 1, 3)
    images[range(4), 0, 0, [0, 1, 2, 2]] = 1.0
    batches = [{"pixel_values": images[:3], "labels": torch.tensor([0, 1, 0])},
               {"pixel_values": images[3:], "labels": torch.tensor([2])}]  # fmt: skip
    report = compare_images(Fixed(), None, batches)
    assert report["n_images"] == 4 and report["student_top1"] == 0.75 and "kl" not in report


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "digits", "cifar10"], "dataset.*2 sets"),
        (["--dataset_split", "nowhere"], "dataset_split.*nowhere.*train"),
        (["--test_split", "nowhere"], "test_split.*nowhere"),
        (["--train_fraction", "0"], "fraction"),
        (["--dataset", "digits"], "3 labels .* the data 10"),
    ],
)
def test_bad_input_says_the_way_out(folder, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run_recipe(recipe(folder, tmp_path / "student", *options))


def test_a_processor_of_no_square_is_refused():
    processor = make_image_processor(size=8)
    processor.size = {"height": 8, "width": 16}
    with pytest.raises(ValueError, match="square"):
        processor_side(processor)


@pytest.mark.slow
def test_command_line(folder, tmp_path, monkeypatch, capfd):
    """The script that a user runs, with the student reloaded in a process without cab_hf."""
    options = ["--output_dir", str(tmp_path / "student"), "--verify_reload", "true", "--max_steps", "2"]
    monkeypatch.setattr(sys, "argv", ["train_cab.py", str(folder / "student.yaml"), *QUIET, *options])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "train_cab.py"), run_name="__main__")
    printed = capfd.readouterr().out
    assert "soft KD" in printed and "the student says of a test image" in printed
