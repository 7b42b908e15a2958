"""A batch under its teacher, and a distillation's evaluation: sums over batches and processes, and their metrics."""

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import set_seed
from transformers.trainer_utils import EvalLoopOutput, has_length

from cab_hf.data.packing import IGNORE_INDEX, shift_labels
from cab_hf.distillation.chunked_kl import chunked_kl_ce
from cab_hf.distillation.ema import MovingAverage
from cab_hf.distillation.modeling_distillation import ALIGNMENT_LOSSES, DistillationModel, DistillationOutput
from cab_hf.distillation.stage_trainer import StageTrainer
from cab_hf.distillation.training_args import LOSSES, DistillationTrainingArguments
from cab_hf.teachers.alignment import align_with_student
from cab_hf.teachers.recorded_teacher import RecordedTeacher
from cab_hf.teachers.teacher import Teacher, TeacherOutput, with_positions


BatchTransform = Callable[[dict[str, Tensor], bool], dict[str, Tensor]]
ATTENTION_LOSSES = {"bridge", "output", "attention"}
CALIBRATION_EXAMPLES = 8
"""Examples that the scales of relative losses are measured on: a fixed number, whatever the batch size."""


class EvaluatedTrainer(StageTrainer):
    """What [`DistillationTrainer`] does with one batch, and how it evaluates student and teacher side by side.

    Args:
        student, teacher, args, batch_transform, trainer_kwargs: of [`DistillationTrainer`], the teacher made and all
            of them checked.

    Attributes:
        student: the given student; where FSDP or ZeRO-3 shards it, as whole as it was when `train` last ended.
        teacher: what it learns from.
        batch_transform: of each batch.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | RecordedTeacher,
        args: DistillationTrainingArguments,
        batch_transform: BatchTransform | None = None,
        **trainer_kwargs: Any,
    ):
        self.student, self.teacher, self.batch_transform = student, teacher, batch_transform
        self._teacher_head = teacher.head
        if teacher.head is not None and teacher.device != args.device:
            # Hidden states come to the student; a copy of the head there spares moving logits, which are far larger.
            self._teacher_head = copy.deepcopy(teacher.head).to(args.device)
        self._ema: MovingAverage | None = None
        self._eval_sums: Tensor | None = None
        self._is_calibrated = not (args.relative_loss or (args.bridge_centered and args.bridge_weight > 0))
        set_seed(args.seed)  # of the bridge's start, which must be the same on every process
        model = DistillationModel(student, teacher, args)
        self._student_config = model.core.config
        self._reads_images = model.reads_images
        self._layer_map = model.layer_map
        super().__init__(model=model, args=args, **trainer_kwargs)
        self.label_names = ["labels"]

    # One batch

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = super()._prepare_inputs(inputs)
        inputs = inputs if self.batch_transform is None else self.batch_transform(inputs, self.model.training)
        if self._reads_images and not inputs["pixel_values"].is_floating_point():
            raise ValueError(
                f"`pixel_values` are {inputs['pixel_values'].dtype}, but models read normalised float pixels. "
                "Normalise them in the dataset, or on the device by `batch_transform`, such as ImageAugmentation."
            )
        return inputs

    def _local_counts(self, batch: dict[str, Tensor]) -> Tensor:
        """Real tokens (or images) and labels `(2,)` of one batch, int64: no precision policy rounds them."""
        if self._reads_images:
            pixels = batch["pixel_values"]
            images = torch.full((), len(pixels), dtype=torch.long, device=pixels.device)  # no copy to wait for
            labels = batch.get("labels")
            if labels is None:
                labelled = torch.zeros_like(images)
            else:
                labelled = images if labels.is_floating_point() else (labels != IGNORE_INDEX).sum()
            return torch.stack([images.to(labelled.device), labelled]).to(self.args.device)
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        tokens = ids.new_full((), ids.numel(), dtype=torch.long) if mask is None else (mask != 0).sum()
        labels = torch.zeros_like(tokens)
        if "labels" in batch:
            labels = (shift_labels(batch["labels"], mask) != IGNORE_INDEX).sum()
        return torch.stack([tokens, labels]).to(self.args.device)

    def _teach(self, inputs: dict[str, Tensor], active: frozenset[str]) -> TeacherOutput:
        mask = inputs.get("attention_mask")
        if "seq_idx" in inputs or ("position_ids" in inputs and mask is None):
            self._check_packing(active)
        given = {name: value for name, value in inputs.items() if name != "labels"}
        if self._reads_images:
            given = {"pixel_values": inputs.get("teacher_pixel_values", inputs["pixel_values"])}
        given = with_positions(given)
        with self.accelerator.autocast():
            targets = self.teacher(
                given,
                attentions=bool(active & ATTENTION_LOSSES),
                hidden_states="hidden" in active,
                logits="kl" in active and self.teacher.head is None,
                **({"maps": True} if "attention" in active else {}),  # a record has none, and is not asked
            )
        if targets.attentions is not None and "output" not in active:
            # Nothing reads the outputs then, and all layers' together are large.
            targets.attentions = tuple(attention._replace(output=None) for attention in targets.attentions)
        if self._reads_images and (targets.attentions is not None or targets.hidden_states is not None):
            sizes = given["pixel_values"].shape[2:], inputs["pixel_values"].shape[2:]
            patches, student = self.teacher.config.patch_size, self._student_config
            targets = align_with_student(targets, patches, sizes[0], student, sizes[1], set(self._layer_map))
        return targets

    def _check_packing(self, active: frozenset[str]) -> None:
        if "attention" in active:
            raise ValueError(
                f"`attention_weight` is {self.args.attention_weight}, but whole attention maps can't tell packed "
                "documents apart (`seq_idx`, or `position_ids` without `attention_mask`). Pad documents instead of "
                "packing them, or set `attention_weight=0.0`."
            )
        if "bridge" in active and self.args.target_map == "softmax":
            raise ValueError(
                f"`target_map` is {self.args.target_map!r}, which normalises keys over the tokens of all packed "
                "documents (`seq_idx`, or `position_ids` without `attention_mask`). Pad documents instead of packing "
                "them, or choose another map."
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
        inputs = {name: value for name, value in inputs.items() if name != "teacher_pixel_values"}
        # Around FSDP2's forward accelerate puts no autocast.
        with self.accelerator.autocast() if self.is_fsdp_enabled else nullcontext():
            outputs = model(
                targets=targets,
                teacher_head=self._teacher_head,
                weights=weights,
                active=active,
                num_tokens=counts[0],
                num_labels=counts[1],
                agreement=agreement,
                **inputs,
            )
        outputs.targets = targets if agreement else None
        return outputs

    # Relative losses and centered bridges look at their targets first

    def _calibrate_targets(self) -> None:
        """Measures the targets on the first examples: the same on every process, no sampler moved."""
        active = frozenset(ALIGNMENT_LOSSES).intersection(self.args.used_losses)
        dataset = self.train_dataset
        if self._is_calibrated or not active or dataset is None or (has_length(dataset) and len(dataset) == 0):
            return
        self._check_columns()
        if isinstance(dataset, IterableDataset):
            examples = list(islice(dataset, CALIBRATION_EXAMPLES))
        else:
            examples = [dataset[i] for i in range(min(CALIBRATION_EXAMPLES, len(dataset)))]
        collate = self._get_collator_with_removed_columns(self.data_collator)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        self._move_model_to_device(model, self.args.device)
        model.eval()  # so that the batch transform draws nothing
        squares, means, tokens = torch.zeros_like(model.target_scales), {}, 0
        for start in range(0, len(examples), self.args.per_device_train_batch_size):
            batch = self._prepare_inputs(collate(examples[start : start + self.args.per_device_train_batch_size]))
            count = self._local_counts(batch)[0]
            # Compiled for these few rows, a teacher would be compiled for any number of rows when training begins.
            with torch.compiler.set_stance("force_eager"):
                targets = self._teach(batch, active)
            some, their_means = model.measure_targets(targets, batch.get("attention_mask"))
            squares += count * some
            means = {place: count * mean + means.get(place, 0) for place, mean in their_means.items()}
            tokens += count
        if tokens > 0:
            model.calibrate(squares / tokens, {place: mean / tokens for place, mean in means.items()})
        elif self.args.relative_loss:
            raise ValueError(
                f"The first {len(examples)} examples of `train_dataset` hold {int(tokens)} real tokens, on which the "
                "relative losses' scales are measured. Filter out empty examples, or set `relative_loss=False`."
            )
        self._is_calibrated = True

    # Evaluation

    @property
    def _compares_logits(self) -> bool:
        """Whether student and teacher predict the same things, so that evaluation compares them whatever is learnt."""
        if not self._reads_images:
            return self.teacher.predicts_tokens
        return self.teacher.has_logits and self._student_config.num_labels == self.teacher.num_labels

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        """As the Trainer's; metrics are both models' perplexity or accuracy, their KL and agreement, every loss part.

        With `ema_decay` all of them also of the averaged student, under `ema_...`.
        """
        self._calibrate_targets()
        output = self._evaluated(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._ema is not None and self._ema.has_started:
            with self._ema.in_place_of(self.student):
                averaged = self._evaluated(*args, metric_key_prefix=f"{metric_key_prefix}_ema", **kwargs)
            output.metrics.update(averaged.metrics)
        return output

    def _evaluated(self, *args, metric_key_prefix: str, **kwargs) -> EvalLoopOutput:
        self._eval_sums = None
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._eval_sums is not None:
            sums = self.accelerator.reduce(self._eval_sums, "sum").tolist()
            output.metrics.update(
                {f"{metric_key_prefix}_{name}": value for name, value in self._eval_metrics(sums).items()}
            )
        return output

    def _eval_metrics(self, sums: list[float]) -> dict[str, float]:
        parts, (agreeing, tokens, labels, *others) = sums[: len(LOSSES)], sums[len(LOSSES) :]
        compared = tokens if self._reads_images or labels == 0 else labels
        divisors = {"kl": compared, "ce": labels}
        means = {name: part / max(divisors.get(name, tokens), 1) for name, part in zip(LOSSES, parts)}
        metrics = {"loss": sum(course.weight * means[name] for name, course in self.args.courses.items())}
        metrics |= {
            name: mean
            for name, mean in means.items()
            if name in self.args.used_losses or name == "kl" and self._compares_logits
        }
        if self._compares_logits:
            metrics["agreement"] = agreeing / max(compared, 1)
        metrics["images" if self._reads_images else "tokens"] = int(tokens)
        if labels == 0:
            return metrics
        if not self._reads_images:
            (teacher_ce,) = others
            metrics["perplexity"] = math.exp(min(means["ce"], 700.0))
            if self._compares_logits:
                metrics["teacher_perplexity"] = math.exp(min(teacher_ce / labels, 700.0))
            return metrics
        correct, among_five, teacher_correct = others
        metrics |= {"accuracy": correct / labels, "top5_accuracy": among_five / labels}
        if self._compares_logits:
            metrics["teacher_accuracy"] = teacher_correct / labels
        return metrics

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Adds a batch to the evaluation's sums; logits, which can be large, are not kept."""
        inputs, is_counted = self._without_repeats(self._prepare_inputs(inputs))
        counts = self._local_counts(inputs)
        weights = torch.tensor([course.weight for course in self.args.courses.values()], device=self.args.device)
        active = set(self.args.used_losses)
        if self._compares_logits:
            active.add("kl")
        if "labels" in inputs:
            active.add("ce")
        ones = torch.ones(2, device=self.args.device)  # so that the parts stay sums
        compares = self._compares_logits or self._reads_images  # images also count hits
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = self._distil(model, inputs, weights, frozenset(active), ones, agreement=compares)
            others = (self._hits if self._reads_images else self._teacher_ce)(outputs, inputs)
        sums = torch.cat([outputs.parts, outputs.agreement.float()[None], counts, others])
        if is_counted:
            self._eval_sums = sums if self._eval_sums is None else self._eval_sums + sums
        elif self._eval_sums is None:
            self._eval_sums = torch.zeros_like(sums)
        return outputs.loss.detach() / counts[0].clamp(min=1), None, None

    def _without_repeats(self, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
        """The rows that no other process has, and whether there are any.

        Where the examples do not divide by the processes, the last batch is filled up with rows of the first one.
        """
        rows, loader = len(next(iter(inputs.values()))), self.accelerator.gradient_state
        if self.args.world_size == 1 or not loader.end_of_dataloader or loader.remainder <= 0:
            return inputs, True
        kept = loader.remainder - self.args.process_index * rows
        # A sharded model runs on all processes, so one without rows of its own runs one, too.
        return {name: value[: max(kept, 1)] for name, value in inputs.items()}, kept > 0

    def _teacher_ce(self, outputs: DistillationOutput, inputs: dict[str, Tensor]) -> Tensor:
        """The teacher's cross-entropy `(1,)`, summed over labels."""
        if "labels" not in inputs or not self._compares_logits:
            return torch.zeros(1, device=self.args.device)
        targets = outputs.targets
        with self.accelerator.autocast():
            return chunked_kl_ce(
                targets.logits if self._teacher_head is None else targets.last_hidden_state,
                self._teacher_head,
                labels=shift_labels(inputs["labels"], inputs.get("attention_mask")),
                kl_weight=0.0,
                ce_weight=1.0,
                chunk_size=self.args.logits_chunk_size,
            ).ce.float()[None]

    def _hits(self, outputs: DistillationOutput, inputs: dict[str, Tensor]) -> Tensor:
        """Images `(3,)` whose label is the student's first choice, among its first five, the teacher's first."""
        labels, logits = inputs.get("labels"), outputs.logits
        if labels is None:
            return torch.zeros(3, device=self.args.device)
        labels = labels.argmax(-1) if labels.is_floating_point() else labels  # of mixed labels the largest
        best = logits.topk(min(5, logits.shape[-1])).indices == labels[:, None]
        teacher_logits = outputs.targets.logits
        teacher_hits = best[:, 0].new_zeros(()) if teacher_logits is None else teacher_logits.argmax(-1) == labels
        return torch.stack([best[:, 0].sum(), best.sum(), teacher_hits.sum()]).float()
