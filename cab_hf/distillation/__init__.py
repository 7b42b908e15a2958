"""What happens between two models: bridge, losses and the trainer."""

from cab_hf.distillation.bridge import AttentionBridge
from cab_hf.distillation.modeling_distillation import DistillationModel
from cab_hf.distillation.trainer import DistillationTrainer
from cab_hf.distillation.training_args import DistillationTrainingArguments
from cab_hf.teachers.recorded_teacher import RecordedTeacher, record_teacher
from cab_hf.teachers.teacher import Teacher, TeacherAttention


__all__ = [
    "AttentionBridge",
    "DistillationModel",
    "DistillationTrainer",
    "DistillationTrainingArguments",
    "RecordedTeacher",
    "Teacher",
    "TeacherAttention",
    "record_teacher",
]
