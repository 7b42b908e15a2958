"""Checkpoints of a distillation: what they hold, and that a resumed run goes on as if it had not stopped."""

import copy
import json
import shutil
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_distillation import SIX_LOSSES, make_trainer, ragged_rows, tiny_student
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from cab_hf import CABMambaForCausalLM, DistillationTrainer
from cab_hf.data.packing import LanguageCollator
from cab_hf.distillation.checkpoints import last_whole_checkpoint, load_student
from cab_hf.distillation.training_args import LOSSES


SAVING = {"save_strategy": "steps", "save_steps": 1}
# 14 rows in batches of 2, two to a step: 4 steps an epoch, the last one of a single batch.
ROWS = ragged_rows((11, 3, 7, 1, 9, 5, 2) * 2)
LONG = {
    **SIX_LOSSES,
    **SAVING,
    "max_steps": 10,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 3,
    "bridge_learning_rate": 3e-3,
    "weight_decay": 0.1,
    "kl_decay": "linear",
    "hidden_end": 0.65,
    "bridge_centered": True,
}


def long_run(folder: Any, resume: Any = None, student_seed: int = 1, mixer: str = "mamba2", **options: Any):
    """A trained trainer whose student draws random numbers, its recorder, and the tokens of every batch."""
    student = tiny_student(mixer, seed=student_seed)
    student.backbone.embeddings.register_forward_hook(lambda module, _, x: F.dropout(x, 0.1, module.training))
    trainer, recorder = make_trainer(folder, rows=ROWS, student=student, **{**LONG, **options})
    seen, distil = [], trainer._distil

    def record(model, inputs, *args, **kwargs):
        seen.append(inputs["input_ids"].clone())
        return distil(model, inputs, *args, **kwargs)

    trainer._distil = record
    trainer.train(resume_from_checkpoint=resume)
    return trainer, recorder, seen


def assert_same_state(left: Any, right: Any) -> None:
    left, right = left.state_dict(), right.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_a_resumed_run_is_the_same_run(tmp_path, mixer):
    whole, logs, batches = long_run(tmp_path, mixer=mixer)
    assert (whole.model.target_scales != 1).all()
    assert len(logs.logs) == 11 and len(batches) == 7 + 7 + 4
    # In the middle of an epoch, before and after its short last step, and in the middle of the second.
    for step, batches_done in ((2, 4), (3, 6), (4, 7), (6, 11)):
        resumed, later, remaining = long_run(
            tmp_path, resume=str(tmp_path / f"checkpoint-{step}"), student_seed=9, mixer=mixer, save_strategy="no"
        )
        assert later.logs[:-1] == logs.logs[step:-1], step
        assert all(torch.equal(a, b) for a, b in zip(remaining, batches[batches_done:], strict=True))
        assert_same_state(resumed.model, whole.model)
        for ours, theirs in zip(resumed.optimizer.param_groups, whole.optimizer.param_groups, strict=True):
            assert {k: v for k, v in ours.items() if k != "params"} == {
                k: v for k, v in theirs.items() if k != "params"
            }


def test_a_trainer_may_go_back_to_its_checkpoint(tmp_path):
    trainer, recorder, _ = long_run(tmp_path)
    end, logs = copy.deepcopy(trainer.model.state_dict()), list(recorder.logs)
    recorder.logs.clear()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert recorder.logs[:-1] == logs[6:-1]
    assert all(torch.equal(value, end[name]) for name, value in trainer.model.state_dict().items())


def test_logs_after_a_resume_count_their_own_steps(tmp_path):
    _, every, _ = long_run(tmp_path, max_steps=8, save_strategy="no")
    options = {"max_steps": 8, "logging_steps": 4, "save_steps": 2}
    long_run(tmp_path, **options)
    for step in (2, 4):
        _, fourth, _ = long_run(tmp_path, resume=str(tmp_path / f"checkpoint-{step}"), **options)
        window = every.logs[step : 4 if step == 2 else 8]
        for name in (*LOSSES, "loss"):
            assert fourth.logs[0][name] == pytest.approx(sum(log[name] for log in window) / len(window), rel=1e-5)


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_a_checkpoint_is_a_student_and_a_bridge_apart(tmp_path, mixer):
    trainer, _ = make_trainer(tmp_path, student=tiny_student(mixer), max_steps=2, **SAVING, **SIX_LOSSES)
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() < trainer.student.state_dict().keys()
    assert not any("bridge" in name or "teacher" in name or "scales" in name for name in weights)
    rest = load_file(folder / "bridge.safetensors")
    assert rest.keys() == {name for name in trainer.model.state_dict() if not name.startswith("student.")}
    assert "target_scales" in rest and sum(name.startswith("bridge.") for name in rest) == 2 * 2 * 4

    student = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(student, CABMambaForCausalLM)
    assert_same_state(student, trainer.student)
    tokens = ROWS[0]["input_ids"][None]
    trainer.student.eval()
    assert torch.equal(student(tokens).logits, trainer.student(tokens).logits)

    trainer.save_model(tmp_path / "final")
    assert_same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "final"), trainer.student)
    assert not (tmp_path / "final" / "bridge.safetensors").exists()


