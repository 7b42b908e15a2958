"""A mixer in an attention module's place: what a pass hands to it, its layer of the model's own cache, and its call.

Shape legend: `b` batch, `t` token, `d` width.
"""

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    EncoderDecoderCache,
    QuantizedLayer,
    StaticLayer,
)

from .configuration_cab_hybrid import CABHybridConfig
from .mixer_cache import MixerCacheLayer
from .mixers import BIDIRECTIONAL_MIXERS, MIXERS, BidirectionalProjections, SSMProjections
from .window import Sight, WindowAttention, WindowCacheLayer


@dataclass
class HandedOver:
    """What one forward pass gives to all of its mixers.

    Attributes:
        seq_idx: `(b, t)`, index of each token's document.
        shows: whether projections are asked for. Compiling in pieces, PyTorch 2.11 can't look whether `show` is None.
        show: called with a mixer's path and projections then.
        with_gradients: whether the pass as a whole is recorded for a backward pass.
        step: makes a mixer's output `(b, 1, d)` of one token in a captured step, of what the mixer is called with.
        generation: of one call of `generate`, in which the model stays as it is.
    """

    seq_idx: torch.Tensor | None = None
    shows: bool = False
    show: Callable[[str, SSMProjections | BidirectionalProjections], None] | None = None
    with_gradients: bool = False
    step: "Callable[[MixerAdapter, torch.Tensor, tuple, dict], torch.Tensor] | None" = None
    generation: object = None


class _Pass(threading.local):
    """What this thread's forward pass is handed.

    A pass belongs to a thread and ends: nothing of it may stay in a module, where copies and later passes would find
    it. `torch.compile` follows a `threading.local` into one graph, and no `ContextVar`.

    Attributes:
        given: to the whole pass.
        masks: the mask `(b, past + t)`, zero at padding, of the part that runs, and those of the parts around it.
    """

    given: HandedOver = HandedOver()
    masks: tuple[torch.Tensor | None, Any] | None = None

    @property
    def mask(self) -> torch.Tensor | None:
        return None if self.masks is None else self.masks[0]


current = _Pass()


@contextmanager
def handing_over(given: HandedOver, masks: tuple | None = None) -> Iterator[None]:
    before = current.given, current.masks
    current.given, current.masks = given, masks
    try:
        yield
    finally:
        current.given, current.masks = before


def again_with_the_same(checkpointed: Callable) -> Callable:
    """A checkpointing function whose second pass, in the backward pass, gets what the first one was handed."""

    def run(block: Callable, *args: Any, **kwargs: Any) -> Any:
        given, masks, passes = current.given, current.masks, []

        def pass_over(*inputs: Any, **named: Any) -> Any:
            passes.append(None)
            with handing_over(given if len(passes) == 1 else replace(given, shows=False), masks):
                return block(*inputs, **named)

        return checkpointed(pass_over, *args, **kwargs)

    return run


