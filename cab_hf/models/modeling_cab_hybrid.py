"""Hybrids: a Transformer's own class with state-space mixers where its attention stood, in all layers or some.

No family is known here. A mixer is called, and answers, as the attention module did; all else is the teacher's class.
Shape legend: `b` batch, `t` token, `d` width.
"""

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    EncoderDecoderCache,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
    QuantizedLayer,
    StaticLayer,
)
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.utils import ModelOutput

from .configuration_cab_hybrid import CABHybridConfig
from .mixers import BIDIRECTIONAL_MIXERS, MIXERS, BidirectionalProjections, SSMProjections, StateSpaceBranch
from .students import MixerPreTrainedModel, body_of, positions_from_documents


AUTO_MAP = {
    "AutoConfig": "configuration_cab_hybrid.CABHybridConfig",
    "AutoModel": "modeling_cab_hybrid.CABHybridModel",
    "AutoModelForCausalLM": "modeling_cab_hybrid.CABHybridForCausalLM",
    "AutoModelForSequenceClassification": "modeling_cab_hybrid.CABHybridForSequenceClassification",
}


class HandedOver(NamedTuple):
    """What one forward pass gives to all of its mixers.

    Attributes:
        attention_mask: `(b, past + t)`, zero at padding.
        seq_idx: `(b, t)`, index of each token's document.
        show: called with a mixer's path and projections.
        with_gradients: whether the pass as a whole is recorded for a backward pass.
        outer: what held before, outside of the part that runs.
    """

    attention_mask: torch.Tensor | None = None
    seq_idx: torch.Tensor | None = None
    show: Callable[[str, SSMProjections | BidirectionalProjections], None] | None = None
    with_gradients: bool = False
    outer: "HandedOver | None" = None


class _Pass(threading.local):
    """What this thread's forward pass is handed.

    A pass belongs to a thread and ends: nothing of it may stay in a module, where copies and later passes would find
    it. `torch.compile` follows a `threading.local` into one graph, and no `ContextVar`.
    """

    given: HandedOver = HandedOver()


_pass = _Pass()


@contextmanager
def handing_over(given: HandedOver) -> Iterator[None]:
    before = _pass.given
    _pass.given = given
    try:
        yield
    finally:
        _pass.given = before


def _again_with_the_same(checkpointed: Callable) -> Callable:
    """A checkpointing function whose second pass, in the backward pass, gets what the first one was handed."""

    def run(block: Callable, *args: Any, **kwargs: Any) -> Any:
        given, passes = _pass.given, []

        def pass_over(*inputs: Any, **named: Any) -> Any:
            passes.append(None)
            with handing_over(given if len(passes) == 1 else given._replace(show=None)):
                return block(*inputs, **named)

        return checkpointed(pass_over, *args, **kwargs)

    return run


class MixerCacheLayer(LinearAttentionAndFullAttentionLayer):
    """A mixer's states in a model's own cache. It counts tokens: models ask it for positions and sizes of masks."""

    def __init__(self):
        super().__init__()
        self.seen_tokens = 0

    def get_seq_length(self) -> int:
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen_tokens + query_length, 0

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        self.seen_tokens = 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)

    def activate_past_recording(self) -> None:
        raise ValueError(_NO_WAY_BACK)

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(_NO_WAY_BACK)


_NO_WAY_BACK = (
    "The cache is to be cropped (assisted decoding), but a mixer's state can't be rolled back. Generate without an "
    "assistant; a hybrid can't draft for a model either."
)