def test_a_run_without_a_bridge_resumes(tmp_path):
    options = {"bridge_weight": 0.0, "max_steps": 3, **SAVING}
    trainer, recorder = make_trainer(tmp_path, **options)
    trainer.train()
    assert load_file(tmp_path / "checkpoint-1" / "bridge.safetensors").keys() == {"target_scales"}
    resumed, later = make_trainer(tmp_path, student=tiny_student(seed=4), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert later.logs[:2] == recorder.logs[1:3]
    assert_same_state(resumed.model, trainer.model)


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated"])
def test_an_incomplete_checkpoint_is_left_out(tmp_path, damage):
    whole, logs, _ = long_run(tmp_path)
    (tmp_path / "checkpoint-notes").mkdir()
    state = tmp_path / "checkpoint-10" / "trainer_state.json"
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    text = state.read_text()
    state.unlink()
    if damage != "missing":
        state.write_text("" if damage == "empty" else text[: len(text) // 2])
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")
    resumed, later, _ = long_run(tmp_path, resume=True, student_seed=3)
    assert later.logs[0] == logs.logs[9]
    assert_same_state(resumed.model, whole.model)


def test_a_run_killed_while_saving_goes_on_from_the_last_good_checkpoint(tmp_path, monkeypatch):
    whole, _, _ = long_run(tmp_path / "whole", save_steps=4)
    save = DistillationTrainer._save_optimizer_and_scheduler

    def killed(self, output_dir):
        if output_dir.endswith("checkpoint-8"):
            raise KeyboardInterrupt
        save(self, output_dir)

    monkeypatch.setattr(DistillationTrainer, "_save_optimizer_and_scheduler", killed)
    with pytest.raises(KeyboardInterrupt):
        long_run(tmp_path / "killed", save_steps=4)
    monkeypatch.undo()
    assert (tmp_path / "killed" / "checkpoint-8" / "model.safetensors").is_file()
    assert last_whole_checkpoint(tmp_path / "killed").endswith("checkpoint-4")
    resumed, _, _ = long_run(tmp_path / "killed", resume=True, student_seed=3, save_steps=4)
    assert_same_state(resumed.model, whole.model)


def test_nothing_to_resume_from_teaches(tmp_path):
    assert last_whole_checkpoint(tmp_path / "nowhere") is None
    trainer, _ = make_trainer(tmp_path)
    with pytest.raises(ValueError) as error:
        trainer.train(resume_from_checkpoint=True)
    assert all(word in str(error.value) for word in ("resume_from_checkpoint=True", str(tmp_path), "no complete"))


def test_a_plain_student_is_no_checkpoint(tmp_path):
    tiny_student(seed=8).save_pretrained(tmp_path / "student")
    trainer, _ = make_trainer(tmp_path)
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(ValueError) as error:
        trainer.train(resume_from_checkpoint=str(tmp_path / "student"))
    said = str(tmp_path / "student"), "bridge.safetensors", "Pass it as the student"
    assert all(word in str(error.value) for word in said)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize(
    ("written", "resumed", "said"),
    [
        (
            {"mixer": "mamba2"},
            {"mixer": "mamba"},
            r"layers\.0\.mixer\.A_log is \(4,\) there and \(32, 6\) here; .*D is \(4,\) there",
        ),
        ({"num_hidden_layers": 3}, {}, r"layers\.2\.\S+ is \(.*\) there and missing here"),
        ({}, {"num_hidden_layers": 3}, r"layers\.2\.\S+ is missing there and \("),
        ({"bridge_hidden_size": 8}, {"bridge_hidden_size": 9}, r"bridge\.\S+ is \(8, 6\) there and \(9, 6\) here"),
        ({"bridge_weight": 0.0}, {}, r"bridge\.\S+ is missing there and \("),
        ({}, {"bridge_weight": 0.0}, r"bridge\.\S+ is \(.*\) there and missing here"),
        ({"lora": 2}, {"lora": 3}, r"lora_A\.weight is \(2, 32\) there and \(3, 32\) here"),
        ({"lora": 2, "target": "in_proj"}, {"lora": 2}, r"out_proj\.lora_A\.weight is missing there and \(2, 32\)"),
        ({"lora": 2}, {"lora": 2, "target": "in_proj"}, r"out_proj\.lora_A\.weight is \(2, 32\) there and missing"),
        ({"lora": 2}, {}, r"embeddings\.weight is missing there and \(61, 32\) here"),
        ({}, {"lora": 2}, r"lora_A\.weight is missing there and \(2, 32\) here"),
    ],
)
@pytest.mark.filterwarnings("default::FutureWarning")  # peft's own
def test_a_checkpoint_of_another_student_or_bridge_teaches(tmp_path, written, resumed, said):
    def trainer_of(mixer="mamba2", num_hidden_layers=2, lora=None, target="out_proj", **options):
        student = tiny_student(mixer, num_hidden_layers=num_hidden_layers)
        if lora is not None:
            peft = pytest.importorskip("peft")
            student = peft.get_peft_model(student, peft.LoraConfig(r=lora, target_modules=["in_proj", target]))
        return make_trainer(tmp_path, student=student, **SAVING, **options)[0]

    trainer_of(**written).train()
    trainer = trainer_of(**resumed)
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(ValueError, match=f"checkpoint-1 was written by another student or bridge.*{said}") as error:
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert all(words in str(error.value) for words in ("Resume with the options", "`output_dir`"))
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.filterwarnings("default::FutureWarning")  # peft's own
def test_an_adapter_with_whole_modules_resumes(tmp_path):
    peft = pytest.importorskip("peft")

    def run(seed: int, **keywords: Any):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, target_modules=["in_proj", "lm_head"], modules_to_save=["norm_f"])
        student = peft.get_peft_model(tiny_student(tie_word_embeddings=False), config)
        trainer, recorder = make_trainer(tmp_path, student=student, max_steps=4, **SAVING)
        trainer.train(**keywords)
        return trainer, recorder

    whole, logs = run(seed=1)
    assert any("lm_head.base_layer" in name for name in load_file(tmp_path / "checkpoint-2/adapter_model.safetensors"))
    resumed, later = run(seed=2, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert later.logs[:2] == logs.logs[2:4]
    assert_same_state(resumed.model, whole.model)


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    trainer, _ = make_trainer(
        tmp_path,
        eval_dataset=ROWS,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="kl",
        greater_is_better=True,  # the KL falls, so that the first one counts as the best
        save_total_limit=1,
    )
    trainer.train()
    assert trainer.state.best_global_step == 2
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    rest = load_file(tmp_path / "checkpoint-2" / "bridge.safetensors")
    assert all(torch.equal(trainer.student.state_dict()[name], value) for name, value in saved.items())
    assert all(torch.equal(trainer.model.state_dict()[name], value) for name, value in rest.items())


def test_old_checkpoints_are_deleted(tmp_path):
    long_run(tmp_path, save_total_limit=2)
    assert {folder.name for folder in tmp_path.glob("checkpoint-*")} == {"checkpoint-9", "checkpoint-10"}
    names = {file.name for file in (tmp_path / "checkpoint-10").iterdir()}
    assert {"model.safetensors", "bridge.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"} <= names


def test_the_tokenizer_is_saved_too(tmp_path):
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="a", pad_token="a")
    trainer, _ = make_trainer(tmp_path, processing_class=tokenizer, data_collator=LanguageCollator(0), **SAVING)
    trainer.train()
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "checkpoint-1")
    assert again.get_vocab() == tokenizer.get_vocab()


def test_shards_load_and_foreign_weights_teach(tmp_path):
    saved, other = tiny_student(seed=5), tiny_student(seed=6)
    saved.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    load_student(other, tmp_path / "shards")
    assert_same_state(other, saved)

    tiny_student(num_hidden_layers=3).save_pretrained(tmp_path / "deeper")
    with pytest.raises(ValueError) as error:
        load_student(other, tmp_path / "deeper")
    assert str(tmp_path / "deeper") in str(error.value) and "backbone.layers.2." in str(error.value)


def test_a_checkpoint_may_move(tmp_path):
    whole, logs, _ = long_run(tmp_path / "here")
    shutil.move(tmp_path / "here" / "checkpoint-6", tmp_path / "there")
    resumed, later, _ = long_run(tmp_path / "new", resume=str(tmp_path / "there"), student_seed=3)
    assert later.logs[:-1] == logs.logs[6:-1]
    assert_same_state(resumed.model, whole.model)
