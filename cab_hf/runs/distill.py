"""A recipe out of a teacher and data alone: what `cab-hf distill` runs.

A shipped recipe is the model. What belongs to its own teacher and data goes, steps follow the amount of data that is
asked for, learning rates the teacher's width, and what this machine can't do is left out.
"""

import logging as logging_of_processes
import os
import shlex
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging

from cab_hf.checks import check_source, end, find_recipe
from cab_hf.distillation.training_args import rate_at_width
from cab_hf.files import shipped
from cab_hf.hub.sources import local_name
from cab_hf.recipe_options import default_of
from cab_hf.recipes import load_recipe, without
from cab_hf.teachers.demo import random_llama
from cab_hf.teachers.loading import reads_images, teacher_source


logger = logging.get_logger(__name__)

TEXT, IMAGES = "text-generation", "image-classification"
IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# What a recipe says of its own teacher and data.
ITS_OWN = {
    "data_dir",
    "dataset",
    "dataset_config",
    "dataset_split",
    "eval_dataset",
    "holdout",
    "image_column",
    "label_column",
    "license",
    "measured_width",
    "sample_prompt",
    "teacher",
    "teacher_recipe",
    "test_split",
    "text_column",
}
OTHERS_SHARE = 0.3  # of the steps, for all stages but the longest: as at 5M and 20M tokens and on CIFAR-10
IMAGES_SEEN = {True: 192_000, False: 6_400}  # on a GPU as on CIFAR-10; on a CPU, minutes
CPU_EVAL_TOKENS = 6_144
HOURS_OF_WRITING = 6


def read_teacher_config(teacher: str) -> PreTrainedConfig:
    """The config of a teacher by Hub id, folder or built-in name.

    Raises:
        FileNotFoundError: nothing is there.
    """
    check_source("teacher", teacher, "model")
    return (
        random_llama()[0].config if teacher == "random-llama" else AutoConfig.from_pretrained(teacher_source(teacher))
    )


def task_of(config: PreTrainedConfig) -> str:
    """What a teacher does, by its config: texts or images."""
    return IMAGES if reads_images(config) else TEXT


def data_options(task: str, sources: Sequence[str]) -> dict[str, Any]:
    """Options that name the data of a run.

    Args:
        task: of the teacher.
        sources: of `--data`; a folder of one folder of images a class is told by what is in it.

    Raises:
        ValueError: images for a language model, texts for an image model, or several sources of images.
    """
    folders = [source for source in sources if holds_images(Path(source).expanduser())]
    if task == TEXT:
        if folders:
            raise ValueError(
                f"`--data` {folders[0]!r} holds images, but the teacher is a language model. Name texts, or an image "
                "model as the teacher."
            )
        return {"dataset": list(sources)}
    if len(sources) > 1:
        raise ValueError(f"`--data` names {len(sources)} sources of images: {list(sources)}. Give one folder or id.")
    (source,) = sources
    if folders:
        return {"dataset": ["imagefolder"], "data_dir": source}
    path = Path(source).expanduser()
    if source == "builtin" or path.is_file():
        raise ValueError(
            f"`--data` {source!r} is text, but the teacher reads images. Name a folder of one folder of images a "
            "class, a saved data set, digits or a Hub id."
        )
    return {"dataset": [source]}


def holds_images(folder: Path) -> bool:
    """Whether a folder, or one up to two below it, holds an image; a saved data set says for itself what it holds."""
    if not folder.is_dir() or any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        return False
    levels = (folder.glob(pattern) for pattern in ("*", "*/*", "*/*/*"))
    return any(path.suffix.lower() in IMAGE_SUFFIXES for level in levels for path in level)


