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
    "prefill": ("prefill, tokens/s", "reads more slowly than"),
    "decode": ("decoding, tokens/s", "writes more slowly than"),
    "images": ("images/s", "is slower than"),
    "peak_mib": ("peak memory, MiB", "takes more memory than"),
}
_RECALL = {
    "copying": ("Of random tokens in its context", "copies"),
    "associative": ("Of values in its context, asked for by their keys,", "finds"),
}
_WHO = ("teacher", "student")
EXPORTED = "stock"
"""The folder that the card's line exports to."""


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
                dataset_name=name,
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
    """Speed and memory of both models, a row a length or batch size, as `cab_hf.runs.report.evaluate` reports them."""
    over = speed["over"]
    header = [over, *(f"{title}: {who}" for title, _ in _QUANTITIES.values() for who in _WHO)]
    rows = []
    for row in speed["rows"]:
        values = [(row[who] or {}).get(name) for name in _QUANTITIES for who in _WHO]
        rows.append([f"{row[over]:,}", *("" if one is None else f"{one:,.1f}" for one in values)])
    return _table(header, rows, names=0)


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
        sentences.append(f"{_QUANTITIES[name][0].partition(',')[0].capitalize()}: the student {where}.")
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


def limits(head: Head, metrics: Mapping[str, Mapping[str, Any]], evaluation: Mapping[str, Any]) -> list[str]:
    """What the measurements say against the student, in plain words; empty where nothing was measured.

    Args:
        head: what the student does.
        metrics: name -> report, as in `build_card`.
        evaluation: `recall`, `generation` and `speed` of it are read, where they are.
    """
    sentences = [sentence for item in metrics.items() for sentence in _quality_limits(head, *item)]
    if "recall" in evaluation:
        sentences += _recall_limits(evaluation["recall"])
    if "generation" in evaluation:
        ours, theirs = (evaluation["generation"][who]["greedy"]["repetition_rate"] for who in reversed(_WHO))
        if ours > theirs:
            sentences.append(
                f"Decoding greedily it repeats itself: {percent(ours)} of its 4-grams occurred before in the same "
                f"text, {percent(theirs)} of its teacher's."
            )
    if "speed" in evaluation:
        sentences += _speed_limits(evaluation["speed"], evaluation.get("hardware"))
    return sentences


def ways_to_load(
    folder: Path, head: Head, repo_id: str | None, stock: tuple[str | None, str] | None
) -> list[tuple[str, str]]:
    """The ways to load the student that work, each with its code.

    Args:
        folder: the saved student.
        head: what it does.
        repo_id: Hub id under which it will be found; None for the folder itself.
        stock: (sub-folder, class) of a copy that transformers itself loads, None for one that an export would make;
            None where no class of transformers has the student's shape.
    """
    helper, name, file = head.helper
    has_helper = (folder / file).is_file()
    names = sorted([helper, head.auto]) + ["pipeline"] if has_helper else [head.auto]
    last = [f'pipe = pipeline("{head.task}", model=model, {name}={name})'] if has_helper else []

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
    ours, theirs = report[f"student_{key}"], report.get(f"teacher_{key}")
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


def _recall_limits(recall: Mapping[str, Mapping[str, Any]]) -> list[str]:
    sentences, is_behind = [], False
    for test, gaps in recall.items():
        start, verb = _RECALL[test]
        clauses = []
        for is_nothing in (False, True):
            chosen = {gap: one for gap, one in gaps.items() if (one["student"]["recall"] == 0) == is_nothing}
            if not chosen:
                continue
            own = "nothing" if is_nothing else _and([percent(one["student"]["recall"]) for one in chosen.values()])
            others = [percent(one["teacher"]["recall"]) for one in chosen.values()]
            clauses.append(
                f"{own} over {'a gap' if len(chosen) == 1 else 'gaps'} of {_and(list(chosen))} tokens, where its "
                f"teacher {verb} {_and(others)}"
            )
        if clauses:
            sentences.append(f"{start} it {verb} {', and '.join(clauses)}.")
        is_behind |= any(one["student"]["ci95"][1] < one["teacher"]["ci95"][0] for one in gaps.values())
    verdict = "In these tests its recall was not measurably below its teacher's."
    if is_behind:
        verdict = (
            "Do not rely on it to repeat or look up what its context says: there it is clearly behind its teacher."
        )
    return [*sentences, verdict]


def _speed_limits(speed: Mapping[str, Any], hardware: str | None) -> list[str]:
    over = speed["over"]
    sentences = []
    for name, (title, verb) in _QUANTITIES.items():
        behind = [
            (where, ours, theirs)
            for where, ours, theirs in _both(speed, name)
            if (ours > theirs if name == "peak_mib" else ours < theirs)
        ]
        if not behind:
            continue
        where, ours, theirs = ([_number(value) for value in values] for values in zip(*behind))
        place = f"{'a ' if len(behind) == 1 else ''}{_plural(over, len(behind))} of {_and(where)}"
        place += " tokens" if over == "length" else ""
        sentences.append(
            f"At {place} it {verb} its teacher{f' on {hardware}' if hardware else ''}: {_and(ours)} against "
            f"{_and(theirs)} ({title})."
        )
    return sentences


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
    lines = [header, ["---" if index < names else "---:" for index in range(len(header))], *rows]
    return "\n".join("| " + " | ".join(line[index].replace("|", "\\|") for index in kept) + " |" for line in lines)


def _rounded(bound: float) -> float | str:
    # YAML has no finite way to write the open interval of a single block.
    return round(float(bound), 4) if math.isfinite(bound) else str(bound)


def percent(share: float) -> str:
    if 0 < share < 0.0005:
        return "under 0.1 %"
    return f"{100 * share:.{0 if share == 0 or share >= 0.0995 else 1}f} %"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _count_of(count: int, thing: str) -> str:
    return f"{count} {_plural(thing, count)}"


def _plural(thing: str, count: int) -> str:
    return thing if count == 1 else f"{thing}s"
