"""How a distillation is evaluated: sums over batches and processes, and the metrics they make."""

import math

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from cab_hf.data.packing import shift_labels
from cab_hf.distillation.chunked_kl import chunked_kl_ce
from cab_hf.distillation.modeling_distillation import DistillationOutput
from cab_hf.distillation.training_args import LOSSES


class EvaluatedTrainer(Trainer):
    """The part of [`DistillationTrainer`] that evaluates student and teacher side by side."""

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
        divisors = {name: labels if name == "ce" else tokens for name in LOSSES}
        means = {name: part / max(divisors[name], 1) for name, part in zip(LOSSES, parts)}
        metrics = {"loss": sum(getattr(self.args, f"{name}_weight") * means[name] for name in LOSSES)}
        metrics |= {
            name: mean
            for name, mean in means.items()
            if getattr(self.args, f"{name}_weight") > 0 or name == "kl" and self._compares_logits
        }
        if self._compares_logits:
            metrics["agreement"] = agreeing / max(tokens, 1)
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
        weights = torch.tensor([getattr(self.args, f"{name}_weight") for name in LOSSES], device=self.args.device)
        active = {name for name in LOSSES if getattr(self.args, f"{name}_weight") > 0}
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
