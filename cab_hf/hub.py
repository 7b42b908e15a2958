"""The model card of a student: metadata that the Hub can read, and only what is known to be true."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging

from cab_hf.demo import SMOLLM2_LANGUAGE, SMOLLM2_LICENSE, SMOLLM2_SOURCE
from cab_hf.images import BUILTIN
from cab_hf.models import CABMambaConfig, CABVisionMambaConfig
from cab_hf.publish import shareable
from cab_hf.recipes import Recipe


logger = logging.get_logger(__name__)

SPECIAL_SOURCES = {"builtin", "random-llama", "smollm2-demo", "imagefolder", *BUILTIN}
PLOTS = {
    "learning_curves.png": "Losses",
    "recall.png": "Recall over the gap",
    "speed.png": "Speed and memory over length",
    "attention.png": "Attention maps",
}
TAGS = ("mamba", "cab", "distillation")
_MIXERS = {"mamba": "Mamba (S6)", "mamba2": "Mamba-2 (SSD)"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
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
) -> ModelCard:
    """The card of a saved student. A section without data is left out, and no field is made up.

    Args:
        folder: The saved student: `config.json` and its safetensors.
        metrics: Name of a text -> report of `cab_hf.evaluation.compare` on it. A report may hold under `recall`
            reports of `copying_recall`, as {gap: {"teacher": ..., "student": ...}}. Of an image student: name of a
            set -> report of `cab_hf.run_images.compare_images`, under `baselines` perhaps those of other methods.
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

    Returns:
        The card; `write_card` saves it.

    Raises:
        FileNotFoundError: `folder` or `stock_subfolder` holds no model.
        ValueError: The licence is unknown, `folder` holds another kind of model, or a report lacks a number that the
            card needs.
    """
    folder = Path(folder)
    config = _read_config(folder)
    if not isinstance(config, CABMambaConfig | CABVisionMambaConfig):
        raise ValueError(
            f"folder {folder} holds a {config.model_type!r} model, but the card describes a 'cab_mamba' or "
            "'cab_vision_mamba' student. Name the folder of the student itself, and that of a stock export as "
            "stock_subfolder."
        )
    sees = isinstance(config, CABVisionMambaConfig)
    source = describe_teacher(teacher)
    license = license or source["license"]
    if license is None:
        raise ValueError(
            f"The licence of teacher {str(teacher)!r} is unknown (no card says it). Pass license, for instance "
            'license="apache-2.0".'
        )
    base_model = base_model or source["base_model"]
    language = language or source["language"]
    name = name or (repo_id or folder.resolve().name).rsplit("/", 1)[-1]
    data = ModelCardData(
        language=list(language) if isinstance(language, Sequence) and not isinstance(language, str) else language,
        license=license,
        library_name="transformers",
        pipeline_tag="image-classification" if sees else "text-generation",
        base_model=base_model,
        datasets=list(datasets) or None,
        tags=list(TAGS),
        model_name=name,
        eval_results=[(_image_eval_result if sees else _eval_result)(*item) for item in metrics.items()] or None,
    )
    teacher_link = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else f"`{source['name']}`"
    return ModelCard.from_template(
        data,
        template_str=_template(),
        name=name,
        parameters=_short(_count_parameters(folder)),
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        mixers=_mixers(config),
        state_size=config.state_size,
        sees=sees,
        teacher=teacher_link,
        results=[row for item in metrics.items() for row in (_image_result_rows if sees else _result_rows)(*item)],
        recall=[_recall_row(gap, report) for one in metrics.values() for gap, report in one.get("recall", {}).items()],
        uses=_uses(folder, repo_id, stock_subfolder),
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
        report: What the run measured, as in its `report.json`.
        overwrite: Replace an existing `README.md`.

    Returns:
        Whether the card was written.
    """
    folder = Path(folder)
    license = recipe.model.license or describe_teacher(recipe.model.teacher)["license"]
    if license is None:
        logger.warning(
            f"No card is written: the licence of teacher {recipe.model.teacher!r} is unknown. Set `license` in the "
            "recipe to have one."
        )
        return False
    sees = recipe.model.reads_images
    sources = {public_name(source): _is_hub_id(source) for source in recipe.data.dataset}
    unit = "examples" if sees else "tokens"
    stages = [f"{stage['name']}: {stage['steps']:,} steps, {stage[unit]:,} {unit}" for stage in report["stages"]]
    training = {"Teacher": f"{public_name(recipe.model.teacher)}, {_short(report['teacher_parameters'])} parameters"}
    metrics = report["after"]
    if sees:
        training |= {
            "Images": f"{', '.join(sources)}: {report['train_images']:,} of {report['available_images']:,}",
            "Images seen": f"{report['images_seen']:,}",
        }
        others = {method: result["after"] for method, result in report["baselines"].items()}
        metrics = {
            name: one | {"baselines": {method: after[name] for method, after in others.items()}}
            for name, one in metrics.items()
        }
    else:
        training |= {"Text": ", ".join(sources), "Tokens": f"{report['train_tokens']:,}"}
    training |= {
        "Stages": "; ".join(stages),
        "Hardware": report["hardware"],
        "Versions": ", ".join(f"{package} {number}" for package, number in report["versions"].items()),
    }
    card = build_card(
        folder,
        metrics,
        training,
        teacher=recipe.model.teacher,
        license=license,
        datasets=[name for name, is_hub_id in sources.items() if is_hub_id],
        repo_id=recipe.stages[-1][1].hub_model_id,
        recipe=yaml.safe_dump(shareable(recipe.values), sort_keys=False),
        plots=[(title, file) for file, title in PLOTS.items() if (folder / file).is_file()],
    )
    return write_card(folder, card, overwrite=overwrite)


