"""A whole run: teacher, student and data of a recipe, its stages, evaluation, card."""

import json
import platform
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import logging

from cab_hf.data import load_documents, split_documents
from cab_hf.demo import fetch_smollm2, random_llama
from cab_hf.distillation.modeling_distillation import parse_layer_map
from cab_hf.distillation.teacher import Teacher
from cab_hf.distillation.trainer import DistillationTrainer, last_whole_checkpoint, load_student, make_teacher
from cab_hf.evaluation import compare, copying_recall, sample
from cab_hf.hub import public_name, write_model_card
from cab_hf.models import CABMambaConfig, CABMambaForCausalLM
from cab_hf.packing import LanguageCollator, pack_documents
from cab_hf.recipes import Recipe
from cab_hf.transfer import fit_output_projection, student_from_teacher


logger = logging.get_logger(__name__)

CACHE = Path(".cache")
CALIBRATION_ROWS = 8
RECIPE_NAME, REPORT_NAME = "recipe.yaml", "report.json"
# Options that do not change what a run computes: a finished run may be asked for again with others.
FREE_OPTIONS = {
    "sample_prompt",
    "sample_tokens",
    "verify_reload",
    "disable_tqdm",
    "report_to",
    "resume_from_checkpoint",
}
FRESH_PROCESS = """
import sys
sys.modules["cab_hf"] = None  # an import of the package would fail: the folder must do alone
from transformers import pipeline
generator = pipeline("text-generation", model=sys.argv[1], trust_remote_code=True)
print(generator(sys.argv[2], max_new_tokens=int(sys.argv[3]), do_sample=False)[0]["generated_text"])
"""


def run_recipe(recipe: Recipe) -> dict[str, Any]:
    """Distils, evaluates and saves a student; what an earlier run of the same recipe finished is reused.

    `output_dir` then holds the student (weights, config, modelling files, tokenizer, card), `report.json`,
    `recipe.yaml`, and under `stages/` each stage's checkpoints and its own loadable student.

    Returns:
        The report that is also in `report.json`.

    Raises:
        ValueError: `output_dir` holds a run of another recipe.
    """
    folder = recipe.output_dir
    finished = _claim(folder, recipe)
    if finished is None:
        finished = _distil(recipe)
    else:
        print(f"{folder} already holds this run's student; it is reused. Remove the folder to train again.")
    print(summary(finished))
    if recipe.data.verify_reload and _is_main_process(recipe):
        print(f"In a fresh process without cab_hf, the student continues:\n{reload_in_fresh_process(recipe)}\n")
    return finished


