"""The language run of a recipe: a causal language model becomes a Mamba; or a teacher is finetuned."""

import textwrap
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from cab_hf.data.documents import load_documents, split_documents
from cab_hf.data.packing import LanguageCollator, pack_documents, save_tokens
from cab_hf.data.repeats import insert_repeats
from cab_hf.distillation.trainer import make_teacher
from cab_hf.evaluation.generation import sample
from cab_hf.evaluation.language import check_packing, compare
from cab_hf.evaluation.recall import copying_recall
from cab_hf.hub.sources import public_name
from cab_hf.models import CABMambaConfig, CABMambaForCausalLM
from cab_hf.recipes import DataArguments, Recipe
from cab_hf.runs.stages import finetune_stage, run_facts, run_stage
from cab_hf.teachers.alignment import parse_layer_map
from cab_hf.teachers.loading import load_teacher
from cab_hf.teachers.sampling import PROMPT_LENGTH, longest_document, sample_documents
from cab_hf.transfer import fit_output_projection, student_from_teacher
from cab_hf.transfer.copying import check_fields


CALIBRATION_ROWS = 8
PIPELINE = """
from transformers import pipeline
generator = pipeline("text-generation", model=sys.argv[1], trust_remote_code=True)
print(generator(sys.argv[2], max_new_tokens=int(sys.argv[3]), do_sample=False)[0]["generated_text"])
"""


