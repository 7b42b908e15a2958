"""The losses of a student: pure functions of tensors and masks.

Every loss is a sum over real tokens of a mean over features or heads. Dividing it by the number of tokens of the whole
accumulated batch, which only the trainer knows, gives a value that does not depend on batch, length, width or the
number of accumulation steps. A masked token changes neither the value nor a gradient, whatever it holds; with no real
token left a loss is 0. Nothing here waits for the device, so that a CUDA graph can hold a whole step.

Shape legend: `b` batch, `t` token, `h` head, `p` head_dim, `d` width, `V` vocabulary.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cab_hf.distillation.chunked_kl import LogitsLoss, accumulation_dtype, chunked_kl_ce


__all__ = [
    "LogitsLoss",
    "attention_loss",
    "chunked_kl_ce",
    "classification_loss",
    "hidden_loss",
    "loss_weight",
    "mean_square",
    "output_loss",
    "target_map",
    "token_mean",
]

SMALLEST_MEAN_SQUARE = 1e-12
"""Below it a target counts as zero and a relative loss no longer divides by its size."""

TargetMap = Literal["none", "softmax", "relu", "exp", "elu1"]
Decay = Literal["none", "linear", "cosine"]


def output_loss(
    student_output: Tensor, teacher_output: Tensor, mask: Tensor | None = None, relative: bool | Tensor = True
) -> Tensor:
    """Squared error between a mixer's output and its teacher attention's, both before the output projection.

    Args:
        student_output: `(b, t, d)`.
        teacher_output: `(b, t, h, p)` with `h * p = d`, or `(b, t, d)`; receives no gradient.
        mask: `(b, t)`, non-zero at real tokens; None if all are real.
        relative: divide by the target's mean square: unscaled errors differ by 10^3 between layers. True measures it
            on this call's real tokens; a 0-dim tensor (`mean_square` of a calibration batch) is used as it is, which
            keeps the loss independent of how a batch is cut into accumulation steps.

    Returns:
        0-dim float32 (float64 for float64 inputs): the mean over features, summed over real tokens.

    Raises:
        ValueError: shapes that differ.

    Source: RADLADS, arXiv 2505.03005 (stage 1); LoLCATs, arXiv 2410.10254 (the relative form).
    """
    return _squared_error(
        "student_output", student_output, "teacher_output", teacher_output.flatten(2), mask, relative
    )


def hidden_loss(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, relative: bool | Tensor = True
) -> Tensor:
    """Squared error between the hidden states of two blocks.

    Args:
        student: `(b, t, d)`.
        teacher: `(b, t, d)`; receives no gradient.
        mask: `(b, t)`, non-zero at real tokens; None if all are real.
        relative: as in `output_loss`.

    Returns:
        0-dim float32 (float64 for float64 inputs): the mean over features, summed over real tokens.

    Raises:
        ValueError: shapes that differ.

    Source: MOHAWK, arXiv 2408.10189, stage 2.
    """
    return _squared_error("student", student, "teacher", teacher, mask, relative)


def classification_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    kl_weight: float | Tensor = 1.0,
    ce_weight: float | Tensor = 0.0,
) -> LogitsLoss:
    """Soft KL and cross-entropy of a classifier, summed over examples.

    Args:
        student_logits: `(b, V)`.
        teacher_logits: `(b, V)`; receives no gradient. Without it there is no KL and no agreement.
        labels: `(b,)` integers, where -100 is skipped, or `(b, V)` probabilities as mixup makes them. Without them
            there is no cross-entropy.
        temperature: softens both distributions of the KL.
        kl_weight, ce_weight: weights in `total`.

    Returns:
        LogitsLoss, in float32 (float64 for float64 inputs).

    Raises:
        ValueError: another number of classes, or a `ce_weight` without labels.

    Source: arXiv 2510.19266 (KL at temperature 1, batchmean); Hinton et al., arXiv 1503.02531.
    """
    dtype = accumulation_dtype(student_logits.dtype)
    student = student_logits.to(dtype)
    kl = ce = agreement = student.new_zeros(())
    if teacher_logits is not None:
        if teacher_logits.shape != student.shape:
            raise ValueError(
                f"teacher_logits are {tuple(teacher_logits.shape)} and student_logits {tuple(student.shape)}: give "
                "the student as many labels as the teacher, or leave the KL out (kl_weight=0.0)."
            )
        teacher = teacher_logits.detach().to(dtype)
        log_teacher, log_student = ((x / temperature).log_softmax(-1) for x in (teacher, student))
        kl = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True) * temperature**2
        agreement = (student.argmax(-1) == teacher.argmax(-1)).sum()
    if labels is not None:
        labels = labels.to(dtype if labels.is_floating_point() else torch.long)
        ce = F.cross_entropy(student, labels, reduction="sum")
    elif isinstance(ce_weight, Tensor) or ce_weight != 0:
        raise ValueError("labels are missing: pass them, or ce_weight=0.0 to leave cross-entropy out.")
    return LogitsLoss(kl_weight * kl + ce_weight * ce, kl.detach(), ce.detach(), agreement)


def mean_square(target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean square over a target's real tokens and features: what `relative` divides by.

    Args:
        target: `(b, t, ...)`.
        mask: `(b, t)`, non-zero at real tokens; None if all are real.

    Returns:
        0-dim float32 (float64 for float64 inputs), detached; 0 without real tokens.
    """
    rows = target.detach().flatten(2)
    if mask is None:
        return _sum_of_squares(rows) / max(rows.numel(), 1)
    real = mask != 0
    rows = torch.where(real[..., None], rows, 0)
    return _sum_of_squares(rows) / (real.sum().clamp(min=1) * rows.shape[-1])


