"""The command `cab-hf`: what it writes and prints, and that every error is one line."""

import json
import os
import resource
import subprocess
import sys

import pytest
import torch
from commands import error_of
from tiny_distillation import tiny_teacher
from tiny_models import tiny_model, tiny_vision_model
from transformers import AutoModelForCausalLM, Mamba2ForCausalLM

from cab_hf.cli import COMMANDS, main
from cab_hf.teachers.demo import random_llama


@pytest.fixture
def student(tmp_path):
    """The folder of a student with a tokenizer."""
    folder = tmp_path / "student"
    _, tokenizer = random_llama()
    tiny_model(mixer_type="mamba2", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_export_writes_a_stock_model_with_its_tokenizer(student, tmp_path, capsys):
    main(["export", str(student), "--to", "stock", str(tmp_path / "stock")])
    assert "Mamba2ForCausalLM" in capsys.readouterr().out
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "stock")) is Mamba2ForCausalLM
    assert (tmp_path / "stock/tokenizer.json").is_file()
    assert "holds a model already" in error_of(capsys, "export", student, "--to", "stock", tmp_path / "stock")


def test_inspect_without_a_teacher(student, tmp_path, capsys):
    main(["inspect", str(student), "--output", str(tmp_path / "report")])
    printed = capsys.readouterr().out
    assert "mixers: input projection" in printed and "cosine" not in printed
    assert json.loads((tmp_path / "report/inspection.json").read_text())["model"] == "CABMambaForCausalLM"
    assert not (tmp_path / "report/attention.png").exists()


def test_errors_are_one_line(student, tmp_path, capsys):
    out = tmp_path / "out"
    assert "invalid choice: 'torchscript'" in error_of(capsys, "export", student, "--to", "torchscript", out)
    assert "--help" in error_of(capsys, "inspect")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in error_of(capsys, "export", tmp_path / "empty", out)
    tiny_teacher().save_pretrained(tmp_path / "llama")
    assert "'llama' model and no student" in error_of(capsys, "inspect", tmp_path / "llama")
    tiny_vision_model().save_pretrained(tmp_path / "images")
    assert "trust_remote_code" in error_of(capsys, "export", tmp_path / "images", out)
    assert "tokens is 0" in error_of(capsys, "inspect", student, "--tokens", 0)
    no_text = ["--teacher", "random-llama", "--data", tmp_path / "student/config.json", "--tokens", 10**5]
    assert "error: " in error_of(capsys, "inspect", student, *no_text)

    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps({**config, "a_field_of_tomorrow": 1}))
    assert "a_field_of_tomorrow" in error_of(capsys, "export", student, out)
    (student / "config.json").write_text("{")
    assert "can't be loaded" in error_of(capsys, "export", student, out)
    (student / "config.json").write_text(json.dumps(config))
    weights = student / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "damaged or incomplete" in error_of(capsys, "export", student, out)
    assert "is a file" in error_of(capsys, "export", weights, out)
    weights.unlink()
    assert "can't be loaded" in error_of(capsys, "export", student, out)
    assert not out.exists()
    (student / "config.json").rename(student / "adapter_config.json")
    assert "merge_and_unload" in error_of(capsys, "inspect", student)


@pytest.mark.parametrize("kind", ["stock", "gguf"])
def test_a_full_disk_leaves_nothing_of_an_export(student, tmp_path, capsys, kind):
    (tmp_path / "out").mkdir()
    for path in student.glob("tokenizer*"):  # of a kind that GGUF has no name for
        path.unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        line = error_of(capsys, "export", student, tmp_path / "out", "--to", kind)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"{tmp_path / 'out'} can't be written" in line and "Free space" in line
    assert {path.name for path in tmp_path.iterdir()} == {"student", "out"} and not any((tmp_path / "out").iterdir())


def test_running_out_of_memory_is_one_line(student, capsys, monkeypatch):
    def allocate(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr("cab_hf.runs.report.evaluate", allocate)
    options = ["--teacher", "random-llama", "--data", "builtin"]
    assert "2 GiB). Give a smaller --batch_size" in error_of(capsys, "evaluate", student, *options)


def test_a_name_that_is_in_no_cache_offline(tmp_path):
    """In a process of its own: the variable is read once, and the whole of what a user sees is one line."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "cab_hf.cli", "inspect", "nobody/no-such-student"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 1 and "Traceback" not in finished.stderr
    (line,) = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert "no folder nobody/no-such-student" in line and "HF_HUB_OFFLINE" in line


def test_evaluate_prints_a_table_and_writes_beside_the_student(student, tmp_path, capsys):
    (tmp_path / "prose.txt").write_text("A text with some words. " * 20)
    data = ["--teacher", "random-llama", "--data", tmp_path / "prose.txt", "--max_tokens", 100, "--block_size", 50]
    quick = [*data, "--lengths", "--gaps", 3, "--prompts", 0]
    main(["evaluate", str(student), *map(str, quick)])
    printed = capsys.readouterr().out
    assert "prose.txt" in printed and " 100\n" in printed and "copying" in printed and "generation" not in printed
    report = json.loads((student / "evaluation.json").read_text())
    assert list(report["recall"]["copying"]) == ["3"] and (student / "recall.png").is_file()


def test_errors_of_evaluate_and_card_are_one_line(student, tmp_path, capsys):
    data = ["--data", "builtin"]
    assert "--teacher" in error_of(capsys, "evaluate", student, *data)
    nobody = ["--teacher", tmp_path / "nobody", *data]
    assert "nobody' is no file and no folder" in error_of(capsys, "evaluate", student, *nobody)
    tiny_teacher().save_pretrained(tmp_path / "llama")
    teacher = ["--teacher", "random-llama"]
    assert "no student" in error_of(capsys, "evaluate", tmp_path / "llama", *teacher, *data)
    assert "nowhere" in error_of(capsys, "evaluate", student, *teacher, "--data", tmp_path / "nowhere.txt")
    (tmp_path / "short.txt").write_text("Too short.")
    assert "block_size" in error_of(capsys, "evaluate", student, *teacher, "--data", tmp_path / "short.txt")
    assert "abacus" in error_of(capsys, "evaluate", student, *teacher, *data, "--device", "abacus")
    assert "is a file" in error_of(capsys, "evaluate", student, *teacher, *data, "--output", tmp_path / "short.txt")
    assert "is a file" in error_of(capsys, "evaluate", tmp_path / "short.txt", *teacher, *data)
    tiny_vision_model().save_pretrained(tmp_path / "images")
    images, digits = tmp_path / "images", ["--data", "digits"]
    assert "`task` is" in error_of(capsys, "evaluate", images, "--teacher", tmp_path / "llama", *digits)
    assert "images' can't be loaded" in error_of(capsys, "evaluate", student, "--teacher", images, *data)
    assert not (student / "evaluation.json").exists()
    assert "no recipe.yaml" in error_of(capsys, "card", student)
    assert "no recipe.yaml" in error_of(capsys, "card", tmp_path / "nowhere")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*([command] if command else []), "--help"])
    assert stopped.value.code == 0
    places = {"": "COMMAND", "coverage": "FAMILY", "distill": "TEACHER", "sample": "TEACHER OUT.npz"}
    first = places.get(command or "", "FOLDER")
    assert first in capsys.readouterr().out