def distil_text(recipe: Recipe) -> dict[str, Any]:
    """Distils and saves a language student; returns the report."""
    started = time.time()
    args = recipe.stages[0][1]
    set_seed(args.seed)
    with args.main_process_first(desc="teacher"):
        teacher_model, tokenizer = load_teacher(recipe.model.teacher)
    teacher_model.to(args.teacher_device or args.device)
    with args.main_process_first(desc="data"):
        train_blocks, heldout = load_blocks(recipe, tokenizer, teacher_model)
    collator = _collator(tokenizer)
    rows = min(-(-recipe.model.calibration_tokens // recipe.data.block_size), len(train_blocks))
    batches = [
        collator([train_blocks[i] for i in range(start, min(start + CALIBRATION_ROWS, rows))])
        for start in range(0, rows, CALIBRATION_ROWS)
    ]
    student = build_student(recipe, teacher_model, batches).to(args.device)
    teacher = make_teacher(teacher_model, args)

    before = _evaluate(recipe, student, teacher.model, tokenizer, heldout) if recipe.is_main_process else None
    histories = []
    for name, stage_args in recipe.stages:
        history = run_stage(
            name,
            stage_args,
            student,
            teacher,
            train_dataset=train_blocks,
            eval_dataset=_one_or_all(heldout),
            data_collator=collator,
            processing_class=tokenizer,
        )
        histories.append(history | {"tokens": history["examples"] * len(train_blocks[0]["input_ids"])})
    report = {
        "teacher": recipe.model.teacher,
        "dataset": recipe.data.dataset,
        "student_parameters": student.num_parameters(),
        "teacher_parameters": teacher_model.num_parameters(),
        "train_tokens": sum(history["tokens"] for history in histories),
        "seconds": round(time.time() - started, 1),
        "before": before,
        "after": _evaluate(recipe, student, teacher.model, tokenizer, heldout) if recipe.is_main_process else None,
        "stages": histories,
        **run_facts(args),
        "folder": str(recipe.output_dir),
    }
    if recipe.is_main_process:
        student.save_pretrained(recipe.output_dir)
        tokenizer.save_pretrained(recipe.output_dir)
        if recipe.data.sample_prompt:
            report["sample"] = sample(
                student, tokenizer, recipe.data.sample_prompt, recipe.data.sample_tokens, temperature=0.0
            )
            report["sample_prompt"] = recipe.data.sample_prompt
    return report


def finetune(recipe: Recipe) -> dict[str, Any]:
    """Trains a language model itself on labels and saves it; returns the report, in which it stands as the student.

    What it gains on the text is adaptation: the control beside a student, and a teacher for one of that domain. Its
    weights are float32.
    """
    started = time.time()
    name, args = recipe.only_stage
    if recipe.model.teacher_config:
        raise ValueError("`teacher_config` is for image classifiers; `finetune` trains a language model as it is.")
    set_seed(args.seed)
    with args.main_process_first(desc="teacher"):
        original, tokenizer = load_teacher(recipe.model.teacher)
    with args.main_process_first(desc="data"):
        train_blocks, heldout = load_blocks(recipe, tokenizer, original.to(args.device))
    collator = _collator(tokenizer)
    check_packing(original, collator([train_blocks[0]]))
    if recipe.data.recall_gaps:  # whether the model has positions enough, before a long training
        copying_recall(original, _plain_tokens(tokenizer), max(recipe.data.recall_gaps), n=1, progress=False)
    if not any(parameter.requires_grad for parameter in original.parameters()):
        raise ValueError(
            f"`teacher` {recipe.model.teacher!r} loads with all its weights frozen, as an adapter's folder does. "
            "Merge the adapter (merge_and_unload) and save the model, or name its base model."
        )
    model, history = finetune_stage(
        name,
        args,
        original,
        train_dataset=train_blocks,
        eval_dataset=_one_or_all(heldout),
        data_collator=collator,
        processing_class=tokenizer,
    )
    model.to(args.device)
    tokens = history["examples"] * len(train_blocks[0]["input_ids"])
    report = {
        "teacher": recipe.model.teacher,
        "dataset": recipe.data.dataset,
        "teacher_parameters": model.num_parameters(),
        "train_tokens": tokens,
        "after": _evaluate(recipe, model, original, tokenizer, heldout) if recipe.is_main_process else None,
        "stages": [history | {"tokens": tokens}],
        **run_facts(args),
        "folder": str(recipe.output_dir),
        "seconds": round(time.time() - started, 1),
    }
    if recipe.is_main_process:
        model.save_pretrained(recipe.output_dir)
        tokenizer.save_pretrained(recipe.output_dir)
    return report


def _collator(tokenizer: PreTrainedTokenizerBase) -> LanguageCollator:
    return LanguageCollator(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def _one_or_all(heldout: dict[str, Dataset]) -> Dataset | dict[str, Dataset]:
    return heldout if len(heldout) > 1 else next(iter(heldout.values()))


def _evaluate(
    recipe: Recipe,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    heldout: dict[str, Dataset],
) -> dict[str, dict[str, Any]]:
    """`compare`'s report of each text; the first one also holds the copying tests, which need no text."""
    data, args = recipe.data, recipe.stages[0][1]
    with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
        results = {
            name: compare(student, teacher, blocks, data.eval_batch_size, max_tokens=data.eval_max_tokens)
            for name, blocks in heldout.items()
        }
        if data.recall_gaps:
            tokens = _plain_tokens(tokenizer)
            next(iter(results.values()))["recall"] = {
                str(gap): {
                    name: copying_recall(model, tokens, gap)
                    for name, model in (("teacher", teacher), ("student", student))
                }
                for gap in data.recall_gaps
            }
    return results


def load_blocks(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, teacher: PreTrainedModel
) -> tuple[Dataset, dict[str, Dataset]]:
    """Training blocks, those of the teacher's own text among them, and the blocks of each evaluated text, by name."""
    data = recipe.data
    _check_teacher_text(data, teacher)

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

    documents, seed = load(data.dataset), recipe.stages[0][1].seed
    if data.eval_dataset:
        texts = dict(_named_source(text) for text in data.eval_dataset)
        training, heldout = documents, {name: pack(load([source])) for name, source in texts.items()}
    else:
        training, kept = split_documents(documents, _number_or_text(data.holdout), seed=seed)
        heldout = {f"held-out part of {', '.join(map(public_name, data.dataset))}": pack(kept)}
    blocks = pack(training)
    for option, prompts in (("teacher_tokens", None), ("teacher_continuation_tokens", training)):
        if getattr(data, option):
            written = _teacher_text(recipe, teacher, tokenizer, option, prompts)
            blocks = concatenate_datasets([blocks, pack(load_documents(written))])
    return insert_repeats(blocks, data.repeat_fraction, _plain_tokens(tokenizer), seed=seed), heldout


def _teacher_text(
    recipe: Recipe, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, option: str, prompts: Dataset | None
) -> Path:
    """A file of as many tokens as `option` asks the teacher for; one that an earlier start wrote is kept."""
    data, path = recipe.data, recipe.output_dir / "stages" / f"{option}.npz"
    if path.is_file():
        return path
    num_tokens = getattr(data, option)
    try:
        documents = sample_documents(
            teacher,
            tokenizer,
            num_tokens,
            length=_length_of_teacher_text(data, teacher, prompts is not None),
            prompts=prompts,
            prompt_length=data.teacher_prompt_length or PROMPT_LENGTH,
            batch_size=data.teacher_batch_size,
            seed=recipe.stages[0][1].seed,
            torch_compile=recipe.stages[0][1].torch_compile,
        )
    except ValueError as error:
        raise ValueError(f"`{option}` is {num_tokens}, but the teacher can't write: {error}") from error
    save_tokens(path, documents, tokenizer)
    return path


def _length_of_teacher_text(data: DataArguments, teacher: PreTrainedModel, has_prompts: bool) -> int:
    return min(data.block_size, longest_document(teacher, has_prompts) or data.block_size)


def _check_teacher_text(data: DataArguments, teacher: PreTrainedModel) -> None:
    """Raises for options that the teacher can't write by, before it writes anything."""
    for option in ("teacher_tokens", "teacher_continuation_tokens"):
        num_tokens = getattr(data, option)
        if num_tokens and num_tokens < data.block_size:
            raise ValueError(
                f"`{option}` is {num_tokens}, less than a row of `block_size` {data.block_size}. "
                "Give more, or 0 for none."
            )
    if data.teacher_batch_size < 1:
        raise ValueError(f"`teacher_batch_size` is {data.teacher_batch_size}. Give at least 1.")
    given = data.teacher_prompt_length
    if not data.teacher_continuation_tokens:
        if given is not None:
            raise ValueError(
                f"`teacher_prompt_length` is {given}, but `teacher_continuation_tokens` is 0, and only those go on "
                "from pieces of the text. Set it, or leave the length out."
            )
        return
    length, prompt = _length_of_teacher_text(data, teacher, True), PROMPT_LENGTH if given is None else given
    if not 2 <= prompt < length:
        raise ValueError(
            f"`teacher_prompt_length` is {prompt}, but a document of the teacher's has {length} tokens (`block_size`, "
            f"or its positions) and goes on from 2 to {length - 1} of them. Give so many."
        )


def _plain_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The vocabulary without special tokens."""
    return sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))


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
        check_fields(CABMambaConfig, config)
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


def text_summary(report: dict[str, Any]) -> str:
    """A short table of a report, for the terminal."""
    if report["after"] is None:
        return ""
    before = report.get("before")
    whose = "student" if before else "finetuned teacher"
    lines = []
    for text, after in report["after"].items():
        lines += [
            "",
            f"{text} ({after['n_tokens']:,} tokens)",
            f"  {'':<18}{'perplexity':>12}{'KL to teacher':>16}{'top-1 agreement':>18}",
            f"  {'teacher':<18}{after['teacher_perplexity']:>12.2f}",
        ]
        rows = {"student, before": before[text], "student, after": after} if before else {whose: after}
        for name, numbers in rows.items():
            columns = f"{numbers['student_perplexity']:>12.2f}{numbers['kl']:>16.3f}{numbers['agreement']:>18.3f}"
            lines.append(f"  {name:<18}{columns}")
        for gap, recall in after.get("recall", {}).items():
            teacher, student = recall["teacher"]["recall"], recall["student"]["recall"]
            lines.append(f"  copying over a gap of {gap}: teacher {teacher:.3f}, {whose} {student:.3f}")
    lines += ["", f"trained on {report['train_tokens']:,} tokens; {report['seconds']:,.0f} s on {report['hardware']}"]
    if report.get("sample"):
        text = textwrap.shorten(report["sample_prompt"] + report["sample"], 600)
        lines += ["", textwrap.fill("sample: " + text, 110, subsequent_indent="        ")]
    return "\n".join([*lines, "", f"The {whose} is in {report['folder']}", ""])


def _number_or_text(value: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
