"""Pictures of a run. Needs matplotlib, which is optional."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cab_hf.distillation.training_args import LOSSES


_LABELS = {
    "loss": "total",
    "kl": "KL to teacher",
    "ce": "cross-entropy",
    "bridge": "attention bridge",
    "output": "mixer output",
    "hidden": "hidden state",
    "attention": "attention map",
}


def learning_curves(log_history: Sequence[Mapping[str, Any]], path: str | Path, *, title: str | None = None) -> Path:
    """Draws each part of the loss over the steps, on a logarithmic scale; held-out values as dots.

    Args:
        log_history: `trainer.state.log_history`, or that of several stages one after the other.
        path: Picture to write, 1600 pixels wide; its suffix picks the format, such as .png or .svg.
        title: Written above the curves.

    Returns:
        `path`.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: The history holds no positive loss.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Learning curves need matplotlib. Run `pip install matplotlib`.") from error

    curves = {name: _points(log_history, name) for name in ("loss", *LOSSES)}
    curves = {name: points for name, points in curves.items() if points[0]}
    if not curves:
        raise ValueError(
            f"log_history has {len(log_history)} entries and no positive value of {', '.join(('loss', *LOSSES))}. "
            "Log at least once: logging_steps at most the number of steps."
        )
    figure = Figure(figsize=(8, 4.5), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, (steps, values) in curves.items():
        is_total = name == "loss"
        # One colour a part, the same in every picture.
        style = {"color": "black", "linestyle": "--"} if is_total else {"color": f"C{LOSSES.index(name)}"}
        # A curve of few points would be invisible as a thin line.
        marker = "o" if len(steps) < 20 else ""
        axes.plot(steps, values, label=_LABELS[name], linewidth=2, marker=marker, markersize=4, **style)
        held_out = _points(log_history, f"eval_{name}")
        if held_out[0]:
            axes.plot(*held_out, "D", label=f"{_LABELS[name]}, held out", color=style["color"], markersize=7)
    axes.set_yscale("log")
    axes.set_xlabel("step", fontsize=13)
    axes.set_ylabel("loss per token", fontsize=13)
    axes.tick_params(labelsize=12)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(fontsize=12, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    if title is not None:
        axes.set_title(title, fontsize=14)
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
