"""Makes a bidirectional student out of a vision Transformer: its shape, its weights, its attention as mixers' start.

As for language (`cab_hf.transfer.from_teacher`), x <- V, B <- K, C <- Q and the output projection <- O. Both
directions read one input projection, so both start from the teacher's attention; each has its own convolution and
transition.

Shapes: `b` batch, `c` channel, `t` token, `r` register, `d` width.

Source: arXiv 2510.19266, section "Method" (the correspondence); arXiv 2401.09417 (two directions).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from cab_hf.models.configuration_cab_vision_mamba import CABVisionMambaConfig
from cab_hf.models.modeling_cab_vision_mamba import (
    CABVisionMambaEmbeddings,
    CABVisionMambaForImageClassification,
    CABVisionMambaPreTrainedModel,
    insert_tokens,
)
from cab_hf.transfer.copying import (
    check_fields,
    copy_affine,
    copy_bias,
    copy_block,
    copy_norm,
    copy_reading,
    copy_tensor,
    mixer_fields,
)
from cab_hf.transfer.families import Affine, TeacherLayer, read_affine
from cab_hf.transfer.reading import read_layers


logger = logging.get_logger(__name__)


class TeacherTokens(NamedTuple):
    """What a vision teacher has learned of its tokens.

    Attributes:
        class_token, class_position: `(1, 1, d)`.
        registers: `(1, r, d)`, the tokens right behind the class token, each with its position if it has one.
        positions: `(1, t, d)` of the patches, row by row.
    """

    class_token: Tensor
    class_position: Tensor
    registers: Tensor
    positions: Tensor


class TeacherHead(NamedTuple):
    """A vision teacher's classifier: what it reads, as a student's `pooling`, and its weights, None without one."""

    pooling: str
    classifier: Affine | None


@dataclass(frozen=True)
class VisionFamily:
    """How to read a family of vision teachers.

    Attributes:
        student_fields: from the teacher's config to fields of the student's.
        read_tokens: from the embeddings module to its tokens.
        read_layer: from one layer's module to its weights.
        read_head: from the whole teacher to its classifier.
        layers: path of the layers inside the base model.
        read_scales: from one layer's module to its LayerScale `(d,)` behind attention and MLP; None without.
        antialias: whether the teacher smooths its positions when it resizes them.
    """

    student_fields: Callable[[PreTrainedConfig], dict[str, Any]]
    read_tokens: Callable[[nn.Module], TeacherTokens]
    read_layer: Callable[[nn.Module], TeacherLayer]
    read_head: Callable[[PreTrainedModel], TeacherHead]
    layers: str
    read_scales: Callable[[nn.Module], tuple[Tensor, Tensor]] | None = None
    antialias: bool = False


def _vit_fields(config: PreTrainedConfig) -> dict[str, Any]:
    return {"intermediate_size": config.intermediate_size, "hidden_act": config.hidden_act, "gated_mlp": False}


def _deit_fields(config: PreTrainedConfig) -> dict[str, Any]:
    return _vit_fields(config) | {"num_register_tokens": 1}


def _dinov2_fields(config: PreTrainedConfig) -> dict[str, Any]:
    width = int(config.hidden_size * config.mlp_ratio)
    fields = {"intermediate_size": width, "hidden_act": config.hidden_act, "gated_mlp": False}
    if config.use_swiglu_ffn:
        # transformers' rule: two thirds, rounded up to a multiple of 8.
        fields = {"intermediate_size": (int(width * 2 / 3) + 7) // 8 * 8, "hidden_act": "silu", "gated_mlp": True}
    return fields | {"layer_scale_init": config.layerscale_value}


def _dinov2_with_registers_fields(config: PreTrainedConfig) -> dict[str, Any]:
    return _dinov2_fields(config) | {"num_register_tokens": config.num_register_tokens}


def _tokens(embeddings: nn.Module, registers: Tensor | None = None) -> TeacherTokens:
    positions = embeddings.position_embeddings
    registers = positions[:, :0] if registers is None else registers
    return TeacherTokens(embeddings.cls_token, positions[:, :1], registers, positions[:, 1:])


def _deit_tokens(embeddings: nn.Module) -> TeacherTokens:
    tokens = _tokens(embeddings)
    # A register has no position of its own, so it takes in the distillation token's.
    registers = embeddings.distillation_token.float() + tokens.positions[:, :1].float()
    return tokens._replace(registers=registers, positions=tokens.positions[:, 1:])


def _tokens_and_registers(embeddings: nn.Module) -> TeacherTokens:
    return _tokens(embeddings, embeddings.register_tokens)


def _layer(block: nn.Module, norm: str, mlp_norm: str, parts: Mapping[str, str]) -> TeacherLayer:
    return TeacherLayer(
        norm=block.get_submodule(norm),
        mlp_norm=block.get_submodule(mlp_norm),
        **({"gate": None} | {part: read_affine(block.mlp.get_submodule(path)) for part, path in parts.items()}),
    )


def _vit_layer(block: nn.Module) -> TeacherLayer:
    return _layer(block, "layernorm_before", "layernorm_after", {"up": "fc1", "down": "fc2"})


def _dinov2_layer(block: nn.Module) -> TeacherLayer:
    gated = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    is_gated = "gate_proj" in dict(block.mlp.named_children())
    return _layer(block, "norm1", "norm2", gated if is_gated else {"up": "fc1", "down": "fc2"})


def _dinov2_scales(block: nn.Module) -> tuple[Tensor, Tensor]:
    return block.layer_scale1.lambda1, block.layer_scale2.lambda1


def _linear_child(teacher: PreTrainedModel, name: str) -> Affine | None:
    """A classifier by its name; transformers puts an identity where a model has no labels."""
    child = dict(teacher.named_children()).get(name)
    return read_affine(child) if isinstance(child, nn.Linear) else None


def _class_token_head(teacher: PreTrainedModel) -> TeacherHead:
    return TeacherHead("class_token", _linear_child(teacher, "classifier"))


def _class_token_and_mean_head(teacher: PreTrainedModel) -> TeacherHead:
    return TeacherHead("class_token_and_mean", _linear_child(teacher, "classifier"))


def _deit_head(teacher: PreTrainedModel) -> TeacherHead:
    heads = [_linear_child(teacher, name) for name in ("cls_classifier", "distillation_classifier")]
    if None in heads:
        return _class_token_head(teacher)
    # The mean of two heads is one head that reads both tokens side by side.
    weight = torch.cat([head.weight.float() for head in heads], dim=1) / 2
    bias = (heads[0].bias.float() + heads[1].bias.float()) / 2
    return TeacherHead("class_token_and_registers", Affine(weight, bias))


VISION_FAMILIES: dict[str, VisionFamily] = {
    "vit": VisionFamily(_vit_fields, _tokens, _vit_layer, _class_token_head, layers="layers"),
    "deit": VisionFamily(_deit_fields, _deit_tokens, _vit_layer, _deit_head, layers="layers"),
    "dinov2": VisionFamily(
        _dinov2_fields,
        _tokens,
        _dinov2_layer,
        _class_token_and_mean_head,
        layers="encoder.layer",
        read_scales=_dinov2_scales,
    ),
    "dinov2_with_registers": VisionFamily(
        _dinov2_with_registers_fields,
        _tokens_and_registers,
        _dinov2_layer,
        _class_token_and_mean_head,
        layers="encoder.layer",
        read_scales=_dinov2_scales,
        antialias=True,
    ),
}


def vision_family_of(config: PreTrainedConfig) -> VisionFamily:
    """The family of a vision teacher's config.

    Raises:
        ValueError: for a family without a table; the message lists the known ones.
    """
    if config.model_type not in VISION_FAMILIES:
        raise ValueError(
            f"No table says where a vision teacher of model_type {config.model_type!r} keeps its weights; known are "
            f"{sorted(VISION_FAMILIES)}. It can still teach, by its logits and over the bridge, a student that is "
            "built from a config: CABVisionMambaForImageClassification(CABVisionMambaConfig(hidden_size=..., "
            "num_hidden_layers=..., num_labels=...))."
        )
    return VISION_FAMILIES[config.model_type]


def vision_student_config(
    teacher: PreTrainedModel,
    *,
    num_hidden_layers: int | None = None,
    mixer_type: str = "mamba2",
    class_token: str | None = None,
    image_size: int | Sequence[int] | None = None,
    num_labels: int | None = None,
    **overrides: Any,
) -> CABVisionMambaConfig:
    """The config of a student of a vision teacher's shape.

    Mixers as in `student_config`, in both directions; the teacher's patches, norms, MLPs, registers, labels and
    pooling. DeiT's distillation token is a register; where it has a head of its own, the classifier reads it beside
    the class token. Without a class token the classifier reads the mean of the patches, and there are no registers.

    Args:
        teacher: a model of a known family. Its class says what its classifier reads, which its config does not.
        num_hidden_layers: depth; the teacher's when not given.
        mixer_type: "mamba2" or "mamba".
        class_token: "first" (when not given), "middle" or "none".
        image_size: pixels; the teacher's when not given.
        num_labels: classes; the teacher's, with their names, when not given.
        **overrides: any field of `CABVisionMambaConfig`.

    Raises:
        ValueError: an unknown family or field, or a feature that a student can't express.
    """
    check_fields(CABVisionMambaConfig, overrides)
    config = teacher.config
    family = vision_family_of(config)
    height, width = _pair(config.patch_size)
    if height != width:
        raise ValueError(
            f"The teacher's patches are {height} x {width} pixels, but a student's are square. Build a student from a "
            "CABVisionMambaConfig with a patch_size of its own."
        )
    fields = {
        **mixer_fields(config, num_hidden_layers, mixer_type),
        "image_size": config.image_size if image_size is None else image_size,
        "patch_size": height,
        "num_channels": config.num_channels,
        "class_token": "first" if class_token is None else class_token,
        "pooling": family.read_head(teacher).pooling,
        "norm_type": "layer_norm",
        "layer_norm_epsilon": config.layer_norm_eps,
        "mlp_bias": True,
        "problem_type": config.problem_type,
        **family.student_fields(config),
    }
    if num_labels is None or num_labels == config.num_labels:
        fields |= {"id2label": dict(config.id2label), "label2id": dict(config.label2id)}
    else:
        fields |= {"num_labels": num_labels}
    if class_token == "none":
        fields |= {"pooling": "mean", "num_register_tokens": 0}
    return CABVisionMambaConfig(**(fields | overrides))


@torch.no_grad()
def copy_vision_teacher_weights(
    student: CABVisionMambaPreTrainedModel,
    teacher: PreTrainedModel,
    layer_map: Sequence[int],
    copy_attention: bool = True,
) -> None:
    """Copies a vision teacher's weights into a student, in place.

    Mixers as in `copy_teacher_weights`. All that does not depend on them is the teacher's: with its attention in the
    mixers' places the student is the teacher. Tokens and positions that the student's config leaves out are left out;
    what only the student has stays as it is, and so does a classifier that the teacher's does not fit.

    Args:
        student: a model whose shape follows the teacher (`vision_student_config`).
        teacher: a model of a known family.
        layer_map: the teacher layer of each student layer.
        copy_attention: copy attention's projections too.

    Raises:
        ValueError: an unknown family or sizes that don't fit; the message holds both.
    """
    family, source, target = vision_family_of(teacher.config), teacher.base_model, student.base_model
    _copy_embeddings(target.embeddings, source, family)
    copy_norm("norm_f", target.norm_f, source.layernorm)
    if isinstance(student, CABVisionMambaForImageClassification):
        _copy_classifier(student, teacher, family.read_head(teacher))

    blocks, readings = source.get_submodule(family.layers), read_layers(teacher) if copy_attention else None
    for index, (block, teacher_index) in enumerate(zip(target.layers, layer_map, strict=True)):
        copy_block(f"layers.{index}", block, family.read_layer(blocks[teacher_index]))
        if readings is not None:
            copy_reading(f"layers.{index}.mixer", block.mixer, readings[teacher_index])
        if family.read_scales is not None:
            _copy_scales(f"layers.{index}", block, *family.read_scales(blocks[teacher_index]))


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _copy_embeddings(target: CABVisionMambaEmbeddings, source: PreTrainedModel, family: VisionFamily) -> None:
    config, tokens = target.config, family.read_tokens(source.embeddings)
    patches = read_affine(source.embeddings.patch_embeddings.projection)
    copy_tensor("embeddings.patch_embedding.weight", target.patch_embedding.weight, patches.weight)
    copy_bias("embeddings.patch_embedding.bias", target.patch_embedding.bias, patches.bias)
    if target.class_token is not None:
        copy_tensor("embeddings.class_token", target.class_token, tokens.class_token)
    if target.register_tokens is not None and tokens.registers.shape[1]:
        copy_tensor("embeddings.register_tokens", target.register_tokens, tokens.registers)
    if target.position_embeddings is not None:
        image, patch = _pair(source.config.image_size), _pair(source.config.patch_size)
        grid = (image[0] // patch[0], image[1] // patch[1])
        positions = _resized(tokens.positions, grid, config.grid, family.antialias)
        place = config.class_token_index(config.num_patches)
        if place is not None:
            positions = insert_tokens(positions, tokens.class_position, place)
        copy_tensor("embeddings.position_embeddings", target.position_embeddings, positions)


def _resized(positions: Tensor, grid: tuple[int, int], new_grid: tuple[int, int], antialias: bool) -> Tensor:
    """Positions `(1, t, d)` of a grid of patches for another grid."""
    if grid == new_grid:
        return positions
    image = positions.unflatten(1, grid).permute(0, 3, 1, 2).float()  # (1, d, rows, columns)
    image = F.interpolate(image, size=new_grid, mode="bicubic", align_corners=False, antialias=antialias)
    return image.flatten(2).transpose(1, 2).to(positions.dtype)


def _copy_scales(name: str, block: nn.Module, mixer_scale: Tensor, mlp_scale: Tensor) -> None:
    if block.mixer_scale is None:
        raise ValueError(
            f"The teacher scales what its layers add (LayerScale), but the student's layer_scale_init is None and "
            f"{name} has no place for it. Leave layer_scale_init to the teacher, or pass copy_weights=False."
        )
    copy_tensor(f"{name}.mixer_scale", block.mixer_scale, mixer_scale)
    if block.mlp_scale is not None:
        copy_tensor(f"{name}.mlp_scale", block.mlp_scale, mlp_scale)


def _copy_classifier(
    student: CABVisionMambaForImageClassification, teacher: PreTrainedModel, head: TeacherHead
) -> None:
    config = student.config
    if config.num_labels == 0:
        return
    reason = None
    if head.classifier is None:
        reason = f"{type(teacher).__name__} has no classifier"
    elif head.classifier.weight.shape[0] != config.num_labels:
        reason = f"the teacher's has {head.classifier.weight.shape[0]} labels"
    elif head.pooling != config.pooling:
        reason = f"the teacher's reads {head.pooling!r} and the student's {config.pooling!r}"
    if reason is not None:
        logger.warning(f"The student's classifier of {config.num_labels} labels starts at random: {reason}.")
        return
    copy_affine("classifier", student.classifier, head.classifier)
