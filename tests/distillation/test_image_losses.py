"""The losses of a classifier's logits, against formulas written out."""

import math

import pytest
import torch
from torch import Tensor

from cab_hf.distillation.losses import classification_loss


def logits(seed: int, rows: int = 5, classes: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    return 2 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=dtype)


LABELS = torch.tensor([2, 0, 3, 3, 1])
STUDENT, TEACHER = logits(0), logits(1)
MIXED = torch.tensor([[0.25, 0.75, 0, 0], [1, 0, 0, 0], [0, 0, 0.5, 0.5], [0.1, 0.2, 0.3, 0.4], [0, 0, 0, 1.0]])


def naive_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> float:
    total = 0.0
    for mine, theirs in zip(student / temperature, teacher / temperature):
        p, q = theirs.exp() / theirs.exp().sum(), mine.exp() / mine.exp().sum()
        total += sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q))
    return total * temperature**2


def naive_ce(student: Tensor, probabilities: Tensor) -> float:
    total = 0.0
    for mine, wanted in zip(student, probabilities):
        q = mine.exp() / mine.exp().sum()
        total -= sum(float(a) * math.log(float(b)) for a, b in zip(wanted, q))
    return total


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_both_parts_are_their_formulas(temperature):
    found = classification_loss(
        STUDENT, TEACHER, LABELS, temperature=temperature, kl_weight=0.7, ce_weight=torch.tensor(0.2)
    )
    kl = naive_kl(STUDENT, TEACHER, temperature)
    ce = naive_ce(STUDENT, torch.eye(4)[LABELS])
    assert float(found.kl) == pytest.approx(kl, rel=1e-6) and float(found.ce) == pytest.approx(ce, rel=1e-6)
    assert float(found.total) == pytest.approx(0.7 * kl + 0.2 * ce, rel=1e-6)
    assert int(found.agreement) == sum(int(a.argmax() == b.argmax()) for a, b in zip(STUDENT, TEACHER))


def test_kl_is_zero_at_the_teacher_and_blind_to_shifts():
    same = classification_loss(TEACHER, TEACHER + 3.0)
    assert float(same.kl) == pytest.approx(0.0, abs=1e-12) and int(same.agreement) == 5
    assert float(classification_loss(STUDENT, TEACHER).kl) > 0.1


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_labels_of_any_whole_numbers(dtype):
    expected = naive_ce(STUDENT, torch.eye(4)[LABELS])
    found = classification_loss(STUDENT, None, LABELS.to(dtype), ce_weight=1.0)
    assert float(found.total) == pytest.approx(expected, rel=1e-6)
    assert float(found.kl) == 0.0 and int(found.agreement) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_labels_may_be_probabilities(dtype):
    mixed = MIXED.to(dtype)
    found = classification_loss(STUDENT, None, mixed, ce_weight=1.0)
    assert float(found.ce) == pytest.approx(naive_ce(STUDENT, mixed), rel=1e-6)
    hard = classification_loss(STUDENT, None, LABELS, ce_weight=1.0)
    assert float(classification_loss(STUDENT, None, torch.eye(4)[LABELS], ce_weight=1.0).ce) == float(hard.ce)


def test_examples_without_a_label_are_left_out():
    labels = torch.tensor([2, -100, 3, -100, 1])
    student = STUDENT.clone().requires_grad_()
    found = classification_loss(student, TEACHER, labels, kl_weight=0.0, ce_weight=1.0)
    assert float(found.ce) == pytest.approx(naive_ce(STUDENT[::2], torch.eye(4)[labels[::2]]), rel=1e-6)
    found.total.backward()
    assert (student.grad[1::2] == 0).all() and (student.grad[::2] != 0).all()
    nothing = classification_loss(student, None, torch.full((5,), -100), ce_weight=1.0)
    assert float(nothing.total.detach()) == 0.0


def test_gradients_are_those_of_finite_differences():
    def total(student: Tensor) -> Tensor:
        return classification_loss(student, TEACHER, MIXED, temperature=2.0, kl_weight=0.7, ce_weight=0.3).total

    assert torch.autograd.gradcheck(total, STUDENT.clone().requires_grad_())


def test_the_teacher_gets_no_gradient():
    teacher = TEACHER.clone().requires_grad_()
    classification_loss(STUDENT.clone().requires_grad_(), teacher, LABELS).total.backward()
    assert teacher.grad is None


def test_half_precision_is_summed_in_float32():
    student, teacher = (x.repeat(200, 1).to(torch.bfloat16) for x in (STUDENT, TEACHER))
    found = classification_loss(student, teacher, LABELS.repeat(200), ce_weight=1.0)
    assert found.total.dtype == found.kl.dtype == torch.float32
    assert float(found.kl) == pytest.approx(naive_kl(student.double(), teacher.double()), rel=1e-4)


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_large_logits_stay_finite(scale):
    student = (scale * STUDENT).float().requires_grad_()
    found = classification_loss(student, (-scale * STUDENT).float(), LABELS, ce_weight=1.0)
    found.total.backward()
    assert found.total.isfinite() and student.grad.isfinite().all()


def test_parts_are_sums_over_examples():
    whole = classification_loss(STUDENT, TEACHER, LABELS, ce_weight=1.0)
    pieces = [classification_loss(STUDENT[i], TEACHER[i], LABELS[i], ce_weight=1.0) for i in (slice(2), slice(2, 5))]
    for name in ("total", "kl", "ce", "agreement"):
        torch.testing.assert_close(sum(getattr(piece, name) for piece in pieces), getattr(whole, name))


def test_another_number_of_classes_is_an_error():
    with pytest.raises(ValueError) as error:
        classification_loss(STUDENT, logits(1, classes=3))
    assert all(word in str(error.value) for word in ("(5, 3)", "(5, 4)", "kl_weight=0.0"))


def test_a_cross_entropy_without_labels_is_an_error():
    with pytest.raises(ValueError, match="labels are missing.*ce_weight=0.0"):
        classification_loss(STUDENT, TEACHER, ce_weight=0.5)
    assert float(classification_loss(STUDENT, TEACHER).ce) == 0.0
