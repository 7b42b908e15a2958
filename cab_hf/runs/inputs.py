"""What a run trains on and evaluates on stays the same from its start to its end, however often it is resumed."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from datasets import Dataset

from cab_hf.files import write_whole


INPUTS_NAME = "inputs.json"


def check_inputs(folder: Path, digests: Mapping[str, str], is_main_process: bool) -> None:
    """Refuses data other than those that a run began with, which the folder of its stages remembers.

    Args:
        folder: of the run's stages.
        digests: of the data, by name.
        is_main_process: whether this process writes what there is to remember.

    Raises:
        ValueError: the data have changed.
    """
    path = folder / INPUTS_NAME
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None  # of a run begun without: None
    if known is not None and known != digests:
        changed = sorted(name for name in known.keys() | digests.keys() if known.get(name) != digests.get(name))
        raise ValueError(
            f"The data of the run in {folder.parent} have changed since it began ({', '.join(changed)}). Bring the "
            f"old data back, choose another `--output_dir`, or remove {path} to go on with the new data."
        )
    if known is None and is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(digests, indent=1))


def digest_of(*arrays: np.ndarray) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def blocks_digest(blocks: Dataset) -> str:
    """A digest of the tokens and labels of rows, whatever files and caches they came from."""
    digest = hashlib.blake2b(digest_size=16)
    for batch in blocks.select_columns(["input_ids", "labels"]).with_format("arrow").iter(1000):
        for column in batch.columns:
            digest.update(column.combine_chunks().flatten().to_numpy().astype("<i4").tobytes())
    return digest.hexdigest()
