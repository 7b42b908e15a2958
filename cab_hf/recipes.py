"""Recipes: a YAML file, overridden by the command line, becomes the arguments of a run."""

import difflib
import functools
from argparse import SUPPRESS
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import torch
import yaml
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HTTPError, StrictDataclassError
from safetensors import SafetensorError
from transformers import HfArgumentParser
from transformers.utils import logging

from cab_hf.checks import LISTS, end, interrupts_in_one_line
from cab_hf.data.augmentation import AugmentationArguments
from cab_hf.distillation.training_args import DistillationTrainingArguments
from cab_hf.recipe_options import (
    ARGUMENT_CLASSES,
    STAGE_FIELDS,
    DataArguments,
    ImageArguments,
    ModelArguments,
    default_of,
    known_options,
)


# They say how a run computes on its hardware, and can be refused on other hardware, where only the card is made.
_HARDWARE_OPTIONS = {"bf16", "bf16_full_eval", "deepspeed", "fp16", "fp16_full_eval", "fsdp", "tf32", "torch_compile"}

logger = logging.get_logger(__name__)

RECIPE_NAME, REPORT_NAME, EVALUATION_NAME = "recipe.yaml", "report.json", "evaluation.json"

USER_ERRORS = (
    ValueError,
    OSError,
    ImportError,
    EOFError,
    ArithmeticError,
    HTTPError,
    StrictDataclassError,
    SafetensorError,
    yaml.YAMLError,
    BadZipFile,
)
STUDENTS_ALONE = ("trainable", "ema_decay", "cuda_graph", "student")


class Stage(NamedTuple):
    """A part of a run that is trained in one go: its name, its training arguments, and the tokens of its rows where
    they are not those of the recipe's `block_size`."""

    name: str
    args: DistillationTrainingArguments
    block_size: int | None = None


@dataclass
class Recipe:
    """A parsed recipe.

    Attributes:
        model, data, images, augmentation: arguments of the run.
        stages: in the order in which they run; one, named "train", where the recipe lists none.
        baselines: methods that train a student of their own, from the same start, to be compared with this run's
            (images).
        values: the recipe as it was asked for, without defaults.
    """

    model: ModelArguments
    data: DataArguments
    images: ImageArguments
    augmentation: AugmentationArguments
    stages: list[Stage]
    baselines: list[Stage]
    values: dict[str, Any]

    @property
    def output_dir(self) -> Path:
        return Path(self.values["output_dir"])

    @property
    def only_stage(self) -> Stage:
        """The stage of a recipe with `finetune`.

        Raises:
            ValueError: the recipe lists more than one, or sets what only a student's training has.
        """
        if len(self.stages) > 1:
            raise ValueError(
                f"`finetune` is one stage, but the recipe has {len(self.stages)}: write a recipe for each."
            )
        length = self.stages[0].block_size
        if length is not None:
            raise ValueError(f"`finetune` has one stage, which sets `block_size` to {length}. Set it for the run.")
        given = vars(self.model) | vars(self.args)
        for name in STUDENTS_ALONE:
            if given[name] != default_of(name):
                raise ValueError(
                    f"`{name}` is {given[name]!r}, but `finetune` trains the teacher itself, and all of it, by "
                    f"the Trainer's own step. Leave `{name}` out."
                )
        return self.stages[0]

    @property
    def args(self) -> DistillationTrainingArguments:
        """Of the first stage: what holds for the whole run (seed, device, precision) is the same in all."""
        return self.stages[0].args

    @property
    def is_main_process(self) -> bool:
        return self.args.process_index == 0


def parse_recipe(arguments: Sequence[str]) -> Recipe:
    """Reads `RECIPE.yaml [--option value ...]`; an option on the command line wins over the recipe and its stages.

    Args:
        arguments: of the command line, without the program's name.

    Raises:
        FileNotFoundError: the recipe does not exist.
        ValueError: an unknown key or option (the message names the nearest known one), a value of the wrong type, or a
            stage that sets what belongs to the whole run.
    """
    if not arguments:
        raise ValueError("Name a recipe: train_cab.py RECIPE.yaml [--option value ...]; training_args/ holds some.")
    has_file = not arguments[0].startswith("-")
    path, given = (Path(arguments[0]), list(arguments[1:])) if has_file else (None, list(arguments))
    values, options = load_recipe(path) if path is not None else {}, parse_options(given)
    if values.get("stages"):
        values["stages"] = [_overridden(stage, options) for stage in values["stages"]]
    values |= options
    values.setdefault("output_dir", str(Path("outputs") / (path.stem if path is not None else "student")))
    return build_recipe(values)


