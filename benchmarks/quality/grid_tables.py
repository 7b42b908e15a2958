"""What the runs of a grid say together: tables over methods and data, and a plot."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from grid import Grid


MOST_CURVES = 6  # of methods, beside those without a curve
LOWER_IS_BETTER = ("kl", "ppl ratio")
Table = dict[str, dict[str, dict[str, dict[str, Any]]]]  # measure -> method -> data -> numbers


def tabulate(grid: "Grid", results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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


def markdown(grid: "Grid", table: Table) -> str:
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


def draw(grid: "Grid", table: Table, path: Path) -> str:
    """Draws one measure, 800 pixels wide, over the data, or bars of one column.

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
    methods = {name: cells for name, cells in table[measure].items() if any(data in cells for data in columns)}
    over_data = {name: cells for name, cells in methods.items() if len(cells.keys() & set(columns)) > 1}
    if over_data and len(methods) > MOST_CURVES:
        methods = over_data
    height = 1.5 + 0.3 * len(methods) if len(columns) == 1 else 5
    figure = Figure(figsize=(8, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    values = axes.xaxis if len(columns) == 1 else axes.yaxis
    for index, (method, cells) in enumerate(methods.items()):
        shown = [data for data in columns if cells.get(data, {}).get("mean") is not None]
        means = [cells[data]["mean"] for data in shown]
        spread = [cells[data]["std"] or 0.0 for data in shown]
        if len(columns) == 1:
            axes.barh([index] * len(means), means, xerr=spread, height=0.6, color="C0", alpha=0.6, capsize=4)
            seeds = [value for data in shown for value in cells[data]["seeds"]]
            axes.plot(seeds, [index] * len(seeds), "o", color="black", markersize=3)
        else:
            # Side by side, or the spreads would hide each other.
            shift = 0.16 * (index / max(len(methods) - 1, 1) - 0.5)
            places = [columns.index(data) + shift for data in shown]
            look = {"color": f"C{index % 10}", "marker": "osD^vP*X<>"[index % 10], "linewidth": 2, "capsize": 4}
            axes.errorbar(places, means, spread, label=method, **look)
    if len(columns) == 1:
        axes.set_yticks(range(len(methods)), methods)
        axes.invert_yaxis()
        seen = [value for cells in methods.values() for value in cells[columns[0]]["seeds"] if value is not None]
        if seen and min(seen) > 0.7 * max(seen):  # from zero, all would look alike
            axes.set_xlim(left=1.5 * min(seen) - 0.52 * max(seen))
    else:
        axes.set_xticks(range(len(columns)), columns)
        widest = 70 + 7 * max(map(len, methods))  # pixels of an entry
        columns_of_legend = max(1, min(len(methods), 3, 800 // widest))
        figure.legend(fontsize=11, loc="outside lower center", ncols=columns_of_legend)
    better = "lower" if _lower_is_better(measure) else "higher"
    counts = sorted({cells[data]["n"] for cells in methods.values() for data in columns if data in cells})
    seeds = f"{counts[0]} to {counts[-1]} seeds" if len(counts) > 1 else f"{counts[0]} seed{'s' * (counts[0] > 1)}"
    values.set_label_text(f"{measure} ({better} is better)", fontsize=12)
    shown_data = f", {columns[0]}" if len(columns) == 1 else ""
    axes.set_title(f"{grid.path.resolve().parent.name}{shown_data}: {measure}, mean ± std of {seeds}", fontsize=13)
    axes.tick_params(labelsize=11)
    values.grid(alpha=0.3)
    figure.savefig(path)
    return measure
