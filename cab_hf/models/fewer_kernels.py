"""What a hybrid's captured token does in fewer kernels than its own class: the same results, from what it calls.

No family is known here. While a token is captured, products, norms, rotations and gated MLPs that are such as Llama's
are made by kernels for few rows. Products that read the same tensor are made together, as the first pass shows.

Shape legend: `b` batch, `d` width, `h` head, `p` head_dim.
"""

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as library_linear
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from .attention_kernel import attend, rotate
from .decode_kernels import MOST_TOGETHER, linear, linears, rms_normed
from .decoding import MOST_FEATURES, MOST_ROWS, SILU
from .mixer_adapter import current


ROTATION = "apply_rotary_pos_emb"  # as transformers' files call it: of queries, keys, cosines and sines
_lock = threading.Lock()
_rotations: dict[str, int] = {}


class FewerKernels(TorchFunctionMode):
    """Makes parts of a captured token by kernels of their own: what it runs, and which, is found before any capture.

    A pass asks for the same products in the same order each time. The first one shows which of them read the same
    tensor; from then on the first of these makes the others, too.
    """

    def __init__(self, inner: nn.Module):
        super().__init__()
        modules = [module for module in inner.modules() if "forward" not in vars(module)]
        self.forwards = [(module, _norm) for module in modules if _is_rms_norm(module)]
        gated: dict[tuple, bool] = {}  # modules that differ in weights alone are asked once
        for module in filter(_has_gated_parts, modules):
            kind = _kind(module)
            if kind not in gated:
                gated[kind] = _is_gated_mlp(module)
            if gated[kind]:
                self.forwards.append((module, _gated))
        files = sorted({type(module).__module__ for module in modules})
        self.files = [file for file in files if _rotates_halves(getattr(sys.modules[file], ROTATION, None))]
        self.is_first, self.together = True, {}
        self.asked: list[tuple[Tensor, Tensor | None]] = []  # weight and bias of each product
        self.read: dict[tuple, tuple[Tensor, list[int]]] = {}  # of the first pass: places by what they read

    @contextmanager
    def a_pass(self) -> Iterator[None]:
        """Around each pass."""
        self.place, self.made = 0, {}
        with ExitStack() as stack:
            for module, make in self.forwards:
                module.forward = functools.partial(_made, make, module)
                stack.callback(delattr, module, "forward")
            for file in self.files:
                stack.enter_context(_rotating(file))
            stack.enter_context(self)
            yield
        if self.is_first:
            for _, places in self.read.values():
                parts = (places[at : at + MOST_TOGETHER] for at in range(0, len(places), MOST_TOGETHER))
                self.together |= {part[0]: part for part in parts if len(part) > 1}
        self.is_first, self.read, self.made = False, {}, {}

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = kwargs or {}
        if torch.compiler.is_compiling():  # one part of a model; what is counted here would be part of its graph
            return function(*args, **given)
        if function is scaled_dot_product_attention and len(args) == 3 and _attends(*args, **given):
            scale = given.get("scale")
            return attend(*args, given["attn_mask"], args[0].shape[-1] ** -0.5 if scale is None else scale)
        if function is library_linear and not given and _is_small(*args):
            return self._product(*args)
        return function(*args, **given)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        place, self.place = self.place, self.place + 1
        if self.is_first:
            self.asked.append((weight, bias))
            if isinstance(weight, nn.Parameter):  # a view of one is another tensor in each pass
                # a tensor that is held keeps its id; its version counts changes in place
                self.read.setdefault((id(x), x._version), (x, []))[1].append(place)
        of, of_weight, of_bias, made = self.made.pop(place, (None,) * 4)
        if of is x and of_weight is weight and of_bias is bias:
            return made
        places = self.together.get(place, ())
        asked = [self.asked[other] for other in places]
        if not asked or asked[0][0] is not weight or asked[0][1] is not bias:
            asked = [(weight, bias)]
        weights, biases = zip(*asked)
        outputs = linears(x.reshape(-1, x.shape[-1]), weights, biases)
        outputs = [one.unflatten(0, x.shape[:-1]) for one in outputs]
        self.made |= {other: (x, *one) for other, *one in zip(places[1:], weights[1:], biases[1:], outputs[1:])}
        return outputs[0]


