"""Attention implementations of transformers that hand out what they read, at the speed of the one that they record.

An attention function of transformers may return anything as its second value, and `output_attentions=True` collects it
in layer order. Here it returns the tensors that went into the attention instead of the attention map, so that no map
of size tokens x tokens is kept and no modelling file is edited.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from cab_hf.models.window import own_eager_function


_PREFIX = "cab_"
_asked_maps: list[Callable[[], Tensor]] | None = None  # where those go that `asked_maps` asks for
_collected: list[tuple[nn.Module, "AttentionCall"]] | None = None  # where calls go that `collected_calls` asks for
_answered: Callable[..., Tensor] | None = None  # what stands for attention inside of `answered`
_BASES: dict[str, str] = {}  # name of a recording attention implementation -> the one that it records


class TeacherAttention(NamedTuple):
    """What one layer's attention read and wrote.

    Attributes:
        query: `(b, h, t, p)`, as the attention takes it: after rotary embedding and query norm, before the scaling.
        key: `(b, h_kv, t, p)`, after rotary embedding and key norm, before it is repeated for grouped queries.
        output: `(b, t, h, p)`, before the output projection; None where no loss reads it.
    """

    query: Tensor
    key: Tensor
    output: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> "TeacherAttention":
        """The same with a function of each tensor in its place."""
        output = None if self.output is None else function(self.output)
        return TeacherAttention(function(self.query), function(self.key), output)


class AttentionCall(NamedTuple):
    """What a recording attention hands out.

    Attributes:
        attention: what it read and wrote.
        scaling: factor of `query @ key.T`; None where the attention was not told: `p ** -0.5`.
    """

    attention: TeacherAttention
    scaling: float | None


class _View:
    """Reads like its target except for the attributes given."""

    def __init__(self, target: Any, **attributes: Any) -> None:
        self.__dict__.update(attributes)
        self._target = target

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)


def recorded_function(base: str, module: nn.Module) -> Callable:
    """The attention function of implementation `base` for one module."""
    return own_eager_function(module) if base == "eager" else AttentionInterface()[base]


@contextmanager
def asked_maps() -> Iterator[list[Callable[[], Tensor]]]:
    """Collects, for each attention that is called inside the block, a function that makes its map `(b, h, t, t)`."""
    global _asked_maps
    before, _asked_maps = _asked_maps, []
    try:
        yield _asked_maps
    finally:
        _asked_maps = before


@contextmanager
def collected_calls() -> Iterator[list[tuple[nn.Module, AttentionCall]]]:
    """Collects the calls of attention inside the block, with the module that makes them."""
    global _collected
    before, _collected = _collected, []
    try:
        yield _collected
    finally:
        _collected = before


@contextmanager
def answered(answer: Callable[[Tensor, Tensor, Tensor, float | None], Tensor]) -> Iterator[None]:
    """Inside the block `answer(query, key, value, scaling)` stands for every recorded attention `(b, t, h, p)`."""
    global _answered
    before, _answered = _answered, answer
    try:
        yield
    finally:
        _answered = before


def _answer_map(attention: Callable, value: Tensor, whole: bool) -> Tensor:
    """The map that an attention applies: what it makes of unit vectors in its values' place.

    So whatever it does to its scores is in it: windows, softcaps, sinks, biases, padding.

    Args:
        attention: takes values, and knows all else.
        value: `(b, h_kv, t, p)`, as it got them.
        whole: it takes values of any width; otherwise the map is made `p` columns at a time.
    """
    tokens, width = value.shape[2:]
    width = tokens if whole else width
    columns = []
    for start in range(0, tokens, width):
        units = torch.eye(tokens, width, dtype=value.dtype, device=value.device).roll(start, dims=0)
        units[:start] = 0  # the last columns are cut off below
        answer = attention(value=units.expand(*value.shape[:2], tokens, width))[0]  # (b, t, h, width)
        columns.append(answer[..., : tokens - start])
    return torch.cat(columns, dim=-1).transpose(1, 2)


def _recording_attention(base: str) -> Callable:
    """An attention function that computes what `base` does and returns an `AttentionCall` beside it."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, AttentionCall | None]:
        if _answered is not None:
            return _answered(query, key, value, kwargs.get("scaling")), None
        kwargs.pop("output_attentions", None)
        function, owner = recorded_function(base, module), module
        if "flash" in base:
            # The flash path picks its kernel by the name that the config holds, which is ours at this moment.
            owner = _View(module, config=_View(module.config, _attn_implementation=base))
        output = function(owner, query, key, value, attention_mask, **kwargs)[0]
        if _asked_maps is not None:
            rest = functools.partial(function, owner, query, key, attention_mask=attention_mask, **kwargs)
            _asked_maps.append(functools.partial(_answer_map, rest, value, whole=base in ("eager", "sdpa")))
        call = AttentionCall(TeacherAttention(query, key, output), kwargs.get("scaling"))
        if _collected is not None:
            _collected.append((module, call))
        return output, call

    return attention


def _recording_mask(base: str) -> Callable:
    """The mask function of implementation `base`, told by zero strides that nothing is padded.

    Reading a padding mask to learn that it is all ones would make the host wait for the device.
    """
    function = AttentionMaskInterface()[base]

    def mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if attention_mask is not None and not any(attention_mask.stride()):
            attention_mask = None
        return function(*args, attention_mask=attention_mask, **kwargs)

    return mask


def register_recording(base: str) -> str:
    """Registers the recording twin of attention implementation `base` once and returns its name."""
    # A slash would make transformers look for a kernel on the Hub.
    name = _PREFIX + base.replace("/", "_")
    if name not in AttentionInterface():
        AttentionInterface.register(name, _recording_attention(base))
        if base in AttentionMaskInterface():
            AttentionMaskInterface.register(name, _recording_mask(base))
        _BASES[name] = base
    return name


def base_of(name: str) -> str:
    """The attention implementation that a recording one records; any other is its own."""
    return _BASES.get(name, name)
