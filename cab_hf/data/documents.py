"""Text in, fixed blocks of tokens out: loading documents and holding some out; packing.py makes the blocks."""

import functools
import glob
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, DatasetDict, Features, IterableDataset, Value
from datasets.exceptions import DatasetGenerationError
from transformers.utils import logging

from cab_hf.data.packing import TOKEN_SUFFIX, TOKENISED


logger = logging.get_logger(__name__)

_TEXT_SUFFIXES = (".txt", ".md", ".rst")
_TABLE_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_WAYS_OUT = (
    'Check the spelling and the network, or use local files, a folder of Dataset.save_to_disk, or source "builtin" '
    "(the language reference that comes with Python)."
)
_SUFFIXES = (*_TEXT_SUFFIXES, *_TABLE_READERS, TOKEN_SUFFIX)


def load_documents(
    source: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    config_name: str | None = None,
    split: str | None = None,
    text_column: str | None = None,
    name_column: str | None = None,
    encoding: str = "utf-8",
    cache_dir: str | os.PathLike | None = None,
) -> Dataset:
    """Loads documents from anywhere as rows of `text` and, where the source names them, `name`.

    Args:
        source: One of
            "builtin" - the topics of the language reference that come with CPython (no download, about 0.5 MB);
            a file, a folder or a glob of `.txt`, `.md`, `.rst` files - one document a file, named by its path;
            a file, a folder or a glob of `.jsonl`, `.json`, `.parquet`, `.csv` files - one document a row;
            a `.npz` file of `save_tokens` - documents that are already tokenised, with `input_ids` instead of `text`;
            a folder written by `Dataset.save_to_disk`;
            a dataset id of the Hugging Face Hub;
            or a sequence of these, read one after the other.
        config_name: Configuration of a Hub dataset.
        split: Split, also a slice such as "train[:1%]"; by default "train", or the only split there is.
        text_column: Column that holds the text, "text" by default.
        name_column: Column that names a document, "name" by default where it exists.
        encoding: Encoding of plain text files.
        cache_dir: Where `datasets` keeps its files; its own default otherwise.

    Returns:
        Rows of {"text": str, "name"?: str}, or {"input_ids": int32 (t,), "name": str, "vocabulary": str} from `.npz`.
        Documents without any text are left out.

    Raises:
        ConnectionError: A Hub dataset could not be reached.
        FileNotFoundError: Nothing is at the path or glob, and no Hub dataset has that name.
        ValueError: A missing column or split, or sources that do not fit together.
    """
    options = {
        "config_name": config_name,
        "split": split,
        "text_column": text_column,
        "name_column": name_column,
        "encoding": encoding,
        "cache_dir": None if cache_dir is None else str(cache_dir),
    }
    if isinstance(source, str | os.PathLike):
        return _load_one(os.fspath(source), **options)
    parts = [_load_one(os.fspath(one), **options) for one in source]
    columns = [part.column_names for part in parts]
    if len({"text" in names for names in columns}) > 1:
        raise ValueError(
            f"The sources {list(map(str, source))} mix texts and tokenised documents (columns {columns}). "
            "Load and pack them apart."
        )
    shared = [name for name in columns[0] if all(name in names for names in columns)]
    return datasets.concatenate_datasets([part.select_columns(shared) for part in parts])


