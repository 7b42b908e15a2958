"""The report on a finished student: what it predicts, generates and recalls, how fast it is, beside its teacher.

Shape legend: `b` batch, `c` channel, `t` token, `n` rows, `V` label.
"""

import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cab_hf.data.augmentation import two_sizes
from cab_hf.data.documents import load_documents, split_documents
from cab_hf.data.image_sources import align_labels, load_images, pick_test_split
from cab_hf.data.images import ImageDataset, collate_images, normalisation, processor_side
from cab_hf.data.packing import pack_documents
from cab_hf.evaluation.controls import with_window, without_mixers
from cab_hf.evaluation.generation import generate
from cab_hf.evaluation.images import compare_images
from cab_hf.evaluation.language import Blocks, compare
from cab_hf.evaluation.length import RETRIEVAL, check_lengths, held_length, limits_of, loss_by_position, retrieval
from cab_hf.evaluation.metrics import crossing_length
from cab_hf.evaluation.plots import length_curves, recall_curves, speed_curves
from cab_hf.evaluation.recall import associative_recall, copying_recall
from cab_hf.evaluation.speed import image_speed, text_speed
from cab_hf.evaluation.tasks import compare_scores, score_tasks, tasks_in
from cab_hf.export.loading import load_image_processor, load_tokenizer, read_student
from cab_hf.files import write_whole
from cab_hf.hub import card_sections as sections
from cab_hf.hub.sources import dataset_facts, public_name
from cab_hf.inference import place_and_dtype
from cab_hf.models.modeling_cab_vision_mamba import CABVisionMambaPreTrainedModel
from cab_hf.recipe_options import DataArguments, ImageArguments
from cab_hf.recipes import EVALUATION_NAME, Recipe, read_recipe
from cab_hf.runs.card import check_finite
from cab_hf.runs.distill import holds_images
from cab_hf.runs.text import loss_of
from cab_hf.teachers.loading import load_image_teacher, load_teacher
from cab_hf.teachers.teacher import Teacher, check_vocabularies


LENGTHS = (256, 512, 1024, 2048)
GAPS = (16, 64, 256)
LONGEST = 2**20
BATCH_SIZES = (1, 4, 16)
PROMPT_TOKENS = 32


