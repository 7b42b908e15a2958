"""What a student can do, beside its teacher; each number with an interval."""

from cab_hf.evaluation.generation import generate, sample
from cab_hf.evaluation.images import compare_images
from cab_hf.evaluation.kept_attention import choose_attention
from cab_hf.evaluation.language import compare, perplexity
from cab_hf.evaluation.recall import associative_recall, copying_recall
from cab_hf.evaluation.speed import image_speed, text_speed, throughput


__all__ = [
    "associative_recall",
    "choose_attention",
    "compare",
    "compare_images",
    "copying_recall",
    "generate",
    "image_speed",
    "perplexity",
    "sample",
    "text_speed",
    "throughput",
]
