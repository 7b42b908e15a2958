"""One stage of a recipe: train, save, remember that it is done."""

import copy
import json
import math
import platform
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, ProgressCallback
from transformers.utils import logging

from cab_hf.distillation.checkpoints import last_whole_checkpoint, load_student
from cab_hf.distillation.stage_trainer import StageTrainer
from cab_hf.distillation.trainer import DistillationTrainer
from cab_hf.distillation.training_args import DistillationTrainingArguments
from cab_hf.export.loading import load_whole
from cab_hf.files import read_json, said_by_name, write_whole
from cab_hf.recipes import Recipe, Stage
from cab_hf.teachers.teacher import Teacher


logger = logging.get_logger(__name__)

HISTORY_NAME = "history.json"
WORDS = {
    "kl": "soft KL",
    "ce": "labels",
    "bridge": "attention bridge",
    "output": "mixer outputs",
    "hidden": "hidden states",
    "attention": "attention maps",
}


class _StageBar(ProgressCallback):
    """A stage's progress bar, by its name; shown from the first step on, whatever other bars wait for."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        super().on_train_begin(*args, **kwargs)
        if self.training_bar is not None:
            self.training_bar.delay = 0
            self.training_bar.set_description(self.name)


def run_stage(
    stage: Stage,
    student: nn.Module,
    teacher: Teacher,
    place: tuple[int, int] = (1, 1),
    **trainer_kwargs: Any,
) -> dict[str, Any]:
    """Trains a student through one stage, or loads it where the stage is finished; a stage that was cut off goes on.

    Args:
        stage: whose `args.output_dir` then holds its checkpoints and its loadable student.
        student: trained in place.
        teacher: of all stages.
        place: which stage this is, of how many.
        trainer_kwargs: of [`DistillationTrainer`].

    Returns:
        `name`, `steps`, `examples` seen, `seconds`, `peak_gib` (allocated on a GPU), and the Trainer's `log`.
    """
    history = _read_history(stage)
    if history is not None:
        load_student(student, Path(stage.args.output_dir))
        return history
    student.requires_grad_(True)  # whatever an earlier stage froze
    trainer = DistillationTrainer(student, teacher, _unpushed(stage), **trainer_kwargs)
    return train_stage(stage.name, trainer, place)


def finetune_stage(
    stage: Stage,
    model: PreTrainedModel,
    trainer_class: type[StageTrainer] = StageTrainer,
    **trainer_kwargs: Any,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Trains a teacher itself, on labels; a stage that is finished is loaded, one that was cut off goes on.

    Args:
        stage: whose `args.output_dir` then holds its checkpoints and the trained model.
        model: to start from; it stays as it is.
        trainer_class: of the training.
        trainer_kwargs: of the trainer.

    Returns:
        The trained model, whole and in float32, with the given one's config, which the Trainer changes in its own;
        and the history, as `run_stage` returns it.
    """
    history = _read_history(stage)
    if history is None:
        trained = copy.deepcopy(model).to(torch.float32)  # FSDP cuts it up in place
        trainer = trainer_class(trained, _unpushed(stage), **trainer_kwargs)
        history = train_stage(stage.name, trainer)
    return load_whole(type(model), stage.args.output_dir, config=model.config, dtype=torch.float32), history


def what_of(args: Any) -> str:
    """What a stage learns from, in words."""
    return ", ".join(WORDS[name] for name in getattr(args, "used_losses", ["ce"]))


def num_steps(trainer: StageTrainer) -> int:
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    batches = len(trainer.get_train_dataloader())
    return math.ceil(args.num_train_epochs * max(batches // args.gradient_accumulation_steps, 1))


def _unpushed(stage: Stage) -> DistillationTrainingArguments:
    """The whole run is pushed once, at its end; the Trainer saves its arguments, the token among them."""
    name = f"{Path(stage.args.output_dir).parents[1].name} {stage.name}"
    return replace(stage.args, push_to_hub=False, hub_token=None, run_name=stage.args.run_name or name)


def _read_history(stage: Stage) -> dict[str, Any] | None:
    """Of a finished stage; None if the stage is not finished."""
    history_file = Path(stage.args.output_dir) / HISTORY_NAME
    if not history_file.is_file():
        return None
    logger.warning(f"Stage {stage.name!r} is complete in {stage.args.output_dir}; its model is loaded.")
    return read_json(history_file)


def tell(recipe: Recipe, text: str) -> None:
    """A line of what happens now, by the first process."""
    if recipe.is_main_process:
        print(text, flush=True)


def train_stage(name: str, trainer: StageTrainer, place: tuple[int, int] = (1, 1)) -> dict[str, Any]:
    """Trains to the end from the newest whole checkpoint, saves, and writes the history that says so."""
    args = trainer.args
    if trainer.is_world_process_zero():
        print(f"stage {place[0]} of {place[1]}: {name} ({what_of(args)}), {num_steps(trainer):,} steps", flush=True)
    if trainer.pop_callback(ProgressCallback) is not None:  # None where `disable_tqdm` is set
        trainer.add_callback(_StageBar(name))
    checkpoint = last_whole_checkpoint(args.output_dir)
    if checkpoint is not None:
        logger.warning(f"Stage {name!r} goes on from {checkpoint}.")
    on_gpu = args.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    result = trainer.train(resume_from_checkpoint=checkpoint)
    with said_by_name(Path(args.output_dir)):
        trainer.save_model()
    steps = trainer.state.global_step
    history = {
        "name": name,
        "steps": steps,
        "examples": steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "seconds": round(result.metrics["train_runtime"], 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None,
        "log": trainer.state.log_history,
    }
    if trainer.is_world_process_zero():
        write_whole(Path(args.output_dir) / HISTORY_NAME, json.dumps(history, indent=1))
    trainer.accelerator.wait_for_everyone()
    return history


def run_facts(args: DistillationTrainingArguments) -> dict[str, Any]:
    """The versions and the hardware of this run."""
    return {
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate", "datasets")},
        "hardware": torch.cuda.get_device_name() if args.device.type == "cuda" else f"{platform.machine()} CPU",
    }
