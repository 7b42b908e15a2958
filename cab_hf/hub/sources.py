"""What a teacher or data set is called in public, and what is known of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers.utils import logging

from cab_hf.checks import SPECIAL_SOURCES, is_repo_id
from cab_hf.teachers.demo import SMOLLM2_LANGUAGE, SMOLLM2_LICENSE, SMOLLM2_SOURCE


logger = logging.get_logger(__name__)


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


def is_hub_id(source: str) -> bool:
    return source not in SPECIAL_SOURCES and is_repo_id(source) and not Path(source).exists()


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
