"""What a model card says, section by section, out of what was measured: nothing measured, nothing said."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult


class Head(NamedTuple):
    """What a student does, and how its card counts that.

    Attributes:
        task: its pipeline, and `pipeline_tag`.
        auto: the Auto class that loads it.
        description: the words for it.
        helper: class, name and file of what makes its inputs.
        metric: (type, name, key in reports, digits) of the result that counts.
        unit: what is counted, in the plural; reports have `n_<unit>`.
    """

    task: str
    auto: str
    description: str
    helper: tuple[str, str, str]
    metric: tuple[str, str, str, int]
    unit: str


_TOKENIZER = ("AutoTokenizer", "tokenizer", "tokenizer_config.json")
HEADS = {
    "CABMambaForCausalLM": Head(
        "text-generation",
        "AutoModelForCausalLM",
        "Mamba language model",
        _TOKENIZER,
        ("perplexity", "Perplexity per token", "perplexity", 2),
        "tokens",
    ),
    "CABHybridForCausalLM": Head(
        "text-generation",
        "AutoModelForCausalLM",
        "hybrid of Mamba and Transformer",
        _TOKENIZER,
        ("perplexity", "Perplexity per token", "perplexity", 2),
        "tokens",
    ),
    "CABMambaForSequenceClassification": Head(
        "text-classification",
        "AutoModelForSequenceClassification",
        "Mamba classifier of texts",
        _TOKENIZER,
        ("accuracy", "Accuracy", "accuracy", 3),
        "texts",
    ),
    "CABVisionMambaForImageClassification": Head(
        "image-classification",
        "AutoModelForImageClassification",
        "bidirectional Mamba for images",
        ("AutoImageProcessor", "image_processor", "preprocessor_config.json"),
        ("accuracy", "Top-1 accuracy", "top1", 3),
        "images",
    ),
}
_QUANTITIES = {
    "prefill": "prefill, tokens/s",
    "decode": "decoding, tokens/s",
    "images": "images/s",
    "peak_mib": "peak memory, MiB",
}
_WHO = ("teacher", "student")
CONTROLS = {
    "zeroed": "the student with mixers that give zero",
    "window": "the teacher, untrained, with a window of 64 tokens and 4 sinks",
}
EXPORTED = "stock"
"""The folder that the card's line exports to."""


def plain(text: Any) -> str:
    """A name that others chose, as one line that Markdown and HTML show as it is."""
    return re.sub(r"[\\`\[\]<>|*]|^[#+-]", r"\\\g<0>", " ".join(str(text).split()))


def eval_results(head: Head, metrics: Mapping[str, Mapping[str, Any]]) -> list[EvalResult]:
    """The results of the metadata: metric, interval, data set, split where it is known, and n.

    Raises:
        ValueError: a report lacks its metric or n.
    """
    kind, title, key, _ = head.metric
    results = []
    for name, report in metrics.items():
        count = _count(head, name, report)
        interval = {}
        if f"student_{key}_ci95" in report:
            interval = {"ci95": [_rounded(bound) for bound in report[f"student_{key}_ci95"]]}
        results.append(
            EvalResult(
                task_type=head.task,
                task_name=head.task.replace("-", " ").capitalize(),
                dataset_type=report.get("dataset") or re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
                dataset_name=" ".join(name.split()),
                dataset_split=report.get("split"),
                metric_type=kind,
                metric_name=f"{title} (n = {count:,} {head.unit})",
                metric_value=round(float(report[f"student_{key}"]), 4),
                metric_args={f"n_{head.unit}": count, **interval},
            )
        )
    return results