def token_mean(target: Tensor, mask: Tensor | None = None) -> Tensor:
    """A target's mean over its real tokens.

    Args:
        target: `(b, t, ...)`.
        mask: as in `mean_square`.

    Returns:
        The dimensions behind `t`, float32 (float64 for float64 inputs), detached; 0 without real tokens.
    """
    rows = target.detach().flatten(0, 1) if mask is None else target.detach()[mask != 0]
    return rows.sum(0, dtype=accumulation_dtype(rows.dtype)) / max(len(rows), 1)


def _squared_error(
    student_name: str,
    student: Tensor,
    teacher_name: str,
    teacher: Tensor,
    mask: Tensor | None,
    relative: bool | Tensor,
) -> Tensor:
    if student.shape != teacher.shape:
        raise ValueError(
            f"{student_name} is {tuple(student.shape)} and {teacher_name} is {tuple(teacher.shape)}, heads flattened, "
            "but they are compared value by value: give the student the teacher's width and the same tokens, or put "
            "a learned map between them, as the bridge is."
        )
    teacher = teacher.detach()
    loss = _SquaredError.apply(student.flatten(2), teacher.flatten(2), None if mask is None else mask != 0)
    if relative is False:
        return loss
    scale = mean_square(teacher, mask) if relative is True else relative
    return loss / scale.clamp(min=SMALLEST_MEAN_SQUARE)


