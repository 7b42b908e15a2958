"""Files that are written whole or not at all, and read whole or not at all."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open


def write_whole(path: Path, text: str) -> None:
    """Whole or not at all: another process, or a run after a kill, never reads half of it."""
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(text)
    unfinished.replace(path)


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A folder to write into, whose files move into `out` when all of them are written; else nothing is left of them.

    Raises:
        OSError: a file can't be written, whichever library says so.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    place = out if out.is_dir() else out.parent  # `out` may be a file system of its own
    with tempfile.TemporaryDirectory(dir=place, prefix=f".{out.name}-") as unfinished:
        with said_by_name(out):
            yield Path(unfinished)
        out.mkdir(exist_ok=True)
        for path in Path(unfinished).iterdir():
            path.replace(out / path.name)


@contextmanager
def said_by_name(out: Path) -> Iterator[None]:
    """Whichever library fails to write (torch raises RuntimeError on a full disk) raises one OSError naming `out`."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        raise OSError(
            f"{out} can't be written: {error}. Free space there, or name another folder; what was written before is "
            "whole."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A mapping that was saved.

    Raises:
        ValueError: the file is damaged, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged and can't be read ({error}). Make it again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__} and no mapping. Make it again.")
    return values


def open_weights(path: Path) -> Any:
    """A safetensors file.

    Raises:
        ValueError: it is cut off, or none.
    """
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        size = f"{path.stat().st_size:,} bytes" if path.is_file() else "no file"
        raise ValueError(
            f"{path} ({size}) is cut off or no safetensors file ({' '.join(str(error).split())}). Save it again, or "
            "copy it whole; a full disk may be the reason."
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The files of a saved model's weights: the one that transformers would read, or the shards of its index.

    Raises:
        ValueError: an index that is damaged, leads out of the folder, names shards that are not there, or stands
            beside a whole file and its own shards, so that either may be the older save.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not index.is_file():
        return [whole]
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ValueError(f"{index} names {outside[0]!r}, which is no file of its folder. Save the model again.")
    missing = [name for name in names if not (folder / name).is_file()]
    if whole.is_file():
        if len(missing) < len(names):
            raise ValueError(
                f"{folder} holds both {whole.name} and shards, such as {names[0]}: one of them is an older save. "
                f"Remove it ({index.name} belongs to the shards)."
            )
        return [whole]
    if missing or not names:
        raise ValueError(f"{index} names {missing or names}, which is not there. Save the model again.")
    return [folder / name for name in names]


def shipped(name: str) -> Path:
    """A folder that the package ships, such as "training_args": installed it lies inside, in a checkout beside it."""
    package = Path(__file__).parent
    return next(path for path in (package / name, package.parent / name) if path.is_dir())
