"""What a student can do, beside its teacher; each number with an interval."""

from cab_hf.evaluation.controls import with_window, without_mixers
from cab_hf.evaluation.generation import generate, sample
from cab_hf.evaluation.images import compare_images
from cab_hf.evaluation.kept_attention import choose_attention
from cab_hf.evaluation.language import compare, perplexity
from cab_hf.evaluation.length import held_length, loss_by_position, retrieval
from cab_hf.evaluation.needles import key_value_recall, needle_recall
from cab_hf.evaluation.recall import associative_recall, copying_recall
from cab_hf.evaluation.speed import image_speed, text_speed, throughput
from cab_hf.evaluation.tasks import compare_scores, score_tasks


__all__ = [
    "associative_recall",
    "choose_attention",
    "compare",
    "compare_images",
    "compare_scores",
    "copying_recall",
    "generate",
    "held_length",
    "image_speed",
    "key_value_recall",
    "loss_by_position",
    "needle_recall",
    "perplexity",
    "retrieval",
    "sample",
    "score_tasks",
    "text_speed",
    "throughput",
    "with_window",
    "without_mixers",
]
