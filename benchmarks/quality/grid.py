"""A grid of runs: methods x data x seeds over one recipe, each run a JSON, all of them tables and a plot.

    python benchmarks/quality/grid.py run GRID.yaml [--methods M ...] [--data D ...] [--seeds S ...]
        [--seconds N] [--workers K] [--gpus G ...] [--keep] [-- --any_recipe_option value ...]
    python benchmarks/quality/grid.py list GRID.yaml
    python benchmarks/quality/grid.py tables GRID.yaml

A grid is a mapping. `recipe` is what all runs share; `options` are set over it; `methods` and `data` give each name
its recipe keys; `seeds` are the recipe's `seed`. `cells`, a list of mappings with `methods`, `data` and `seeds`, picks
some of their product. `reference` is the method that others are compared with (the first one if not given), `plot`
lists measures, of which the first that was measured is drawn, over all data or of `plot_data` alone; `title` and
`data_label`, what the data differ in, are the words of the plot. `smoke/grid.yaml` shows them all.

A run's values are the recipe's, then those of `options`, the method, its data and the command line, each over the one
before, its seed and folder last; where two are mappings in the grid, their keys are merged, and null takes one away.
What is finished is in `runs/` beside the grid and is not run again, what was cut off goes on. `--gpus 0 1 2 3
--workers 16` runs four workers on each of four GPUs; small students share one well.
"""

import argparse
import gc
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from grid_file import Grid, Run, read_grid, select, slug
from grid_tables import draw, markdown, tabulate


# cab_hf is imported where a run needs it: `list` and `tables` do without torch.
if TYPE_CHECKING:
    from cab_hf.recipes import Recipe


OUTPUTS = Path("outputs") / "grid"
FORCED = {"verify_reload": False, "report_to": "none"}
LOG_ENTRIES = 40


def build_recipes(grid: Grid, runs: Sequence[Run], overrides: Sequence[str]) -> dict[Run, "Recipe"]:
    """The recipe of each run.

    Args:
        overrides: recipe options of the command line, over all but a run's seed and folder.

    Raises:
        FileNotFoundError: the grid's recipe does not exist.
        ValueError: a key or value that no run can have; the message names method and data.
    """
    from cab_hf.recipes import load_recipe

    if not grid.recipe.is_file():
        there = ", ".join(sorted(path.name for path in grid.recipe.parent.glob("*.yaml"))) or "no recipe"
        raise FileNotFoundError(f"There is no recipe {grid.recipe}. {grid.recipe.parent} holds {there}.")
    for option in overrides:
        if option.partition("=")[0] in ("--seed", "--output_dir"):
            raise ValueError(f"{option} is the grid's to set: choose runs by --seeds, it names their folders itself.")
    shared = merge(load_recipe(grid.recipe), grid.options)
    recipes = {}
    for run in runs:
        try:
            recipes[run] = _build(run, grid, shared, overrides)
        except ValueError as error:
            raise ValueError(f"Method {run.method!r}, data {run.data!r}: {error}") from error
    return recipes


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Later values win; where both are mappings, their keys are merged, one level deep, and null takes a key away."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
            if both:
                value = {key: one for key, one in (merged[name] | value).items() if one is not None}
            merged[name] = value
    return merged


def _build(run: Run, grid: Grid, shared: Mapping[str, Any], overrides: Sequence[str]) -> "Recipe":
    from cab_hf.recipes import build_recipe, parse_recipe

    values = merge(shared, grid.methods[run.method], grid.data[run.data], FORCED)
    values.pop("baselines", None)  # methods of the grid are runs of their own
    own = {"seed": run.seed, "output_dir": str(OUTPUTS / grid.path.resolve().parent.name / run.name)}
    if not overrides:
        return build_recipe(values | own)
    with tempfile.TemporaryDirectory() as folder:  # the parser of the command line reads its recipe from a file
        file = Path(folder) / "recipe.yaml"
        file.write_text(yaml.safe_dump(values))
        return parse_recipe([str(file), *overrides, *(f"--{name}={value}" for name, value in own.items())])


def train(recipe: "Recipe") -> dict[str, Any]:
    """The report of a whole run."""
    from cab_hf.runs.run import run_recipe

    return run_recipe(recipe)


