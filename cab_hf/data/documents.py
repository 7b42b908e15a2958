"""Text in, fixed blocks of tokens out: loading documents and holding some out; packing.py makes the blocks."""

import codecs
import fnmatch
import functools
import glob
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features, IterableDataset, Value
from datasets.exceptions import DatasetGenerationError, DatasetsError
from huggingface_hub import DatasetCard
from transformers.utils import logging

from cab_hf.data.conversations import MESSAGES, has_conversations, read_conversation
from cab_hf.data.packing import TOKEN_SUFFIX, TOKENISED, content_of
from cab_hf.data.text_files import TABLE_SUFFIXES, TEXT_SUFFIXES, file_rows


logger = logging.get_logger(__name__)

_WAYS_OUT = (
    'Check the spelling and the network, or use local files, a folder of Dataset.save_to_disk, or source "builtin" '
    "(the language reference that comes with Python)."
)
_SUFFIXES = (*TEXT_SUFFIXES, *TABLE_SUFFIXES, TOKEN_SUFFIX)
_NAMED = Features(dict.fromkeys(("text", "name"), Value("large_string")))
_OF_FILES = Features(dict.fromkeys(("text", "conversation", "name"), Value("large_string")))
_SPLIT_NAMES = re.compile(r"(?:^|\+)\s*([^+\[\s]+)")
# What makes a text a regular expression: no glob has it.
_REGULAR = re.compile(r"[\^$\\+(){}|]|[.\]][*?]")


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

    Rows of a table without a column `text` but with `messages`, a list of {"role", "content", ...}, or with `prompt`
    and `completion`, both text or both such lists, are conversations. Each is one document, with `conversation`
    instead of `text`, which `pack_documents` reads through the tokenizer's chat template. A column `tools` goes to
    the template, too.

    Args:
        source: One of
            "builtin" - the topics of the language reference that come with CPython (no download, about 0.5 MB);
            a file, a folder or a glob of `.txt`, `.md`, `.rst` files - one document a file, named by its path;
            a file, a folder or a glob of `.jsonl`, `.json`, `.parquet`, `.csv` files - one document a row;
            a `.npz` file of `save_tokens` - documents that are already tokenised, with `input_ids` instead of `text`;
            a folder written by `Dataset.save_to_disk`, or one as a download from the Hub leaves it, whose splits and
            configurations are those of its card or its file names;
            a dataset id of the Hugging Face Hub;
            or a sequence of these, read one after the other.
        config_name: Configuration of a Hub dataset, or of a folder whose card has some.
        split: Split, also a slice such as "train[:1%]"; by default "train", or the only split there is.
        text_column: Column that holds the text, or lists of messages; by default "text", or else "messages".
        name_column: Column that names a document, "name" by default where it exists.
        encoding: Encoding of text, CSV and JSON files; a byte order mark goes before it.
        cache_dir: Where `datasets` keeps its files; its own default otherwise.

    Returns:
        Rows of {"text": str, "name"?: str}, {"conversation": str (JSON), "name"?: str}, or from `.npz`
        {"input_ids": int32 (t,), "name": str, "vocabulary": str}. Documents without any text are left out.

    Raises:
        ConnectionError: A Hub dataset could not be reached.
        FileNotFoundError: Nothing is at the path or glob, and no Hub dataset has that name.
        ValueError: A missing column or split, sources that do not fit together, or a row that is no conversation.

    Example:
        >>> from tempfile import mkdtemp
        >>> file = Path(mkdtemp()) / "sums.jsonl"
        >>> _ = file.write_text('{"prompt": "2 + 2 =", "completion": " 4"}')
        >>> (row,) = load_documents(file, cache_dir=file.parent)
        >>> row["conversation"]
        '{"prompt": "2 + 2 =", "completion": " 4"}'
    """
    try:
        codecs.lookup(encoding)
    except LookupError as error:
        raise ValueError(f"encoding {encoding!r} is unknown. Use one such as utf-8, utf-16 or latin-1.") from error
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
    if len({content_of(names) for names in columns}) > 1:
        raise ValueError(
            f"The sources {list(map(str, source))} mix texts, conversations or tokenised documents (columns "
            f"{columns}). Load and pack them apart."
        )
    shared = [name for name in columns[0] if all(name in names for names in columns)]
    return datasets.concatenate_datasets([part.select_columns(shared) for part in parts])


def as_documents(rows: Dataset | Sequence[str | Mapping[str, Any]]) -> Dataset:
    """Rows that are at hand as documents: texts, rows of `text`, or conversations as `messages` or `prompt` and
    `completion`. A data set of other columns, tokenised ones among them, is returned as it is.

    Example:
        >>> as_documents(["One text.", "Another."]).column_names
        ['text']
    """
    if not isinstance(rows, Dataset):
        rows = Dataset.from_list([{"text": row} if isinstance(row, str) else dict(row) for row in rows])
    columns = rows.column_names
    if {"input_ids", "conversation"} & set(columns) or not ("text" in columns or has_conversations(columns)):
        return rows
    return _standardise(rows, "the given rows", None, None)


def split_documents(documents: Dataset, holdout: float | int | str, *, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Splits off held-out documents, always whole ones: no text is ever on both sides.

    With a fraction or a number, a document's side follows from a hash of its text and the seed, so neither the order
    of the documents nor the machine matters, and copies of one text stay together. Of a single document a fraction
    holds out the end, from a paragraph on.

    Args:
        documents: Rows with `text` or `input_ids`, and `name` where `holdout` goes by names.
        holdout: A fraction in (0, 1) or a number of documents, perhaps as text; or what the names of held-out
            documents are: a file, a glob such as "doc0*", or a regular expression that they match anywhere, for
            instance r"^\\d{3}9" for years that end in 9. Text with `*` or `?` is a glob unless something in it, such
            as `^`, `\\` or `.*`, says that it is a regular expression.
        seed: Changes which documents a fraction or number picks.

    Returns:
        (training documents, held-out documents), each in the original order.

    Raises:
        ValueError: `holdout` is out of range, leaves a side empty, or goes by names while documents have none; or
            documents are a stream.
    """
    if isinstance(documents, IterableDataset):
        raise ValueError("The documents are a stream. Hold some out by its own `take` and `skip`.")
    holdout = _number_of(holdout)
    if isinstance(holdout, float) and not 0.0 < holdout < 1.0 or isinstance(holdout, int) and holdout < 1:
        raise ValueError(f"holdout is {holdout}. Use a fraction inside (0, 1) such as 0.1, or a number from 1 on.")
    columns = documents.column_names
    if isinstance(holdout, str) and "name" not in columns:
        raise ValueError(
            f"holdout is the pattern {holdout!r}, but the documents have no name (columns {columns}). "
            "Pass name_column to load_documents, or hold out a fraction or a number."
        )
    if isinstance(holdout, float) and len(documents) == 1:
        return _split_one(documents, holdout)
    hashes = _hashes(documents, seed)
    if isinstance(holdout, str):
        matches = _name_rule(holdout, documents["name"])
        held = np.array([matches(name) for name in documents["name"]], dtype=bool)
    else:
        count = holdout if isinstance(holdout, int) else max(1, round(holdout * len(hashes)))
        held = hashes <= np.sort(hashes)[:count][-1]
    if held.all() or not held.any():
        raise ValueError(
            f"holdout {holdout!r} holds out {int(held.sum())} of {len(held)} documents; each side needs at least one. "
            "Give another fraction, number or pattern, or more documents; of a single document a fraction, such as "
            "0.1, holds out the end."
        )
    training, heldout = documents.select(np.flatnonzero(~held)), documents.select(np.flatnonzero(held))
    if isinstance(holdout, str):
        tell_copies(training, heldout, f"held out by {holdout!r}")
    return training, heldout