def recipe_values(
    teacher: str,
    data: Sequence[str],
    *,
    recipe: str | None = None,
    amount: int | None = None,
    options: Mapping[str, Any] | None = None,
    processes: int | None = None,
) -> dict[str, Any]:
    """The values of a recipe for a teacher and data.

    Learning rates are the recipe's, multiplied by the width that they were measured at over the teacher's: hidden
    matrices that are `n` times as wide take an `n`-th of Adam's rate (muP, arXiv 2203.03466, table 3). Rates double
    at most.

    Args:
        teacher: Hub id, folder or built-in name.
        data: texts as `load_documents` takes them; or one source of images, as `load_images`, or a class folder.
        recipe: file, or name of a shipped one. By default `lm_default` or `vision_default`; for texts on a CPU
            `quickstart_lm`.
        amount: tokens or images to train on in all, over all processes; the recipe's own number when None.
        options: of a recipe, given by the user: they win over all that is worked out here.
        processes: that train together; by default as many as the launcher started.

    Returns:
        Values for [`~cab_hf.recipes.build_recipe`].

    Raises:
        FileNotFoundError: no such teacher or recipe.
        ValueError: data or a recipe of the other kind, or an amount of less than a step.

    Example:
        >>> values = recipe_values("random-llama", ["builtin"], recipe="smoke", amount=1024)
        >>> [stage["max_steps"] for stage in values["stages"]]
        [2, 6]
    """
    options = dict(options or {})
    config = read_teacher_config(teacher)
    task = task_of(config)
    on_gpu = torch.cuda.is_available() and not options.get("use_cpu", False)
    name = recipe or ("vision_default" if task == IMAGES else "lm_default" if on_gpu else "quickstart_lm")
    values = load_recipe(find_recipe(name))
    if values.get("task", TEXT) != task:
        raise ValueError(
            f"`--recipe` {name} is for {values.get('task', TEXT)}, but the teacher {teacher!r} is one of {task}. "
            "Leave it out, or name another."
        )
    measured = values.get("measured_width")
    values = without(values, ITS_OWN)
    values |= {"task": task, "teacher": teacher, **data_options(task, data)}
    values.setdefault("output_dir", str(Path("outputs") / f"{Path(local_name(teacher)).name}-mamba"))
    world = processes or int(os.environ.get("WORLD_SIZE", 1))
    _fit_machine(values, on_gpu, world)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if task == TEXT and longest:
        values.setdefault("block_size", default_of("block_size"))
        for run in _runs(values, "block_size"):
            run["block_size"] = min(run["block_size"], longest)
    if "learning_rate" not in options:
        _scale_rates(values, config.get_text_config().hidden_size, measured)
    if task == IMAGES:
        amount = IMAGES_SEEN[on_gpu] if amount is None else amount
        _fit_batch(values, world)
    if amount is not None:
        _scale_steps(values | options, values, amount, world)
    if values.get("stages"):
        values["stages"] = without({"stages": values["stages"]}, options.keys())["stages"]
    return values | options