def parse_holdout(text: str) -> float | int | str:
    """A `holdout` of `split_documents` as a recipe or a command line writes it: a number, or else a pattern."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def split_documents(documents: Dataset, holdout: float | int | str, *, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Splits off held-out documents, always whole ones: no text is ever on both sides.

    With a fraction or a number, a document's side follows from a hash of its text and the seed, so neither the order
    of the documents nor the machine matters, and copies of one text stay together.

    Args:
        documents: Rows with `text` or `input_ids`, and `name` where `holdout` is a pattern.
        holdout: A fraction in (0, 1), a number of documents, or a regular expression: documents whose name it matches
            anywhere are held out, for instance r"^\\d{3}9" for years that end in 9.
        seed: Changes which documents a fraction or number picks.

    Returns:
        (training documents, held-out documents), each in the original order.

    Raises:
        ValueError: `holdout` is out of range, leaves a side empty, or is a pattern while documents have no name; or
            documents are a stream.
    """
    if isinstance(documents, IterableDataset):
        raise ValueError("The documents are a stream. Hold some out by its own `take` and `skip`.")
    if isinstance(holdout, float) and not 0.0 < holdout < 1.0 or isinstance(holdout, int) and holdout < 1:
        raise ValueError(f"holdout is {holdout}. Use a fraction inside (0, 1) such as 0.1, or a number from 1 on.")
    columns = documents.column_names
    if isinstance(holdout, str) and "name" not in columns:
        raise ValueError(
            f"holdout is the pattern {holdout!r}, but the documents have no name (columns {columns}). "
            "Pass name_column to load_documents, or hold out a fraction or a number."
        )
    content = "text" if "text" in columns else "input_ids"
    hashes = np.array([_hash(one, seed) for batch in documents.iter(1000) for one in batch[content]], dtype=np.uint64)
    if isinstance(holdout, str):
        try:
            pattern = re.compile(holdout)
        except re.error as error:
            raise ValueError(f"holdout {holdout!r} is no valid regular expression: {error}.") from error
        held = np.array([pattern.search(name) is not None for name in documents["name"]], dtype=bool)
    else:
        count = holdout if isinstance(holdout, int) else max(1, round(holdout * len(hashes)))
        held = hashes <= np.sort(hashes)[:count][-1]
    if held.all() or not held.any():
        raise ValueError(
            f"holdout {holdout!r} holds out {int(held.sum())} of {len(held)} documents; each side needs at least one. "
            "Give another fraction, number or pattern, or more documents."
        )
    copies = int(np.isin(hashes[~held], hashes[held]).sum())
    if copies:
        logger.warning(f"{copies} training documents are copies of held-out ones, as {holdout!r} goes by name only.")
    return documents.select(np.flatnonzero(~held)), documents.select(np.flatnonzero(held))


def _load_one(
    source: str,
    *,
    config_name: str | None,
    split: str | None,
    text_column: str | None,
    name_column: str | None,
    encoding: str,
    cache_dir: str | None,
) -> Dataset:
    columns = {"text_column": text_column, "name_column": name_column}
    if source == "builtin":
        return _from_generator(_builtin_documents, {}, cache_dir)
    path = Path(source).expanduser()
    if path.is_dir() and any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        loaded = _pick_split(datasets.load_from_disk(str(path)), split, source)
        return _standardise(loaded, source, **columns)

    files, root = _find_files(path, source)
    if not files:
        loaded = load_from_hub(source, _WAYS_OUT, config_name, split=split, cache_dir=cache_dir)
        return _standardise(_pick_split(loaded, split, source), source, **columns)
    kinds = sorted({file.suffix.lower() for file in files})
    stamps = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    paths = tuple(map(str, files))
    if all(kind in _TEXT_SUFFIXES for kind in kinds):
        names = tuple(file.relative_to(root).as_posix() for file in files)
        return _from_generator(
            _text_files, {"paths": paths, "names": names, "encoding": encoding, "stamps": tuple(stamps)}, cache_dir
        )
    if kinds == [TOKEN_SUFFIX]:
        return _from_generator(_token_files, {"paths": paths, "stamps": tuple(stamps)}, cache_dir, TOKENISED)
    readers = {_TABLE_READERS.get(kind) for kind in kinds}
    if len(readers) != 1 or None in readers:
        raise ValueError(f"source {source!r} mixes files of the kinds {kinds}. Name one kind, for instance by a glob.")
    loaded = datasets.load_dataset(readers.pop(), data_files=list(paths), split=split or "train", cache_dir=cache_dir)
    return _standardise(loaded, source, **columns)


def _find_files(path: Path, source: str) -> tuple[list[Path], Path]:
    """Local files of a source and the folder that their names are relative to; no file where it is a Hub id."""
    if path.is_file():
        if path.suffix.lower() not in _SUFFIXES:
            raise ValueError(f"source {source!r} ends in {path.suffix!r}. Files can be {', '.join(_SUFFIXES)}.")
        return [path], path.parent
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file())
        if not files:
            raise FileNotFoundError(f"The folder {source!r} has no file of the kinds {', '.join(_SUFFIXES)}.")
        return files, path
    if any(character in source for character in "*?["):
        found = sorted(map(Path, glob.glob(str(path), recursive=True)))
        files = [file for file in found if file.suffix.lower() in _SUFFIXES and file.is_file()]
        if not files:
            raise FileNotFoundError(f"The pattern {source!r} matches no file of the kinds {', '.join(_SUFFIXES)}.")
        return files, Path(os.path.commonpath([file.parent for file in files]))
    if path.is_absolute() or source.startswith((".", "~")) or path.suffix.lower() in _SUFFIXES:
        raise FileNotFoundError(f"source {source!r} is no file and no folder (seen from {Path.cwd()}).")
    return [], path