def tell_copies(training: Dataset, evaluated: Dataset, name: str) -> int:
    """How many evaluated documents are trained on too, word for word; a warning says so."""
    copies = int(np.isin(_hashes(evaluated), _hashes(training)).sum())
    if copies:
        logger.warning(
            f"{copies} of the {len(evaluated)} evaluated documents ({name}) are also trained on: what is measured "
            "there is no held-out text. Leave them out of `dataset`, or evaluate on others."
        )
    return copies


def _number_of(holdout: float | int | str) -> float | int | str:
    for kind in (int, float) if isinstance(holdout, str) else ():
        try:
            return kind(holdout)
        except ValueError:
            continue
    return holdout


def _name_rule(holdout: str, names: Sequence[str]) -> Callable[[str], bool]:
    """Which names a `holdout` means: a file's, those of a glob, or of a regular expression."""
    is_glob = not _REGULAR.search(holdout) and re.search("[*?]", holdout) is not None
    # Names are seen from the source's folder; the path or glob may be seen from elsewhere.
    tails = [
        holdout.split("/", number)[-1] for number in range(1 + holdout.count("/") * (not _REGULAR.search(holdout)))
    ]
    for tail in tails:
        found = {
            name for name in names if fnmatch.fnmatchcase(f"/{name}", f"*/{tail if is_glob else glob.escape(tail)}")
        }
        if found or (is_glob and tail == tails[-1]):
            return found.__contains__
    try:
        pattern = re.compile(holdout)
    except re.error as error:
        raise ValueError(
            f"holdout {holdout!r} is no file, no glob and no valid regular expression: {error}."
        ) from error
    return lambda name: pattern.search(name) is not None


