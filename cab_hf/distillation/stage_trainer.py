"""The Trainer as every run here uses it: what a kill, a full disk, a diverged loss or a clock leave is sound."""

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, TrainOutput

from cab_hf.distillation.checkpoints import TRAINER_STATE_NAME, checkpoints, last_whole_checkpoint
from cab_hf.files import said_by_name


class StageTrainer(Trainer):
    """A [`~transformers.Trainer`] whose runs end once, and whose newest checkpoint can be gone on from.

    A run that was killed after its last step takes no further one when it is resumed. Weights that are not finite are
    neither trained on past the next log nor saved. `save_total_limit` counts steps, not the hours of a clock.
    """

    _resumed_step = 0

    def __init__(self, model: Any = None, args: Any = None, **kwargs: Any):
        if args is not None and args.learning_rate is None:
            args.learning_rate = TrainingArguments.learning_rate
        super().__init__(model=model, args=args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """As [`~transformers.Trainer.train`]; `resume_from_checkpoint=True` takes the newest whole checkpoint.

        Raises:
            ValueError: there is none.
            FloatingPointError: the run diverged.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"`resume_from_checkpoint=True`, but {self.args.output_dir} holds no complete checkpoint. Start "
                    "without it, or name the folder of a checkpoint."
                )
        state = Path(resume_from_checkpoint or "") / TRAINER_STATE_NAME
        is_there = bool(resume_from_checkpoint) and state.is_file()
        self._resumed_step = TrainerState.load_from_json(str(state)).global_step if is_there else 0
        output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self._check_weights()
        step, evaluates = self.state.global_step, self.args.eval_strategy == IntervalStrategy.EPOCH
        evaluated = any("eval_loss" in entry and entry["step"] == step for entry in self.state.log_history)
        if evaluates and not evaluated and step == self._resumed_step:
            self.evaluate()  # at the end of the epoch, after the last checkpoint
        return output

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        # The Trainer asks for `max_steps` only after a step; a run that is past it has no epoch left.
        num_epochs, *others, max_steps = super().set_initial_training_values(*args, **kwargs)
        return (0 if self._resumed_step >= max_steps else num_epochs, *others, max_steps)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Raises FloatingPointError where a loss, a part of it or the gradient's norm is not finite."""
        if "train_loss" in logs and self.state.global_step == self._resumed_step > 0:
            del logs["train_loss"]  # of no step
        # Loss scaling of half precision meets infinite gradients, and leaves those steps out.
        looked_at = logs.items() if {"loss", "train_loss"} & logs.keys() else ()
        broken = [name for name, value in looked_at if not math.isfinite(value)]
        broken = [name for name in broken if name != "grad_norm" or not self.args.fp16]
        super().log(logs, start_time)
        if broken:
            self._diverged(", ".join(f"{name} is {logs[name]}" for name in broken))

    def _check_weights(self) -> None:
        """One look at all trained weights, where the device is waited for anyway."""
        trained = [one.detach() for one in self.model.parameters() if one.requires_grad]
        local = (one.to_local() if isinstance(one, DTensor) else one for one in trained)
        broken = sum((~one.isfinite()).any().float().to(self.args.device) for one in local)
        if self.args.world_size > 1:
            broken = self.accelerator.reduce(torch.as_tensor(broken, device=self.args.device), "sum")
        if broken:
            self._diverged("weights are not finite")

    def _diverged(self, what: str) -> None:
        folder = Path(self.args.output_dir)
        raise FloatingPointError(
            f"Stage {folder.name!r} diverged by step {self.state.global_step}: {what}. Try a lower `learning_rate` "
            f"(it is {self.args.learning_rate:g}) or `max_grad_norm` ({self.args.max_grad_norm:g}) in another "
            f"`output_dir`, or remove {folder}."
        )

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self._check_weights()
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # the Trainer would rotate by the clock
        try:
            with said_by_name(Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if limit and self.args.should_save:
            self._rotate(Path(self._get_output_dir(trial)), limit)

    def _rotate(self, folder: Path, limit: int) -> None:
        steps, step = checkpoints(folder), self.state.global_step
        kept = {f"{PREFIX_CHECKPOINT_DIR}-{step}", Path(self.state.best_model_checkpoint or "").name} - {""}
        # Of later steps are those of a run that was cut off, and began again before them.
        others = sorted(steps, key=lambda path: (steps[path] < step, steps[path]))
        others = [path for path in others if path.name not in kept]
        for path in others[: max(len(steps) - max(limit, len(kept)), 0)]:
            shutil.rmtree(path, ignore_errors=True)
