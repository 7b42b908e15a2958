"""Recipes: a YAML file, overridden by the command line, becomes the arguments of a run."""

import difflib
import functools
from argparse import SUPPRESS
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple
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
from cab_hf.data.packing import LossOn
from cab_hf.distillation.training_args import DistillationTrainingArguments


# They say how a run computes on its hardware, and can be refused on other hardware, where only the card is made.
_HARDWARE_OPTIONS = {"bf16", "bf16_full_eval", "deepspeed", "fp16", "fp16_full_eval", "fsdp", "tf32", "torch_compile"}


logger = logging.get_logger(__name__)

RECIPE_NAME, REPORT_NAME, EVALUATION_NAME = "recipe.yaml", "report.json", "evaluation.json"


@dataclass
class ModelArguments:
    """Teacher and student of a run."""

    task: Literal["text-generation", "image-classification"] = field(
        default="text-generation", metadata={"help": "What the models do: text-generation or image-classification."}
    )
    teacher: str = field(
        default="smollm2-demo",
        metadata={
            "help": "Hub id or folder of the teacher. 'smollm2-demo': SmolLM2-135M-Instruct, dequantised from 4 bit, "
            "out of a PyPI package. 'random-llama': a tiny random one, for tests."
        },
    )
    teacher_recipe: str | None = field(
        default=None, metadata={"help": "Recipe that makes the teacher where its folder is missing."}
    )
    finetune: bool = field(
        default=False, metadata={"help": "Train the teacher itself, on labels, and save it; no student."}
    )
    teacher_config: dict = field(
        default_factory=dict,
        metadata={
            "help": "With `finetune` of an image classifier: fields of a new model's config, `model_type` among them, "
            "or those to change in a loaded one."
        },
    )
    student: str | None = field(default=None, metadata={"help": "Hub id or folder of a student to go on with."})
    student_from: Literal["teacher", "config"] = field(
        default="teacher",
        metadata={
            "help": "Without `student`: build one of the teacher's shape and weights, or from the 'config' alone."
        },
    )
    student_config: dict = field(
        default_factory=dict,
        metadata={
            "help": "Fields of CABMambaConfig or CABVisionMambaConfig for a new student (on the command line: "
            "'{state_size: 32}')."
        },
    )
    num_hidden_layers: int | None = field(
        default=None, metadata={"help": "Layers of a new student; the teacher's if not given."}
    )
    mixer_type: str = field(default="mamba2", metadata={"help": "Mixer of a new student: mamba or mamba2."})
    start: Literal["linear", "served"] = field(
        default="linear",
        metadata={
            "help": "Start of a language student's mixers: 'linear', or 'served', which float16, 8-bit formats and "
            "llama.cpp hold (student_from: teacher)."
        },
    )
    copy_weights: bool = field(
        default=True, metadata={"help": "Copy what does not depend on the mixer (student_from: teacher)."}
    )
    copy_attention: bool = field(
        default=True, metadata={"help": "Copy V, K, Q, O to x, B, C, out (student_from: teacher)."}
    )
    keep_attention: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Layers whose attention stays: one number 'n=4' (evenly spread), or indices among the layers that "
            "attend, or paths of their modules. 'auto:4' aligns mixers in all layers first, then measures which "
            "attention is missed most. The student is a hybrid then, with 'n=0' too."
        },
    )
    keep_attention_by: Literal["both", "kl", "copying", "evenly"] = field(
        default="both",
        metadata={
            "help": "What 'auto:N' keeps: layers whose mixers alone cost most in 'kl' to the teacher, 'copying', or "
            "'both' (a layer's share of all layers' KL and of all lost copying); or layers spread 'evenly'."
        },
    )
    accept_inexact: float = field(
        default=0.0,
        metadata={"help": "Largest relative error of what is read of the teacher's attention, where it is not exact."},
    )
    calibration: Literal["fit", "rms", "none"] = field(
        default="fit",
        metadata={
            "help": "Start of a student with copied weights: 'fit' its output projections to the teacher's attention "
            "(ridge regression), 'rms': only scale them, or 'none'."
        },
    )
    calibration_tokens: int = field(default=4096, metadata={"help": "Training tokens that the calibration reads."})
    license: str | None = field(
        default=None, metadata={"help": "Licence of the student, for its card; the teacher's if known."}
    )
    cpu_threads: int | None = field(
        default=None,
        metadata={"help": "Threads of torch on a CPU: `accelerate launch` gives one if not told otherwise."},
    )
    measured_width: int | None = field(
        default=None,
        metadata={"help": "Teacher's width that learning rates were measured at; `cab-hf distill` follows others."},
    )
    method: str = field(default="student", metadata={"help": "What the result table calls this run's student."})

    @property
    def reads_images(self) -> bool:
        return self.task == "image-classification"

    @property
    def num_chosen(self) -> int | None:
        """The layers of attention that are chosen by measuring: N of `keep_attention: auto:N`; None without it.

        Raises:
            ValueError: there is no number, or something beside it; or a way to choose and nothing to choose.
        """
        is_auto = any(str(one).startswith("auto") for one in self.keep_attention)
        count = str(self.keep_attention[0]).removeprefix("auto:") if is_auto else ""
        if is_auto and (len(self.keep_attention) > 1 or not count.isdigit() or int(count) < 1):
            raise ValueError(
                f"`keep_attention` is {self.keep_attention}. Write 'auto:4' alone, with a number from 1 on, or "
                "name the layers."
            )
        if not is_auto and self.keep_attention_by != default_of("keep_attention_by"):
            raise ValueError(
                f"`keep_attention_by` is {self.keep_attention_by!r}, but `keep_attention` is {self.keep_attention}: "
                "nothing is chosen. Set it to 'auto:N', or leave `keep_attention_by` out."
            )
        return int(count) if is_auto else None

    @property
    def calibrates(self) -> bool:
        """Whether a new student's start is calibrated on training data."""
        return (
            self.student is None
            and self.student_from == "teacher"
            and self.copy_weights
            and self.calibration != "none"
        )


