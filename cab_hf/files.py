"""Files that are written whole or not at all."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


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
        try:
            yield Path(unfinished)
        except (OSError, SafetensorError) as error:
            raise OSError(f"{out} can't be written: {error}. Free space there, or name another folder.") from error
        out.mkdir(exist_ok=True)
        for path in Path(unfinished).iterdir():
            path.replace(out / path.name)
