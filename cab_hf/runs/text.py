"""The language run of a recipe: a causal language model becomes a Mamba; or a teacher is finetuned."""

import json
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, concatenate_datasets
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import logging

from cab_hf.data.documents import load_documents, split_documents, tell_copies
from cab_hf.data.facts import insert_facts
from cab_hf.data.packing import IGNORE_INDEX, LanguageCollator, LossOn, pack_documents, save_tokens
from cab_hf.data.repeats import insert_repeats
from cab_hf.distillation.trainer import make_teacher
from cab_hf.distillation.training_args import DistillationTrainingArguments
from cab_hf.evaluation.generation import sample
from cab_hf.evaluation.language import check_packing, compare
from cab_hf.evaluation.recall import copying_recall
from cab_hf.hub.sources import public_name
from cab_hf.inference import check_positions, num_positions
from cab_hf.recipe_options import DataArguments, default_of
from cab_hf.recipes import Recipe, Stage
from cab_hf.runs.chat import Chat
from cab_hf.runs.inputs import blocks_digest, check_inputs
from cab_hf.runs.keep import attention_to_choose_from, keep_attention, num_alignments
from cab_hf.runs.stages import finetune_stage, run_facts, run_stage, tell
from cab_hf.runs.student import build_student
from cab_hf.teachers.loading import load_teacher
from cab_hf.teachers.sampling import PROMPT_LENGTH, longest_document, sample_documents


logger = logging.get_logger(__name__)

CALIBRATION_ROWS = 8
CHAT_PROMPT = "What is the capital of France?"
PIPELINE = """
from transformers import pipeline
generator = pipeline("text-generation", model=sys.argv[1], trust_remote_code=True)
print(generator(sys.argv[2], max_new_tokens=int(sys.argv[3]), do_sample=False)[0]["generated_text"])
"""


class Prepared(NamedTuple):
    """What a run of texts reads before its student is made.

    Attributes:
        teacher_model, tokenizer: the teacher.
        train: rows to train on.
        heldout: rows of each evaluated text, by name.
        copies: of each evaluated text, the documents that are trained on, too.
        is_chat: whether conversations are trained on.
        longer: the rows to train on in other lengths, by the `block_size` of stages.
        collator: makes batches of rows.
    """

    teacher_model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    heldout: dict[str, Dataset]
    copies: dict[str, int]
    is_chat: bool
    longer: dict[int, Dataset]
    collator: LanguageCollator

    units = "tokens"

    def rows_of(self, stage: Stage) -> Dataset:
        """What a stage trains on: rows of its own length, or the recipe's."""
        return self.train if stage.block_size is None else self.longer[stage.block_size]

    @property
    def student_options(self) -> dict[str, Any]:
        return {}

    @property
    def unit(self) -> int:
        """Tokens of a row."""
        return len(self.train[0]["input_ids"])

    @property
    def facts(self) -> str:
        held = sum(len(rows) for rows in self.heldout.values())
        labels = self.train.select(range(min(len(self.train), 64)))["labels"]
        share = sum(label != IGNORE_INDEX for row in labels for label in row) / sum(map(len, labels))
        note = "" if share > 0.9 else f", {share:.0%} of them learnt (loss_on)"
        return f"{len(self.train):,} rows of {self.unit:,} tokens{note}, and {held:,} held out"

    @property
    def trainer_options(self) -> dict[str, Any]:
        return {"data_collator": self.collator, "processing_class": self.tokenizer}


def prepare(recipe: Recipe, *, writes: bool = True) -> Prepared:
    """Reads teacher and texts.

    Args:
        recipe: of the run.
        writes: whether the teacher may write text, where the recipe asks for it.
    """
    args, data = recipe.args, recipe.data
    set_seed(args.seed)
    with args.main_process_first(desc="teacher"):
        teacher_model, tokenizer = load_teacher(recipe.model.teacher)
    tell(recipe, f"teacher: {type(teacher_model).__name__}, {teacher_model.num_parameters():,} parameters")
    teacher_model.to(args.teacher_device or args.device)
    if not writes:
        data = replace(data, teacher_tokens=0, teacher_continuation_tokens=0, teacher_prompt_length=None)
    with args.main_process_first(desc="data"):
        folder = recipe.output_dir / "stages"
        sizes = sorted({stage.block_size for stage in recipe.stages} - {None})
        blocks = load_blocks(data, tokenizer, teacher_model, args, folder, sizes)
    prepared = Prepared(teacher_model, tokenizer, *blocks, LanguageCollator.of(tokenizer))
    tell(recipe, f"text: {prepared.facts}")
    return prepared


