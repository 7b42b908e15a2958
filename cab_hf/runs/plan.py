"""What a run would do, in seconds: shapes, layers, data, stages, time and memory of a measured step."""

import importlib.util
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets.config import HF_DATASETS_CACHE
from huggingface_hub.constants import HF_HUB_CACHE
from transformers import PreTrainedConfig, PreTrainedModel, PrinterCallback, TrainerCallback

from cab_hf.distillation.trainer import DistillationTrainer, default_learning_rate, make_teacher
from cab_hf.models import CABHybridConfig
from cab_hf.recipes import Recipe, Stage
from cab_hf.runs import images as run_images
from cab_hf.runs import text as run_text
from cab_hf.runs.keep import check_choice
from cab_hf.runs.stages import what_of
from cab_hf.runs.student import build_student
from cab_hf.teachers.alignment import layer_map, parse_layer_map
from cab_hf.teachers.demo import demo_cache


EXTRAS = {
    "mamba_ssm": ("mamba-ssm, faster kernels on a GPU", "cuda"),
    "matplotlib": ("matplotlib, pictures in the card", "plots"),
    "kornia": ("kornia, augmentation of images", "vision"),
    "PIL": ("pillow, reading images", "vision"),
}
STEPS = 3  # on a GPU, where the first one warms up


class _Clock(TrainerCallback):
    """How long the last step took."""

    def __init__(self) -> None:
        self.started = self.seconds = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = self._now() - self.started

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def plan(recipe: Recipe) -> str:
    """Reads teacher and data, makes the student, trains a step of one row (on a GPU: three of the batch) of each
    stage elsewhere, and says what the run would do. Nothing is written into its folder.

    Raises:
        ValueError: what the run itself would raise before its first step; or a recipe that makes a teacher.
        FileNotFoundError: the teacher has to be made first.
    """
    started, model = time.perf_counter(), recipe.model
    if model.finetune:
        raise ValueError("`--dry_run` tells of a distillation, but `finetune` makes a teacher. Leave one of them out.")
    if model.teacher_recipe is not None and not Path(model.teacher).exists():
        raise FileNotFoundError(
            f"`--dry_run` reads the teacher, but {model.teacher} is not made yet. Make it first: "
            f"train_cab.py {model.teacher_recipe} --output_dir {model.teacher}"
        )
    prepared = (run_images if recipe.model.reads_images else run_text).prepare(recipe, writes=False)
    teacher, args = prepared.teacher_model, recipe.args
    student = build_student(
        replace(recipe.model, calibration="none"), teacher, args.layer_map, [], **prepared.student_options
    ).to(args.device)
    sizes = student.config
    check_choice(recipe, student)
    lines = {
        "teacher": f"{recipe.model.teacher}: {_shape(teacher)}",
        "student": f"{_shape(student)}, {_mixers(sizes)} mixers, state {sizes.state_size}, from "
        + ("the teacher's weights" if recipe.model.student_from == "teacher" else "its config alone"),
        "layers": _layers(student, teacher, args.layer_map, recipe.model.num_chosen),
        "data": prepared.facts,
    }
    rows = args.per_device_train_batch_size if args.device.type == "cuda" else 1
    seconds, gib = 0.0, 0.0
    for number, stage in enumerate(recipe.stages, start=1):
        batches = prepared.rows_of(stage)
        steps = _num_steps(stage, len(batches))
        each, peak = _measure(stage, student, teacher, prepared, rows)
        share = stage.args.per_device_train_batch_size * stage.args.gradient_accumulation_steps / rows
        seconds, gib = seconds + each * share * steps, max(gib, peak)
        seen = steps * stage.args.per_device_train_batch_size * stage.args.gradient_accumulation_steps
        seen *= args.world_size
        rate = stage.args.learning_rate or default_learning_rate(student.config)
        lines[f"stage {number} of {len(recipe.stages)}"] = (
            f"{stage.name} ({what_of(stage.args)}): {steps:,} steps, "
            f"{seen * (stage.block_size or prepared.unit):,} {prepared.units}, "
            f"{seen / len(batches):.1f} passes, learning rate {rate:g}"
        )
    lines["time"] = (
        f"about {_duration(seconds)} for the steps ({rows} x {prepared.unit} {prepared.units} were timed); the fit of "
        "the start and measuring before and after come on top"
    )
    lines["memory"] = f"{gib:.1f} GiB at {rows} row{'s' if rows > 1 else ''} a step" + (
        f", more at {args.per_device_train_batch_size}" if rows < args.per_device_train_batch_size else ""
    )
    missing = [f"{what} (pip install cab-hf[{extra}])" for what, extra in _missing(recipe)]
    lines["missing"] = "; ".join(missing) or "nothing"
    lines["caches"] = caches(recipe)
    lines["output"] = str(recipe.output_dir)
    lines["this"] = f"took {time.perf_counter() - started:.0f} s, wrote nothing"
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())