class MixerAdapter(nn.Module):
    """A mixer that is called, and answers, as the attention module in whose place it stands.

    Args:
        config: of the whole model.
        path: of the attention module inside the body.
        attention: that module; parents may read its plain attributes.
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
        for name, value in vars(attention).items():  # is_sliding, layer_idx, ...
            if not name.startswith("_") and name not in vars(self):
                setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes what the attention module takes; reads of it the hidden states `(b, t, d)` and the cache.

        Raises:
            ValueError: a cache that is static or quantised, or projections asked for under reentrant checkpointing.
        """
        hidden_states = args[0] if args and self.argument is None else kwargs[self.argument or "hidden_states"]
        given, length = _pass.given, hidden_states.shape[1]
        rows = {"attention_mask": self._fitting(given.attention_mask, hidden_states)}
        rows["seq_idx"] = self._fitting(given.seq_idx, hidden_states)
        cache = None
        if self.causal:
            cache = next((value for value in (*args[1:], *kwargs.values()) if isinstance(value, Cache)), None)
            cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
            rows["cache"] = cache
        if cache is not None:
            self._claim_layer(cache)
        output, projections = self.mixer(hidden_states, output_projections=given.show is not None, **rows)
        if cache is not None:
            cache.layers[self.cache_layer].seen_tokens += length
        if given.show is not None:
            if given.with_gradients and not torch.is_grad_enabled():
                raise ValueError(
                    "The projections have no gradient under reentrant checkpointing: pass "
                    "`gradient_checkpointing_kwargs={'use_reentrant': False}`."
                )
            given.show(self.path, projections)
        return output if self.returned == 0 else (output, *(None,) * (self.returned - 1))

    @staticmethod
    def _fitting(rows: torch.Tensor | None, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """The part of `(b, past + t)` that is of these tokens `(b, t)`; None for other tokens, as a router's."""
        if rows is None or rows.shape[0] != hidden_states.shape[0] or rows.shape[1] < hidden_states.shape[1]:
            return None
        return rows[:, -hidden_states.shape[1] :]

    def _claim_layer(self, cache: Cache) -> None:
        """Puts a layer for the mixer's states into the cache. `layer_types`, which models index, can't say so."""
        layers, index = cache.layers, self.cache_layer
        while len(layers) <= index:
            layers.append(DynamicLayer())
        if isinstance(layers[index], MixerCacheLayer):
            return
        if getattr(cache, "offloading", False) or isinstance(layers[index], StaticLayer | QuantizedLayer):
            raise ValueError(
                f"The {type(cache).__name__} has a {type(layers[index]).__name__} for {self.path}, but a hybrid needs "
                "a DynamicCache that stays in place: leave `cache_implementation` out."
            )
        layers[index] = MixerCacheLayer()


class CABHybridPreTrainedModel(MixerPreTrainedModel):
    config_class = CABHybridConfig
    base_model_prefix = "hybrid"  # a name that no model inside has
    hub_classes = AUTO_MAP
    auto_class: type
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    _can_compile_fullgraph = False
    main_input_name = "input_ids"

    def __init__(self, config: CABHybridConfig, model: PreTrainedModel | None = None):
        """Of a config, with weights as the teacher's class starts them; or around a model that is taken as it is."""
        super().__init__(config)
        inner = self._make_inner(config) if model is None else model
        self.supports_gradient_checkpointing = inner.supports_gradient_checkpointing
        self.main_input_name = inner.main_input_name
        self._no_split_modules = sorted(inner._no_split_modules or ())
        for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            setattr(self, name, sorted({*(getattr(self, name) or ()), *(getattr(inner, name, None) or ())}))
        self._put_inside(inner)
        self._place_mixers()
        tied = inner._tied_weights_keys
        if isinstance(tied, dict):
            prefix = self._inner_name + "."
            self._tied_weights_keys = {prefix + key: prefix + value for key, value in tied.items()}
        self.post_init()

    _inner_name = "hybrid"

    def _put_inside(self, inner: PreTrainedModel) -> None:
        self.hybrid = inner

    @property
    def inner(self) -> PreTrainedModel:
        """The teacher's class."""
        return getattr(self, self._inner_name)

    @property
    def body(self) -> PreTrainedModel:
        """The part that reads tokens and writes hidden states."""
        return body_of(self.inner)

    @property
    def mixers(self) -> dict[str, MixerAdapter]:
        """The mixers by the path of the attention that they stand for, in the order of their calls."""
        return {path: self.body.get_submodule(path) for path in self.config.mixers}

    @property
    def mixer_list(self) -> list[nn.Module]:
        """The mixers, in the order of their calls."""
        return [adapter.mixer for adapter in self.mixers.values()]

    @classmethod
    def _make_inner(cls, config: CABHybridConfig) -> PreTrainedModel:
        inner_config = config.teacher_config
        if cls is CABHybridForSequenceClassification:
            inner_config.num_labels, inner_config.problem_type = config.num_labels, config.problem_type
        auto, options = cls.auto_class, {"dtype": torch.get_default_dtype()}
        asked = config._attn_implementation
        if asked not in (None, "sdpa"):
            options["attn_implementation"] = asked
        if type(inner_config) in auto._model_mapping:
            return auto.from_config(inner_config, trust_remote_code=False, **options)
        # Parts of larger models are no choice of their Auto class. Only transformers' own classes come into question.
        name = (inner_config.architectures or [""])[0]
        inner_class = getattr(transformers, name, None)
        if not (isinstance(inner_class, type) and issubclass(inner_class, PreTrainedModel)):
            raise ValueError(
                f"{cls.__name__} can't be made of a {inner_config.model_type!r} teacher: {auto.__name__} knows none, "
                f"and its architecture {name!r} is no class of transformers. Load the class that was saved."
            )
        return inner_class._from_config(inner_config, **options)

    def _place_mixers(self) -> None:
        body = self.body
        for path in self.config.mixers:
            parent, _, name = path.rpartition(".")
            attention = body.get_submodule(path)
            if not isinstance(attention, MixerAdapter):
                setattr(body.get_submodule(parent), name, MixerAdapter(self.config, path, attention))
        # Every part of a model that takes a padding mask of its own hands that to its mixers.
        for part in self.inner.modules():
            if not isinstance(part, PreTrainedModel):
                continue
            _parameters(type(part))  # before a compiler looks on
            if _hand_mask_over not in part._forward_pre_hooks.values():
                part.register_forward_pre_hook(_hand_mask_over, with_kwargs=True)
                part.register_forward_hook(_take_mask_back, always_call=True)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **kwargs: Any
    ) -> None:
        super()._set_gradient_checkpointing(enable, _again_with_the_same(gradient_checkpointing_func), **kwargs)

    def initialize_weights(self) -> None:
        """As in transformers, where each inner model starts its own modules: none of them knows a mixer."""
        super().initialize_weights()
        for adapter in self.mixers.values():
            for module in adapter.modules():
                if isinstance(module, StateSpaceBranch):
                    module.init_mixer_weights()

    def _probe(self) -> list[float]:
        return super()._probe() if self.main_input_name == "input_ids" else [0.0]  # of images nothing is known here

    def get_input_embeddings(self) -> nn.Module:
        return self.inner.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.inner.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.inner.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.inner.set_output_embeddings(value)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_projections: bool = False,
        projections_callback: Callable[[int, SSMProjections], None] | None = None,
        **kwargs,
    ) -> ModelOutput | tuple:
        """
        Arguments as the teacher's class has them, and

        Args:
            seq_idx: `(b, t)`, index of each token's document in packed sequences: neither states nor kept attention
                cross documents. Without a mask and a cache, positions of zero start a document, too.
            output_projections: return every mixer's B, C, time step and output, as `projections`.
            projections_callback: called with each mixer's index and [`SSMProjections`] right after it.

        Raises:
            ValueError: packed documents with a cache or a mask, or in a model that does not keep them apart.
        """
        given = dict(kwargs, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)
        given |= {"inputs_embeds": inputs_embeds, "past_key_values": past_key_values, "labels": labels}
        given["use_cache"] = use_cache
        return self._run(self.inner, given, seq_idx, output_projections, projections_callback)

    def read(
        self,
        *,
        seq_idx: torch.Tensor | None = None,
        projections_callback: Callable[[int, SSMProjections], None] | None = None,
        **inputs: Any,
    ) -> ModelOutput:
        """The body's forward pass, as a distillation makes it; where logits are more than the head's, the model's."""
        part = self.body if self.config.has_plain_head else self.inner
        return self._run(part, inputs, seq_idx, projections_callback=projections_callback)

    def _run(
        self,
        part: PreTrainedModel,
        given: dict[str, Any],
        seq_idx: torch.Tensor | None,
        output_projections: bool = False,
        projections_callback: Callable[[int, SSMProjections], None] | None = None,
    ) -> ModelOutput | tuple:
        given = {name: value for name, value in given.items() if value is not None}
        accepted = _parameters(type(part))
        positions, cache = given.get("position_ids"), given.get("past_key_values")
        free = given.get("attention_mask") is None and cache is None and not given.get("use_cache")
        if seq_idx is None and free and positions is not None and positions.shape[-1] > 1:
            seq_idx = (positions == 0).cumsum(dim=-1)
        if seq_idx is not None:
            self._check_packing(given)
            rows = given.get("input_ids", given.get("inputs_embeds"))
            seq_idx = seq_idx.to(torch.int32).expand(len(rows), -1)
            if positions is None and "position_ids" in accepted:
                given["position_ids"] = positions_from_documents(seq_idx)
        if self.training or seq_idx is not None:
            given.setdefault("use_cache", False)
        if "use_cache" not in accepted:
            given.pop("use_cache", None)
        order, shown = {path: index for index, path in enumerate(self.config.mixers)}, []

        def show(path: str, projections: SSMProjections | BidirectionalProjections) -> None:
            if projections_callback is not None:
                projections_callback(order[path], projections)
            if output_projections:
                shown.append(projections)

        wanted = show if output_projections or projections_callback is not None else None
        with handing_over(HandedOver(None, seq_idx, wanted, torch.is_grad_enabled())):
            output = part(**given)
        if output_projections and isinstance(output, ModelOutput):
            output["projections"] = tuple(shown)
        return output

    def _check_packing(self, given: dict[str, Any]) -> None:
        if given.get("use_cache") or given.get("past_key_values") is not None:
            raise ValueError(
                "Packed sequences (`seq_idx`) can't be combined with a cache: a row has one state, but several "
                "documents. Pass `use_cache=False`."
            )
        if given.get("attention_mask") is not None:
            raise ValueError(
                "Both `seq_idx` (packed documents) and `attention_mask` are given; kept attention would read across "
                "documents. Pack full blocks, or pad single documents."
            )
        if not self.config.packs_documents:
            raise ValueError(
                f"`seq_idx` is given, but layers of this {self.config.teacher['model_type']!r} hybrid read across "
                "packed documents. Give each document rows of its own, with an `attention_mask`."
            )


