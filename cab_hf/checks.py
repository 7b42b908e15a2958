"""What a command line is refused for at once: torch and transformers take seconds to import, and are not needed."""

import ast
import difflib
import functools
import glob
import importlib.util
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from cab_hf.files import shipped


DIGITS, CIFAR10 = "digits", "cifar10"
SPECIAL_SOURCES = {"builtin", "random-llama", "smollm2-demo", "imagefolder", DIGITS, CIFAR10}
LISTS = {"stages", "baselines"}
INTERRUPTED = 130  # 128 + SIGINT, as shells say it


def end(error: Exception | str, code: int = 1) -> NoReturn:
    """Ends the process with one line on stderr."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(code)


@contextmanager
def interrupts_in_one_line() -> Iterator[None]:
    """Ends the process after ctrl-C with one line, by the first of several processes, and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        if "RANK" in os.environ:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher sends another one
            if os.environ["RANK"] != "0":
                raise SystemExit(INTERRUPTED) from None
        end(
            "interrupted. Run the same command again to go on: what is finished is kept, and the newest checkpoint "
            "where there is one (--save_steps).",
            INTERRUPTED,
        )


def quiet_bars() -> None:
    """Shows progress bars of what takes longer than two seconds, on the first process. Before tqdm is imported."""
    os.environ.setdefault("TQDM_DELAY", "2")
    if os.environ.get("RANK", "0") != "0":
        os.environ.setdefault("TQDM_DISABLE", "1")


@functools.cache
def option_names() -> set[str] | None:
    """Names of a recipe's options, read off their sources; None where a later transformers writes its own elsewhere.

    Example:
        >>> {"teacher", "bridge_weight", "max_steps"} <= option_names()
        True
    """
    here, transformers = Path(__file__).parent, importlib.util.find_spec("transformers")
    files = [Path(transformers.origin).parent / "training_args.py"]
    files += [here / name for name in ("distillation/training_args.py", "data/augmentation.py", "recipe_options.py")]
    names, classes = set(), set()
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Arguments"):
                if not {ast.unparse(base) for base in node.bases} <= classes:
                    return None
                classes.add(node.name)
                names |= {line.target.id for line in node.body if isinstance(line, ast.AnnAssign)}
    return {name for name in names if not name.startswith("_")}


def check_options(given: Sequence[str], others: Sequence[str]) -> None:
    """Refuses options that no recipe has.

    Args:
        given: of a command line, with their values.
        others: options of the command itself, which may have been meant.

    Raises:
        ValueError: the first unknown one; the message names the nearest known one.
    """
    known = option_names()
    for text in given if known is not None else ():
        name = text.partition("=")[0].removeprefix("--").replace("-", "_")
        if not text.startswith("--") or {name, name.removeprefix("no_")} & (known | LISTS):
            continue
        near = difflib.get_close_matches(name, [*others, *sorted(known)], n=1, cutoff=0.6)
        hint = f"Did you mean '--{near[0]}'?" if near else "`cab-hf distill --help-all` lists them."
        raise ValueError(f"Unknown option: {text!r}. {hint}")


def parse_count(text: str) -> int:
    """A number of tokens or images such as 20M, 1.5k or 300000.

    Raises:
        ValueError: it is none, or not positive.

    Example:
        >>> parse_count("1.5M")
        1500000
    """
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)([kmb]?)", str(text).strip().lower().replace(",", "").replace("_", ""))
    try:
        count = round(float(found[1]) * {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}[found[2]])
    except (TypeError, ValueError):
        count = 0
    if count < 1:
        raise ValueError(
            f"`--tokens` or `--images` is {text!r}, which is no positive number. Write one such as 300000, 500k or "
            "20M."
        )
    return count


def find_recipe(name: str) -> Path:
    """A recipe's file: a path, or the name of one that the package ships.

    Raises:
        FileNotFoundError: neither; the message lists the shipped ones.
    """
    folder = shipped("training_args")
    for path in (Path(name), folder / f"{name}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    raise FileNotFoundError(f"`--recipe` {name!r} is no file (seen from {Path.cwd()}), and none of {known}.")


def is_repo_id(name: str) -> bool:
    """Whether the Hub could have a repository of that name: by its own rule, without asking it."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def check_source(option: str, source: str, repo_type: str) -> None:
    """That a teacher, student or data set is there, at once: loading it tries a Hub out of reach for half a minute.

    Args:
        option: by which it was named.
        source: a Hub id, a path, or a glob of files.
        repo_type: "model" or "dataset".

    Raises:
        FileNotFoundError: it is nothing here, and the Hub has nothing of that name.
        ConnectionError: the Hub can't be asked, and the cache has nothing of that name.
    """
    if source in SPECIAL_SOURCES or glob.glob(str(Path(source).expanduser()), recursive=True):
        return
    here = f"`{option}` {source!r} is no file and no folder (seen from {Path.cwd()})"
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HTTPError, RepositoryNotFoundError
    from huggingface_hub.file_download import repo_folder_name

    if not is_repo_id(source):
        raise FileNotFoundError(f"{here} and no Hub id, such as HuggingFaceTB/SmolLM2-135M. Name one of them.")
    try:
        _ask_hub(source, repo_type)
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{here}, and the Hub has no {repo_type} of that name. Check the spelling, or see one that is private by "
            "`hf auth login`."
        ) from error
    except (HTTPError, OSError) as error:
        from datasets.config import HF_DATASETS_CACHE  # takes a second

        prepared = Path(HF_DATASETS_CACHE) / source.replace("/", "___")
        kept = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=source, repo_type=repo_type)
        if not kept.is_dir() and not (repo_type == "dataset" and prepared.is_dir()):
            raise ConnectionError(
                f"{here} and not in the cache, and the Hub can't be asked ({type(error).__name__}). Name a folder, or "
                "connect once without HF_HUB_OFFLINE."
            ) from error


@functools.cache
def _ask_hub(source: str, repo_type: str) -> None:
    """That the Hub has a repository: asked once, as a command and what it calls check the same source."""
    from huggingface_hub import HfApi

    HfApi().repo_info(source, repo_type=repo_type, timeout=10)
