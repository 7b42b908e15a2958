"""Chunked KL and cross-entropy against dense logits, in value, gradient, masks and memory."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cab_hf.distillation.losses import attention_loss, chunked_kl_ce, hidden_loss, target_map


class WrappedLinear(nn.Module):
    """A head that is no plain linear layer, so that it must be called."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.base = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x)


def dense_kl_ce(student_logits, teacher_logits, mask=None, labels=None, temperature=1.0):
    """KL(teacher || student) T^2 and cross-entropy over full logits, summed over their tokens."""
    width = min(student_logits.shape[-1], teacher_logits.shape[-1])
    student_logits, teacher_logits = student_logits[..., :width], teacher_logits[..., :width]
    rows = F.kl_div(
        F.log_softmax(student_logits / temperature, -1),
        F.softmax(teacher_logits / temperature, -1),
        reduction="none",
    ).sum(-1)
    kl = rows[mask.bool()].sum() if mask is not None else rows.sum()
    ce = student_logits.sum() * 0
    if labels is not None:
        ce = F.cross_entropy(student_logits.reshape(-1, width), labels.reshape(-1), reduction="sum")
    return kl * temperature**2, ce


def make_logits_problem(
    dtype=torch.float32, vocabularies=(37, 37), bias=False, batch=3, tokens=7, widths=(6, 5), trained_head=True
):
    torch.manual_seed(0)
    student_head = nn.Linear(widths[0], vocabularies[0], bias=bias, dtype=dtype).requires_grad_(trained_head)
    teacher_head = nn.Linear(widths[1], vocabularies[1], bias=bias, dtype=dtype).requires_grad_(False)
    student_hidden = (2 * torch.randn(batch, tokens, widths[0], dtype=dtype)).requires_grad_()
    teacher_hidden = 2 * torch.randn(batch, tokens, widths[1], dtype=dtype)
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[0, :3] = 0
    mask[-1, 5:] = 0
    labels = torch.randint(0, min(vocabularies), (batch, tokens))
    labels[mask == 0] = -100
    labels[:, -1] = -100
    return student_hidden, student_head, teacher_hidden, teacher_head, mask, labels


def gradients(loss, inputs):
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("plain", [True, False], ids=["linear", "module"])
@pytest.mark.parametrize("chunk_size", [1, 4, 21, 1000])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("vocabularies", "bias"), [((37, 37), True), ((40, 37), False), ((37, 41), True)])
@pytest.mark.parametrize(("kl_weight", "ce_weight"), [(1.0, 0.0), (0.0, 1.0), (0.7, 0.5)])
def test_chunked_equals_dense(plain, chunk_size, temperature, vocabularies, bias, kl_weight, ce_weight):
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
        hidden, head, teacher_hidden, teacher_head, mask, labels = make_logits_problem(dtype, vocabularies, bias)
        inputs = [hidden, *head.parameters()]
        result = chunked_kl_ce(
            hidden,
            head if plain else WrappedLinear(head),
            teacher_hidden,
            teacher_head,
            mask=mask,
            labels=labels,
            temperature=temperature,
            kl_weight=kl_weight,
            ce_weight=ce_weight,
            chunk_size=chunk_size,
            vocab_size=None if kl_weight else min(vocabularies),
        )
        kl, ce = dense_kl_ce(head(hidden), teacher_head(teacher_hidden), mask, labels, temperature)
        total = kl_weight * kl + ce_weight * ce
        count = mask.sum()
        torch.testing.assert_close(result.total / count, total / count, rtol=tolerance, atol=tolerance)
        if kl_weight:
            torch.testing.assert_close(result.kl / count, kl / count, rtol=tolerance, atol=tolerance)
        if ce_weight:
            torch.testing.assert_close(result.ce / count, ce / count, rtol=tolerance, atol=tolerance)
        assert result.total.dtype == dtype
        ours, truth = gradients(result.total / count, inputs), gradients(total / count, inputs)
        for mine, theirs in zip(ours, truth):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("plain", [True, False], ids=["linear", "module"])