def evaluate(
    folder: str | Path,
    teacher: str,
    data: Sequence[str],
    *,
    output: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    max_tokens: int | None = 65536,
    lengths: Sequence[int] = LENGTHS,
    gaps: Sequence[int] = GAPS,
    batch_size: int = 8,
    block_size: int | None = None,
    prompts: int = 16,
    new_tokens: int = 64,
    retrieval_lengths: Sequence[int] = (),
    tasks: str | Path | None = None,
    task_limit: int | None = None,
    control: str | None = None,
    data_dir: str | Path | None = None,
    repeats: int = 3,
) -> dict[str, Any]:
    """Evaluates a saved student beside its teacher; what is measured is in `evaluation.json` and beside it in plots.

    Data that the student's `recipe.yaml` names as training data are evaluated on the part that the recipe held out.

    Args:
        folder: folder or Hub id of the student.
        teacher: Hub id or folder of its teacher, or "smollm2-demo".
        data: sources of `load_documents` or, for an image student, of `load_images`; each as it is or "name=source".
        output: folder to write; that of the student by default.
        device: where both models run; the GPU by default where there is one.
        dtype: of both models, "float32" or "bfloat16"; by default bfloat16 on a GPU, float32 elsewhere.
        max_tokens: predicted tokens of each text, or images of each set, at most; None for all.
        lengths: prompt lengths of the speed test; may be empty.
        gaps: gaps of the recall tests, in tokens; may be empty.
        batch_size: rows of a batch.
        block_size: tokens a row; by default the recipe's, or 512.
        prompts: held-out beginnings to continue, 0 for none.
        new_tokens: tokens of a continuation.
        retrieval_lengths: lengths at which retrieval and loss are measured, in tokens, of a language student. The
            teacher is measured as far as its positions go.
        tasks: folder of the files of `cab_hf.evaluation.tasks`, for a language student; needs `lm_eval`.
        task_limit: first questions of each task; None for all.
        control: what is measured in a language student's place, in quality and not in speed: "zeroed", itself with
            mixers that give zero (`without_mixers`), or "window", its teacher with a window (`with_window`).
        data_dir: folder of the images, where their source needs one; the recipe's by default.
        repeats: timed runs of each speed.

    Returns:
        What is in `evaluation.json`. A language student has `texts` (name -> `compare`), `generation`, `recall`,
        `length`, `tasks` (`compare_scores`) and `speed`. An image student has `images` (name -> `compare_images`) and
        `speed`. Each text or set of images also names its `split` and, if it is on the Hub, its `dataset`, where these
        are known. `length` has `retrieval` (as `recall`), `loss` (`loss_by_position`), `holds_to` (`held_length`),
        `teacher_positions`, the `text` that it read, and `seconds`.

    Raises:
        ValueError: a folder without a student, a teacher of other tokens or labels, an option that can't be.
        OSError: a teacher or data that are not there.
        FloatingPointError: a result that is not finite.
    """
    sizes = {"batch_size": batch_size, "max_tokens": max_tokens, "block_size": block_size, "new_tokens": new_tokens}
    sizes |= {"task_limit": task_limit}
    _check_options(data, lengths, retrieval_lengths, gaps, prompts, **sizes, repeats=repeats)
    if tasks is not None:
        tasks_in(tasks)
    if control is not None and (control not in sections.CONTROLS or output is None):
        raise ValueError(
            f"control is {control!r} and output {output}. The control is {' or '.join(sections.CONTROLS)}, and its "
            "report needs a folder of its own (--output)."
        )
    if output is None and not Path(folder).is_dir():
        reason = "is a file and no folder of a student" if Path(folder).is_file() else "is no folder here"
        raise ValueError(
            f"{folder} {reason}. Name the folder of a student; of one on the Hub, also an output folder (--output)."
        )
    output = Path(folder if output is None else output)
    if output.is_file():
        raise ValueError(f"output is {output}, which is a file. Name a folder for {EVALUATION_NAME} and the plots.")
    begin = time.perf_counter()
    place, dtype = place_and_dtype(device, dtype)
    student = read_student(folder)
    if student.dtype != dtype:
        # Unlike `.to`, loading leaves the transitions in float32.
        student = type(student).from_pretrained(folder, dtype=dtype).eval()
    student.to(place)
    recipe = read_recipe(Path(folder))
    report: dict[str, Any] = {
        "task": "image-classification" if isinstance(student, CABVisionMambaPreTrainedModel) else "text-generation",
        "student": public_name(str(folder)),
        "teacher": public_name(teacher),
        "student_parameters": student.num_parameters(),
        "dtype": str(dtype).removeprefix("torch."),
        "hardware": torch.cuda.get_device_name(place) if place.type == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers", "datasets")},
    }
    if report["task"] == "image-classification":
        if control is not None:
            raise ValueError(f"control is {control!r}, but {folder} is an image student. Leave it out.")
        settings = replace(recipe.images if recipe else ImageArguments())
        if len(data) == 1 and holds_images(Path(data[0]).expanduser()):  # as `cab-hf distill` takes it
            data, data_dir = ["imagefolder"], data[0]
        settings.data_dir = settings.data_dir if data_dir is None else str(data_dir)
        report |= _evaluate_images(
            student, folder, teacher, data, recipe.data if recipe else None, settings, batch_size, max_tokens, repeats
        )
    else:
        own = load_tokenizer(folder)
        teacher_model, tokenizer = _load_teacher(load_teacher, teacher)
        teacher_size = teacher_model.config.get_text_config().vocab_size
        check_vocabularies(student.config.vocab_size, teacher_size, own, tokenizer if own else None)
        teacher_model.to(place, dtype).eval()
        if control is not None:
            report["control"] = control
            student = without_mixers(student) if control == "zeroed" else with_window(teacher_model)
        models = {"teacher": teacher_model, "student": student}
        texts, origins = {}, {}
        for one in data:
            name, blocks, origin = _load_text(one, tokenizer, recipe, block_size)
            texts[name], origins[name] = blocks, origin
        if retrieval_lengths:
            first_text = torch.cat([torch.as_tensor(row["input_ids"]) for row in next(iter(texts.values()))])
            check_lengths(tokenizer, first_text, retrieval_lengths)
        report["teacher_parameters"] = teacher_model.num_parameters()
        report["texts"] = {}
        for name, blocks in texts.items():
            compared = compare(student, teacher_model, blocks, batch_size, max_tokens=max_tokens)
            check_finite(name, compared)
            report["texts"][name] = compared | origins[name]
        if prompts:
            starts = _prompts(next(iter(texts.values())), prompts)
            report["generation"] = {
                "prompts": f"{len(starts)} of {starts.shape[1]} tokens, from {next(iter(texts))}",
                **{who: generate(model, starts, new_tokens, batch_size) for who, model in models.items()},
            }
        if gaps:
            report["recall"] = _recall(models, tokenizer, gaps, batch_size)
        if retrieval_lengths:
            report["length"] = _length(models, tokenizer, first_text, retrieval_lengths, batch_size)
            report["length"]["text"] = next(iter(texts))
        if tasks is not None:
            report["tasks"] = _tasks(models, tokenizer, tasks, task_limit, batch_size)
        if lengths and control is None:
            report["speed"] = _text_speed(models, sorted(lengths), repeats)
    output.mkdir(parents=True, exist_ok=True)
    report["plots"] = _draw(report, output)
    report["seconds"] = round(time.perf_counter() - begin, 1)
    write_whole(output / EVALUATION_NAME, json.dumps(report, indent=1) + "\n")
    return report


