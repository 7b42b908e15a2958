"""CAB vision students: bidirectional Mambas that read an image's patches, and show their B and C.

Shape legend: `b` batch, `c` channel, `t` token, `h` head, `n` state, `g` group, `d` width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .configuration_cab_vision_mamba import CABVisionMambaConfig, nearest_multiples
from .mixers import BIDIRECTIONAL_MIXERS, MIXERS, BidirectionalProjections, SSMProjections
from .students import CABMambaMLP, MixerPreTrainedModel, make_norm


AUTO_MAP = {
    "AutoConfig": "configuration_cab_vision_mamba.CABVisionMambaConfig",
    "AutoModel": "modeling_cab_vision_mamba.CABVisionMambaModel",
    "AutoModelForImageClassification": "modeling_cab_vision_mamba.CABVisionMambaForImageClassification",
}


@dataclass
class CABVisionMambaOutput(ModelOutput):
    """
    Attributes:
        last_hidden_state: `(b, t, hidden_size)`, after the final norm, in token order.
        pooler_output: `(b, pooled_size)`, what a classifier reads; see the config's `pooling`.
        hidden_states: embeddings, then the output of every block, the last one after the final norm; with
            `output_hidden_states`.
        projections: one [`BidirectionalProjections`] a layer, or [`SSMProjections`] where the config is not
            bidirectional; with `output_projections`.
        attentions: one implied attention map `(b, h, t, t)` a layer; with `output_attentions`.
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    projections: tuple[BidirectionalProjections | SSMProjections, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class CABVisionMambaClassifierOutput(ModelOutput):
    """Like [`CABVisionMambaOutput`], with `loss` (scalar, when `labels` are given) and `logits` `(b, num_labels)`."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    projections: tuple[BidirectionalProjections | SSMProjections, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class CABVisionMambaEmbeddings(nn.Module):
    """Patches and the class token with their positions, and registers without."""

    def __init__(self, config: CABVisionMambaConfig):
        super().__init__()
        self.config = config
        width, positions = config.hidden_size, config.num_patches + config.has_class_token
        self.patch_embedding = nn.Conv2d(config.num_channels, width, config.patch_size, stride=config.patch_size)
        self.class_token = nn.Parameter(torch.empty(1, 1, width)) if config.has_class_token else None
        registers = config.num_register_tokens
        self.register_tokens = nn.Parameter(torch.empty(1, registers, width)) if registers else None
        positions = torch.empty(1, positions, width) if config.use_absolute_positions else None
        self.position_embeddings = None if positions is None else nn.Parameter(positions)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images `(b, c, height, width)` to tokens `(b, t, hidden_size)`.

        Raises:
            ValueError: for another number of channels, and for sides that patches do not fill.
        """
        self._check(pixel_values)
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        grid, batch = patches.shape[2:], patches.shape[0]
        tokens = patches.flatten(2).transpose(1, 2)  # (b, t, d)
        place = self.config.class_token_index(tokens.shape[1])
        if place is not None:
            tokens = insert_tokens(tokens, self.class_token.expand(batch, -1, -1), place)
        if self.position_embeddings is not None:
            tokens = tokens + self.positions(*grid)
        if self.register_tokens is not None:
            tokens = insert_tokens(tokens, self.register_tokens.expand(batch, -1, -1), place + 1)
        return tokens

    def positions(self, rows: int, columns: int) -> torch.Tensor:
        """Positions `(1, t, d)` for a grid of patches, resized from the learned grid where it is another one.

        The class token's position is not resized; it stands where the class token stands among that many patches.
        """
        config, positions = self.config, self.position_embeddings
        if (rows, columns) == config.grid:
            return positions
        place = config.class_token_index(config.num_patches)
        patches = positions if place is None else torch.cat([positions[:, :place], positions[:, place + 1 :]], dim=1)
        patches = patches.unflatten(1, config.grid).permute(0, 3, 1, 2).float()  # (1, d, rows, columns)
        patches = F.interpolate(patches, size=(rows, columns), mode="bicubic", align_corners=False)
        patches = patches.flatten(2).transpose(1, 2).to(positions.dtype)
        if place is None:
            return patches
        return insert_tokens(patches, positions[:, place : place + 1], config.class_token_index(rows * columns))

    def _check(self, pixel_values: torch.Tensor) -> None:
        config, shape = self.config, tuple(pixel_values.shape)
        if len(shape) != 4 or shape[1] != config.num_channels:
            raise ValueError(
                f"`pixel_values` has shape {shape}, expected (batch, {config.num_channels}, height, width): the model "
                f"has num_channels={config.num_channels}. Convert the images, or make a model with their channels."
            )
        for name, side in zip(("height", "width"), shape[2:]):
            if side == 0 or side % config.patch_size:
                working = " and ".join(map(str, sorted(nearest_multiples(side, config.patch_size))))
                raise ValueError(
                    f"`pixel_values` has a {name} of {side} pixels, which patches of {config.patch_size} do not fill. "
                    f"Resize the images; the nearest sizes that work are {working}."
                )

    @torch.no_grad()
    def init_tokens(self) -> None:
        for parameter in (self.class_token, self.register_tokens, self.position_embeddings):
            if parameter is not None:
                init.normal_(parameter, mean=0.0, std=self.config.initializer_range)


def insert_tokens(tokens: torch.Tensor, new: torch.Tensor, place: int) -> torch.Tensor:
    """`new` `(b, r, d)` between the first `place` of `tokens` `(b, t, d)` and the others: `(b, t + r, d)`."""
    return torch.cat([tokens[:, :place], new, tokens[:, place:]], dim=1)


def drop_path(branch: torch.Tensor, rate: float) -> torch.Tensor:
    """Stochastic depth: zeroes samples of a residual branch `(b, t, d)`, and scales the others up to keep the mean.

    Source: arXiv 1603.09382.
    """
    kept = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= rate
    return branch * (kept / (1.0 - rate)).to(branch.dtype)


class CABVisionMambaBlock(GradientCheckpointingLayer):
    """Norm, mixer and, where the config has one, MLP around a residual stream."""

    def __init__(self, config: CABVisionMambaConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.drop_path_rate = config.drop_path_rate_of(layer_idx)
        mixers = BIDIRECTIONAL_MIXERS if config.bidirectional else MIXERS
        self.norm = make_norm(config)
        self.mixer = mixers[config.layer_mixer_types[layer_idx]](config, layer_idx)
        self.mlp = CABMambaMLP(config) if config.intermediate_size else None
        self.mlp_norm = make_norm(config) if self.mlp is not None else None
        scaled, width = config.layer_scale_init is not None, config.hidden_size
        self.mixer_scale = nn.Parameter(torch.empty(width)) if scaled else None
        self.mlp_scale = nn.Parameter(torch.empty(width)) if scaled and self.mlp is not None else None

    def forward(
        self, hidden_states: torch.Tensor, output_attentions: bool = False, output_projections: bool = False
    ) -> tuple[torch.Tensor | None, ...]:
        """Returns the hidden states, the fields of the mixer's projections, and its attention map or None.

        Flat, because reentrant checkpointing keeps gradients of top-level tensors only.
        """
        if self.config.residual_in_fp32:
            hidden_states = hidden_states.float()
        normed = self.norm(hidden_states.to(self.norm.weight.dtype))
        mixed, projections = self.mixer(normed, output_projections=output_projections)
        hidden_states = hidden_states + self._branch(mixed, self.mixer_scale)
        if self.mlp is not None:
            inner = self.mlp(self.mlp_norm(hidden_states.to(self.mlp_norm.weight.dtype)))
            hidden_states = hidden_states + self._branch(inner, self.mlp_scale)
        attention_map = None
        if output_attentions:
            scans = (value for name, value in zip(projections._fields, projections) if name != "output")
            attention_map = self.mixer.attention_map(*scans)
        return hidden_states, *projections, attention_map

    def _branch(self, branch: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        branch = branch if scale is None else branch * scale
        return drop_path(branch, self.drop_path_rate) if self.training and self.drop_path_rate else branch

    @torch.no_grad()
    def init_scales(self) -> None:
        for scale in (self.mixer_scale, self.mlp_scale):
            if scale is not None:
                init.constant_(scale, self.config.layer_scale_init)


class CABVisionMambaPreTrainedModel(MixerPreTrainedModel):
    config_class = CABVisionMambaConfig
    hub_classes = AUTO_MAP
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["CABVisionMambaEmbeddings", "CABVisionMambaBlock"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CABVisionMambaEmbeddings):
            module.init_tokens()
        elif isinstance(module, CABVisionMambaBlock):
            module.init_scales()


class CABVisionMambaModel(CABVisionMambaPreTrainedModel):
    """The backbone: patches, blocks, a final norm and pooling."""

    def __init__(self, config: CABVisionMambaConfig):
        super().__init__(config)
        self.embeddings = CABVisionMambaEmbeddings(config)
        self.layers = nn.ModuleList([CABVisionMambaBlock(config, idx) for idx in range(config.num_hidden_layers)])
        self.norm_f = make_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embedding

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        output_projections: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        projections_callback: Callable[[int, BidirectionalProjections | SSMProjections], None] | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> CABVisionMambaOutput | tuple:
        """
        Args:
            pixel_values: `(b, num_channels, height, width)`, of any size that patches fill.
            output_projections: return every layer's B, C, time steps and mixer output.
            output_attentions: return every layer's implied attention map, quadratic in tokens.
            projections_callback: called with each layer's index and projections right after the layer. What it
                computes is undone there in the backward pass too, so that one layer's gradients exist at a time.

        Raises:
            ValueError: without `pixel_values`, or if they do not fit the model.
        """
        config = self.config
        if pixel_values is None:
            raise ValueError("`pixel_values` (b, c, height, width) must be given, got None.")
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return_dict = config.return_dict if return_dict is None else return_dict
        projections_class = BidirectionalProjections if config.bidirectional else SSMProjections

        hidden_states = self.embeddings(pixel_values)
        # What nobody asked for is not kept: it would hold every layer's activations in memory.
        all_hidden_states, all_projections, all_maps = (), (), ()
        are_shown = output_projections or projections_callback is not None
        for index, layer in enumerate(self.layers):
            if output_hidden_states:
                all_hidden_states += (hidden_states,)
            hidden_states, *projections, attention_map = layer(hidden_states, output_attentions, are_shown)
            projections = projections_class(*projections)
            if projections_callback is not None:
                projections_callback(index, projections)
            if output_projections:
                all_projections += (projections,)
            if output_attentions:
                all_maps += (attention_map,)
        hidden_states = self.norm_f(hidden_states.to(self.norm_f.weight.dtype))

        output = CABVisionMambaOutput(
            last_hidden_state=hidden_states,
            pooler_output=self._pool(hidden_states),
            hidden_states=(*all_hidden_states, hidden_states) if output_hidden_states else None,
            projections=all_projections if output_projections else None,
            attentions=all_maps if output_attentions else None,
        )
        return output if return_dict else output.to_tuple()

    def _pool(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Tokens `(b, t, d)` to `(b, pooled_size)`."""
        config = self.config
        extra = config.has_class_token + config.num_register_tokens
        place = config.class_token_index(hidden_states.shape[1] - extra) or 0
        parts = []
        if config.pooling != "mean":
            parts.append(hidden_states[:, place])
        if config.pooling == "class_token_and_registers":
            parts.append(hidden_states[:, place + 1 : place + extra].flatten(1))
        if config.pooling in ("mean", "class_token_and_mean"):
            patches = torch.cat([hidden_states[:, :place], hidden_states[:, place + extra :]], dim=1)
            parts.append(patches.mean(dim=1))
        return torch.cat(parts, dim=-1)


class CABVisionMambaForImageClassification(CABVisionMambaPreTrainedModel):
    """[`CABVisionMambaModel`] with a linear classifier."""

    def __init__(self, config: CABVisionMambaConfig):
        super().__init__(config)
        self.backbone = CABVisionMambaModel(config)
        labels = config.num_labels
        self.classifier = nn.Linear(config.pooled_size, labels) if labels > 0 else nn.Identity()
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_projections: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> CABVisionMambaClassifierOutput | tuple:
        """
        Arguments as [`CABVisionMambaModel.forward`], and

        Args:
            labels: `(b,)` class indices; or `(b, num_labels)` floating class probabilities, as mixup makes them. With
                `config.problem_type` "multi_label_classification" or "regression" what transformers expects there.
        """
        outputs = self.backbone(
            pixel_values,
            output_projections=output_projections,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.classifier(outputs.pooler_output)
        output = CABVisionMambaClassifierOutput(
            loss=None if labels is None else self._loss(logits, labels, **kwargs),
            logits=logits,
            hidden_states=outputs.hidden_states,
            projections=outputs.projections,
            attentions=outputs.attentions,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> torch.Tensor:
        config = self.config
        kind = config.problem_type or ("single_label_classification" if config.num_labels > 1 else "regression")
        one_of_many = kind == "single_label_classification"
        if one_of_many and not labels.is_floating_point():
            return self.loss_function(labels.long(), logits, config, num_items_in_batch=num_items_in_batch, **kwargs)
        if config.num_labels == 1 and labels.ndim == 1:
            labels = labels[:, None]
        if labels.shape != logits.shape:
            raise ValueError(
                f"`labels` of shape {tuple(labels.shape)} and {labels.dtype} do not fit {kind} of {config.num_labels} "
                "labels, which needs one number a label (class probabilities, zeros and ones, or targets): "
                f"{tuple(logits.shape)}. Give those, or class indices (b,) as integers for one label of many."
            )
        logits, labels = logits.float(), labels.to(logits.device, torch.float32)
        loss = F.cross_entropy(logits, labels) if one_of_many else self.loss_function(labels, logits, config)
        # Trainer counts the elements of `labels` over accumulated batches, and these losses are means of one batch.
        return loss if num_items_in_batch is None else loss * labels.numel() / num_items_in_batch


__all__ = ["CABVisionMambaForImageClassification", "CABVisionMambaModel", "CABVisionMambaPreTrainedModel"]