def _fit_batch(values: dict[str, Any], world: int) -> None:
    """No batch is larger than half of a class folder, a fifth of which may be held out."""
    if "data_dir" not in values:
        return
    count = sum(path.suffix.lower() in IMAGE_SUFFIXES for path in Path(values["data_dir"]).expanduser().rglob("*"))
    batch = values.get("per_device_train_batch_size", default_of("per_device_train_batch_size"))
    values["per_device_train_batch_size"] = max(1, min(batch, count // 2 // world))


def _fit_machine(values: dict[str, Any], on_gpu: bool, world: int) -> None:
    """Leaves out what this machine can't do; several processes share the batch of one."""
    if not on_gpu:
        values |= {"use_cpu": True, "cuda_graph": False, "torch_compile": False, "dataloader_num_workers": 0}
        values["eval_max_tokens"] = min(values.get("eval_max_tokens") or CPU_EVAL_TOKENS, CPU_EVAL_TOKENS)
    if world > 1:
        values |= {"cuda_graph": False, "torch_compile": False}  # neither has been measured on several GPUs
        values.setdefault("ddp_timeout", HOURS_OF_WRITING * 3600)  # the first process writes the teacher's text
        values.setdefault("per_device_train_batch_size", default_of("per_device_train_batch_size"))
        for run in _runs(values, "per_device_train_batch_size"):
            run["per_device_train_batch_size"] = max(1, run["per_device_train_batch_size"] // world)


def _runs(values: dict[str, Any], option: str) -> list[dict[str, Any]]:
    """The recipe and those of its stages that set an option."""
    return [run for run in (values, *values.get("stages", ())) if option in run]


def _scale_rates(values: dict[str, Any], width: int, measured: int | None) -> None:
    if measured is None or width == measured:
        return
    logger.warning(
        f"The recipe's learning rates were measured under a teacher of width {measured}. This one is {width} wide, "
        f"where nothing was measured: they are multiplied by {rate_at_width(1.0, measured, width):g}. --learning_rate "
        "sets one by hand."
    )
    for name in ("learning_rate", "mixer_learning_rate"):
        for run in _runs(values, name):
            run[name] = rate_at_width(float(run[name]), measured, width)


def _scale_steps(given: Mapping[str, Any], values: dict[str, Any], amount: int, world: int) -> None:
    """Steps for an amount of tokens or images. The longest stage takes what the others leave.

    These keep their own steps, up to `OTHERS_SHARE` of all together. The teacher's own text, written first, and
    warm-ups shrink along.
    """
    is_text = values["task"] == TEXT
    unit = world * given.get("per_device_train_batch_size", default_of("per_device_train_batch_size"))
    unit *= given.get("gradient_accumulation_steps", 1) * (
        given.get("block_size", default_of("block_size")) if is_text else 1
    )
    steps = amount // unit
    stages = values.get("stages") or [values]
    if steps < len(stages):
        what, option = ("tokens", "--tokens") if is_text else ("images", "--images")
        raise ValueError(
            f"`{option}` is {amount:,}, but a step reads {unit:,} {what}, and each of {len(stages)} stage(s) takes "
            f"one. Give at least {unit * len(stages):,}, or a smaller --per_device_train_batch_size."
        )
    own = [stage.get("max_steps") for stage in stages]
    longest = len(own) - 1 if None in own else max(range(len(own)), key=lambda place: (own[place], place))
    left = steps
    for place, (stage, planned) in enumerate(zip(stages, own)):
        if place != longest:
            share = max(1, int(OTHERS_SHARE * steps / (len(stages) - 1)))
            stage["max_steps"] = share if planned is None else min(planned, share)
            left -= stage["max_steps"]
    stages[longest]["max_steps"] = left
    total = sum(own) if None not in own else None
    for stage in stages:
        warmup = stage.get("warmup_steps", values.get("warmup_steps"))
        if warmup and warmup > 0.1 * stage["max_steps"]:
            stage["warmup_steps"] = int(0.1 * stage["max_steps"])
    if total is not None and steps < total:
        block = given.get("block_size", default_of("block_size"))
        for option in ("teacher_tokens", "teacher_continuation_tokens"):
            written = int(values.get(option, 0) * steps / total)
            values[option] = written if written >= block else 0


def launch(gpus: int, arguments: Sequence[str]) -> int:
    """Runs `cab-hf distill` again as one process a GPU, by accelerate, and says the line that does the same.

    Args:
        gpus: number of processes.
        arguments: of `cab-hf distill`, without `--gpus`.

    Returns:
        The exit code: of the first process that failed, or 130 after ctrl-C.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    line = ["--num_processes", str(gpus), "-m", "cab_hf.cli", "distill", *arguments]
    print(shlex.join(["accelerate", "launch", *line]), flush=True)
    # Nothing of an accelerate config of the user's, which may be of another kind of run; a port that is free.
    threads = os.environ.get("OMP_NUM_THREADS", "")
    threads = threads if threads.isdigit() else max(1, (os.cpu_count() or 1) // gpus)
    config = shipped("training_args") / "accelerate/ddp.yaml"
    own = ["--config_file", str(config), "--main_process_port", "0", "--num_cpu_threads_per_process", str(threads)]
    logging_of_processes.disable(logging_of_processes.ERROR)  # the processes say what is wrong themselves
    try:
        launch_command(launch_command_parser().parse_args([*own, *line]))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        if code < 0:
            way_out = "If nobody sent that, memory ran out: give a smaller --per_device_train_batch_size."
            end(f"a process was ended by {signal.Signals(-code).name}. {way_out}")
        return code
    except SignalException as error:
        return 128 + error.sigval
    finally:
        logging_of_processes.disable(logging_of_processes.NOTSET)
    return 0


def check_gpus(gpus: int) -> None:
    """Raises ValueError where this machine has fewer GPUs."""
    found = torch.cuda.device_count()
    if gpus > found:
        way_out = f"Give at most {found}." if found > 1 else "Leave it out."
        raise ValueError(f"`--gpus` is {gpus}, but this machine has {found}. {way_out}")