def _distil(recipe: Recipe) -> dict[str, Any]:
    started = time.time()
    args = recipe.stages[0][1]
    set_seed(args.seed)
    with args.main_process_first(desc="teacher"):
        teacher_model, tokenizer = load_teacher(recipe.model.teacher)
    with args.main_process_first(desc="data"):
        train_blocks, heldout = load_blocks(recipe, tokenizer)
    collator = LanguageCollator(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
    teacher_model.to(args.teacher_device or args.device)
    rows = min(-(-recipe.model.calibration_tokens // recipe.data.block_size), len(train_blocks))
    batches = [
        collator([train_blocks[i] for i in range(start, min(start + CALIBRATION_ROWS, rows))])
        for start in range(0, rows, CALIBRATION_ROWS)
    ]
    student = build_student(recipe, teacher_model, batches).to(args.device)
    teacher = make_teacher(teacher_model, args)

    is_main = _is_main_process(recipe)
    before = _evaluate(recipe, student, teacher, tokenizer, heldout) if is_main else None
    histories = [
        _run_stage(*stage, student, teacher, tokenizer, collator, train_blocks, heldout) for stage in recipe.stages
    ]
    report = {
        "teacher": recipe.model.teacher,
        "dataset": recipe.data.dataset,
        "student_parameters": student.num_parameters(),
        "teacher_parameters": teacher_model.num_parameters(),
        "train_tokens": sum(history["tokens"] for history in histories),
        "seconds": round(time.time() - started, 1),
        "before": before,
        "after": _evaluate(recipe, student, teacher, tokenizer, heldout) if is_main else None,
        "stages": histories,
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate", "datasets")},
        "hardware": torch.cuda.get_device_name() if args.device.type == "cuda" else f"{platform.machine()} CPU",
        "folder": str(recipe.output_dir),
    }
    if is_main:
        _save(recipe, student, tokenizer, report)
    return report


def _evaluate(
    recipe: Recipe,
    student: CABMambaForCausalLM,
    teacher: Teacher,
    tokenizer: PreTrainedTokenizerBase,
    heldout: dict[str, Dataset],
) -> dict[str, dict[str, Any]]:
    """`compare`'s report of each text; the first one also holds the copying tests, which need no text."""
    data, args = recipe.data, recipe.stages[0][1]
    with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
        results = {
            name: compare(student, teacher.model, blocks, data.eval_batch_size, max_tokens=data.eval_max_tokens)
            for name, blocks in heldout.items()
        }
        if data.recall_gaps:
            tokens = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
            next(iter(results.values()))["recall"] = {
                str(gap): {
                    name: copying_recall(model, tokens, gap)
                    for name, model in (("teacher", teacher.model), ("student", student))
                }
                for gap in data.recall_gaps
            }
    return results


def load_teacher(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, by Hub id, folder, or one of the built-in names."""
    if name == "random-llama":
        return random_llama()
    source = fetch_smollm2(CACHE) if name == "smollm2-demo" else name
    tokenizer = AutoTokenizer.from_pretrained(source)
    return AutoModelForCausalLM.from_pretrained(source, dtype="auto"), tokenizer


def load_blocks(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, dict[str, Dataset]]:
    """Training blocks, and the blocks of each text that is evaluated, by name."""
    data = recipe.data

    def load(sources: list[str]) -> Dataset:
        return load_documents(
            sources if len(sources) > 1 else sources[0],
            config_name=data.dataset_config,
            split=data.dataset_split,
            text_column=data.text_column,
        )

    def pack(documents: Dataset) -> Dataset:
        return pack_documents(
            documents, tokenizer, data.block_size, isolate_documents=data.isolate_documents, num_proc=data.num_proc
        )

    documents = load(data.dataset)
    if not data.eval_dataset:
        training, heldout = split_documents(documents, _number_or_text(data.holdout), seed=recipe.stages[0][1].seed)
        return pack(training), {f"held-out part of {', '.join(map(public_name, data.dataset))}": pack(heldout)}
    texts = dict(_named_source(text) for text in data.eval_dataset)
    return pack(documents), {name: pack(load([source])) for name, source in texts.items()}


def _named_source(text: str) -> tuple[str, str]:
    name, separator, source = text.partition("=")
    if not separator:
        raise ValueError(f"`eval_dataset` takes 'name=source', got {text!r}; for instance 'news={text}'.")
    return name, source


def build_student(
    recipe: Recipe, teacher: PreTrainedModel, batches: list[dict[str, torch.Tensor]]
) -> CABMambaForCausalLM:
    """The student that a recipe starts from, calibrated on batches of training tokens where it asks for that."""
    model = recipe.model
    if model.student is not None:
        return AutoModelForCausalLM.from_pretrained(model.student, dtype=torch.float32)
    config = dict(model.student_config)
    if model.num_hidden_layers is not None:
        config["num_hidden_layers"] = model.num_hidden_layers
    if model.student_from == "config":
        return CABMambaForCausalLM(
            CABMambaConfig(**{"vocab_size": teacher.config.vocab_size, "mixer_type": model.mixer_type} | config)
        )
    layer_map = parse_layer_map(recipe.stages[0][1].layer_map)
    inputs = [{"input_ids": batch["input_ids"].to(teacher.device)} for batch in batches]
    calibrates = model.calibration != "none" and model.copy_weights and inputs
    student = student_from_teacher(
        teacher,
        mixer_type=model.mixer_type,
        layer_map=layer_map,
        copy_weights=model.copy_weights,
        copy_attention=model.copy_attention,
        calibration_inputs=inputs[0] if calibrates else None,
        **config,
    )
    if calibrates and model.calibration == "fit" and model.copy_attention:
        fit_output_projection(student, teacher, inputs, layer_map)
    return student


def _run_stage(
    name: str,
    args: Any,
    student: CABMambaForCausalLM,
    teacher: Teacher,
    tokenizer: PreTrainedTokenizerBase,
    collator: LanguageCollator,
    train_blocks: Dataset,
    heldout: dict[str, Dataset],
) -> dict[str, Any]:
    folder = Path(args.output_dir)
    history_file = folder / "history.json"
    if history_file.is_file():
        logger.warning(f"Stage {name!r} is complete in {folder}; its student is loaded.")
        load_student(student, folder)
        return json.loads(history_file.read_text())
    student.requires_grad_(True)  # whatever an earlier stage froze
    trainer = DistillationTrainer(
        student,
        teacher,
        replace(args),
        train_dataset=train_blocks,
        eval_dataset=heldout if len(heldout) > 1 else next(iter(heldout.values())),
        data_collator=collator,
        processing_class=tokenizer,
    )
    checkpoint = last_whole_checkpoint(folder)
    if checkpoint is not None:
        logger.warning(f"Stage {name!r} goes on from {checkpoint}.")
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    tokens = trainer.state.global_step * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    history = {
        "name": name,
        "steps": trainer.state.global_step,
        "tokens": tokens * len(train_blocks[0]["input_ids"]),
        "seconds": round(result.metrics["train_runtime"], 1),
        "log": trainer.state.log_history,
    }
    if trainer.is_world_process_zero():
        _write(history_file, json.dumps(history, indent=1))
    trainer.accelerator.wait_for_everyone()
    return history


def _save(
    recipe: Recipe, student: CABMambaForCausalLM, tokenizer: PreTrainedTokenizerBase, report: dict[str, Any]
) -> None:
    folder = recipe.output_dir
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if recipe.data.sample_prompt:
        report["sample"] = sample(
            student, tokenizer, recipe.data.sample_prompt, recipe.data.sample_tokens, temperature=0.0
        )
        report["sample_prompt"] = recipe.data.sample_prompt
    write_model_card(folder, recipe, report)
    # Last: a folder with a report is a finished run.
    _write(folder / REPORT_NAME, json.dumps(report, indent=1))


def reload_in_fresh_process(recipe: Recipe) -> str:
    """What the saved student generates in a new process in which `cab_hf` can't be imported."""
    data = recipe.data
    with tempfile.TemporaryDirectory() as elsewhere:
        process = subprocess.run(
            [sys.executable, "-c", FRESH_PROCESS, str(recipe.output_dir.resolve()), data.sample_prompt or "The"]
            + [str(data.sample_tokens)],
            cwd=elsewhere,
            capture_output=True,
            text=True,
        )
    if process.returncode:
        raise RuntimeError(f"The saved student did not load in a fresh process:\n{process.stderr[-2000:]}")
    return process.stdout.strip()


def summary(report: dict[str, Any]) -> str:
    """A short table of a report, for the terminal."""
    if report["after"] is None:
        return ""
    lines = []
    for text, after in report["after"].items():
        before = report["before"][text]
        lines += [
            "",
            f"{text} ({after['n_tokens']:,} tokens)",
            f"  {'':<18}{'perplexity':>12}{'KL to teacher':>16}{'top-1 agreement':>18}",
            f"  {'teacher':<18}{after['teacher_perplexity']:>12.2f}",
        ]
        for name, numbers in (("before", before), ("after", after)):
            columns = f"{numbers['student_perplexity']:>12.2f}{numbers['kl']:>16.3f}{numbers['agreement']:>18.3f}"
            lines.append(f"  {f'student, {name}':<18}{columns}")
        for gap, recall in after.get("recall", {}).items():
            teacher, student = recall["teacher"]["recall"], recall["student"]["recall"]
            lines.append(f"  copying over a gap of {gap}: teacher {teacher:.3f}, student {student:.3f}")
    lines += ["", f"trained on {report['train_tokens']:,} tokens; {report['seconds']:,.0f} s on {report['hardware']}"]
    if report.get("sample"):
        text = textwrap.shorten(report["sample_prompt"] + report["sample"], 600)
        lines += ["", textwrap.fill("sample: " + text, 110, subsequent_indent="        ")]
    return "\n".join([*lines, "", f"The student is in {report['folder']}", ""])


def _claim(folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    """Makes `output_dir` this recipe's; returns the report if the run is finished there."""
    asked = {name: value for name, value in recipe.values.items() if name not in FREE_OPTIONS}
    path = folder / RECIPE_NAME
    if path.is_file():
        found = yaml.safe_load(path.read_text()) or {}
        found = {name: value for name, value in found.items() if name not in FREE_OPTIONS}
        differing = sorted(name for name in asked.keys() | found.keys() if asked.get(name) != found.get(name))
        if differing:
            details = "; ".join(
                f"{name}: {found.get(name)!r} there, {asked.get(name)!r} now" for name in differing[:4]
            )
            raise ValueError(
                f"`output_dir` {folder} holds a run of another recipe ({details}). Choose another `--output_dir`, or "
                "remove the folder."
            )
    if (folder / REPORT_NAME).is_file():
        return json.loads((folder / REPORT_NAME).read_text())
    if _is_main_process(recipe):
        folder.mkdir(parents=True, exist_ok=True)
        # Sorted keys and plain types only, so that a run reads what another one wrote.
        _write(path, yaml.safe_dump(recipe.values))
    return None


def _write(path: Path, text: str) -> None:
    """Whole or not at all: another process, or a run after a kill, never reads half of it."""
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(text)
    unfinished.replace(path)


def _is_main_process(recipe: Recipe) -> bool:
    return recipe.stages[0][1].process_index == 0


def _number_or_text(value: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
