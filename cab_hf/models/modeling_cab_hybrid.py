"""Hybrids: a Transformer's own class with state-space mixers where its attention stood, in all layers or some.

No family is known here. A mixer is called, and answers, as the attention module did; all else is the teacher's class.
Shape legend: `b` batch, `t` token, `d` width.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.utils import ModelOutput

from .configuration_cab_hybrid import CABHybridConfig
from .hybrid_decoding import captured_tokens
from .mixer_adapter import HandedOver, MixerAdapter, again_with_the_same, current, handing_over, parameters_of
from .mixers import BidirectionalProjections, SSMProjections, StateSpaceBranch
from .students import MixerPreTrainedModel, body_of, positions_from_documents


AUTO_MAP = {
    "AutoConfig": "configuration_cab_hybrid.CABHybridConfig",
    "AutoModel": "modeling_cab_hybrid.CABHybridModel",
    "AutoModelForCausalLM": "modeling_cab_hybrid.CABHybridForCausalLM",
    "AutoModelForSequenceClassification": "modeling_cab_hybrid.CABHybridForSequenceClassification",
}


class CABHybridPreTrainedModel(MixerPreTrainedModel):
    config_class = CABHybridConfig
    base_model_prefix = "hybrid"  # a name that no model inside has
    hub_classes = AUTO_MAP
    auto_class: type
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    _can_compile_fullgraph = False
    _decodes = False
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
            parameters_of(type(part))  # before a compiler looks on
            if _hand_mask_over not in part._forward_pre_hooks.values():
                part.register_forward_pre_hook(_hand_mask_over, with_kwargs=True)
                part.register_forward_hook(_take_mask_back, always_call=True)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **kwargs: Any
    ) -> None:
        super()._set_gradient_checkpointing(enable, again_with_the_same(gradient_checkpointing_func), **kwargs)

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
        cache: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_projections: bool = False,
        projections_callback: Callable[[int, SSMProjections], None] | None = None,
        **kwargs,
    ) -> ModelOutput | tuple:
        """
        Arguments as the teacher's class has them, and

        Args:
            cache: of the tokens before; `past_key_values`, its older name, is taken, too.
            seq_idx: `(b, t)`, index of each token's document in packed sequences: neither states nor kept attention
                cross documents. Without a mask and a cache, positions of zero start a document, too.
            output_projections: return every mixer's B, C, time step and output, as `projections`.
            projections_callback: called with each mixer's index and [`SSMProjections`] right after it.

        Raises:
            ValueError: packed documents with a cache or a mask, or in a model that does not keep them apart.
        """
        given = dict(kwargs, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)
        given |= {"inputs_embeds": inputs_embeds, "cache": cache, "labels": labels, "use_cache": use_cache}
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
        accepted = parameters_of(type(part))
        older = given.pop("past_key_values", None)
        positions, cache = given.get("position_ids"), given.pop("cache", older)
        if cache is not None:
            given["cache" if "cache" in accepted else "past_key_values"] = cache
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

        shows = output_projections or projections_callback is not None
        handed = HandedOver(seq_idx, shows, show, torch.is_grad_enabled(), generation=current.given.generation)
        decodes = self._decodes and part is self.inner and not (self.training or torch.compiler.is_compiling())
        with handing_over(handed), captured_tokens(part) if decodes else nullcontext():
            output = part(**given)
        if output_projections and isinstance(output, ModelOutput):
            output["projections"] = tuple(shown)
        return output

    def _check_packing(self, given: dict[str, Any]) -> None:
        if given.get("use_cache") or not given.keys().isdisjoint(("cache", "past_key_values")):
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
    names = parameters_of(type(part))[1:]
    place = names.index("attention_mask") if "attention_mask" in names else len(args)
    mask = args[place] if place < len(args) else kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 4 and current.masks is None:
        raise ValueError(
            f"`attention_mask` has the shape {tuple(mask.shape)}, but mixers read rows: one of (b, t) that is zero at "
            "padding, or `seq_idx` where documents are packed."
        )
    is_of_tokens = mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2)
    current.masks = (mask if is_of_tokens else current.mask, current.masks)


def _take_mask_back(part: PreTrainedModel, args: tuple, output: Any) -> None:
    current.masks = current.masks[1]


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
    _decodes = True

    @property
    def generation_config(self) -> GenerationConfig | None:
        """The teacher's class generates, by its own."""
        inner = self._modules.get(self._inner_name)
        return None if inner is None else inner.generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig | None) -> None:
        if self._inner_name in self._modules:
            self.inner.generation_config = value

    def generate(self, *args, cache_implementation: str | None = None, **kwargs):
        """As the teacher's class. A captured token has a static cache of its own, so that it need not be asked for."""
        if cache_implementation not in (None, "static"):
            kwargs["cache_implementation"] = cache_implementation
        with handing_over(replace(current.given, generation=object())), captured_tokens(self.inner):
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
