"""Which bars are met, and by which students: `bars.json`, and `bars.md` for people, out of the run files beside this.

    python benchmarks/quality/bars.py

`rows` holds a student each: its training (`method`, `tokens`, `seeds`; means over these), `kl` on held-out texts and
`kl_tokens_a_row`, the predicted tokens of their rows; the share that it copies over gaps and of needles that it finds
by length, with its teacher's; `tasks_above_chance`, its share of the teacher's summed margin above chance, with the
paired interval; and the `run_files`. What was not measured is missing or null. `images` holds the top-1 of image
students, `bars` what is asked for and the row that comes closest.
"""

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from cab_hf.evaluation.length import FINDS
from cab_hf.files import write_whole
from cab_hf.recipe_options import default_of
from cab_hf.recipes import load_recipe


HERE = Path(__file__).parent

# Whose runs they are. A folder is one long run: report*.json of its parts in order, and evaluation*.json, of its
# controls, too. What was not trained has no report.
STUDENTS = (
    ("pure", "smollm2_long/runs/*.json"),
    ("pure", "distinct_text/runs/*.json"),
    ("pure", "pure_long"),
    ("pure", "fitted"),
    ("pure", "hybrids/runs/pure__*.json"),
    ("hybrid-0", "hybrids/runs/hybrid-0-kept__*.json"),
    ("hybrid-2", "hybrids/runs/hybrid-2-kept__*.json"),
    ("hybrid-4", "hybrids/runs/hybrid-4-kept__*.json"),
    ("hybrid-4", "hybrids/runs/auto-*.json"),
    ("hybrid-4", "hybrids/auto"),
    ("hybrid-4", "hybrids/four"),
    ("hybrid-4, windows", "windows/four"),
    ("hybrid-4, windows", "windows/facts"),
    ("hybrid-4, windows, not trained", "windows/four_untrained"),
    ("windows, not trained", "windows/none_untrained"),
    ("half as deep", "smollm2/runs/half-as-deep-*.json"),
    ("half as deep", "half_depth/runs/*.json"),
    ("the teacher on the same tokens", "smollm2/runs/the-teacher-itself-*.json"),
)
# Of one share of the images: the same student by rate, and the default.
IMAGES = (
    ("soft KD", "cifar10/runs/soft-kd__10-pct__*.json"),
    ("soft KD, other rates", "cifar10/runs/soft-kd-3e-[34]__10-pct__*.json"),
    ("CAB", "cifar10/runs/cab__10-pct__*.json"),
    ("CAB, other rates", "cifar10/runs/cab-[13]e-[234]__10-pct__*.json"),
    ("default", "cifar10/runs/outputs-then-kl__10-pct__*.json"),
)
TEXTS = ("speeches", "docs", "brown")
NEEDLES = ("needle", "needles", "key-value")
SEEDS = 3
"""Without which one method is not said to be ahead of another."""

Row = dict[str, Any]
Figures = dict[str, float | None]


class Bar(NamedTuple):
    """What is asked of some students; `bar` and `goal` are limits of the `figures` of a row, by name."""

    name: str
    students: Sequence[str]
    at_most_tokens: float
    bar: Mapping[str, float]
    goal: Mapping[str, float]
    figures: Callable[[Row], Figures]
    lower_is_better: bool = False


def collect(root: Path = HERE) -> list[Row]:
    """A row for each student that has run files, in the order of `STUDENTS`; of a grid, for each method and tokens."""
    rows = []
    for student, place in STUDENTS:
        if (root / place).is_dir():
            rows += _long_run(student, root / place, root)
        else:
            rows += _grid_rows(student, root, place)
    return rows


def _grid_rows(student: str, root: Path, place: str) -> list[Row]:
    rows = []
    for method, runs in _groups(root, place).items():
        reports = [run for _, run in runs]
        row = _row(student, method[0], [one["after"] for one in reports])
        row["teacher"] = reports[0]["options"]["teacher"]
        row |= {"tokens": reports[0]["train_tokens"], "seeds": [one["seed"] for one in reports]}
        # A loss that is trained is logged.
        row["bridge"] = any("bridge" in entry for stage in reports[0]["curve"] for entry in stage["log"])
        rows.append(row | {"run_files": [path.relative_to(root).as_posix() for path, _ in runs]})
    return rows


