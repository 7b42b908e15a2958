"""Runs that were killed, that diverge, whose disk is full or whose clock was set back."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_distillation import make_arguments, make_trainer, ragged_rows, tiny_student, tiny_teacher
from torch import nn

from cab_hf.distillation.checkpoints import checkpoints, load_student
from cab_hf.distillation.stage_trainer import StageTrainer
from cab_hf.recipes import Stage
from cab_hf.runs.stages import HISTORY_NAME, finetune_stage, run_stage


STEPS = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4}
CONSTANT = {"lr_scheduler_type": "constant"}


def distil(folder: Path, **options) -> tuple[nn.Module, dict]:
    student = tiny_student()
    args = make_arguments(folder, **options)
    return student, run_stage(
        Stage("s", args), student, tiny_teacher(), train_dataset=ragged_rows(), eval_dataset=ragged_rows(seed=3)
    )


def finetune(folder: Path, **options) -> tuple[nn.Module, dict]:
    args = make_arguments(folder, kl_weight=0.0, bridge_weight=0.0, ce_weight=1.0, **options)
    data = {"train_dataset": ragged_rows(), "eval_dataset": ragged_rows(seed=3)}
    return finetune_stage(Stage("s", args), tiny_teacher(), **data)


def timeless(history: dict) -> list[dict]:
    """The log without the summary and without what a clock says."""
    entries = [entry for entry in history["log"] if "train_runtime" not in entry]
    return [
        {name: value for name, value in entry.items() if not name.endswith(("_runtime", "_per_second"))}
        for entry in entries
    ]


@pytest.mark.parametrize("train", [distil, finetune])
@pytest.mark.parametrize(
    "options",
    [
        {"lr_scheduler_type": "linear"},
        CONSTANT,
        {**CONSTANT, "weight_decay": 0.1, "gradient_accumulation_steps": 2},
        {**CONSTANT, "eval_strategy": "steps", "eval_steps": 2},
        {**CONSTANT, "eval_strategy": "epoch", "max_steps": 4},
        {**CONSTANT, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True},
        {**CONSTANT, "save_total_limit": 1, "max_steps": 1},
    ],
)
def test_a_run_killed_before_its_history_takes_no_further_step(tmp_path, train, options):
    options = {**STEPS, **options}
    model, history = train(tmp_path, **options)
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    kept = set(os.listdir(tmp_path))
    (tmp_path / HISTORY_NAME).unlink()
    again, history_again = train(tmp_path, **options)
    assert history_again["steps"] == history["steps"] == options["max_steps"]
    assert timeless(history_again) == timeless(history)
    assert all(torch.equal(weights[name], tensor) for name, tensor in again.state_dict().items())
    assert set(os.listdir(tmp_path)) == kept
    assert not any("train_loss" in entry for entry in history_again["log"])


def test_a_run_killed_in_its_last_evaluation_evaluates(tmp_path):
    options = {**STEPS, **CONSTANT, "eval_strategy": "epoch", "max_steps": 2}
    _, history = distil(tmp_path, **options)
    (tmp_path / HISTORY_NAME).unlink()
    state = tmp_path / "checkpoint-2/trainer_state.json"
    values = json.loads(state.read_text())
    values["log_history"] = [entry for entry in values["log_history"] if "eval_loss" not in entry]
    state.write_text(json.dumps(values))
    assert timeless(distil(tmp_path, **options)[1]) == timeless(history)


def test_the_average_of_a_finished_run_stays(tmp_path):
    options = {**STEPS, **CONSTANT, "ema_decay": 0.5}
    distil(tmp_path, **options)
    (tmp_path / HISTORY_NAME).unlink()
    before = load_file(tmp_path / "ema/model.safetensors")
    distil(tmp_path, **options)
    after = load_file(tmp_path / "ema/model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("train", [distil, finetune])
@pytest.mark.parametrize("logging_steps, save_steps", [(1, 50), (50, 2), (50, 50)])
def test_a_run_that_diverges_stops_and_keeps_its_last_good_checkpoint(
    tmp_path, monkeypatch, train, logging_steps, save_steps
):
    training_step = StageTrainer.training_step

    def breaks(self, model, *args, **kwargs):
        loss = training_step(self, model, *args, **kwargs)
        if self.state.global_step == 2:
            next(model.parameters()).grad.fill_(float("inf"))
        return loss

    monkeypatch.setattr(StageTrainer, "training_step", breaks)
    options = {**STEPS, "max_steps": 4, "logging_steps": logging_steps, "save_steps": save_steps}
    with pytest.raises(FloatingPointError, match=r"diverged by step [34].*`learning_rate` \(it is 0.01\)") as error:
        train(tmp_path / "1-kl", **options, save_total_limit=1)
    assert "Stage '1-kl'" in str(error.value)
    assert not (tmp_path / "1-kl" / HISTORY_NAME).exists()
    for path in checkpoints(tmp_path / "1-kl"):
        assert all(tensor.isfinite().all() for tensor in load_file(path / "model.safetensors").values())
    if save_steps == 2:
        assert [path.name for path in checkpoints(tmp_path / "1-kl")] == ["checkpoint-2"]


@pytest.mark.parametrize("part", ["kl", "bridge"])
def test_the_part_that_broke_is_named(tmp_path, monkeypatch, part):
    trainer, _ = make_trainer(tmp_path, max_steps=2)
    accumulate, at = trainer._accumulate_parts, ["kl", "ce", "bridge"].index(part)

    def broken(parts):
        parts = parts.clone()
        parts[at] = float("nan")
        accumulate(parts)

    monkeypatch.setattr(trainer, "_accumulate_parts", broken)
    with pytest.raises(FloatingPointError, match=f"by step 1: {part} is nan"):
        trainer.train()


@pytest.mark.parametrize("limit", [1, 2])
@pytest.mark.parametrize("later", [False, True])
def test_the_newest_checkpoint_stays_whatever_the_clock_says(tmp_path, limit, later):
    trainer, _ = make_trainer(tmp_path, **STEPS)
    trainer.train()
    for number, path in enumerate(checkpoints(tmp_path)):
        os.utime(path, (2**32 - number, 2**32 - number))
    if later:  # of a run that was cut off while saving
        (tmp_path / "checkpoint-9").mkdir()
    trainer, _ = make_trainer(tmp_path, **{**STEPS, "max_steps": 5}, save_total_limit=limit)
    trainer.train(resume_from_checkpoint=True)
    assert list(checkpoints(tmp_path).values()) == [4, 5][-limit:]
    assert torch.load(tmp_path / "checkpoint-5/training_args.bin", weights_only=False).max_steps == 5


@pytest.mark.parametrize(
    "error", [RuntimeError("[enforce fail] file write failed"), OSError(28, "No space left on device")]
)
def test_a_full_disk_is_one_error_that_names_the_checkpoint(tmp_path, monkeypatch, error):
    def save(*_):
        raise error

    trainer, _ = make_trainer(tmp_path, **STEPS)
    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", save)
    with pytest.raises(OSError, match="checkpoint-1 can't be written: .*Free space"):
        trainer.train()
    assert trainer.args.save_total_limit is None


class TestWholeWeights:
    def saved(self, folder: Path, **options) -> Path:
        tiny_student(seed=1).save_pretrained(folder, **options)
        return folder

    def refused(self, folder: Path, match: str) -> None:
        student = tiny_student(seed=2)
        before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
        with pytest.raises(ValueError, match=match):
            load_student(student, folder)
        assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())

    @pytest.mark.parametrize("part", ["layers.0.mixer", "backbone.embeddings", "A_log", "norm_f"])
    def test_missing_ones_are_named(self, tmp_path, part):
        path = self.saved(tmp_path) / "model.safetensors"
        weights = load_file(path)
        kept = {name: tensor for name, tensor in weights.items() if part not in name}
        assert len(kept) < len(weights)
        save_file(kept, path, metadata={"format": "pt"})
        self.refused(tmp_path, rf"not whole.*{part.split('.')[-1]}.* is missing there")

    def test_another_shape_is_refused(self, tmp_path):
        tiny_student(state_size=4).save_pretrained(tmp_path)
        self.refused(tmp_path, "there and .* here")

    @pytest.mark.parametrize("size", [0, 7, 100, -1])
    @pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}])
    def test_a_cut_file_is_named(self, tmp_path, size, options):
        path = sorted(self.saved(tmp_path, **options).glob("model*.safetensors"))[-1]
        path.write_bytes(path.read_bytes()[:size])
        self.refused(tmp_path, f"{path.name} .* is cut off")

    def test_an_index_that_names_too_few_shards(self, tmp_path):
        index = self.saved(tmp_path, max_shard_size="20KB") / "model.safetensors.index.json"
        named = json.loads(index.read_text())["weight_map"]
        first = min(named.values())
        few = {name: shard for name, shard in named.items() if shard == first}
        index.write_text(json.dumps({"weight_map": few}))
        self.refused(tmp_path, "is missing there")
        (tmp_path / first).unlink()
        self.refused(tmp_path, f"{first}.* which is not there")
        index.write_text('{"a')
        self.refused(tmp_path, "index.json is damaged")

    def test_a_whole_file_saved_over_shards_is_the_one_that_counts(self, tmp_path):
        index = (self.saved(tmp_path, max_shard_size="20KB") / "model.safetensors.index.json").read_bytes()
        shards = {path: path.read_bytes() for path in tmp_path.glob("model-*")}
        self.saved(tmp_path)
        (tmp_path / "model.safetensors.index.json").write_bytes(index)
        student = tiny_student(seed=2)
        load_student(student, tmp_path)
        assert all(map(torch.equal, student.state_dict().values(), tiny_student(seed=1).state_dict().values()))
        for path, content in shards.items():
            path.write_bytes(content)
        self.refused(tmp_path, "holds both model.safetensors and shards")

    def test_a_finetuned_stage_without_all_weights(self, tmp_path):
        finetune(tmp_path, **STEPS)
        weights = load_file(tmp_path / "model.safetensors")
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="lack 1 tensors, such as model.layers.1.mlp.up_proj.weight"):
            finetune(tmp_path, **STEPS)

    @pytest.mark.parametrize(
        "name", ["../outside.safetensors", "sub/../../outside.safetensors", "{root}/outside.safetensors"]
    )
    def test_an_index_that_leads_out_of_the_folder(self, tmp_path, name):
        folder = self.saved(tmp_path / "student")
        (folder / "sub").mkdir()
        shutil.move(folder / "model.safetensors", tmp_path / "outside.safetensors")
        names = dict.fromkeys(load_file(tmp_path / "outside.safetensors"), name.format(root=tmp_path))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        self.refused(folder, "outside.safetensors', which is no file of its folder")