def load_from_hub(source: str, ways_out: str, config_name: str | None = None, **options: str | None) -> Any:
    """`datasets.load_dataset`, whose errors name the source and the ways out."""
    try:
        return datasets.load_dataset(source, config_name, **options)
    except ConnectionError as error:
        raise ConnectionError(f"The Hub data set {source!r} could not be reached: {error}. {ways_out}") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"source {source!r} is no local path and no Hub data set: {error}. {ways_out}"
        ) from error


def _pick_split(loaded: Dataset | DatasetDict, split: str | None, source: str) -> Dataset:
    if not isinstance(loaded, DatasetDict):
        return loaded
    wanted = split or ("train" if "train" in loaded or len(loaded) != 1 else next(iter(loaded)))
    if wanted not in loaded:
        raise ValueError(f"source {source!r} has no split {wanted!r}. Pass split as one of {list(loaded)}.")
    return loaded[wanted]


def _standardise(documents: Dataset, source: str, text_column: str | None, name_column: str | None) -> Dataset:
    columns = documents.column_names
    text_column = text_column or "text"
    for argument, column in (("text_column", text_column), ("name_column", name_column)):
        if column is not None and column not in columns:
            raise ValueError(f"source {source!r} has no column {column!r}. Pass {argument} as one of {columns}.")
    renamed = {text_column: "text"}
    if name_column is None and "name" in columns and text_column != "name":
        name_column = "name"
    if name_column is not None:
        renamed[name_column] = "name"
    function = functools.partial(_standard_rows, renamed=renamed, source=source)
    features = Features(dict.fromkeys(renamed.values(), Value("large_string")))
    return documents.select_columns(list(renamed)).map(
        function, batched=True, remove_columns=list(renamed), features=features
    )


def _standard_rows(batch: dict[str, list], renamed: dict[str, str], source: str) -> dict[str, list]:
    text_column = next(column for column, name in renamed.items() if name == "text")
    texts = batch[text_column]
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise ValueError(
                f"Column {text_column!r} of source {source!r} holds {type(text).__name__}, not text. "
                "Pass text_column as a column of strings."
            )
    kept = [index for index, text in enumerate(texts) if text is not None and text.strip()]
    rows = {"text": [texts[index] for index in kept]}
    for column, name in renamed.items():
        if name == "name":
            rows["name"] = [str(batch[column][index]) for index in kept]
    return rows


def _from_generator(
    function: Callable, arguments: dict, cache_dir: str | None, features: Features | None = None
) -> Dataset:
    features = features or Features({"text": Value("large_string"), "name": Value("large_string")})
    try:
        return Dataset.from_generator(function, features=features, gen_kwargs=arguments, cache_dir=cache_dir)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise ValueError(str(error.__cause__)) from error
        raise


def _builtin_documents() -> Iterator[dict]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        if topics[name].strip():
            yield {"text": topics[name], "name": name}


def _text_files(paths: tuple[str, ...], names: tuple[str, ...], encoding: str, stamps: tuple) -> Iterator[dict]:
    # The stamps (size and time of each file) are here for the cache: an edited file is read again.
    del stamps
    for path, name in zip(paths, names, strict=True):
        try:
            text = Path(path).read_text(encoding=encoding)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not {encoding}: {error}. Pass its encoding, for instance latin-1.") from error
        if text.strip():
            yield {"text": text, "name": name}


def _token_files(paths: tuple[str, ...], stamps: tuple) -> Iterator[dict]:
    del stamps
    for path in paths:
        with np.load(path) as file:
            missing = [name for name in ("tokens", "offsets", "names", "vocabulary") if name not in file]
            if missing:
                raise ValueError(f"{path} lacks the arrays {missing}. Write it by cab_hf.data.documents.save_tokens.")
            tokens, offsets, names = file["tokens"], file["offsets"], file["names"]
            vocabulary = str(file["vocabulary"])
        for start, stop, name in zip(offsets[:-1], offsets[1:], names, strict=True):
            if stop > start:
                yield {"input_ids": tokens[start:stop], "name": str(name), "vocabulary": vocabulary}


def _hash(content: str | Sequence[int], seed: int) -> int:
    if isinstance(content, str):
        data = content.encode("utf-8", "surrogatepass")
    else:
        data = np.asarray(content, dtype="<i4").tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=str(seed).encode()).digest(), "big")
