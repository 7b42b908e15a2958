"""Batches to fit a start on, out of whatever a user has: a source, texts, rows or ready batches.

Shapes: `b` row, `t` token, `c` channel.
"""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cab_hf.data.documents import as_documents, load_documents
from cab_hf.data.image_sources import load_images
from cab_hf.data.packing import pack_documents
from cab_hf.inference import num_positions


ROWS, BLOCK_SIZE, SHORTEST = 8, 512, 16


def example_batches(
    data: Any, processor: Any, teacher: PreTrainedModel, tokens: int = 4096
) -> list[dict[str, Tensor]]:
    """Batches for [`~cab_hf.transfer.fit_output_projection`], on the teacher's device.

    Args:
        data: a source of `load_documents` (of an image teacher, of `load_images`); a list of texts; a data set, or
            list, of rows with `text`, `input_ids` or `pixel_values`; a batch `{"input_ids": (b, t)}` or
            `{"pixel_values": (b, c, height, width)}`, or a list of such.
        processor: the teacher's tokenizer or image processor; None where the data need none.
        teacher: who reads them.
        tokens: to read, at most, and at least a row; an image counts as its patches.

    Raises:
        ValueError: texts without a tokenizer, images without a processor, or nothing in it.
    """
    name = teacher.main_input_name
    if isinstance(data, Mapping) and isinstance(data.get(name), Tensor):
        return [_placed(data, teacher)]
    if isinstance(data, list) and data and isinstance(data[0], Mapping) and _is_batch(data[0].get(name)):
        return [_placed(batch, teacher) for batch in data]
    if name == "pixel_values":
        return _image_batches(data, processor, teacher, tokens)
    if isinstance(data, str | os.PathLike):
        data = load_documents(data)
    elif isinstance(data, list | Dataset):
        data = as_documents(data)
    if not len(data) or not data.column_names:
        raise ValueError("`data` is empty, but a start is fitted on some text. Give a source, texts, rows or batches.")
    if "labels" not in data.column_names:
        data = _packed(data, processor, min(BLOCK_SIZE, num_positions(teacher) or BLOCK_SIZE))
    rows = [torch.as_tensor(row["input_ids"]) for row in data.select(range(min(len(data), tokens)))]
    length = min(map(len, rows[:ROWS]))
    rows = [row[:length].long() for row in rows[: max(1, tokens // length)] if len(row) >= length]
    return [_placed({name: torch.stack(rows[at : at + ROWS])}, teacher) for at in range(0, len(rows), ROWS)]


def _is_batch(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim in (2, 4)


def _packed(data: Dataset, tokenizer: PreTrainedTokenizerBase | None, block_size: int) -> Dataset:
    if tokenizer is None:
        raise ValueError(
            "`data` is text, but `tokenizer` is None. Pass the teacher's, name the teacher by its id or folder, or "
            "pass rows of input_ids."
        )
    while True:
        try:
            return pack_documents(data, tokenizer, block_size, isolate_documents=False)
        except ValueError:
            if block_size <= SHORTEST:
                raise
            block_size = max(SHORTEST, block_size // 4)  # little text


def _image_batches(data: Any, processor: Any, teacher: PreTrainedModel, tokens: int) -> list[dict[str, Tensor]]:
    if isinstance(data, str | os.PathLike):
        folder = os.path.isdir(data) and not os.path.isfile(os.path.join(data, "dataset_info.json"))
        loaded = load_images("imagefolder", data_dir=data) if folder else load_images(data)
        data = loaded if isinstance(loaded, Dataset) else loaded["train" if "train" in loaded else next(iter(loaded))]
    side = teacher.config.image_size
    patches = (side if isinstance(side, int) else max(side)) // teacher.config.patch_size
    count = min(len(data), max(1, tokens // patches**2))
    rows: Iterable[Any] = [data[index] for index in range(count)]
    if rows and "pixel_values" not in rows[0]:
        if processor is None:
            raise ValueError(
                "`data` is images, but `tokenizer` is None. Pass the teacher's image processor, or name the teacher "
                "by its id or folder."
            )
        images = processor([row["image"].convert("RGB") for row in rows], return_tensors="pt")["pixel_values"]
    else:
        images = torch.stack([torch.as_tensor(row["pixel_values"]) for row in rows])
    return [_placed({"pixel_values": images[at : at + ROWS]}, teacher) for at in range(0, len(images), ROWS)]


def _placed(batch: Mapping[str, Any], teacher: PreTrainedModel) -> dict[str, Tensor]:
    kept = ("input_ids", "attention_mask", "pixel_values")
    return {name: batch[name].to(teacher.device) for name in kept if name in batch}
