"""Pictures of a run. Needs matplotlib, which is optional."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from matplotlib.figure import Figure


_LABELS = {
    "loss": "total",
    "kl": "KL to teacher",
    "ce": "cross-entropy",
    "bridge": "attention bridge",
    "output": "mixer output",
    "hidden": "hidden state",
    "attention": "attention map",
}
_QUANTITIES = {
    "prefill": "prefill, tokens/s",
    "decode": "decoding, tokens/s",
    "peak_mib": "peak memory, MiB",
    "images": "images/s",
}
_OVER = {"length": "length of the text, tokens", "batch size": "images in a batch"}
_WHO = {
    "teacher": {"color": "C1", "linestyle": "--", "marker": "s"},
    "student": {"color": "C0", "linestyle": "-", "marker": "o"},
}


def learning_curves(
    log_history: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    title: str | None = None,
    stages: Mapping[str, int] | None = None,
) -> Path:
    """Draws each part of the loss over the steps, on a logarithmic scale; held-out values as diamonds.

    Args:
        log_history: `trainer.state.log_history`, or that of several stages one after the other.
        path: Picture to write, 1600 pixels wide; its suffix picks the format, such as .png or .svg.
        title: Written above the curves.
        stages: Name of a stage -> step before its first one. Where a stage begins, curves are interrupted.

    Returns:
        `path`.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: The history holds no positive loss.
    """
    curves = {name: _points(log_history, name) for name in _LABELS}
    curves = {name: points for name, points in curves.items() if points[0]}
    if not curves:
        raise ValueError(
            f"log_history has {len(log_history)} entries and no positive value of {', '.join(_LABELS)}. "
            "Log at least once: logging_steps at most the number of steps."
        )
    begins = sorted((stages or {}).values())
    figure = _figure("Learning curves", title)
    axes = figure.add_subplot()
    for name, (steps, values) in curves.items():
        is_total = name == "loss"
        # One colour a part, the same in every picture; the total is seen above a part that is all of it.
        style = {"color": "black", "linestyle": "--", "linewidth": 1.5, "zorder": 3}
        if not is_total:
            style = {"color": f"C{list(_LABELS).index(name) - 1}", "linewidth": 2.5}
        # A curve of few points would be invisible as a thin line.
        style |= {"marker": "o" if len(steps) < 20 else "", "markersize": 3 if is_total else 5}
        ends = [sum(step <= begin for step in steps) for begin in begins]
        pieces = [(first, last) for first, last in zip([0, *ends], [*ends, len(steps)]) if first < last]
        for number, (first, last) in enumerate(pieces):
            label = _LABELS[name] if number == 0 else None
            axes.plot(steps[first:last], values[first:last], label=label, **style)
        held_out = _points(log_history, f"eval_{name}")
        if held_out[0]:
            axes.plot(*held_out, "D", label=f"{_LABELS[name]}, held out", color=style["color"], markersize=7)
    if len(begins) > 1:
        for stage, begin in stages.items():
            axes.axvline(begin, color="gray", linestyle=":", linewidth=1)
            where = {"transform": axes.get_xaxis_transform(), "rotation": 90, "va": "top", "ha": "right"}
            axes.text(begin, 0.98, f"stage: {stage}", color="gray", fontsize=11, **where)  # short stages lie close
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else "")  # elsewhere powers of ten suffice
    axes.set_xlabel("training step", fontsize=13)
    axes.set_ylabel("loss, logarithmic scale", fontsize=13)
    axes.tick_params(labelsize=12)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(fontsize=12, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return _save(figure, path)


def speed_curves(speed: Mapping[str, Any], path: str | Path) -> Path:
    """Draws what `cab_hf.runs.report` measured of speed and memory, teacher beside student, a panel a quantity.

    A dotted line marks the length from which the student is ahead.

    Args:
        speed: `over`, the name of the x axis; `rows`, each with its value under that name and, under "teacher" and
            "student", quantities or None; `crossing`, the x of each quantity or None.
        path: Picture to write, 1600 pixels wide; its suffix picks the format.

    Returns:
        `path`.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: Nothing was measured.
    """
    over, rows = speed["over"], speed["rows"]
    names = [name for name in _QUANTITIES if any((row[who] or {}).get(name) for row in rows for who in _WHO)]
    if not names:
        raise ValueError(f"There are {len(rows)} rows and no quantity in them. Measure at least one {over}.")
    figure = _figure("Speed curves", "Speed and memory")
    ticks = [row[over] for row in rows]
    for column, name in enumerate(names, start=1):
        axes = figure.add_subplot(1, len(names), column)
        for who, style in _WHO.items():
            points = [(row[over], value) for row in rows if (value := (row[who] or {}).get(name))]
            if points:
                axes.plot(*zip(*points), label=who, linewidth=2, markersize=6, **style)
        crossing = speed["crossing"].get(name)
        if crossing is not None and min(ticks) < crossing < max(ticks):
            axes.axvline(crossing, color="gray", linestyle=":", linewidth=2, label=f"crossing: {crossing:,.0f}")
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=45 * (len(ticks) > 3))
        axes.minorticks_off()
        highest = max((row[who] or {}).get(name) or 0 for row in rows for who in _WHO)
        axes.set_ylim(0, 1.1 * highest)
        axes.yaxis.set_major_formatter("{x:,.0f}" if highest >= 10 else "{x:g}")
        axes.set_title(_QUANTITIES[name], fontsize=13)
        axes.set_xlabel(textwrap.fill(_OVER.get(over, over), 60 // len(names)), fontsize=12)
        axes.tick_params(labelsize=11)
        axes.grid(True, alpha=0.25)
        axes.legend(fontsize=11)
    return _save(figure, path)


def recall_curves(recall: Mapping[str, Mapping[str, Mapping[str, Any]]], path: str | Path) -> Path:
    """Draws recall over the gap, teacher beside student with 95 % intervals, a panel a test.

    Args:
        recall: Name of a test -> gap -> {"teacher": ..., "student": ...}, reports of `copying_recall` and the like.
        path: Picture to write, 1600 pixels wide; its suffix picks the format.

    Returns:
        `path`.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = _figure("Recall curves", "Recall over the gap, with 95 % intervals")
    for column, (test, gaps) in enumerate(recall.items(), start=1):
        axes = figure.add_subplot(1, len(recall), column)
        for who, style in _WHO.items():
            reports = [report[who] for report in gaps.values()]
            values = [report["recall"] for report in reports]
            below = [value - report["ci95"][0] for value, report in zip(values, reports)]
            above = [report["ci95"][1] - value for value, report in zip(values, reports)]
            # Gaps far apart, and perhaps 0: equal steps are the plainest.
            # Side by side, or the intervals would hide each other.
            places = [place + (0.05 if who == "student" else -0.05) for place in range(len(values))]
            axes.errorbar(places, values, (below, above), label=who, linewidth=2, capsize=4, **style)
        axes.set_xticks(range(len(gaps)), list(gaps))
        axes.set_ylim(-0.03, 1.03)
        axes.set_title(f"{test} recall", fontsize=13)
        axes.set_xlabel("gap between the two places, tokens", fontsize=12)
        axes.tick_params(labelsize=12)
        axes.grid(True, alpha=0.25)
        if column == 1:
            axes.set_ylabel("share of tokens recalled", fontsize=13)
            axes.legend(fontsize=12)
    return _save(figure, path)