def run_grid(
    grid: Grid, recipes: Mapping[Run, "Recipe"], command: str, *, ends: float = math.inf, keep: bool = False
) -> None:
    """Runs, one after the other, what is neither finished nor claimed; a run that fails leaves its claim.

    Args:
        recipes: of the runs, in their order.
        command: names the command that this process and its other workers belong to.
        ends: `time.time()` after which no run should end, judged by the longest of this command; the first one starts.
        keep: keep the folder of a finished run.
    """
    (grid.folder / "runs").mkdir(parents=True, exist_ok=True)
    keep_compiled_graphs()
    earlier = {run for run in recipes if grid.result_path(run).is_file()}
    for run in earlier:
        _warn_of_other_options(grid.result_path(run), recipes[run])
    is_first = True
    for run, recipe in recipes.items():
        path, claim = grid.result_path(run), grid.claim_path(run)
        if path.is_file():
            continue
        done = [grid.result_path(one) for one in recipes.keys() - earlier if grid.result_path(one).is_file()]
        longest = max((read_result(one)["seconds"] for one in done), default=0.0)
        if not is_first and time.time() + longest > ends:
            print(f"No run is started any more: the longest took {longest:.0f} s, and the time is nearly over.")
            return
        if not take_claim(claim, command):
            if read_claim(claim).get("command", "") not in (command, None):
                print(f"{run} is held by another process; if there is none, remove {claim}.")
            continue
        try:
            if not path.is_file():  # it may have been finished just before its claim was free
                is_first = False
                print(f"== {run}", flush=True)
                _run_one(run, recipe, path, command)
                if not keep:
                    shutil.rmtree(recipe.output_dir, ignore_errors=True)
        except Exception:
            traceback.print_exc()
        except BaseException:
            claim.unlink(missing_ok=True)
            raise
        else:
            claim.unlink(missing_ok=True)
        release_memory()


def _run_one(run: Run, recipe: "Recipe", path: Path, command: str) -> None:
    from cab_hf.runs.run import REPORT_NAME

    teacher = Path(recipe.model.teacher) / REPORT_NAME
    teacher_claim = path.parent / f".teacher-{slug(recipe.model.teacher)}.claim"
    makes_teacher = False
    # One process makes a teacher that is missing, the others wait for it.
    while recipe.model.teacher_recipe is not None and not makes_teacher and not teacher.is_file():
        makes_teacher = take_claim(teacher_claim, f"{command}-{os.getpid()}")
        time.sleep(0 if makes_teacher else 1)
    started = time.time()
    try:
        report = train(recipe)
    finally:
        if makes_teacher:
            teacher_claim.unlink()
    # The teacher's time is not the run's; a report that an earlier command left took no time now.
    took = time.time() - started - (read_result(teacher)["seconds"] if makes_teacher else 0)
    kept = result(run, recipe, report, max(took, report["seconds"]))
    write_whole(path, json.dumps(kept, indent=1, allow_nan=False) + "\n")
    print(f"== {run}: {kept['seconds']:.1f} s", flush=True)


def _warn_of_other_options(path: Path, recipe: "Recipe") -> None:
    from cab_hf.runs.run import differences

    differing = differences(read_result(path)["options"], _plain(_options(recipe)))
    if differing:
        details = "; ".join(differing[:4])
        print(f"warning: {path} is of other options ({details}). It stays; remove it to run again.", file=sys.stderr)