def result_table(head: Head, metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """The student's results beside its teacher's and those of other methods, under `baselines` of a report."""
    _, title, key, digits = head.metric
    rows = []
    for name, report in metrics.items():
        count = f"{_count(head, name, report):,}"
        if f"teacher_{key}" in report:
            equal = ["0", "1"] if "kl" in report else ["", ""]
            rows.append([name, "teacher", _interval(report, f"teacher_{key}", digits), *equal, count])
        for method, one in [*report.get("baselines", {}).items(), ("student", report)]:
            compared = [_interval(one, key, 3) for key in ("kl", "agreement")]
            rows.append([name, method, _interval(one, f"student_{key}", digits), *compared, count])
    kind = "images" if head.unit == "images" else "text"
    return _table(
        [kind, "model", title.lower(), f"KL, nats per {head.unit[:-1]}", "agreement", f"n {head.unit}"], rows, names=2
    )


def recall_table(recall: Mapping[str, Mapping[str, Any]]) -> str:
    """Recall of both models, a row a test and gap, as `cab_hf.runs.report.evaluate` reports it."""
    rows = [
        [test, gap, *(_interval(one[who], "recall", 3, "ci95") for who in _WHO), f"{one['student']['n_tokens']:,}"]
        for test, gaps in recall.items()
        for gap, one in gaps.items()
    ]
    return _table(["test", "gap", *_WHO, "n tokens"], rows, names=1)


def retrieval_table(length: Mapping[str, Any]) -> str:
    """What both models find again at each length, as `cab_hf.runs.report.evaluate` reports it."""
    rows = [
        [
            test,
            f"{int(tokens):,}",
            *("" if one[who] is None else _interval(one[who], "recall", 3, "ci95") for who in _WHO),
        ]
        for test, by_length in length["retrieval"].items()
        for tokens, one in by_length.items()
    ]
    return _table(["retrieval", "tokens", *_WHO], rows, names=1)


def loss_table(length: Mapping[str, Any]) -> str:
    """Loss of both models by position, as `cab_hf.runs.report.evaluate` reports it."""
    rows = [
        [
            f"{bucket['from']:,} to {bucket['to']:,}",
            *("" if bucket[who] is None else _interval(bucket[who], "nll", 3, "ci95") for who in _WHO),
            _interval(bucket, "difference", 3),
            _interval(bucket, "rise", 3),
            _interval(bucket, "difference_rise", 3),
        ]
        for bucket in length["loss"]["buckets"]
    ]
    names = ["loss behind tokens", *_WHO, "difference", "student's rise over 512", "the difference's"]
    return _table(names, rows, names=1)


def held(length: Mapping[str, Any]) -> str:
    """Up to which length the student holds, in a sentence or two."""
    holds = dict(length["holds_to"])
    whole = holds.pop("all")
    parts = ", ".join(f"{name} {tokens:,}" for name, tokens in holds.items())
    sentence = f"Length: the student holds to {whole:,} tokens ({parts})."
    measured = [int(tokens) for tokens in next(iter(length["retrieval"].values()))]
    if length["teacher_positions"] is not None and max(measured) > length["teacher_positions"]:
        sentence += f" Beyond the teacher's {length['teacher_positions']:,} positions the student alone was measured."
    return sentence


def task_table(tasks: Mapping[str, Any]) -> str:
    """Accuracy of both models, a row a task, as `cab_hf.runs.report.evaluate` reports it."""
    rows = []
    for name, row in tasks["rows"].items():
        models = (f"{row[who]['accuracy']:.3f} ± {row[who]['stderr']:.3f}" for who in _WHO)
        difference = _interval(row, "difference", 3)
        rows.append([name, row["metric"], f"{row['chance']:.3f}", *models, difference, f"{row['n_questions']:,}"])
    return _table(["task", "counted", "chance", *_WHO, "difference", "n questions"], rows, names=2)


def above_chance(tasks: Mapping[str, Any]) -> str:
    """How much of its teacher's margin above chance a student keeps, in a sentence."""
    found = tasks["above_chance"]
    if found["share"] is None:
        return "Tasks: the teacher is clearly above chance in none, so they say nothing of the student."
    return (
        f"Tasks: the student keeps {_interval(found, 'share', 2)} of its teacher's margin above chance, summed over "
        f"{', '.join(found['tasks'])}."
    )


def generation_table(generation: Mapping[str, Any]) -> str:
    """How much both models repeat themselves, as `cab_hf.runs.report.evaluate` reports it."""
    names = ("repetition_rate", "distinct_1", "distinct_2", "distinct_3")
    rows = [
        [way, who, *(f"{generation[who][way][name]:.3f}" for name in names), f"{generation[who][way]['n_tokens']:,}"]
        for way in ("greedy", "sampled")
        for who in _WHO
    ]
    return _table(["decoding", "model", "repeated", "distinct-1", "distinct-2", "distinct-3", "tokens"], rows, names=2)


def speed_table(speed: Mapping[str, Any]) -> str:
    """Speed and memory of both models at each length or batch size, as `cab_hf.runs.report.evaluate` reports them."""
    rows = []
    for row in speed["rows"]:
        for who in _WHO:
            values = [(row[who] or {}).get(name) for name in _QUANTITIES]
            rows.append([f"{row[speed['over']]:,}", who, *("" if one is None else f"{one:,.1f}" for one in values)])
    return _table([speed["over"], "model", *_QUANTITIES.values()], rows, names=2)


def crossings(speed: Mapping[str, Any]) -> list[str]:
    """From which length on the student is ahead, a sentence a quantity that was measured of both models."""
    over, rows = speed["over"], speed["rows"]
    sentences = []
    for name, crossing in speed["crossing"].items():
        if not _both(speed, name):
            continue
        where = f"is not ahead at the greatest {over} that was measured"
        if crossing is not None:
            always = crossing <= min(row[over] for row in rows)
            where = f"is ahead {f'at every {over} that was measured' if always else f'from about {crossing:,.0f} on'}"
        sentences.append(f"{_QUANTITIES[name].partition(',')[0].capitalize()}: the student {where}.")
    return sentences


def measured_on(evaluation: Mapping[str, Any]) -> str:
    """Hardware, dtype and way of an evaluation's speed."""
    speed = evaluation["speed"]
    facts = [evaluation.get("hardware"), evaluation.get("dtype")]
    if evaluation.get("threads") and "CPU" in str(evaluation.get("hardware")):
        facts.append(_count_of(evaluation["threads"], "thread"))
    if "batch_size" in speed:
        facts.append(f"batch size {speed['batch_size']}")
    facts.append(f"{_count_of(speed['repeats'], 'timed run')} each")
    return ", ".join(fact for fact in facts if fact)


def aligned(table: str) -> str:
    """The same table with cells of one width a column, for the terminal."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if not line.startswith("| ---")]
    rows = [[re.sub(r"\\(\W)", r"\1", cell) for cell in line] for line in lines]
    rows = [row + [""] * (len(rows[0]) - len(row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def limits(head: Head, metrics: Mapping[str, Mapping[str, Any]], evaluation: Mapping[str, Any]) -> list[str]:
    """What the measurements say against the student, in plain words; empty where they say nothing.

    Args:
        head: what the student does.
        metrics: name -> report, as in `build_card`.
        evaluation: its `recall`, `length` and `tasks` are read, where they are.
    """
    sentences = [sentence for item in metrics.items() for sentence in _quality_limits(head, *item)]
    retrieval = evaluation.get("length", {}).get("retrieval", {})
    tests = [*evaluation.get("recall", {}).values(), *retrieval.values()]
    pairs = [(one["student"], one["teacher"]) for by_place in tests for one in by_place.values()]
    if any(theirs and ours["ci95"][1] < theirs["ci95"][0] for ours, theirs in pairs):
        sentences.append(
            "Do not rely on it to repeat or look up what its context says: there it is clearly behind its teacher."
        )
    share = evaluation.get("tasks", {}).get("above_chance", {}).get("share_ci95")
    if share is not None and share[1] < 1:
        sentences.append("In tasks it is clearly behind its teacher.")
    return sentences


def ways_to_load(
    folder: Path, head: Head, repo_id: str | None, stock: tuple[str | None, str] | None, is_chat: bool = False
) -> list[tuple[str, str]]:
    """The ways to load the student that work, each with its code.

    Args:
        folder: the saved student.
        head: what it does.
        repo_id: Hub id under which it will be found; None for the folder itself.
        stock: (sub-folder, class) of a copy that transformers itself loads, None for one that an export would make;
            None where no class of transformers has the student's shape.
        is_chat: whether it learnt conversations, so that it is asked through its chat template.
    """
    helper, name, file = head.helper
    has_helper = (folder / file).is_file()
    names = sorted([helper, head.auto]) + ["pipeline"] if has_helper else [head.auto]
    last = [f'pipe = pipeline("{head.task}", model=model, {name}={name})'] if has_helper else []
    if is_chat and has_helper:
        last += [
            'messages = [{"role": "user", "content": "What is the capital of France?"}]',
            'print(pipe(messages)[0]["generated_text"][-1]["content"])',
        ]

    def code(place: str, imports: Sequence[str] = (), trusted: str = "", subfolder: str = "") -> str:
        first = [f"{name} = {helper}.from_pretrained({json.dumps(place)}{trusted})"] if has_helper else []
        load = f"model = {head.auto}.from_pretrained({json.dumps(place)}{trusted}{subfolder})"
        return "\n".join([*imports, f"from transformers import {', '.join(names)}", "", *first, load, *last])

    place, here = repo_id or ".", "" if repo_id else ", from inside this folder"
    uses = [(f"With the package `cab_hf` installed{here}:", code(place, ["import cab_hf"]))]
    if head.auto in json.loads((folder / "config.json").read_text()).get("auto_map", {}):
        title = f"Without it, by the modelling files beside the weights{here}:"
        uses.append((title, code(place, trusted=", trust_remote_code=True")))
    if stock is not None:
        subfolder, class_name = stock
        title = f"As the `{class_name}` of transformers itself"
        if subfolder is None:
            title += f", after `cab-hf export {place} {EXPORTED} --to stock`:"
            uses.append((title, code(EXPORTED)))
        else:
            uses.append((f"{title}{here}:", code(place, subfolder=f", subfolder={json.dumps(subfolder)}")))
    return uses


def _quality_limits(head: Head, name: str, report: Mapping[str, Any]) -> list[str]:
    _, title, key, _ = head.metric
    ours, theirs, name = report[f"student_{key}"], report.get(f"teacher_{key}"), plain(name)
    if theirs is None:
        return []
    if key == "perplexity":
        if ours <= theirs:
            return []
        sentence = f"{name}: its perplexity is {ours / theirs:.2f} times its teacher's"
        if "agreement" in report:
            sentence += f", and its likeliest token is the teacher's at {percent(report['agreement'])} of the places"
        return [f"{sentence}."]
    if ours >= theirs:
        return []
    count = _count(head, name, report)
    return [f"Of {count:,} {head.unit} ({name}) it gets {100 * ours:.1f} % right, its teacher {100 * theirs:.1f} %."]


def _both(speed: Mapping[str, Any], name: str) -> list[tuple[int, float, float]]:
    """(length or batch size, student's, teacher's) where both were measured."""
    values = [(row[speed["over"]], *((row[who] or {}).get(name) for who in reversed(_WHO))) for row in speed["rows"]]
    return [one for one in values if None not in one]


def _count(head: Head, name: str, report: Mapping[str, Any]) -> int:
    missing = [key for key in (f"student_{head.metric[2]}", f"n_{head.unit}") if key not in report]
    if missing:
        raise ValueError(
            f"The report on {name!r} lacks {missing} (it has {sorted(report)}), but a card of {head.task} needs them. "
            "Give what cab_hf.evaluation.compare or compare_images returns, or these numbers."
        )
    return int(report[f"n_{head.unit}"])


def _interval(report: Mapping[str, Any], name: str, digits: int, bounds_name: str | None = None) -> str:
    if name not in report:
        return ""
    value = f"{report[name]:.{digits}f}"
    bounds = report.get(bounds_name or f"{name}_ci95")
    if bounds is None or not all(map(math.isfinite, bounds)):
        return value
    return f"{value} ({bounds[0]:.{digits}f} to {bounds[1]:.{digits}f})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], names: int) -> str:
    """A table in Markdown, its first `names` columns to the left, without the columns in which nothing stands."""
    kept = [index for index in range(len(header)) if any(row[index] for row in rows)]
    lines = [
        header,
        ["---" if index < names else "---:" for index in range(len(header))],
        *([plain(cell) for cell in row] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line[index] for index in kept) + " |" for line in lines)


def _rounded(bound: float) -> float | str:
    # YAML has no finite way to write the open interval of a single block.
    return round(float(bound), 4) if math.isfinite(bound) else str(bound)


def percent(share: float) -> str:
    if 0 < share < 0.0005:
        return "under 0.1 %"
    return f"{100 * share:.{0 if share == 0 or share >= 0.0995 else 1}f} %"


def _count_of(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"