def test_padded_rows_of_the_head_get_no_gradient(plain):
    hidden, head, teacher_hidden, teacher_head, mask, labels = make_logits_problem(vocabularies=(40, 37))
    result = chunked_kl_ce(
        hidden, head if plain else WrappedLinear(head), teacher_hidden, teacher_head, labels=labels, ce_weight=1.0
    )
    (gradient,) = gradients(result.total, [head.weight])
    assert gradient[37:].abs().max() == 0 and gradient[:37].abs().min() > 0
    smaller = chunked_kl_ce(hidden, head, teacher_hidden, teacher_head, vocab_size=11)
    kl, _ = dense_kl_ce(head(hidden)[..., :11], teacher_head(teacher_hidden)[..., :11])
    torch.testing.assert_close(smaller.kl, kl, rtol=1e-5, atol=0)


@pytest.mark.parametrize("plain", [True, False], ids=["linear", "module"])
def test_kl_is_zero_at_identity(plain):
    hidden, head, *_ = make_logits_problem()
    result = chunked_kl_ce(hidden, head if plain else WrappedLinear(head), hidden, head, agreement=True)
    assert result.kl.item() == 0.0
    assert result.agreement.item() == 21
    for gradient in gradients(result.total, [hidden, head.weight]):
        assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("plain", [True, False], ids=["linear", "module"])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_masked_tokens_have_no_effect(plain, garbage):
    hidden, head, teacher_hidden, teacher_head, mask, labels = make_logits_problem(bias=True)
    arguments = {"mask": mask, "labels": labels, "ce_weight": 0.5, "agreement": True, "chunk_size": 4}
    wrapped = head if plain else WrappedLinear(head)
    clean = chunked_kl_ce(hidden, wrapped, teacher_hidden, teacher_head, **arguments)
    clean_gradients = gradients(clean.total, [hidden, *head.parameters()])
    spoilt_hidden = hidden.detach().masked_fill(mask[..., None] == 0, garbage).requires_grad_()
    spoilt_teacher = teacher_hidden.masked_fill(mask[..., None] == 0, garbage)
    spoilt = chunked_kl_ce(spoilt_hidden, wrapped, spoilt_teacher, teacher_head, **arguments)
    assert [part.item() for part in spoilt] == [part.item() for part in clean]
    for ours, truth in zip(gradients(spoilt.total, [spoilt_hidden, *head.parameters()]), clean_gradients):
        assert torch.equal(ours, truth)
    kl_alone = chunked_kl_ce(spoilt_hidden, wrapped, spoilt_teacher, teacher_head, mask=mask).total
    (gradient,) = gradients(kl_alone, [spoilt_hidden])
    assert kl_alone.isfinite() and gradient[mask == 0].abs().max() == 0


@pytest.mark.parametrize("plain", [True, False], ids=["linear", "module"])
@pytest.mark.parametrize("tokens", [7, 0])
def test_nothing_real_gives_zero(plain, tokens):
    hidden, head, teacher_hidden, teacher_head, mask, labels = make_logits_problem(bias=True, tokens=7)
    hidden = hidden.detach()[:, :tokens].fill_(float("nan")).requires_grad_()
    result = chunked_kl_ce(
        hidden,
        head if plain else WrappedLinear(head),
        teacher_hidden[:, :tokens],
        teacher_head,
        mask=torch.zeros_like(mask)[:, :tokens],
        labels=torch.full_like(labels, -100)[:, :tokens],
        ce_weight=1.0,
        agreement=True,
    )
    assert [part.item() for part in result] == [0, 0, 0, 0]
    for gradient in gradients(result.total, [hidden, *head.parameters()]):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("plain", [True, False], ids=["linear", "module"])