def describe_teacher(teacher: str | Path) -> dict[str, Any]:
    """What a teacher's own card says, as {"name", "base_model", "license", "language"}; None where it is unknown.

    Args:
        teacher: Hub id or folder, or "smollm2-demo".
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
    elif not _is_hub_id(str(teacher)):
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


def _eval_result(text: str, report: Mapping[str, Any]) -> EvalResult:
    _require(text, report, "student_perplexity", "student_perplexity_ci95", "n_tokens")
    tokens = int(report["n_tokens"])
    return EvalResult(
        task_type="text-generation",
        task_name="Text generation",
        dataset_type=_slug(text),
        dataset_name=text,
        metric_type="perplexity",
        metric_name=f"Perplexity per token (n = {tokens:,} tokens)",
        metric_value=round(float(report["student_perplexity"]), 4),
        metric_args={"n_tokens": tokens, "ci95": [_rounded(bound) for bound in report["student_perplexity_ci95"]]},
    )


def _result_rows(text: str, report: Mapping[str, Any]) -> list[list[str]]:
    _require(text, report, "teacher_perplexity", "teacher_perplexity_ci95", "kl", "kl_ci95", "agreement")
    tokens = f"{int(report['n_tokens']):,}"
    return [
        [text, "teacher", _interval(report, "teacher_perplexity", 2), "0", "1", tokens],
        [
            text,
            "student",
            _interval(report, "student_perplexity", 2),
            _interval(report, "kl", 3),
            _interval(report, "agreement", 3),
            tokens,
        ],
    ]


def _image_eval_result(images: str, report: Mapping[str, Any]) -> EvalResult:
    _require(images, report, "student_top1", "student_top1_ci95", "n_images")
    count = int(report["n_images"])
    return EvalResult(
        task_type="image-classification",
        task_name="Image classification",
        dataset_type=_slug(images),
        dataset_name=images,
        metric_type="accuracy",
        metric_name=f"Top-1 accuracy (n = {count:,} images)",
        metric_value=round(float(report["student_top1"]), 4),
        metric_args={"n_images": count, "ci95": [_rounded(bound) for bound in report["student_top1_ci95"]]},
    )


def _image_result_rows(images: str, report: Mapping[str, Any]) -> list[list[str]]:
    _require(images, report, "student_top1", "n_images")
    count = f"{int(report['n_images']):,}"
    rows = []
    if "teacher_top1" in report:
        rows.append([images, "teacher", _interval(report, "teacher_top1", 3), "0", "1", count])
    for name, one in [*report.get("baselines", {}).items(), ("student", report)]:
        compared = [f"{one[key]:.3f}" if key in one else "" for key in ("kl", "agreement")]
        rows.append([images, name, _interval(one, "student_top1", 3), *compared, count])
    return rows


def _recall_row(gap: str | int, report: Mapping[str, Mapping[str, Any]]) -> list[str]:
    values = [
        f"{report[who]['recall']:.3f} ({report[who]['ci95'][0]:.3f} to {report[who]['ci95'][1]:.3f})"
        for who in ("teacher", "student")
    ]
    return [str(gap), *values, f"{report['student']['n_tokens']:,}"]


def _require(text: str, report: Mapping[str, Any], *names: str) -> None:
    missing = [name for name in names if name not in report]
    if missing:
        raise ValueError(
            f"The report on {text!r} lacks {missing} (it has {sorted(report)}). Give what cab_hf.evaluation.compare "
            "returns."
        )


def _interval(report: Mapping[str, Any], name: str, digits: int) -> str:
    value = f"{report[name]:.{digits}f}"
    bounds = report.get(f"{name}_ci95")
    if bounds is None or not all(map(math.isfinite, bounds)):
        return value
    return f"{value} ({bounds[0]:.{digits}f} to {bounds[1]:.{digits}f})"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _rounded(bound: float) -> float | str:
    # YAML has no finite way to write the open interval of a single block.
    return round(float(bound), 4) if math.isfinite(bound) else str(bound)


def _uses(folder: Path, repo_id: str | None, stock_subfolder: str | None) -> list[tuple[str, str]]:
    """The ways to load the student that work, each with its code."""
    place = json.dumps(repo_id or ".")
    auto = "AutoModelForCausalLM"
    helper, helper_name, helper_file = "AutoTokenizer", "tokenizer", "tokenizer_config.json"
    if isinstance(_read_config(folder), CABVisionMambaConfig):
        auto = "AutoModelForImageClassification"
        helper, helper_name, helper_file = "AutoImageProcessor", "processor", "preprocessor_config.json"
    has_helper = (folder / helper_file).is_file()
    head = f"from transformers import {', '.join(sorted([helper, auto] if has_helper else [auto]))}"
    load_helper = [f"{helper_name} = {helper}.from_pretrained({place})"] if has_helper else []

    def code(arguments: str, *first: str) -> str:
        return "\n".join([*first, head, "", *load_helper, f"model = {auto}.from_pretrained({place}{arguments})"])

    here = "" if repo_id else ", from inside this folder"
    uses = [(f"With the package `cab_hf` installed{here}:", code("", "import cab_hf"))]
    if auto in json.loads((folder / "config.json").read_text()).get("auto_map", {}):
        uses.append(
            (f"Without it, by the modelling files beside the weights{here}:", code(", trust_remote_code=True"))
        )
    if stock_subfolder is not None:
        stock = _read_config(folder / stock_subfolder)
        uses.append(
            (
                f"As the `{stock.architectures[0]}` of transformers itself{here}:",
                code(f", subfolder={json.dumps(stock_subfolder)}"),
            )
        )
    return uses


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


def _is_hub_id(source: str) -> bool:
    is_special = source in SPECIAL_SOURCES
    return not is_special and _HUB_ID.fullmatch(source) is not None and not Path(source).exists()


def public_name(source: str) -> str:
    """How a source is called in public: a Hub id as it is, a local path by its last part only."""
    if source == "builtin":
        return "the language reference of CPython"
    if source == "smollm2-demo":
        return SMOLLM2_SOURCE
    return source if _is_hub_id(source) else Path(source).name
