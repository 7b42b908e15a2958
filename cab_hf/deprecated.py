"""Names of the release before, each with a warning; they go in the next one."""

import warnings
from typing import Any

from transformers import PreTrainedModel

from cab_hf import transfer
from cab_hf.models import (
    CABMambaForCausalLM,
    CABMambaForSequenceClassification,
    CABVisionMambaForImageClassification,
)


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} goes in the next release: use {new}.", FutureWarning, stacklevel=3)


def _from_teacher(cls: type[PreTrainedModel], teacher: PreTrainedModel, **options: Any) -> PreTrainedModel:
    _warn(f"{cls.__name__}.from_teacher", "cab_hf.student_from_teacher(teacher, ...)")
    return transfer.student_from_teacher(teacher, student_class=cls, **options)


def _vision_student_from_teacher(teacher: PreTrainedModel, **options: Any) -> PreTrainedModel:
    _warn("cab_hf.transfer.vision_student_from_teacher", "cab_hf.student_from_teacher")
    return transfer.student_from_teacher(teacher, **options)


for _student_class in (CABMambaForCausalLM, CABMambaForSequenceClassification, CABVisionMambaForImageClassification):
    _student_class.from_teacher = classmethod(_from_teacher)
transfer.vision_student_from_teacher = _vision_student_from_teacher