def test_kl_and_ce_count_their_own_tokens(plain):
    hidden, head, teacher_hidden, teacher_head, mask, labels = make_logits_problem()
    labels = torch.where(mask == 1, -100, 3)  # cross-entropy exactly where KL is not
    result = chunked_kl_ce(
        hidden,
        head if plain else WrappedLinear(head),
        teacher_hidden,
        teacher_head,
        mask=mask,
        labels=labels,
        ce_weight=2.0,
        agreement=True,
    )
    kl, ce = dense_kl_ce(head(hidden), teacher_head(teacher_hidden), mask, labels)
    torch.testing.assert_close(result.kl, kl, rtol=1e-5, atol=0)
    torch.testing.assert_close(result.ce, ce, rtol=1e-5, atol=0)
    agreeing = (head(hidden).argmax(-1) == teacher_head(teacher_hidden).argmax(-1)) & (mask == 1)
    assert result.agreement == agreeing.sum()
    for ours, truth in zip(
        gradients(result.total, [hidden, head.weight]), gradients(kl + 2 * ce, [hidden, head.weight])
    ):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)


def test_agreement_beside_cross_entropy_alone():
    hidden, head, teacher_hidden, teacher_head, mask, labels = make_logits_problem()
    result = chunked_kl_ce(
        hidden,
        head,
        teacher_hidden,
        teacher_head,
        mask=1 - mask,
        labels=labels,
        kl_weight=0.0,
        ce_weight=1.0,
        agreement=True,
    )
    _, ce = dense_kl_ce(head(hidden), teacher_head(teacher_hidden), None, labels)
    agreeing = (head(hidden).argmax(-1) == teacher_head(teacher_hidden).argmax(-1)) & (mask == 0)
    assert result.kl == 0 and result.agreement == agreeing.sum()
    (ours,), (truth,) = gradients(result.total, [head.weight]), gradients(ce, [head.weight])
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)


def test_cross_entropy_needs_no_teacher():
    hidden, head, *_, labels = make_logits_problem()
    result = chunked_kl_ce(hidden, head, labels=labels, kl_weight=0.0, ce_weight=1.0)
    torch.testing.assert_close(result.ce, dense_kl_ce(head(hidden), head(hidden), None, labels)[1])


def test_evaluation_and_frozen_heads_get_no_gradient():
    hidden, head, teacher_hidden, teacher_head, mask, labels = make_logits_problem(trained_head=False, bias=True)
    result = chunked_kl_ce(hidden, head, teacher_hidden, teacher_head, mask=mask)
    result.total.backward()
    assert head.weight.grad is None and head.bias.grad is None and hidden.grad.abs().max() > 0
    with torch.no_grad():
        frozen = chunked_kl_ce(hidden, head, teacher_hidden, teacher_head, mask=mask, labels=labels, ce_weight=1.0)
        module = chunked_kl_ce(
            hidden, WrappedLinear(head), teacher_hidden, teacher_head, mask=mask, labels=labels, ce_weight=1.0
        )
    assert not frozen.total.requires_grad and not module.total.requires_grad
    torch.testing.assert_close(frozen.kl, result.kl)
    torch.testing.assert_close(tuple(frozen), tuple(module))


def test_parts_are_detached_and_backward_can_repeat():
    hidden, head, teacher_hidden, teacher_head, mask, labels = make_logits_problem()
    for student_head in (head, WrappedLinear(head)):
        result = chunked_kl_ce(hidden, student_head, teacher_hidden, teacher_head, labels=labels, ce_weight=0.5)
        assert not (result.kl.requires_grad or result.ce.requires_grad or result.agreement.requires_grad)
    result = chunked_kl_ce(hidden, head, teacher_hidden, teacher_head)
    first = torch.autograd.grad(result.total, [hidden], retain_graph=True)[0]
    second = torch.autograd.grad(3 * result.total, [hidden])[0]
    torch.testing.assert_close(second, 3 * first)


