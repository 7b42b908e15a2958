"""What leaves the machine, and names that others chose; and how a command line ends."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from tiny_distillation import tiny_student

from cab_hf.hub.card_sections import plain
from cab_hf.hub.publish import student_files
from cab_hf.recipes import errors_in_one_line, parse_recipe
from cab_hf.runs.run import run_recipe
from cab_hf.teachers.demo import random_llama


ROOT = Path(__file__).parents[2]
TOKEN = "hf_" + "SECRET" * 5
TINY = {
    "teacher": "random-llama",
    "holdout": "0.3",
    "license": "mit",
    "block_size": 32,
    "sample_tokens": 2,
    "max_steps": 1,
    "save_steps": 1,
    "report_to": "none",
    "use_cpu": True,
}
NAMES = ("<img src=x onerror=alert(3)>.txt", "b](javascript:alert(4)) [c.txt", "p|q.txt", "z.txt")


@pytest.fixture
def texts(tmp_path) -> Path:
    (tmp_path / "texts").mkdir()
    for index, name in enumerate(NAMES):
        (tmp_path / "texts" / name).write_text("alpha beta gamma delta " * 60 + str(index))
    return tmp_path / "texts"


def recipe_of(tmp_path: Path, texts: Path, **options) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({**TINY, "dataset": [str(texts)], "output_dir": str(tmp_path / "out"), **options}))
    return path


def run(tmp_path: Path, texts: Path, **options) -> Path:
    run_recipe(parse_recipe([str(recipe_of(tmp_path, texts, **options))]))
    return tmp_path / "out"


@pytest.mark.parametrize(
    "options",
    [
        {"hub_token": TOKEN},
        {"stages": [{"name": "one", "hub_token": TOKEN}, {"name": "two"}]},
        {"hub_token": TOKEN, "finetune": True},
        {"baselines": [{"name": "one", "hub_token": TOKEN}]},
    ],
)
def test_no_file_of_a_run_holds_a_token(tmp_path, texts, options, capsys):
    out = run(tmp_path, texts, **options)
    held = [file for file in out.rglob("*") if file.is_file() and TOKEN.encode() in file.read_bytes()]
    assert not held
    run(tmp_path, texts, **options)  # the recipe on disk, without the token, is still this one
    assert "already holds this run's result" in capsys.readouterr().out
    with pytest.raises(ValueError, match="another recipe") as error:
        run(tmp_path, texts, **options, seed=7)
    assert TOKEN not in str(error.value)


def test_names_and_a_teachers_card_are_shown_as_they_are(tmp_path, texts):
    teacher = tmp_path / "teacher](javascript:alert(7)) <b>"
    for part in random_llama():
        part.save_pretrained(teacher)
    base = "'x](javascript:alert(1)) <script>alert(2)</script> [y'"
    (teacher / "README.md").write_text(f"---\nlicense: mit\nbase_model: {base}\n---\nhi\n")
    evaluated = f"<b>x</b>\n\n# Fake heading | cell={texts}/z.txt"
    prompt = "a\n```\n# Escaped\n<script>alert(6)</script>\n````\n"
    stages = [{"name": "<i>one [two](javascript:alert(5))"}]
    out = run(tmp_path, texts, teacher=str(teacher), eval_dataset=[evaluated], sample_prompt=prompt, stages=stages)
    text = (out / "README.md").read_text()
    head, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL).groups()
    metadata = yaml.safe_load(head)
    assert "base_model" not in metadata and metadata["license"] == "mit"
    assert metadata["model-index"][0]["results"][0]["dataset"]["name"] == "<b>x</b> # Fake heading | cell"
    fence = re.search(r"^(`{3,})yaml$", body, re.MULTILINE)[1]
    assert len(fence) > 4
    body = re.sub(rf"(?ms:^{fence}yaml$.*?^{fence}$)|(?ms:^```.*?^```$)|`[^`\n]*`", "", body)
    assert not re.search(r"(?<!\\)[<>]|(?<!\\)\]\(javascript|alert\(6\)|^\s*# (Fake|Escaped)", body, re.MULTILINE)
    assert "Fake heading" in body and ModelCard.load(out / "README.md").data.license == "mit"


@pytest.mark.parametrize(
    "name", ["# a", "- a", "a\n\n# b", "<b>", "a\r\n---\nlicense: x", "[a](b)", "![a](b)", "a|b", "`a`"]
)
def test_a_name_is_one_line_without_markup(name):
    shown = plain(name)
    assert "\n" not in shown and not re.search(r"(?<!\\)[<>\[\]|`]|^[#-]", shown)
    assert re.sub(r"\\(\W)", r"\1", shown) == " ".join(name.split())


@pytest.mark.parametrize("place", ["notes.json", "config.json", "plots/a.png", "plots", "tokenizer.json"])
def test_links_out_of_the_folder_are_not_published(tmp_path, place):
    tiny_student().save_pretrained(tmp_path / "student")
    link = tmp_path / "student" / place
    link.parent.mkdir(exist_ok=True)
    secret = tmp_path / "secret"
    if place == "plots":
        secret.mkdir()
        (secret / "a.png").write_text("secret")
    else:
        secret.write_text((tmp_path / "student/config.json").read_text())
    link.unlink(missing_ok=True)
    link.symlink_to(secret)
    with pytest.raises(ValueError, match="is a link out of"):
        student_files(tmp_path / "student")
    link.unlink()
    inside = tmp_path / "student" / "kept.txt"
    if place == "notes.json":
        inside.write_text("{}")
        link.symlink_to("kept.txt")
        assert place in student_files(tmp_path / "student")


@pytest.mark.parametrize("kind", ["stages", "baselines"])
@pytest.mark.parametrize("name", ["../../../../b", "a/b", "/abs", "..\\b", "a\nb", "a\0b"])
def test_names_of_stages_stay_in_the_folder(tmp_path, texts, name, kind):
    with pytest.raises(ValueError, match="leave out slashes and line breaks"):
        run(tmp_path, texts, **{kind: [{"name": name}]})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"report_to": "neptune"}, "`report_to` is 'neptune', but that tracker is not installed"),
        ({"stages": [{"name": "a", "report_to": "nonsense"}]}, "`report_to` is 'nonsense'"),
        ({"teacher": "nowhere"}, "`teacher` 'nowhere' is no file and no folder"),
        ({"teacher": "nobody/nothing"}, "`teacher` 'nobody/nothing' is no file and no folder"),
        ({"student": "nowhere"}, "`student` 'nowhere' is no file"),
        ({"dataset": ["builtin", "nobody/nothing"]}, "`dataset` 'nobody/nothing' is no file"),
        ({"dataset": ["no/such/*.txt"]}, "`dataset` 'no/such/.*.txt' is no file"),
        ({"eval_dataset": ["a=nobody/nothing"]}, "`eval_dataset` 'nobody/nothing' is no file"),
    ],
)
def test_what_is_not_there_is_said_at_once(tmp_path, texts, options, message, monkeypatch):
    monkeypatch.setattr("cab_hf.runs.run._claim", pytest.fail)
    started = time.monotonic()
    with pytest.raises((OSError, ImportError), match=message):
        run(tmp_path, texts, **options)
    assert time.monotonic() - started < 12 and not (tmp_path / "out").exists()


def test_a_diverged_run_writes_no_card(tmp_path, texts, monkeypatch):
    monkeypatch.setattr("cab_hf.runs.text.compare", lambda *_, **__: {"kl": 9.0, "student_perplexity": float("inf")})
    with pytest.raises(FloatingPointError, match="student_perplexity on .* is inf"):
        run(tmp_path, texts)
    assert not (tmp_path / "out/README.md").exists() and not (tmp_path / "out/report.json").exists()


@pytest.mark.parametrize(
    "make",
    [
        lambda: FloatingPointError("Stage 'a' diverged"),
        lambda: OSError(28, "No space left on device"),
        lambda: __import__("datasets").exceptions.DatasetGenerationError("a cut line"),
        lambda: __import__("safetensors").SafetensorError("I/O error: No space left on device (os error 28)"),
        lambda: __import__("huggingface_hub").errors.HTTPError("gone"),
        lambda: __import__("zipfile").BadZipFile("File is not a zip file"),
        lambda: yaml.YAMLError("no YAML"),
        lambda: __import__("torch").OutOfMemoryError("out of memory"),
        lambda: EOFError("no data"),
    ],
)
def test_errors_that_users_cause_are_one_line(make, capsys):
    error = make()
    with pytest.raises(SystemExit) as end, errors_in_one_line("Set less."):
        raise error
    assert end.value.code == 1
    assert str(error) in capsys.readouterr().err.splitlines()[0]


def test_other_errors_keep_their_traceback():
    with pytest.raises(KeyError), errors_in_one_line(""):
        raise KeyError("a fault of the package")


def test_ctrl_c_ends_in_one_line_and_the_run_goes_on(tmp_path, texts):
    recipe = recipe_of(tmp_path, texts, max_steps=100_000, save_steps=2, eval_max_tokens=64, recall_gaps=[])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "train_cab.py"), str(recipe)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("out/stages/*/checkpoint-*/trainer_state.json")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in errors
    assert errors.count("Run the same command again") == 1
