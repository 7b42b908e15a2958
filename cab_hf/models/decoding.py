"""One token of a student as a CUDA graph: the host starts hundreds of kernels with one call.

`CABMambaForCausalLM.forward` asks `one_token` for each token behind a cache. The first one of a batch size is
captured, which takes a fraction of a second; later ones, of any cache, replay it. Whatever a graph can't hold runs
eagerly.

Shape legend: `b` batch, `d` width, `V` vocabulary.
"""

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.utils import logging

from .decode_kernels import NORMS, WIDEST_NORM, convolve, linear, normed, s6_step, ssd_step, triton
from .mixers import S6Mixer, SSDMixer, fitted
from .ssm_kernels import BACKEND_VARIABLE


logger = logging.get_logger(__name__)

DECODE_VARIABLE = "CAB_DECODE"
"""Set to `eager`, this environment variable keeps `one_token` from using a graph."""

MOST_GRAPHS = 4
"""Batch sizes that one model keeps a graph of; the one that was used longest ago goes first."""

MOST_ROWS, MOST_FEATURES = 64, 16384
"""Rows and features up to which own kernels make projections of 16 bits: they read the weights once for 16 rows."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_OWN_MODULES = f"{__name__.rpartition('.')[0]}."
KNOWN_MODULES = ("torch.nn.modules.", "transformers.activations.", "peft.tuners.lora.", _OWN_MODULES)
_KNOWN_HOOKS = (_OWN_MODULES, "transformers.utils.output_capturing")
SILU = (nn.SiLU, type(ACT2FN["silu"]))
_LORA_NOTES = ("_disable_adapters", "_active_adapter", "merged_adapters", "scaling", "training")
_failed: list[torch.cuda.CUDAGraph] = []  # PyTorch's allocators may ask them, still, which memory is theirs
_steps: "weakref.WeakKeyDictionary[nn.Module, ModelSteps]" = weakref.WeakKeyDictionary()


def one_token(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Cache,
) -> Tensor | None:
    """Logits `(b, 1, V)` of one token a row, which the cache's states take in; None where the model must run eagerly.

    Args:
        model: a causal language model in eval mode.
        input_ids: `(b, 1)`.
        attention_mask: `(b, past + 1)`; a zero in its last column leaves that row's states as they are.
        position_ids: `(b, 1)`, for learned positions.
        cache: with the states of earlier tokens. `generate` notes as `goes_on` that it captured the token before, too.
    """
    goes_on, cache.has_begun = vars(cache).pop("goes_on", False), False
    if not input_ids.is_cuda or not captures(model, goes_on) or torch.cuda.is_current_stream_capturing():
        return None
    states = states_of(cache, len(model.backbone.layers))
    if states is None:
        return None
    steps, rows, device = _steps[model], len(input_ids), input_ids.device
    addresses = list(map(Tensor.data_ptr, states))
    with steps.alone(device):
        step = steps.steps.get(rows)
        if step is None or step.addresses != addresses:
            if not goes_on and (steps.watch.is_hooked() or not _fit(model, states, input_ids)):
                return None
        step = steps.step(rows, f"{rows} row(s)", lambda: TokenStep(model, rows, addresses, device), device)
        if step is None:
            return None
        if step.addresses != addresses:
            step.point(addresses)
        cache.has_begun = True
        return step.replay(input_ids, attention_mask, position_ids)


def captures(model: nn.Module, goes_on: bool = False) -> bool:
    """Whether a model's tokens are captured, as far as the model decides that.

    Args:
        goes_on: the model has not changed since the token before, because one `generate` made both. Looking for
            changes takes the host a tenth of a millisecond.
    """
    return may_capture(model) and not steps_of(model, _obstacle, goes_on).obstacle


def may_capture(model: nn.Module) -> bool:
    """Whether the mode that a model is in, and the environment, leave room for captured tokens."""
    if triton is None or model.training or torch.is_autocast_enabled("cuda"):
        return False
    return os.environ.get(DECODE_VARIABLE, "auto") != "eager" and os.environ.get(BACKEND_VARIABLE, "auto") == "auto"


def steps_of(model: nn.Module, find_obstacle: Callable[[nn.Module], str], goes_on: bool = False) -> "ModelSteps":
    """The graphs of a model as it is now. Adapters may be switched between two tokens of one `generate`."""
    steps = _steps.get(model)
    if steps is None or not (goes_on and steps.watch.keeps_adapters() or steps.watch.holds()):
        steps = _steps[model] = ModelSteps(model, find_obstacle)
    return steps


def kept_steps(model: nn.Module) -> "ModelSteps | None":
    """The graphs of a model as it was at its last token, if it has any."""
    return _steps.get(model)


def release_graphs(model: nn.Module) -> None:
    """Frees a model's graphs and their memory. The next token is captured again.

    Example:
        >>> from cab_hf import CABMambaConfig, CABMambaForCausalLM
        >>> from cab_hf.models.decoding import release_graphs
        >>> config = CABMambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2)
        >>> release_graphs(CABMambaForCausalLM(config))
    """
    _steps.pop(getattr(model, "inner", model), None)


def states_of(cache: Cache, layers: int) -> list[Tensor] | None:
    """Convolution and recurrent state of every layer, in turn; None before the first token, or where it records."""
    if cache.is_recording_past(0) or len(cache.layers) < layers:
        return None
    held = cache.layers[:layers]
    if isinstance(getattr(held[0], "conv_states", None), dict):  # looking at each by `cache` takes the host longer
        states = [state for layer in held for state in (layer.conv_states[0], layer.recurrent_states[0])]
    else:
        looks = (cache.get_conv_state, cache.get_recurrent_state)
        states = [look(layer) for layer in range(layers) for look in looks]
    return None if any(state is None for state in states) else states


def _has_hook(module: nn.Module) -> bool:
    """Whether a module has a hook that is neither of these files nor one by which transformers looks at outputs."""
    hooks = chain(module._forward_hooks.values(), module._forward_pre_hooks.values())
    return any(not str(getattr(hook, "__module__", "")).startswith(_KNOWN_HOOKS) for hook in hooks)


class Watch:
    """Knows the parts of a model, and tells when one was replaced, moved or got a hook, or another attention is set.

    Values that change in place need no telling: a graph reads them anew each time.
    """

    def __init__(self, model: nn.Module):
        modules = list(model.modules())
        self.modules = modules[1:]
        self.parts = [one._modules for one in modules if one._modules]
        self.inside = self._inside()
        self.tables = [part for one in modules for part in (one._parameters, one._buffers) if part]
        named = [(part, name, value) for part in self.tables for name, value in part.items()]
        # Tables and names apart, and no loop of Python's: the host looks at hundreds of them for each token.
        self.full = tuple(zip(*((part, name) for part, name, value in named if value is not None))) or ((), ())
        self.empty = tuple(zip(*((part, name) for part, name, value in named if value is None))) or ((), ())
        self.size, self.places = self._size(), self._places()
        self.hooked, self.hooks_ever = self.is_hooked(), RemovableHandle.next_id
        self.adapters = [one for one in modules if type(one).__module__.startswith("peft.")]
        configs = (vars(one).get("config") for one in modules)
        self.configs = list({id(one): one for one in configs if isinstance(one, PreTrainedConfig)}.values())
        self.notes, self.attention = self._notes(), self._attention()

    def _inside(self) -> list[nn.Module | None]:
        return list(chain.from_iterable(map(dict.values, self.parts)))

    def _size(self) -> int:
        return sum(map(len, self.tables))

    def _filled(self) -> bool:
        """Whether something is where nothing was."""
        return bool(self.empty[0]) and set(map(dict.get, *self.empty)) != {None}

    def _places(self) -> list[int] | None:
        """Where the tensors lie; None where one is gone."""
        try:
            return list(map(Tensor.data_ptr, map(dict.get, *self.full)))
        except TypeError:
            return None

    def _notes(self) -> list[str]:
        return [repr([getattr(one, name, None) for name in _LORA_NOTES]) for one in self.adapters]

    def _attention(self) -> list[str | None]:
        return [one._attn_implementation for one in self.configs]

    def is_hooked(self) -> bool:
        return any("forward" in vars(one) or _has_hook(one) for one in self.modules)

    def holds(self) -> bool:
        if self.hooked or RemovableHandle.next_id != self.hooks_ever:  # somewhere a hook was made
            if self.is_hooked() != self.hooked:
                return False
            self.hooks_ever = RemovableHandle.next_id
        if self._inside() != self.inside or self._size() != self.size or self._filled():
            return False
        return self._attention() == self.attention and self._places() == self.places and self.keeps_adapters()

    def keeps_adapters(self) -> bool:
        """Whether the adapters are set as they were."""
        return not self.adapters or self._notes() == self.notes


class ModelSteps:
    """The graphs of a model as it is now, one a size.

    Holds no reference to the model itself.
    """

    def __init__(self, model: nn.Module, find_obstacle: Callable[[nn.Module], str]):
        self.watch = Watch(model)
        self.obstacle = "a module has a hook" if self.watch.hooked else find_obstacle(model)
        self.steps: OrderedDict[Hashable, Any] = OrderedDict()
        self.lock = threading.RLock()
        if self.obstacle:
            logger.info(f"Tokens are decoded eagerly: {self.obstacle}.")

    @contextmanager
    def alone(self, device: torch.device) -> Iterator[None]:
        """One thread at a time decodes, without gradients, whose buffers no inference mode made."""
        with self.lock, torch.inference_mode(False), torch.no_grad(), torch.cuda.device(device):
            yield

    def step(self, size: Hashable, described: str, make: Callable[[], Any], device: torch.device) -> Any | None:
        """The step of a size, captured by `make` where there is none; None where that fails, now and later."""
        if size in self.steps:
            self.steps.move_to_end(size)
            return self.steps[size]
        while len(self.steps) >= MOST_GRAPHS:
            self.steps.popitem(last=False)
        before = torch.cuda.memory_reserved(device)
        try:
            step = make()
        except Exception as error:  # whatever a kernel, a module or the driver raises: eager decoding is right
            self.refuse(f"the step can't be captured ({type(error).__name__}: {error})")
            return None
        self.steps[size] = step
        mebibytes = max(torch.cuda.memory_reserved(device) - before, 0) / 2**20
        logger.info(
            f"Captured the step of {described} as a CUDA graph of {mebibytes:.0f} MiB, one of {len(self.steps)}; "
            f"a model keeps at most {MOST_GRAPHS}."
        )
        return step

    def refuse(self, why: str) -> None:
        self.obstacle = why
        self.steps.clear()
        logger.warning(f"Tokens are decoded eagerly: {why}.")


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """Captures what the block starts, while other threads may talk to the device.

    Where that fails, the block's own error comes out, and not one that says that there was an earlier one. The current
    stream is then what it was. PyTorch's own context would leave the capture's stream behind, and up to version 2.12
    an allocator that takes the capture to go on: `empty_cache`, and so the next capture, would fail.
    """
    pool, device, first = torch.cuda.graph_pool_handle(), torch.cuda.current_device(), None
    try:
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
        ):
            try:
                yield
            except Exception as error:
                first = error
                raise
    except Exception:
        _failed.append(graph)
        with suppress(RuntimeError):  # newer versions have done it
            torch._C._cuda_endAllocateToPool(device, pool)
        if first is None:
            raise
        raise first from first.__cause__


class Graph:
    """What a function does on a device, and the tensor that it returns, to be replayed on any stream."""

    def __init__(self, run: Callable[[], Tensor], device: torch.device):
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles and loads what is to be captured
                run()
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with capturing(self.graph):
            self.result = run()
        self.stream = torch.cuda.current_stream(device)

    def follow(self) -> None:
        """Before inputs are written: what was replayed on another stream is waited for."""
        stream = torch.cuda.current_stream()
        if stream != self.stream:
            stream.wait_stream(self.stream)
            self.stream = stream

    def replay(self) -> Tensor:
        self.graph.replay()
        return self.result


class TokenStep:
    """A captured token of one batch size: what it reads, the graph, and its logits."""

    def __init__(self, model: nn.Module, rows: int, addresses: list[int], device: torch.device):
        self.ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.real = torch.zeros(rows, dtype=torch.int8, device=device)  # while zero, no state changes
        self.table = torch.zeros(len(addresses), dtype=torch.long, device=device)
        self.has_positions = model.backbone.position_embeddings is not None
        self.makes_positions = model.backbone._position_ids
        self.point(addresses)
        self.graph = Graph(lambda: self.run(model), device)
        self.real.fill_(1)
        self.is_masked = False

    def point(self, addresses: list[int]) -> None:
        """Turns to the states at these addresses."""
        self.table.copy_(torch.tensor(addresses), non_blocking=True)
        self.addresses = addresses

    def run(self, model: nn.Module) -> Tensor:
        return step_logits(model, self.ids, self.positions, self.table, self.real)

    def replay(self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
        self.graph.follow()
        self.ids.copy_(input_ids)
        if self.has_positions:
            if position_ids is None:
                position_ids = self.makes_positions(input_ids[..., None], attention_mask, None, True)
            self.positions.copy_(position_ids.expand_as(self.ids))
        if attention_mask is not None:
            self.real.copy_(attention_mask[:, -1] != 0)
        elif self.is_masked:
            self.real.fill_(1)
        self.is_masked = attention_mask is not None
        return self.graph.replay()[:, None].clone()


def step_logits(model: nn.Module, ids: Tensor, positions: Tensor, table: Tensor, real: Tensor) -> Tensor:
    """One token `(b, 1)` through a model, to logits `(b, V)`; states at the addresses in `table` take it in."""
    backbone = model.backbone
    hidden = backbone.embeddings(ids)[:, 0]  # (b, d)
    if backbone.position_embeddings is not None:
        hidden = hidden + backbone.position_embeddings(positions)[:, 0]
    for layer, block in enumerate(backbone.layers):
        residual = hidden.float() if block.residual_in_fp32 else hidden
        mixed = _mix(block.mixer, hidden, block.norm, table, real, layer)
        hidden = _added(block.mixer.out_proj, mixed, residual, block.post_norm)
        if block.mlp is not None:
            stream = residual if block.parallel_residual else hidden
            inner = _inner(block.mlp, stream, block.norm if block.mlp_norm is None else block.mlp_norm)
            hidden = _added(block.mlp.down_proj, inner, hidden, block.post_mlp_norm)
    return project(model.lm_head, hidden, backbone.norm_f)


def _mix(mixer: nn.Module, hidden: Tensor, norm: nn.Module, table: Tensor, real: Tensor, layer: int) -> Tensor:
    return mixed(mixer, project(mixer.in_proj, hidden, norm), table, real, layer)


def mixed(mixer: nn.Module, stream: Tensor, table: Tensor, real: Tensor, layer: int) -> Tensor:
    """What a mixer's output projection reads of one token a row.

    Args:
        stream: what its input projection made of it, `(b, columns)`.
        table: addresses of the mixers' states, convolution and recurrent in turn.
        real: `(b,)`, 0 at padding.
        layer: place of the mixer's states in the table.
    """
    if isinstance(mixer, SSDMixer):
        return ssd_step(stream, mixer, table, real, layer)
    width = mixer.config.mixer_width
    convolved = convolve(stream[:, :width], mixer, table, real, layer)
    projected = project(mixer.x_proj, convolved)
    steps = project(mixer.dt_proj, projected[:, : mixer.config.time_step_rank]).float()
    return s6_step(stream, convolved, projected, steps, mixer, table, real, layer)


def _inner(mlp: nn.Module, stream: Tensor, norm: nn.Module) -> Tensor:
    """What an MLP's last projection reads."""
    gate, up = mlp.gate_proj, mlp.up_proj
    if gate is None:
        return mlp.act_fn(project(up, stream, norm))
    fuses = _is_one_kernel(up, stream) and _is_one_kernel(gate, stream) and gate.bias is None
    if fuses and up.out_features == gate.out_features and isinstance(mlp.act_fn, SILU) and _makes_norm(norm, stream):
        return linear(stream, up, norm, gate=gate)
    stream = _normed(norm, stream)
    return mlp.act_fn(project(gate, stream)) * project(up, stream)