def distil_text(recipe: Recipe) -> dict[str, Any]:
    """Distils and saves a language student; returns the report."""
    started = time.time()
    args = recipe.args
    prepared = prepare(recipe)
    teacher_model, tokenizer, train_blocks, heldout, copies, is_chat, longer, collator = prepared
    batches = []
    if recipe.model.calibrates:
        rows = min(-(-recipe.model.calibration_tokens // recipe.data.block_size), len(train_blocks))
        for start in range(0, rows, CALIBRATION_ROWS):
            batch = collator([train_blocks[row] for row in range(start, min(start + CALIBRATION_ROWS, rows))])
            batches.append({"input_ids": batch["input_ids"].to(teacher_model.device)})
    tell(recipe, "student: being made, and its start fitted to the teacher ...")
    student = build_student(recipe.model, teacher_model, args.layer_map, batches).to(args.device)
    tell(recipe, f"student: {type(student).__name__}, {student.num_parameters():,} parameters; measuring it untrained")
    attention = attention_to_choose_from(recipe, student, teacher_model)
    teacher = make_teacher(teacher_model, args)

    check_data(recipe, train_blocks, heldout, longer)
    before = _evaluate(recipe.data, args, student, teacher.model, tokenizer, heldout)

    def run(first: int, last: int) -> list[dict[str, Any]]:
        histories = []
        for index in range(first, last):
            rows = prepared.rows_of(recipe.stages[index])
            history = run_stage(
                recipe.stages[index],
                student,
                teacher,
                (index + 1, len(recipe.stages)),
                train_dataset=rows,
                eval_dataset=_one_or_all(heldout),
                **prepared.trainer_options,
            )
            histories.append(history | {"tokens": history["examples"] * len(rows[0]["input_ids"])})
        return histories

    aligned = num_alignments(recipe)
    histories, chosen = run(0, aligned), {}
    if attention:
        tokens = _plain_tokens(tokenizer)
        chosen = {"kept_attention": keep_attention(recipe, student, teacher.model, attention, train_blocks, tokens)}
        attention.clear()
    histories += run(aligned, len(recipe.stages))
    tell(recipe, "measuring the trained student")
    report = {
        "teacher": recipe.model.teacher,
        "dataset": recipe.data.dataset,
        "copies": copies,
        "is_chat": is_chat,
        "student_parameters": student.num_parameters(),
        "teacher_parameters": teacher_model.num_parameters(),
        "train_tokens": sum(history["tokens"] for history in histories),
        "seconds": round(time.time() - started, 1),
        "before": before,
        "after": _evaluate(recipe.data, args, student, teacher.model, tokenizer, heldout),
        "stages": histories,
        **chosen,
        **run_facts(args),
        "folder": str(recipe.output_dir),
    }
    if recipe.is_main_process:
        student.save_pretrained(recipe.output_dir)
        tokenizer.save_pretrained(recipe.output_dir)
        if recipe.data.sample_prompt:
            report |= _sample(recipe.data, student, tokenizer, is_chat)
    return report


def _sample(
    data: DataArguments, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, is_chat: bool
) -> dict[str, str]:
    """What the student writes after the recipe's prompt; one that learnt conversations answers it as a user's turn."""
    prompt = data.sample_prompt
    if not is_chat:
        text = sample(student, tokenizer, prompt, data.sample_tokens, temperature=0.0)
    else:
        prompt = CHAT_PROMPT if prompt == default_of("sample_prompt") else prompt
        chat = Chat(student, tokenizer, max_new_tokens=data.sample_tokens, temperature=0.0)
        try:
            text = "".join(chat.answer(prompt))
        except ValueError as error:  # a template may want more than a user's turn; the training is not lost by that
            logger.warning(f"The card has no sample: {error}")
            return {}
    return {"sample_prompt": prompt, "sample": text}


def finetune(recipe: Recipe) -> dict[str, Any]:
    """Trains a language model itself on labels and saves it; returns the report, in which it stands as the student.

    What it gains on the text is adaptation: the control beside a student, and a teacher for one of that domain. Its
    weights are float32.
    """
    started = time.time()
    stage = recipe.only_stage
    args = stage.args
    if recipe.model.teacher_config:
        raise ValueError("`teacher_config` is for image classifiers; `finetune` trains a language model as it is.")
    set_seed(args.seed)
    with args.main_process_first(desc="teacher"):
        original, tokenizer = load_teacher(recipe.model.teacher)
    with args.main_process_first(desc="data"):
        model = original.to(args.device)
        train_blocks, heldout, copies, *_ = load_blocks(
            recipe.data, tokenizer, model, args, recipe.output_dir / "stages"
        )
    collator = LanguageCollator.of(tokenizer)
    check_packing(original, collator([train_blocks[0]]))
    if recipe.data.recall_gaps:  # whether the model has positions enough, before a long training
        copying_recall(original, _plain_tokens(tokenizer), max(recipe.data.recall_gaps), n=1, progress=False)
    if not any(parameter.requires_grad for parameter in original.parameters()):
        raise ValueError(
            f"`teacher` {recipe.model.teacher!r} loads with all its weights frozen, as an adapter's folder does. "
            "Merge the adapter (merge_and_unload) and save the model, or name its base model."
        )
    check_data(recipe, train_blocks, heldout)
    model, history = finetune_stage(
        stage,
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
        "copies": copies,
        "teacher_parameters": model.num_parameters(),
        "train_tokens": tokens,
        "after": _evaluate(recipe.data, stage.args, model, original, tokenizer, heldout),
        "stages": [history | {"tokens": tokens}],
        **run_facts(args),
        "folder": str(recipe.output_dir),
        "seconds": round(time.time() - started, 1),
    }
    if recipe.is_main_process:
        model.save_pretrained(recipe.output_dir)
        tokenizer.save_pretrained(recipe.output_dir)
    return report


def check_data(
    recipe: Recipe, blocks: Dataset, heldout: dict[str, Dataset], longer: Mapping[int, Dataset] | None = None
) -> None:
    """Refuses blocks other than those that the run began with. Called last before training, which makes the folder."""
    digests = {"training text": blocks_digest(blocks)} | {name: blocks_digest(one) for name, one in heldout.items()}
    digests |= {f"training text in rows of {size}": blocks_digest(one) for size, one in (longer or {}).items()}
    check_inputs(recipe.output_dir / "stages", digests, recipe.is_main_process)


def _one_or_all(heldout: dict[str, Dataset]) -> Dataset | dict[str, Dataset]:
    return heldout if len(heldout) > 1 else next(iter(heldout.values()))


def _evaluate(
    data: DataArguments,
    args: DistillationTrainingArguments,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    heldout: dict[str, Dataset],
) -> dict[str, dict[str, Any]] | None:
    """`compare`'s report of each text; the first one also holds the copying tests. None but on the first process."""
    if args.process_index:
        return None
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
    data: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedModel,
    args: DistillationTrainingArguments,
    folder: Path,
    sizes: Sequence[int] = (),
) -> tuple[Dataset, dict[str, Dataset], dict[str, int], bool, dict[int, Dataset]]:
    """Training blocks, those of the teacher's own text among them; by name, the blocks of each evaluated text, and
    how many of its documents are trained on, too; whether the training documents are conversations; and the training
    blocks of each of `sizes`.

    Args:
        data: of the recipe.
        tokenizer: the teacher's.
        teacher: writes text, where `data` asks for it.
        args: whose seed picks and places, and whose `torch_compile` is for the writing teacher.
        folder: where the teacher's text is kept.
        sizes: tokens of other blocks to train on.
    """
    for size in (data.block_size, *sizes):
        _check_teacher_text(replace(data, block_size=size), teacher)
    _check_changed_rows(data)

    def load(sources: list[str]) -> Dataset:
        return load_documents(
            sources if len(sources) > 1 else sources[0],
            config_name=data.dataset_config,
            split=data.dataset_split,
            text_column=data.text_column,
            encoding=data.encoding,
        )

    def pack(documents: Dataset, loss_on: LossOn, size: int = data.block_size) -> Dataset:
        return pack_documents(
            documents,
            tokenizer,
            size,
            isolate_documents=data.isolate_documents,
            loss_on=loss_on,
            num_proc=data.num_proc,
        )

    training = load(data.dataset)
    if data.eval_dataset:
        texts = {name: load([source]) for name, source in map(_named_source, data.eval_dataset)}
    else:
        training, kept = split_documents(training, data.holdout, seed=args.seed)
        texts = {f"held-out part of {', '.join(map(public_name, data.dataset))}": kept}
    copies = {name: tell_copies(training, text, name) for name, text in texts.items()}
    heldout = {name: pack(text, loss_of(data, text)) for name, text in texts.items()}
    written = [
        load_documents(_teacher_text(data, teacher, tokenizer, option, prompts, args, folder))
        for option, prompts in (("teacher_tokens", None), ("teacher_continuation_tokens", training))
        if getattr(data, option)
    ]

    def rows_to_train_on(size: int) -> Dataset:
        blocks = concatenate_datasets(
            [pack(training, data.loss_on, size), *(pack(one, "all", size) for one in written)]
        )
        blocks = insert_facts(blocks, data.fact_fraction, tokenizer, seed=args.seed)
        blocks = insert_repeats(blocks, data.repeat_fraction, _plain_tokens(tokenizer), seed=args.seed)
        if size > (num_positions(teacher) or size):  # a row with facts or repeats has become one document
            for row in blocks.with_format("torch"):
                check_positions(teacher, {name: value[None] for name, value in row.items()})
        return blocks

    # pairs of plain text are conversations, too, which no template is for
    is_chat = _are_conversations(training) and "messages" in json.loads(training[0]["conversation"])
    blocks, *longer = map(rows_to_train_on, (data.block_size, *sizes))
    return blocks, heldout, copies, is_chat, dict(zip(sizes, longer))


def loss_of(data: DataArguments, documents: Dataset) -> LossOn:
    """On which tokens an evaluated text is measured: of plain text on all."""
    return data.loss_on if _are_conversations(documents) else "all"


def _are_conversations(documents: Dataset) -> bool:
    return "conversation" in documents.column_names


def _teacher_text(
    data: DataArguments,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    option: str,
    prompts: Dataset | None,
    args: DistillationTrainingArguments,
    folder: Path,
) -> Path:
    """A file of as many tokens as `option` asks the teacher for; one that an earlier start wrote is kept."""
    path = folder / f"{option}.npz"
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
            seed=args.seed,
            torch_compile=args.torch_compile,
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


def _check_changed_rows(data: DataArguments) -> None:
    """Raises for shares of rows with repeats and facts that do not fit together, or not to the labels."""
    for option, what in (("repeat_fraction", "spans that come again"), ("fact_fraction", "facts and their questions")):
        if getattr(data, option) and data.loss_on != "all":
            raise ValueError(
                f"`{option}` is {getattr(data, option)}, but `loss_on` is {data.loss_on!r}: {what} are nobody's "
                f"answers. Set `{option}: 0`, or `loss_on: all`."
            )
    if data.repeat_fraction + data.fact_fraction > 1 and max(data.repeat_fraction, data.fact_fraction) <= 1:
        raise ValueError(
            f"`repeat_fraction` is {data.repeat_fraction} and `fact_fraction` is {data.fact_fraction}, but a row is "
            "given one of them. Let them add up to at most 1."
        )


def _plain_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The vocabulary without special tokens."""
    return sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))


def _named_source(text: str) -> tuple[str, str]:
    name, separator, source = text.partition("=")
    if not separator:
        raise ValueError(f"`eval_dataset` takes 'name=source', got {text!r}; for instance 'news={text}'.")
    return name, source


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
        turns = "user: {} assistant: {}" if report.get("is_chat") else "{}{}"
        text = textwrap.shorten(turns.format(report["sample_prompt"], report["sample"]), 600)
        lines += ["", textwrap.fill("sample: " + text, 110, subsequent_indent="        ")]
    return "\n".join([*lines, "", f"The {whose} is in {report['folder']}", ""])
