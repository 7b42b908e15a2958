"""Reads checkpoints of Vim (Vision Mamba, arXiv 2401.09417) as vision students.

Vim's block adds the mixer's output to a float32 residual stream, takes its RMS norm (epsilon 1e-5) and runs a mixer of
two S6 branches, each of which is gated; their outputs are summed and, in the released models, divided by two
(`if_divide_out`). The final norm follows the last addition, and the classifier reads the class token, which stands
behind the first half of the patches. A `CABVisionMambaModel` computes the same: a gate that both branches share may as
well follow their mean.

Shapes: `t` patch, `d` width, `e` mixer width, `n` state, `r` rank.
"""

import argparse
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import logging

from cab_hf.models.configuration_cab_vision_mamba import CABVisionMambaConfig
from cab_hf.models.modeling_cab_vision_mamba import CABVisionMambaForImageClassification


logger = logging.get_logger(__name__)

_OUTER = {
    "patch_embed.proj.weight": "backbone.embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "backbone.embeddings.patch_embedding.bias",
    "cls_token": "backbone.embeddings.class_token",
    "pos_embed": "backbone.embeddings.position_embeddings",
    "norm_f.weight": "backbone.norm_f.weight",
}
_HEAD = {"head.weight": "classifier.weight", "head.bias": "classifier.bias"}
_SHARED = ("norm.weight", "mixer.in_proj.weight", "mixer.out_proj.weight")
# Of one branch; Vim marks those of the backward branch by `_b`.
_BRANCH = {
    "A{}_log": "A_log",
    "D{}": "D",
    "conv1d{}.weight": "conv1d.weight",
    "conv1d{}.bias": "conv1d.bias",
    "x_proj{}.weight": "x_proj.weight",
    "dt_proj{}.weight": "dt_proj.weight",
    "dt_proj{}.bias": "dt_proj.bias",
}
_BLOCK = {
    **{name: name for name in _SHARED},
    **{f"mixer.{name.format('')}": f"mixer.{own}" for name, own in _BRANCH.items()},
    **{f"mixer.{name.format('_b')}": f"mixer.backward.{own}" for name, own in _BRANCH.items()},
}
_READABLE = (
    "Readable are Vim's models of two branches (bimamba v2) with one class token in the middle and learned positions, "
    "whose names end in 'bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2'; not those with a class token "
    "at another place or two of them, rotary positions, LayerScale or a distillation head."
)


def vim_from_state_dict(
    state_dict: Mapping[str, Tensor],
    *,
    image_size: int | Sequence[int] = 224,
    num_labels: int | None = None,
    **config_overrides: Any,
) -> CABVisionMambaForImageClassification:
    """A vision student with the weights of a Vim of two branches (bimamba v2) and a class token in the middle.

    All sizes but the image's are read from the weights. Nothing in them says that the directions' outputs were divided
    by two, as in the released models, nor that the class token is in the middle.

    Args:
        state_dict: Vim's names and weights.
        image_size: pixels of the images that it was trained for, one number or (height, width).
        num_labels: classes; those of the head when not given. The classifier of another number, or of a checkpoint
            without a head, starts at random.
        **config_overrides: fields of `CABVisionMambaConfig` that no weight shows, such as `id2label` and
            `drop_path_rate`.

    Returns:
        The student, in eval mode, in float32.

    Raises:
        ValueError: missing or unknown names, or positions that do not fit the images; the message holds them.
    """
    depth = 1 + max((int(name.split(".")[1]) for name in state_dict if _is_layer(name)), default=-1)
    if depth == 0:
        raise ValueError(f"The state dict has no layers (layers.0.norm.weight, ...), so it is no Vim. {_READABLE}")
    blocks = {f"layers.{i}.{old}": f"backbone.layers.{i}.{new}" for i in range(depth) for old, new in _BLOCK.items()}
    names = _OUTER | _HEAD | blocks
    has_head = bool(_HEAD.keys() & state_dict.keys())
    optional = _HEAD.keys() if num_labels is not None and not has_head else ()
    _check_names(names.keys() - optional, names, state_dict)
    weights = {new: state_dict[old].float() for old, new in names.items() if old in state_dict}

    config = _config(state_dict, depth, image_size, num_labels, config_overrides)
    student = CABVisionMambaForImageClassification(config)
    if not has_head or len(state_dict["head.weight"]) != config.num_labels:
        if config.num_labels:
            found = f"its head has {len(state_dict['head.weight'])}" if has_head else "it has no head"
            logger.warning(f"The classifier of {config.num_labels} labels starts at random, not as Vim's: {found}.")
        weights = {name: weight for name, weight in weights.items() if name not in _HEAD.values()}
        weights |= {f"classifier.{name}": weight for name, weight in student.classifier.named_parameters()}
    student.load_state_dict(weights, strict=True)
    return student.eval()


