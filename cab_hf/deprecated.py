"""Names of the release before, each with a warning; they go in the next one."""

import functools
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

from transformers import PreTrainedModel

from cab_hf import hub, lora, transfer
from cab_hf.models import (
    CABMambaForCausalLM,
    CABMambaForSequenceClassification,
    CABVisionMambaForImageClassification,
)


def _renamed(module: ModuleType, name: str, function: Callable, new: str) -> None:
    """Keeps `module.name`, which calls `function` and says that `new` is its name now."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        warnings.warn(f"{module.__name__}.{name} goes in the next release: use {new}.", FutureWarning, stacklevel=2)
        return function(*args, **kwargs)

    setattr(module, name, call)


def _from_teacher(cls: type[PreTrainedModel], teacher: PreTrainedModel, **options: Any) -> PreTrainedModel:
    warnings.warn(
        f"{cls.__name__}.from_teacher goes in the next release: use cab_hf.student_from_teacher(teacher, ...).",
        FutureWarning,
        stacklevel=2,
    )
    return transfer.student_from_teacher(teacher, student_class=cls, **options)


for _student_class in (CABMambaForCausalLM, CABMambaForSequenceClassification, CABVisionMambaForImageClassification):
    _student_class.from_teacher = classmethod(_from_teacher)
_renamed(transfer, "vision_student_from_teacher", transfer.student_from_teacher, "cab_hf.student_from_teacher")
_renamed(lora, "adapter_card", hub.adapter_card, "cab_hf.hub.adapter_card")
_renamed(lora, "write_adapter_card", hub.write_adapter_card, "cab_hf.hub.write_adapter_card")
