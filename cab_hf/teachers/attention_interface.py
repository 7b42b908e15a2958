"""Attention implementations of transformers that hand out what they read, at the speed of the one that they record.

An attention function of transformers may return anything as its second value, and `output_attentions=True` collects it
in layer order. Here it returns the tensors that went into the attention instead of the attention map, so that no map
of size tokens x tokens is kept and no modelling file is edited.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface


_PREFIX = "cab_"
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


def _own_eager_function(module: nn.Module) -> Callable:
    """The eager attention of the file that defines an attention module: it differs between families."""
    for owner in type(module).__mro__:
        function = vars(sys.modules[owner.__module__]).get("eager_attention_forward")
        if function is not None:
            return function
    raise ValueError(
        f"The eager attention of {type(module).__name__} can't be found in {type(module).__module__}. Load the "
        "teacher with attn_implementation='sdpa'."
    )


def _recording_attention(base: str) -> Callable:
    """An attention function that computes what `base` does and returns an `AttentionCall` beside it."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, AttentionCall]:
        kwargs.pop("output_attentions", None)
        function, owner = None, module
        if base == "eager":
            function = _own_eager_function(module)
        else:
            function = AttentionInterface()[base]
            if "flash" in base:
                # The flash path picks its kernel by the name that the config holds, which is ours at this moment.
                owner = _View(module, config=_View(module.config, _attn_implementation=base))
        output = function(owner, query, key, value, attention_mask, **kwargs)[0]
        return output, AttentionCall(TeacherAttention(query, key, output), kwargs.get("scaling"))

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
