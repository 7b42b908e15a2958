"""One token of a hybrid as a CUDA graph: its own class, captured on a cache that stays in place.

No family is known here. A graph has keys, values and states of its own. A cache moves into them with its first token,
and holds views of them from then on; when another cache comes, it gets copies back. A graph is used once it has given
what the eager pass gives, at another position than it was captured at.

Shape legend: `b` batch, `d` width, `V` vocabulary.
"""

import copy
import functools
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import repeat
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer
from transformers.utils import ModelOutput

from .attention_kernel import keep
from .decoding import (
    KNOWN_MODULES,
    Graph,
    ModelSteps,
    kept_steps,
    may_capture,
    mixed,
    part_obstacle,
    steps_of,
)
from .fewer_kernels import FewerKernels
from .mixer_adapter import HandedOver, MixerAdapter, current, handing_over, parameters_of
from .mixer_cache import MixerCacheLayer
from .mixers import fitted
from .window import Sight, WindowCacheLayer


LEAST_ROOM = 256
"""Tokens that the smallest graph has room for; larger ones have half as much more, or twice as much."""

_TOLERANCE = 0.05  # of the largest logit
_TOLERANCES = {torch.float32: 5e-3}  # whose products may be rounded to tf32
_FLAGS = {"use_cache": bool, "return_dict": bool, "logits_to_keep": int}
_IMPLEMENTATIONS = ("sdpa", "eager")  # of attention; others read no mask of a static cache
_inside: "weakref.WeakKeyDictionary[nn.Module, int]" = weakref.WeakKeyDictionary()
_lock = threading.Lock()
_unchanged: "weakref.WeakKeyDictionary[nn.Module, object]" = weakref.WeakKeyDictionary()


@contextmanager
def captured_tokens(inner: PreTrainedModel) -> Iterator[None]:
    """Inside the block the model inside a hybrid, which `generate` calls, decodes by graphs where it can.

    Its forward pass is another one for that long only: copies and replicas of it would take this one's.
    """
    with _lock:
        inside = _inside.get(inner, 0)
        is_ours = inside > 0 or "forward" not in vars(inner)  # else somebody else has put one there
        if is_ours:
            _inside[inner] = inside + 1
            if not inside:
                inner.forward = functools.update_wrapper(functools.partial(_forward, inner), inner.forward)
    try:
        yield
    finally:
        with _lock:
            if is_ours:
                _inside[inner] -= 1
                if not _inside[inner]:
                    del inner.forward


def _forward(inner: PreTrainedModel, *args: Any, **kwargs: Any) -> ModelOutput | tuple:
    if not torch.compiler.is_compiling():
        if not (torch.is_grad_enabled() or inner.training):
            output = _one_token(inner, args, kwargs, current.given)
            if output is not None:
                return output
        _move_out(inner, [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)])
    return type(inner).forward(inner, *args, **kwargs)


def _move_out(inner: PreTrainedModel, caches: list[Cache]) -> None:
    """Gives caches copies of what they hold in graphs, where another thread's token may come while they are read."""
    steps = kept_steps(inner)
    if steps is None or not caches:
        return
    for step in list(steps.steps.values()):
        with steps.alone(step.ids.device):
            for cache in caches:
                step.move_out(cache)


def _one_token(inner: PreTrainedModel, args: tuple, kwargs: dict[str, Any], given: HandedOver) -> ModelOutput | None:
    """The output for one token a row, which the cache takes in; None where the model must run eagerly."""
    if given.step is not None or given.shows or given.seq_idx is not None or not may_capture(inner):
        return None
    inputs = dict(zip(parameters_of(type(inner))[1:], args)) | kwargs
    ids = inputs.get("input_ids")
    if ids is None or ids.shape[1:] != (1,) or not is_captured_on(ids.device):
        return None
    token = read_token(inner, {name: value for name, value in inputs.items() if value is not None})
    if token is None:
        return None
    goes_on = given.generation is not None and _unchanged.get(inner) is given.generation
    steps = steps_of(inner, hybrid_obstacle, goes_on)
    _unchanged[inner] = given.generation
    if steps.obstacle:
        return None
    size = (len(token.ids), room_for(token.past + 1))
    if size not in steps.steps:
        return _proven(inner, steps, size, token)
    with steps.alone(token.ids.device):
        step = steps.steps.get(size)
        if step is None or not (step.holds(token) or step.fits(token.cache)):
            return None
        steps.steps.move_to_end(size)
        return step(token)