def convert_vim_checkpoint(
    path: str | os.PathLike,
    output_folder: str | os.PathLike,
    *,
    image_size: int | Sequence[int] = 224,
    num_labels: int | None = None,
    **config_overrides: Any,
) -> CABVisionMambaForImageClassification:
    """Reads a file of Vim and saves it as a folder that `from_pretrained` reads.

    Args:
        path: a `.safetensors` file, or one of `torch.save` that holds a state dict, alone or under "model". It is read
            without running code. The arguments of the training run, if it holds them, are asked for the model's name.
        output_folder: where the student is saved.
        image_size, num_labels, **config_overrides: as in `vim_from_state_dict`.

    Returns:
        The student.

    Raises:
        ValueError: as in `vim_from_state_dict`, and where the file names a model of another layout.
    """
    if Path(path).suffix == ".safetensors":
        state_dict = load_file(path)
    else:
        # What Vim's training script saves beside the weights; it holds plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state_dict = torch.load(path, map_location="cpu", weights_only=True)
        if "model" in state_dict:
            if "args" in state_dict:
                _check_model_name(state_dict["args"])
            state_dict = state_dict["model"]
    student = vim_from_state_dict(state_dict, image_size=image_size, num_labels=num_labels, **config_overrides)
    student.save_pretrained(output_folder)
    return student


def _is_layer(name: str) -> bool:
    start, _, rest = name.partition(".")
    return start == "layers" and rest.partition(".")[0].isdecimal()


def _check_names(needed: Iterable[str], known: Iterable[str], state_dict: Mapping[str, Tensor]) -> None:
    missing, unknown = sorted(set(needed) - state_dict.keys()), sorted(state_dict.keys() - set(known))
    if missing or unknown:
        found = "; ".join(
            f"{kind} are {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
            for kind, names in (("missing", missing), ("unknown", unknown))
            if names
        )
        raise ValueError(
            f"These weights of the state dict do not fit a Vim: {found}. {_READABLE} A checkpoint without a head "
            "needs num_labels."
        )


def _check_model_name(arguments: argparse.Namespace | Mapping[str, Any]) -> None:
    values = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    name = values.get("model")
    if name is None:
        return
    in_the_middle = "midclstok" in name or "middle_cls_token" in name
    if not (in_the_middle and "div2" in name):
        raise ValueError(f"The checkpoint's arguments name the model {name!r}, which has another layout. {_READABLE}")


def _config(
    state_dict: Mapping[str, Tensor],
    depth: int,
    image_size: int | Sequence[int],
    num_labels: int | None,
    overrides: Mapping[str, Any],
) -> CABVisionMambaConfig:
    width, channels, patch, _ = state_dict["patch_embed.proj.weight"].shape
    mixer_width, state_size = state_dict["layers.0.mixer.A_log"].shape
    fields = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "mixer_type": "mamba",
        "state_size": state_size,
        "expand": mixer_width / width,
        "conv_kernel": state_dict["layers.0.mixer.conv1d.weight"].shape[-1],
        "time_step_rank": state_dict["layers.0.mixer.dt_proj.weight"].shape[1],
        "image_size": image_size,
        "patch_size": patch,
        "num_channels": channels,
        "class_token": "middle",
        "norm_type": "rms_norm",
        "layer_norm_epsilon": 1e-5,
        "residual_in_fp32": True,
    }
    if num_labels is not None or "id2label" not in overrides:
        fields["num_labels"] = len(state_dict["head.weight"]) if num_labels is None else num_labels
    config = CABVisionMambaConfig(**(fields | dict(overrides)))
    positions = state_dict["pos_embed"].shape[1]
    if positions != config.num_patches + 1:
        side = math.isqrt(positions - 1)
        square = f"image_size={side * patch} would have as many patches. " if side * side == positions - 1 else ""
        raise ValueError(
            f"pos_embed holds {positions} positions, but images of {config.image_height_and_width} pixels in patches "
            f"of {patch} have {config.num_patches}, and the class token one. {square}Give the image_size that the "
            "checkpoint was trained for; one whose patches overlap (a stride smaller than the patch) can't be read."
        )
    return config