def read_result(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def keep_compiled_graphs() -> None:
    """Lets one process compile a step for each method, and use it again for the method's other data and seeds."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 64


def release_memory() -> None:
    """Leaves the next run a device as empty as this one found it."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def result(run: Run, recipe: "Recipe", report: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """What is kept of a run's report."""
    kept = ("before", "after", "after_ema", "kept_attention", "train_tokens", "images_seen", "versions", "hardware")
    whole = {
        "method": run.method,
        "data": run.data,
        "seed": run.seed,
        "options": _options(recipe),
        "measures": measures(report),
        "curve": [
            {key: stage[key] for key in ("name", "steps", "seconds", "peak_gib")} | {"log": thinned(stage["log"])}
            for stage in report["stages"]
        ],
        **{key: report[key] for key in kept if key in report},
        "seconds": round(seconds, 1),
        "backend": os.environ.get("CAB_SSM_BACKEND", "auto"),
    }
    return _plain(whole)


def _options(recipe: "Recipe") -> dict[str, Any]:
    return {name: value for name, value in recipe.values.items() if name not in ("output_dir", "hub_token")}


def _plain(value: Any) -> Any:
    """The value as it is read back from JSON, which has no NaN: null stands for it."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def measures(report: Mapping[str, Any]) -> dict[str, float]:
    """What tables compare: of images top-1, KL and agreement, of texts each one's, and copying over gaps."""
    if report.get("task") == "image-classification":
        (after,) = report["after"].values()
        names = {"top1": "student_top1", "kl": "kl", "agreement": "agreement"}
        # A teacher without a classifier has neither KL nor agreement.
        return {name: after[key] for name, key in names.items() if key in after}
    found = {}
    for text, after in report["after"].items():
        found[f"{text}: ppl ratio"] = after["perplexity_ratio"]
        found[f"{text}: KL"] = after["kl"]
        found[f"{text}: agreement"] = after["agreement"]
    for after in report["after"].values():
        for gap, recall in after.get("recall", {}).items():
            found[f"copying, gap {gap}"] = recall["student"]["recall"]
            found[f"copying, gap {gap}, teacher"] = recall["teacher"]["recall"]
    return found


def thinned(log: Sequence[Mapping[str, Any]], count: int = LOG_ENTRIES) -> list[dict[str, float]]:
    """At most `count` entries, evenly spaced, the first and the last among them; of each its finite numbers."""
    if len(log) > count:
        log = [log[round(place * (len(log) - 1) / (count - 1))] for place in range(count)]
    return [
        {key: value for key, value in entry.items() if type(value) in (int, float) and math.isfinite(value)}
        for entry in log
    ]


def write_whole(path: Path, text: str) -> None:
    """Whole or not at all, as `cab_hf.files.write_whole`, but without loading torch for it."""
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def take_claim(path: Path, command: str) -> bool:
    """Claims a run for this process, also where the process that held it is dead; returns whether it is this one's."""
    identity = {"pid": os.getpid(), "host": socket.gethostname(), "command": command}
    while True:
        try:
            with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644), "w") as file:
                json.dump(identity, file)
            return True
        except FileExistsError:
            owner = read_claim(path)
        if owner == {} or _is_alive(owner, command):
            return False
        # Of several processes that see a dead claim one moves it away; one that moved a newer claim puts it back.
        aside = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            path.rename(aside)
        except FileNotFoundError:
            continue
        if read_claim(aside) != owner:
            aside.rename(path)
            return False
        aside.unlink()


def read_claim(path: Path) -> dict[str, Any]:
    """Who holds a claim; empty while it is being written, `command: None` where there is no claim any more."""
    try:
        return json.loads(path.read_text() or "{}")
    except FileNotFoundError:
        return {"command": None}


def _is_alive(owner: Mapping[str, Any], command: str) -> bool:
    if owner["command"] is None:
        return False
    if owner["command"] == command or owner["host"] != socket.gethostname():
        return True  # of this command also what failed: no other worker tries it again
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return owner["pid"] != os.getpid()  # else an earlier process had this number


