"""Texts and images, from where they are to what a model reads."""

from cab_hf.data.documents import load_documents, split_documents
from cab_hf.data.facts import insert_facts
from cab_hf.data.image_sources import class_balanced_fraction, load_images, split_validation
from cab_hf.data.images import ImageDataset, collate_images, make_image_processor
from cab_hf.data.packing import (
    IGNORE_INDEX,
    Documents,
    LanguageCollator,
    pack_documents,
    pad_documents,
    save_tokens,
    shift_labels,
    vocabulary_digest,
)
from cab_hf.data.repeats import insert_repeats


__all__ = [
    "IGNORE_INDEX",
    "Documents",
    "ImageDataset",
    "LanguageCollator",
    "class_balanced_fraction",
    "collate_images",
    "insert_facts",
    "insert_repeats",
    "load_documents",
    "load_images",
    "make_image_processor",
    "pack_documents",
    "pad_documents",
    "save_tokens",
    "shift_labels",
    "split_documents",
    "split_validation",
    "vocabulary_digest",
]
