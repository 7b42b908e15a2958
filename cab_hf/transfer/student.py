"""A student made of a teacher: its shape, its weights, and its attention as the start of every mixer."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cab_hf.models import (
    CABMambaForCausalLM,
    CABMambaForSequenceClassification,
    CABMambaPreTrainedModel,
    CABVisionMambaForImageClassification,
    CABVisionMambaPreTrainedModel,
)
from cab_hf.models.students import cast
from cab_hf.teachers.alignment import layer_map as map_layers
from cab_hf.teachers.examination import check_whole
from cab_hf.transfer.calibration import calibrate_output_norm
from cab_hf.transfer.copying import fill_the_rest, has_output_bias, unfilled
from cab_hf.transfer.from_teacher import copy_teacher_weights, student_config, with_labels
from cab_hf.transfer.gate import fit_gate
from cab_hf.transfer.reading import read_layers
from cab_hf.transfer.vision import copy_vision_teacher_weights, vision_student_config


def student_from_teacher(
    teacher: PreTrainedModel,
    *,
    student_class: type[CABMambaPreTrainedModel | CABVisionMambaPreTrainedModel] | None = None,
    num_hidden_layers: int | None = None,
    layer_map: str | Sequence[int] = "floor",
    mixer_type: str = "mamba2",
    start: str = "linear",
    copy_attention: bool = True,
    copy_weights: bool = True,
    calibration_inputs: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    **config_overrides: Any,
) -> CABMambaPreTrainedModel | CABVisionMambaPreTrainedModel:
    """Builds a student of the teacher's shape, with its weights wherever a student has a place for them.

    A good start also needs its output projections fitted, by [`~cab_hf.transfer.fit_output_projection`].

    Args:
        teacher: a Transformer of a known family (`cab_hf.transfer.FAMILIES`, of images `VISION_FAMILIES`); neither
            changed nor shared.
        student_class: class of the student; by default `CABMambaForCausalLM`, of an image teacher
            `CABVisionMambaForImageClassification`. A `CABMambaForSequenceClassification` takes over the labels and
            head of a teacher that classifies; of another teacher, or with another `num_labels`, its head starts at
            random.
        num_hidden_layers: depth of the student; the teacher's when not given.
        layer_map: which teacher layer each student layer is made of: "floor", "uniform", "last", or one index a layer.
        mixer_type: "mamba2" takes over Q, K, V and O; "mamba" V and O.
        start: of a language student's mixers, "linear" or "served": see `cab_hf.transfer.student_config`.
        copy_attention: copy attention's projections into the mixers.
        copy_weights: copy anything at all; without, the student is random in the teacher's shape.
        calibration_inputs: one batch (`input_ids`, and `attention_mask` if padded; or `pixel_values`) on which the
            mixers' outputs are scaled to those of the teacher's attention, and gates are fitted; without it they are
            fitted on random tokens.
        dtype: of the student's weights; those that must be float32 stay so.
        **config_overrides: fields of the student's config that are to differ from the choice of `student_config` or
            `vision_student_config`; of an image student also `class_token`, `image_size` and `num_labels`.

    Returns:
        The student, in eval mode, on the teacher's device.

    Raises:
        ValueError: an unknown family, a feature of the teacher that a student can't express, sizes that don't fit, or
            a classifier of unknown labels.

    Example:
        >>> from cab_hf.teachers.demo import random_llama
        >>> teacher, tokenizer = random_llama()
        >>> student = student_from_teacher(teacher)
        >>> student.num_parameters() > teacher.num_parameters()
        True
    """
    check_whole("teacher", teacher)
    readings = read_layers(teacher) if copy_weights and copy_attention else []
    options = {"num_hidden_layers": num_hidden_layers, "mixer_type": mixer_type}
    if teacher.main_input_name == "pixel_values":
        student_class = student_class or CABVisionMambaForImageClassification
        config = vision_student_config(teacher, **options, **config_overrides)
        copy_weights_of = copy_vision_teacher_weights
    else:
        student_class = student_class or CABMambaForCausalLM
        if issubclass(student_class, CABMambaForSequenceClassification):
            config_overrides = with_labels(teacher, config_overrides)
        if start == "served" and has_output_bias(readings):
            config_overrides = {"use_bias": True} | config_overrides
        config = student_config(teacher.config, start=start, **options, **config_overrides)
        copy_weights_of = copy_teacher_weights
    depth = teacher.config.get_text_config().num_hidden_layers
    layers = map_layers(layer_map, config.num_hidden_layers, depth)
    student = unfilled(student_class, config, teacher.device)
    if copy_weights:
        copy_weights_of(student, teacher, layers, copy_attention=False)
    blocks = student.base_model.layers
    fill_the_rest(student, {block.mixer: readings[layer] for block, layer in zip(blocks, layers) if readings})
    if copy_weights:
        if config.gate_init == "fitted":
            fit_gate(student, teacher, calibration_inputs, layers)
    if calibration_inputs is not None:
        calibrate_output_norm(student, teacher, calibration_inputs, layers)
    if student.can_generate():
        student.generation_config = copy.deepcopy(teacher.generation_config)
    cast(student, dtype)
    return student.eval()
