"""The student that a run starts from."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedModel

from cab_hf.export.loading import load_whole
from cab_hf.models import (
    CABMambaConfig,
    CABMambaForCausalLM,
    CABVisionMambaConfig,
    CABVisionMambaForImageClassification,
)
from cab_hf.recipe_options import ModelArguments
from cab_hf.teachers.alignment import parse_layer_map
from cab_hf.transfer import student_from_teacher
from cab_hf.transfer.copying import check_fields
from cab_hf.transfer.hybrid import parse_kept


def build_student(
    model: ModelArguments,
    teacher: PreTrainedModel,
    layer_map: str,
    batches: list[dict[str, Tensor]],
    *,
    image_size: int | None = None,
    labels: Mapping[str, dict] | None = None,
) -> PreTrainedModel:
    """A saved student, a new one of the teacher, or a new one of a config alone, as a recipe asks for it.

    Args:
        model: of the recipe.
        teacher: whose shape, weights or vocabulary a new student takes.
        layer_map: of the first stage.
        batches: of training data, on the teacher's device, for the calibration; none: no calibration.
        image_size: side of a new image student's images, in pixels.
        labels: `id2label` and `label2id` of a new image student.

    Raises:
        ValueError: fields that no student has, or as [`~cab_hf.transfer.student_from_teacher`].
    """
    if model.student is not None:
        auto = AutoModelForImageClassification if model.reads_images else AutoModelForCausalLM
        return load_whole(auto, model.student, dtype=torch.float32)
    config: dict[str, Any] = ({"image_size": image_size} if model.reads_images else {}) | model.student_config
    if model.num_hidden_layers is not None:
        config["num_hidden_layers"] = model.num_hidden_layers
    if model.student_from == "config":
        config_class, student_class = CABMambaConfig, CABMambaForCausalLM
        given = {"mixer_type": model.mixer_type}
        if model.reads_images:
            config_class, student_class = CABVisionMambaConfig, CABVisionMambaForImageClassification
            given |= labels
        else:
            text = teacher.config.get_text_config()
            names = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
            given |= {name: getattr(text, name, None) for name in names}
        check_fields(config_class, config)
        student = student_class(config_class(**given | config))
        if not model.reads_images:
            student.generation_config = copy.deepcopy(teacher.generation_config)  # where an answer ends
        return student
    if labels is not None:
        config["num_labels"] = len(labels["id2label"])
    fits = model.calibration == "fit" and model.copy_attention and model.copy_weights
    student = student_from_teacher(
        teacher,
        data=batches if batches and fits else (),
        mixer_type=model.mixer_type,
        start=model.start,
        keep_rotary=model.keep_rotary,
        layer_map=parse_layer_map(layer_map),
        copy_weights=model.copy_weights,
        copy_attention=model.copy_attention,
        keep_attention=parse_kept(model.keep_attention) if model.num_chosen is None else 0,
        attention_window=model.attention_window,
        attention_sinks=model.attention_sinks,
        accept_inexact=model.accept_inexact,
        calibration_inputs=batches[0] if batches else None,
        **config,
    )
    if labels is not None:
        student.config.id2label, student.config.label2id = labels["id2label"], labels["label2id"]
    return student
