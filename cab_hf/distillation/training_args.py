"""Arguments of a distillation run. Each option is written once, here; recipes and the command line set the rest."""

from dataclasses import dataclass, field
from typing import NamedTuple

from transformers import TrainingArguments
from transformers.integrations import unset_hf_deepspeed_config
from transformers.utils import logging


logger = logging.get_logger(__name__)

LOSSES = ("kl", "ce", "bridge", "output", "hidden", "attention")
"""The loss parts. Each has `<name>_weight`, `<name>_end` and `<name>_decay`; a weight of 0.0 is not computed."""


LARGEST_FACTOR = 2.0


def rate_at_width(rate: float, measured: int, width: int) -> float:
    """A learning rate that was measured at one width of the hidden states, at another: as one over the width, and at
    most doubled.

    Source: muP, arXiv 2203.03466, table 3: Adam's rate of hidden matrices.

    Example:
        >>> rate_at_width(6e-4, 576, 1152)
        0.0003
    """
    return float(f"{rate * min(measured / width, LARGEST_FACTOR):.3g}")


class LossCourse(NamedTuple):
    """A loss over a training: its weight at the start, the fraction at which it is off, and its way there."""

    weight: float
    end: float
    decay: str


@dataclass
class DistillationTrainingArguments(TrainingArguments):
    """[`~transformers.TrainingArguments`] and what happens between teacher and student.

    Every loss is a mean over the tokens of an optimizer step and over its own elements, so that a weight means the
    same at any batch size, accumulation, length or width.

    Source: arXiv 2510.19266; soft KL as in Hinton et al. (arXiv 1503.02531).

    Raises:
        ValueError: for a negative weight, an end outside (0, 1], a temperature that is not positive, and other values
            that no run can have.
    """

    learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate; by default one for the student's kind and width."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between two entries of the log."})

    kl_weight: float = field(
        default=1.0, metadata={"help": "Weight of KL(teacher || student) on the logits, where labels are not -100."}
    )
    ce_weight: float = field(default=0.0, metadata={"help": "Weight of the cross-entropy on the labels."})
    bridge_weight: float = field(default=1.0, metadata={"help": "Weight of the attention bridge: B to K, C to Q."})
    output_weight: float = field(
        default=0.0, metadata={"help": "Weight of matching mixer output to attention output, before the projections."}
    )
    hidden_weight: float = field(
        default=0.0, metadata={"help": "Weight of matching the hidden state after each block."}
    )
    attention_weight: float = field(
        default=0.0, metadata={"help": "Weight of matching attention maps (MOHAWK), quadratic in length."}
    )

    kl_end: float = field(default=1.0, metadata={"help": "Fraction of training after which the KL is off."})
    ce_end: float = field(default=1.0, metadata={"help": "Fraction of training after which the cross-entropy is off."})
    bridge_end: float = field(default=1.0, metadata={"help": "Fraction of training after which the bridge is off."})
    output_end: float = field(
        default=1.0, metadata={"help": "Fraction of training after which output matching is off."}
    )
    hidden_end: float = field(
        default=1.0, metadata={"help": "Fraction of training after which state matching is off."}
    )
    attention_end: float = field(
        default=1.0, metadata={"help": "Fraction of training after which map matching is off."}
    )

    kl_decay: str = field(
        default="none", metadata={"help": "Course of the KL's weight to its end: none, linear, cosine."}
    )
    ce_decay: str = field(default="none", metadata={"help": "Course of the cross-entropy's weight to its end."})
    bridge_decay: str = field(default="none", metadata={"help": "Course of the bridge's weight to its end."})
    output_decay: str = field(default="none", metadata={"help": "Course of output matching's weight to its end."})
    hidden_decay: str = field(default="none", metadata={"help": "Course of state matching's weight to its end."})
    attention_decay: str = field(default="none", metadata={"help": "Course of map matching's weight to its end."})

    temperature: float = field(default=1.0, metadata={"help": "Softens both distributions of the KL."})
    logits_chunk_size: int = field(
        default=1024, metadata={"help": "Tokens whose logits exist at once; memory grows with it, results do not."}
    )
    relative_loss: bool = field(
        default=True,
        metadata={
            "help": "Divide each layer's alignment error by its target's mean square (a centered bridge's by its "
            "variance)."
        },
    )
    layer_map: str = field(
        default="floor",
        metadata={
            "help": "Teacher layer of each student layer: floor (the paper's), uniform, last, or indices '0,2,5'."
        },
    )
    target_map: str = field(
        default="none", metadata={"help": "Map on the bridge's targets: none, softmax, relu, exp, elu1."}
    )
    remove_rotary: bool = field(
        default=False, metadata={"help": "Undo the rotary rotation of the teacher's keys and queries."}
    )
    bridge_hidden_size: int = field(default=128, metadata={"help": "Hidden width of the bridge's MLPs."})
    bridge_shared_roles: bool = field(default=False, metadata={"help": "One MLP body for B and C of a layer."})
    bridge_centered: bool = field(
        default=True,
        metadata={"help": "Start the bridge's output biases at its targets' means: it learns what varies."},
    )
    mixer_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the student's mixers; that of its other weights when not given."},
    )
    bridge_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the bridge; the student's when not given."}
    )
    trainable: str | None = field(
        default=None,
        metadata={"help": "Regular expression over the student's parameter names; the others are frozen. None: all."},
    )
    teacher_device: str | None = field(
        default=None, metadata={"help": "Device of the teacher; the student's if not given."}
    )
    teacher_dtype: str | None = field(default=None, metadata={"help": "Dtype of the teacher; its own if not given."})
    ema_decay: float | None = field(
        default=None,
        metadata={"help": "Also keep, evaluate and save the student's exponential moving average; None: do not."},
    )
    cuda_graph: bool = field(
        default=False,
        metadata={"help": "Replay the whole step as one CUDA graph: for batches of one shape, alone or under DDP."},
    )

    hub_strategy: str = field(
        default="end",
        metadata={"help": "When to push: 'end' (the finished student with its card), 'every_save', 'checkpoint'."},
    )
    remove_unused_columns: bool = field(
        default=True, metadata={"help": "Drop dataset columns that the student's forward does not take."}
    )
    # Every parameter gets a gradient at every step, so DDP need not look for those without one.
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Let DDP look for parameters without a gradient; there are none."}
    )
    # Reading the loss for this filter would wait for the device at every step.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Leave NaN and inf losses out of the log."})

    @property
    def courses(self) -> dict[str, LossCourse]:
        """The course of each loss, in the order of `LOSSES`."""
        return {name: LossCourse(*(getattr(self, f"{name}_{what}") for what in LossCourse._fields)) for name in LOSSES}

    @property
    def used_losses(self) -> list[str]:
        """Names of the losses that are on at some time, in the order of `LOSSES`."""
        return [name for name, course in self.courses.items() if course.weight > 0]

    def __post_init__(self):
        given = self.accelerator_config
        is_open = given is None or (isinstance(given, dict) and "non_blocking" not in given)
        super().__post_init__()
        if is_open and self.dataloader_pin_memory and self.device.type == "cuda":
            # Copying a batch from pinned memory would wait for the device at every step, too.
            self.accelerator_config.non_blocking = True
        # ZeRO-3 would shard whatever is loaded from now on: the teacher, too, which every process asks on its own.
        unset_hf_deepspeed_config()
        for name, (weight, end, decay) in self.courses.items():
            if weight < 0:
                raise ValueError(f"`{name}_weight` must not be negative, got {weight}. Use 0.0 to leave the loss out.")
            if not 0 < end <= 1:
                raise ValueError(f"`{name}_end` is a fraction of training in (0, 1], got {end}.")
            if decay not in ("none", "linear", "cosine"):
                raise ValueError(f"`{name}_decay` must be none, linear or cosine, got {decay!r}.")
        if not self.used_losses:
            raise ValueError(f"Every loss weight is 0.0; set at least one of {[f'{name}_weight' for name in LOSSES]}.")
        ends = {name: self.courses[name].end for name in self.used_losses}
        if max(ends.values()) < 1:
            logger.warning(
                f"Every loss is off before the end ({', '.join(f'{name}_end={end}' for name, end in ends.items())}): "
                "nothing is learnt from then on. Let one of them go on to 1.0, or train fewer steps."
            )
        for name in ("mixer_learning_rate", "bridge_learning_rate"):
            rate = getattr(self, name)
            if rate is not None and rate < 0:
                raise ValueError(f"`{name}` must not be negative, got {rate}. Leave it out for `learning_rate`.")
        if self.temperature <= 0:
            raise ValueError(f"`temperature` must be positive, got {self.temperature}.")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be in [0, 1), got {self.ema_decay}. Leave it out for no average.")
        if self.logits_chunk_size < 1:
            raise ValueError(f"`logits_chunk_size` must be at least 1 token, got {self.logits_chunk_size}.")
        if self.teacher_dtype not in (None, "float32", "float16", "bfloat16"):
            raise ValueError(
                f"`teacher_dtype` must be float32, float16 or bfloat16, got {self.teacher_dtype!r}. Leave it out for "
                "the teacher's own."
            )
        if self.bf16_full_eval or self.fp16_full_eval:
            logger.warning(
                "`bf16_full_eval` and `fp16_full_eval` are left out: they would round the student's weights for good, "
                "those that must be float32 too. `bf16=True` evaluates under autocast."
            )
            self.bf16_full_eval = self.fp16_full_eval = False
        if self.use_liger_kernel:
            raise ValueError(
                f"`use_liger_kernel` is {self.use_liger_kernel}, but Liger has no kernels for a student's layers, and "
                "the KL is chunked already (`logits_chunk_size`). Leave it out."
            )
        parallel = self.parallelism_config
        if parallel is not None and (parallel.tp_enabled or parallel.cp_enabled or parallel.sp_enabled):
            raise ValueError(
                f"`parallelism_config` is {parallel}, but a state runs through all tokens of a row, and a teacher is "
                "asked by every process. Use DDP, FSDP or ZeRO (`dp_replicate_size`, `dp_shard_size`)."
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"`label_smoothing_factor` is {self.label_smoothing_factor}, but no loss here smooths labels: set it "
                "to 0.0. The teacher's distribution (`kl_weight`) takes its place."
            )