def kept_attention(choice: Mapping[str, Any], path: str | Path) -> Path:
    """Draws what each layer's mixer does where it alone takes over; layers that keep their attention are marked.

    Args:
        choice: what `cab_hf.evaluation.choose_attention` returned.
        path: Picture to write, 1600 pixels wide; its suffix picks the format.

    Returns:
        `path`.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = _figure(
        "Kept attention", f"Each layer's attention replaced alone; {len(choice['kept'])} kept by {choice['by']}"
    )
    for column, (name, title) in enumerate({"kl": "KL to teacher", "copying": "share copied"}.items(), start=1):
        axes = figure.add_subplot(1, 2, column)
        values = [one[name] for one in choice["replaced"].values()]
        axes.plot(values, color="C0", marker=".", label="one layer replaced")
        axes.plot(choice["layers"], [values[layer] for layer in choice["layers"]], "C1o", markersize=11, label="kept")
        axes.axhline(choice["all_kept"][name], color="gray", linestyle="--", label="none replaced")
        axes.set_ylim(0)
        axes.locator_params(axis="x", integer=True)
        axes.set_title(title, fontsize=13)
        axes.set_xlabel("layer", fontsize=12)
        axes.tick_params(labelsize=12)
        axes.grid(True, alpha=0.25)
        if column == 1:
            axes.legend(fontsize=11)
    return _save(figure, path)


def length_curves(length: Mapping[str, Any], path: str | Path) -> Path:
    """Draws loss by position and retrieval over the length, teacher beside student, with 95 % intervals.

    A dotted line marks the length up to which the student holds, in each panel that of its own test.

    Args:
        length: What `cab_hf.runs.report` measured: `loss`, `retrieval` and `holds_to`.
        path: Picture to write, 1600 pixels wide; its suffix picks the format.

    Returns:
        `path`.

    Raises:
        ImportError: matplotlib is missing.
    """
    holds = length["holds_to"]
    figure = _figure("Length curves", f"Over the length of the text: the student holds to {holds['all']:,} tokens")
    left, right = figure.subfigures(1, 2, width_ratios=(2, 3))
    lengths = [int(one) for one in next(iter(length["retrieval"].values()))]
    panels = {"loss": left.subplots(), **dict(zip(length["retrieval"], right.subplots(2, 2, sharex=True).flat))}
    for name, axes in panels.items():
        for who, style in _WHO.items():
            if name == "loss":
                rows = [(one["to"], one[who]) for one in length["loss"]["buckets"]]
            else:
                rows = [(int(tokens), one[who]) for tokens, one in length["retrieval"][name].items()]
            rows = [(tokens, one["nll" if name == "loss" else "recall"], *one["ci95"]) for tokens, one in rows if one]
            if rows:
                places, values, lows, highs = zip(*rows)
                axes.plot(places, values, label=who, linewidth=2, markersize=5, **style)
                axes.fill_between(places, lows, highs, color=style["color"], alpha=0.2)
        if holds[name]:
            axes.axvline(holds[name], color="gray", linestyle=":", linewidth=2)
        axes.set_xscale("log", base=2)
        ticks = lengths if name != "loss" else [one["to"] for one in length["loss"]["buckets"]]
        ticks = ticks[:: 1 + len(ticks) // 7]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=45 * (len(ticks) > 3))
        axes.minorticks_off()
        if name != "loss":
            axes.set_ylim(-0.03, 1.03)
        axes.set_title("loss by position, nats" if name == "loss" else name, fontsize=12)
        axes.tick_params(labelsize=9)
        axes.grid(True, alpha=0.25)
    panels["loss"].set_xlabel("tokens before the predicted one", fontsize=11)
    panels["loss"].legend(fontsize=11)
    right.supxlabel("length of the text, tokens", fontsize=11)
    right.supylabel("share found", fontsize=11)
    return _save(figure, path)


def _figure(what: str, title: str | None = None) -> "Figure":
    """An empty picture, 1600 pixels wide, that needs no display; a long title goes on in the next line."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{what} need matplotlib. Run `pip install matplotlib`.") from error
    figure = Figure(figsize=(8, 4.5), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    if title is not None:
        figure.suptitle(textwrap.fill(title, 70), fontsize=14)
    return figure


def _save(figure: "Figure", path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _points(log_history: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one quantity. Steps of a later stage, which counts from zero again, go on from the last."""
    steps, values, offset, last = [], [], 0, 0
    for entry in log_history:
        if "step" not in entry:
            continue
        if entry["step"] < last:
            offset += last
        last = entry["step"]
        if entry.get(name, 0.0) > 0.0:
            steps.append(offset + last)
            values.append(float(entry[name]))
    return steps, values
