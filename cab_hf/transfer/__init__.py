"""A student made from a teacher's weights."""

from cab_hf.transfer.calibration import calibrate_output_norm
from cab_hf.transfer.families import FAMILIES, Affine, Family, TeacherLayer, family_of
from cab_hf.transfer.fit import fit_output_projection
from cab_hf.transfer.from_teacher import copy_teacher_weights, student_config
from cab_hf.transfer.gate import fit_gate
from cab_hf.transfer.hybrid import attention_for, hybrid_from_teacher, put_back
from cab_hf.transfer.memories import fit_memories
from cab_hf.transfer.reading import Reading, read_attention
from cab_hf.transfer.rotation import Rotation, read_rotations
from cab_hf.transfer.student import student_from_teacher
from cab_hf.transfer.vim import convert_vim_checkpoint, vim_from_state_dict
from cab_hf.transfer.vision import (
    VISION_FAMILIES,
    VisionFamily,
    copy_vision_teacher_weights,
    vision_family_of,
    vision_student_config,
)


__all__ = [
    "FAMILIES",
    "VISION_FAMILIES",
    "Affine",
    "Family",
    "Reading",
    "Rotation",
    "TeacherLayer",
    "VisionFamily",
    "attention_for",
    "calibrate_output_norm",
    "convert_vim_checkpoint",
    "copy_teacher_weights",
    "copy_vision_teacher_weights",
    "family_of",
    "fit_gate",
    "fit_memories",
    "fit_output_projection",
    "hybrid_from_teacher",
    "put_back",
    "read_attention",
    "read_rotations",
    "student_config",
    "student_from_teacher",
    "vim_from_state_dict",
    "vision_family_of",
    "vision_student_config",
]