def read_results(grid: Grid) -> list[dict[str, Any]]:
    """The results beside the grid, of its methods and data."""
    results = []
    for path in sorted((grid.folder / "runs").glob("[!.]*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["method"] in grid.methods and found["data"] in grid.data:
            results.append(found)
        else:
            print(f"{path} is of no method or data of {grid.path}: left out.", file=sys.stderr)
    return results


def run_command(grid: Grid, options: argparse.Namespace, arguments: Sequence[str], overrides: Sequence[str]) -> int:
    """Runs what is missing, in this process and the other workers; returns the exit code."""
    began = time.time()
    command = options.command or f"{socket.gethostname()}-{os.getpid()}-{began}"
    places = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in options.gpus or ()] or [{}]
    count = options.workers or len(places)
    if options.command is None:
        if count < len(places):
            raise ValueError(
                f"`--workers` is {count} for {len(places)} GPUs, of which some would idle: give one for each."
            )
        os.environ.update(places[0])
    runs = select(grid, options.methods, options.data, options.seeds)
    recipes = build_recipes(grid, runs, overrides)
    again = [sys.executable, __file__, *arguments, "--workers", "1", "--command", command, "--", *overrides]
    workers = [subprocess.Popen(again, env=os.environ | places[i % len(places)]) for i in range(1, count)]
    try:
        run_grid(grid, recipes, command, ends=began + options.seconds, keep=options.keep)
        codes = [worker.wait() for worker in workers]
    finally:
        for worker in workers:
            worker.terminate()
            worker.wait()
    if options.command is not None:  # another worker, whose failures the first one lists
        return 0
    failed = [run for run in runs if read_claim(grid.claim_path(run)).get("command") == command]
    for run in failed:
        grid.claim_path(run).unlink()
        print(f"error: failed: {run}", file=sys.stderr)
    if any(codes):
        print(f"error: workers ended with the codes {codes}.", file=sys.stderr)
    print(f"{sum(grid.result_path(run).is_file() for run in runs)} of {len(runs)} runs are finished.")
    return 1 if failed or any(codes) else 0


def list_command(grid: Grid) -> None:
    """Prints which runs are finished, and in which time."""
    seconds = {}
    for run in grid.runs:
        state = "claimed" if grid.claim_path(run).exists() else "missing"
        if grid.result_path(run).is_file():
            seconds[run] = read_result(grid.result_path(run))["seconds"]
            state = f"finished {seconds[run]:9.1f} s"
        print(f"{state:<20}  {run}")
    print(f"{len(seconds)} of {len(grid.runs)} runs are finished, in {sum(seconds.values()):,.0f} s.")


def tables_command(grid: Grid) -> None:
    """Writes `table.json`, `table.md` and `plot.png` beside the grid."""
    results = read_results(grid)
    if not results:
        raise ValueError(f"No run of {grid.path} is finished: {grid.folder / 'runs'} holds no result of it.")
    table = tabulate(grid, results)
    text = markdown(grid, table["measures"])
    write_whole(grid.folder / "table.json", json.dumps(table, indent=1, ensure_ascii=False) + "\n")
    write_whole(grid.folder / "table.md", text)
    print(text)
    measure = draw(grid, table["measures"], grid.folder / "plot.png")
    print(f"{len(results)} runs are in table.json and table.md, {measure} is drawn in plot.png.")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="action", required=True)
    run = subparsers.add_parser("run", help="run what is not finished", allow_abbrev=False)
    run.add_argument("--methods", nargs="+", metavar="M")
    run.add_argument("--data", nargs="+", metavar="D")
    run.add_argument("--seeds", nargs="+", type=int, metavar="S")
    run.add_argument(
        "--seconds", type=float, metavar="N", default=math.inf, help="start no run that would end later than this"
    )
    run.add_argument(
        "--workers", type=int, metavar="K", help="processes that share the runs (default: 1, or one for each GPU)"
    )
    run.add_argument("--gpus", nargs="+", metavar="G", help="GPUs that take the workers in turn, such as 0 1 2 3")
    run.add_argument("--keep", action="store_true", help="keep the folders of finished runs, students among them")
    run.add_argument("--command", help=argparse.SUPPRESS)
    listing = subparsers.add_parser("list", help="what is finished and what is missing")
    tables = subparsers.add_parser("tables", help="rebuild table.json, table.md and plot.png")
    for subparser in (run, listing, tables):
        subparser.add_argument("grid", metavar="GRID")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    place = arguments.index("--") if "--" in arguments else len(arguments)
    arguments, overrides = arguments[:place], arguments[place + 1 :]
    parser = make_parser()
    options = parser.parse_args(arguments)
    if overrides and options.action != "run":
        parser.error(f"recipe options ({' '.join(overrides)}) are for `run` only")
    try:
        grid = read_grid(options.grid)
        if options.action == "run":
            return run_command(grid, options, arguments, overrides)
        (list_command if options.action == "list" else tables_command)(grid)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # claims are given up, workers ended
    sys.exit(main())