def _groups(root: Path, place: str) -> dict[tuple[str, str], list[tuple[Path, dict]]]:
    """Finished runs by method and data, seed by seed."""
    groups: dict[tuple[str, str], list[tuple[Path, dict]]] = {}
    for path in sorted(root.glob(place)):
        run = json.loads(path.read_text())
        groups.setdefault((run["method"], run["data"]), []).append((path, run))
    return {key: sorted(runs, key=lambda one: one[1]["seed"]) for key, runs in groups.items()}


def _long_run(student: str, folder: Path, root: Path) -> list[Row]:
    parts = sorted(folder.glob("report*.json"))
    reports = [json.loads(path.read_text()) for path in parts]
    if not reports:
        return [_untrained(student, folder, root)] if folder.is_dir() else []
    seed = load_recipe(folder / "recipe.yaml").get("seed", default_of("seed"))
    name = folder.relative_to(root).as_posix()
    row = _row(student, name, [reports[-1]["after"]])
    row |= {"teacher": reports[0]["teacher"], "tokens": sum(one["train_tokens"] for one in reports), "seeds": [seed]}
    row |= {"bridge": any("bridge" in entry for one in reports for part in one["stages"] for entry in part["log"])}
    row["run_files"] = [path.relative_to(root).as_posix() for path in parts]
    rows = [row]
    for path in sorted(folder.rglob("evaluation*.json")):
        found = json.loads(path.read_text())
        control = found.get("control")
        if control is not None:  # in the student's place, on the texts of the evaluation
            recall = {"recall": found.get("recall", {}).get("copying", {})}
            texts = {text: one | recall for text, one in found["texts"].items()}
            is_student = control == "zeroed"  # else its teacher, with a window
            who = f"{student}, {control}" if is_student else f"teacher, {control}"
            facts = {key: row[key] for key in ("teacher", "tokens", "seeds", "bridge")} | {"run_files": []}
            facts |= {} if is_student else {"tokens": 0, "seeds": []}
            rows.append(_row(who, name, [texts]) | facts)
        _add_evaluation(row if control is None else rows[-1], found, path.relative_to(root).as_posix())
    return rows


def _untrained(student: str, folder: Path, root: Path) -> Row:
    path = folder / "evaluation.json"
    found = json.loads(path.read_text())
    row = _row(student, folder.relative_to(root).as_posix(), [found["texts"]])
    row |= {"teacher": found["teacher"], "tokens": 0, "seeds": [], "bridge": False, "run_files": []}
    _add_evaluation(row, found, path.relative_to(root).as_posix())
    return row


def _add_evaluation(row: Row, found: Mapping[str, Any], file: str) -> None:
    row["run_files"].append(file)
    copying, teacher_copying = _recall(found.get("recall", {}).get("copying", {}))
    row["copying"] = copying | row["copying"]  # the report's where it has a gap, as the grids' rows
    row["teacher_copying"] = teacher_copying | row["teacher_copying"]
    for test in NEEDLES:
        both = _recall(found.get("length", {}).get("retrieval", {}).get(test, {}))
        row["needles"][test], row["teacher_needles"][test] = both
    if "tasks" in found:
        row["tasks_above_chance"] = found["tasks"]["above_chance"] | {"limit": found["tasks"]["limit"]}


def _row(student: str, method: str, reports: Sequence[Mapping[str, Any]]) -> Row:
    """Means over seeds; of each seed what a report says of each text, copying beside the first."""
    by_text = [{text: one[name] for text in TEXTS for name in one if text in name} for one in reports]
    seeds = {text: [one[text]["kl"] for one in by_text] for text in TEXTS if all(text in one for one in by_text)}
    recalls = [_recall(next(iter(one.values())).get("recall", {})) for one in reports]
    first = by_text[0]["speeches"]
    return {
        "student": student,
        "method": method,
        "kl": {text: fmean(values) for text, values in seeds.items()},
        "kl_seeds": seeds,
        "kl_tokens_a_row": round(first["n_tokens"] / first["n_blocks"]),
        "copying": {gap: fmean(own[gap] for own, _ in recalls) for gap in recalls[0][0]},
        "teacher_copying": recalls[0][1],
        "needles": {},
        "teacher_needles": {},
        "tasks_above_chance": None,
    }


