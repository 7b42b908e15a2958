"""A recipe that keeps attention, from its first step to its card, and what the commands say of the student."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from cab_hf.cli import main
from cab_hf.models import CABHybridForCausalLM
from cab_hf.recipes import parse_recipe
from cab_hf.runs.plan import plan
from cab_hf.runs.run import next_commands, run_recipe


ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "training_args/smoke.yaml")


def test_a_recipe_that_keeps_attention_ends_in_a_hybrid_with_its_card(tmp_path, capsys):
    folder = str(tmp_path / "out")
    options = ["--keep_attention", "1", "--license", "mit", "--disable_tqdm", "true"]
    recipe = parse_recipe([SMOKE, "--output_dir", folder, *options])
    told = plan(recipe)
    assert "mamba2 mixers, state 8, from the teacher's weights" in told and "mixers in 3 of 4: 0, 2, 3" in told
    run_recipe(recipe)
    student = AutoModelForCausalLM.from_pretrained(folder)
    assert type(student) is CABHybridForCausalLM and student.config.layer_numbers == [0, 2, 3]
    card = (tmp_path / "out/README.md").read_text()
    assert "hybrid of Mamba and Transformer" in card and "4 layers" in card
    assert "of the family llama, with " in card and "mixers in place of attention in 3" in card
    capsys.readouterr()
    main(["inspect", folder, "--teacher", "random-llama", "--tokens", "16", "--examples", "1", "--output", folder])
    report = json.loads((tmp_path / "out/inspection.json").read_text())
    assert (
        [row["layer"] for row in report["layers"]] == [row["teacher_layer"] for row in report["layers"]] == [0, 2, 3]
    )
    assert "mean cosine of attention maps" in capsys.readouterr().out
    main(["export", folder, str(tmp_path / "stock")])
    assert "GraniteMoeHybridForCausalLM" in capsys.readouterr().out


def test_a_recipe_with_windows_ends_in_a_hybrid_that_says_so(tmp_path):
    folder = str(tmp_path / "out")
    options = ["--attention_window", "8", "--keep_attention", "1", "--license", "mit", "--disable_tqdm", "true"]
    recipe = parse_recipe([SMOKE, "--output_dir", folder, *options])
    assert "mixers in 3 of 4: 0, 2, 3, each beside attention to the last 8 tokens" in plan(recipe)
    with pytest.raises(ValueError, match="is to choose 9 of 4 layers"):
        plan(parse_recipe([SMOKE, "--output_dir", folder, "--keep_attention", "auto:9", "--license", "mit"]))
    run_recipe(recipe)
    student = AutoModelForCausalLM.from_pretrained(folder)
    assert student.config.layer_numbers == [0, 2, 3] and student.config.windows == [8, 8, 8]
    assert "mixers beside attention to the last 8 tokens in 3" in (tmp_path / "out/README.md").read_text()
    assert "cab-hf export" not in next_commands(recipe) and "cab-hf chat" in next_commands(recipe)


def test_a_choice_is_saved_with_the_student_and_read_again_by_a_run_that_goes_on(tmp_path, capsys):
    folder = tmp_path / "out"
    options = ["--keep_attention", "auto:1", "--keep_attention_by", "kl", "--recall_gaps", "4", "--license", "mit"]
    arguments = [SMOKE, "--output_dir", str(folder), "--disable_tqdm", "true", *options]
    report = run_recipe(parse_recipe(arguments))
    choice = json.loads((folder / "keep_attention.json").read_text())
    assert report["kept_attention"] == choice and (folder / "keep_attention.png").is_file()
    kept, first = choice["layers"][0], folder / "stages/1-bridge"
    costs = [one["kl"] for one in choice["replaced"].values()]
    assert costs[kept] == max(costs)
    assert AutoModelForCausalLM.from_pretrained(first).config.layer_numbers == [0, 1, 2, 3]  # aligned everywhere
    rest = [layer for layer in range(4) if layer != kept]
    assert AutoModelForCausalLM.from_pretrained(folder).config.layer_numbers == rest
    card = (folder / "README.md").read_text()
    assert f"| Attention kept | layers {kept} of 4, counted from 0; where a mixer alone costs most, by the KL" in card

    # Killed in the second stage, whose newest checkpoint is whole: nothing is chosen again.
    (folder / "report.json").unlink()
    (folder / "stages/2-kl/history.json").unlink()
    weights = (folder / "model.safetensors").read_bytes()
    capsys.readouterr()
    run_recipe(parse_recipe(arguments))
    assert "choosing" not in capsys.readouterr().out and (folder / "model.safetensors").read_bytes() == weights

    # Killed before it: the file decides, whatever would be chosen now.
    (folder / "report.json").unlink()
    shutil.rmtree(folder / "stages/2-kl")
    other = rest[-1]
    changed = choice | {"kept": [choice["paths"][other]], "layers": [other]}
    (folder / "keep_attention.json").write_text(json.dumps(changed))
    assert run_recipe(parse_recipe(arguments))["kept_attention"] == changed
    expected = [layer for layer in range(4) if layer != other]
    assert AutoModelForCausalLM.from_pretrained(folder).config.layer_numbers == expected


@pytest.mark.distributed
def test_two_processes_keep_what_the_first_one_chose(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "CUDA"))}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = ["--keep_attention", "auto:2", "--recall_gaps", "4", "--disable_tqdm", "true"]
    process = subprocess.run(
        [*command, str(ROOT / "train_cab.py"), SMOKE, "--output_dir", str(tmp_path / "out"), *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    assert process.stdout.count("choosing 2 of 4 layers") == 1
    choice = json.loads((tmp_path / "out/keep_attention.json").read_text())
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert student.config.layer_numbers == [layer for layer in range(4) if layer not in choice["layers"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep_attention", "auto"], "Write 'auto:4' alone"),
        (["--keep_attention", "auto:2", "3"], "Write 'auto:4' alone"),
        (["--keep_attention", "auto:4"], "choose 4 of 4 layers"),
        (["--keep_attention", "n=1", "--keep_attention_by", "kl"], "`keep_attention_by` is 'kl'.*nothing is chosen"),
        (["--keep_attention", "auto:1", "--student_from", "config"], "CABMambaForCausalLM, which has no place"),
        (["--keep_attention", "auto:1", "--layer_map", "0,1,2,3"], "`layer_map` is '0,1,2,3'.*Leave `layer_map` out"),
    ],
)
def test_what_can_not_be_chosen_is_said_before_training(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_recipe(parse_recipe([SMOKE, "--output_dir", str(tmp_path / "out"), *options]))
    assert not list(tmp_path.glob("out/stages/*/*"))
