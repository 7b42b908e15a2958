"""KL to a teacher and cross-entropy over a large vocabulary, a chunk of tokens at a time.

Shape legend: `b` batch, `t` token, `n` flat token, `d` width, `V` vocabulary.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from cab_hf.data.packing import IGNORE_INDEX


IMPOSSIBLE_LOGIT = -1e4
"""A logit whose probability is 0 in every dtype; it stands for -inf, with which 0 * log 0 would be NaN."""


class LogitsLoss(NamedTuple):
    """What `chunked_kl_ce` returns, all 0-dim sums over real tokens.

    Attributes:
        total: `kl_weight * kl + ce_weight * ce`; the only one with a gradient.
        kl: KL(teacher || student) at the temperature, times its square; 0 when not computed.
        ce: cross-entropy of the labels; 0 when not computed.
        agreement: number of tokens where both models' most likely next tokens are the same; 0 when not computed.
    """

    total: Tensor
    kl: Tensor
    ce: Tensor
    agreement: Tensor


def chunked_kl_ce(
    student_hidden: Tensor,
    student_head: nn.Module | None,
    teacher_hidden: Tensor | None = None,
    teacher_head: nn.Module | None = None,
    *,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    kl_weight: float | Tensor = 1.0,
    ce_weight: float | Tensor = 0.0,
    agreement: bool = False,
    chunk_size: int = 1024,
    vocab_size: int | None = None,
) -> LogitsLoss:
    """KL to the teacher and cross-entropy, without ever holding the logits of all tokens.

    Under a student head that is a plain `nn.Linear` the gradients come in closed form in the forward pass, chunk by
    chunk, and nothing of size tokens x vocabulary outlives its chunk. Any other head (wrapped by LoRA, sharded, or
    with hooks) is called as a module and recomputed in the backward pass. Matrix products run in the inputs' or
    autocast's dtype, softmax and sums in float32.

    Args:
        student_hidden: `(..., d_s)`, usually `(b, t, d_s)`: what the student's head takes.
        student_head: makes `(..., V_s)`; None if `student_hidden` already holds logits.
        teacher_hidden: `(..., d_t)` over the same tokens; not needed without KL and agreement. No gradient.
        teacher_head: makes `(..., V_t)`; None if `teacher_hidden` already holds logits.
        mask: `(...)`, non-zero where KL and agreement count; None if everywhere.
        labels: `(...)` int64, already shifted to the token that each position predicts; -100 is skipped. They alone
            decide where cross-entropy counts.
        temperature: softens both distributions of the KL.
        kl_weight: weight of KL in `total`. The number 0 leaves it out; a 0-dim tensor (a weight that changes under
            a CUDA graph) is always computed, and gets no gradient.
        ce_weight: the same for cross-entropy.
        agreement: also count agreeing tokens.
        chunk_size: tokens whose logits exist at the same time.
        vocab_size: take only the first so many logits of both. By default the smaller vocabulary's size, since of two
            vocabularies of one tokenizer the larger is padded at its end. Cross-entropy is over the same logits, but
            over all of the student's when it is computed alone: name the size where both cases shall compare.

    Returns:
        LogitsLoss.

    Raises:
        ValueError: tokens that differ, missing labels or teacher, or a vocab_size that a head does not reach.

    Source: the KL and its temperature: Hinton et al., arXiv 1503.02531; as the language recipe's second stage:
        arXiv 2510.19266, section "Method".
    """
    kl_weight, ce_weight = (w.detach() if isinstance(w, Tensor) else w for w in (kl_weight, ce_weight))
    needs_kl = isinstance(kl_weight, Tensor) or kl_weight != 0
    needs_ce = isinstance(ce_weight, Tensor) or ce_weight != 0
    compares = needs_kl or agreement
    _check_logits_arguments(student_hidden, teacher_hidden, mask, labels, needs_ce, needs_teacher=compares)
    targets = _Targets(
        teacher_rows=teacher_hidden.detach().flatten(0, -2) if compares else None,
        teacher_head=teacher_head,
        real=(mask != 0).flatten() if compares and mask is not None else None,
        labels=labels.flatten() if needs_ce else None,
        temperature=float(temperature),
        needs_kl=needs_kl,
        needs_agreement=agreement,
        vocab_size=vocab_size,
    )
    rows = student_hidden.flatten(0, -2)
    needs_gradient = torch.is_grad_enabled() and (needs_kl or needs_ce)
    try:
        if not needs_gradient or not _is_plain_linear(student_head):
            return _module_head_loss(rows, student_head, targets, kl_weight, ce_weight, chunk_size, needs_gradient)
        head = (student_head.weight, student_head.bias)
        return LogitsLoss(*_LinearHeadLoss.apply(rows, *head, targets, kl_weight, ce_weight, chunk_size))
    except (IndexError, RuntimeError) as error:
        # A look before would wait for the device. On a GPU its own error stops the run.
        if targets.labels is None or "out of bounds" not in str(error):
            raise
        raise ValueError(
            f"labels hold {int(targets.labels.max())}, which is none of the logits that student and teacher have in "
            "common: it is no token of the teacher's. Use the teacher's tokenizer."
        ) from error


@dataclass(frozen=True)
class _Targets:
    """What the student's logits are compared with, over flat tokens `n`."""

    teacher_rows: Tensor | None  # (n, d_t)
    teacher_head: nn.Module | None
    real: Tensor | None  # (n,) bool, where KL and agreement count
    labels: Tensor | None  # (n,)
    temperature: float
    needs_kl: bool
    needs_agreement: bool
    vocab_size: int | None

    def chunk(self, rows: slice) -> "_Targets":
        return replace(
            self,
            teacher_rows=None if self.teacher_rows is None else self.teacher_rows[rows],
            real=None if self.real is None else self.real[rows],
            labels=None if self.labels is None else self.labels[rows],
        )

    @property
    def labelled(self) -> Tensor | None:
        return None if self.labels is None else self.labels != IGNORE_INDEX

    @property
    def used(self) -> Tensor | None:
        """Rows that count anywhere, or None for all."""
        if self.teacher_rows is None:
            return self.labelled
        if self.real is None or self.labels is None:
            return self.real
        return self.real | self.labelled

    def teacher_logits(self) -> Tensor | None:
        """`(n, V_t)`, finite where rows count."""
        if self.teacher_rows is None:
            return None
        with torch.no_grad():
            return _logits(_selected(self.teacher_rows, self.real), self.teacher_head)

    def common_width(self, student_width: int, teacher_logits: Tensor | None) -> int:
        """How many logits are compared."""
        width = student_width if teacher_logits is None else min(student_width, teacher_logits.shape[-1])
        if self.vocab_size is not None and self.vocab_size > width:
            raise ValueError(
                f"vocab_size is {self.vocab_size}, but the heads have only {width} logits in common: "
                f"leave vocab_size out or use at most {width}."
            )
        width = width if self.vocab_size is None else self.vocab_size
        return width


