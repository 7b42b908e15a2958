"""`cab-hf distill`: a teacher and data become a recipe, and the recipe a student that loads."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from commands import error_of
from PIL import Image
from tiny_distillation import tiny_teacher
from tiny_images import SIZE, tiny_image_teacher
from transformers import AutoModelForCausalLM, ViTImageProcessor

from cab_hf.checks import parse_count
from cab_hf.cli import main
from cab_hf.recipes import parse_options
from cab_hf.runs.distill import data_options, recipe_values, task_of
from cab_hf.teachers.demo import random_llama


LONG_STAGE = str(Path(__file__).parents[2] / "benchmarks/quality/hybrids/four/recipe.yaml")
QUICK = ["--use_cpu", "true", "--disable_tqdm", "true", "--block_size", "64", "--eval_max_tokens", "512"]
QUICK += ["--student_config", "{head_dim: 8, state_size: 8}", "--verify_reload", "false", "--sample_tokens", "4"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in, and a text of its own."""
    monkeypatch.chdir(tmp_path)
    words = " ".join(f"{number} times {number} is {number * number}." for number in range(400))
    (tmp_path / "notes.txt").write_text(words)
    return tmp_path


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    generator = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for index in range(10):
            pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{index}.png")
    return folder


def test_one_text_file_becomes_a_student_and_goes_on(here, capsys):
    command = ["distill", "random-llama", "--data", "notes.txt", "--tokens", "1k", *QUICK]
    main(command)
    printed = capsys.readouterr().out
    folder = here / "outputs/random-llama-mamba"
    assert type(AutoModelForCausalLM.from_pretrained(folder)).__name__ == "CABMambaForCausalLM"
    # each stage is told before it begins, and at the end what to type next
    assert "stage 1 of 1: train (soft KL, attention bridge), 7 steps" in printed
    assert f"cab-hf chat {Path('outputs/random-llama-mamba')}" in printed and "perplexity" in printed
    values = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert values["dataset"] == ["notes.txt"] and "license" not in values and "holdout" not in values
    main(command)
    assert "already holds this run's result" in capsys.readouterr().out


def test_a_folder_of_class_images_becomes_a_student(here, pictures, capsys):
    tiny_image_teacher(id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1}).save_pretrained("vit")
    ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained("vit")
    options = ["--use_cpu", "true", "--disable_tqdm", "true", "--rand_augment_num", "0"]
    main(["distill", "vit", "--data", str(pictures), "--images", "100", *options])
    printed = capsys.readouterr().out
    # the recipe's batch of 128 is half of the 20 images
    assert "stage 1 of 2: outputs (mixer outputs), 3 steps" in printed
    assert "stage 2 of 2: kl (soft KL), 7 steps" in printed
    assert "--to onnx" in printed and "--to stock" not in printed and "--license NAME" in printed
    folder = here / "outputs/vit-mamba"
    main(["evaluate", str(folder), "--teacher", "vit", "--data", str(pictures), "--lengths", "--repeats", "1"])
    assert json.loads((folder / "evaluation.json").read_text())["images"]


def test_a_folder_in_which_nothing_was_done_is_free(here, capsys):
    command = ["distill", "random-llama", "--data", "notes.txt", "--tokens", "1k", "--output_dir", "mine", *QUICK]
    assert "make no batch" in error_of(
        capsys, *command, "--per_device_train_batch_size", "999", "--tokens", "64k", "--dataloader_drop_last", "true"
    )
    assert (here / "mine/recipe.yaml").is_file()
    main(command)
    other = [*command, "--learning_rate", "1e-4"]
    assert "holds a run of another recipe (learning_rate: " in error_of(capsys, *other)


def test_a_dry_run_says_what_would_happen_and_writes_nothing(here, capsys):
    main(["distill", "random-llama", "--data", "notes.txt", "--tokens", "1k", "--dry_run", *QUICK])
    printed = capsys.readouterr().out
    for text in ("LlamaForCausalLM, 4 layers of width 32", "mamba2 mixers, state 8", "7 steps, 896 tokens", "GiB"):
        assert text in printed
    assert [path.name for path in here.iterdir()] == ["notes.txt"]


def test_trackers_are_told_the_stage(here, monkeypatch):
    told = []

    def train(name, trainer, place):
        told.append((trainer.args.run_name, Path(trainer.args.output_dir).name, place))
        return {"name": name, "steps": 1, "examples": 2, "seconds": 0.1, "peak_gib": None, "log": []}

    monkeypatch.setattr("cab_hf.runs.stages.train_stage", train)
    main(["distill", "random-llama", "--data", "notes.txt", "--recipe", "smoke", "--output_dir", "mine", *QUICK])
    assert told == [("mine bridge", "1-bridge", (1, 2)), ("mine kl", "2-kl", (2, 2))]


