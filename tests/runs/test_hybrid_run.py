"""A recipe that keeps attention, from its first step to its card, and what the commands say of the student."""

import json
from pathlib import Path

from transformers import AutoModelForCausalLM

from cab_hf.cli import main
from cab_hf.models import CABHybridForCausalLM
from cab_hf.recipes import parse_recipe
from cab_hf.runs.run import run_recipe


SMOKE = str(Path(__file__).parents[2] / "training_args/smoke.yaml")


def test_a_recipe_that_keeps_attention_ends_in_a_hybrid_with_its_card(tmp_path, capsys):
    folder = str(tmp_path / "out")
    options = ["--keep_attention", "1", "--license", "mit", "--disable_tqdm", "true"]
    run_recipe(parse_recipe([SMOKE, "--output_dir", folder, *options]))
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
