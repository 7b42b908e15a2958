"""The one module that is trained: student and bridge together, under all their losses.

Shape legend: `b` batch, `t` token, `h` head, `p` head_dim, `d` width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from cab_hf.data.packing import IGNORE_INDEX, shift_labels
from cab_hf.distillation.bridge import ROLES, AttentionBridge, BridgePair, Role, bridge_targets
from cab_hf.distillation.losses import (
    LogitsLoss,
    attention_loss,
    chunked_kl_ce,
    classification_loss,
    hidden_loss,
    mean_square,
    output_loss,
    token_mean,
)
from cab_hf.distillation.training_args import LOSSES, DistillationTrainingArguments
from cab_hf.lora import core_of
from cab_hf.models.mixers import BidirectionalProjections, SSMProjections
from cab_hf.teachers.alignment import parse_layer_map, taught_layers
from cab_hf.teachers.teacher import Teacher, TeacherOutput


ALIGNMENT_LOSSES = ("bridge", "output", "hidden", "attention")
SCALED_TARGETS = (*ROLES, "output", "hidden")
SMALLEST_VARIANCE = 1e-4
"""Share of its mean square below which a target counts as constant."""


@dataclass
class DistillationOutput(ModelOutput):
    """
    Attributes:
        loss: scalar, the weighted sum of the parts.
        parts: `(6,)`, the unweighted parts in the order of `LOSSES`, detached; 0 where not computed.
        agreement: number of tokens (images) where student and teacher agree; with `agreement=True`.
        logits: `(b, num_labels)` of an image student, detached; with `agreement=True`.
    """

    loss: Tensor | None = None
    parts: Tensor | None = None
    agreement: Tensor | None = None
    logits: Tensor | None = None


class LayerShows(NamedTuple):
    """What the losses read of one student layer.

    Attributes:
        scans: B, C and time step of each direction, in the order in which its scan reads the tokens.
        output: the mixer's, before its output projection; None where no loss reads it.
    """

    scans: list[tuple[Tensor, Tensor, Tensor]]
    output: Tensor | None


class DistillationModel(nn.Module):
    """A student and the bridge to its teacher, which DDP, FSDP and ZeRO wrap as one.

    Args:
        student: [`CABMambaForCausalLM`], [`CABHybridForCausalLM`] or [`CABVisionMambaForImageClassification`], or a
            PEFT model around one.
        teacher: describes the targets; it is not kept.
        args: decides which losses exist and how they are computed.

    Raises:
        ValueError: a layer map that does not fit.

    Source: arXiv 2510.19266; the bridge loss is the mean over layers of `MSE(MLP(B), K) + MSE(MLP(C), Q)`.
    """

    def __init__(self, student: nn.Module, teacher: Teacher, args: DistillationTrainingArguments):
        super().__init__()
        self.student = student
        self.touches_unused = True
        self.args = args
        config = self.core.config
        self.reads_images = self.core.main_input_name == "pixel_values"
        if args.neftune_noise_alpha is not None:
            # The Trainer asks for it; FSDP, too, which would shard the embeddings apart from a tied head.
            self.get_input_embeddings = self.core.get_input_embeddings
        self.norms_last_target = teacher.norms_last_hidden_state
        self.layer_map = taught_layers(config, teacher, parse_layer_map(args.layer_map))
        self.is_hybrid = config.model_type == "cab_hybrid"
        beside_windows = sorted({"output", "attention"} & set(args.used_losses)) if self.is_hybrid else []
        if beside_windows and any(config.windows):
            name = beside_windows[0]
            raise ValueError(
                f"`{name}_weight` is {getattr(args, name + '_weight')}, but the student's mixers stand beside windows "
                "of attention, so that none has the teacher's output. Take `kl_weight` or `hidden_weight` instead."
            )
        self.teacher_layers = [teacher.layer_numbers[index] for index in self.layer_map]
        self.student_layers = config.layer_numbers if self.is_hybrid else range(config.num_hidden_layers)
        self.bridge = None
        if args.bridge_weight > 0:
            self.bridge = AttentionBridge(
                config.projection_sizes,
                [teacher.key_sizes[index] for index in self.layer_map],
                [teacher.query_sizes[index] for index in self.layer_map],
                hidden_size=args.bridge_hidden_size,
                shared_roles=args.bridge_shared_roles,
                num_directions=2 if (self.reads_images or self.is_hybrid) and config.bidirectional else 1,
            )
        # By which relative losses divide: measured once, on the same examples in every run, so that a loss does not
        # depend on how a batch is cut into accumulation steps and processes.
        self.register_buffer("target_scales", torch.ones(len(SCALED_TARGETS), config.num_hidden_layers))

    @property
    def _no_split_modules(self) -> list[str]:
        """Names of the student's blocks, which FSDP shards one by one."""
        return sorted(self.core._no_split_modules)

    @property
    def core(self) -> nn.Module:
        """The student without an adapter around it."""
        return core_of(self.student)

    @property
    def main_input_name(self) -> str:
        """By which the Trainer counts what was read."""
        return self.core.main_input_name

    def activation_checkpointing_enable(self, **kwargs) -> None:
        """The Trainer asks the model for activation checkpointing; the student's blocks have it."""
        self.student.activation_checkpointing_enable(**kwargs)

    @torch.no_grad()
    def measure_targets(
        self, targets: TeacherOutput, mask: Tensor | None
    ) -> tuple[Tensor, dict[tuple[int, Role], Tensor]]:
        """What one batch's targets are like, over its real tokens.

        Returns:
            Mean squares `(4, layers)`, one where the teacher was not asked for the targets; and, with a bridge, of
            each (layer, role) the mean `(f,)`.
        """
        squares, means = torch.ones_like(self.target_scales), {}
        for layer, index in enumerate(self.layer_map):
            if targets.attentions is not None:
                bridged = bridge_targets(targets.attentions[index], self.args.target_map, mask)
                for row, role in enumerate(ROLES):
                    squares[row, layer] = mean_square(bridged[role].flatten(2), mask)
                    if self.bridge is not None:
                        means[layer, role] = token_mean(bridged[role].flatten(2), mask)
                if targets.attentions[index].output is not None:
                    squares[2, layer] = mean_square(targets.attentions[index].output, mask)
            if targets.hidden_states is not None:
                squares[3, layer] = mean_square(self._hidden_pair(None, targets, layer)[1], mask)
        return squares, means

    @torch.no_grad()
    def calibrate(self, squares: Tensor, means: Mapping[tuple[int, Role], Tensor]) -> None:
        """Starts the bridge at its targets' means, and lets relative losses divide by what is left to predict.

        Args:
            squares, means: as from `measure_targets`, over as many tokens as there are.
        """
        if self.args.bridge_centered and self.bridge is not None:
            self.bridge.center(means)
            constant = torch.zeros_like(squares)
            for (layer, role), mean in means.items():
                constant[ROLES.index(role), layer] = mean.square().mean()
            squares = torch.maximum(squares - constant, SMALLEST_VARIANCE * squares)
        if self.args.relative_loss:
            self.target_scales.copy_(squares)

    def forward(
        self,
        *,
        targets: TeacherOutput,
        teacher_head: nn.Module | None,
        weights: Tensor,
        active: frozenset[str],
        num_tokens: Tensor,
        num_labels: Tensor,
        labels: Tensor | None = None,
        agreement: bool = False,
        **inputs: Tensor,
    ) -> DistillationOutput:
        """
        Args:
            targets: what the teacher made of the same inputs, in the order of the student's tokens.
            teacher_head: maps `targets.last_hidden_state` to logits; None if `targets.logits` holds them.
            weights: `(6,)` float32, in the order of `LOSSES`.
            active: names of the losses to compute.
            num_tokens, num_labels: 0-dim, real tokens (of an image student: images) and labels of the whole
                optimizer step: the sums' divisors.
            labels: `(b, t)`, unshifted. Where a position's next token has the label -100, neither cross-entropy nor KL
                counts; without labels KL counts at all real tokens. Of images `(b,)`, or probabilities
                `(b, num_labels)`.
            agreement: count tokens where both models agree.
            inputs: of the student's base model.
        """
        mask = inputs.get("attention_mask")
        weights = weights.float()  # FSDP's mixed precision casts inputs; the quotients below need more digits
        # An optimizer step without any real token has a loss of zero, not 0 / 0.
        num_tokens, num_labels = num_tokens.clamp(min=1), num_labels.clamp(min=1)
        sums = dict.fromkeys(ALIGNMENT_LOSSES, 0.0)
        shown: list[LayerShows] = []

        def collect(_: int, projections: SSMProjections | BidirectionalProjections) -> None:
            shown.append(LayerShows(_scans(projections), projections.output if "output" in active else None))

        outputs = self.core.read(
            **inputs,
            use_cache=False,
            projections_callback=collect if active & {"bridge", "output", "attention"} else None,
            output_hidden_states="hidden" in active,
        )
        if "bridge" in active:
            sums["bridge"] = self._bridge_loss(shown, targets, mask)
        for layer, one in enumerate(shown):
            taught = self.layer_map[layer]
            if "output" in active:
                scale = self.target_scales[2, layer] if self.args.relative_loss else False
                output = targets.attentions[taught].output
                sums["output"] = sums["output"] + output_loss(one.output, output, mask, scale)
            if "attention" in active:
                sums["attention"] = sums["attention"] + self._map_loss(layer, one.scans, targets.maps[taught], mask)
        if "hidden" in active:
            for layer in range(len(self.layer_map)):
                student, teacher = self._hidden_pair(outputs.hidden_states, targets, layer)
                scale = self.target_scales[3, layer] if self.args.relative_loss else False
                sums["hidden"] = sums["hidden"] + hidden_loss(student, teacher, mask, scale)
        parts = dict.fromkeys(LOSSES, weights.new_zeros(()))
        loss = weights.new_zeros(())
        agreeing = None
        if active & {"kl", "ce"} or agreement:
            num_compared = num_tokens if self.reads_images or labels is None else num_labels
            logits_loss = self._logits_loss(
                outputs,
                targets,
                teacher_head,
                mask,
                labels,
                weights[0] / num_compared if "kl" in active else 0.0,
                weights[1] / num_labels if "ce" in active else 0.0,
                agreement,
            )
            loss, agreeing = logits_loss.total, logits_loss.agreement
            parts["kl"], parts["ce"] = logits_loss.kl / num_compared, logits_loss.ce / num_labels
        # Of images, whole ones are counted, so that each one's tokens are averaged here.
        divisor = len(self.layer_map) * num_tokens * (outputs.last_hidden_state.shape[1] if self.reads_images else 1)
        for name in ALIGNMENT_LOSSES:
            if name in active:
                parts[name] = sums[name] / divisor
                loss = loss + weights[LOSSES.index(name)] * parts[name]
        return DistillationOutput(
            loss=loss + self._touch_unused(active),
            parts=torch.stack([part.detach().float() for part in parts.values()]),
            agreement=agreeing,
            logits=self._class_logits(outputs).detach() if agreement and self.reads_images else None,
        )

    def _class_logits(self, outputs: ModelOutput) -> Tensor:
        return self.core.classifier(outputs.pooler_output)

    def _logits_loss(
        self,
        outputs: ModelOutput,
        targets: TeacherOutput,
        teacher_head: nn.Module | None,
        mask: Tensor | None,
        labels: Tensor | None,
        kl_weight: Tensor | float,
        ce_weight: Tensor | float,
        agreement: bool,
    ) -> LogitsLoss:
        if self.reads_images:
            return classification_loss(
                self._class_logits(outputs),
                targets.logits,
                labels if isinstance(ce_weight, Tensor) else None,
                temperature=self.args.temperature,
                kl_weight=kl_weight,
                ce_weight=ce_weight,
            )
        shifted = None if labels is None else shift_labels(labels, mask)
        is_plain = not self.is_hybrid or self.core.config.has_plain_head
        return chunked_kl_ce(
            outputs.last_hidden_state if is_plain else outputs.logits,
            self.core.get_output_embeddings() if is_plain else None,
            targets.last_hidden_state if teacher_head is not None else targets.logits,
            teacher_head,
            mask=mask if shifted is None else shifted != IGNORE_INDEX,
            labels=shifted if isinstance(ce_weight, Tensor) else None,
            temperature=self.args.temperature,
            kl_weight=kl_weight,
            ce_weight=ce_weight,
            agreement=agreement,
            chunk_size=self.args.logits_chunk_size,
        )

    def _touch_unused(self, active: frozenset[str]) -> Tensor | float:
        """Zero, with a zero gradient for parameters that no active loss reaches: DDP waits for every gradient.

        FSDP does not wait, and its parameters (DTensor) are sharded again at this point. ZeRO-3 takes weights away
        before their gradient, which must not happen to a touched one.
        """
        if not self.touches_unused:
            return 0.0
        modules = [] if active & {"kl", "ce"} else [self.student]
        if self.bridge is not None and "bridge" not in active:
            modules.append(self.bridge)
        parameters = (
            p for module in modules for p in module.parameters() if p.requires_grad and type(p) is nn.Parameter
        )
        return sum((0.0 * parameter.flatten()[:1].sum() for parameter in parameters), start=0.0)

    def _bridge_loss(self, shown: list[LayerShows], targets: TeacherOutput, mask: Tensor | None) -> Tensor:
        """A function of its own: where kernels break the graph, a compiler enters here."""
        pairs = []
        for layer, one in enumerate(shown):
            mapped = bridge_targets(targets.attentions[self.layer_map[layer]], self.args.target_map, mask)
            for row, role in enumerate(ROLES):
                scale = self.target_scales[row, layer] if self.args.relative_loss else None
                pairs.append(BridgePair(layer, role, [scan[row] for scan in one.scans], mapped[role], scale))
        return self.bridge.loss(pairs, mask)

    def _map_loss(
        self, layer: int, scans: list[tuple[Tensor, ...]], make_map: Callable[[], Tensor], mask: Tensor | None
    ) -> Tensor:
        mixer = self.core.mixer_list[layer]

        def compare(*scans: Tensor) -> Tensor:
            return attention_loss(mixer.attention_map(*scans), make_map(), mask)

        # Made again in the backward pass, so that one layer's maps exist at a time. A CUDA graph can't read the
        # random state.
        return checkpoint(
            compare, *(tensor for scan in scans for tensor in scan), use_reentrant=False, preserve_rng_state=False
        )

    def _hidden_pair(
        self, hidden_states: tuple[Tensor, ...] | None, targets: TeacherOutput, layer: int
    ) -> tuple[Tensor | None, Tensor]:
        """A student layer's hidden state and its target.

        The student's last one comes after its final norm, as that of most teachers does. Where one of the two is
        normed and the other is not, the student's norm makes them comparable. A hybrid norms as its teacher does.
        """
        index = self.teacher_layers[layer]
        student = None if hidden_states is None else hidden_states[self.student_layers[layer] + 1]
        teacher = targets.hidden_states[index + 1]
        if self.is_hybrid:
            return student, teacher
        norm = self.core.base_model.norm_f
        is_normed = layer == len(self.layer_map) - 1
        teacher_is_normed = self.norms_last_target and index == len(targets.hidden_states) - 2
        if is_normed and not teacher_is_normed:
            teacher = norm(teacher.to(norm.weight.dtype))
        if teacher_is_normed and not is_normed and student is not None:
            student = norm(student.to(norm.weight.dtype))
        return student, teacher


def _scans(projections: SSMProjections | BidirectionalProjections) -> list[tuple[Tensor, Tensor, Tensor]]:
    scans = [projections[:3]]
    if isinstance(projections, BidirectionalProjections):
        scans.append((projections.backward_B, projections.backward_C, projections.backward_time_step))
    return scans