class MixerAdapter(nn.Module):
    """A mixer that is called, and answers, as the attention module in whose place it stands.

    Args:
        config: of the whole model.
        path: of the attention module inside the body.
        attention: that module; parents may read its plain attributes. With a window it stays, beside the mixer.
    """

    def __init__(self, config: CABHybridConfig, path: str, attention: nn.Module):
        super().__init__()
        settings, sizes = config.settings(path), config.mixer_config(path)
        self.path = path
        self.causal = settings["causal"]
        self.cache_layer = settings["cache_layer"]
        self.argument = settings.get("argument")
        self.returned = settings.get("returned", 0)
        mixers = MIXERS if self.causal else BIDIRECTIONAL_MIXERS
        self.mixer = mixers[sizes.mixer_type](sizes, self.cache_layer)
        width = settings.get("output_size")
        if width is None:
            self.mixer.out_proj = nn.Identity()  # the parent has it, and keeps it
        elif width != sizes.hidden_size:
            self.mixer.out_proj = nn.Linear(sizes.mixer_width, width, bias=sizes.use_bias)
        window = settings.get("attention_window", 0)
        self.window = WindowAttention(attention, window, settings.get("attention_sinks", 0)) if window else None
        for name, value in vars(attention).items():  # is_sliding, layer_idx, ...
            if not name.startswith("_") and name not in vars(self):
                setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes what the attention module takes; reads of it the hidden states `(b, t, d)` and the cache.

        Raises:
            ValueError: a cache that is static or quantised, or that another model filled; or projections asked for
                under reentrant checkpointing.
        """
        hidden_states = args[0] if args and self.argument is None else kwargs[self.argument or "hidden_states"]
        given, length = current.given, hidden_states.shape[1]
        if given.step is not None:
            return self._answer(given.step(self, hidden_states, args, kwargs))
        mask, seq_idx = (self._fitting(rows, hidden_states) for rows in (current.mask, given.seq_idx))
        rows, layer, cache = {"attention_mask": mask, "seq_idx": seq_idx}, None, None
        if self.causal:
            cache = next((value for value in (*args[1:], *kwargs.values()) if isinstance(value, Cache)), None)
            cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
            rows["cache"] = cache
        if cache is not None:
            layer = self._claim_layer(cache)
        output, projections = self.mixer(hidden_states, output_projections=given.shows, **rows)
        if self.window is not None:
            sight = None if layer is None else self._sight(cache, layer, hidden_states, mask)
            output = output + self.window(hidden_states, args, kwargs, layer, mask, seq_idx, sight)
        if layer is not None:
            layer.seen_tokens += length
        if given.shows:
            if given.with_gradients and not torch.is_grad_enabled():
                raise ValueError(
                    "The projections have no gradient under reentrant checkpointing: pass "
                    "`gradient_checkpointing_kwargs={'use_reentrant': False}`."
                )
            given.show(self.path, projections)
        return self._answer(output)

    def _answer(self, output: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor | None, ...]:
        return output if self.returned == 0 else (output, *(None,) * (self.returned - 1))

    @staticmethod
    def _fitting(rows: torch.Tensor | None, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """The part of `(b, past + t)` that is of these tokens `(b, t)`; None for other tokens, as a router's."""
        if rows is None or rows.shape[0] != hidden_states.shape[0] or rows.shape[1] < hidden_states.shape[1]:
            return None
        return rows[:, -hidden_states.shape[1] :]

    def _sight(
        self, cache: Cache, layer: WindowCacheLayer, hidden_states: torch.Tensor, mask: torch.Tensor | None
    ) -> Sight:
        """What new tokens see, which is found once a pass for all layers whose windows are alike."""
        of = (layer.beside, layer.seen_tokens, hidden_states.device)
        masks, found, sight = vars(cache).get("sight", (None, None, None))
        if masks is None or masks is not current.masks or found != of:  # each pass makes a tuple of its own
            in_blocks = self.window.reads_blocks(hidden_states, layer, mask)
            sight = layer.look(hidden_states, mask, in_blocks)
            is_small = in_blocks or hidden_states.shape[1] == 1
            cache.sight = (current.masks, of, sight) if is_small else (None, None, None)
        return sight

    def _claim_layer(self, cache: Cache) -> MixerCacheLayer:
        """Puts a layer for the mixer's states into the cache. `layer_types`, which models index, can't say so."""
        layers, index = cache.layers, self.cache_layer
        while len(layers) <= index:
            layers.append(DynamicLayer())
        layer, window = layers[index], self.window
        beside = None if window is None else (window.window, window.sinks)
        if isinstance(layer, MixerCacheLayer) and layer.beside == beside:
            return layer
        if getattr(cache, "offloading", False) or isinstance(layer, StaticLayer | QuantizedLayer):
            raise ValueError(
                f"The {type(cache).__name__} has a {type(layer).__name__} for {self.path}, but a hybrid needs "
                "a DynamicCache that stays in place: leave `cache_implementation` out."
            )
        if isinstance(layer, DynamicLayer) and layer.get_seq_length():
            raise ValueError(
                f"`past_key_values` holds a {type(layer).__name__} of {layer.get_seq_length()} tokens for "
                f"{self.path}, which another model filled. Pass a cache that this model filled, or an empty "
                "DynamicCache."
            )
        layers[index] = MixerCacheLayer() if window is None else WindowCacheLayer(*beside)
        return layers[index]


_PARAMETERS: dict[type[PreTrainedModel], tuple[str, ...]] = {}


def parameters_of(owner: type[PreTrainedModel]) -> tuple[str, ...]:
    """Names of what the forward pass of a class takes."""
    if owner not in _PARAMETERS:
        _PARAMETERS[owner] = tuple(inspect.signature(owner.forward).parameters)
    return _PARAMETERS[owner]