def _added(projection: nn.Module, x: Tensor, residual: Tensor, post_norm: nn.Module | None) -> Tensor:
    if post_norm is None and _is_one_kernel(projection, x):
        return linear(x, projection, residual=residual)
    x = project(projection, x)
    return residual + (x if post_norm is None else _normed(post_norm, x))


def project(projection: nn.Module, x: Tensor, norm: nn.Module | None = None) -> Tensor:
    """`projection(norm(x))` of `(b, d)`: of few rows by one kernel, which waits for nothing but the weights."""
    is_one_kernel = _is_one_kernel(projection, x)
    if norm is not None and not (is_one_kernel and _makes_norm(norm, x)):
        x, norm = _normed(norm, x), None
    return linear(x, projection, norm) if is_one_kernel else projection(fitted(x, projection))


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    return normed(x, norm) if type(norm) in NORMS else norm(x.to(norm.weight.dtype))


def _is_one_kernel(projection: nn.Module, x: Tensor) -> bool:
    """Whether one kernel can make a projection with what is around it: of few rows, it is bound by reading weights."""
    if type(projection) is not nn.Linear or not projection.weight.is_contiguous():
        return False
    is_small = (
        len(x) <= MOST_ROWS and projection.out_features <= MOST_FEATURES and projection.weight.element_size() == 2
    )
    return len(x) == 1 or is_small and x.stride(1) == 1