def _overridden(stage: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """What a stage sets beside the options of the command line, which hold in all stages."""
    for name in stage.keys() & options.keys():
        was, now = ("...", "...") if name == "hub_token" else (stage[name], options[name])
        logger.warning(f"--{name} {now} holds in stage {stage.get('name')!r}, too, in place of {was!r}.")
    return {name: value for name, value in stage.items() if name not in options}


def load_recipe(path: str | Path) -> dict[str, Any]:
    """The mapping in a recipe file, its keys checked; what it leaves out, the recipe that it names as `base` says."""
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        raise FileNotFoundError(
            f"There is no recipe {path}." + (f" Did you mean {path.parent / near[0]}?" if near else "")
        )
    values = _read_mapping(path)
    _check_keys(values, known_options() | LISTS | {"base"}, f"key in {path}")
    base = values.pop("base", None)
    return values if base is None else load_recipe(path.parent / base) | values


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; a recipe is a mapping of options to values.")
    return values


def build_recipe(values: dict[str, Any]) -> Recipe:
    """Makes the arguments of a run, and of each of its stages, out of plain values.

    Raises:
        ValueError: an unknown key, or a value that no run can have.
    """
    _check_keys(values, known_options() | LISTS, "key")
    values = {name: value if name in LISTS else _typed(name, value) for name, value in values.items()}
    whole = {name: value for name, value in values.items() if name not in LISTS}
    whole.setdefault("output_dir", str(Path("outputs") / "student"))
    model, data, images, augmentation = (
        kind(**{field.name: whole[field.name] for field in fields(kind) if field.name in whole})
        for kind in ARGUMENT_CLASSES[:-1]
    )
    if model.reads_images and data.loss_on != default_of("loss_on"):
        raise ValueError(f"`loss_on` is {data.loss_on!r}, but images are no conversations. Leave it out.")
    stages = _training_runs(whole, values.get("stages") or [{"name": "train"}], "stage")
    _check_windows(model, stages)
    baselines = _training_runs(whole, values.get("baselines") or [], "baseline")
    return Recipe(model, data, images, augmentation, stages, baselines, values | {"output_dir": whole["output_dir"]})


def _check_windows(model: ModelArguments, stages: list[Stage]) -> None:
    """That a window of attention has a mixer to stand beside, and no stage matches what that mixer lacks.

    Raises:
        ValueError: it has none, or a stage does.
    """
    if not model.attention_window:
        if model.attention_sinks != default_of("attention_sinks"):
            raise ValueError(
                f"`attention_sinks` is {model.attention_sinks}, but `attention_window` is 0: there is no window that "
                "sees them. Set `attention_window`, or leave it out."
            )
        return
    if model.reads_images or model.student_from == "config":
        students = "of images" if model.reads_images else "made of a config"
        raise ValueError(
            f"`attention_window` is {model.attention_window}, but students {students} have no attention. Leave it out."
        )
    for stage in stages:
        for loss in {"output", "attention"} & set(stage.args.used_losses):
            raise ValueError(
                f"`{loss}_weight` is {getattr(stage.args, f'{loss}_weight')} in stage {stage.name!r}, but with "
                f"`attention_window` no mixer has the teacher's output. Set it to 0.0, or take the recipe `lm_hybrid`."
            )


def _training_runs(whole: dict[str, Any], runs: list[dict[str, Any]], kind: str) -> list[Stage]:
    result = []
    for number, run in enumerate(runs, start=1):
        run = dict(run)
        name = str(run.pop("name", f"{kind}{number}"))
        if not name.isprintable() or {"/", "\\"} & set(name):
            raise ValueError(f"A {kind} is named {name!r}, and its folder, too: leave out slashes and line breaks.")
        length = _typed("block_size", run.pop("block_size", None)) if kind == "stage" else None
        if length is not None and whole.get("task") == "image-classification":
            raise ValueError(f"Stage {name!r} sets `block_size` to {length}, but images have no rows. Leave it out.")
        only = "training options and `block_size`" if kind == "stage" else "training options"
        _check_keys(run, STAGE_FIELDS, f"key in {kind} {name!r} (a {kind} sets {only} only)")
        training = {name: value for name, value in whole.items() if name in STAGE_FIELDS}
        training |= {name: _typed(name, value) for name, value in run.items()}
        training |= _precision_here(training)
        folder = Path(whole["output_dir"]) / f"{kind}s" / f"{number}-{name.replace(' ', '-')}"
        result.append(Stage(name, DistillationTrainingArguments(output_dir=str(folder), **training), length))
    return result


def _precision_here(training: dict[str, Any]) -> dict[str, Any]:
    """float32 in place of bfloat16 where a run is on a CPU that has no arithmetic for it."""
    if not training.get("use_cpu") or cpu_has_bfloat16():
        return {}
    if training.get("bf16"):
        logger.warning_once(
            "`bf16` is True, but this CPU has no bfloat16 arithmetic: products would take tens of times as long as in "
            "float32, in which this run is therefore trained."
        )
    dtype = training.get("teacher_dtype")
    return {"bf16": False, "teacher_dtype": "float32" if dtype in (None, "bfloat16") else dtype}


@functools.cache
def cpu_has_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 matrices on this CPU; elsewhere a loop does, tens of times slower."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def mapping(text: str) -> dict[str, Any]:
    """A mapping as JSON or YAML writes it in one line."""
    value = yaml.safe_load(text or "{}")
    if not isinstance(value, dict):
        raise ValueError(f"{text!r} is no mapping; write one such as '{{state_size: 32}}'.")
    return value


class _Parser(HfArgumentParser):
    def error(self, message: str) -> None:
        raise ValueError(message)


@functools.cache
def _parser() -> HfArgumentParser:
    parser = _Parser(
        ARGUMENT_CLASSES,
        prog="train_cab.py RECIPE.yaml",
        description="Distil a Transformer into a Mamba. Any option of a recipe can be given here too, and wins.",
        allow_abbrev=False,
    )
    for action in parser._actions:
        action.option_strings = action.option_strings[:1]  # what is shown; --block-size is --block_size, too
        if action.dest != "help":
            action.default, action.required = SUPPRESS, False
        if action.type is dict:
            action.type = mapping
    return parser


def print_recipe_options() -> None:
    """All options of a recipe, with what they do."""
    _parser().print_help()


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """Options of a recipe, as the command line gives them.

    Raises:
        ValueError: an unknown option (the message names the nearest known one), or a value of the wrong type.
    """
    namespace, unknown = _parser().parse_known_args(list(options))
    if unknown:
        names = [name.lstrip("-").partition("=")[0] for name in unknown if name.startswith("-")] or unknown
        for name in LISTS.intersection(names):
            raise ValueError(f"`{name}` is a list of runs: write it in a recipe's file.")
        _check_keys(dict.fromkeys(names), known_options(), "option")
    return vars(namespace)


def _check_keys(values: dict[str, Any], known: set[str], what: str) -> None:
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else f" Known are {', '.join(sorted(known)[:8])}, ..."
            raise ValueError(f"Unknown {what}: {name!r}.{hint}")


def _typed(name: str, value: Any) -> Any:
    """A value of a recipe as the command line would read it: YAML takes `2e-5` for a string."""
    action = next(action for action in _parser()._actions if action.dest == name)
    if action.nargs in ("*", "+") and not isinstance(value, list):
        value = [value]
    if action.choices is not None and value not in (None, *action.choices):
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, action.choices))}, got {value!r}.")
    if not isinstance(value, str) or action.type in (None, str):
        return value
    try:
        return action.type(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`{name}` is {value!r}, which is no {getattr(action.type, '__name__', 'valid value')}."
        ) from error