def _recall(found: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """Of a student and of its teacher, by gap or length; a teacher is measured as far as its positions go."""
    student, teacher = (
        {place: one[who]["recall"] for place, one in found.items() if one[who] is not None}
        for who in ("student", "teacher")
    )
    return student, teacher


def collect_images(root: Path = HERE) -> list[Row]:
    """The same of image students, with their top-1 on the test images."""
    rows = []
    for student, place in IMAGES:
        for (method, data), runs in _groups(root, place).items():
            top1 = [run["measures"]["top1"] for _, run in runs]
            row = {"student": student, "method": method, "teacher": runs[0][1]["options"]["teacher"], "data": data}
            row |= {"seeds": [run["seed"] for _, run in runs], "top1": fmean(top1), "top1_seeds": top1}
            rows.append(row | {"run_files": [path.relative_to(root).as_posix() for path, _ in runs]})
    return rows


# What is asked for


def _kl(row: Row) -> Figures:
    return {text: row["kl"].get(text) for text in TEXTS}


def _copying(row: Row) -> Figures:
    ours, theirs = row["copying"], row["teacher_copying"]
    return {f"gap {gap}": ours[gap] / theirs[gap] if gap in ours else None for gap in ("256", "1024")}


def _found_again(row: Row) -> Figures:
    return {f"up to {length}": _least_share(row, length) for length in (4096, 8192)}


def _least_share(row: Row, length: int) -> float | None:
    """The smallest share of what the teacher copies and finds, up to a length at which all tests were made."""
    shares = []
    for ours, theirs in (
        (row["copying"], row["teacher_copying"]),
        *((row["needles"].get(test, {}), row["teacher_needles"].get(test, {})) for test in ("needle", "needles")),
    ):
        if str(length) not in ours.keys() & theirs.keys():
            return None
        # Where a teacher finds next to nothing, a test is no measure of its student.
        within = [place for place in theirs if int(place) <= length and theirs[place] >= FINDS]
        shares += [ours[place] / theirs[place] for place in within]
    return min(shares)


def _tasks(row: Row) -> Figures:
    found = row["tasks_above_chance"]
    return {"share": found and found["share"], "upper end of its interval": found and found["share_ci95"][1]}


PURE, HALF = ("pure",), ("half as deep",)
HYBRIDS = (*(f"hybrid-{n}" for n in range(1, 5)), "hybrid-4, windows")
BRIDGE = "lead of the bridge's worst seed"
BARS = (
    Bar(
        "pure, KL",
        PURE,
        60e6,
        {"speeches": 0.14, "docs": 0.20, "brown": 0.23},
        {"speeches": 0.12, "docs": 0.18, "brown": 0.20},
        _kl,
        lower_is_better=True,
    ),
    Bar(
        "pure, copying, share of the teacher's",
        PURE,
        60e6,
        {"gap 256": 0.9, "gap 1024": 0.5},
        {"gap 256": 1.0, "gap 1024": 0.9},
        _copying,
    ),
    Bar(
        "hybrid, KL",
        HYBRIDS,
        60e6,
        {"speeches": 0.08, "docs": 0.12, "brown": 0.14},
        {"speeches": 0.06, "docs": 0.10, "brown": 0.12},
        _kl,
        lower_is_better=True,
    ),
    Bar(
        "hybrid, copying and needles, share of the teacher's",
        HYBRIDS,
        60e6,
        {"up to 4096": 0.95},
        {"up to 8192": 0.95},
        _found_again,
    ),
    Bar("pure, tasks, share of the teacher's margin", PURE, 60e6, {"share": 0.90}, {"share": 0.95}, _tasks),
    Bar(
        "hybrid, tasks, share of the teacher's margin",
        HYBRIDS,
        60e6,
        {"upper end of its interval": 0.97},
        {"upper end of its interval": 1.0},
        _tasks,
    ),
    Bar("half as deep, KL", HALF, 20e6, {"speeches": 0.45}, {BRIDGE: 0.0}, _kl, lower_is_better=True),
)
IMAGE_BAR = {"CAB over soft KD at one rate": 0.12, "CAB over soft KD, each at its best rate": 0.18}
IMAGE_BAR |= {"default over CAB": 0.0}


def judge(rows: Sequence[Row], images: Sequence[Row]) -> list[dict[str, Any]]:
    """Whether each bar is met, and by which row; where none meets all of it, the row that comes closest.

    Returns:
        Of each bar `name`, `at_most_tokens`, `bar` and `goal`; `met` and `goal_met`; `row`, a place in `rows`, or None
        where no row has all figures; and its `figures`. The last one is that of the images, which has no goal.
    """
    found = []
    for bar in BARS:
        best = next(iter(_ranked(rows, bar)), None)
        place = next((place for place, row in enumerate(rows) if row is best), None)
        figures = dict.fromkeys([*bar.bar, *bar.goal]) if best is None else bar.figures(best)
        goal_met = _holds(figures, bar.goal, bar.lower_is_better)
        if BRIDGE in bar.goal:
            figures |= {BRIDGE: _lead_of_the_bridge(rows, bar)}
            goal_met = _holds(figures, bar.goal)
        verdict = {"met": _holds(figures, bar.bar, bar.lower_is_better), "goal_met": goal_met, "row": place}
        limits = {"at_most_tokens": int(bar.at_most_tokens), "bar": bar.bar, "goal": bar.goal}
        found.append({"name": bar.name} | limits | verdict | {"figures": figures})
    leads = _leads(images)
    found.append({"name": "images, top-1", "bar": IMAGE_BAR, "met": _holds(leads, IMAGE_BAR), "figures": leads})
    return found


def _ranked(rows: Sequence[Row], bar: Bar) -> list[Row]:
    """The rows that a bar asks for and that have all its figures, the closest first."""
    own = [row for row in _candidates(rows, bar) if None not in map(bar.figures(row).get, bar.bar)]
    return sorted(own, key=lambda row: _closeness(bar.figures(row), bar), reverse=True)


def _candidates(rows: Sequence[Row], bar: Bar) -> list[Row]:
    return [row for row in rows if row["student"] in bar.students and row["tokens"] <= bar.at_most_tokens]


def _holds(figures: Figures, limits: Mapping[str, float], lower_is_better: bool = False) -> bool:
    """What was not measured meets nothing."""
    measured = [(figures.get(name), limit) for name, limit in limits.items()]
    return all(one is not None and (one <= limit if lower_is_better else one >= limit) for one, limit in measured)


def _closeness(figures: Mapping[str, float], bar: Bar) -> tuple[float, float]:
    """How much of the bar is reached, 1 for all of it; and, among such rows, how far beyond it they are."""
    ratios = [
        limit / figures[name] if bar.lower_is_better else figures[name] / limit for name, limit in bar.bar.items()
    ]
    return fmean(min(one, 1.0) for one in ratios), fmean(ratios)


def _lead_of_the_bridge(rows: Sequence[Row], bar: Bar) -> float | None:
    """KL on speeches: the best seed of the best row without a bridge, less the worst one of the best row with it."""
    best = []
    for bridge in (True, False):
        own = [row for row in _candidates(rows, bar) if row["bridge"] == bridge and len(row["seeds"]) >= SEEDS]
        best.append(min(own, key=lambda row: row["kl"]["speeches"], default=None))
    if None in best:
        return None
    ours, others = (row["kl_seeds"]["speeches"] for row in best)
    return min(others) - max(ours)


def _leads(images: Sequence[Row]) -> dict[str, float | None]:
    best = {}
    for row in images:
        if len(row["seeds"]) >= SEEDS:
            for student in {row["student"], row["student"].partition(",")[0] + ", best"}:
                best[student] = max(best.get(student, -math.inf), row["top1"])
    pairs = (("CAB", "soft KD"), ("CAB, best", "soft KD, best"), ("default", "CAB"))
    return {
        name: best[ours] - best[theirs] if {ours, theirs} <= best.keys() else None
        for name, (ours, theirs) in zip(IMAGE_BAR, pairs)
    }


# For people

GAPS, LENGTHS = ("16", "64", "256", "1024"), ("256", "1024", "4096")
SHOWN = 3
"""Rows of pure students and of those half as deep: the closest to their bar, of their largest number of tokens."""


def markdown(rows: Sequence[Row], bars: Sequence[Mapping[str, Any]]) -> str:
    """One table of students beside the bars, and which bars are met."""
    columns = ["", "tokens", "seeds", "tokens a row", *(f"KL, {text}" for text in TEXTS)]
    columns += [f"copying, {int(gap):,}" for gap in GAPS]
    columns += [f"needle, {int(one):,}" for one in LENGTHS] + [f"4 needles, {int(one):,}" for one in LENGTHS]
    lines = [
        "# Students beside their bars",
        "",
        "Made by `python benchmarks/quality/bars.py` of the run files that [bars.json](bars.json) names. KL is to the "
        "teacher, in nats per token, on held-out text in rows of so many tokens. Copying is the share of random "
        "tokens that come right over a gap, needles the share of numbers found in a text of a length. Tasks is the "
        "share of the teacher's margin above chance, summed over tasks where the teacher is 3 standard errors above "
        "it, with its paired 95 % interval. Bars on copying and needles are shares of the teacher's, multiplied out. "
        "A dash is not measured. Of pure students and of those half as deep these are the "
        f"{SHOWN} closest to their bar, of the largest number of tokens that it allows.",
        "",
        f"| {' | '.join([*columns, 'tasks'])} |",
        "|---" + "|---:" * len(columns) + "|",
    ]
    teacher = {"kl": {}, "tasks_above_chance": None, "needles": {}, "copying": {}}
    for row in rows:
        teacher["copying"] = row["teacher_copying"] | teacher["copying"]
        teacher["needles"] = row["teacher_needles"] | teacher["needles"]
    lines.append(_line("teacher", ["", "", ""], teacher))
    for student in dict.fromkeys(row["student"] for row in rows):
        own = [row for row in rows if row["student"] == student]
        bar = next((bar for bar in BARS if bar.students == (student,)), None)
        if bar is not None:
            own = _ranked(own, bar)
            most = max((row["tokens"] for row in own), default=0)
            own = [row for row in own if row["tokens"] == most][:SHOWN]
        for row in own:
            facts = [f"{row['tokens'] / 1e6:.0f}M", str(len(row["seeds"])), f"{row['kl_tokens_a_row']:,}"]
            lines.append(_line(_name(row), facts, row))
    lines += [_bar_line(one, teacher) for one in bars if "goal" in one]
    lines += ["", "| | figure | bar | goal | met | closest row |", "|---|---|---|---|---|---|"]
    for one in bars:
        row = rows[one["row"]] if one.get("row") is not None else None
        lines.append(
            f"| {one['name']} | {_listed(one['figures'])} | {_listed(one['bar'])} | {_listed(one.get('goal', {}))} | "
            f"{'the goal' if one.get('goal_met') and one['met'] else 'yes' if one['met'] else 'no'} | "
            f"{'-' if row is None else _name(row)} |"
        )
    return "\n".join(lines) + "\n"


def _line(name: str, facts: Sequence[str], row: Mapping[str, Any]) -> str:
    figures = [row["kl"].get(text) for text in TEXTS] + [row["copying"].get(gap) for gap in GAPS]
    figures += [row["needles"].get(test, {}).get(one) for test in ("needle", "needles") for one in LENGTHS]
    tasks = row["tasks_above_chance"]
    share = "-" if tasks is None else "{:.2f} ({:.2f}-{:.2f})".format(tasks["share"], *tasks["share_ci95"])
    cells = [*(_figure(one, 3) for one in figures[:3]), *(_figure(one) for one in figures[3:]), share]
    return f"| {' | '.join([name, *facts, *cells])} |"


def _name(row: Row) -> str:
    return row["method"] if row["method"].startswith(row["student"]) else f"{row['student']}: {row['method']}"


def _bar_line(bar: Mapping[str, Any], teacher: Mapping[str, Any]) -> str:
    limits, name = bar["bar"], bar["name"].partition(", share")[0]
    of_all = limits.get("up to 4096")

    def least(share: float | None, found: float) -> str:
        return f"{share * found:.2f}" if share is not None and found >= FINDS else ""

    cells = [f"{limits[text]:.3f}" if text in limits else "" for text in TEXTS]
    cells += [least(limits.get(f"gap {gap}", of_all), teacher["copying"][gap]) for gap in GAPS]
    for test in ("needle", "needles"):
        cells += [least(of_all, teacher["needles"][test][one]) for one in LENGTHS]
    cells.append(f"{next(iter(limits.values())):.2f}" if "tasks" in name else "")
    return f"| **bar: {name}** | {bar['at_most_tokens'] / 1e6:.0f}M | | | {' | '.join(cells)} |"


def _listed(figures: Mapping[str, float | None]) -> str:
    return ", ".join(f"{name} {_figure(one, 3)}" for name, one in figures.items()) or "-"


def _figure(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows, images = collect(), collect_images()
    bars = judge(rows, images)
    write_whole(HERE / "bars.json", json.dumps({"rows": rows, "images": images, "bars": bars}, indent=1) + "\n")
    write_whole(HERE / "bars.md", markdown(rows, bars))
    print(*(f"{'met' if one['met'] else 'missed':>6}: {one['name']}" for one in bars), sep="\n")


if __name__ == "__main__":
    main()