def describe(report: Mapping[str, Any]) -> str:
    """The report of `evaluate` as the tables of its card, for the terminal."""
    head = next(head for head in sections.HEADS.values() if head.task == report["task"])
    tables = [sections.result_table(head, report.get("texts") or report["images"])]
    tables += [sections.generation_table(report["generation"])] if "generation" in report else []
    tables += [sections.recall_table(report["recall"])] if "recall" in report else []
    tables += (
        [sections.retrieval_table(report["length"]), sections.loss_table(report["length"])]
        if "length" in report
        else []
    )
    tables += [sections.task_table(report["tasks"])] if "tasks" in report else []
    tables += [sections.speed_table(report["speed"])] if "speed" in report else []
    parts = list(map(sections.aligned, tables))
    lines = [sections.above_chance(report["tasks"])] if "tasks" in report else []
    lines += [sections.held(report["length"])] if "length" in report else []
    lines += sections.crossings(report["speed"]) if "speed" in report else []
    if "control" in report:
        lines.append(f"In the student's place: {sections.CONTROLS[report['control']]}.")
    took = [f"{report['seconds']:,} s"] if "seconds" in report else []
    took += [f"{name} {report[name]['seconds']:,} s" for name in ("length", "tasks") if name in report]
    lines.append(", ".join([f"{report['dtype']} on {report['hardware']}", *took]))
    parts.append("\n".join(f"  {line}" for line in lines))
    return "\n\n".join(parts)


def _check_options(
    data: Sequence[str],
    lengths: Sequence[int],
    retrieval_lengths: Sequence[int],
    gaps: Sequence[int],
    prompts: int,
    **sizes: int | None,
) -> None:
    if isinstance(data, str) or not data:
        raise ValueError(f"data is {data!r}. Give a list of at least one source, such as ['builtin'].")
    of_rows = {"lengths": lengths, "retrieval_lengths": retrieval_lengths}
    at_least_one = sizes | {name: min(values, default=1) for name, values in of_rows.items()}
    wrong = {name: value for name, value in at_least_one.items() if value is not None and value < 1}
    wrong |= {name: value for name, value in (("prompts", prompts), ("gaps", min(gaps, default=0))) if value < 0}
    if wrong:
        name, value = next(iter(wrong.items()))
        raise ValueError(f"{name} is {value}; it must be at least {1 if name in at_least_one else 0}.")
    if sizes.get("task_limit") == 1:
        raise ValueError("task_limit is 1, and one question has no standard error. Give at least 2.")
    for name, values in of_rows.items():
        if max(values, default=1) > LONGEST:
            raise ValueError(f"{name} has {max(values):,}; the longest prompt is {LONGEST:,} tokens. Leave it out.")


def _load_teacher(load: Callable[[str], tuple[PreTrainedModel, Any]], name: str) -> tuple[PreTrainedModel, Any]:
    try:
        return load(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The teacher {name!r} can't be loaded: {error} Name a Hub id, or the folder of a teacher that was saved "
            "with its tokenizer or image processor."
        ) from error


def _named(source: str) -> tuple[str | None, str]:
    name, separator, rest = source.partition("=")
    return (name, rest) if separator and not Path(source).exists() else (None, source)