@pytest.mark.parametrize("plain", [True, False], ids=["linear", "module"])
def test_weights_may_be_tensors(plain):
    hidden, head, teacher_hidden, teacher_head, mask, labels = make_logits_problem()
    student_head = head if plain else WrappedLinear(head)
    inputs = (hidden, student_head, teacher_hidden, teacher_head)
    numbers = chunked_kl_ce(*inputs, mask=mask, labels=labels, kl_weight=0.3, ce_weight=0.6)
    weights = [torch.tensor(0.3, requires_grad=True), torch.tensor(0.6)]
    tensors = chunked_kl_ce(*inputs, mask=mask, labels=labels, kl_weight=weights[0], ce_weight=weights[1])
    torch.testing.assert_close(tuple(tensors), tuple(numbers))
    torch.testing.assert_close(gradients(tensors.total, [hidden]), gradients(numbers.total, [hidden]))
    zero = chunked_kl_ce(*inputs, labels=labels, ce_weight=torch.tensor(0.0))
    assert zero.ce > 0
    torch.testing.assert_close(zero.total, zero.kl)


def test_tied_weights_collect_both_gradients():
    hidden, head, teacher_hidden, teacher_head, mask, _ = make_logits_problem()
    embedding = nn.Embedding(37, 6)
    embedding.weight = head.weight
    tokens = torch.randint(0, 37, (3, 7))
    chunked_kl_ce(embedding(tokens) * 3, head, teacher_hidden, teacher_head, mask=mask, chunk_size=4).total.backward()
    ours = embedding.weight.grad.clone()
    embedding.weight.grad = None
    dense_kl_ce(head(embedding(tokens) * 3), teacher_head(teacher_hidden), mask)[0].backward()
    torch.testing.assert_close(ours, embedding.weight.grad, rtol=1e-5, atol=1e-5)


def test_given_logits_need_no_head():
    hidden, head, teacher_hidden, teacher_head, mask, labels = make_logits_problem()
    teacher_logits = teacher_head(teacher_hidden)
    truth = chunked_kl_ce(hidden, head, teacher_hidden, teacher_head, mask=mask)
    spoilt = teacher_logits.masked_fill(mask[..., None] == 0, float("nan"))
    torch.testing.assert_close(chunked_kl_ce(hidden, head, spoilt, mask=mask).kl, truth.kl)
    both = chunked_kl_ce(head(hidden), None, spoilt, mask=mask)
    torch.testing.assert_close(both.kl, truth.kl)
    torch.testing.assert_close(gradients(both.total, [hidden]), gradients(truth.total, [hidden]))


@pytest.mark.parametrize("plain", [True, False], ids=["linear", "module"])
def test_impossible_teacher_tokens_add_nothing(plain):
    hidden, head, _, _, _, _ = make_logits_problem()
    teacher_logits = torch.randn(3, 7, 37)
    teacher_logits[..., 5:] = -math.inf
    result = chunked_kl_ce(hidden, head if plain else WrappedLinear(head), teacher_logits)
    probabilities = teacher_logits[..., :5].softmax(-1)
    student = head(hidden).log_softmax(-1)[..., :5]
    truth = (probabilities * (probabilities.log() - student)).sum()
    torch.testing.assert_close(result.kl, truth)
    torch.testing.assert_close(gradients(result.total, [hidden]), gradients(truth, [hidden]), rtol=1e-4, atol=1e-5)


def test_classifier_logits_of_one_row_an_example():
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 11, requires_grad=True), torch.randn(5, 11)
    result = chunked_kl_ce(student, None, teacher)
    truth = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
    torch.testing.assert_close(result.total / 5, truth)


def test_finite_differences_of_chunked_kl_ce():
    hidden, head, teacher_hidden, teacher_head, mask, labels = make_logits_problem(
        torch.float64, (11, 9), bias=True, batch=2, tokens=3
    )

    def total(hidden, weight, bias):
        head.weight, head.bias = nn.Parameter(weight), nn.Parameter(bias)
        del head._parameters["weight"], head._parameters["bias"]
        head.weight, head.bias = weight, bias
        return chunked_kl_ce(
            hidden,
            head,
            teacher_hidden,
            teacher_head,
            mask=mask[:2, :3],
            labels=labels[:2, :3],
            temperature=1.7,
            kl_weight=0.3,
            ce_weight=0.9,
            chunk_size=2,
        ).total

    inputs = [hidden, head.weight.detach().clone().requires_grad_(), head.bias.detach().clone().requires_grad_()]
    assert torch.autograd.gradcheck(total, inputs)