def caches(recipe: Recipe) -> str:
    """Where what is read is kept."""
    own = f", the demo's teacher {demo_cache().resolve()}" if recipe.model.teacher == "smollm2-demo" else ""
    return f"models {HF_HUB_CACHE}, data {HF_DATASETS_CACHE}{own}"


def _shape(model: PreTrainedModel) -> str:
    config = model.config.get_text_config()
    return (
        f"{type(model).__name__}, {config.num_hidden_layers} layers of width {config.hidden_size}, "
        f"{model.num_parameters():,} parameters"
    )


def _mixers(config: PreTrainedConfig) -> str:
    return " and ".join(dict.fromkeys(config.layer_mixer_types))


def _layers(student: PreTrainedModel, teacher: PreTrainedModel, rule: str, count: int | None) -> str:
    if isinstance(student.config, CABHybridConfig):
        config = student.config
        numbers = ", ".join(map(str, config.layer_numbers))
        windows = max(config.windows, default=0)
        beside = f", each beside attention to the last {windows} tokens" if windows else ""
        chosen = "" if count is None else f"; {count} of them give way to attention, once that is measured"
        return f"mixers in {len(config.mixers)} of {config.depth}: {numbers}{beside}{chosen}"
    depth = student.config.num_hidden_layers
    layers = layer_map(parse_layer_map(rule), depth, teacher.config.get_text_config().num_hidden_layers)
    if list(layers) == list(range(depth)):
        return f"each of {depth} from the teacher's same one"
    return ", ".join(f"{index} from {layer}" for index, layer in enumerate(layers))


def _num_steps(stage: Stage, rows: int) -> int:
    args = stage.args
    if args.max_steps > 0:
        return args.max_steps
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return max(1, int(args.num_train_epochs * rows // batch))


def _measure(
    stage: Stage, student: PreTrainedModel, teacher: PreTrainedModel, prepared: Any, rows: int
) -> tuple[float, float]:
    """Seconds of a step and the largest memory, in GiB."""
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = replace(
            stage.args,
            output_dir=folder,
            max_steps=STEPS if stage.args.device.type == "cuda" else 1,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=1,
            save_strategy="no",
            eval_strategy="no",
            report_to="none",
            push_to_hub=False,
            load_best_model_at_end=False,
            cuda_graph=False,
            torch_compile=False,
            disable_tqdm=True,
            logging_strategy="no",
        )
        student.requires_grad_(True)
        taught = make_teacher(teacher, args)
        given = {"train_dataset": prepared.rows_of(stage), **prepared.trainer_options}
        # what the run itself would raise before its first step
        whole = replace(args, per_device_train_batch_size=stage.args.per_device_train_batch_size)
        DistillationTrainer(student, taught, whole, **given).get_train_dataloader()
        trainer = DistillationTrainer(student, taught, args, **given)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(clock)
        trainer.train()
    if args.device.type == "cuda":
        return clock.seconds, torch.cuda.max_memory_allocated() / 2**30
    return clock.seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _missing(recipe: Recipe) -> list[tuple[str, str]]:
    names = ["matplotlib", *(["kornia", "PIL"] if recipe.model.reads_images else [])]
    names += ["mamba_ssm"] if torch.cuda.is_available() else []
    return [EXTRAS[name] for name in names if importlib.util.find_spec(name) is None]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
