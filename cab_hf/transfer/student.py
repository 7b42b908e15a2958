"""A student made of a teacher: its shape, its weights, and its attention as the start of every mixer."""

import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from cab_hf.models import (
    CABHybridForCausalLM,
    CABHybridPreTrainedModel,
    CABMambaForCausalLM,
    CABMambaForSequenceClassification,
    CABVisionMambaForImageClassification,
)
from cab_hf.models.students import MixerPreTrainedModel, cast
from cab_hf.teachers.alignment import layer_map as map_layers
from cab_hf.teachers.examination import check_whole
from cab_hf.teachers.loading import load_any_teacher
from cab_hf.transfer.calibration import calibrate_output_norm
from cab_hf.transfer.copying import fill_the_rest, unfilled
from cab_hf.transfer.examples import example_batches
from cab_hf.transfer.families import FAMILIES
from cab_hf.transfer.fit import fit_output_projection
from cab_hf.transfer.from_teacher import copy_teacher_weights, student_config, with_labels
from cab_hf.transfer.gate import fit_gate
from cab_hf.transfer.hybrid import hybrid_from_teacher
from cab_hf.transfer.memories import fit_memories
from cab_hf.transfer.reading import read_layers
from cab_hf.transfer.rotation import kept_rotations, rotary_fields
from cab_hf.transfer.vision import copy_vision_teacher_weights, vision_student_config


logger = logging.get_logger(__name__)


def student_from_teacher(
    teacher: PreTrainedModel | str | os.PathLike,
    *,
    tokenizer: PreTrainedTokenizerBase | BaseImageProcessor | None = None,
    data: Any = None,
    student_class: type[MixerPreTrainedModel] | None = None,
    num_hidden_layers: int | None = None,
    layer_map: str | Sequence[int] = "floor",
    mixer_type: str = "mamba2",
    start: str = "linear",
    keep_rotary: bool = False,
    copy_attention: bool = True,
    copy_weights: bool = True,
    keep_attention: int | Sequence[int | str] | None = None,
    attention_window: int = 0,
    attention_sinks: int = 4,
    accept_inexact: float = 0.0,
    calibration_inputs: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    **config_overrides: Any,
) -> MixerPreTrainedModel:
    """Builds a student of any teacher, with its weights wherever a student has a place for them.

    Of a family with a table (`cab_hf.transfer.FAMILIES`, of images `VISION_FAMILIES`) it is a pure Mamba of the
    teacher's shape. Of any other language model, or where attention is kept, it is a hybrid: the teacher's own class
    with mixers in place of its attention. A line of the log says which of the two, and why.

    With `data` each head's memory is fitted to the teacher's head ([`~cab_hf.transfer.fit_memories`], unless a
    `memory_range` is given), and then output projections to the teacher's attention
    ([`~cab_hf.transfer.fit_output_projection`]), which is worth a factor of thousands in perplexity at the start.

    Args:
        teacher: a Transformer, or the Hub id or folder of one; neither changed nor shared.
        tokenizer: of the teacher, or its image processor, where `data` are texts or images; by default that of its id.
        data: some thousand tokens to fit on: a source of `load_documents`, a list of texts, a data set, or batches
            ([`~cab_hf.transfer.examples.example_batches`]); an empty tuple for none, on purpose.
        student_class: class of the student; by default `CABMambaForCausalLM` or `CABHybridForCausalLM`, of an image
            teacher `CABVisionMambaForImageClassification`. A `CABMambaForSequenceClassification` takes over the labels
            and head of a teacher that classifies; of another teacher, or with another `num_labels`, its head starts at
            random.
        num_hidden_layers: depth of the student; the teacher's when not given.
        layer_map: which teacher layer each student layer is made of: "floor", "uniform", "last", or one index a layer.
        mixer_type: "mamba2" takes over Q, K, V and O; "mamba" V and O.
        start: of a language student's mixers, "linear" or "served": see `cab_hf.transfer.student_config`.
        keep_rotary: the states turn from token to token as the teacher's rotary positions turn queries and keys
            (mamba2). A teacher without them gives a student without.
        copy_attention: copy attention's projections into the mixers.
        copy_weights: copy anything at all; without, the student is random in the teacher's shape.
        keep_attention: layers to leave as they are: how many, evenly spread, or their indices among the layers that
            attend, or the paths of their attention modules. Anything but None makes a hybrid, 0 too.
        attention_window: tokens that attention beside each mixer sees; 0: none stays there. It makes a hybrid, whose
            mixers then start with what the window lacks of the teacher's attention.
        attention_sinks: first tokens of a row that this attention sees, too.
        accept_inexact: largest relative error of what is read of the teacher's attention; what is no linear map of
            its input, such as MLA, is refused without.
        calibration_inputs: one batch (`input_ids`, and `attention_mask` if padded; or `pixel_values`) on which the
            mixers' outputs are scaled to those of the teacher's attention, and gates are fitted; without it they are
            fitted on random tokens, and those of `data` where that is given.
        dtype: of the student's weights; those that must be float32 stay so.
        **config_overrides: fields of the student's config that are to differ from the choice of `student_config` or
            `vision_student_config`; of an image student also `class_token`, `image_size` and `num_labels`.

    Returns:
        The student, in eval mode, on the teacher's device.

    Raises:
        ValueError: an unknown family, a feature of the teacher that a student can't express, sizes that don't fit, or
            a classifier of unknown labels.

    Example:
        >>> student = student_from_teacher("random-llama", data="builtin")
        >>> student.config.num_hidden_layers
        4
    """
    if isinstance(teacher, str | os.PathLike):
        teacher, found = load_any_teacher(os.fspath(teacher))
        tokenizer = tokenizer or found
    check_whole("teacher", teacher)
    fits = data is not None and data != ()
    batches = example_batches(data, tokenizer, teacher) if fits else None
    if batches is not None and calibration_inputs is None:
        calibration_inputs = batches[0]
    if data is None and copy_weights and copy_attention:
        logger.warning_once(
            "The student's output projections are the teacher's as they are, and it starts far from its teacher. "
            'Pass some text or images to fit them on, such as data="builtin" (and the tokenizer of a teacher that is '
            "not named by its id), or call fit_output_projection."
        )
    fits_memories = "memory_range" not in config_overrides
    asked = f"`keep_attention` is {keep_attention!r}" if keep_attention is not None else None
    if attention_window and keep_attention is None:
        asked, keep_attention = f"`attention_window` is {attention_window!r}", ()
    student_class, reason = _student_class(teacher, student_class, asked)
    logger.info(f"The student is a {student_class.__name__}: {reason}.")
    if issubclass(student_class, CABHybridPreTrainedModel):
        if num_hidden_layers is not None or mixer_type != "mamba2" or not copy_weights:
            raise ValueError(
                f"num_hidden_layers={num_hidden_layers}, mixer_type={mixer_type!r} or copy_weights={copy_weights} is "
                f"for pure students, but this is a hybrid ({reason}): it has the teacher's layers and weights, and "
                "SSD mixers. Leave it out."
            )
        student = hybrid_from_teacher(
            teacher,
            student_class,
            keep_attention=() if keep_attention is None else keep_attention,
            attention_window=attention_window,
            attention_sinks=attention_sinks,
            accept_inexact=accept_inexact,
            start=start,
            keep_rotary=keep_rotary,
            copy_attention=copy_attention,
            **config_overrides,
        )
        fits_memories = fits_memories and not attention_window  # what the window lacks no head of the teacher says
        return _finished(student, teacher, calibration_inputs, batches, "floor", dtype, fits_memories=fits_memories)
    copies = copy_weights and copy_attention
    batches = batches if copies else None  # there is nothing to fit to what is random
    readings = read_layers(teacher, accept_inexact) if copies else []
    options = {"num_hidden_layers": num_hidden_layers, "mixer_type": mixer_type}
    depth = teacher.config.get_text_config().num_hidden_layers
    layers = map_layers(layer_map, num_hidden_layers or depth, depth)
    if keep_rotary:
        rotations = list(kept_rotations(teacher).values())
        turning = [rotations[layer] for layer in layers] if len(rotations) == depth else []
        config_overrides = rotary_fields(turning) | config_overrides
    if teacher.main_input_name == "pixel_values":
        config = vision_student_config(teacher, **options, **config_overrides)
        copy_weights_of = copy_vision_teacher_weights
    else:
        if issubclass(student_class, CABMambaForSequenceClassification):
            config_overrides = with_labels(teacher, config_overrides)
        config = student_config(teacher.config, start=start, readings=readings, **options, **config_overrides)
        copy_weights_of = copy_teacher_weights
    student = unfilled(student_class, config, teacher.device)
    if copy_weights:
        copy_weights_of(student, teacher, layers, copy_attention=False)
    blocks = student.base_model.layers
    fill_the_rest(student, {block.mixer: readings[layer] for block, layer in zip(blocks, layers) if readings})
    return _finished(
        student, teacher, calibration_inputs, batches, layers, dtype, copy_weights, fits_memories=fits_memories
    )


