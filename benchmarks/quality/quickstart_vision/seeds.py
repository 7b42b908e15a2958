"""CAB beside soft KD and training from scratch over seeds: quickstart_vision, each seed its own images and start.

    python benchmarks/quality/quickstart_vision/seeds.py [--seeds 0 1 2 3 4] [--runs outputs/quickstart_vision_seeds]
        [--output FOLDER] [--redraw] [--any_recipe_option value ...]

Writes `results_cpu.json` and `top1_cpu.png`, beside itself by default; `--redraw` draws what is there again. Runs that
are finished in `--runs` are reused. The options of the recipe were chosen with seeds 10 to 12, on training images that
those students did not see.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any


HERE = Path(__file__).parent
RECIPE = "training_args/quickstart_vision.yaml"
STUDENT = ("student_top1", "kl", "agreement")


def collect(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Method -> what one seed measured."""
    (after,) = report["after"].values()
    methods = {name: next(iter(one["after"].values())) for name, one in report["baselines"].items()}
    methods[report["method"]] = after
    return {name: {key: numbers[key] for key in STUDENT} for name, numbers in methods.items()}


def summarise(seeds: dict[int, dict[str, dict[str, float]]], reference: str) -> dict[str, dict[str, float | None]]:
    """Means and spreads over seeds (None for one seed), and the paired difference of top-1 to one method."""
    methods = next(iter(seeds.values()))
    table: dict[str, dict[str, float | None]] = {}
    several = len(seeds) > 1
    for name in methods:
        values = {key: [one[name][key] for one in seeds.values()] for key in STUDENT}
        pairs = [one[name]["student_top1"] - one[reference]["student_top1"] for one in seeds.values()]
        table[name] = {f"{key}_mean": statistics.mean(found) for key, found in values.items()}
        table[name]["student_top1_std"] = statistics.stdev(values["student_top1"]) if several else None
        table[name][f"top1_over_{reference}_mean"] = statistics.mean(pairs)
        error = statistics.stdev(pairs) / math.sqrt(len(pairs)) if several else None
        table[name][f"top1_over_{reference}_standard_error"] = error
    return table


def draw(result: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, (name, row) in enumerate(result["summary"].items()):
        values = [one[name]["student_top1"] for one in result["seeds"].values()]
        axes.plot([place] * len(values), values, "o", color=f"C{place}", markersize=6, alpha=0.6)
        axes.plot([place], [row["student_top1_mean"]], "_", color=f"C{place}", markersize=40, markeredgewidth=3)
    teacher = result["teacher_top1"]
    axes.axhline(teacher, color="black", linestyle="--", linewidth=1)
    axes.annotate("teacher", (1, teacher), (-4, -3), axes.get_yaxis_transform(), "offset points", ha="right", va="top")
    axes.set_xticks(range(len(result["summary"])), result["summary"])
    axes.set_xlim(-0.5, len(result["summary"]) - 0.5)
    axes.set_ylabel(f"top-1 accuracy on {result['n_test_images']} test images\n(higher is better)")
    shares = f"{result['train_images']} of {result['available_images']:,} training images"
    figure.suptitle(f"A ViT into a Mamba on scikit-learn's digits, {shares}", fontsize=11)
    seeds = f"mean of {len(result['seeds'])} seeds, dots: the seeds" if len(result["seeds"]) > 1 else "one seed"
    axes.set_title(f"bars: {seeds}", fontsize=10, color="dimgray")
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs", type=Path, default=Path("outputs/quickstart_vision_seeds"))
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    parser.add_argument("--redraw", action="store_true", help="draw the results that are there, run nothing")
    options, overrides = parser.parse_known_args()
    if options.redraw:
        draw(json.loads((options.output / "results_cpu.json").read_text()), options.output / "top1_cpu.png")
        return
    from cab_hf.recipes import parse_recipe
    from cab_hf.runs.run import run_recipe

    reports = {}
    for seed in options.seeds:
        folder = options.runs / f"seed{seed}"
        # One thread: sums in another order end, hundreds of steps later, in another student.
        run = ["--seed", str(seed), "--output_dir", str(folder), "--verify_reload", "false", "--cpu_threads", "1"]
        reports[seed] = run_recipe(parse_recipe([RECIPE, *overrides, *run]))
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
    (options.output / "results_cpu.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, options.output / "top1_cpu.png")
    for name, row in result["summary"].items():
        spread = "" if row["student_top1_std"] is None else f" +- {row['student_top1_std']:.3f}"
        print(f"{name:<14} top-1 {row['student_top1_mean']:.3f}{spread}, KL {row['kl_mean']:.3f}")


if __name__ == "__main__":
    main()