def test_stages_share_the_steps_as_they_were_measured():
    """5M, 20M and 60M tokens of rows of 1,024 in batches of 16, as in benchmarks/quality/smollm2_long."""
    for tokens, outputs, kl in ((5_000_000, 91, 214), (20_000_000, 366, 854), (60_000_000, 366, 3296)):
        values = {"per_device_train_batch_size": 16, "block_size": 1024}
        made = recipe_values("random-llama", ["builtin"], recipe="lm_default", amount=tokens, options=values)
        assert [stage["max_steps"] for stage in made["stages"]] == [outputs, kl]
    assert made["teacher_tokens"] == 4_000_000
    smaller = recipe_values("random-llama", ["builtin"], recipe="lm_default", amount=15_000_000, options=values)
    assert smaller["teacher_tokens"] == pytest.approx(1_000_000, rel=1e-2)


def test_the_longest_stage_takes_what_others_leave():
    """Of a recipe whose last stage is a short one in long rows."""
    for tokens, steps in ((5_000_000, [45, 215, 45]), (60_000_000, [366, 2808, 488]), (90_000_000, [366, 4639, 488])):
        made = recipe_values("random-llama", ["builtin"], recipe=LONG_STAGE, amount=tokens)
        assert [stage["max_steps"] for stage in made["stages"]] == steps


def test_rows_of_a_stage_end_where_the_teacher_does(here):
    config = random_llama()[0].config
    config.max_position_embeddings, config.architectures = 1024, ["LlamaForCausalLM"]
    config.save_pretrained("llama")
    made = recipe_values("llama", ["builtin"], recipe=LONG_STAGE)
    assert made["block_size"] == 512 and made["stages"][2]["block_size"] == 1024


@pytest.mark.parametrize("width, factor", [(1152, 0.5), (576, 1.0), (384, 1.5), (32, 2.0)])
def test_learning_rates_follow_the_width(here, width, factor):
    config = random_llama()[0].config
    config.hidden_size = width
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained("llama")
    made = recipe_values("llama", ["builtin"], recipe="lm_default")
    assert made["stages"][1]["learning_rate"] == pytest.approx(1.2e-3 * factor)
    by_hand = recipe_values("llama", ["builtin"], recipe="lm_default", options={"learning_rate": 1e-4})
    assert by_hand["learning_rate"] == 1e-4 and "learning_rate" not in by_hand["stages"][1]


def test_several_processes_share_the_batch_of_one(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    made = recipe_values("random-llama", ["builtin"], recipe="lm_default", amount=20_000_000)
    assert made["per_device_train_batch_size"] == 4 and made["cuda_graph"] is False
    assert sum(stage["max_steps"] for stage in made["stages"]) == 1220
    hybrid = recipe_values("random-llama", ["builtin"], recipe=LONG_STAGE)
    assert (hybrid["per_device_train_batch_size"], hybrid["stages"][2]["per_device_train_batch_size"]) == (8, 2)


@pytest.mark.parametrize("text, count", [("20M", 20_000_000), ("1.5k", 1500), ("3e6", 3_000_000), ("1,000", 1000)])
def test_counts(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "M", "-5", "ten", "0", "1.2.3", "5T"])
def test_what_is_no_count(text):
    with pytest.raises(ValueError, match="is no positive number"):
        parse_count(text)


def test_texts_and_images_are_told_apart(here, pictures):
    assert task_of(random_llama()[0].config) == "text-generation"
    assert task_of(tiny_image_teacher().config) == "image-classification"
    assert data_options("image-classification", [str(pictures)])["data_dir"] == str(pictures)
    assert data_options("text-generation", ["notes.txt", "builtin"]) == {"dataset": ["notes.txt", "builtin"]}


def test_errors_are_one_line(here, pictures, capsys):
    tiny_teacher().save_pretrained("llama")
    teacher = ("distill", "random-llama", "--data")
    assert "holds images, but the teacher is a language model" in error_of(capsys, *teacher, pictures)
    assert "none of cifar10_dinov2_small" in error_of(capsys, *teacher, "notes.txt", "--recipe", "lm_best")
    assert "'--recipe' vision_default is for image" in error_of(
        capsys, *teacher, "notes.txt", "--recipe", "vision_default"
    ).replace("`", "'")
    assert "is 'ten', which is no positive number" in error_of(capsys, *teacher, "notes.txt", "--tokens", "ten")
    assert "a step reads" in error_of(capsys, *teacher, "notes.txt", "--tokens", 3)
    assert "Did you mean '--tokens'?" in error_of(capsys, *teacher, "notes.txt", "--token", "6k")
    tiny_image_teacher().save_pretrained("vit")
    spoken = ("distill", "vit", "--data", pictures, "--loss_on", "assistant")
    spoken += ("--use_cpu", "true")
    assert "`loss_on` is 'assistant', but images are no conversations" in error_of(capsys, *spoken)
    Path("empty.txt").write_text("")
    assert "empty.txt is empty" in error_of(capsys, *teacher, "empty.txt", "--tokens", "1k", *QUICK)
    assert "Did you mean '--kl_weight'" in error_of(capsys, *teacher, "notes.txt", "--kl_wieght", 1)
    assert "no file and no folder" in error_of(capsys, "distill", "./nothing", "--data", "notes.txt")
    assert "the following arguments are required: --data" in error_of(capsys, "distill", "random-llama")
    if torch.cuda.device_count() < 64:
        assert "`--gpus` is 64, but this machine has" in error_of(capsys, *teacher, "notes.txt", "--gpus", 64)
    assert "Unknown options: --tokenz" in error_of(capsys, "card", "outputs", "--tokenz", 3)


