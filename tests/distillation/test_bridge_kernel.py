"""The bridge's kernel against float64, on a GPU or, without one, by Triton's interpreter."""

import pytest
import torch


pytest.importorskip("triton")

from reference import naive_error  # noqa: E402

from cab_hf.distillation import bridge_error, bridge_kernel  # noqa: E402
from cab_hf.distillation.bridge import ROLES, AttentionBridge, BridgePair  # noqa: E402
from cab_hf.distillation.bridge_kernel import LARGEST_HIDDEN_SIZE, ROWS, fits_kernel, fused_error  # noqa: E402


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter's products know no bfloat16.
DTYPES = {torch.float16: 1e-3, **({torch.bfloat16: 8e-3} if DEVICE == "cuda" else {})}


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-9)).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden_size", [LARGEST_HIDDEN_SIZE, 20])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("mlps", "batch", "tokens", "heads", "head_dim"),
    [(1, 2, 37, 3, 64), (2, 1, ROWS, 2, 10), (3, 3, 50, 1, 5)],
)
def test_kernel_equals_float64(dtype, hidden_size, masked, mlps, batch, tokens, heads, head_dim):
    torch.manual_seed(0)
    rows, width = batch * tokens, heads * head_dim
    product = torch.randn(mlps, rows, hidden_size, device=DEVICE).to(dtype)
    weight = (torch.randn(mlps, width, hidden_size, device=DEVICE) / hidden_size**0.5).to(dtype)
    up_bias, bias = torch.randn(mlps, hidden_size, device=DEVICE), 3 * torch.randn(mlps, width, device=DEVICE)
    scales = [*torch.rand(mlps, device=DEVICE) + 0.1]
    slopes = 2 / (width * torch.stack(scales))
    # As attention has them: heads before tokens.
    targets = [torch.randn(batch, heads, tokens, head_dim, device=DEVICE).transpose(1, 2).to(dtype) for _ in weight]
    real = torch.rand(rows, device=DEVICE) > 0.3 if masked else None

    before = (product.double() + up_bias[:, None]).requires_grad_()
    hidden = torch.nn.functional.silu(before)
    exact = hidden @ weight.double().mT + bias[:, None] - torch.stack([x.flatten(2).flatten(0, 1) for x in targets])
    if masked:
        exact = exact * real[:, None]
        for target in targets:
            target[~real.view(batch, tokens)] = torch.nan
    squares = exact.square().sum((1, 2))
    (slope,) = torch.autograd.grad((squares * slopes / 2).sum(), before)
    exact = exact * slopes[:, None, None]

    arguments = (product, up_bias, weight, bias, real)
    sums, *made = fused_error(*arguments, True, scales, targets)
    for ours, theirs in zip(made, (hidden, exact, slope), strict=True):
        assert relative_error(ours, theirs) < DTYPES[dtype]
    for ours, theirs in zip(
        sums.split([width, hidden_size, 1], dim=1), (exact.sum(1), slope.sum(1), squares[:, None])
    ):
        assert relative_error(ours, theirs) < DTYPES[dtype]
    alone, *nothing = fused_error(*arguments, False, scales, targets)
    torch.testing.assert_close(alone, sums[:, -1:])
    assert nothing == [None] * 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_loss_and_gradients_equal_float64(dtype, directions, narrow, compiled, monkeypatch):
    torch.manual_seed(0)
    inputs = 8 if narrow else 24
    trained = AttentionBridge([inputs] * 2, [12] * 2, [24] * 2, hidden_size=20, num_directions=directions).to(DEVICE)
    mask = torch.tensor([[1] * 40, [0] * 5 + [1] * 35], device=DEVICE)
    pairs = [
        BridgePair(
            layer,
            role,
            [torch.randn(2, 40, 2, inputs // 2, device=DEVICE, requires_grad=True) for _ in range(directions)],
            3 + torch.randn(2, 40, size, device=DEVICE),
            torch.rand((), device=DEVICE) + 0.5,
        )
        for layer in range(2)
        for role, size in zip(ROLES, (12, 24), strict=True)
    ]
    exact = naive_error(trained.double(), [pair_in_double(pair) for pair in pairs], mask)
    wanted = [*trained.parameters(), *(x for pair in pairs for x in pair.projections)]
    expected = torch.autograd.grad(3 * exact, wanted)
    trained.float()

    # None where the kernel is chosen anyhow: then nothing else may be called.
    monkeypatch.setattr(bridge_error, "_error", fused_error if DEVICE == "cpu" else None)
    torch._dynamo.reset()
    loss_of = torch.compile(trained.loss, backend="aot_eager") if compiled else trained.loss
    with torch.autocast(DEVICE, dtype):
        loss = loss_of(pairs, mask)
        with torch.no_grad():
            torch.testing.assert_close(trained.loss(pairs, mask), loss)
    assert relative_error(loss, exact) < DTYPES[dtype]
    for ours, theirs in zip(torch.autograd.grad(3 * loss, wanted), expected, strict=True):
        assert relative_error(ours, theirs) < 3 * DTYPES[dtype]


def pair_in_double(pair: BridgePair) -> BridgePair:
    return pair._replace(projections=[x.double() for x in pair.projections], target=pair.target.double())


def test_what_the_kernel_takes():
    target = torch.zeros(1, 3, 8, device=DEVICE)
    for dtype, rows, hidden_size in (
        (torch.bfloat16, 3, LARGEST_HIDDEN_SIZE + 1),
        (torch.float32, 3, 128),
        (torch.bfloat16, 0, 128),
    ):
        assert not fits_kernel(torch.zeros(1, rows, 8, dtype=dtype, device=DEVICE), hidden_size, target)
    rows = torch.zeros(1, 3, 8, dtype=torch.bfloat16, device=DEVICE)
    assert fits_kernel(rows, LARGEST_HIDDEN_SIZE, target) == (DEVICE == "cuda")
    assert not fits_kernel(rows, LARGEST_HIDDEN_SIZE, target.to("meta"))


@pytest.mark.parametrize("fails", [False, True])
def test_a_kernel_that_does_not_run_is_not_taken(fails, monkeypatch, caplog):
    def broken(*arguments, **options):
        raise RuntimeError("no C compiler")

    if fails:
        monkeypatch.setattr(bridge_kernel, "fused_error", broken)
    dtype = next(iter(DTYPES))
    assert bridge_kernel._runs_on.__wrapped__(torch.device(DEVICE), dtype, torch.float32, 20) != fails
    assert ("no C compiler" in caplog.text) == fails
