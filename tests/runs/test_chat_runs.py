"""A run on conversations: what it learns on, and what the student's folder keeps of the teacher."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import error_of
from tiny_chat import CHAT, CHATML, chat_tokenizer
from tiny_distillation import tiny_teacher
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessor

from cab_hf.cli import main
from cab_hf.recipes import parse_recipe
from cab_hf.runs.chat import printable
from cab_hf.runs.run import run_recipe
from cab_hf.runs.text import load_blocks


END = 258
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def teacher(tmp_path):
    """The folder of a teacher whose answers end by one of two tokens, and whose tokenizer has a template."""
    model = tiny_teacher(vocab_size=261, max_position_embeddings=1024)
    model.config.eos_token_id, model.config.pad_token_id = END, 260
    model.generation_config = GenerationConfig(eos_token_id=[END, 259], pad_token_id=260)
    model.save_pretrained(tmp_path / "teacher")
    chat_tokenizer().save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def chats(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"Number {row}?"}, *CHAT[2:]]} for row in range(30)]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "chats.jsonl"


def recipe_of(teacher, chats, *options):
    given = ["--teacher", teacher, "--dataset", chats, "--output_dir", teacher.parent / "student", *options]
    return parse_recipe(["training_args/smoke.yaml", "--disable_tqdm", "true", *map(str, given)])


class EndsAfter(LogitsProcessor):
    """Makes every answer end after some tokens."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores):
        wanted = END if input_ids.shape[1] >= self.length else 65
        return torch.full_like(scores, -1e9).index_fill_(1, torch.tensor([wanted]), 0.0)


@pytest.mark.parametrize("start", ["teacher", "config"])
def test_a_student_keeps_template_special_tokens_and_ends(teacher, chats, start):
    options = ["--loss_on", "assistant", "--student_from", start, "--max_steps", 1]
    if start == "config":
        options += ["--student_config", "{head_dim: 8, state_size: 8, hidden_size: 32, num_hidden_layers: 2}"]
    recipe = recipe_of(teacher, chats, *options)
    report = run_recipe(recipe)
    assert next(iter(report["after"].values()))["n_tokens"] > 0
    folder = recipe.output_dir
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [END, 259]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.generation_config.eos_token_id == [END, 259] and model.generation_config.pad_token_id == 260
    assert (model.config.eos_token_id, model.config.pad_token_id) == (END, 260)
    assert tokenizer.chat_template == CHATML
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (END, 260)
    prompt = tokenizer.apply_chat_template(CHAT[:2], add_generation_prompt=True, return_tensors="pt")
    length = prompt["input_ids"].shape[1]
    out = model.generate(**prompt, max_new_tokens=20, logits_processor=[EndsAfter(length + 3)])
    assert out[0, length:].tolist() == [65, 65, 65, END]


def test_a_card_shows_a_turn_and_its_answer(teacher, chats):
    recipe = recipe_of(teacher, chats, "--license", "mit", "--sample_prompt", "Hi?", "--max_steps", 1)
    report = run_recipe(recipe)
    folder = recipe.output_dir
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    turn = [{"role": "user", "content": "Hi?"}]
    prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    answer = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert report["is_chat"] and report["sample"] == printable(answer)
    card = (folder / "README.md").read_text()
    assert "\nuser: Hi?\nassistant: " in card and "a user's turn, through its chat template" in card
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert all("pipe(messages)" in one for one in code)
    (folder.parent / "use.py").write_text(code[0])
    done = subprocess.run([sys.executable, "../use.py"], cwd=folder, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr


def test_blocks_and_held_out_conversations(teacher, chats):
    recipe = recipe_of(teacher, chats, "--loss_on", "assistant", "--holdout", "0.2")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(teacher), AutoTokenizer.from_pretrained(teacher)
    blocks, heldout, copies, is_chat, _ = load_blocks(
        recipe.data, tokenizer, model, recipe.args, teacher.parent / "stages"
    )
    assert is_chat and list(copies.values()) == [0] and len(next(iter(heldout.values()))) > 0
    labels = np.array(blocks["labels"])
    text = tokenizer.decode(labels[labels >= 0])
    assert "Hello.<|end|>" in text and "Bye?" not in text and "user" not in text
    everything = recipe_of(teacher, chats).data
    blocks, *_ = load_blocks(everything, tokenizer, model, recipe.args, teacher.parent / "stages")
    assert (np.array(blocks["labels"]) >= 0).mean() > 0.9
    # Plain text may be evaluated beside them, on all of its tokens.
    mixed = recipe_of(teacher, chats, "--loss_on", "assistant", "--eval_dataset", "docs=builtin").data
    heldout = load_blocks(mixed, tokenizer, model, recipe.args, teacher.parent / "stages")[1]
    assert (np.array(heldout["docs"][:10]["labels"]) >= 0).mean() > 0.9


def test_what_does_not_fit_together_is_said_in_one_line(teacher, chats):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(teacher), AutoTokenizer.from_pretrained(teacher)
    for options, said in (
        (["--loss_on", "assistant", "--repeat_fraction", "0.5"], "`repeat_fraction` is 0.5, but `loss_on`"),
        (["--loss_on", "assistant", "--fact_fraction", "0.5"], "`fact_fraction` is 0.5, but `loss_on`"),
        (["--loss_on", "assistant", "--dataset", "builtin"], "loss_on is 'assistant', but documents have the columns"),
    ):
        recipe = recipe_of(teacher, chats, *options)
        with pytest.raises(ValueError) as error:
            load_blocks(recipe.data, tokenizer, model, recipe.args, teacher.parent / "stages")
        assert said in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="invalid choice: 'user'"):
        recipe_of(teacher, chats, "--loss_on", "user")


def test_other_commands_read_conversations(teacher, chats, tmp_path, capsys):
    main(["sample", str(teacher), str(tmp_path / "a.npz"), "--tokens", "40", "--prompts", str(chats)])
    tiny_student = tmp_path / "run"
    run_recipe(recipe_of(teacher, chats, "--max_steps", 1, "--output_dir", tiny_student))
    capsys.readouterr()
    options = ["--teacher", str(teacher), "--data", str(chats)]
    main(["inspect", str(tiny_student), *options, "--tokens", "20"])
    main(["evaluate", str(tiny_student), *options, "--lengths", "--gaps", "--prompts", "0", "--block_size", "40"])
    assert "held-out part of" in capsys.readouterr().out
    (chats.parent / "bad.jsonl").write_text('{"messages": []}')
    assert "bad.jsonl: row 1: " in error_of(capsys, "inspect", tiny_student, *options[:3], chats.parent / "bad.jsonl")
