"""The model card of a student: metadata that the Hub can read, and only what is known to be true."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging

from cab_hf.export.stock import stock_class_name
from cab_hf.files import shipped
from cab_hf.hub import card_sections as sections
from cab_hf.hub.sources import describe_teacher
from cab_hf.models import CABHybridConfig, CABMambaConfig, CABVisionMambaConfig


logger = logging.get_logger(__name__)

TAGS = ("mamba", "cab", "distillation")
_MIXERS = {"mamba": "Mamba (S6)", "mamba2": "Mamba-2 (SSD)"}
_GROUPS = ((10**9, "B"), (10**6, "M"), (10**3, "K"))


def build_card(
    folder: str | Path,
    metrics: Mapping[str, Mapping[str, Any]],
    training: Mapping[str, Any],
    *,
    teacher: str | Path,
    license: str | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    language: str | Sequence[str] | None = None,
    name: str | None = None,
    repo_id: str | None = None,
    stock_subfolder: str | None = None,
    recipe: str | None = None,
    plots: Sequence[tuple[str, str]] = (),
    evaluation: Mapping[str, Any] | None = None,
    sample: tuple[str, str] | None = None,
    is_chat: bool = False,
) -> ModelCard:
    """The card of a saved student. A section without data is left out, and no field is made up.

    Args:
        folder: The saved student: `config.json` and its safetensors. The class that its config names under
            `architectures` decides what the card says of its use.
        metrics: Name of a text -> report of `cab_hf.evaluation.compare` on it. A report may hold under `recall`
            reports of `copying_recall`, as {gap: {"teacher": ..., "student": ...}}. Of an image student: name of a
            set -> report of `cab_hf.evaluation.compare_images`, under `baselines` perhaps those of other methods. Of a
            classifier of texts: name of a text -> {"student_accuracy", "n_texts"} and, where they are known,
            "student_accuracy_ci95", "teacher_accuracy", "teacher_accuracy_ci95", "kl", "agreement". Each report may
            name its `split` and, if it is on the Hub, its `dataset`.
        training: What to say about the training, one row each; may be empty.
        teacher: Hub id or folder of the teacher, or "smollm2-demo".
        license: Licence of the student; by default the one that the teacher's card names.
        base_model: Hub id that the metadata link to; by default the teacher's id, or the one that the card in its
            folder names.
        datasets: Hub ids of the training texts.
        language: Languages of the model, ISO 639-1; by default those that the teacher's card names.
        name: Name of the model; by default that of the repository or of the folder.
        repo_id: Hub id under which the student will be found, for the lines that load it.
        stock_subfolder: Sub-folder that holds the student as a class of transformers itself, if there is one.
        recipe: The recipe of the training, YAML.
        plots: (title, file in the folder) of the pictures to show.
        evaluation: What `cab_hf.runs.report.evaluate` returns; its `generation`, `recall`, `length`, `tasks` and
            `speed` are shown.
        sample: A prompt, and what the student wrote after it.
        is_chat: Whether it learnt conversations: the sample is a user's turn and the answer, and the lines that load
            the student ask it something through its chat template.

    Returns:
        The card; `write_card` saves it.

    Raises:
        FileNotFoundError: `folder` or `stock_subfolder` holds no model.
        ValueError: The licence is unknown, `folder` holds another kind of model, a report lacks a number that the
            card needs, or a stock copy is named of a student that has none.
    """
    folder = Path(folder)
    config = read_config(folder)
    head = head_of(folder, config)
    source = describe_teacher(teacher)
    license = license or source["license"]
    if license is None:
        raise ValueError(
            f"The licence of teacher {str(teacher)!r} is unknown (no card says it). Pass license, for instance "
            'license="apache-2.0".'
        )
    stock = None
    if stock_subfolder is not None:
        stock = (stock_subfolder, read_config(folder / stock_subfolder).architectures[0])
        if head.task != "text-generation":
            raise ValueError(
                f"stock_subfolder is {stock_subfolder!r}, but no class of transformers holds a student for "
                f"{head.task}. Leave stock_subfolder out."
            )
    elif head.task == "text-generation" and (class_name := stock_class_name(config)):
        stock = (None, class_name)
    base_model = base_model or source["base_model"]
    language = language or source["language"]
    name = name or (repo_id or folder.resolve().name).rsplit("/", 1)[-1]
    evaluation = dict(evaluation or {})
    copying = {gap: report for one in metrics.values() for gap, report in one.get("recall", {}).items()}
    if copying and "recall" not in evaluation:
        evaluation["recall"] = {"copying": copying}
    recall, length, tasks = (evaluation.get(key) for key in ("recall", "length", "tasks"))
    generation, speed = (evaluation.get(key) for key in ("generation", "speed"))
    data = ModelCardData(
        language=list(language) if isinstance(language, Sequence) and not isinstance(language, str) else language,
        license=license,
        library_name="transformers",
        pipeline_tag=head.task,
        base_model=base_model,
        datasets=list(datasets) or None,
        tags=list(TAGS),
        model_name=name,
        eval_results=sections.eval_results(head, metrics) or None,
    )
    return ModelCard.from_template(
        data,
        template_str=_template(),
        name=sections.plain(name),
        head=head,
        labels=config.num_labels,
        parameters=short_count(_count_parameters(folder)),
        layers=config.depth if isinstance(config, CABHybridConfig) else config.num_hidden_layers,
        width=config.hidden_size,
        mixers=_mixers(config),
        state_size=config.state_size,
        teacher=f"[{base_model}](https://huggingface.co/{base_model})"
        if base_model
        else sections.plain(source["name"]),
        results=sections.result_table(head, metrics) if metrics else None,
        copies=sum(one.get("copies", 0) for one in metrics.values()),
        has_baselines=any(one.get("baselines") for one in metrics.values()),
        recall=sections.recall_table(recall) if recall else None,
        retrieval=sections.retrieval_table(length) if length else None,
        losses=sections.loss_table(length) if length else None,
        length_text=f" on {sections.plain(length['text'])}" if length and "text" in length else "",
        held=sections.held(length) if length else None,
        tasks=sections.task_table(tasks) if tasks else None,
        above_chance=sections.above_chance(tasks) if tasks else None,
        prompts=sections.plain(generation["prompts"]) if generation else None,
        generation=sections.generation_table(generation) if generation else None,
        speed=sections.speed_table(speed) if speed else None,
        measured_on=sections.measured_on(evaluation) if speed else None,
        crossings=sections.crossings(speed) if speed else [],
        limits=sections.limits(head, metrics, evaluation),
        uses=sections.ways_to_load(folder, head, repo_id, stock, is_chat),
        training={key: sections.plain(value) for key, value in training.items() if value not in (None, "")},
        recipe=recipe.strip() if recipe else None,
        fence="`" * (1 + max(map(len, re.findall("`{2,}", recipe or "``")), default=2)),
        plots=list(plots),
        sample=[" ".join(text.split()).replace("`", "'") for text in sample] if sample else None,
        is_chat=is_chat,
    )


def write_card(folder: str | Path, card: ModelCard, *, overwrite: bool = False) -> bool:
    """Saves a card as the folder's `README.md`; one that is already there stays, with a warning.

    Args:
        folder: Folder of the student.
        card: The card.
        overwrite: Replace an existing `README.md`.

    Returns:
        Whether the card was written.
    """
    path = Path(folder) / "README.md"
    if path.exists() and not overwrite:
        logger.warning(f"{path} exists and is left as it is. Pass overwrite=True to replace it.")
        return False
    card.save(path)
    return True


def read_config(folder: Path) -> PreTrainedConfig:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"folder {folder} has no config.json. Save the student there first (save_pretrained).")
    return AutoConfig.from_pretrained(folder)


def head_of(folder: Path, config: PreTrainedConfig) -> sections.Head:
    if not isinstance(config, CABMambaConfig | CABHybridConfig | CABVisionMambaConfig):
        raise ValueError(
            f"folder {folder} holds a {config.model_type!r} model, but the card describes a 'cab_mamba', 'cab_hybrid' "
            "or 'cab_vision_mamba' student. Name the folder of the student itself, and that of a stock export as "
            "stock_subfolder."
        )
    name = (config.architectures or ["model of unknown class"])[0]
    if name not in sections.HEADS:
        raise ValueError(
            f"folder {folder} holds a {name}, but a card describes one of {list(sections.HEADS)}. Save the student "
            "with its head there."
        )
    return sections.HEADS[name]


def _count_parameters(folder: Path) -> int:
    """Numbers stored in the folder's safetensors; a tied head is stored once."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(f"folder {folder} has no model*.safetensors. Save the student there first.")
    total = 0
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())
    return total


def _mixers(config: PreTrainedConfig) -> str:
    counts = Counter(config.layer_mixer_types)
    if isinstance(config, CABHybridConfig):
        family = config.teacher["model_type"]
        windows = sorted({window for window in config.windows if window})
        beside = f"beside attention to the last {' or '.join(map(str, windows))} tokens"
        place = beside if windows else "in place of attention"
        return f"of the family {family}, with {_MIXERS['mamba2']} mixers {place} in {len(config.mixers)}"
    if len(counts) == 1:
        return f"{_MIXERS[next(iter(counts))]} mixers"
    return " and ".join(f"{count} {_MIXERS[kind]}" for kind, count in sorted(counts.items())) + " mixers"


def _template() -> str:
    return (shipped("model_cards") / "template.md").read_text(encoding="utf-8")


def short_count(count: int) -> str:
    for size, letter in _GROUPS:
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)
