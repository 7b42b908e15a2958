"""The report and the card of a finished student: numbers against naive restatements, files, and one-line errors."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from tiny_images import tiny_image_student, tiny_image_teacher
from tiny_models import random_ids, tiny_model

from cab_hf.data.documents import load_documents
from cab_hf.data.image_sources import load_images
from cab_hf.data.images import make_image_processor
from cab_hf.data.packing import pack_documents
from cab_hf.evaluation.controls import with_window, without_mixers
from cab_hf.evaluation.language import compare
from cab_hf.evaluation.metrics import crossing_length
from cab_hf.evaluation.speed import image_speed, text_speed
from cab_hf.models import CABMambaForSequenceClassification
from cab_hf.recipes import read_recipe
from cab_hf.runs.card import write_card_of
from cab_hf.runs.report import describe, evaluate
from cab_hf.teachers.demo import random_llama


TEXT = "It is a truth that a text of some length has many words, and that few of them are new. "
QUICK = {"lengths": (8, 16), "gaps": (0, 5), "prompts": 3, "new_tokens": 6, "repeats": 1, "max_tokens": 200}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prose.txt"
    path.write_text(TEXT * 12)
    return path


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("students") / "tiny"
    _, tokenizer = random_llama()
    tiny_model(mixer_type="mamba2", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class TestCrossing:
    def test_by_hand(self):
        # The ratio goes from 1/2 to 2: halfway between the lengths, in logarithms.
        assert crossing_length([100, 400], [5, 8], [10, 4]) == pytest.approx(200)
        # From 1/2 to 8: a quarter of the way.
        assert crossing_length([16, 256], [1, 8], [2, 1]) == pytest.approx(32)

    def test_the_last_crossing_counts(self):
        ratios = [2.0, 0.5, 0.5, 2.0]
        assert crossing_length([1, 2, 4, 16], ratios, [1.0] * 4) == pytest.approx(8)

    def test_never_and_always(self):
        assert crossing_length([1, 2], [3, 1], [2, 2]) is None
        assert crossing_length([4, 8], [3, 3], [2, 2]) == 4
        assert crossing_length([], [], []) is None

    def test_lengths_without_a_number_are_left_out(self):
        assert crossing_length([100, 200, 400], [5, None, 8], [10, 7, 4]) == pytest.approx(200)
        assert crossing_length([100, 200], [5, 5], [10, None]) is None


def test_speed_and_memory_are_counted():
    model = tiny_model(mixer_type="mamba2")
    short, long = (text_speed(model, length, new_tokens=2, repeats=1) for length in (8, 256))
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    assert long["prefill"] > 0
    assert weights < short["peak_mib"] < long["peak_mib"]
    # The logits of the prompt's last token alone, and states of 256 x 64 channels: far below 10 MiB.
    assert long["peak_mib"] < weights + 10
    assert text_speed(tiny_model(max_position_embeddings=40), 39, repeats=1) is None
    pixels = image_speed(tiny_image_student(), 8, 2, repeats=1)
    assert pixels["images"] > 0 and pixels["peak_mib"] > 0


def test_a_report_on_text(student, text, tmp_path, capsys):
    report = evaluate(
        student, "random-llama", [f"prose={text}"], output=tmp_path, block_size=40, device="cpu", **QUICK
    )
    assert report == json.loads((tmp_path / "evaluation.json").read_text())
    teacher, tokenizer = random_llama()
    blocks = pack_documents(load_documents(text), tokenizer, 40)
    own = tiny_model(mixer_type="mamba2", vocab_size=len(tokenizer))
    expected = compare(own, teacher, blocks, max_tokens=200, progress=False)
    assert all(report["texts"]["prose"][name] == pytest.approx(value) for name, value in expected.items())
    assert report["generation"]["student"]["greedy"]["n_texts"] == 3
    assert set(report["recall"]) == {"copying", "associative"}
    for gaps in report["recall"].values():
        assert list(gaps) == ["0", "5"]
        assert all(0 <= one[who]["recall"] <= 1 for one in gaps.values() for who in ("teacher", "student"))
    assert [row["length"] for row in report["speed"]["rows"]] == [8, 16]
    assert set(report["speed"]["crossing"]) == {"prefill", "decode", "peak_mib"}
    assert report["plots"] == ["recall.png", "speed.png"]
    assert all((tmp_path / name).read_bytes()[1:4] == b"PNG" for name in report["plots"])
    table = describe(report)
    assert "prose" in table and f"{expected['kl']:.3f}" in table and "associative" in table
    assert max(map(len, table.splitlines())) < 120 and str(tmp_path) not in json.dumps(report)


def test_only_what_is_asked_for(student, text, tmp_path):
    options = {**QUICK, "lengths": (), "gaps": (), "prompts": 0}
    report = evaluate(student, "random-llama", [str(text)], output=tmp_path, block_size=40, **options)
    assert "speed" not in report and "recall" not in report and "generation" not in report and not report["plots"]
    assert list(report["texts"]) == ["prose.txt"]


def test_tasks_and_only_their_first_questions(student, text, tmp_path):
    pytest.importorskip("lm_eval")
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"query": "Question: Which?\n", "choices": ["this", "that one"], "gold": at % 2} for at in range(6)]
    (folder / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {**QUICK, "lengths": (), "gaps": (), "prompts": 0, "tasks": folder, "task_limit": 4}
    report = evaluate(student, "random-llama", [str(text)], output=tmp_path, block_size=40, **options)
    row = report["tasks"]["rows"]["piqa"]
    # The same question each time, with each answer as often.
    assert row["n_questions"] == 4 and row["teacher"]["accuracy"] == row["student"]["accuracy"] == 0.5
    assert report["tasks"]["limit"] == 4 and str(tmp_path) not in json.dumps(report)
    assert "piqa" in describe(report) and "clearly above chance in none" in describe(report)


def test_length_in_a_report(student, text, tmp_path):
    options = {**QUICK, "lengths": (), "gaps": (), "prompts": 0, "retrieval_lengths": (512, 384)}
    report = evaluate(student, "random-llama", [f"prose={text}"], output=tmp_path, block_size=40, **options)
    length = report["length"]
    assert list(length["retrieval"]) == ["needle", "needles", "key-value", "copying"]
    assert list(length["retrieval"]["needles"]) == ["384", "512"] and length["text"] == "prose"
    assert length["retrieval"]["copying"]["384"]["teacher"]["gap"] == 256
    assert set(length["holds_to"]) == {"needle", "needles", "key-value", "copying", "loss", "all"}
    assert length["teacher_positions"] == 2048 and length["loss"]["length"] == 512
    assert report["plots"] == ["length.png"] and (tmp_path / "length.png").read_bytes()[1:4] == b"PNG"
    table = describe(report)
    assert "the student holds to" in table and "256 to 512" in table and "positions the student alone" not in table
    alone = {test: {"4096": by_length["512"] | {"teacher": None}} for test, by_length in length["retrieval"].items()}
    table = describe(report | {"length": length | {"retrieval": alone}})
    assert "Beyond the teacher's 2,048 positions the student alone was measured." in table


@pytest.mark.parametrize(
    ("lengths", "message"),
    [((512, 100), "is 100, but copying takes 128"), ((200, 512), "length is 200, but what is told and asked takes")],
)
def test_a_length_without_room_is_refused_before_anything_is_measured(student, text, monkeypatch, lengths, message):
    monkeypatch.setattr("cab_hf.runs.report.compare", lambda *arguments, **options: pytest.fail("it was compared"))
    with pytest.raises(ValueError, match=message):
        evaluate(student, "random-llama", [str(text)], block_size=40, retrieval_lengths=lengths)


def test_controls_in_the_students_place(student, text, tmp_path):
    teacher, tokenizer = random_llama()
    own = tiny_model(mixer_type="mamba2", vocab_size=len(tokenizer))
    blocks = pack_documents(load_documents(text), tokenizer, 100)
    for control, model in (("zeroed", without_mixers(own)), ("window", with_window(teacher))):
        options = {**QUICK, "gaps": (), "prompts": 0, "control": control}
        report = evaluate(student, "random-llama", [f"prose={text}"], output=tmp_path, block_size=100, **options)
        expected = compare(model, teacher, blocks, max_tokens=200, progress=False)
        assert report["texts"]["prose"]["kl"] == pytest.approx(expected["kl"]) and report["control"] == control
        assert expected["kl"] > 1e-6 and "speed" not in report and "In the student's place" in describe(report)
    for given in ({"control": "window", "output": None}, {"control": "none"}):
        with pytest.raises(ValueError, match="zeroed or window, and its report needs a folder of its own"):
            evaluate(**{"folder": student, "teacher": "random-llama", "data": ["builtin"], "output": tmp_path} | given)


def test_a_report_on_images(tmp_path):
    torch.manual_seed(0)
    folder, teacher_folder = tmp_path / "student", tmp_path / "teacher"
    student, teacher = tiny_image_student(num_labels=10), tiny_image_teacher(num_labels=10)
    student.save_pretrained(folder)
    teacher.save_pretrained(teacher_folder)
    size = student.config.image_height_and_width[0]
    processor = make_image_processor(size=size)
    for place in (folder, teacher_folder):
        processor.save_pretrained(place)
    report = evaluate(folder, str(teacher_folder), ["digits"], max_tokens=50, repeats=1, device="cpu")
    found = report["images"]["digits test images"]
    rows = load_images("digits", split="test")
    chosen = rows.select(np.linspace(0, len(rows) - 1, 50).round().astype(int))
    pixels = processor([image.convert("RGB") for image in chosen["image"]], return_tensors="pt")["pixel_values"]
    right, same = 0, 0
    with torch.no_grad():
        ours, theirs = student.eval()(pixels).logits, teacher.eval()(pixels).logits
    for row, label in enumerate(chosen["label"]):
        right += int(ours[row].argmax()) == label
        same += int(ours[row].argmax()) == int(theirs[row].argmax())
    assert found["n_images"] == 50 and found["split"] == "test" and "dataset" not in found
    assert found["student_top1"] == pytest.approx(right / 50)
    assert found["agreement"] == pytest.approx(same / 50)
    assert [row["batch size"] for row in report["speed"]["rows"]] == [1, 4, 16]
    assert (folder / "speed.png").is_file() and "digits test images  student" in describe(report)
    with pytest.raises(ValueError, match="teacher has 3 labels and the student 10"):
        other = tmp_path / "other"
        tiny_image_teacher(num_labels=3).save_pretrained(other)
        processor.save_pretrained(other)
        evaluate(folder, str(other), ["digits"], max_tokens=50)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"data": []}, "at least one source"),
        ({"lengths": (0, 8)}, "lengths is 0"),
        ({"gaps": (-1,)}, "gaps is -1"),
        ({"lengths": (8, 2**21)}, "lengths has 2,097,152; the longest prompt is 1,048,576"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"block_size": 0}, "block_size is 0"),
        ({"task_limit": 0}, "task_limit is 0"),
        ({"retrieval_lengths": (0, 256)}, "retrieval_lengths is 0"),
        ({"retrieval_lengths": (2**21,)}, "retrieval_lengths has 2,097,152"),
        ({"device": "abacus"}, "'abacus' can't be used here"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"folder": "nobody/nothing", "output": None}, "is no folder here. Name the folder of a student"),
    ],
)
def test_wrong_options(student, text, tmp_path, options, message):
    arguments = {"folder": student, "teacher": "random-llama", "data": [str(text)], "output": tmp_path} | options
    with pytest.raises(ValueError, match=message):
        evaluate(**arguments)


def test_a_student_of_broken_weights_is_said_to_be(text, tmp_path):
    _, tokenizer = random_llama()
    model = tiny_model(mixer_type="mamba2", vocab_size=len(tokenizer))
    model.get_input_embeddings().weight.data[:] = float("nan")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(FloatingPointError, match="kl on prose.txt is nan: student or teacher hold NaN"):
        evaluate(tmp_path, "random-llama", [str(text)], block_size=50)
    assert not (tmp_path / "evaluation.json").exists()


def test_a_teacher_of_other_tokens(tmp_path, text):
    tiny_model(mixer_type="mamba2", vocab_size=3000).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="vocab_size=3000"):
        evaluate(tmp_path / "other", "random-llama", [str(text)])


@pytest.fixture
def run(student, text, tmp_path) -> Path:
    """The folder of a finished run, without its card."""
    folder = tmp_path / "run"
    own = tiny_model(mixer_type="mamba2", vocab_size=257)
    own.save_pretrained(folder)
    random_llama()[1].save_pretrained(folder)
    recipe = {
        "teacher": "random-llama",
        "dataset": [str(text)],
        "holdout": "0.5",
        "output_dir": "/somewhere/else",
        "bf16": True,
        "tf32": True,
        "stages": [{"name": "alone", "max_steps": 3, "fp16": True, "bf16": False}],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    blocks = random_ids(4, 20, vocab_size=257)
    after = {"held-out part of prose.txt": compare(own, random_llama()[0], blocks, progress=False)}
    report = {
        "teacher": "random-llama",
        "teacher_parameters": 1234567,
        "train_tokens": 999,
        "after": after,
        "stages": [{"name": "alone", "steps": 3, "tokens": 999}],
        "hardware": "an abacus",
        "versions": {"torch": "2.13"},
    }
    (folder / "report.json").write_text(json.dumps(report))
    return folder


class TestCard:
    def test_from_the_files_of_a_run(self, run):
        card = ModelCard.load(write_card_of(run, license="mit"))
        assert card.data.license == "mit" and "an abacus" in card.text and "alone: 3 steps" in card.text
        after = json.loads((run / "report.json").read_text())["after"]["held-out part of prose.txt"]
        (result,) = card.data.eval_results
        assert result.metric_value == pytest.approx(after["student_perplexity"], abs=1e-4)
        assert "tf32: true" in card.text and "/somewhere" not in card.text

    def test_an_evaluation_is_in_it(self, run):
        numbers = json.loads((run / "report.json").read_text())["after"]["held-out part of prose.txt"]
        newer = numbers | {"student_perplexity": 77.5}
        one = {"recall": 0.625, "ci95": [0.5, 0.75], "n_tokens": 63}
        evaluation = {
            "task": "text-generation",
            "texts": {"verse": newer},
            "recall": {"copying": {"16": {"teacher": one, "student": one}}},
        }
        (run / "evaluation.json").write_text(json.dumps(evaluation))
        card = ModelCard.load(write_card_of(run, license="mit"))
        results = [(result.dataset_name, result.dataset_split) for result in card.data.eval_results]
        assert results == [("held-out part of prose.txt", "held-out"), ("verse", None)]
        assert "77.50" in card.text and "| held-out part of prose.txt | teacher |" in card.text
        assert "| copying | 16 | 0.625" in card.text and "## Speed" not in card.text

    def test_what_evaluate_writes_is_in_it(self, run, text):
        # A copy: of the training's own single document nothing could be held out.
        other = run.with_name("other.txt")
        other.write_text(text.read_text())
        source = f"held-out part of prose.txt={other}"
        evaluate(run, "random-llama", [source], block_size=20, device="cpu", **QUICK)
        card = ModelCard.load(write_card_of(run, license="mit"))
        report = json.loads((run / "evaluation.json").read_text())
        for title in ("Recall", "Generation", "Speed", "Limits", "Training", "Plots", "Citation"):
            assert f"\n## {title}\n" in card.text, title
        found = report["recall"]["associative"]["5"]["student"]
        assert f"| associative | 5 | {report['recall']['associative']['5']['teacher']['recall']:.3f}" in card.text
        assert f"| {found['recall']:.3f} ({found['ci95'][0]:.3f} to {found['ci95'][1]:.3f}) |" in card.text
        prefill = report["speed"]["rows"][1]["student"]["prefill"]
        assert f"| {prefill:,.1f} |" in card.text and report["hardware"] in card.text
        for name in ("recall.png", "speed.png"):
            assert f"({name})" in card.text and (run / name).is_file()
        (result,) = card.data.eval_results
        assert (result.dataset_name, result.dataset_split) == ("held-out part of prose.txt", "held-out")
        (numbers,) = report["texts"].values()
        assert result.metric_value == pytest.approx(numbers["student_perplexity"], abs=1e-4)

    def test_a_classifier_in_the_students_place(self, run):
        """It is described as one, and what was measured of the language model under it is left out."""
        CABMambaForSequenceClassification.from_pretrained(run, num_labels=3).save_pretrained(run)
        one = {"recall": 0.625, "ci95": [0.5, 0.75], "n_tokens": 63}
        texts = {"reviews": {"student_accuracy": 0.75, "n_texts": 80}}
        recall = {"copying": {"16": {"teacher": one, "student": one}}}
        (run / "evaluation.json").write_text(json.dumps({"task": "text-generation", "texts": {}, "recall": recall}))
        card = ModelCard.load(write_card_of(run, license="mit"))
        assert card.data.pipeline_tag == "text-classification" and card.data.eval_results is None
        assert "AutoModelForSequenceClassification" in card.text and "AutoModelForCausalLM" not in card.text
        assert "| What follows | the distillation of the student under this classifier |" in card.text
        assert "perplexity" not in card.text and "## Recall" not in card.text
        (run / "evaluation.json").write_text(json.dumps({"task": "text-classification", "texts": texts}))
        card = ModelCard.load(write_card_of(run, license="mit", overwrite=True))
        (result,) = card.data.eval_results
        assert (result.metric_type, result.metric_value, result.dataset_name) == ("accuracy", 0.75, "reviews")

    def test_a_card_stays_unless_asked(self, run):
        (run / "README.md").write_text("mine")
        with pytest.raises(ValueError, match="overwrite"):
            write_card_of(run, license="mit")
        assert (run / "README.md").read_text() == "mine"
        write_card_of(run, license="mit", overwrite=True)
        assert "mine" != (run / "README.md").read_text()

    def test_what_is_missing_is_named(self, run, student):
        with pytest.raises(ValueError, match="licence of teacher 'random-llama' is unknown"):
            write_card_of(run)
        with pytest.raises(FileNotFoundError, match="no recipe.yaml"):
            write_card_of(student)
        report = json.loads((run / "report.json").read_text())
        del report["hardware"]
        (run / "report.json").write_text(json.dumps(report))
        with pytest.raises(ValueError, match="lack 'hardware'"):
            write_card_of(run, license="mit")
        (run / "report.json").write_text("{")
        with pytest.raises(ValueError, match="damaged"):
            write_card_of(run, license="mit")
        (run / "report.json").write_text("[1]")
        with pytest.raises(ValueError, match="holds a list and no mapping"):
            write_card_of(run, license="mit")
        assert not (run / "README.md").exists()


def test_what_a_student_was_trained_on_is_evaluated_on_the_held_out_part(run, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(8):
        (texts / f"{number}.txt").write_text(f"{number} " + TEXT * 2)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text()) | {"dataset": [str(texts)], "holdout": "2"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    options = {"lengths": (), "gaps": (), "prompts": 0, "block_size": 20, "max_tokens": None, "output": tmp_path}
    part = evaluate(run, "random-llama", [str(texts)], **options)["texts"]
    whole = evaluate(run, "random-llama", [f"all={texts / '*.txt'}"], **options)["texts"]
    assert list(part) == ["held-out part of texts"] and part["held-out part of texts"]["split"] == "held-out"
    assert "split" not in whole["all"]
    assert part["held-out part of texts"]["n_blocks"] == math.floor(2 * (len(TEXT) * 2 + 3) / 20)
    assert whole["all"]["n_blocks"] == math.floor(8 * (len(TEXT) * 2 + 3) / 20)
    assert read_recipe(run).values == recipe
