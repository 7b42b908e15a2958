"""Rows of text out of files: in any encoding that is named or marked, every error with its file and line."""

import codecs
import csv
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import pyarrow.parquet as pq

from cab_hf.data.conversations import MESSAGES, has_conversations, read_conversation


TEXT_SUFFIXES = (".txt", ".md", ".rst")
# UTF-32 before UTF-16, whose mark begins the other's.
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_END = "\0end of file"


def file_rows(
    paths: tuple[str, ...],
    names: tuple[str, ...],
    text_column: str | None,
    name_column: str | None,
    encoding: str,
    keep_empty: bool,
    stamps: tuple,
) -> Iterator[dict[str, str | None]]:
    """Documents of files, as `text` or `conversation`: each text file is one, and so is each row of a table.

    Args:
        paths: of the files.
        names: of the text files' documents.
        text_column: column of the texts, or of lists of messages, in tables; by default "text", or where there is none
            "messages", or "prompt" and "completion".
        name_column: column of their names; by default "name" where it exists.
        encoding: of files without a byte order mark.
        keep_empty: give rows without text, too.
        stamps: size and time of each file, by which a cache knows that one was edited.

    Raises:
        ValueError: a file that can't be read, by name and line, or that lacks a column.
    """
    del stamps
    for path, name in zip(paths, names, strict=True):
        try:
            for kind, text, own in _documents(Path(path), name, text_column, name_column, encoding):
                if keep_empty or (text is not None and text.strip()):
                    yield {"text": None, "conversation": None, "name": own, kind: text}
        except UnicodeDecodeError as error:
            line = _line_of_error(path, error.encoding)
            raise ValueError(
                f"{path} is not {error.encoding}: {error.reason} in line {line}. Pass its encoding, "
                "for instance latin-1."
            ) from error
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{path}: {error}") from error


def _documents(
    path: Path, name: str, text_column: str | None, name_column: str | None, encoding: str
) -> Iterator[tuple[str, str | None, str | None]]:
    """Kind ("text" or "conversation"), content and name of each document."""
    suffix = path.suffix.lower()
    if suffix in TEXT_SUFFIXES:
        with _opened(path, encoding) as file:
            yield "text", _text(file.read(), encoding), name
        return
    name_column, wanted = name_column or ("name" if text_column != "name" else None), name_column
    rows = _READERS[suffix](path, encoding, (text_column or "text", name_column))
    first = list(itertools.islice(rows, 1000))
    columns = list(dict.fromkeys(column for row in first for column in row))
    chats = text_column is None and has_conversations(columns)
    text_column = text_column or (MESSAGES if chats else "text")
    for argument, column in (("text_column", text_column), ("name_column", wanted)):
        if first and column is not None and column not in columns and not (chats and column == MESSAGES):
            raise ValueError(f"there is no column {column!r}. Pass {argument} as one of {columns}.")
    chats = chats or any(isinstance(row.get(text_column), list) for row in first)
    for number, row in enumerate(itertools.chain(first, rows), start=1):
        own = row.get(name_column)
        own = None if own is None else _text(str(own), encoding)
        if chats:
            try:
                yield "conversation", _text(read_conversation(row, text_column), encoding), own
            except ValueError as error:
                raise ValueError(f"row {number}: {error}") from error
            continue
        text = row.get(text_column)
        if not isinstance(text, str | None):
            raise ValueError(
                f"column {text_column!r} holds {type(text).__name__}, not text. Pass text_column as a column "
                "of strings."
            )
        yield "text", text and _text(text, encoding), own


def _text(text: str, encoding: str) -> str:
    if text.count("\0") > len(text) // 4:
        raise ValueError(f"as {encoding} it is full of NUL. Pass its encoding, for instance utf-16.")
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON may hold
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _opened(path: Path, encoding: str, newline: str | None = None) -> TextIO:
    with path.open("rb") as file:
        start = file.read(4)
    marked = next((name for mark, name in _MARKS.items() if start.startswith(mark)), encoding)
    return path.open(encoding=marked, newline=newline)


def _line_of_error(path: str, encoding: str) -> int:
    content = Path(path).read_bytes()
    try:
        content.decode(encoding)
    except UnicodeDecodeError as error:
        return content.count(b"\n", 0, error.start) + 1
    return 1


def _csv_rows(path: Path, encoding: str, wanted: Sequence[str | None]) -> Iterator[dict[str, str]]:
    del wanted
    csv.field_size_limit(sys.maxsize)
    with _opened(path, encoding, newline="") as file:
        rows = csv.reader(itertools.chain(file, [_END]))  # which is a row, unless a quote is left open
        header, begin = next(rows), rows.line_num + 1
        for row in rows:
            if row == [_END]:
                return
            if any(row[len(header) :]):
                raise ValueError(f"line {begin} has {len(row)} columns, and the header {len(header)}. Correct it.")
            if row:
                yield dict(zip(header, row))
            begin = rows.line_num + 1
    raise ValueError("a quote is never closed. Close it, or write the table as JSON lines.")


def _json_rows(path: Path, encoding: str, wanted: Sequence[str | None]) -> Iterator[dict[str, Any]]:
    del wanted
    with _opened(path, encoding) as file:
        try:
            is_lines = isinstance(json.loads(next((line for line in file if line.strip()), "{}")), dict)
        except json.JSONDecodeError:
            is_lines = False
        file.seek(0)
        if is_lines:
            numbered = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
        else:  # one value over several lines
            numbered = [(0, file.read())]
        for number, line in numbered:
            try:
                found = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"line {max(number, error.lineno)} is no JSON: {error.msg} at character {error.colno}. "
                    "Correct it, or take it out."
                ) from error
            if isinstance(found, dict) and _is_columns(found):
                found = [dict(zip(found, row)) for row in zip(*found.values())]  # columns
            for row in found if isinstance(found, list) else [found]:
                if not isinstance(row, dict):
                    raise ValueError(f"line {max(number, 1)} holds a {type(row).__name__}, not an object of columns.")
                yield row


def _is_columns(found: dict[str, Any]) -> bool:
    """Whether a JSON object is a whole table; lists of messages make a row."""
    lists = [one for one in found.values() if isinstance(one, list)]
    is_row = has_conversations(list(found)) and all(not one or isinstance(one[0], dict) for one in lists)
    return len(lists) == len(found) and not is_row


def _parquet_rows(path: Path, encoding: str, wanted: Sequence[str | None]) -> Iterator[dict[str, Any]]:
    del encoding
    file = pq.ParquetFile(path)
    columns = file.schema_arrow.names
    kept = [column for column in columns if column in wanted] if wanted[0] in columns else columns
    for batch in file.iter_batches(1000, columns=kept):
        yield from batch.to_pylist()


_READERS = {".jsonl": _json_rows, ".json": _json_rows, ".parquet": _parquet_rows, ".csv": _csv_rows}
TABLE_SUFFIXES = tuple(_READERS)
