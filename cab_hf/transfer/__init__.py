"""A student made from a teacher's weights."""

from cab_hf.transfer.families import FAMILIES, Affine, Family, TeacherLayer, family_of
from cab_hf.transfer.fit import fit_output_projection
from cab_hf.transfer.from_teacher import (
    calibrate_output_norm,
    copy_teacher_weights,
    student_config,
    student_from_teacher,
)


__all__ = [
    "FAMILIES",
    "Affine",
    "Family",
    "TeacherLayer",
    "calibrate_output_norm",
    "copy_teacher_weights",
    "family_of",
    "fit_output_projection",
    "student_config",
    "student_from_teacher",
]
