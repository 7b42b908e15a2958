"""Kernels under `torch.compile`: operators whose kernels are, without a GPU, the torch path in disguise."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import MIXER_TYPES, largest_difference, random_ids, tiny_model
from tiny_ssm import conv_arguments, default_backend, s6_arguments, ssd_arguments  # noqa: F401

from cab_hf.models import ssm_kernels, ssm_ops
from cab_hf.models.kernel_operators import kernel_operator


@pytest.fixture
def disguised(monkeypatch):
    """Makes `backend_for` choose kernels on a CPU, each kernel the torch path, and each gradient the torch path's."""
    chosen = ["mamba_ssm"]

    def on_torch(operation):
        def run(*given, **options):
            before, chosen[:] = list(chosen), ["torch"]
            try:
                return operation(*given, **options)
            finally:
                chosen[:] = before

        return run

    def scan_with_states(tensors, number):
        y, state = ssm_kernels._selective_scan_kernel(*tensors)
        return y, state, torch.zeros_like(ssm_kernels._empty_selective_scan(tensors, number)[2])

    monkeypatch.setattr(ssm_ops, "backend_for", lambda *given, **options: chosen[0])
    monkeypatch.setattr(ssm_kernels, "_TRAINS_BY_OPERATORS", True)
    monkeypatch.setattr(ssm_kernels, "_conv_kernel", on_torch(ssm_ops.causal_conv1d))
    monkeypatch.setattr(ssm_kernels, "_selective_scan_kernel", on_torch(ssm_ops.selective_scan))
    monkeypatch.setattr(ssm_kernels, "_selective_scan", scan_with_states)
    monkeypatch.setattr(ssm_kernels, "_ssd_kernel", on_torch(ssm_ops.ssd_scan))

    def gradient_of(kernel):
        def differentiate(grads, tensors, results, number):
            floating = [one for one in tensors if one is not None and one.is_floating_point()]
            leaves = {id(one): one.detach().requires_grad_() for one in floating}
            made = kernel([leaves.get(id(one), one) for one in tensors], number)
            reached = [(one, grad) for one, grad in zip(made, grads) if grad is not None]
            outputs, of_outputs = zip(*reached)
            return torch.autograd.grad(outputs, list(leaves.values()), of_outputs, allow_unused=True)

        # an operator keeps autograd out of its thread
        return lambda *given: ThreadPoolExecutor(1).submit(differentiate, *given).result()

    kernels = {
        "_conv_gradient": ssm_kernels._conv,
        "_selective_scan_gradient": lambda tensors, _: ssm_kernels._selective_scan_kernel(*tensors),
        "_ssd_gradient": lambda tensors, size: ssm_kernels._ssd_kernel(*tensors[:6], size, *tensors[6:]),
    }
    for name, kernel in kernels.items():
        monkeypatch.setattr(ssm_kernels, name, gradient_of(kernel))


def given(arguments: dict, *names: str) -> list:
    return [arguments.get(name) for name in names]


@pytest.mark.parametrize("operation", ssm_kernels.OPERATIONS)
def test_operators_are_sound(operation, disguised):
    conv, s6, ssd = conv_arguments(5), s6_arguments(5), ssd_arguments(5)
    operator, tensors, number = {
        "causal_conv1d": (ssm_kernels._conv_operator, [*given(conv, "x", "weight", "bias"), None, None], 1),
        "selective_scan": (ssm_kernels._selective_scan_operator, given(s6, "x", "dt", "A", "B", "C"), 0),
        "ssd_scan": (ssm_kernels._ssd_operator, [*given(ssd, "x", "dt", "A", "B", "C", "D"), None, None], 4),
    }[operation]
    tensors = [None if one is None else one.detach().float().requires_grad_() for one in tensors]
    torch.library.opcheck(operator, (*tensors, number))


@pytest.mark.parametrize("mixer_type", MIXER_TYPES)
def test_a_whole_graph_holds_kernels_and_their_gradients(mixer_type, disguised):
    torch.compiler.reset()
    ids = random_ids(2, 11)
    found = []
    for compiles in (False, True):
        model = tiny_model(mixer_type=mixer_type).train()
        call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiles else model
        output = call(input_ids=ids, labels=ids, use_cache=False)
        output.loss.backward()
        found.append((output.logits, {name: one.grad for name, one in model.named_parameters()}))
    (right, gradients), (got, compiled_gradients) = found
    assert largest_difference(got, right) < 1e-5
    for name, gradient in gradients.items():
        assert largest_difference(compiled_gradients[name], gradient) < 1e-4, name


@torch.no_grad()
@pytest.mark.parametrize("mixer_type", MIXER_TYPES)
def test_a_whole_graph_decodes(mixer_type, disguised):
    torch.compiler.reset()
    model, ids = tiny_model(mixer_type=mixer_type), random_ids(2, 9)
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    cache = model(ids[:, :6], use_cache=True).cache
    got = [step(ids[:, t : t + 1], cache=cache).logits for t in range(6, 9)]
    assert largest_difference(torch.cat(got, dim=1), model(ids).logits[:, 6:]) < 1e-4


def test_a_result_that_nobody_used_has_no_gradient_to_compute():
    found = []

    def gradient(grads, tensors, kept, number):
        found.append([grad is not None for grad in grads])
        return [2 * kept[0] * grads[0]]

    operator = kernel_operator(
        "for_a_test",
        1,
        3,
        lambda tensors, _: (tensors[0] ** 2, tensors[0].exp(), tensors[0].clone()),
        gradient,
        lambda tensors, _: tuple(torch.empty_like(tensors[0]) for _ in range(3)),
        kept=(2,),
    )

    def first(x):
        return operator(x, 0)[0]

    x = torch.tensor([1.0, 3.0], requires_grad=True)
    torch.compiler.reset()
    for call in (first, torch.compile(first, fullgraph=True, backend="aot_eager")):
        assert torch.autograd.grad(call(x).sum(), x)[0].tolist() == [2.0, 6.0]
    assert found == [[True, False, False]] * 2