def _load_text(
    source: str, tokenizer: PreTrainedTokenizerBase, recipe: Recipe | None, block_size: int | None
) -> tuple[str, Blocks, dict[str, str]]:
    name, source = _named(source)
    settings = recipe.data if recipe else DataArguments()
    is_of_training = recipe is not None and source in settings.dataset and not settings.eval_dataset
    documents = load_documents(
        settings.dataset if is_of_training else source,
        config_name=settings.dataset_config if is_of_training else None,
        split=settings.dataset_split if is_of_training else None,
        text_column=settings.text_column if is_of_training else None,
        encoding=settings.encoding,
    )
    default, origin = public_name(source), dataset_facts([source], None)
    if is_of_training:
        documents = split_documents(documents, settings.holdout, seed=recipe.args.seed)[1]
        default = f"held-out part of {', '.join(map(public_name, settings.dataset))}"
        origin = dataset_facts(settings.dataset, "held-out")
    elif recipe is not None and source in settings.dataset:
        print(f"The student was trained on all of {source}: what is measured there is no held-out text.")
        origin = origin | {"copies": len(documents)}
    blocks = pack_documents(
        documents,
        tokenizer,
        block_size or settings.block_size,
        isolate_documents=settings.isolate_documents,
        loss_on=loss_of(settings, documents),
    )
    return name or default, blocks, origin


def _prompts(blocks: Blocks, count: int) -> Tensor:
    """The first tokens of up to `count` rows (n, PROMPT_TOKENS), spread over the text."""
    rows = np.unique(np.linspace(0, len(blocks) - 1, min(count, len(blocks))).round().astype(int))
    starts = [list(blocks[int(row)]["input_ids"])[:PROMPT_TOKENS] for row in rows]
    return torch.tensor(starts)


