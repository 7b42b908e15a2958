"""What a teacher shows: queries, keys and outputs of its attention, layer by layer."""

from cab_hf.teachers.alignment import align_targets, align_tokens, layer_map
from cab_hf.teachers.loading import load_image_teacher, load_teacher
from cab_hf.teachers.recorded_teacher import RecordedTeacher, record_teacher
from cab_hf.teachers.sampling import sample_documents
from cab_hf.teachers.teacher import Teacher, TeacherAttention, TeacherOutput


__all__ = [
    "RecordedTeacher",
    "Teacher",
    "TeacherAttention",
    "TeacherOutput",
    "align_targets",
    "align_tokens",
    "layer_map",
    "load_image_teacher",
    "load_teacher",
    "record_teacher",
    "sample_documents",
]
