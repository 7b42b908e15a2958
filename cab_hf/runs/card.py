"""The card of a finished run."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers.utils import logging

from cab_hf.checks import SPECIAL_SOURCES
from cab_hf.data.image_sources import BUILTIN
from cab_hf.distillation.training_args import DistillationTrainingArguments
from cab_hf.files import read_json
from cab_hf.hub.card import build_card, head_of, read_config, short_count, write_card
from cab_hf.hub.card_sections import percent
from cab_hf.hub.publish import shareable
from cab_hf.hub.sources import dataset_facts, describe_teacher, is_hub_id, local_name, public_name
from cab_hf.recipes import EVALUATION_NAME, RECIPE_NAME, REPORT_NAME, Recipe, read_recipe


logger = logging.get_logger(__name__)


_LOSSES = {
    "kl": "soft KL to the teacher",
    "ce": "cross-entropy on the labels",
    "bridge": "attention bridge (CAB)",
    "output": "mixer outputs to attention outputs",
    "hidden": "hidden states",
    "attention": "attention maps",
}


_CHOICES = {
    "kl": "where a mixer alone costs most, by the KL to the teacher",
    "copying": "where a mixer alone costs most, by how much is copied",
    "both": "where a mixer alone costs most, by the KL to the teacher and by how much is copied",
    "evenly": "evenly spread",
}


PLOTS = {
    "learning_curves.png": "Losses",
    "keep_attention.png": "Attention kept",
    "recall.png": "Recall over the gap",
    "length.png": "What is left over length",
    "speed.png": "Speed and memory",
    "attention.png": "Attention maps",
}


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
        return source if source in on_hub else local_name(source)

    head = head_of(folder, read_config(folder))
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
        facts["copies"] = report.get("copies", {}).get(name, 0)
        one = facts | one | ({"baselines": others} if others else {})
        if one["copies"]:
            name = name.replace("held-out part", "part")
            one["split"] = None
        metrics[name] = one
    for item in metrics.items():
        check_finite(*item)
    evaluation = report.get("evaluation", {})
    training = {} if is_own else {"What follows": "the distillation of the student under this classifier"}
    card = build_card(
        folder,
        metrics,
        training | _training_rows(recipe, report, named(recipe.model.teacher), list(map(named, recipe.data.dataset))),
        teacher=teacher,
        license=license,
        datasets=[source for source in recipe.data.dataset if source in on_hub],
        repo_id=report.get("repo_id") or recipe.stages[-1].args.hub_model_id,
        sample=(report["sample_prompt"], report["sample"]) if is_own and report.get("sample") else None,
        is_chat=is_own and report.get("is_chat", False),
        recipe=yaml.safe_dump(shareable(recipe.values), sort_keys=False),
        plots=[
            (title, file)
            for file, title in PLOTS.items()
            if (folder / file).is_file() and (is_own or file == "learning_curves.png")
        ],
        evaluation=evaluation if evaluation.get("task") == head.task else None,
    )
    return write_card(folder, card, overwrite=overwrite)


def check_finite(name: str, report: Mapping[str, Any]) -> None:
    """That a student's numbers on a text or set are some.

    Raises:
        FloatingPointError: KL or perplexity are not finite.
    """
    for key in ("kl", "student_perplexity"):
        if not math.isfinite(report.get(key, 0.0)):
            raise FloatingPointError(
                f"{key} on {name} is {report[key]}: student or teacher hold NaN, infinite or far too large weights, "
                "or numbers too large for the dtype. Try float32 (--dtype); if they stay so, the training diverged: "
                "train again with a lower `learning_rate`, in another `output_dir`."
            )


def hub_ids(recipe: Recipe) -> list[str]:
    """What of a recipe comes from the Hub, teacher and data sets, judged from the present folder."""
    evaluated = (source.partition("=")[2] for source in recipe.data.eval_dataset)
    return [source for source in (recipe.model.teacher, *recipe.data.dataset, *evaluated) if is_hub_id(source)]


def license_of(recipe: Recipe) -> str | None:
    """The licence of a recipe's student: its own, or its teacher's; None where neither is known."""
    return recipe.model.license or describe_teacher(recipe.model.teacher)["license"]


def _run_facts(recipe: Recipe, name: str) -> dict[str, str]:
    """`dataset_facts` of a text or set that a run evaluated; of others, which a later evaluation adds, nothing."""
    data = recipe.data
    if recipe.model.reads_images:
        split = recipe.images.test_split or ("test" if data.dataset[0] in BUILTIN else None)
        return dataset_facts(data.dataset, split) if name == f"{Path(data.dataset[0]).name} test images" else {}
    if name == f"held-out part of {', '.join(map(public_name, data.dataset))}":
        return dataset_facts(data.dataset, "held-out")
    source = dict(text.split("=", 1) for text in data.eval_dataset).get(name)
    return dataset_facts([source], data.dataset_split if is_hub_id(source) else None) if source else {}


def _training_rows(recipe: Recipe, report: Mapping[str, Any], teacher: str, sources: Sequence[str]) -> dict[str, str]:
    model, stages = recipe.model, {stage.name: stage.args for stage in recipe.stages}
    unit = "examples" if model.reads_images else "tokens"
    method = describe_method(list(stages.values()))
    losses = {name: describe_losses(args) for name, args in stages.items()}
    start = {"teacher": "the teacher's weights" if model.copy_weights else "the teacher's shape"}
    rows = {
        "Teacher": f"{teacher}, {short_count(report['teacher_parameters'])} parameters",
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
            "Text": f"{', '.join(sources)}{written}, in rows of {_lengths(recipe)} tokens",
            "Tokens": f"{report['train_tokens']:,}",
        }
    choice = report.get("kept_attention")
    if choice is not None:
        rows["Attention kept"] = (
            f"layers {', '.join(map(str, choice['layers']))} of {len(choice['paths'])}, counted from 0; "
            f"{_CHOICES[choice['by']]} (keep_attention.json)"
        )
    return rows | {
        "Stages": "; ".join(
            f"{one['name']}: {one['steps']:,} steps, {one[unit]:,} {unit}" for one in report["stages"]
        ),
        "Losses": ". ".join(f"{name}: {text}" if len(losses) > 1 else text for name, text in losses.items()),
        "Hardware": report["hardware"],
        "Versions": ", ".join(f"{package} {number}" for package, number in report["versions"].items()),
    }


def _lengths(recipe: Recipe) -> str:
    own = [stage.block_size or recipe.data.block_size for stage in recipe.stages]
    return ", then ".join(f"{length:,}" for place, length in enumerate(own) if length not in own[:place])


def write_card_of(folder: str | Path, *, license: str | None = None, overwrite: bool = False) -> Path:
    """Writes the card of a finished run again, from its `recipe.yaml`, `report.json` and, if there, `evaluation.json`.

    A classifier that was put on the run's student and saved over it is described as what it is: what the run measured
    of the language model is left out. Its accuracies are shown where `evaluation.json` has them under `texts`.

    Args:
        folder: `output_dir` of the recipe.
        license: licence of the student; by default the recipe's, or else the teacher's.
        overwrite: replace an existing `README.md`.

    Returns:
        The card's path.

    Raises:
        FileNotFoundError: the folder holds no finished run.
        ValueError: a card is there already, the licence is unknown, or a file is damaged.
    """
    folder = Path(folder)
    path = folder / "README.md"
    for name in (RECIPE_NAME, REPORT_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}, so nothing is known of its training. Name the output_dir of a finished "
                "recipe, or make the card by cab_hf.hub.card.build_card."
            )
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists and is left as it is. Pass overwrite (--overwrite) to replace it.")
    recipe, report = read_recipe(folder), read_json(folder / REPORT_NAME)
    if recipe.model.finetune:
        raise ValueError(f"{folder} holds a teacher that was finetuned; a card describes a student.")
    if license is not None:
        recipe.model.license = license
    if license_of(recipe) is None:
        raise ValueError(
            f"The licence of teacher {recipe.model.teacher!r} is unknown (no card says it). Give license (--license), "
            "such as apache-2.0."
        )
    try:
        if (folder / EVALUATION_NAME).is_file():
            evaluation = read_json(folder / EVALUATION_NAME)
            # The later numbers are the newer ones.
            newer = evaluation.get("images" if recipe.model.reads_images else "texts", {})
            report |= {"after": report["after"] | newer, "evaluation": evaluation}
        write_model_card(folder, recipe, report, overwrite=overwrite)
    except KeyError as error:
        raise ValueError(f"The files {REPORT_NAME} and {EVALUATION_NAME} of {folder} lack {error}.") from error
    return path


def describe_losses(args: DistillationTrainingArguments) -> str:
    """The losses of a stage, each with its weight and course."""
    parts = []
    for name in args.used_losses:
        weight, end, decay = args.courses[name]
        course = "" if decay == "none" else f", {decay} decay to its end"
        course += "" if end == 1 else f", off after {percent(end)} of the steps"
        course += f", temperature {args.temperature:g}" if name == "kl" and args.temperature != 1 else ""
        parts.append(f"{_LOSSES[name]} × {weight:g}{course}")
    return "; ".join(parts)


def describe_method(stages: Sequence[DistillationTrainingArguments]) -> str:
    """The name of a method, from the losses of its stages."""
    used = {name for args in stages for name in args.used_losses}
    alignments = [_LOSSES[name] for name in ("bridge", "attention", "output", "hidden") if name in used]
    signals = ["soft knowledge distillation"] if "kl" in used else []
    signals += ["training on labels"] if "ce" in used else []
    return " and ".join([", ".join(alignments)] * bool(alignments) + signals)
