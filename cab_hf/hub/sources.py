"""What a teacher or data set is called in public, and what is known of it."""

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets.config import HF_DATASETS_CACHE
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers.utils import logging

from cab_hf.data.image_sources import BUILTIN
from cab_hf.teachers.demo import SMOLLM2_LANGUAGE, SMOLLM2_LICENSE, SMOLLM2_SOURCE


logger = logging.get_logger(__name__)


SPECIAL_SOURCES = {"builtin", "random-llama", "smollm2-demo", "imagefolder", *BUILTIN}


def describe_teacher(teacher: str | Path) -> dict[str, Any]:
    """What a teacher's own card says, as {"name", "base_model", "license", "language"}; None where it is unknown.

    Args:
        teacher: Hub id or folder, or "smollm2-demo"; a `Path` is a folder, also where it does not exist.
    """
    if str(teacher) == "smollm2-demo":
        return {
            "name": SMOLLM2_SOURCE,
            "base_model": SMOLLM2_SOURCE,
            "license": SMOLLM2_LICENSE,
            "language": SMOLLM2_LANGUAGE,
        }
    path = Path(teacher)
    data: dict[str, Any] = {}
    if path.is_dir():
        card = path / "README.md"
        if card.is_file():
            data = ModelCard.load(card).data.to_dict()
        base_model = data.get("base_model")
        if isinstance(base_model, list):
            base_model = base_model[0] if len(base_model) == 1 else None
        if base_model is not None and not (isinstance(base_model, str) and is_repo_id(base_model)):
            logger.warning(f"{card} names the base model {base_model!r}, which is no Hub id: it is left out.")
            base_model = None
        name = path.resolve().name
    elif isinstance(teacher, Path) or not is_hub_id(teacher):
        name, base_model = path.name, None
    else:
        name = base_model = str(teacher)
        try:
            data = ModelCard.load(name).data.to_dict()
        except OSError as error:
            logger.warning(f"The card of teacher {name!r} could not be read ({type(error).__name__}).")
    return {
        "name": name,
        "base_model": base_model,
        "license": data.get("license"),
        "language": data.get("language"),
    }


def is_repo_id(name: str) -> bool:
    """Whether the Hub could have a repository of that name: by its own rule, without asking it."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def is_hub_id(source: str) -> bool:
    return source not in SPECIAL_SOURCES and is_repo_id(source) and not Path(source).exists()


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
    if not is_repo_id(source):
        raise FileNotFoundError(f"{here} and no Hub id, such as HuggingFaceTB/SmolLM2-135M. Name one of them.")
    try:
        HfApi().repo_info(source, repo_type=repo_type, timeout=10)
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{here}, and the Hub has no {repo_type} of that name. Check the spelling, or see one that is private by "
            "`hf auth login`."
        ) from error
    except (HTTPError, OSError) as error:
        prepared = Path(HF_DATASETS_CACHE) / source.replace("/", "___")
        kept = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=source, repo_type=repo_type)
        if not kept.is_dir() and not (repo_type == "dataset" and prepared.is_dir()):
            raise ConnectionError(
                f"{here} and not in the cache, and the Hub can't be asked ({type(error).__name__}). Name a folder, or "
                "connect once without HF_HUB_OFFLINE."
            ) from error


def public_name(source: str) -> str:
    """How a source is called in public: a Hub id as it is, a local path by its last part only."""
    return source if is_hub_id(source) else local_name(source)


def local_name(source: str) -> str:
    known = {"builtin": "the language reference of CPython", "smollm2-demo": SMOLLM2_SOURCE}
    return known.get(source, Path(source).name)


def dataset_facts(sources: Sequence[str], split: str | None) -> dict[str, str]:
    """What a card's metadata say of the data of a result: the `dataset`, if it is one of the Hub, and its `split`.

    Args:
        sources: of the data.
        split: the name of the part that was measured; None where it is unknown.
    """
    facts = {"dataset": sources[0]} if len(sources) == 1 and is_hub_id(sources[0]) else {}
    return facts | ({"split": split} if split else {})