@dataclass
class DataArguments:
    """Text of a run, and what is evaluated on it."""

    dataset: list[str] = field(
        default_factory=lambda: ["builtin"],
        metadata={
            "help": "Hub ids, files, folders or globs of text; 'builtin': Python's language reference. Of images one: "
            "digits, cifar10, imagefolder (with data_dir), a saved data set or a Hub id."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub dataset, such as wikitext-2-raw-v1."}
    )
    dataset_split: str | None = field(default=None, metadata={"help": "Split of a dataset; 'train' if not given."})
    text_column: str | None = field(
        default=None,
        metadata={
            "help": "Column that holds the text, or lists of messages; if not given 'text', or else 'messages', or "
            "'prompt' and 'completion'."
        },
    )
    loss_on: LossOn = field(
        default="all",
        metadata={"help": "Tokens of conversations to learn: 'all', or those of the 'assistant' alone."},
    )
    encoding: str = field(
        default="utf-8", metadata={"help": "Encoding of text files without a byte order mark, such as latin-1."}
    )
    holdout: str = field(
        default="0.1",
        metadata={
            "help": "Documents to evaluate on: a fraction, a number, a file, a glob such as 'doc0*', or a regular "
            "expression over their names."
        },
    )
    eval_dataset: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Texts to evaluate on, 'name=source' each; all of `dataset` is trained on then, none held out."
        },
    )
    block_size: int = field(default=512, metadata={"help": "Tokens a training example."})
    isolate_documents: bool = field(default=True, metadata={"help": "Keep documents apart that share a block."})
    num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenise."})
    eval_max_tokens: int | None = field(
        default=65536, metadata={"help": "Tokens of the evaluation of each text, at most."}
    )
    eval_batch_size: int = field(default=8, metadata={"help": "Rows of a batch of the evaluation."})
    teacher_tokens: int = field(
        default=0,
        metadata={"help": "Tokens that the teacher writes first, from nothing, trained on beside the data."},
    )
    teacher_continuation_tokens: int = field(
        default=0,
        metadata={"help": "Tokens that the teacher writes first, on from pieces of the training text; likewise."},
    )
    teacher_prompt_length: int | None = field(
        default=None, metadata={"help": "Tokens of such a piece, at least 2; 16 if not given."}
    )
    teacher_batch_size: int = field(default=64, metadata={"help": "Documents that the teacher writes side by side."})
    repeat_fraction: float = field(
        default=0.0,
        metadata={"help": "Share of the training rows in which spans come again after a gap, to learn copying from."},
    )
    recall_gaps: list[int] = field(
        default_factory=list,
        metadata={"help": "Also test copying over these gaps, in tokens: perplexity does not show it."},
    )
    sample_prompt: str = field(
        default="The",
        metadata={
            "help": "Prompt of the printed sample; where conversations are learnt, the user's turn (a question if not "
            "given); empty: no sample."
        },
    )
    sample_tokens: int = field(default=48, metadata={"help": "Tokens of the sample."})
    verify_reload: bool = field(
        default=False,
        metadata={"help": "Load the saved student in a fresh process without cab_hf and generate there."},
    )