def is_captured_on(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def _proven(inner: PreTrainedModel, steps: ModelSteps, size: tuple[int, int], token: "Token") -> ModelOutput:
    """The eager output. A step of this size is there afterwards, if it gives the same."""
    _move_out(inner, [token.cache])
    before, (rows, room) = _copied(token.cache), size
    output = type(inner).forward(inner, **token.inputs)
    more = [name for name, value in output.items() if value is not None and name not in ("logits", token.cache_name)]
    if more:
        steps.refuse(f"the model gives {', '.join(more)}, too")
        return output
    described = f"{rows} row(s) of up to {room} tokens"
    device, wanted = token.ids.device, _finite(output.logits[:, -1:])
    with steps.alone(device):
        step = steps.step(size, described, lambda: HybridStep(inner, token, room, type(output)), device)
        if step is not None:
            error = (_finite(step(token._replace(cache=before)).logits) - wanted).abs().max() / wanted.abs().max()
            if not error <= _TOLERANCES.get(inner.dtype, _TOLERANCE):
                steps.refuse(f"the captured step is {error:.2g} of the largest logit away from the eager one")
    return output


def _finite(logits: Tensor) -> Tensor:
    """Logits as float32, of which a model may forbid some by minus infinity."""
    return logits.float().nan_to_num(neginf=0.0)


class Token(NamedTuple):
    """What a model is given for one token a row.

    Attributes:
        ids: `(b, 1)`.
        mask: `(b, past + 1)`, zero at padding.
        positions: `(b, 1)` or `(1, 1)`.
        past: tokens that the cache has read.
        cache_name: by which the model takes the cache, whatever older name it was given by.
        inputs: all of it.
    """

    ids: Tensor
    mask: Tensor | None
    positions: Tensor | None
    past: int
    cache: DynamicCache
    cache_name: str
    inputs: dict[str, Any]


def read_token(inner: PreTrainedModel, inputs: dict[str, Any]) -> Token | None:
    """The one token a row that a model is asked to read behind a cache, if it is asked for nothing else."""
    rest = dict(inputs)
    ids, mask, positions = (rest.pop(name, None) for name in ("input_ids", "attention_mask", "position_ids"))
    caches = [name for name, value in rest.items() if isinstance(value, Cache)]
    if len(caches) != 1:
        return None
    cache, names = rest.pop(caches[0]), parameters_of(type(inner))
    name = next((name for name in (caches[0], "cache", "past_key_values") if name in names), None)
    past = _tokens_read(cache)
    if not past or name is None:
        return None
    if not all(value is False or isinstance(value, _FLAGS.get(flag, ())) for flag, value in rest.items()):
        return None
    if rest.get("use_cache") is False or rest.get("return_dict") is False:
        return None
    if getattr(inner.config, "output_attentions", False) or getattr(inner.config, "output_hidden_states", False):
        return None
    if mask is not None and (mask.shape != (len(ids), past + 1) or positions is None):
        return None  # models count positions in a mask, each in its own way
    if positions is not None and positions.shape not in ((len(ids), 1), (1, 1)):
        return None
    return Token(ids, mask, positions, past, cache, name, inputs)


def _tokens_read(cache: Cache) -> int:
    """Tokens that a cache has read, if it is such as a step can take in; else 0."""
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return 0
    lengths = set()
    for layer in cache.layers:
        if isinstance(layer, MixerCacheLayer):
            is_whole = isinstance(layer.recurrent_states, dict) and layer.recurrent_states[0] is not None
            is_whole = is_whole and not layer.record_past
        elif type(layer) is DynamicSlidingWindowLayer:
            is_whole = not layer.record_past and layer.is_initialized
        else:
            is_whole = type(layer) is DynamicLayer and layer.is_initialized
        lengths.add(layer.get_seq_length() if is_whole else 0)
    return lengths.pop() if len(lengths) == 1 else 0


def room_for(tokens: int) -> int:
    """Tokens that a graph has room for: `LEAST_ROOM` times a power of two, or one and a half of it.

    Example:
        >>> from cab_hf.models.hybrid_decoding import room_for
        >>> [room_for(tokens) for tokens in (1, 257, 400, 32000)]
        [256, 384, 512, 32768]
    """
    room = LEAST_ROOM
    while room < tokens:
        if 3 * room // 2 >= tokens:
            return 3 * room // 2
        room *= 2
    return room


def hybrid_obstacle(inner: PreTrainedModel) -> str:
    """Why a hybrid's token can't be captured, or an empty string."""
    if not inner._can_compile_fullgraph:
        return f"transformers compiles no {type(inner).__name__}"
    if inner.config._attn_implementation not in _IMPLEMENTATIONS:
        return f"its attention is {inner.config._attn_implementation!r}, not one of {', '.join(_IMPLEMENTATIONS)}"
    mixers = [adapter.mixer for adapter in inner.modules() if isinstance(adapter, MixerAdapter)]
    return part_obstacle(inner, mixers, (*KNOWN_MODULES, "transformers."))


class _Room:
    """A layer in a graph, where how many tokens were read is a tensor."""

    length: Tensor
    room: int

    def get_seq_length(self) -> Tensor:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.room, 0


class _MixerRoom(_Room, MixerCacheLayer):
    pass


class _WindowedMixerRoom(_Room, WindowCacheLayer):
    """With `num_real` of all layers side by side, where the step counts it up."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        new = tuple(x if x.stride(-1) == 1 else x.contiguous() for x in (key_states, value_states))
        keep((self.keys, self.values), new, self.sight.place[:, 0])
        return self.keys, self.values


class _WindowRoom(StaticLayer):
    """Keys and values of a sliding window in a graph, each at its place in the row: the mask cuts the window out."""

    is_sliding = True


class HybridStep:
    """A captured token of one batch size, with room for a number of tokens, and the cache that lives in it."""

    def __init__(self, inner: PreTrainedModel, token: Token, room: int, output_type: type[ModelOutput]):
        rows, device = len(token.ids), token.ids.device
        self.output_type, self.room = output_type, room
        self.ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.mask = torch.ones(rows, room, dtype=torch.bool, device=device)  # later of tokens that are there
        self.mask[:, -1] = False  # a mask of ones alone is left out, outside of a capture
        self.real = torch.zeros(rows, dtype=torch.int8, device=device)  # while zero, no state changes
        self.length = torch.zeros((), dtype=torch.long, device=device)
        windows = sum(isinstance(layer, WindowCacheLayer) for layer in token.cache.layers)
        self.num_real = torch.zeros(windows, rows, dtype=torch.long, device=device)
        self.free = list(self.num_real)
        self.kernels = FewerKernels(inner)
        self.layers = [self._room(layer) for layer in token.cache.layers]
        self.mixers = [index for index, layer in enumerate(self.layers) if isinstance(layer, MixerCacheLayer)]
        self.places = {index: place for place, index in enumerate(self.mixers)}
        states = [state.data_ptr() for index in self.mixers for state in self.layers[index].tensors()[:2]]
        self.table = torch.tensor(states, device=device)
        self.guests: list[weakref.ref] = []
        self.views: list[tuple[Tensor, ...]] = []
        self.past = 0
        given = {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": self.positions}
        given |= {token.cache_name: Cache(layers=self.layers), "use_cache": True}
        given = {name: value for name, value in given.items() if name in parameters_of(type(inner))}
        self.graph = Graph(lambda: self.run(inner, given), device)

    def _room(self, layer: DynamicLayer | MixerCacheLayer) -> StaticLayer | MixerCacheLayer:
        if not isinstance(layer, MixerCacheLayer):
            room = (_WindowRoom if layer.is_sliding else StaticLayer)(self.room)
            room.lazy_initialization(layer.keys, layer.values)
            return room
        windowed = isinstance(layer, WindowCacheLayer)
        room = _WindowedMixerRoom(layer.window, layer.sinks) if windowed else _MixerRoom()
        room.length, room.room = self.length, self.room
        tensors = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in layer.tensors()]
        room.hold((*tensors[:-1], self.free.pop()) if windowed else tuple(tensors))
        return room

    def run(self, inner: PreTrainedModel, given: dict[str, Any]) -> Tensor:
        """Logits `(b, 1, V)` of the token in `ids`, which the layers take in."""
        self.sights: dict[tuple[int, int], Sight] = {}  # as all layers have read the same
        with handing_over(HandedOver(step=self.answer)), self.kernels.a_pass():
            logits = type(inner).forward(inner, **given).logits
        self.length.add_(1)
        self.num_real.add_(self.real)
        return logits[:, -1:]

    def answer(self, adapter: MixerAdapter, hidden_states: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """What stands in attention's place makes of hidden states `(b, 1, d)`, of the same shape."""
        if adapter.window is None:
            return self.mix(adapter, hidden_states)
        layer, mask = self.layers[adapter.cache_layer], self.real[:, None]
        if layer.beside not in self.sights:
            self.sights[layer.beside] = layer.look(hidden_states, mask)
        output = self.mix(adapter, hidden_states)
        return output + adapter.window(hidden_states, args, kwargs, layer, sight=self.sights[layer.beside])

    def mix(self, adapter: MixerAdapter, hidden_states: Tensor) -> Tensor:
        """A mixer's output `(b, 1, d)` for hidden states of the same shape."""
        mixer = adapter.mixer
        stream = mixer.in_proj(fitted(hidden_states, mixer.in_proj))[:, 0]
        output = mixed(mixer, stream, self.table, self.real, self.places[adapter.cache_layer])
        output = output if isinstance(mixer.out_proj, nn.Identity) else mixer.out_proj(fitted(output, mixer.out_proj))
        return output[:, None]

    def holds(self, token: Token) -> bool:
        """Whether a token's cache lives here, and nobody else has touched it."""
        layers = token.cache.layers
        return token.past == self.past and len(layers) == len(self.views) and all(map(_is_shown, layers, self.views))

    def fits(self, cache: DynamicCache) -> bool:
        """Whether there is a place for each of a cache's layers."""
        return len(cache.layers) == len(self.layers) and all(
            isinstance(layer, MixerCacheLayer) == isinstance(room, MixerCacheLayer)
            and getattr(layer, "beside", None) == getattr(room, "beside", None)
            and layer.is_sliding == room.is_sliding
            and all(map(_fits, _tensors(layer), _tensors(room), repeat(not isinstance(layer, MixerCacheLayer))))
            for layer, room in zip(cache.layers, self.layers)
        )

    def __call__(self, token: Token) -> ModelOutput:
        self.graph.follow()
        if not self.holds(token):
            self._take_in(token)
        self.ids.copy_(token.ids)
        if token.positions is None:
            self.positions.fill_(self.past)
        else:
            self.positions.copy_(token.positions.expand_as(self.positions))
        if token.mask is not None:
            self.mask[:, : self.past + 1].copy_(token.mask)
            self.real.copy_(self.mask[:, self.past])
        else:
            self.mask[:, : self.past + 1].fill_(True)
            self.real.fill_(1)
        logits = self.graph.replay().clone()
        self.past += 1
        self._show(token.cache)
        return self.output_type(logits=logits, **{token.cache_name: token.cache})

    def _take_in(self, token: Token) -> None:
        stay = {id(layer) for layer in token.cache.layers}
        is_new = {id(guest()) for guest in self.guests} != stay
        self._let_go(stay)
        self.past = token.past
        self.mask.zero_()
        self.length.fill_(token.past)
        for layer, room in zip(token.cache.layers, self.layers):
            if not isinstance(layer, MixerCacheLayer):
                room.cumulative_length.fill_(token.past)
            for held, place in zip(_tensors(layer), _tensors(room)):
                if not isinstance(layer, MixerCacheLayer):
                    first = token.past - held.shape[2]
                    if is_new:  # what is not read must be finite, too: eager attention multiplies it by zero
                        place[:, :, :first].zero_()
                        place[:, :, token.past :].zero_()
                    place = place[:, :, first : token.past]
                place.copy_(held)
            if isinstance(layer, MixerCacheLayer):
                layer.hold(room.tensors())
        self.guests = [weakref.ref(layer) for layer in token.cache.layers]
        self.views = list(map(_tensors, token.cache.layers))

    def _show(self, cache: DynamicCache) -> None:
        """Lets a cache see what its layers hold now."""
        for index, (layer, room) in enumerate(zip(cache.layers, self.layers)):
            if isinstance(layer, MixerCacheLayer):
                layer.seen_tokens = self.past
                continue
            first = max(self.past - layer.sliding_window + 1, 0) if layer.is_sliding else 0
            layer.keys, layer.values = room.keys[:, :, first : self.past], room.values[:, :, first : self.past]
            if layer.is_sliding:
                layer.cumulative_length = self.past
            self.views[index] = layer.keys, layer.values

    def move_out(self, cache: DynamicCache) -> None:
        """Gives a cache copies of what it holds here, if it lives here."""
        if any(guest() is layer for guest, layer in zip(self.guests, cache.layers)):
            self._let_go(set())

    def _let_go(self, stay: set[int]) -> None:
        """Gives the layers that live here, but those of these ids, copies of what they hold."""
        for guest, views in zip(self.guests, self.views):
            held = guest()
            if held is None or id(held) in stay or not _is_shown(held, views):
                continue
            copies = tuple(view.clone() for view in views)
            if isinstance(held, MixerCacheLayer):
                held.hold(copies)
            else:
                held.keys, held.values = copies


def _tensors(layer: DynamicLayer | StaticLayer | MixerCacheLayer) -> tuple[Tensor, ...]:
    return layer.tensors() if isinstance(layer, MixerCacheLayer) else (layer.keys, layer.values)


def _is_shown(layer: DynamicLayer | MixerCacheLayer, views: tuple[Tensor, ...]) -> bool:
    """Whether a layer still holds what a step showed it."""
    return all(map(is_, _tensors(layer), views))


def _fits(one: Tensor, other: Tensor, grows: bool) -> bool:
    """Whether two tensors are of one kind; keys and values `(b, heads, tokens, width)` that grow, of any length."""
    one, other = (one[:, :, :0], other[:, :, :0]) if grows else (one, other)
    return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device


def _copied(cache: DynamicCache) -> DynamicCache:
    """A cache that the next pass over the other leaves alone: that replaces keys and values, and changes states."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in twin.layers:
        if isinstance(layer, MixerCacheLayer):
            layer.hold(tuple(tensor.clone() for tensor in layer.tensors()))
    return twin