class _SquaredError(torch.autograd.Function):
    """Mean over features, sum over real tokens; keeps one tensor in the inputs' dtype and sums it in float32."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, real: Tensor | None) -> Tensor:
        difference = student - teacher
        if real is not None:
            difference.masked_fill_(~real[..., None], 0)
        ctx.save_for_backward(difference)
        ctx.dtype = student.dtype
        return _sum_of_squares(difference) / max(student.shape[-1], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (difference,) = ctx.saved_tensors
        return (difference * (gradient * (2 / max(difference.shape[-1], 1)))).to(ctx.dtype), None, None


def _sum_of_squares(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=accumulation_dtype(x.dtype)).square()


def attention_loss(student_map: Tensor, teacher_map: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared distance between a student's implied attention map and the one that its teacher applies, of one layer.

    A row's distance is summed over keys, without dividing by their number: a softmax row sums to 1 however long it is,
    so that a division would only make late tokens count less. Rows are averaged over heads and summed over real
    queries.

    Args:
        student_map: `(b, h, t, t)`, queries by keys.
        teacher_map: `(b, h, t, t)`; receives no gradient.
        mask: `(b, t)`, non-zero at real tokens; None if all are real.

    Returns:
        0-dim float32 (float64 for float64 inputs).

    Raises:
        ValueError: a student's map of other heads or tokens.

    Source: MOHAWK, arXiv 2408.10189, stage 1 (there the Frobenius norm of a whole sequence's difference).
    """
    if student_map.shape != teacher_map.shape:
        raise ValueError(
            f"student_map is {tuple(student_map.shape)} and teacher_map {tuple(teacher_map.shape)}: give the student "
            "as many heads as the teacher and the same tokens."
        )
    dtype = accumulation_dtype(student_map.dtype)
    difference = student_map.to(dtype) - teacher_map.detach().to(dtype)
    if mask is not None:
        real = mask != 0
        difference = torch.where(real[:, None, None, :] & real[:, None, :, None], difference, 0)
    return difference.square().sum() / student_map.shape[1]


def target_map(
    x: Tensor, kind: TargetMap, role: Literal["key", "query"], mask: Tensor | None = None, token_dim: int = -2
) -> Tensor:
    """The teacher's keys or queries as the bridge shall predict them.

    `"softmax"` normalises queries over features and keys over tokens (the default of the paper's vision recipe, with
    all heads side by side); the others work value by value: `"relu"`, `"exp"`, `"elu1"` (`elu(x) + 1`) and `"none"`.

    Args:
        x: `(b, ..., t, ...)` with features last: `(b, t, h * p)`, or `(b, h, t, p)` to normalise each head alone.
        kind: the map.
        role: `"key"` or `"query"`; it matters to `"softmax"` alone.
        mask: `(b, t)`, non-zero at real tokens; None if all are real.
        token_dim: which dimension of `x` holds tokens.

    Returns:
        `x`'s shape and dtype, detached and computed in float32 (`"exp"` overflows above 88). Zero at masked tokens
        unless the kind is `"none"`, which returns `x` as it is.

    Raises:
        ValueError: an unknown kind.

    Source: arXiv 2510.19266, section "Method", and its released vision code.
    """
    x = x.detach()
    if kind == "none":
        return x
    values = x.to(accumulation_dtype(x.dtype))
    token_dim = token_dim % x.ndim
    real = None
    if mask is not None:
        shape = [1] * x.ndim
        shape[0], shape[token_dim] = mask.shape
        real = (mask != 0).view(shape)
        values = torch.where(real, values, 0)
    if kind == "softmax":
        if role == "key" and real is not None:
            values = values.masked_fill(~real, torch.finfo(values.dtype).min)
        values = values.softmax(token_dim if role == "key" else -1)
    elif kind == "relu":
        values = values.relu()
    elif kind == "exp":
        values = values.exp()
    elif kind == "elu1":
        values = F.elu(values) + 1
    else:
        raise ValueError(f"target map {kind!r} is unknown: choose 'none', 'softmax', 'relu', 'exp' or 'elu1'.")
    if real is not None:
        values = torch.where(real, values, 0)
    return values.to(x.dtype)


def loss_weight(weight: float, progress: float, end: float | None = None, decay: Decay = "none") -> float:
    """A loss weight at one moment of training: alignment helps early and, with plenty of data, hurts late.

    Args:
        weight: the weight at the start.
        progress: the fraction of training that is done, from 0.
        end: the fraction at which the weight reaches 0 and stays there; None for the end of training, and with
            decay `"none"` for never.
        decay: `"none"` keeps the weight until `end`, `"linear"` and `"cosine"` bring it down until there.

    Returns:
        The weight; exactly 0.0 from `end` on, so that its loss need not be computed.
    """
    if end is None and decay == "none":
        return weight
    done = progress / (1.0 if end is None else end)
    if done >= 1:
        return 0.0
    if decay == "linear":
        return weight * (1 - done)
    if decay == "cosine":
        return weight * 0.5 * (1 + math.cos(math.pi * done))
    return weight
