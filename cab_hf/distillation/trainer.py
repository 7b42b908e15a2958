"""`DistillationTrainer`: the HF Trainer with a teacher beside the model."""

import inspect
import json
import math
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from cab_hf.distillation.chunked_kl import IGNORED_LABEL, chunked_kl_ce
from cab_hf.distillation.cuda_graph import GraphedStep
from cab_hf.distillation.losses import loss_weight
from cab_hf.distillation.modeling_distillation import DistillationModel, DistillationOutput, shifted_labels
from cab_hf.distillation.teacher import Teacher, TeacherOutput
from cab_hf.distillation.training_args import LOSSES, DistillationTrainingArguments


logger = logging.get_logger(__name__)

BRIDGE_NAME = "bridge.safetensors"
TRAINER_STATE_NAME = "trainer_state.json"
NO_WEIGHT_DECAY = re.compile(r"(^|\.)(A_log|D|dt_bias|norm_f\.weight)$")
ATTENTION_LOSSES = {"bridge", "output", "attention"}


class DistillationTrainer(Trainer):
    """Trains a student, and the bridge that goes with it, under a frozen teacher.

    Everything else is the [`~transformers.Trainer`]'s: datasets, collators, callbacks, resume, distribution, logging.
    The student is saved by its own `save_pretrained`, without bridge and teacher; checkpoints also hold
    `bridge.safetensors`, so that a resumed run continues bit for bit.

    Args:
        student: a [`CABMambaForCausalLM`], or a PEFT model around one.
        teacher: a pretrained model, or a [`Teacher`] made of one.
        args: weights, layer map and the rest of a run.
        trainer_kwargs: of [`~transformers.Trainer`], such as `train_dataset`, `eval_dataset`, `data_collator`,
            `processing_class`, `callbacks`.

    Raises:
        ValueError: a teacher whose attention can't be read, or that does not fit the student or the losses.

    Source: arXiv 2510.19266.
    """

    # The loss is divided by the tokens of the whole optimizer step.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        student: nn.Module,
        teacher: PreTrainedModel | Teacher,
        args: DistillationTrainingArguments,
        **trainer_kwargs,
    ):
        if args.n_gpu > 1:
            logger.warning(
                f"{args.n_gpu} GPUs are visible to one process, which uses the first. Start one process a GPU with "
                "`accelerate launch` to use them all."
            )
            args._n_gpu = 1
        if not isinstance(teacher, Teacher):
            teacher = Teacher(
                teacher,
                device=torch.device(args.teacher_device or args.device),
                dtype=None if args.teacher_dtype is None else getattr(torch, args.teacher_dtype),
                remove_rotary=args.remove_rotary,
            )
        if args.attention_weight > 0 and args.remove_rotary:
            raise ValueError(
                "`attention_weight` needs the teacher's own attention maps, which depend on its rotary rotation; set "
                "`remove_rotary=False`, or `attention_weight=0.0`."
            )
        if args.trainable is not None:
            freeze_others(student, args.trainable)
        self.teacher = teacher
        self._part_sums = None
        self._parts_logged_at = 0
        self._eval_sums = None
        self._constant_weights = {}
        self._graphed_step = None
        super().__init__(model=DistillationModel(student, teacher, args), args=args, **trainer_kwargs)
        self.label_names = ["labels"]

    @property
    def student(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False).student

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As [`~transformers.Trainer.train`]; `resume_from_checkpoint=True` takes the newest checkpoint that is whole."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"`resume_from_checkpoint=True`, but {self.args.output_dir} holds no complete checkpoint. Start "
                    "without it, or name the folder of a checkpoint."
                )
        if not resume_from_checkpoint and self.args.relative_loss and self.train_dataset is not None:
            self._calibrate_targets()
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _calibrate_targets(self) -> None:
        """Measures the targets of relative losses on the first examples: the same on every process, no sampler moved."""
        count = self.args.per_device_train_batch_size
        dataset = self.train_dataset
        is_map_style = hasattr(dataset, "__getitem__")
        examples = (
            [dataset[i] for i in range(min(count, len(dataset)))] if is_map_style else list(islice(dataset, count))
        )
        if not examples:
            raise ValueError("`train_dataset` is empty: there is nothing to learn from.")
        collate = self._get_collator_with_removed_columns(self.data_collator)
        batch = self._prepare_inputs(collate(examples))
        targets = self._teach(batch, frozenset(name for name in LOSSES if getattr(self.args, f"{name}_weight") > 0))
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        self._move_model_to_device(model, self.args.device)
        model.calibrate_targets(targets, batch.get("attention_mask"))

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = [*inspect.signature(self.model.core.forward).parameters, "labels", "label_ids"]

    # The loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Real tokens and labels `(2,)` of an optimizer step, over all its batches and processes."""
        counts = sum(self._local_counts(batch) for batch in batch_samples)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, "sum")
        return counts

    def _local_counts(self, batch: dict[str, Tensor]) -> Tensor:
        """Real tokens and labels `(2,)` of one batch, float32."""
        tokens, labels = batch["input_ids"].new_tensor(batch["input_ids"].numel()), batch["input_ids"].new_tensor(0)
        if "attention_mask" in batch:
            tokens = (batch["attention_mask"] != 0).sum()
        if "labels" in batch:
            labels = (batch["labels"][:, 1:] != IGNORED_LABEL).sum()
        return torch.stack([tokens, labels]).to(self.args.device, torch.float32)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, DistillationOutput]:
        """The weighted loss of one batch as its share of the optimizer step's mean over tokens."""
        if num_items_in_batch is None:
            num_items_in_batch = self._get_num_items_in_batch([inputs], self.args.device)
        weights, active = self._weights()
        outputs = self._distil(model, inputs, weights, active, num_items_in_batch)
        self._accumulate_parts(outputs.parts)
        # DDP and its kin average gradients over processes; the divisor already counts all of them.
        loss = outputs.loss * self.args.world_size
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        if not self.args.cuda_graph:
            return super().training_step(model, inputs, num_items_in_batch)
        if self._graphed_step is None:
            if self.args.world_size > 1 or self.args.device.type != "cuda":
                raise ValueError(
                    f"`cuda_graph=True` is for one process on one GPU; there are {self.args.world_size} on "
                    f"{self.args.device.type}. Set `cuda_graph=False`."
                )
            self._graphed_step = GraphedStep(
                model, self._distil, accumulates=self.args.gradient_accumulation_steps > 1
            )
        model.train()
        weights, active = self._weights()
        loss, parts = self._graphed_step(self._prepare_inputs(inputs), weights, active, num_items_in_batch)
        self._accumulate_parts(parts)
        return loss

    def _weights(self) -> tuple[Tensor, frozenset[str]]:
        """The loss weights `(6,)` at this moment of training, and the names of those that are not zero."""
        args = self.args
        progress = self.state.global_step / self.state.max_steps if self.state.max_steps > 0 else 0.0
        values = tuple(
            loss_weight(
                getattr(args, f"{name}_weight"),
                progress,
                end=getattr(args, f"{name}_end"),
                decay=getattr(args, f"{name}_decay"),
            )
            for name in LOSSES
        )
        if values not in self._constant_weights:
            self._constant_weights = {values: torch.tensor(values, device=args.device)}
        return self._constant_weights[values], frozenset(name for name, value in zip(LOSSES, values) if value > 0)

    def _teach(self, inputs: dict[str, Tensor], active: frozenset[str], logits: bool = True) -> TeacherOutput:
        if "attention" in active and "seq_idx" in inputs:
            raise ValueError(
                "`attention_weight` compares whole attention maps and can't tell packed documents apart. Pad documents "
                "instead of packing them, or set `attention_weight=0.0`."
            )
        with self.accelerator.autocast():
            return self.teacher(
                {name: value for name, value in inputs.items() if name != "labels"},
                attentions=bool(active & ATTENTION_LOSSES),
                hidden_states="hidden" in active,
                logits=logits and "kl" in active and self.teacher.head is None,
            )

    def _distil(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        weights: Tensor,
        active: frozenset[str],
        counts: Tensor,
        agreement: bool = False,
    ) -> DistillationOutput:
        targets = self._teach(inputs, active)
        outputs = model(
            targets=targets,
            teacher_head=self.teacher.head,
            weights=weights,
            active=active,
            num_tokens=counts[0],
            num_labels=counts[1],
            agreement=agreement,
            **inputs,
        )
        outputs.targets = targets if agreement else None
        return outputs

    # Logging

    def _accumulate_parts(self, parts: Tensor) -> None:
        self._part_sums = parts.clone() if self._part_sums is None else self._part_sums + parts

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._part_sums is not None:
            steps = max(self.state.global_step - self._parts_logged_at, 1)
            means = (self.accelerator.reduce(self._part_sums, "sum") / steps).tolist()
            logs.update({name: mean for name, mean in zip(LOSSES, means) if getattr(self.args, f"{name}_weight") > 0})
            self._part_sums, self._parts_logged_at = None, self.state.global_step
        super().log(logs, start_time)

    # Evaluation

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        """As the Trainer's, with perplexity of student and teacher, KL, agreement and every loss part among the metrics."""
        self._eval_sums = None
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._eval_sums is not None:
            sums = self.accelerator.reduce(self._eval_sums, "sum").tolist()
            output.metrics.update(
                {f"{metric_key_prefix}_{name}": value for name, value in self._eval_metrics(sums).items()}
            )
        return output

    def _eval_metrics(self, sums: list[float]) -> dict[str, float]:
        *parts, agreeing, teacher_ce, tokens, labels = sums
        divisors = {name: labels if name == "ce" else tokens for name in LOSSES}
        means = {name: part / max(divisors[name], 1) for name, part in zip(LOSSES, parts)}
        metrics = {"loss": sum(getattr(self.args, f"{name}_weight") * means[name] for name in LOSSES)}
        metrics |= {
            name: mean for name, mean in means.items() if getattr(self.args, f"{name}_weight") > 0 or name == "kl"
        }
        metrics |= {"agreement": agreeing / max(tokens, 1), "tokens": int(tokens)}
        if labels > 0:
            metrics["perplexity"] = math.exp(min(means["ce"], 700.0))
            metrics["teacher_perplexity"] = math.exp(min(teacher_ce / labels, 700.0))
        return metrics

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Adds a batch to the evaluation's sums; logits, which can be large, are not kept."""
        inputs = self._prepare_inputs(inputs)
        counts = self._local_counts(inputs)
        weights = torch.tensor([getattr(self.args, f"{name}_weight") for name in LOSSES], device=self.args.device)
        active = {name for name in LOSSES if getattr(self.args, f"{name}_weight") > 0} | {"kl"}
        if "labels" in inputs:
            active.add("ce")
        ones = torch.ones(2, device=self.args.device)  # so that the parts stay sums
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = self._distil(model, inputs, weights, frozenset(active), ones, agreement=True)
            teacher_ce = self._teacher_ce(outputs.targets, inputs)
        sums = torch.cat([outputs.parts, torch.stack([outputs.agreement.float(), teacher_ce]), counts])
        self._eval_sums = sums if self._eval_sums is None else self._eval_sums + sums
        return outputs.loss.detach() / counts[0].clamp(min=1), None, None

    def _teacher_ce(self, targets: TeacherOutput, inputs: dict[str, Tensor]) -> Tensor:
        if "labels" not in inputs:
            return torch.zeros((), device=self.args.device)
        with self.accelerator.autocast():
            return chunked_kl_ce(
                targets.logits if self.teacher.head is None else targets.last_hidden_state,
                self.teacher.head,
                labels=shifted_labels(inputs["labels"]),
                kl_weight=0.0,
                ce_weight=1.0,
                chunk_size=self.args.logits_chunk_size,
            ).ce.float()

    # The optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name in super().get_decay_parameter_names(model) if not NO_WEIGHT_DECAY.search(name)]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        learning_rate, bridge = self.args.bridge_learning_rate, self.model.bridge
        if learning_rate is not None and bridge is not None:
            of_bridge = {id(parameter) for parameter in bridge.parameters()}
            for group in list(optimizer.param_groups):
                moved = [parameter for parameter in group["params"] if id(parameter) in of_bridge]
                if moved:
                    group["params"] = [parameter for parameter in group["params"] if id(parameter) not in of_bridge]
                    optimizer.add_param_group({**group, "params": moved, "lr": learning_rate})
        return optimizer

    # Checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        of_student = None if state_dict is None else _with_prefix(state_dict, "student.")
        model.student.save_pretrained(folder, state_dict=of_student)
        rest = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in (model.state_dict() if state_dict is None else state_dict).items()
            if not name.startswith("student.")
        }
        save_file(rest, folder / BRIDGE_NAME)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        model = self.accelerator.unwrap_model(self.model if model is None else model, keep_torch_compile=False)
        folder = Path(resume_from_checkpoint)
        load_student(model.student, folder)
        if not (folder / BRIDGE_NAME).is_file():
            raise ValueError(
                f"{folder} has no {BRIDGE_NAME}: it is a student, not a checkpoint of a distillation. Pass it as the "
                "student instead of resuming from it."
            )
        model.load_state_dict(load_file(folder / BRIDGE_NAME), strict=False)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
            return
        logger.info(f"Loading the best student, of {self.state.best_model_checkpoint} ({self.state.best_metric}).")
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def freeze_others(student: nn.Module, pattern: str) -> None:
    """Leaves only the student's parameters trainable whose names match `pattern` (searched anywhere).

    Raises:
        ValueError: if no name matches.
    """
    matches = re.compile(pattern)
    names = [name for name, _ in student.named_parameters()]
    if not any(matches.search(name) for name in names):
        raise ValueError(f"`trainable={pattern!r}` matches none of the student's parameters, such as {names[:3]}.")
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(bool(matches.search(name)))


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint of a run that was written to its end, or None.

    The trainer's state is a checkpoint's last file: a run killed while saving leaves it out, or unreadable.
    """
    steps = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)$")
    folders = [path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if steps.search(path.name)]
    for path in sorted(folders, key=lambda path: int(steps.search(path.name)[1]), reverse=True):
        try:
            json.loads((path / TRAINER_STATE_NAME).read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            logger.warning(f"{path} is incomplete (killed while saving?) and is left out.")
            continue
        return str(path)
    return None


def load_student(student: nn.Module, folder: Path) -> None:
    """Loads weights that `save_pretrained` wrote into a student that already exists."""
    if "peft_config" in vars(student):
        student.load_adapter(str(folder), student.active_adapter, is_trainable=True)
        return
    for shard in _weight_files(folder):
        loaded = student.load_state_dict(load_file(shard), strict=False)
        if loaded.unexpected_keys:
            raise ValueError(f"{shard} holds weights that the student lacks, such as {loaded.unexpected_keys[:3]}.")


def _weight_files(folder: Path) -> Iterable[Path]:
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return [folder / SAFE_WEIGHTS_NAME]


def _with_prefix(state_dict: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