def _recall(
    models: Mapping[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase, gaps: Sequence[int], batch_size: int
) -> dict[str, dict[str, dict[str, Any]]]:
    tokens = _plain_tokens(models, tokenizer)
    tests = {"copying": copying_recall, "associative": associative_recall}
    return {
        name: {
            str(gap): {who: test(model, tokens, gap, batch_size=batch_size) for who, model in models.items()}
            for gap in sorted(gaps)
        }
        for name, test in tests.items()
    }


def _plain_tokens(models: Mapping[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that both models have rows for, without special ones."""
    rows = min(model.get_input_embeddings().weight.shape[0] for model in models.values())
    return sorted(set(range(min(len(tokenizer), rows))) - set(tokenizer.all_special_ids))


def _length(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    text: Tensor,
    lengths: Sequence[int],
    batch_size: int,
) -> dict[str, Any]:
    begin, lengths, limits = time.perf_counter(), sorted(lengths), limits_of(models)
    tokens = _plain_tokens(models, tokenizer)
    measured = {
        length: {
            who: retrieval(model, tokenizer, tokens, text, length, batch_size=batch_size)
            if limits[who] is None or length <= limits[who]
            else None
            for who, model in models.items()
        }
        for length in lengths
    }
    found = {
        test: {str(length): {who: one and one[test] for who, one in measured[length].items()} for length in lengths}
        for test in RETRIEVAL
    }
    loss = loss_by_position(models, text, lengths[-1], limits=limits)
    return {
        "retrieval": found,
        "loss": loss,
        "holds_to": held_length(lengths, found, loss),
        "teacher_positions": limits["teacher"],
        "seconds": round(time.perf_counter() - begin, 1),
    }


def _tasks(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    limit: int | None,
    batch_size: int,
) -> dict[str, Any]:
    start = time.perf_counter()
    scores = {
        who: score_tasks(model, tokenizer, folder, limit=limit, batch_size=batch_size) for who, model in models.items()
    }
    facts = {"limit": limit, "lm_eval": version("lm_eval"), "seconds": round(time.perf_counter() - start, 1)}
    return compare_scores(scores["student"], scores["teacher"]) | facts


def _text_speed(models: Mapping[str, PreTrainedModel], lengths: Sequence[int], repeats: int) -> dict[str, Any]:
    rows = [
        {"length": length, **{who: text_speed(model, length, repeats=repeats) for who, model in models.items()}}
        for length in lengths
    ]

    def of(who: str, name: str) -> list[float | None]:
        return [(row[who] or {}).get(name) for row in rows]

    crossing = {
        name: crossing_length(lengths, of("student", name), of("teacher", name)) for name in ("prefill", "decode")
    }
    # Less memory is ahead.
    crossing["peak_mib"] = crossing_length(lengths, of("teacher", "peak_mib"), of("student", "peak_mib"))
    return {"over": "length", "batch_size": 1, "repeats": repeats, "rows": rows, "crossing": crossing}


def _evaluate_images(
    student: PreTrainedModel,
    folder: str | Path,
    teacher: str,
    data: Sequence[str],
    trained_on: DataArguments | None,
    settings: ImageArguments,
    batch_size: int,
    max_images: int | None,
    repeats: int,
) -> dict[str, Any]:
    model, teachers_processor = _load_teacher(load_image_teacher, teacher)
    height, width = student.config.image_height_and_width
    if height != width:
        raise ValueError(f"The student's images are {height} x {width}; images of a data set are made square.")
    teacher_size = processor_side(teachers_processor)
    if model.base_model is not model and model.config.num_labels != student.config.num_labels:
        raise ValueError(
            f"The teacher has {model.config.num_labels} labels and the student {student.config.num_labels}. Name the "
            "teacher that it was distilled from."
        )
    borrowed = Teacher(model.to(student.device, student.dtype))
    mean, std = normalisation(load_image_processor(folder) or teachers_processor)
    results = {}
    for source in data:
        name, source = _named(source)
        is_of_training = trained_on is not None and source in trained_on.dataset
        loaded = load_images(
            source,
            data_dir=settings.data_dir,
            image_column=settings.image_column,
            label_column=settings.label_column,
            config_name=trained_on.dataset_config if is_of_training else None,
        )
        split, rows = None, loaded
        if is_of_training or not isinstance(loaded, Dataset):
            train_split = trained_on.dataset_split if is_of_training else None
            _, rows, split = pick_test_split(loaded, train_split, settings.test_split, source)
        ours = [student.config.id2label[index] for index in range(student.config.num_labels)]
        places = align_labels(rows.features["label"].names, ours, source)[1]
        if max_images is not None and max_images < len(rows):
            # Sets are often sorted by class.
            rows = rows.select(np.linspace(0, len(rows) - 1, max_images).round().astype(int))
        images = ImageDataset(
            rows,
            settings.load_size or max(height, teacher_size),
            transform=settings.test_crop,
            crop_pct=settings.crop_pct,
            num_channels=student.config.num_channels,
            skip_broken=settings.skip_broken,
        )
        images.labels = [places[label] for label in images.labels]
        batches = _image_batches(images, batch_size, (height, teacher_size), (mean, std), student)
        compared = compare_images(student, borrowed, batches)
        name = name or f"{Path(source).name} test images"
        check_finite(name, compared)
        results[name] = compared | dataset_facts([source], split)
    teacher_model = borrowed.restore()
    rows = [
        {
            "batch size": size,
            "teacher": image_speed(teacher_model, teacher_size, size, repeats=repeats),
            "student": image_speed(student, height, size, repeats=repeats),
        }
        for size in tqdm(BATCH_SIZES, desc="Speed")
    ]
    speed = {"over": "batch size", "repeats": repeats, "rows": rows, "crossing": {}}
    return {"teacher_parameters": teacher_model.num_parameters(), "images": results, "speed": speed}


def _image_batches(
    images: ImageDataset,
    batch_size: int,
    sizes: tuple[int, int],
    scale: tuple[Sequence[float], Sequence[float]],
    student: PreTrainedModel,
) -> Iterator[dict[str, Tensor]]:
    mean, std = (torch.tensor(values, device=student.device).view(-1, 1, 1) for values in scale)
    for batch in tqdm(DataLoader(images, batch_size, collate_fn=collate_images), desc="Comparing"):
        pixels = (batch["pixel_values"].to(student.device).float() / 255 - mean) / std  # (b, c, height, width)
        ours, theirs = (shown.to(student.dtype) for shown in two_sizes(pixels, *sizes))
        yield {"pixel_values": ours, "teacher_pixel_values": theirs, "labels": batch["labels"]}


def _draw(report: Mapping[str, Any], output: Path) -> list[str]:
    """Names of the plots; none where matplotlib, which is optional, is missing."""
    names = []
    try:
        if "recall" in report:
            names.append(recall_curves(report["recall"], output / "recall.png").name)
        if "length" in report:
            names.append(length_curves(report["length"], output / "length.png").name)
        if "speed" in report:
            names.append(speed_curves(report["speed"], output / "speed.png").name)
    except ImportError as error:
        print(f"No plots are drawn: {error}")
    return names
