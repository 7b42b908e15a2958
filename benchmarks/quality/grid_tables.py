"""What the runs of a grid say together: tables over methods and data, and a plot."""

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grid_file import Grid


if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_CURVES = 6  # of methods, beside those without a curve
LOWER_IS_BETTER = ("kl", "ppl ratio")
WORDS = {
    "top1": "top-1 accuracy",
    "kl": "KL to the teacher",
    "agreement": "agreement with the teacher",
    "ppl ratio": "perplexity, times the teacher's",
}
TEXTS = {
    "brown (out of domain)": "the Brown corpus, out of domain",
    "python docs": "Python's documentation",
    "held-out part of the language reference of CPython": "held-out pages of Python's language reference",
}
Table = dict[str, dict[str, dict[str, dict[str, Any]]]]  # measure -> method -> data -> numbers


def tabulate(grid: Grid, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means and spreads over seeds, and differences to the reference over the seeds that both have.

    Returns:
        `reference`; `measures`: measure -> method -> data -> `mean`, `std` (of a sample; None for one seed), `seeds`
        (values in the order of their seeds), `seed_numbers`, `n`; `differences`: measure -> method -> data -> `mean`,
        `standard_error` (None for one seed), `n`. The mean is None where a value was not finite.
    """
    seeds: dict[str, dict[str, dict[str, dict[int, float | None]]]] = {}
    cells = [(method, data) for method in grid.methods for data in grid.data]
    for one in sorted(results, key=lambda one: (cells.index((one["method"], one["data"])), one["seed"])):
        for measure, value in one["measures"].items():
            columns = seeds.setdefault(measure, {}).setdefault(one["method"], {})
            columns.setdefault(one["data"], {})[one["seed"]] = value
    table: Table = {measure: {method: {} for method in methods} for measure, methods in seeds.items()}
    differences: Table = {measure: {} for measure in seeds}
    for measure, methods in seeds.items():
        for method, data in (cell for cell in cells if cell[1] in methods.get(cell[0], {})):
            values = methods[method][data]
            mean, std = _mean_and_std(list(values.values()))
            numbers = {"mean": mean, "std": std, "seeds": list(values.values()), "seed_numbers": list(values)}
            table[measure][method][data] = numbers | {"n": len(values)}
            others = methods.get(grid.reference, {}).get(data, {})
            pairs = [(values[seed], others[seed]) for seed in values if seed in others]
            if method != grid.reference and pairs:
                mean, std = _mean_and_std([None if None in pair else pair[0] - pair[1] for pair in pairs])
                error = None if std is None else std / math.sqrt(len(pairs))
                difference = {"mean": mean, "standard_error": error, "n": len(pairs)}
                differences[measure].setdefault(method, {})[data] = difference
    return {"reference": grid.reference, "measures": table, "differences": differences}


def _mean_and_std(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    if None in values:
        return None, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def markdown(grid: Grid, table: Table) -> str:
    """A table for each measure of at least two methods: the mean over seeds ± its spread, and how many."""
    lines = []
    for measure, methods in table.items():
        if len(methods) < 2:
            continue
        columns = [data for data in grid.data if any(data in cells for cells in methods.values())]
        best = {data: _best(measure, [cells[data] for cells in methods.values() if data in cells]) for data in columns}
        lines += [f"### {measure}", "", f"| method | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for method, cells in methods.items():
            row = [_cell(cells[data], best[data]) if data in cells else "-" for data in columns]
            lines.append(f"| {method} | {' | '.join(row)} |")
        lines.append("")
    return "\n".join(lines)


def _best(measure: str, column: Sequence[Mapping[str, Any]]) -> float | None:
    finite = [numbers["mean"] for numbers in column if numbers["mean"] is not None]
    if len(finite) < 2 or measure.endswith(", teacher"):
        return None
    return min(finite) if _lower_is_better(measure) else max(finite)


def _lower_is_better(measure: str) -> bool:
    return measure.rpartition(": ")[-1].lower() in LOWER_IS_BETTER


def _cell(numbers: Mapping[str, Any], best: float | None) -> str:
    mean, std, count = numbers["mean"], numbers["std"], numbers["n"]
    if mean is None:
        return f"not finite ({count})"
    digits = 4 if abs(mean) < 0.1 else 3 if abs(mean) < 10 else 2 if abs(mean) < 100 else 1
    text = f"{mean:.{digits}f}" if std is None else f"{mean:.{digits}f} ± {std:.{digits}f}"
    return f"**{text}** ({count})" if mean == best else f"{text} ({count})"


def in_words(measure: str) -> str:
    """What an axis says of a measure: "speeches: KL" is "KL to the teacher on speeches"."""
    text, _, kind = measure.rpartition(": ")
    return WORDS.get(kind.lower(), kind) + (f" on {TEXTS.get(text, text)}" if text else "")


def draw(grid: Grid, table: Table, path: Path) -> str:
    """Draws one measure over the data, or, of one column, a row a method; single seeds are small dots.

    Of many methods, those at a single one of several data are left to the table.

    Returns:
        The measure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    defaults = ["top1", *(measure for measure in table if measure.lower().endswith("kl")), *table]
    measure = next(name for name in [*grid.plot, *defaults] if name in table)
    columns = [data for data in grid.data if any(data in cells for cells in table[measure].values())]
    if grid.plot_data in columns:
        columns = [grid.plot_data]
    methods = {
        name: {data: cells[data] for data in columns if data in cells}
        for name, cells in table[measure].items()
        if any(data in cells for data in columns)
    }
    over_data = {name: cells for name, cells in methods.items() if len(cells) > 1}
    if over_data and len(methods) > MOST_CURVES:
        methods = over_data
    is_rows = len(columns) == 1
    figure = Figure(figsize=(8, 1.6 + 0.3 * len(methods) if is_rows else 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    (_draw_rows if is_rows else _draw_curves)(axes, methods, columns)
    values, data = (axes.xaxis, axes.yaxis) if is_rows else (axes.yaxis, axes.xaxis)
    better = "lower" if _lower_is_better(measure) else "higher"
    words = textwrap.fill(in_words(measure), 70 if is_rows else 42)
    values.set_label_text(f"{words}{' ' if is_rows else chr(10)}({better} is better)", fontsize=11)
    data.set_label_text("" if is_rows else grid.data_label, fontsize=11)
    figure.suptitle(textwrap.fill(grid.title, 75), fontsize=13)
    column = ": ".join(filter(None, (grid.data_label, columns[0]))) + "\n" if is_rows else ""
    axes.set_title(column + _what_is_shown(methods, is_rows), fontsize=10, color="dimgray")
    axes.tick_params(labelsize=11)
    values.grid(alpha=0.3)
    figure.savefig(path)
    return measure


def _what_is_shown(methods: Mapping[str, Mapping[str, Mapping[str, Any]]], is_rows: bool) -> str:
    counts = sorted({numbers["n"] for cells in methods.values() for numbers in cells.values()})
    if counts == [1]:
        return "one seed each"
    seeds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    return f"{'bars' if is_rows else 'lines and large marks'}: mean of {seeds} seeds, small dots: the seeds"


def _draw_rows(axes: "Axes", methods: Mapping[str, Mapping[str, Mapping[str, Any]]], columns: Sequence[str]) -> None:
    """A row a method: the mean as a bar across, single seeds as dots. Nothing is filled, so that no zero is needed."""
    (column,) = columns
    for index, numbers in enumerate(cells[column] for cells in methods.values()):
        if numbers["mean"] is not None:
            axes.plot([numbers["mean"]], [index], "|", color="C0", markersize=15, markeredgewidth=3)
        seeds = [value for value in numbers["seeds"] if value is not None]
        if len(seeds) > 1:
            axes.plot(seeds, [index] * len(seeds), "o", color="black", markersize=4, alpha=0.7)
    axes.set_yticks(range(len(methods)), methods)
    axes.set_ylim(len(methods) - 0.4, -0.6)
    axes.yaxis.grid(alpha=0.3)
    lowest, highest = axes.get_xlim()
    if 0 < lowest < 0.5 * highest:
        axes.set_xlim(left=0)


def _draw_curves(axes: "Axes", methods: Mapping[str, Mapping[str, Mapping[str, Any]]], columns: Sequence[str]) -> None:
    """A curve a method; a method at one column alone is a mark with its name beside it."""
    has_seeds = any(numbers["n"] > 1 for cells in methods.values() for numbers in cells.values())
    curves: dict[str, list[tuple[float, float]]] = {}
    single: dict[str, tuple[float, float]] = {}
    colors = {}
    for index, (method, cells) in enumerate(methods.items()):
        shown = [data for data in columns if data in cells and cells[data]["mean"] is not None]
        if not shown:
            continue
        # Side by side, or the seeds would hide each other.
        shift = 0.16 * (index / max(len(methods) - 1, 1) - 0.5) if has_seeds else 0.0
        colors[method] = f"C{index % 10}"
        look = {"color": colors[method], "marker": "osD^vPXp*h"[index % 10], "linewidth": 2, "markersize": 7}
        points = [(columns.index(data) + shift, cells[data]["mean"]) for data in shown]
        if len(points) == 1:
            single[method] = points[0]
        else:
            curves[method] = points
        label = method if method in curves else None
        axes.plot(*zip(*points), label=label, **look)
        for data in shown:
            seeds = [value for value in cells[data]["seeds"] if value is not None]
            if len(seeds) > 1:
                places = [columns.index(data) + shift] * len(seeds)
                axes.plot(places, seeds, "o", color=colors[method], markersize=3.5, alpha=0.6)
    axes.set_xticks(range(len(columns)), columns)
    for column in range(len(columns)):
        names = {method: mark for method, mark in single.items() if round(mark[0]) == column}
        crossed = [mean for points in curves.values() for place, mean in points if round(place) == column]
        _name_marks(axes, names, crossed, colors)
        if names and column == len(columns) - 1:  # room for the longest, at about 9 of 800 pixels a letter
            axes.set_xlim(right=column + 0.13 + max(1, column) * 0.018 * max(map(len, names)))
    if curves:
        widest = 70 + 8 * max(map(len, curves))  # of 800 pixels
        ncols = max(1, min(len(curves), 3, 800 // widest))
        axes.figure.legend(fontsize=11, loc="outside lower center", ncols=ncols)


def _name_marks(
    axes: "Axes", marks: Mapping[str, tuple[float, float]], crossed: Sequence[float], colors: Mapping[str, str]
) -> None:
    """Names to the right of the marks of a column, from below upwards, moved up where a curve or another name is."""
    low, high = axes.get_ylim()
    line, free = 0.06 * (high - low), low
    heights = [*((mean, None) for mean in crossed), *((mean, name) for name, (_, mean) in marks.items())]
    for height, name in sorted(heights, key=lambda one: one[0]):
        if name is not None:
            height = max(height, free)
            look = {"color": colors[name], "fontsize": 11, "va": "center"}
            leader = {"arrowstyle": "-", "color": colors[name], "shrinkA": 0, "shrinkB": 4}
            axes.annotate(name, marks[name], (round(marks[name][0]) + 0.13, height), arrowprops=leader, **look)
        free = max(free, height + line)
