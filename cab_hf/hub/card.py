"""The model card of a student: metadata that the Hub can read, and only what is known to be true."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging

from cab_hf.data.image_sources import BUILTIN
from cab_hf.export.stock import stock_class_name
from cab_hf.hub.card import card_sections as sections
from cab_hf.hub.publish import shareable
from cab_hf.models import CABMambaConfig, CABVisionMambaConfig
from cab_hf.recipes import Recipe
from cab_hf.teachers.demo import SMOLLM2_LANGUAGE, SMOLLM2_LICENSE, SMOLLM2_SOURCE


logger = logging.get_logger(__name__)

SPECIAL_SOURCES = {"builtin", "random-llama", "smollm2-demo", "imagefolder", *BUILTIN}
PLOTS = {
    "learning_curves.png": "Losses",
    "recall.png": "Recall over the gap",
    "speed.png": "Speed and memory",
    "attention.png": "Attention maps",
}
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
) -> ModelCard:
    """The card of a saved student. A section without data is left out, and no field is made up.

    Args:
        folder: The saved student: `config.json` and its safetensors. The class that its config names under
            `architectures` decides what the card says of its use.
        metrics: Name of a text -> report of `cab_hf.evaluation.language.compare` on it. A report may hold under `recall`
            reports of `copying_recall`, as {gap: {"teacher": ..., "student": ...}}. Of an image student: name of a
            set -> report of `cab_hf.runs.images.compare_images`, under `baselines` perhaps those of other methods. Of
            a classifier of texts: name of a text -> {"student_accuracy", "n_texts"} and, where they are known,
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
        evaluation: What `cab_hf.runs.report.evaluate` returns; its `generation`, `recall` and `speed` are shown.

    Returns:
        The card; `write_card` saves it.

    Raises:
        FileNotFoundError: `folder` or `stock_subfolder` holds no model.
        ValueError: The licence is unknown, `folder` holds another kind of model, a report lacks a number that the
            card needs, or a stock copy is named of a student that has none.
    """
    folder = Path(folder)
    config = _read_config(folder)
    head = _head(folder, config)
    source = describe_teacher(teacher)
    license = license or source["license"]
    if license is None:
        raise ValueError(
            f"The licence of teacher {str(teacher)!r} is unknown (no card says it). Pass license, for instance "
            'license="apache-2.0".'
        )
    stock = None
    if stock_subfolder is not None:
        stock = (stock_subfolder, _read_config(folder / stock_subfolder).architectures[0])
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
    recall, generation, speed = (evaluation.get(key) for key in ("recall", "generation", "speed"))
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
        name=name,
        head=head,
        labels=config.num_labels,
        parameters=_short(_count_parameters(folder)),
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        mixers=_mixers(config),
        state_size=config.state_size,
        teacher=f"[{base_model}](https://huggingface.co/{base_model})" if base_model else f"`{source['name']}`",
        results=sections.result_table(head, metrics) if metrics else None,
        has_baselines=any(one.get("baselines") for one in metrics.values()),
        recall=sections.recall_table(recall) if recall else None,
        prompts=generation["prompts"] if generation else None,
        generation=sections.generation_table(generation) if generation else None,
        speed=sections.speed_table(speed) if speed else None,
        measured_on=sections.measured_on(evaluation) if speed else None,
        crossings=sections.crossings(speed) if speed else [],
        limits=sections.limits(head, metrics, evaluation),
        uses=sections.ways_to_load(folder, head, repo_id, stock),
        training={key: str(value).replace("|", "\\|") for key, value in training.items() if value not in (None, "")},
        recipe=recipe.strip() if recipe else None,
        plots=list(plots),
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


def write_model_card(
    folder: str | Path, recipe: Recipe, report: Mapping[str, Any], *, overwrite: bool = False
) -> bool:
    """Writes the card of a finished run, unless its licence is unknown or the folder has a card.

    Args:
        folder: Folder of the student.
        recipe: The recipe that made it.
        report: What the run measured, as in its `report.json`; under `evaluation` perhaps what a later
            `cab_hf.runs.report.evaluate` did.
        overwrite: Replace an existing `README.md`.

    Returns:
        Whether the card was written.
    """
    folder = Path(folder)
    license = license_of(recipe)
    if license is None:
        logger.warning(
            f"No card is written: the licence of teacher {recipe.model.teacher!r} is unknown. Set `license` in the "
            "recipe to have one."
        )
        return False
    # A relative folder may look like a Hub id where it does not exist: what a source is, the run has seen.
    on_hub = report.get("hub_ids", hub_ids(recipe))
    teacher: str | Path = recipe.model.teacher
    if teacher not in on_hub and teacher not in SPECIAL_SOURCES:
        teacher = Path(teacher)

    def named(source: str) -> str:
        return source if source in on_hub else _local_name(source)

    head = _head(folder, _read_config(folder))
    is_own = head.task == recipe.model.task
    baselines = {method: result["after"] for method, result in report.get("baselines", {}).items()}
    metrics = {}
    for name, one in report["after"].items():
        if not is_own and f"student_{head.metric[2]}" not in one:
            continue
        # A later evaluation may have counted other images than the run, whose baselines then don't compare.
        count = f"n_{head.unit}"
        others = {
            method: after[name]
            for method, after in baselines.items()
            if name in after and after[name][count] == one[count]
        }
        facts = {key: value for key, value in _run_facts(recipe, name).items() if key != "dataset" or value in on_hub}
        metrics[name] = facts | one | ({"baselines": others} if others else {})
    evaluation = report.get("evaluation", {})
    training = {} if is_own else {"What follows": "the distillation of the student under this classifier"}
    card = build_card(
        folder,
        metrics,
        training | _training_rows(recipe, report, named(recipe.model.teacher), list(map(named, recipe.data.dataset))),
        teacher=teacher,
        license=license,
        datasets=[source for source in recipe.data.dataset if source in on_hub],
        repo_id=recipe.stages[-1][1].hub_model_id,
        recipe=yaml.safe_dump(shareable(recipe.values), sort_keys=False),
        plots=[
            (title, file)
            for file, title in PLOTS.items()
            if (folder / file).is_file() and (is_own or file == "learning_curves.png")
        ],
        evaluation=evaluation if evaluation.get("task") == head.task else None,
    )
    return write_card(folder, card, overwrite=overwrite)


def hub_ids(recipe: Recipe) -> list[str]:
    """What of a recipe comes from the Hub, teacher and data sets, judged from the present folder."""
    evaluated = (source.partition("=")[2] for source in recipe.data.eval_dataset)
    return [source for source in (recipe.model.teacher, *recipe.data.dataset, *evaluated) if _is_hub_id(source)]


def license_of(recipe: Recipe) -> str | None:
    """The licence of a recipe's student: its own, or its teacher's; None where neither is known."""
    return recipe.model.license or describe_teacher(recipe.model.teacher)["license"]


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
        name = path.resolve().name
    elif isinstance(teacher, Path) or not _is_hub_id(teacher):
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


def _read_config(folder: Path) -> PreTrainedConfig:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"folder {folder} has no config.json. Save the student there first (save_pretrained).")
    return AutoConfig.from_pretrained(folder)


def _head(folder: Path, config: PreTrainedConfig) -> sections.Head:
    if not isinstance(config, CABMambaConfig | CABVisionMambaConfig):
        raise ValueError(
            f"folder {folder} holds a {config.model_type!r} model, but the card describes a 'cab_mamba' or "
            "'cab_vision_mamba' student. Name the folder of the student itself, and that of a stock export as "
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
    if len(counts) == 1:
        return f"{_MIXERS[next(iter(counts))]} mixers"
    return " and ".join(f"{count} {_MIXERS[kind]}" for kind, count in sorted(counts.items())) + " mixers"


def _run_facts(recipe: Recipe, name: str) -> dict[str, str]:
    """`dataset_facts` of a text or set that a run evaluated; of others, which a later evaluation adds, nothing."""
    data = recipe.data
    if recipe.model.reads_images:
        split = recipe.images.test_split or ("test" if data.dataset[0] in BUILTIN else None)
        return dataset_facts(data.dataset, split) if name == f"{Path(data.dataset[0]).name} test images" else {}
    if name == f"held-out part of {', '.join(map(public_name, data.dataset))}":
        return dataset_facts(data.dataset, "held-out")
    source = dict(text.split("=", 1) for text in data.eval_dataset).get(name)
    return dataset_facts([source], data.dataset_split if _is_hub_id(source) else None) if source else {}


def _training_rows(recipe: Recipe, report: Mapping[str, Any], teacher: str, sources: Sequence[str]) -> dict[str, str]:
    model, stages = recipe.model, dict(recipe.stages)
    unit = "examples" if model.reads_images else "tokens"
    method = sections.describe_method(list(stages.values()))
    losses = {name: sections.describe_losses(args) for name, args in stages.items()}
    start = {"teacher": "the teacher's weights" if model.copy_weights else "the teacher's shape"}
    rows = {
        "Teacher": f"{teacher}, {_short(report['teacher_parameters'])} parameters",
        "Method": method if model.method == "student" else f"{model.method}: {method}",
        "Start": public_name(model.student) if model.student else start.get(model.student_from, "random weights"),
    }
    if model.reads_images:
        rows |= {
            "Images": f"{', '.join(sources)}: {report['train_images']:,} of {report['available_images']:,}",
            "Images seen": f"{report['images_seen']:,}",
        }
    else:
        own = recipe.data.teacher_tokens + recipe.data.teacher_continuation_tokens
        written = f", and {own:,} tokens that the teacher wrote" if own else ""
        rows |= {
            "Text": f"{', '.join(sources)}{written}, in rows of {recipe.data.block_size:,} tokens",
            "Tokens": f"{report['train_tokens']:,}",
        }
    return rows | {
        "Stages": "; ".join(
            f"{one['name']}: {one['steps']:,} steps, {one[unit]:,} {unit}" for one in report["stages"]
        ),
        "Losses": ". ".join(f"{name}: {text}" if len(losses) > 1 else text for name, text in losses.items()),
        "Hardware": report["hardware"],
        "Versions": ", ".join(f"{package} {number}" for package, number in report["versions"].items()),
    }


def _template() -> str:
    # Installed, the folder model_cards lies in the package; in a checkout it lies beside it.
    package = Path(__file__).parent
    candidates = [package / "model_cards" / "template.md", package.parent / "model_cards" / "template.md"]
    for path in candidates:
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise FileNotFoundError(f"The card's template is missing: {' or '.join(map(str, candidates))}.")


def _short(count: int) -> str:
    for size, letter in _GROUPS:
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)


def is_repo_id(name: str) -> bool:
    """Whether the Hub could have a repository of that name: by its own rule, without asking it."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _is_hub_id(source: str) -> bool:
    return source not in SPECIAL_SOURCES and is_repo_id(source) and not Path(source).exists()


def public_name(source: str) -> str:
    """How a source is called in public: a Hub id as it is, a local path by its last part only."""
    return source if _is_hub_id(source) else _local_name(source)


def _local_name(source: str) -> str:
    known = {"builtin": "the language reference of CPython", "smollm2-demo": SMOLLM2_SOURCE}
    return known.get(source, Path(source).name)


def dataset_facts(sources: Sequence[str], split: str | None) -> dict[str, str]:
    """What a card's metadata say of the data of a result: the `dataset`, if it is one of the Hub, and its `split`.

    Args:
        sources: of the data.
        split: the name of the part that was measured; None where it is unknown.
    """
    facts = {"dataset": sources[0]} if len(sources) == 1 and _is_hub_id(sources[0]) else {}
    return facts | ({"split": split} if split else {})
