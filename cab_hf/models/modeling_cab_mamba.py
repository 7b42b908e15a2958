"""CAB-Mamba language models: stacks of state-space mixers that show their B and C.

Shape legend: `b` batch, `t` token, `h` head, `n` state, `g` group, `d` width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import CompileConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput, logging
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.versions import require_version

from .configuration_cab_mamba import CABMambaConfig
from .decoding import captures, one_token
from .generation import UNKNOWN_POSITIONS, StatefulGenerationMixin, tokens_read
from .mixers import MIXERS, SSMProjections, fitted, projected
from .students import CABMambaMLP, MixerPreTrainedModel, make_norm


logger = logging.get_logger(__name__)

# Earlier ones have no cache for states. Of what differs later, a student's own probe tells (`students.py`).
require_version("transformers>=5.22", "Its caches hold recurrent states. Run `pip install -U transformers`.")

AUTO_MAP = {
    "AutoConfig": "configuration_cab_mamba.CABMambaConfig",
    "AutoModel": "modeling_cab_mamba.CABMambaModel",
    "AutoModelForCausalLM": "modeling_cab_mamba.CABMambaForCausalLM",
    "AutoModelForSequenceClassification": "modeling_cab_mamba.CABMambaForSequenceClassification",
}


@dataclass
class CABMambaOutput(ModelOutput):
    """
    Attributes:
        last_hidden_state: `(b, t, hidden_size)`, after the final norm.
        cache: convolution and recurrent states of every layer; with `use_cache`.
        hidden_states: embeddings, then the output of every block, the last one after the final norm; with
            `output_hidden_states`.
        projections: one [`SSMProjections`] a layer; with `output_projections`.
        attentions: one implied attention map `(b, h, t, t)` a layer; with `output_attentions`.
    """

    last_hidden_state: torch.Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    projections: tuple[SSMProjections, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class CABMambaCausalLMOutput(ModelOutput):
    """Like [`CABMambaOutput`], with `loss` (scalar, when `labels` are given) and `logits` `(b, t, vocab_size)`."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    projections: tuple[SSMProjections, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class CABMambaSequenceClassifierOutput(ModelOutput):
    """Like [`CABMambaOutput`], with `loss` (scalar, when `labels` are given) and `logits` `(b, num_labels)`."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    projections: tuple[SSMProjections, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class ScaledEmbedding(nn.Embedding):
    """Embeddings times a factor, also where they are looked up to become `inputs_embeds`."""

    def __init__(self, num_embeddings: int, embedding_dim: int, scale: float):
        super().__init__(num_embeddings, embedding_dim)
        self.embed_scale = scale  # the name that PEFT looks for

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) * self.embed_scale


class CABMambaBlock(GradientCheckpointingLayer):
    """Norm, mixer and, where the config has one, MLP around a residual stream."""

    def __init__(self, config: CABMambaConfig, layer_idx: int):
        super().__init__()
        self.parallel_residual = config.parallel_residual
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = make_norm(config)
        self.mixer = MIXERS[config.layer_mixer_types[layer_idx]](config, layer_idx)
        self.mlp = CABMambaMLP(config) if config.intermediate_size else None
        self.mlp_norm = make_norm(config) if self.mlp is not None and not config.shared_norm else None
        self.post_norm = make_norm(config) if config.post_norms else None
        self.post_mlp_norm = make_norm(config) if config.post_norms and self.mlp is not None else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        output_attentions: bool = False,
        output_projections: bool = False,
    ) -> tuple[torch.Tensor | None, ...]:
        """Returns the hidden states, the four fields of the mixer's projections, and its attention map or None.

        Flat, because reentrant checkpointing keeps gradients of top-level tensors only.
        """
        residual = hidden_states.float() if self.residual_in_fp32 else hidden_states
        normed = self.norm(hidden_states.to(self.norm.weight.dtype))
        mixed, projections = self.mixer(normed, cache, attention_mask, seq_idx, output_projections)
        if self.post_norm is not None:
            mixed = self.post_norm(mixed.to(self.post_norm.weight.dtype))
        hidden_states = residual + mixed
        if self.mlp is not None:
            if self.mlp_norm is not None:
                stream = residual if self.parallel_residual else hidden_states
                normed = self.mlp_norm(stream.to(self.mlp_norm.weight.dtype))
            transformed = self.mlp(normed)
            if self.post_mlp_norm is not None:
                transformed = self.post_mlp_norm(transformed.to(self.post_mlp_norm.weight.dtype))
            hidden_states = hidden_states + transformed
        attention_map = None
        if output_attentions:
            attention_map = self.mixer.attention_map(*projections[:3], seq_idx)
        return hidden_states, *projections, attention_map


class CABMambaPreTrainedModel(MixerPreTrainedModel):
    config_class = CABMambaConfig
    hub_classes = AUTO_MAP
    _no_split_modules = ["CABMambaBlock"]
    _is_stateful = True

    @staticmethod
    def _refuse_past(past_key_values: object = None, **kwargs) -> None:
        if past_key_values is not None:
            raise ValueError(
                f"`past_key_values` is a {type(past_key_values).__name__}, but a Mamba keeps no keys and values. "
                "Pass as `cache` the one that an earlier call with `use_cache=True` returned."
            )


class CABMambaModel(CABMambaPreTrainedModel):
    """The backbone: embeddings, blocks and a final norm."""

    def __init__(self, config: CABMambaConfig):
        super().__init__(config)
        sizes, scale = (config.vocab_size, config.hidden_size), config.embedding_multiplier
        self.embeddings = nn.Embedding(*sizes) if scale == 1.0 else ScaledEmbedding(*sizes, scale)
        positions = config.max_position_embeddings
        self.position_embeddings = nn.Embedding(positions, config.hidden_size) if positions else None
        self.layers = nn.ModuleList([CABMambaBlock(config, idx) for idx in range(config.num_hidden_layers)])
        self.norm_f = make_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value

    @deprecate_kwarg("cache_params", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        seq_idx: torch.Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        output_projections: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        projections_callback: Callable[[int, SSMProjections], None] | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> CABMambaOutput | tuple:
        """
        Args:
            input_ids: `(b, t)`, or `inputs_embeds`: `(b, t, hidden_size)`.
            attention_mask: `(b, t)` or, with a cache, `(b, past + t)`; zero at padding, on either side of a row.
            position_ids: `(b, t)`. Without a cache a position of zero starts a document of a packed sequence; read for
                learned positions too, where `seq_idx` and the attention mask give them when they are missing.
            seq_idx: `(b, t)`, index of each token's document in packed sequences: states do not cross documents.
            cache: states to continue from, as returned by an earlier call with `use_cache=True`.
            output_projections: return every layer's B, C, time step and mixer output.
            output_attentions: return every layer's implied attention map, quadratic in length.
            projections_callback: called with each layer's index and [`SSMProjections`] right after the layer. What it
                computes is undone there in the backward pass too, so that one layer's gradients exist at a time.

        Raises:
            ValueError: if not exactly one of `input_ids` and `inputs_embeds` is given, for packed sequences with a
                cache, for a cache that records its past, for `past_key_values`, and for learned positions that can't
                be known or do not exist.
        """
        self._refuse_past(**kwargs)
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self.embeddings(input_ids)
        length = inputs_embeds.shape[1]
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return_dict = config.return_dict if return_dict is None else return_dict

        packed = seq_idx is not None
        if not packed and position_ids is not None and length > 1:
            packed = cache is None and not use_cache
        if not packed and length > 1 and (cache is not None or use_cache):
            packed = self._restarts(position_ids, attention_mask)
        if packed and (cache is not None or use_cache):
            raise ValueError(
                "Packed sequences (`seq_idx`, or `position_ids` that restart) can't be combined with a cache: a row "
                "has one state, but several documents. Pass `use_cache=False`, or one sequence a row with an "
                "`attention_mask`."
            )
        if packed and seq_idx is None:
            seq_idx = (position_ids == 0).cumsum(dim=-1)
        if seq_idx is not None:
            seq_idx = seq_idx.to(torch.int32).expand(inputs_embeds.shape[0], -1)

        if use_cache is None:
            use_cache = config.use_cache and not self.training and not packed
        if self.gradient_checkpointing and self.training:
            use_cache = False
        if use_cache and cache is None:
            cache = DynamicCache(config=config)
        continues = cache is not None and cache.has_previous_state()
        if cache is not None and cache.is_recording_past(0):
            raise ValueError(
                "The cache records its past to be cropped later (`activate_past_recording`, assisted decoding), but a "
                "recurrent state can't be rolled back. Pass a cache that does not; a student can't draft for a model."
            )

        if cache is not None and not torch.compiler.is_compiling():
            count = tokens_read(cache, "read")[0] + length
            cache.read = (count, None if input_ids is None else input_ids[:, -1:])
        hidden_states = inputs_embeds
        if self.position_embeddings is not None:
            if position_ids is None:
                position_ids = self._position_ids(inputs_embeds, attention_mask, seq_idx, continues)
            elif (position_ids.is_cpu or length > 1 and not self.training) and not torch.compiler.is_compiling():
                if int(position_ids.max()) >= config.max_position_embeddings:
                    raise ValueError(
                        f"`position_ids` go up to {int(position_ids.max())}, but `max_position_embeddings` is "
                        f"{config.max_position_embeddings}. Count them from 0 in each document, or shorten the input."
                    )
            hidden_states = hidden_states + self.position_embeddings(position_ids)
        if attention_mask is not None:
            attention_mask = attention_mask[:, -length:]
            # A token that is decoded alone is hardly ever padding, and one look is cheaper than masks in every layer.
            if continues and length == 1 and not torch.compiler.is_compiling() and bool(attention_mask.all()):
                attention_mask = None

        # What nobody asked for is not kept: it would hold every layer's activations in memory.
        all_hidden_states, all_projections, all_maps = (), (), ()
        are_shown = output_projections or projections_callback is not None
        for index, layer in enumerate(self.layers):
            if output_hidden_states:
                all_hidden_states += (hidden_states,)
            hidden_states, *projections, attention_map = layer(
                hidden_states, cache, attention_mask, seq_idx, output_attentions, are_shown
            )
            projections = SSMProjections(*projections)
            if projections_callback is not None:
                projections_callback(index, projections)
            if output_projections:
                all_projections += (projections,)
            if output_attentions:
                all_maps += (attention_map,)
        hidden_states = self.norm_f(hidden_states.to(self.norm_f.weight.dtype))

        output = CABMambaOutput(
            last_hidden_state=hidden_states,
            cache=cache if use_cache else None,
            hidden_states=(*all_hidden_states, hidden_states) if output_hidden_states else None,
            projections=all_projections if output_projections else None,
            attentions=all_maps if output_attentions else None,
        )
        return output if return_dict else output.to_tuple()

    @staticmethod
    def _restarts(position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> bool:
        """Whether positions of two neighbouring real tokens do not rise."""
        if position_ids is None or torch.compiler.is_compiling():
            return False
        falls = position_ids[:, 1:] <= position_ids[:, :-1]
        if attention_mask is not None:
            real = attention_mask[:, -position_ids.shape[1] :] != 0
            falls = falls & real[:, 1:] & real[:, :-1]
        return bool(falls.any())

    def _position_ids(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        seq_idx: torch.Tensor | None,
        continues: bool,
    ) -> torch.LongTensor:
        length, table = inputs_embeds.shape[1], self.config.max_position_embeddings
        if attention_mask is None and continues:
            raise ValueError(UNKNOWN_POSITIONS)
        if attention_mask is None:
            real = torch.ones(1, length, dtype=torch.long, device=inputs_embeds.device)
        else:
            real = attention_mask.long()
        counts = real.cumsum(dim=-1)
        if seq_idx is not None:
            starts = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0), value=True)
            counts = counts - torch.where(starts, counts - real, 0).cummax(dim=-1).values
        # Padding and packing take no positions, so that only a long row needs a look at the values.
        if counts.shape[1] > table and int(counts.max()) > table:
            raise ValueError(
                f"The sequence has {int(counts.max())} tokens, `max_position_embeddings` is {table}. Shorten the "
                f"input, or use a student without learned positions."
            )
        return (counts - 1).clamp(min=0)[:, -length:]


class CABMambaForCausalLM(CABMambaPreTrainedModel, StatefulGenerationMixin):
    """[`CABMambaModel`] with a language-modelling head."""

    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}

    def __init__(self, config: CABMambaConfig):
        super().__init__(config)
        self.backbone = CABMambaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def get_compiled_call(self, compile_config: CompileConfig | None) -> Callable:
        """The call that a static cache asks for. A captured token is faster than a compiled one, and ready at once."""
        if compile_config is None and self.device.type == "cuda" and captures(self):
            return self.__call__
        return super().get_compiled_call(compile_config)

    @deprecate_kwarg("cache_params", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        seq_idx: torch.Tensor | None = None,
        cache: Cache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_projections: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        **kwargs,
    ) -> CABMambaCausalLMOutput | tuple:
        """
        Arguments as [`CABMambaModel.forward`], and

        Args:
            labels: `(b, t)`, shifted inside; -100 is ignored.
            logits_to_keep: compute logits for the last that many tokens (0: all), or for these positions.
        """
        self._refuse_past(**kwargs)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        # A token behind a cache, of which nothing but logits is asked, is a CUDA graph where there can be one.
        if not torch.compiler.is_compiling() and cache is not None and not torch.is_grad_enabled():
            is_one = input_ids is not None and input_ids.shape[1] == 1 and isinstance(logits_to_keep, int)
            is_plain = inputs_embeds is None and seq_idx is None and labels is None
            is_plain = is_plain and (self.config.use_cache if use_cache is None else use_cache)
            shows = output_projections or output_attentions or output_hidden_states
            shows = shows or self.config.output_attentions or self.config.output_hidden_states
            if is_one and is_plain and not shows:
                logits = one_token(self, input_ids, attention_mask, position_ids, cache)
                if logits is not None:
                    cache.read = (tokens_read(cache, "read")[0] + 1, input_ids)
                    output = CABMambaCausalLMOutput(logits=logits, cache=cache)
                    return output if return_dict else output.to_tuple()
        outputs = self.backbone(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            seq_idx=seq_idx,
            cache=cache,
            use_cache=use_cache,
            output_projections=output_projections,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = projected(fitted(outputs.last_hidden_state[:, kept], self.lm_head), self.lm_head)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CABMambaCausalLMOutput(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            projections=outputs.projections,
            attentions=outputs.attentions,
        )
        return output if return_dict else output.to_tuple()


class CABMambaForSequenceClassification(CABMambaPreTrainedModel):
    """[`CABMambaModel`] with a linear head, `score`, on the last token of each row that is no padding.

    The folder of a [`CABMambaForCausalLM`] loads as this class, with a new head of `num_labels` rows, and back.
    """

    def __init__(self, config: CABMambaConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.backbone = CABMambaModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    @deprecate_kwarg("cache_params", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        seq_idx: torch.Tensor | None = None,
        cache: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool = False,
        output_projections: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> CABMambaSequenceClassifierOutput | tuple:
        """
        Arguments as [`CABMambaModel.forward`], and

        Args:
            attention_mask: `(b, t)`, zero at padding, on either side of a row. Without it tokens that equal
                `config.pad_token_id` are not pooled, but those before the text are read: give it for left padding.
            seq_idx: `(b, t)`, as in the backbone; of several documents in a row the last one is classified.
            labels: `(b,)` class indices; `(b,)` or `(b, num_labels)` numbers for
                `config.problem_type="regression"`; `(b, num_labels)` zeros and ones for
                `"multi_label_classification"`. Without a `problem_type` transformers' rule finds it: regression for
                one label, else by whether labels are integers, and remembers it.

        Raises:
            ValueError: as the backbone; for several rows where neither a mask nor `pad_token_id` tells padding; for
                labels of another shape than the problem has.
        """
        self._refuse_past(**kwargs)
        outputs = self.backbone(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            seq_idx=seq_idx,
            cache=cache,
            use_cache=use_cache,
            output_projections=output_projections,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        hidden_states = outputs.last_hidden_state
        rows = torch.arange(hidden_states.shape[0], device=hidden_states.device)
        last = self._last_tokens(hidden_states, input_ids, attention_mask)
        logits = self.score(fitted(hidden_states[rows, last], self.score))
        output = CABMambaSequenceClassifierOutput(
            loss=None if labels is None else self._loss(logits, labels, **kwargs),
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            projections=outputs.projections,
            attentions=outputs.attentions,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _last_tokens(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.LongTensor | None,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Index `(b,)` of each row's last token that is no padding."""
        batch, length = hidden_states.shape[:2]
        pad = self.config.pad_token_id
        if attention_mask is not None:
            real = attention_mask[:, -length:] != 0
        elif pad is None and batch > 1:
            raise ValueError(
                f"Where the {batch} rows end is unknown: `attention_mask` and `config.pad_token_id` are None. Pass "
                "the `attention_mask` (b, t), set `config.pad_token_id`, or classify one row at a time."
            )
        elif input_ids is not None and pad is not None:
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
            real = input_ids != pad
        else:
            if input_ids is None and batch > 1:
                logger.warning_once(
                    "Padding can't be seen in `inputs_embeds`, so the last position of each row is classified. Pass "
                    "the `attention_mask` where rows are padded."
                )
            return torch.full((batch,), length - 1, device=hidden_states.device)
        positions = torch.arange(length, device=hidden_states.device)
        return (positions * real.to(hidden_states.device)).argmax(dim=-1)

    def _loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> torch.Tensor:
        config, count = self.config, self.config.num_labels
        kind = config.problem_type
        if kind is None and count > 1:
            is_index = labels.dtype in (torch.long, torch.int)
            kind = "single_label_classification" if is_index else "multi_label_classification"
        kind = kind or "regression"
        shapes = [(logits.shape[0], count)]
        if kind == "single_label_classification" or count == 1:
            shapes = [(logits.shape[0],), (logits.shape[0], 1)]
        if tuple(labels.shape) not in shapes:
            raise ValueError(
                f"`labels` of shape {tuple(labels.shape)} and {labels.dtype} do not fit {kind} of {count} labels, "
                f"which needs {' or '.join(map(str, shapes))}. Change them, `num_labels` or `config.problem_type`: "
                "integers are class indices, floating numbers one value a label."
            )
        logits = logits.float()
        if kind == "single_label_classification":
            return self.loss_function(labels, logits, config, num_items_in_batch=num_items_in_batch, **kwargs)
        if count == 1:
            labels = labels.view_as(logits)
        loss = self.loss_function(labels.float(), logits, config)
        # Trainer counts labels over accumulated batches, and these losses of transformers are means of one batch.
        return loss if num_items_in_batch is None else loss * labels.numel() / num_items_in_batch


__all__ = [
    "CABMambaForCausalLM",
    "CABMambaForSequenceClassification",
    "CABMambaModel",
    "CABMambaPreTrainedModel",
]