def test_help_is_one_screen_and_help_all_the_rest(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["distill", "--help"])
    short = capsys.readouterr().out
    assert ended.value.code == 0 and len(short.splitlines()) <= 45 and "--tokens" in short
    main(["distill", "--help-all"])
    every = capsys.readouterr().out
    listed = re.findall(r"^  (--[\w-]+)", every, re.MULTILINE)
    assert "--bridge_weight" in listed and len(listed) == len(set(listed)) and "--bridge-weight" not in every
    assert parse_options(["--bridge-weight", "1"]) == {"bridge_weight": 1.0}


def test_a_dry_run_of_a_clone_is_that_of_the_command(here, capsys, monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.setattr(sys, "argv", ["train_cab.py", str(root / "training_args/smoke.yaml"), "--dry_run"])
    runpy.run_path(str(root / "train_cab.py"), run_name="__main__")
    assert "stage 1 of 2  bridge (attention bridge): 4 steps" in capsys.readouterr().out
    assert [path.name for path in here.iterdir()] == ["notes.txt"]
    sys.argv[1] = str(root / "training_args/digits_vit.yaml")
    with pytest.raises(SystemExit):
        runpy.run_path(str(root / "train_cab.py"), run_name="__main__")
    assert "but `finetune` makes a teacher" in capsys.readouterr().err


# `--gpus 2` of a machine that has them; the processes themselves are on the CPU.
TWO = """
import sys
sys.argv[0] = "cab-hf"
from cab_hf.cli import main
import cab_hf.runs.distill
cab_hf.runs.distill.check_gpus = lambda gpus: None
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_make_one_student(here):
    root = Path(__file__).parents[2]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}

    def run(*command):
        return subprocess.run([sys.executable, *command], cwd=here, env=environment, capture_output=True, text=True)

    quick = [text for text in QUICK if text not in ("--disable_tqdm", "true", "--use_cpu")] + ["--use_cpu", "true"]
    line = ["distill", "random-llama", "--data", "notes.txt", "--recipe", "lm_default", "--license", "mit", *quick]
    done = run("-c", TWO, *line, "--output_dir", "student", "--tokens", "8k", "--gpus", "4", "--gpus=2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert AutoModelForCausalLM.from_pretrained(here / "student").num_parameters() > 0
    assert "accelerate launch --num_processes 2 -m cab_hf.cli distill random-llama" in done.stdout
    assert done.stdout.count("stage 1 of 2") == 1 and "--gpus" not in done.stdout
    report = json.loads((here / "student/report.json").read_text())
    assert report["train_tokens"] == 7 * 16 * 64 and (here / "student/README.md").is_file()  # of 8,000, as on one GPU
    assert yaml.safe_load((here / "student/recipe.yaml").read_text())["per_device_train_batch_size"] == 8
    # a bar a stage, none of what is quick, and each warning once in the processes
    assert "outputs: 100%" in done.stderr and "kl: 100%" in done.stderr
    assert "Tokenising" not in done.stderr and "Writing model shards" not in done.stderr
    assert done.stderr.count("There is one document") == 1

    wrong = ["--student_config", "{head_dim: 7, state_size: 8}"]
    broken = run("-c", TWO, *line, *wrong, "--output_dir", "broken", "--tokens", "8k", "--gpus", "2")
    assert broken.returncode == 1 and "They must be equal" in broken.stderr and "Traceback" not in broken.stderr

    options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    options += ["--main_process_port", "0", "--dynamo_backend", "no", str(root / "train_cab.py")]
    done = run("-m", "accelerate.commands.launch", *options, str(root / "training_args/smoke.yaml"))
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((here / "outputs/smoke/report.json").read_text())
    assert [stage["examples"] for stage in report["stages"]] == [2 * 2 * 4] * 2