def _split_one(document: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    """A document up to its last `fraction`, cut before a paragraph, else a line, a word or a token; and the rest."""
    row = document[0]
    if "conversation" in row:
        raise ValueError(f"There is one conversation, which is not cut: holdout {fraction} holds out none. Give more.")
    content = row.get("text", row.get("input_ids"))
    start = middle = len(content) - max(1, round(fraction * len(content)))
    if "text" in row:
        # The nearest border of the coarsest kind that there is in the half of the document around the cut.
        for border in ("\n\\s*\n", "\n", "\\s"):
            places = [found.end() for found in re.finditer(border, content)]
            near = [at for at in places if 0.5 * middle <= at <= 0.5 * (middle + len(content))]
            if near:
                start = min(near, key=lambda at: abs(at - middle))
                break
    name = "text" if "text" in row else "input_ids"
    parts = content[:start], content[start:]
    if not all(len(part.strip()) if name == "text" else len(part) for part in parts):
        raise ValueError(
            f"The only document has {len(content)} characters or tokens, too few to hold out {fraction} of it "
            "(`holdout`). Give more text."
        )
    logger.warning(
        f"There is one document; its last {len(parts[1]) / len(content):.1%} ({len(parts[1]):,} of {len(content):,} "
        f"{'characters' if name == 'text' else 'tokens'}) are held out."
    )
    return tuple(Dataset.from_list([row | {name: part}], features=document.features) for part in parts)


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
        return _pick_split(_from_generator(_builtin_documents, {}, cache_dir), split, source)
    path = Path(source).expanduser()
    if path.is_dir() and any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        loaded = _pick_split(datasets.load_from_disk(str(path)), split, source)
        return _standardise(loaded, source, **columns)

    files, root = _find_files(path, source)
    splits = _splits(path, files, config_name, cache_dir) if files and path.is_dir() else {"train": files}
    if not files or any(file.suffix.lower() not in _SUFFIXES for found in splits.values() for file in found):
        place = str(path) if path.is_dir() else source
        loaded = load_from_hub(place, _WAYS_OUT, config_name, split=split, cache_dir=cache_dir)
        return _standardise(_pick_split(loaded, split, source), source, **columns)
    is_text = all(file.suffix.lower() in TEXT_SUFFIXES for found in splits.values() for file in found)

    def read(files: list[Path]) -> Dataset:
        kinds = sorted({file.suffix.lower() for file in files})
        stamps = tuple((file.stat().st_size, file.stat().st_mtime_ns) for file in files)
        if not any(size for size, _ in stamps):
            raise ValueError(f"source {source!r} holds no text: {files[0].name} is empty. Name another.")
        arguments: dict[str, Any] = {"paths": tuple(map(str, files)), "stamps": stamps}
        if kinds == [TOKEN_SUFFIX]:
            return _from_generator(_token_files, arguments, cache_dir, TOKENISED)
        if not is_text and set(kinds) - set(TABLE_SUFFIXES):
            raise ValueError(
                f"source {source!r} mixes files of the kinds {kinds}. Name one kind, for instance by a glob."
            )
        names = tuple(file.relative_to(root).as_posix() for file in files)
        # A slice counts the rows as they are in the files.
        arguments |= columns | {"names": names, "encoding": encoding, "keep_empty": "[" in (split or "")}
        rows = _from_generator(file_rows, arguments, cache_dir, _OF_FILES)
        filled = [name for name in rows.column_names if rows.data.column(name).null_count < len(rows)]
        if {"text", "conversation"} <= set(filled):
            raise ValueError(f"source {source!r} mixes texts and conversations. Load and pack them apart.")
        return rows.select_columns(filled if content_of(filled) in filled else ["text", *filled])

    if is_text and list(splits) == ["train"]:
        rows = _pick_split(read(splits["train"]), split, source)
    else:
        rows = _pick_split({name: read(splits[name]) for name in _split_names(splits, split, source)}, split, source)
    return _standardise(rows, source, None, None) if "[" in (split or "") and "text" in rows.column_names else rows


def _splits(path: Path, files: list[Path], config_name: str | None, cache_dir: str | None) -> dict[str, list[Path]]:
    """The files of each split of a folder, as `datasets` finds them: by its card, or by names where all files fit."""
    card = path / "README.md"
    tables = [file for file in files if file.suffix.lower() in TABLE_SUFFIXES and file.name != "dataset_infos.json"]
    if tables and card.is_file():
        files = tables  # and not the card, or a licence
    try:
        configured = card.is_file() and bool(DatasetCard.load(card, ignore_metadata_errors=True).data.get("configs"))
    except ValueError:
        configured = False
    try:
        builder = datasets.load_dataset_builder(str(path), config_name if configured else None, cache_dir=cache_dir)
    except (DatasetsError, ValueError, RuntimeError, OSError) as error:
        if configured:
            raise ValueError(f"The folder {str(path)!r} can't be read by its card (README.md): {error}") from error
        return {"train": files}
    own = {file.resolve(): file for file in files}
    found = {
        str(name): sorted(own.get(Path(file).resolve(), Path(file)) for file in part)
        for name, part in (builder.config.data_files or {}).items()
    }
    by_name = ("train" in found or len(found) == 1) and set(own.values()) <= {
        one for part in found.values() for one in part
    }
    return found if configured or by_name else {"train": files}


def _find_files(path: Path, source: str) -> tuple[list[Path], Path]:
    """Local files of a source and the folder that their names are relative to; no file where it is a Hub id."""
    if path.is_file():
        if path.suffix.lower() not in _SUFFIXES:
            raise ValueError(f"source {source!r} ends in {path.suffix!r}. Files can be {', '.join(_SUFFIXES)}.")
        return [path], path.parent
    if path.is_dir():  # without a known kind: perhaps one that `datasets` reads
        return sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file()), path
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


