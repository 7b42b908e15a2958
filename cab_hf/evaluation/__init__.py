"""What a student can do, beside its teacher; each number with an interval."""

from cab_hf.evaluation.generation import generate, sample
from cab_hf.evaluation.images import compare_images
from cab_hf.evaluation.language import compare, perplexity
from cab_hf.evaluation.recall import associative_recall, copying_recall
from cab_hf.evaluation.speed import image_speed, text_speed, throughput
from cab_hf.evaluation.tasks import compare_scores, score_tasks


__all__ = [
    "associative_recall",
    "compare",
    "compare_images",
    "compare_scores",
    "copying_recall",
    "generate",
    "image_speed",
    "perplexity",
    "sample",
    "score_tasks",
    "text_speed",
    "throughput",
]
