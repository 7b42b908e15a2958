"""Turn any pretrained Transformer into a Mamba: distillation through the attention bridge (arXiv 2510.19266)."""

from cab_hf.distillation import (
    AttentionBridge,
    DistillationModel,
    DistillationTrainer,
    DistillationTrainingArguments,
    RecordedTeacher,
    Teacher,
    record_teacher,
)
from cab_hf.models import (
    CABMambaConfig,
    CABMambaForCausalLM,
    CABMambaForSequenceClassification,
    CABMambaModel,
    CABVisionMambaConfig,
    CABVisionMambaForImageClassification,
    CABVisionMambaModel,
)


__version__ = "0.1.0"

__all__ = [
    "AttentionBridge",
    "CABMambaConfig",
    "CABMambaForCausalLM",
    "CABMambaForSequenceClassification",
    "CABMambaModel",
    "CABVisionMambaConfig",
    "CABVisionMambaForImageClassification",
    "CABVisionMambaModel",
    "DistillationModel",
    "DistillationTrainer",
    "DistillationTrainingArguments",
    "RecordedTeacher",
    "Teacher",
    "__version__",
    "record_teacher",
]
