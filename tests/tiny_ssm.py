"""Arguments of the state-space operations, and how results are compared."""

import pytest
import torch

from cab_hf.models import ssm_kernels


BATCH = 2
CONTEXTS = ("alone", "continued", "packed")


@pytest.fixture(autouse=True)
def default_backend(monkeypatch):
    monkeypatch.delenv(ssm_kernels.BACKEND_VARIABLE, raising=False)


def sequence_index(t: int) -> torch.Tensor:
    """One-token, short and long sequences; the second row returns to an index that it had before."""
    index = torch.zeros(BATCH, t, dtype=torch.long)
    index[0, 1:], index[0, 2:], index[0, t // 2 :] = 1, 2, 5
    index[1, t // 3 : 2 * t // 3] = 3
    return index


def conv_arguments(t: int, context: str = "alone", d: int = 5, k: int = 4, bias: bool = True) -> dict:
    generator = torch.Generator().manual_seed(t)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    arguments = {"x": draw(BATCH, t, d + 3)[..., 1 : d + 1], "weight": draw(d, k)}
    if bias:
        arguments["bias"] = draw(d)
    return arguments | with_context(context, t, initial_states=draw(BATCH, d, k))


def s6_arguments(t: int, context: str = "alone", d: int = 5, n: int = 3) -> dict:
    generator = torch.Generator().manual_seed(t)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    arguments = {"x": draw(BATCH, t, d), "dt": draw(BATCH, t, d).exp() / 2, "A": -draw(d, n).exp()}
    arguments |= {"B": draw(BATCH, t, n), "C": draw(BATCH, t, n), "D": draw(d)}
    return arguments | with_context(context, t, initial_state=draw(BATCH, d, n))


def ssd_arguments(t: int, context: str = "alone", h: int = 4, g: int = 2, p: int = 3, n: int = 5) -> dict:
    generator = torch.Generator().manual_seed(t)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    arguments = {"x": draw(BATCH, t, h, p), "dt": draw(BATCH, t, h).exp() / 2, "A": -draw(h).exp()}
    arguments |= {"B": draw(BATCH, t, g, n), "C": draw(BATCH, t, g, n), "D": draw(h)}
    return arguments | with_context(context, t, initial_state=draw(BATCH, h, p, n))


def with_context(context: str, t: int, **initial: torch.Tensor) -> dict:
    return {"alone": {}, "continued": initial, "packed": {"seq_idx": sequence_index(t)}}[context]


def values_and_gradients(operation, arguments: dict) -> dict[str, torch.Tensor]:
    """All outputs of `operation`, and the gradients of one random sum of them for every floating-point argument."""
    leaves = {}
    for name, value in arguments.items():
        if torch.is_tensor(value) and value.is_floating_point():
            leaves[name] = value.clone().requires_grad_()
    outputs = operation(**(arguments | leaves))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(7)
    loss = 0.0
    for output in outputs:
        weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        loss = loss + (output.double() * weights.to(output.device)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    values = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    return values | {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients)}


def assert_matches(operation, truth, arguments: dict, tolerance: float = 1e-4, **options) -> None:
    actual = values_and_gradients(lambda **tensors: operation(**tensors, **options), arguments)
    expected = values_and_gradients(truth, arguments)
    for name, value in expected.items():
        assert torch.isfinite(actual[name]).all(), name
        atol = tolerance * max(1.0, value.abs().max().item())
        torch.testing.assert_close(
            actual[name].double(),
            value.double(),
            rtol=tolerance,
            atol=atol,
            msg=lambda text, name=name: f"{name}: {text}",
        )
