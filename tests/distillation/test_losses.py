"""Losses on states, maps and weights: against formulas, their limits, masks and finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F

from cab_hf.distillation.losses import (
    attention_loss,
    hidden_loss,
    loss_weight,
    mean_square,
    output_loss,
    target_map,
)


def gradients(loss, inputs):
    return torch.autograd.grad(loss, inputs)


squared_losses = [hidden_loss, output_loss]


@pytest.mark.parametrize("loss", squared_losses)
@pytest.mark.parametrize("relative", [False, True])
def test_squared_error_equals_its_formula(loss, relative):
    torch.manual_seed(0)
    student = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    teacher = 3 * torch.randn(2, 5, 2, 3, dtype=torch.float64)
    if loss is not output_loss:
        teacher = teacher.flatten(2)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    real = mask.bool()
    flat = teacher.reshape(2, 5, 6)
    truth = ((student - flat) ** 2)[real].sum() / 6
    if relative:
        truth = truth / (flat[real] ** 2).mean()
    ours = loss(student, teacher, mask, relative=relative)
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(ours, [student]), gradients(truth, [student]), rtol=1e-12, atol=0)
    assert loss(student, teacher, mask, relative=relative).dtype == torch.float64


@pytest.mark.parametrize("loss", squared_losses)
def test_squared_error_is_zero_at_identity_and_for_no_tokens(loss):
    x = torch.randn(2, 3, 4, requires_grad=True)
    for mask in (None, torch.zeros(2, 3)):
        value = loss(x, x.detach(), mask)
        assert value.item() == 0.0
        assert torch.equal(gradients(value, [x])[0], torch.zeros_like(x))
    for relative in (False, True):
        empty = torch.zeros(2, 0, 4, requires_grad=True)
        assert loss(empty, torch.zeros(2, 0, 4), torch.zeros(2, 0), relative=relative).item() == 0.0
        nothing = loss(x, torch.full((2, 3, 4), float("nan")), torch.zeros(2, 3), relative=relative)
        assert nothing.item() == 0.0
        assert torch.equal(gradients(nothing, [x])[0], torch.zeros_like(x))


@pytest.mark.parametrize("loss", squared_losses)
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_squared_error_ignores_masked_tokens(loss, relative, garbage):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 6, requires_grad=True), torch.randn(2, 5, 6)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    clean = loss(student, teacher, mask, relative=relative)
    hidden = mask[..., None] == 0
    spoilt_student = student.detach().masked_fill(hidden, garbage).requires_grad_()
    spoilt = loss(spoilt_student, teacher.masked_fill(hidden, garbage), mask, relative=relative)
    assert spoilt.item() == clean.item()
    assert torch.equal(gradients(spoilt, [spoilt_student])[0], gradients(clean, [student])[0])


@pytest.mark.parametrize("relative", [False, True])
def test_squared_error_per_token_depends_on_no_size(relative):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    value = hidden_loss(student, teacher, relative=relative) / 10
    for repeats in ((3, 1, 1), (1, 3, 1), (1, 1, 3)):
        wide_student, wide_teacher = student.repeat(repeats), teacher.repeat(repeats)
        tokens = wide_student.shape[0] * wide_student.shape[1]
        torch.testing.assert_close(hidden_loss(wide_student, wide_teacher, relative=relative) / tokens, value)


def test_fixed_scale_makes_relative_loss_independent_of_accumulation():
    torch.manual_seed(0)
    student, teacher = torch.randn(8, 5, 6), torch.randn(8, 5, 6) * torch.arange(1, 9)[:, None, None]
    mask = (torch.arange(5) < torch.tensor([5, 1, 3, 2, 5, 4, 1, 2])[:, None]).long()
    scale = mean_square(teacher, mask)
    whole = hidden_loss(student, teacher, mask, relative=True)
    for rows in (1, 2, 4):
        parts = [
            hidden_loss(*(x[i : i + rows] for x in (student, teacher, mask)), relative=scale)
            for i in range(0, 8, rows)
        ]
        torch.testing.assert_close(torch.stack(parts).sum(), whole)


def test_relative_loss_ignores_scale():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    value = output_loss(student, teacher)
    for factor in (1e-3, 1e3):
        torch.testing.assert_close(output_loss(student * factor, teacher * factor), value)
    torch.testing.assert_close(output_loss(torch.zeros_like(teacher), teacher) / 10, torch.tensor(1.0))


def test_squared_error_finite_differences():
    torch.manual_seed(0)
    student = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 3, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    for relative in (False, True):
        assert torch.autograd.gradcheck(lambda x, r=relative: hidden_loss(x, teacher, mask, relative=r), [student])


def test_squared_error_of_bfloat16_sums_in_float32():
    torch.manual_seed(0)
    student = torch.randn(4, 300, 32).bfloat16().requires_grad_()
    teacher = torch.randn(4, 300, 32).bfloat16()
    value = hidden_loss(student, teacher, relative=False)
    truth = ((student.double() - teacher.double()) ** 2).mean(-1).sum()
    assert value.dtype == torch.float32
    assert abs(value.item() / truth.item() - 1) < 1e-3
    (gradient,) = gradients(value, [student])
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.double(), 2 / 32 * (student - teacher).double(), rtol=0.02, atol=1e-6)


def test_targets_get_no_gradient():
    student, teacher = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    for loss in squared_losses:
        loss(student, teacher).backward()
    assert teacher.grad is None and student.grad is not None


def test_squared_error_names_sizes_that_differ():
    with pytest.raises(ValueError, match=r"student_output is \(2, 3, 4\) and teacher_output is \(2, 3, 6\)"):
        output_loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, 2, 3))
    with pytest.raises(ValueError, match=r"student is \(2, 3, 4\) and teacher is \(2, 1, 4\)"):
        hidden_loss(torch.zeros(2, 3, 4), torch.zeros(2, 1, 4))


def naive_attention_loss(student_map, teacher_map, mask):
    batch, heads, tokens, _ = student_map.shape
    total = torch.zeros((), dtype=torch.float64)
    for b in range(batch):
        real = [i for i in range(tokens) if mask[b, i]]
        for h in range(heads):
            for i in real:
                total = total + ((student_map[b, h, i, real] - teacher_map[b, h, i, real]) ** 2).sum() / heads
    return total


def make_maps_problem(dtype=torch.float64):
    torch.manual_seed(0)
    student_map = torch.rand(2, 4, 5, 5, dtype=dtype, requires_grad=True)
    teacher_map = torch.randn(2, 4, 5, 5, dtype=dtype).softmax(-1)
    return student_map, teacher_map, torch.tensor([[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]])


def test_attention_loss_equals_naive():
    student_map, teacher_map, mask = make_maps_problem()
    for given_mask, full_mask in ((mask, mask), (None, torch.ones_like(mask))):
        ours = attention_loss(student_map, teacher_map, given_mask)
        truth = naive_attention_loss(student_map, teacher_map, full_mask)
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=0)
        torch.testing.assert_close(gradients(ours, [student_map]), gradients(truth, [student_map]))
    assert torch.autograd.gradcheck(lambda x: attention_loss(x, teacher_map, mask), [student_map])


def test_attention_loss_is_zero_at_the_teachers_map_and_blind_to_padding():
    student_map, teacher_map, mask = make_maps_problem(torch.float32)
    padding = (mask[:, None, :, None] == 0) | (mask[:, None, None, :] == 0)
    spoilt_teacher = teacher_map.masked_fill(padding, math.nan)  # rows that see nothing may hold anything
    assert attention_loss(teacher_map, spoilt_teacher, mask) < 1e-12
    clean = attention_loss(student_map, teacher_map, mask)
    spoilt_map = student_map.detach().masked_fill(padding, math.nan).requires_grad_()
    spoilt = attention_loss(spoilt_map, spoilt_teacher, mask)
    assert spoilt.item() == clean.item()
    assert torch.equal(gradients(spoilt, [spoilt_map])[0], gradients(clean, [student_map])[0])
    nothing = attention_loss(spoilt_map, spoilt_teacher, torch.zeros_like(mask))
    assert nothing.item() == 0 and gradients(nothing, [spoilt_map])[0].abs().max() == 0


def test_attention_loss_names_sizes_that_differ():
    student_map, teacher_map, _ = make_maps_problem()
    with pytest.raises(ValueError, match=r"student_map is \(2, 2, 5, 5\).*as many heads"):
        attention_loss(student_map[:, :2], teacher_map)


@pytest.mark.parametrize("shape", [(2, 5, 6), (2, 3, 5, 2)])
def test_target_maps(shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]])
    real = mask.bool().view(2, *[1] * (x.ndim - 3), 5, 1).expand(shape)
    spoilt = x.masked_fill(~real, math.nan)

    query = target_map(spoilt, "softmax", "query", mask)
    torch.testing.assert_close(query, torch.where(real, x.softmax(-1), 0))
    key = target_map(spoilt, "softmax", "key", mask)
    torch.testing.assert_close(key, x.masked_fill(~real, -math.inf).softmax(-2))
    torch.testing.assert_close(target_map(x, "softmax", "key"), x.softmax(-2))
    for kind, function in (("relu", F.relu), ("exp", torch.exp), ("elu1", lambda v: F.elu(v) + 1)):
        for role in ("key", "query"):
            torch.testing.assert_close(target_map(spoilt, kind, role, mask), torch.where(real, function(x), 0))
    assert target_map(x, "none", "key") is not None and torch.equal(target_map(x, "none", "key"), x)


def test_target_map_of_nothing_and_other_layouts():
    x = torch.randn(2, 5, 3, 4)  # (b, t, h, p)
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 0, 0, 0, 0]])
    key = target_map(x, "softmax", "key", mask, token_dim=1)
    assert torch.equal(key[1], torch.zeros_like(key[1])) and torch.equal(key[0, 4], torch.zeros(3, 4))
    torch.testing.assert_close(key[0, :4], x[0, :4].softmax(0))
    assert target_map(x.bfloat16(), "softmax", "query").dtype == torch.bfloat16
    with pytest.raises(ValueError, match="'tanh' is unknown.*'softmax'"):
        target_map(x, "tanh", "key")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"progress": 0.9}, 2.0),
        ({"progress": 0.29, "end": 0.3}, 2.0),
        ({"progress": 0.3, "end": 0.3}, 0.0),
        ({"progress": 1.0, "end": 0.3}, 0.0),
        ({"progress": 0.0, "decay": "linear"}, 2.0),
        ({"progress": 0.25, "decay": "linear"}, 1.5),
        ({"progress": 0.25, "end": 0.5, "decay": "linear"}, 1.0),
        ({"progress": 0.25, "end": 0.5, "decay": "cosine"}, 1.0),
        ({"progress": 0.5, "end": 0.5, "decay": "cosine"}, 0.0),
        ({"progress": 1.2, "decay": "linear"}, 0.0),
    ],
)
def test_loss_weight(arguments, expected):
    assert loss_weight(2.0, **arguments) == pytest.approx(expected)


def test_loss_weight_never_rises():
    for decay in ("linear", "cosine"):
        values = [loss_weight(1.0, i / 100, 0.7, decay) for i in range(101)]
        assert values == sorted(values, reverse=True) and values[0] == 1.0 and values[70:] == [0.0] * 31