class _LinearHeadLoss(torch.autograd.Function):
    """The parts of `LogitsLoss` under a linear head, their gradients computed beside them.

    What is kept are the gradients of `total / scale`. The scale is the larger weight: one divided by the number of
    tokens would push a half precision gradient of the logits below its smallest number before any loss scaling could
    lift it.
    """

    @staticmethod
    def forward(
        ctx,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: _Targets,
        kl_weight: float | Tensor,
        ce_weight: float | Tensor,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        device_type = rows.device.type
        autocasts = torch.is_autocast_enabled(device_type) and rows.dtype != torch.float64
        dtype = torch.get_autocast_dtype(device_type) if autocasts else rows.dtype
        accumulation = accumulation_dtype(rows.dtype)
        head_weight = weight.to(dtype) if autocasts else weight
        head_bias = bias.to(dtype) if autocasts and bias is not None else bias

        wants_rows, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        rows_gradient = torch.empty_like(rows) if wants_rows else None
        weight_gradient = torch.zeros_like(weight, dtype=accumulation) if wants_weight else None
        bias_gradient = torch.zeros_like(bias, dtype=accumulation) if wants_bias else None
        kl, ce, agreement = (rows.new_zeros((), dtype=accumulation) for _ in range(3))
        kl_weight, ce_weight = (
            weight.to(rows.device, accumulation) if isinstance(weight, Tensor) else kl.new_full((), weight)
            for weight in (kl_weight, ce_weight)
        )
        scale = torch.maximum(kl_weight.abs(), ce_weight.abs()).clamp(min=torch.finfo(accumulation).tiny)
        shares = kl_weight / scale, ce_weight / scale

        for start in range(0, rows.shape[0], chunk_size):
            chunk = slice(start, start + chunk_size)
            chunk_targets = targets.chunk(chunk)
            teacher_logits = chunk_targets.teacher_logits()  # before autocast is off: the teacher's head may need it
            width = targets.common_width(weight.shape[0], teacher_logits)
            with torch.autocast(device_type, enabled=False):
                inputs = _selected(rows[chunk], chunk_targets.used).to(dtype)
                logits = F.linear(inputs, head_weight[:width], None if bias is None else head_bias[:width])
                sums, gradient = _closed_form(logits, teacher_logits, chunk_targets, *shares)
                kl, ce, agreement = kl + sums.kl, ce + sums.ce, agreement + sums.agreement
                if wants_rows:
                    rows_gradient[chunk] = gradient @ head_weight[:width]
                if wants_weight:
                    weight_gradient[:width] += gradient.T @ inputs
                if wants_bias:
                    bias_gradient[:width] += gradient.sum(0, dtype=accumulation)
        ctx.save_for_backward(scale, rows_gradient, weight_gradient, bias_gradient)
        ctx.dtypes = [None if x is None else x.dtype for x in (rows, weight, bias)]
        ctx.mark_non_differentiable(kl, ce, agreement)
        return kl * kl_weight + ce * ce_weight, kl, ce, agreement

    @staticmethod
    @once_differentiable
    def backward(ctx, total_gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        scale, *saved = ctx.saved_tensors
        scale = scale * total_gradient
        gradients = (
            None if gradient is None else (gradient * scale).to(dtype)
            for gradient, dtype in zip(saved, ctx.dtypes, strict=True)
        )
        return *gradients, None, None, None, None


class _ChunkSums(NamedTuple):
    kl: Tensor | float
    ce: Tensor | float
    agreement: Tensor | float


def _closed_form(
    logits: Tensor,
    teacher_logits: Tensor | None,
    targets: _Targets,
    kl_share: Tensor,
    ce_share: Tensor,
) -> tuple[_ChunkSums, Tensor]:
    """One chunk's sums, and the gradient of their weighted sum by its logits, written over them to save memory.

    By logits `s` at temperature `T`, `T^2 KL` has the gradient `T (softmax(s / T) - softmax(teacher / T))` and
    cross-entropy `softmax(s) - onehot(label)`.
    """
    width = logits.shape[-1]
    kl, ce = 0.0, 0.0
    agreement = _agreement(logits, teacher_logits, targets)
    gradients = []
    if targets.needs_kl:
        teacher = _log_softmax(teacher_logits[:, :width], targets.temperature)
        student = _log_softmax(logits, targets.temperature)
        teacher_probabilities = teacher.exp()
        kl_rows = teacher.sub_(student).mul_(teacher_probabilities).sum(-1)
        kl = _selected(kl_rows, targets.real).sum() * targets.temperature**2
        gradient = student.exp_().sub_(teacher_probabilities)
        gradients.append((gradient, _row_factor(targets.real, kl_share) * targets.temperature))
        del teacher, student, teacher_probabilities
    if targets.labels is not None:
        labelled = targets.labelled
        labels = torch.where(labelled, targets.labels, 0)[:, None]  # (n, 1)
        student = _log_softmax(logits, 1.0)
        ce = -_selected(student.gather(-1, labels).squeeze(-1), labelled).sum()
        gradient = student.exp_().scatter_add_(-1, labels, student.new_full((1, 1), -1.0).expand_as(labels))
        gradients.append((gradient, _row_factor(labelled, ce_share)))
        del student
    sums = _ChunkSums(kl, ce, agreement)
    gradient, factor = gradients[0]
    if len(gradients) == 1:
        return sums, torch.mul(gradient, factor, out=logits)
    return sums, torch.addcmul(gradient.mul_(factor), *gradients[1], out=logits)


def _row_factor(counted: Tensor | None, share: Tensor) -> Tensor:
    """`(n, 1)` or `(1, 1)`: the share where rows count, 0 elsewhere."""
    return share.view(1, 1) if counted is None else counted[:, None] * share


def _module_head_loss(
    rows: Tensor,
    head: nn.Module | None,
    targets: _Targets,
    kl_weight: float | Tensor,
    ce_weight: float | Tensor,
    chunk_size: int,
    needs_gradient: bool,
) -> LogitsLoss:
    """The parts of `LogitsLoss` under any head; with a gradient each chunk is recomputed in the backward pass."""
    accumulation = accumulation_dtype(rows.dtype)
    kl, ce, agreement = (rows.new_zeros((), dtype=accumulation) for _ in range(3))
    # at least one chunk, so that an empty batch has a (zero) gradient too
    for start in range(0, max(rows.shape[0], 1), chunk_size):
        chunk = slice(start, start + chunk_size)
        arguments = (rows[chunk], head, targets.chunk(chunk))
        if needs_gradient:
            sums = checkpoint(_module_head_chunk, *arguments, use_reentrant=False)
        else:
            with torch.no_grad():
                sums = _module_head_chunk(*arguments)
        kl, ce, agreement = kl + sums.kl, ce + sums.ce, agreement + sums.agreement
    return LogitsLoss(kl * kl_weight + ce * ce_weight, kl.detach(), ce.detach(), agreement)


def _module_head_chunk(rows: Tensor, head: nn.Module | None, targets: _Targets) -> _ChunkSums:
    teacher_logits = targets.teacher_logits()
    logits = _logits(_selected(rows, targets.used), head)
    width = targets.common_width(logits.shape[-1], teacher_logits)
    logits = logits[:, :width]
    kl, ce = 0.0, 0.0
    agreement = _agreement(logits.detach(), teacher_logits, targets)
    if targets.needs_kl:
        teacher = _log_softmax(teacher_logits[:, :width], targets.temperature)
        student = _log_softmax(logits, targets.temperature)
        kl_rows = (teacher.exp() * (teacher - student)).sum(-1)
        kl = _selected(kl_rows, targets.real).sum() * targets.temperature**2
    if targets.labels is not None:
        labels = torch.where(targets.labelled, targets.labels, 0)[:, None]
        picked = _log_softmax(logits, 1.0).gather(-1, labels).squeeze(-1)
        ce = -_selected(picked, targets.labelled).sum()
    return _ChunkSums(kl, ce, agreement)


def _logits(rows: Tensor, head: nn.Module | None) -> Tensor:
    return rows.clamp(min=IMPOSSIBLE_LOGIT) if head is None else head(rows)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    dtype = accumulation_dtype(logits.dtype)
    if temperature != 1.0:
        logits = logits.to(dtype) / temperature
    return torch.log_softmax(logits, -1, dtype=dtype)


def _agreement(logits: Tensor, teacher_logits: Tensor | None, targets: _Targets) -> Tensor | float:
    if not targets.needs_agreement:
        return 0.0
    agrees = logits.argmax(-1) == teacher_logits[:, : logits.shape[-1]].argmax(-1)
    return _selected(agrees, targets.real).sum()


def _is_plain_linear(head: nn.Module | None) -> bool:
    """Whether reading the head's weight says all that calling it does: no adapter, sharded weight or hook."""
    return (
        type(head) is nn.Linear
        and type(head.weight) in (nn.Parameter, Tensor)
        and not (head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head))
    )


def _check_logits_arguments(
    student_hidden: Tensor,
    teacher_hidden: Tensor | None,
    mask: Tensor | None,
    labels: Tensor | None,
    needs_ce: bool,
    needs_teacher: bool,
) -> None:
    if needs_ce and labels is None:
        raise ValueError("labels are missing: pass them, or ce_weight=0.0 to leave cross-entropy out.")
    if needs_teacher and teacher_hidden is None:
        raise ValueError("teacher_hidden is missing: pass it, or kl_weight=0.0 and agreement=False to do without.")
    tokens = student_hidden.shape[:-1]
    others = {"teacher_hidden": teacher_hidden.shape[:-1]} if needs_teacher else {}
    if needs_teacher and mask is not None:
        others["mask"] = mask.shape
    if needs_ce:
        others["labels"] = labels.shape
    for name, shape in others.items():
        if shape != tokens:
            raise ValueError(
                f"{name} is over tokens {tuple(shape)}, but student_hidden is over {tuple(tokens)}: "
                "pass the same tokens to both."
            )


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64: what sums and softmax are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _selected(x: Tensor, rows: Tensor | None) -> Tensor:
    """`x` `(n, ...)` with 0 in the rows that do not count; selecting, since 0 * NaN is NaN."""
    return x if rows is None else torch.where(rows.view(-1, *[1] * (x.ndim - 1)), x, 0)