def _is_small(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether a product is bound by reading its weights, which one kernel does sooner than the library's.

    That kernel may read them while the kernel before still runs: the pass must not have made them.
    """
    if x.ndim < 2 or not (x.numel() and _is_kept(weight)) or bias is not None and not _is_kept(bias):
        return False
    rows = x.numel() // x.shape[-1]
    return (
        weight.ndim == 2
        and x.dtype == weight.dtype
        and x.stride(-1) == 1
        and (rows == 1 or rows <= MOST_ROWS and len(weight) <= MOST_FEATURES and weight.element_size() == 2)
    )


def _is_kept(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter, or a view of one, and dense."""
    held = tensor if tensor._base is None else tensor._base
    return isinstance(held, nn.Parameter) and tensor.is_contiguous()


def _attends(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> bool:
    """Whether attention is of few queries to a long row, where PyTorch's leaves most of a device idle."""
    if query.ndim != 4 or attn_mask is None:
        return False
    rows, heads, queries, _ = query.shape
    return (
        attn_mask.dtype == torch.bool
        and attn_mask.shape in ((rows, 1, 1, key.shape[2]), (1, 1, 1, key.shape[2]))
        and attn_mask.stride(-1) == 1
        and queries <= 16
        and key.shape[:2] == value.shape[:2] == (rows, heads)
        and key.is_contiguous()
        and value.is_contiguous()
        and not any(options.get(name) for name in ("dropout_p", "is_causal", "enable_gqa"))
    )


def _is_rms_norm(module: nn.Module) -> bool:
    """Whether a norm is such as Llama's: others add one to their weight, or have a bias."""
    names = {name for name, _ in module.named_parameters(recurse=False)}
    is_one = type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon") and names == {"weight"}
    return is_one and module.weight.ndim == 1 and type(module).__module__.startswith("transformers.")


def _made(make: Callable, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """In a forward pass's place: one tensor of a token that is captured goes to `make`."""
    if torch.compiler.is_compiling() or current.given.step is None or len(args) != 1 or kwargs:
        return type(module).forward(module, *args, **kwargs)
    return make(module, *args)


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    if x.dtype != norm.weight.dtype or x.shape[-1] != len(norm.weight):
        return type(norm).forward(norm, x)
    return rms_normed(x, norm.weight, norm.variance_epsilon)


def _has_gated_parts(module: nn.Module) -> bool:
    """Whether a module has the parts of Llama's MLP with SiLU, and no other tensors."""
    parts = [module._modules.get(name) for name in ("gate_proj", "up_proj", "down_proj")]
    if {type(part) for part in parts} != {nn.Linear} or not isinstance(module._modules.get("act_fn"), SILU):
        return False
    gate, up, _ = parts
    known = sum(len(list(part.parameters())) for part in parts)
    is_all = len(list(module.parameters())) == known and not any(True for _ in module.buffers())
    return is_all and gate.bias is None and gate.out_features == up.out_features


def _kind(module: nn.Module) -> tuple:
    """What tells a module from others that may do something else: a limit of one layer, say."""
    notes = ((name, value) for name, value in vars(module).items() if isinstance(value, int | float | str | None))
    parts = ((name, type(part)) for name, part in module.named_modules())
    return *parts, *notes, *((one.shape, one.dtype) for one in module.parameters())


def _is_gated_mlp(module: nn.Module) -> bool:
    """Whether a module with the parts of Llama's MLP is one. It is asked: its name and its parts say too little."""
    gate, up, down = module.gate_proj, module.up_proj, module.down_proj
    x = torch.arange(3 * gate.in_features, dtype=torch.float32).sin().view(1, 3, -1)
    for scale in (1.0, 1e4):  # some limit what is large
        given = (scale * x).to(gate.weight)
        try:
            got = type(module).forward(module, given)
        except Exception:  # it takes something else, whatever it says to this
            return False
        right = down(nn.functional.silu(gate(given)) * up(given))  # which may overflow
        if not (isinstance(got, Tensor) and torch.equal(got.nan_to_num(), right.nan_to_num())):
            return False
    return True


def _gated(mlp: nn.Module, x: Tensor) -> Tensor:
    gate, up = mlp.gate_proj, mlp.up_proj
    if not (_is_small(x, gate.weight) and _is_small(x, up.weight, up.bias)):
        return type(mlp).forward(mlp, x)
    inner = linear(x.reshape(-1, x.shape[-1]), up, gate=gate)
    return mlp.down_proj(inner.view(*x.shape[:-1], -1))


@contextmanager
def _rotating(file: str) -> Iterator[None]:
    """Inside the block a file's function that rotates queries and keys is one kernel, of whichever threads capture."""
    module = sys.modules[file]
    with _lock:
        _rotations[file] = _rotations.get(file, 0) + 1
        if _rotations[file] == 1:
            function = getattr(module, ROTATION)
            setattr(module, ROTATION, functools.wraps(function)(functools.partial(_rotated, function)))
    try:
        yield
    finally:
        with _lock:
            _rotations[file] -= 1
            if not _rotations[file]:
                setattr(module, ROTATION, getattr(module, ROTATION).__wrapped__)


def _rotates_halves(function: Callable | None) -> bool:
    """Whether a function turns the halves of a head together, as Llama's does."""
    if function is None:
        return False
    (query, key), angles = torch.arange(64.0).sin().view(2, 4, 1, 8).split((3, 1), dim=1), torch.arange(16.0)
    given = (query, key, angles.cos().view(2, 1, 8), angles.sin().view(2, 1, 8))
    for dtype in (torch.float32, torch.bfloat16):  # some compute in float32
        query, key, cosines, sines = (one.to(dtype) for one in given)
        try:
            got = function(query, key, cosines, sines)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return False
        right = [x * cosines[:, None] + _half_turned(x) * sines[:, None] for x in (query, key)]
        is_pair = isinstance(got, tuple) and len(got) == 2 and all(isinstance(one, Tensor) for one in got)
        if not (is_pair and all(map(torch.equal, got, right))):
            return False
    return True


def _half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _rotated(function: Callable, *args: Any, **kwargs: Any) -> Any:
    is_asked = not (torch.compiler.is_compiling() or current.given.step is None or kwargs) and len(args) == 4
    return rotate(*args) if is_asked and _fits(*args) else function(*args, **kwargs)


def _fits(query: Tensor, key: Tensor, cosines: Tensor, sines: Tensor) -> bool:
    if not all(isinstance(one, Tensor) for one in (query, key, cosines, sines)) or query.ndim != 4 or key.ndim != 4:
        return False
    rows, _, length, width = query.shape
    return (
        length == 1
        and key.shape[::2] == (rows, 1)
        and key.shape[-1] == width
        and cosines.shape == sines.shape
        and cosines.shape in ((rows, 1, width), (1, 1, width))
        and query.stride(-1) == key.stride(-1) == 1
        and query.dtype == key.dtype == cosines.dtype == sines.dtype
    )