def _student_class(
    teacher: PreTrainedModel,
    student_class: type[MixerPreTrainedModel] | None,
    asked: str | None,
) -> tuple[type[MixerPreTrainedModel], str]:
    """The class of a student, and why it is that one; `asked` says what only hybrids have, if that is asked for."""
    if student_class is not None:
        if asked and not issubclass(student_class, CABHybridPreTrainedModel):
            raise ValueError(
                f"{asked}, but a {student_class.__name__} has no attention. Leave "
                "`student_class` out, or take a CABHybridForCausalLM."
            )
        return student_class, "it was asked for"
    kind = teacher.config.get_text_config().model_type
    if teacher.main_input_name == "pixel_values":
        if asked:
            raise ValueError(
                f"{asked}, but a {type(teacher).__name__} reads images, whose students are pure. Leave it out."
            )
        return CABVisionMambaForImageClassification, "the teacher reads images"
    if asked:
        return CABHybridForCausalLM, asked.replace("`", "")
    if kind in FAMILIES:
        return CABMambaForCausalLM, f"a table says what a pure student of {kind!r} is"
    return CABHybridForCausalLM, f"no table says what a pure student of {kind!r} is"


def _finished(
    student: MixerPreTrainedModel,
    teacher: PreTrainedModel,
    calibration_inputs: Mapping[str, Tensor] | None,
    batches: Sequence[Mapping[str, Tensor]] | None,
    layers: str | Sequence[int],
    dtype: torch.dtype,
    fits_gate: bool = True,
    fits_memories: bool = True,
) -> MixerPreTrainedModel:
    """A student whose gate and norms fit the teacher on a batch, memories and projections on all, in its dtype."""
    if fits_gate and student.mixer_list[0].config.gate_init == "fitted":
        fit_gate(student, teacher, calibration_inputs, layers)
    if fits_memories and batches is not None:
        fit_memories(student, teacher, batches[0], layers)
    if calibration_inputs is not None:
        calibrate_output_norm(student, teacher, calibration_inputs, layers)
    if student.can_generate():
        student.generation_config = copy.deepcopy(teacher.generation_config)
    if batches is not None:
        fit_output_projection(student, teacher, batches, layers)
    cast(student, dtype)
    return student.eval()