def _makes_norm(norm: nn.Module, x: Tensor) -> bool:
    return type(norm) in NORMS and (x.shape[1] <= WIDEST_NORM or len(x) > 1)


def _fit(model: nn.Module, states: list[Tensor], input_ids: Tensor) -> bool:
    """Whether a cache's states are such as the kernels expect."""
    rows, device = len(input_ids), model.lm_head.weight.device
    for layer, block in enumerate(model.backbone.layers):
        mixer, (conv, recurrent) = block.mixer, states[2 * layer : 2 * layer + 2]
        if (
            conv.dtype != mixer.conv1d.weight.dtype
            or recurrent.dtype != torch.float32
            or conv.shape != (rows, *mixer.conv1d.weight.shape[::2])
            or len(recurrent) != rows
            or not (conv.is_contiguous() and recurrent.is_contiguous())
            or not conv.device == recurrent.device == device == input_ids.device
        ):
            return False
    return True


def _obstacle(model: nn.Module) -> str:
    """Why a model's token can't be captured, or an empty string."""
    mixers = [block.mixer for block in model.backbone.layers]
    return part_obstacle(model, mixers, KNOWN_MODULES)


def part_obstacle(model: nn.Module, mixers: list[nn.Module], known: tuple[str, ...]) -> str:
    """Why a model of these mixers can't be captured, or an empty string.

    Args:
        known: how the paths of modules begin whose code is known to start kernels alone.
    """
    for name, module in model.named_modules():
        kind = type(module)
        if not f"{kind.__module__}.".startswith(known):
            return f"{name or 'the model'} is a {kind.__name__} of {kind.__module__}"
    for mixer in mixers:
        if type(mixer) not in (SSDMixer, S6Mixer):
            return f"its mixer is a {type(mixer).__name__}"
    weight = mixers[0].conv1d.weight
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if isinstance(tensor, nn.Parameter) or tensor.is_floating_point():
            if type(tensor) not in (nn.Parameter, Tensor) or tensor.dtype not in _DTYPES:
                return f"{name} is a {type(tensor).__name__} of {tensor.dtype}"
            if tensor.dtype not in (weight.dtype, torch.float32):
                return f"{name} is {tensor.dtype}, others are {weight.dtype}"
        if not tensor.is_cuda or tensor.device != weight.device:
            return f"{name} is on {tensor.device}"
    return ""