@pytest.mark.parametrize("plain", [True, False], ids=["linear", "module"])
def test_bfloat16_sums_in_float32(plain):
    hidden, head, teacher_hidden, teacher_head, mask, labels = make_logits_problem(torch.bfloat16, bias=True)
    student_head = head if plain else WrappedLinear(head)
    result = chunked_kl_ce(
        hidden, student_head, teacher_hidden, teacher_head, mask=mask, labels=labels, ce_weight=0.5, chunk_size=4
    )
    # the logits are what bfloat16 makes of them; everything after is exact
    logits = head(hidden).float().detach().requires_grad_()
    kl, ce = dense_kl_ce(logits, teacher_head(teacher_hidden).float(), mask, labels)
    assert result.total.dtype == torch.float32
    torch.testing.assert_close(result.kl, kl, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.ce, ce, rtol=1e-5, atol=1e-5)
    by_logits = gradients(kl + 0.5 * ce, [logits])[0]
    by_hidden, by_weight, by_bias = gradients(result.total, [hidden, head.weight, head.bias])
    assert by_hidden.dtype == by_weight.dtype == torch.bfloat16
    for ours, truth in (
        (by_hidden, by_logits @ head.weight.float()),
        (by_weight, by_logits.flatten(0, 1).T @ hidden.flatten(0, 1).float()),
        (by_bias, by_logits.sum((0, 1))),
    ):
        assert (ours.float() - truth).norm() < 0.01 * truth.norm()


@pytest.mark.parametrize("plain", [True, False], ids=["linear", "module"])
def test_autocast_multiplies_in_bfloat16(plain):
    hidden, head, teacher_hidden, teacher_head, mask, labels = make_logits_problem(bias=True)
    inputs = [hidden, *head.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        result = chunked_kl_ce(
            hidden,
            head if plain else WrappedLinear(head),
            teacher_hidden,
            teacher_head,
            mask=mask,
            labels=labels,
            ce_weight=0.5,
            chunk_size=5,
        )
        student_logits, teacher_logits = head(hidden), teacher_head(teacher_hidden)
        assert student_logits.dtype == torch.bfloat16
        kl, ce = dense_kl_ce(student_logits.float(), teacher_logits.float(), mask, labels)
    torch.testing.assert_close(result.kl, kl, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.ce, ce, rtol=1e-5, atol=1e-5)
    for ours, truth in zip(gradients(result.total, inputs), gradients(kl + 0.5 * ce, inputs)):
        assert ours.dtype == torch.float32
        assert (ours - truth).norm() < 0.01 * truth.norm()


@pytest.mark.parametrize("ce_weight", [0.0, 5e-9])
def test_tiny_weights_keep_half_precision_gradients(ce_weight):
    hidden, head, teacher_hidden, teacher_head, _, labels = make_logits_problem(torch.float16)
    inputs = (hidden, head, teacher_hidden, teacher_head)
    usual = chunked_kl_ce(*inputs, labels=labels, kl_weight=1.0, ce_weight=ce_weight * 1e8).total
    tiny = chunked_kl_ce(*inputs, labels=labels, kl_weight=1e-8, ce_weight=ce_weight).total
    for ours, truth in zip(gradients(tiny * 1e8, [hidden, head.weight]), gradients(usual, [hidden, head.weight])):
        assert (ours - truth).float().norm() < 2e-3 * truth.float().norm()


def test_hooks_on_the_head_are_honoured():
    hidden, head, teacher_hidden, teacher_head, *_ = make_logits_problem()
    truth = dense_kl_ce(2 * head(hidden), teacher_head(teacher_hidden))[0]
    handle = head.register_forward_hook(lambda module, inputs, output: 2 * output)
    torch.testing.assert_close(chunked_kl_ce(hidden, head, teacher_hidden, teacher_head, chunk_size=4).kl, truth)
    handle.remove()


@pytest.mark.parametrize("plain", [True, False], ids=["linear", "module"])
def test_no_tensor_of_all_logits(plain):
    tokens, vocabulary, chunk = 64, 501, 8
    hidden, head, teacher_hidden, teacher_head, *_ = make_logits_problem(
        vocabularies=(vocabulary, vocabulary), batch=1, tokens=tokens
    )
    largest = 0

    class WatchSizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            output = function(*args, **(kwargs or {}))
            for tensor in output if isinstance(output, (tuple, list)) else [output]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return output

    with WatchSizes():
        chunked_kl_ce(
            hidden, head if plain else WrappedLinear(head), teacher_hidden, teacher_head, chunk_size=chunk
        ).total.backward()
    assert largest <= max(chunk * vocabulary, vocabulary * 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ce_weight": 1.0}, "labels are missing"),
        ({"teacher_hidden": None}, "teacher_hidden is missing"),
        ({"mask": torch.ones(3, 6)}, r"mask is over tokens \(3, 6\).*\(3, 7\)"),
        ({"teacher_hidden": torch.zeros(3, 6, 5)}, r"teacher_hidden is over tokens \(3, 6\).*\(3, 7\)"),
        ({"labels": torch.zeros(3, 6).long(), "ce_weight": 1.0}, r"labels is over tokens \(3, 6\)"),
        ({"vocab_size": 38}, "vocab_size is 38.*only 37"),
    ],
)
def test_bad_logits_arguments_are_named(change, message):
    hidden, head, teacher_hidden, teacher_head, *_ = make_logits_problem()
    arguments = {
        "student_hidden": hidden,
        "student_head": head,
        "teacher_hidden": teacher_hidden,
        "teacher_head": teacher_head,
    }
    with pytest.raises(ValueError, match=message):
        chunked_kl_ce(**(arguments | change))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("autocast", [False, True])