@dataclass
class ImageArguments:
    """Images of a run."""

    data_dir: str | None = field(default=None, metadata={"help": "Folder of the images, where `dataset` needs one."})
    image_column: str | None = field(default=None, metadata={"help": "Column that holds the images."})
    label_column: str | None = field(default=None, metadata={"help": "Column that holds the labels."})
    test_split: str | None = field(
        default=None,
        metadata={
            "help": "Split to report on; if not given a labelled 'test' or 'validation', or a fifth of the rest."
        },
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the student's images in pixels; the teacher's if not given."}
    )
    load_size: int | None = field(
        default=None,
        metadata={
            "help": "Side at which images are read and augmented, before each model's resize; the larger model's if "
            "not given. Small images need no enlarging before they are on the device."
        },
    )
    train_fraction: float = field(
        default=1.0, metadata={"help": "Class-balanced share of the training images, drawn by the seed."}
    )
    validation_fraction: float = field(
        default=0.0,
        metadata={"help": "Share of the training images kept apart to evaluate on while training, off the test set."},
    )
    train_crop: Literal["resize", "random_resized_crop"] = field(
        default="resize", metadata={"help": "Training images: 'resize' (and shift) or 'random_resized_crop'."}
    )
    test_crop: Literal["resize", "center_crop"] = field(
        default="resize", metadata={"help": "Test images: 'resize' or 'center_crop'."}
    )
    crop_pct: float = field(default=0.875, metadata={"help": "Share of the short side that 'center_crop' keeps."})
    skip_broken: bool = field(
        default=False, metadata={"help": "Leave out images that can't be read, with a warning that names them."}
    )
    repeats: int = field(default=1, metadata={"help": "Repeated augmentation: times an image comes in a row."})


ARGUMENT_CLASSES = (
    ModelArguments,
    DataArguments,
    ImageArguments,
    AugmentationArguments,
    DistillationTrainingArguments,
)
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
STAGE_FIELDS = {field.name for field in fields(DistillationTrainingArguments) if field.init} - {"output_dir"}


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
    baselines = _training_runs(whole, values.get("baselines") or [], "baseline")
    return Recipe(model, data, images, augmentation, stages, baselines, values | {"output_dir": whole["output_dir"]})


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


def known_options() -> set[str]:
    return {field.name for kind in ARGUMENT_CLASSES for field in fields(kind) if field.init}


def default_of(name: str) -> Any:
    """What an option is where a recipe does not give it; None for one without a default, and for a list of runs."""
    option = next((one for kind in ARGUMENT_CLASSES for one in fields(kind) if one.name == name), None)
    if option is None or option.default is not MISSING:
        return None if option is None else option.default
    return None if option.default_factory is MISSING else option.default_factory()


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