def _split_names(known: Mapping[str, Any], split: str | None, source: str) -> list[str]:
    """The splits that `split` reads of those known."""
    default = "train" if "train" in known or len(known) != 1 else next(iter(known))
    names = _SPLIT_NAMES.findall(split or default)
    for name in names:
        if name not in known:
            raise ValueError(f"source {source!r} has no split {name!r}. Pass split as one of {list(known)}.")
    return names


def _pick_split(loaded: Dataset | Mapping[str, Dataset], split: str | None, source: str) -> Dataset:
    """A split, or slices of some; what has no splits is there whatever the split's name."""
    if isinstance(loaded, Dataset):
        if "[" not in (split or ""):
            return loaded
        loaded = dict.fromkeys(_SPLIT_NAMES.findall(split), loaded)
    names = _split_names(loaded, split, source)
    if split is None or split in loaded:
        return loaded[names[0]]
    parts = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(loaded[name]) for name in names})
    return datasets.concatenate_datasets([loaded[one.splitname].select(range(one.from_, one.to)) for one in parts])


def _standardise(documents: Dataset, source: str, text_column: str | None, name_column: str | None) -> Dataset:
    columns = documents.column_names
    is_list = text_column in columns and isinstance(
        documents.features[text_column], datasets.List | datasets.LargeList
    )
    if is_list or text_column is None and has_conversations(columns):
        return _conversations(documents, source, text_column or MESSAGES, name_column)
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


def _conversations(documents: Dataset, source: str, column: str, name_column: str | None) -> Dataset:
    columns = documents.column_names
    if name_column is not None and name_column not in columns:
        raise ValueError(f"source {source!r} has no column {name_column!r}. Pass name_column as one of {columns}.")
    name_column = name_column or ("name" if "name" in columns else None)

    def read(row: dict[str, Any], index: int) -> dict[str, str]:
        try:
            found = {"conversation": read_conversation(row, column)}
        except ValueError as error:
            raise ValueError(f"source {source!r}, row {index + 1}: {error}") from error
        return found if name_column is None else found | {"name": str(row[name_column])}

    names = ("conversation",) if name_column is None else ("conversation", "name")
    features = Features(dict.fromkeys(names, Value("large_string")))
    return documents.map(read, with_indices=True, remove_columns=columns, features=features)


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
    function: Callable, arguments: dict, cache_dir: str | None, features: Features = _NAMED
) -> Dataset:
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


def _token_files(paths: tuple[str, ...], stamps: tuple) -> Iterator[dict]:
    # The stamps (size and time of each file) are here for the cache: an edited file is read again.
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


def _hashes(documents: Dataset, seed: int = 0) -> np.ndarray:
    """A hash of each document's text, conversation or tokens."""
    content = content_of(documents.column_names)
    hashes = (_hash(one, seed) for batch in documents.iter(1000) for one in batch[content])
    return np.fromiter(hashes, dtype=np.uint64)


def _hash(content: str | Sequence[int], seed: int) -> int:
    if isinstance(content, str):
        data = content.encode("utf-8", "surrogatepass")
    else:
        data = np.asarray(content, dtype="<i4").tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=str(seed).encode()).digest(), "big")