def test_losses_run_in_a_cuda_graph(autocast):
    hidden, head, teacher_hidden, teacher_head, mask, labels = make_logits_problem(bias=True)
    head, teacher_head = head.cuda(), teacher_head.cuda()
    hidden = hidden.detach().cuda().requires_grad_()
    teacher_hidden, mask, labels = teacher_hidden.cuda(), mask.cuda(), labels.cuda()
    states = torch.randn(3, 7, 4, 6, device="cuda")  # (b, t, h, p)
    weights = torch.tensor([0.7, 0.3], device="cuda")

    def step():
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            result = chunked_kl_ce(
                hidden,
                head,
                teacher_hidden,
                teacher_head,
                mask=mask,
                labels=labels,
                kl_weight=weights[0],
                ce_weight=weights[1],
                agreement=True,
                chunk_size=4,
            )
        target = target_map(states.flatten(2), "softmax", "key", mask)
        total = result.total + hidden_loss(hidden.repeat(1, 1, 4), target, mask, relative=True)
        heads = states.transpose(1, 2)
        maps = hidden.sum(-1)[:, None, :, None].expand(3, 4, 7, 7)
        total = total + attention_loss(maps, (heads @ heads.mT).softmax(-1), mask)
        return total, torch.autograd.grad(total, [hidden, *head.parameters()])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        hidden.mul_(0.5)
        mask[0, 3] = 0
        weights[0] = 0.2
    graph.replay()
    torch.testing.assert_close(captured, step())


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("kl_weight, agreement", [(1.0, False), (0.0, True)])
@pytest.mark.parametrize("trains", [True, False])
def test_a_label_that_the_teacher_lacks_is_named(plain, kl_weight, agreement, trains):
    """Among the student's further rows; alone, cross-entropy is over all of them."""
    hidden, head, teacher_hidden, teacher_head, _, labels = make_logits_problem(vocabularies=(40, 37))
    head = head if plain else nn.Sequential(head)
    labels[1, 2] = 38
    chunked_kl_ce(hidden, head, labels=labels, kl_weight=0.0, ce_weight=1.0)
    options = {"labels": labels, "kl_weight": kl_weight, "agreement": agreement, "ce_weight": 1.0}
    with (
        torch.set_grad_enabled(trains),
        pytest.raises(ValueError, match="labels hold 38, which is none of the logits"),
    ):
        chunked_kl_ce(hidden, head, teacher_hidden, teacher_head, **options)
