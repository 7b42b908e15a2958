"""CAB beside soft KD and training from scratch over seeds: quickstart_vision, each seed its own images and start.

    python benchmarks/quality/quickstart_vision/seeds.py [--seeds 0 1 2 3 4] [--runs outputs/quickstart_vision_seeds]

Writes `results_cpu.json` and `top1_cpu.png` beside itself. Runs that are finished in `--runs` are reused. The options
of the recipe were chosen with seeds 10 to 12, on training images that those students did not see.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cab_hf.recipes import parse_recipe
from cab_hf.runs.run import run_recipe


HERE = Path(__file__).parent
RECIPE = "training_args/quickstart_vision.yaml"
STUDENT = ("student_top1", "kl", "agreement")


def collect(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Method -> what one seed measured."""
    (after,) = report["after"].values()
    methods = {name: next(iter(one["after"].values())) for name, one in report["baselines"].items()}
    methods[report["method"]] = after
    return {name: {key: numbers[key] for key in STUDENT} for name, numbers in methods.items()}


def summarise(seeds: dict[int, dict[str, dict[str, float]]], reference: str) -> dict[str, dict[str, float]]:
    """Means and spreads over seeds, and the paired difference of top-1 to one method."""
    methods = next(iter(seeds.values()))
    table = {}
    for name in methods:
        values = {key: [one[name][key] for one in seeds.values()] for key in STUDENT}
        pairs = [one[name]["student_top1"] - one[reference]["student_top1"] for one in seeds.values()]
        table[name] = {f"{key}_mean": statistics.mean(found) for key, found in values.items()}
        table[name]["student_top1_std"] = statistics.stdev(values["student_top1"])
        table[name][f"top1_over_{reference}_mean"] = statistics.mean(pairs)
        table[name][f"top1_over_{reference}_standard_error"] = statistics.stdev(pairs) / math.sqrt(len(pairs))
    return table


def draw(seeds: dict[int, dict[str, dict[str, float]]], teacher: float, path: Path) -> None:
    figure = Figure(figsize=(6, 4), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = list(next(iter(seeds.values())))
    for place, name in enumerate(names):
        values = [one[name]["student_top1"] for one in seeds.values()]
        axes.bar(place, statistics.mean(values), width=0.6, color=f"C{place}", alpha=0.5)
        axes.plot([place] * len(values), values, "o", color=f"C{place}", markersize=5)
    axes.axhline(teacher, color="black", linestyle="--", linewidth=1)
    axes.text(len(names) - 0.75, teacher, "teacher", va="bottom", ha="right")
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0.8, 1.0)
    axes.set_ylabel("top-1 accuracy, 359 test images")
    axes.set_title("digits, a tenth of the training images, five seeds")
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs", type=Path, default=Path("outputs/quickstart_vision_seeds"))
    options = parser.parse_args()
    reports = {}
    for seed in options.seeds:
        folder = options.runs / f"seed{seed}"
        # One thread: sums in another order end, hundreds of steps later, in another student.
        run = ["--seed", str(seed), "--output_dir", str(folder), "--verify_reload", "false", "--cpu_threads", "1"]
        reports[seed] = run_recipe(parse_recipe([RECIPE, *run]))
    seeds = {seed: collect(report) for seed, report in reports.items()}
    first = reports[options.seeds[0]]
    (after,) = first["after"].values()
    result = {
        "recipe": RECIPE,
        "teacher_top1": after["teacher_top1"],
        "n_test_images": after["n_images"],
        "train_images": first["train_images"],
        "available_images": first["available_images"],
        "summary": summarise(seeds, "soft KD"),
        "seeds": seeds,
        "seconds_a_run": [report["seconds"] for report in reports.values()],
        "versions": first["versions"],
        "hardware": first["hardware"],
    }
    (HERE / "results_cpu.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(seeds, after["teacher_top1"], HERE / "top1_cpu.png")
    for name, row in result["summary"].items():
        mean, spread = row["student_top1_mean"], row["student_top1_std"]
        print(f"{name:<14} top-1 {mean:.3f} +- {spread:.3f}, KL {row['kl_mean']:.3f}")


if __name__ == "__main__":
    main()