def without(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """A recipe's values without some options, in its stages and baselines, too."""
    kept = {name: value for name, value in values.items() if name not in names}
    return kept | {name: [without(run, names) for run in kept[name]] for name in LISTS if kept.get(name)}


@contextmanager
def errors_in_one_line(out_of_memory: str, *others: type[Exception]) -> Iterator[None]:
    """Ends the process with an error's message on one line, without a traceback, and exit code 1; 130 after ctrl-C.

    Args:
        out_of_memory: the way out where memory does not suffice.
        others: kinds of errors beside those that inputs, files, disks, networks and their libraries raise.
    """
    with interrupts_in_one_line():
        try:
            yield
        except (MemoryError, torch.OutOfMemoryError) as error:
            end(f"Out of memory ({error}). {out_of_memory}")
        except DatasetsError as error:
            end(f"{error} {error.__cause__ or ''}")
        except (*USER_ERRORS, *others) as error:
            end(error)


def read_recipe(folder: Path) -> Recipe | None:
    """The recipe that made a student, readable also where its hardware is missing; None where there is none.

    Args:
        folder: the `output_dir` of the run.

    Raises:
        ValueError: the file is damaged, or no recipe.
    """
    path = folder / RECIPE_NAME
    if not path.is_file():
        return None
    values = _read_mapping(path)

    return replace(build_recipe(without(values, _HARDWARE_OPTIONS) | {"use_cpu": True}), values=values)