def _hand_mask_over(part: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> None:
    """Before a part's forward pass: its 2-D mask, if any, is that of its mixers; others say nothing of padding."""
    names = _parameters(type(part))[1:]
    place = names.index("attention_mask") if "attention_mask" in names else len(args)
    mask = args[place] if place < len(args) else kwargs.get("attention_mask")
    given = _pass.given
    if mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        given = given._replace(attention_mask=mask)
    _pass.given = given._replace(outer=_pass.given)


def _take_mask_back(part: PreTrainedModel, args: tuple, output: Any) -> None:
    _pass.given = _pass.given.outer


_PARAMETERS: dict[type[PreTrainedModel], tuple[str, ...]] = {}


def _parameters(owner: type[PreTrainedModel]) -> tuple[str, ...]:
    """Names of what the forward pass of a class takes."""
    if owner not in _PARAMETERS:
        _PARAMETERS[owner] = tuple(inspect.signature(owner.forward).parameters)
    return _PARAMETERS[owner]


class CABHybridModel(CABHybridPreTrainedModel):
    """The body of a hybrid: hidden states without a head."""

    auto_class = AutoModel

    def _put_inside(self, inner: PreTrainedModel) -> None:
        # By the name that it has inside a model with a head, so that the folder of either loads as the other.
        self._inner_name = inner.base_model_prefix or "body"
        setattr(self, self._inner_name, inner)


class CABHybridForCausalLM(CABHybridPreTrainedModel, GenerationMixin):
    """A causal language model with mixers where its attention stood; it generates as the teacher's class does."""

    auto_class = AutoModelForCausalLM

    @property
    def generation_config(self) -> GenerationConfig | None:
        """The teacher's class generates, by its own."""
        inner = self._modules.get(self._inner_name)
        return None if inner is None else inner.generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig | None) -> None:
        if self._inner_name in self._modules:
            self.inner.generation_config = value

    def generate(self, *args, **kwargs):
        """As the teacher's class."""
        return self.inner.generate(*args, **kwargs)


class CABHybridForSequenceClassification(CABHybridPreTrainedModel):
    """A classifier of texts with mixers where its attention stood. A causal hybrid's folder loads as this class."""

    auto_class = AutoModelForSequenceClassification


__all__ = [
    "CABHybridForCausalLM",
    "CABHybridForSequenceClassification",
    "CABHybridModel",
    "CABHybridPreTrainedModel",
]
