"""The experiment harness `benchmarks/quality/grid.py`: what runs when, with which values, and what the tables say."""

import importlib.util
import json
import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from cab_hf.recipes import parse_recipe
from cab_hf.runs.run import run_recipe


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "quality" / "grid.py"
RECIPE = {
    "task": "image-classification",
    "student_config": {"patch_size": 2, "hidden_size": 48},
    "dataset": ["digits"],
    "max_steps": 700,
    "use_cpu": True,
    "stages": [{"name": "one", "max_steps": 3}],
    "baselines": [{"name": "other", "bridge_weight": 0.0}],
}
GRID = {
    "seeds": [0, 1],
    "options": {"max_steps": 70, "student_config": {"hidden_size": 24}},
    "methods": {"A": {"kl_weight": 0.5}, "B b": {"stages": [{"name": "two", "max_steps": 4}]}},
    "data": {"1 %": {"train_fraction": 0.01}, "10 %": {"train_fraction": 0.1, "student_config": {"patch_size": 4}}},
}
NUMBERS = {"student_top1": 0.5, "kl": 1.0, "agreement": 0.25}


@pytest.fixture
def grid(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("quality_grid", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a grid, with changes, into a folder of its own; returns its path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))

    def write(**changes) -> Path:
        path = tmp_path / "mine" / "grid.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump({"recipe": "recipe.yaml"} | GRID | changes, sort_keys=False))
        return path

    return write


@pytest.fixture
def trained(grid, monkeypatch):
    """Replaces training; returns the values of the runs that were trained, and `act` to be changed."""
    seen = []

    def train(recipe):
        seen.append(recipe.values)
        train.act(recipe)
        recipe.output_dir.mkdir(parents=True)
        log = [{"step": step, "loss": 1.0 / (step + 1), "bad": math.nan, "text": "x"} for step in range(100)]
        return {
            "task": "image-classification", "before": {"test": NUMBERS}, "after": {"test": NUMBERS}, "seconds": 0.5,
            "stages": [{"name": "one", "steps": 3, "seconds": 0.1, "peak_gib": None, "log": log, "examples": 6}],
            "images_seen": 6, "versions": {"torch": "0"}, "hardware": "none", "folder": str(recipe.output_dir),
        }  # fmt: skip

    train.act = lambda recipe: None
    monkeypatch.setattr(grid, "train", train)
    monkeypatch.setattr(grid, "release_memory", lambda: None)
    train.seen = seen
    return train


def save(path: Path, method: str, data: str, seed: int, **measures: float | None) -> None:
    runs = path.parent / "runs"
    runs.mkdir(exist_ok=True)
    content = {"method": method, "data": data, "seed": seed, "measures": measures, "seconds": 1.0, "options": {}}
    (runs / f"{method}-{data}-{seed}.json").write_text(json.dumps(content))


def claim(path: Path, run: str, **owner: object) -> Path:
    file = path.parent / "runs" / f".{run}.claim"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"host": socket.gethostname(), "command": "another"} | owner) if owner else "")
    return file


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_values_are_merged_in_order_and_one_level_deep(grid, write):
    path = write()
    read = grid.read_grid(path)
    recipes = grid.build_recipes(read, read.runs, [])
    values = recipes[grid.Run("A", "10 %", 1)].values
    assert values["max_steps"] == 70 and values["kl_weight"] == 0.5 and values["train_fraction"] == 0.1
    assert values["student_config"] == {"patch_size": 4, "hidden_size": 24}
    assert values["stages"] == RECIPE["stages"] and "baselines" not in values
    assert values["seed"] == 1 and values["output_dir"] == "outputs/grid/mine/a__10-pct__seed1"
    assert values["verify_reload"] is False and values["report_to"] == "none"
    assert recipes[grid.Run("A", "1 %", 0)].values["student_config"] == {"patch_size": 2, "hidden_size": 24}
    assert recipes[grid.Run("B b", "1 %", 0)].values["stages"] == [{"name": "two", "max_steps": 4}]

    over = grid.build_recipes(read, read.runs[:1], ["--kl_weight", "0.25", "--max_steps", "2"])[read.runs[0]].values
    assert (over["kl_weight"], over["max_steps"], over["seed"]) == (0.25, 2, 0)
    assert grid.merge({"a": {"b": {"c": 1}}}, {"a": {"b": {"d": 2}}}) == {"a": {"b": {"d": 2}}}
    assert grid.merge({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": None}, "d": None}) == {"a": {"c": 2}, "d": None}


def test_runs_go_seed_by_seed_and_cells_choose_them(grid, write):
    def names(**changes) -> list[str]:
        return [run.name for run in grid.read_grid(write(**changes)).runs]

    first = ["a__1-pct__seed0", "b-b__1-pct__seed0", "a__10-pct__seed0", "b-b__10-pct__seed0"]
    assert names() == first + [name.replace("seed0", "seed1") for name in first]
    cells = [{"methods": ["A"], "data": ["10 %"], "seeds": [5, 1]}, {"data": ["10 %"], "seeds": [0]}, {"seeds": [0]}]
    assert names(cells=cells) == [*first, "a__10-pct__seed1", "a__10-pct__seed5"]
    read = grid.read_grid(write(cells=cells))
    assert [run.name for run in grid.select(read, ["A"], None, [1, 5])] == ["a__10-pct__seed1", "a__10-pct__seed5"]
    assert grid.slug("0.5 % of_it!") == "0.5-pct-of-it"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {}}, "Unknown key .*'method'. There are 'recipe', 'options'"),
        ({"cells": [{"methods": ["C"]}]}, "Unknown name in `methods` .*'C'. There are 'A', 'B b'"),
        ({"cells": [{"date": ["1 %"]}]}, "Unknown key in a cell .*'date'. There are 'methods', 'data', 'seeds'"),
        ({"cells": ["A"]}, "must be a mapping"),
        ({"reference": "C"}, "Unknown `reference` .*'C'. There are 'A', 'B b'"),
        ({"methods": {"B b": {}, "b_B": {}}}, "'b_B' in `methods` is 'b-b' in a file's name, as 'B b' is"),
        ({"methods": {"!": {}}}, "rename it"),
        ({"methods": {"A": 3}}, "'A' in `methods` must hold recipe keys, got 3"),
        ({"methods": {}}, "has no `methods`"),
        ({"seeds": ["0"]}, "must be whole numbers"),
        ({"data": ["1 %"]}, "`data` .* must be a dict"),
    ],
)
def test_a_wrong_grid_is_named(grid, write, changes, message):
    with pytest.raises(ValueError, match=message):
        grid.read_grid(write(**changes))


def test_errors_take_one_line(grid, write, capsys):
    def error(*arguments: object) -> str:
        assert grid.main([str(argument) for argument in arguments]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "There is no grid none.yaml" in error("list", "none.yaml") and "smoke" in error("run", "none.yaml")
    assert "There is no recipe no.yaml. . holds recipe.yaml." in error("run", write(recipe="no.yaml"))
    wrong = error("run", write(methods={"A": {"kl_wieght": 1.0}}))
    assert "Method 'A', data '1 %'" in wrong and "Did you mean 'kl_weight'" in wrong
    path = write()
    assert "Unknown method" in error("run", path, "--methods", "C")
    assert "choose runs by --seeds" in error("run", path, "--", "--seed", "3")
    assert "Did you mean 'max_steps'" in error("run", path, "--", "--max_step", "3")
    assert "is finished" in error("tables", path)
    path.write_text("a: [")
    assert "is no YAML" in error("list", path)


def test_a_run_leaves_its_result_and_finished_runs_are_skipped(grid, write, trained, capsys):
    path = write()
    assert grid.main(["run", str(path), "--methods", "A", "--seeds", "0"]) == 0
    assert [(one["train_fraction"], one["seed"]) for one in trained.seen] == [(0.01, 0), (0.1, 0)]
    assert sorted(file.name for file in (path.parent / "runs").iterdir()) == [
        "a__1-pct__seed0.json", "a__10-pct__seed0.json",
    ]  # fmt: skip
    found = json.loads((path.parent / "runs" / "a__1-pct__seed0.json").read_text())
    assert (found["method"], found["data"], found["seed"]) == ("A", "1 %", 0)
    assert found["measures"] == {"top1": 0.5, "kl": 1.0, "agreement": 0.25}
    assert found["options"]["train_fraction"] == 0.01 and "output_dir" not in found["options"]
    assert found["images_seen"] == 6 and found["backend"] == "auto" and found["seconds"] >= 0.5
    (stage,) = found["curve"]
    assert len(stage["log"]) == 40 and [stage["log"][i]["step"] for i in (0, -1)] == [0, 99]
    assert set(stage["log"][0]) == {"step", "loss"}
    assert not Path("outputs/grid/mine/a__1-pct__seed0").exists()

    trained.seen.clear()
    assert grid.main(["run", str(path), "--seeds", "0", "--keep"]) == 0
    assert [len(one["stages"]) for one in trained.seen] == [1, 1]
    assert all(one["stages"][0]["name"] == "two" for one in trained.seen)
    assert Path("outputs/grid/mine/b-b__1-pct__seed0").is_dir()
    capsys.readouterr()
    grid.main(["list", str(path)])
    listed = capsys.readouterr().out.splitlines()
    assert sum("finished " in line for line in listed[:-1]) == 4 and sum("missing" in line for line in listed) == 4
    assert listed[-1].startswith("4 of 8 runs are finished")

    grid.main(["run", str(path), "--seeds", "0", "--", "--max_steps", "9"])
    assert "max_steps: 70 there, 9 now" in capsys.readouterr().err


def test_claims_of_the_dead_are_taken_over_and_others_not(grid, write, trained, capsys):
    path = write(seeds=[0])
    claim(path, "a__1-pct__seed0", pid=dead_process())
    claim(path, "b-b__1-pct__seed0", pid=os.getppid())
    claim(path, "a__10-pct__seed0", pid=dead_process(), host="elsewhere")
    claim(path, "b-b__10-pct__seed0")  # another process is just writing it
    assert grid.main(["run", str(path)]) == 0
    assert [Path(one["output_dir"]).name for one in trained.seen] == ["a__1-pct__seed0"]
    left = sorted(file.name for file in (path.parent / "runs").glob(".*"))
    assert left == [".a__10-pct__seed0.claim", ".b-b__1-pct__seed0.claim", ".b-b__10-pct__seed0.claim"]
    out = capsys.readouterr().out
    assert out.count("is held by another process") == 3 and "1 of 4 runs are finished" in out


def test_a_claim_is_held_once(grid, tmp_path):
    path = tmp_path / ".a.claim"
    assert grid.take_claim(path, "one") and not grid.take_claim(path, "one")
    assert json.loads(path.read_text()) == {"pid": os.getpid(), "host": socket.gethostname(), "command": "one"}


def test_a_process_that_waits_for_a_claim_finds_the_finished_run(grid, write, trained, monkeypatch):
    path = write(seeds=[0], methods={"A": {}}, data={"1 %": {}})

    def take(claim: Path, command: str) -> bool:
        (claim.parent / "a__1-pct__seed0.json").write_text("{}")  # finished just now, elsewhere
        claim.touch()
        return True

    monkeypatch.setattr(grid, "take_claim", take)
    grid.main(["run", str(path)])
    assert trained.seen == [] and not list((path.parent / "runs").glob(".*"))


def test_no_run_starts_that_would_end_too_late(grid, write, trained, capsys):
    path = write(seeds=[0])
    trained.act = lambda recipe: time.sleep(0.2)
    assert grid.main(["run", str(path), "--seconds", "0.01"]) == 0  # the first one starts at any rate
    assert len(trained.seen) == 1
    assert grid.main(["run", str(path), "--seconds", "600"]) == 0
    assert len(trained.seen) == 4
    assert "No run is started any more" in capsys.readouterr().out


@pytest.mark.parametrize(("workers", "expected"), [(None, ["2", "5"]), ("5", ["2", "5", "2", "5", "2"])])
def test_workers_take_gpus_in_turn(grid, write, trained, monkeypatch, workers, expected):
    path, visible = write(seeds=[0]), []

    class Worker:
        def __init__(self, command, env):
            visible.append(env["CUDA_VISIBLE_DEVICES"])
            assert grid.make_parser().parse_args(command[2 : command.index("--")]).workers == 1

        def wait(self):
            return 0

        terminate = wait

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setattr(grid.subprocess, "Popen", Worker)
    trained.act = lambda recipe: (
        visible.insert(0, os.environ["CUDA_VISIBLE_DEVICES"]) if len(trained.seen) == 1 else None
    )
    options = [] if workers is None else ["--workers", workers]
    assert grid.main(["run", str(path), "--gpus", "2", "5", *options]) == 0
    assert visible == expected and len(trained.seen) == 4


def test_gpus_without_workers_are_an_error(grid, write, trained, capsys):
    assert grid.main(["run", str(write()), "--gpus", "0", "1", "--workers", "1"]) == 1
    assert "`--workers` is 1 for 2 GPUs" in capsys.readouterr().err and trained.seen == []


def test_a_failing_run_does_not_stop_the_others(grid, write, trained, capsys):
    path = write(seeds=[0])

    def fail(recipe):
        if recipe.values["train_fraction"] == 0.01 and recipe.values.get("kl_weight") == 0.5:
            raise RuntimeError("out of memory")

    trained.act = fail
    assert grid.main(["run", str(path)]) == 1
    err = capsys.readouterr().err
    assert "RuntimeError: out of memory" in err and "error: failed: A, 1 %, seed 0" in err
    assert len(trained.seen) == 4 and len(list((path.parent / "runs").iterdir())) == 3
    trained.act = lambda recipe: None
    assert grid.main(["run", str(path)]) == 0
    assert len(trained.seen) == 5


def test_no_half_result_is_left(grid, write, trained, monkeypatch):
    path = write(seeds=[0])

    def stop(recipe):
        raise KeyboardInterrupt

    trained.act = stop
    with pytest.raises(KeyboardInterrupt):
        grid.main(["run", str(path)])
    assert list((path.parent / "runs").iterdir()) == []  # the claim is given up, too

    trained.act = lambda recipe: None
    written = Path.write_text

    def killed(file: Path, text: str, **kwargs) -> None:
        written(file, text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        grid.main(["run", str(path)])
    monkeypatch.undo()
    read = grid.read_grid(path)
    assert not read.result_path(read.runs[0]).exists() and grid.read_results(read) == []


def test_tables_agree_with_hand_computed_numbers(grid, write, capsys):
    path = write(data={"1 %": {}, "10 %": {}, "none yet": {}}, methods={"A": {}, "B b": {}, "C": {}}, reference="A")
    for seed, (ours, theirs) in enumerate([(0.5, 0.6), (0.7, 0.9), (0.6, 0.75)]):
        save(path, "A", "1 %", seed, top1=ours, kl=20.0 - seed)
        save(path, "B b", "1 %", 2 - seed, top1=theirs, kl=None if seed == 1 else 0.05)
    save(path, "B b", "10 %", 4, top1=0.951)
    save(path, "gone", "10 %", 4, top1=1.0)
    assert grid.main(["tables", str(path)]) == 0
    assert "of no method or data" in capsys.readouterr().err
    table = json.loads((path.parent / "table.json").read_text())
    a, b = (table["measures"]["top1"][method]["1 %"] for method in ("A", "B b"))
    assert a["seeds"] == [0.5, 0.7, 0.6] and b["seeds"] == [0.75, 0.9, 0.6] and b["seed_numbers"] == [0, 1, 2]
    assert a["mean"] == pytest.approx(0.6) and a["std"] == pytest.approx(0.1) and a["n"] == 3
    difference = table["differences"]["top1"]["B b"]["1 %"]  # of 0.25, 0.2 and 0
    assert difference["mean"] == pytest.approx(0.15) and difference["n"] == 3
    deviations = [0.25 - 0.15, 0.2 - 0.15, 0.0 - 0.15]
    assert difference["standard_error"] == pytest.approx(math.sqrt(sum(d * d for d in deviations) / 2) / math.sqrt(3))
    assert "A" not in table["differences"]["top1"] and "10 %" not in table["differences"]["top1"]["B b"]
    assert table["measures"]["top1"]["B b"]["10 %"]["std"] is None
    assert table["measures"]["kl"]["B b"]["1 %"]["mean"] is None
    assert (path.parent / "table.md").read_text().splitlines() == [
        "### top1", "", "| method | 1 % | 10 % |", "|---|---|---|", "| A | 0.600 ± 0.100 (3) | - |",
        "| B b | **0.750 ± 0.150** (3) | 0.951 (1) |", "",
        "### kl", "", "| method | 1 % |", "|---|---|", "| A | 19.00 ± 1.00 (3) |", "| B b | not finite (3) |",
    ]  # fmt: skip
    assert (path.parent / "plot.png").stat().st_size > 10_000


def test_lower_is_better_for_divergence_and_perplexity(grid, write):
    names = ["kl", "news: KL", "news: ppl ratio", "top1", "news: agreement", "copying, gap 16"]
    path = write(plot=["not measured", "news: KL"])
    save(path, "A", "1 %", 0, **dict.fromkeys(names, 0.25))
    save(path, "B b", "1 %", 0, **dict.fromkeys(names, 0.5))
    read = grid.read_grid(path)
    table = grid.tabulate(read, grid.read_results(read))["measures"]
    text = grid.markdown(read, table)
    best = {block.split("\n")[0]: "**0.250**" in block for block in text.split("### ")[1:]}
    assert best == dict(zip(names, [True, True, True, False, False, False]))
    assert text.count("**") == 2 * len(names)
    assert grid.draw(read, table, path.parent / "plot.png") == "news: KL"


def test_a_plot_says_in_words_what_it_shows(grid, write, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    path = write(plot=["brown (out of domain): ppl ratio"], title="Ours and theirs", data_label="share of the text")
    for method, seeds, data in (("A", 1, "1 %"), ("A", 1, "10 %"), ("B b", 2, "10 %")):
        for seed in range(seeds):
            save(path, method, data, seed, **{"brown (out of domain): ppl ratio": 1.5 + seed})
    assert grid.main(["tables", str(path)]) == 0
    (axes,) = drawn[0].axes
    assert drawn[0].get_suptitle() == "Ours and theirs" and axes.get_xlabel() == "share of the text"
    label = " ".join(axes.get_ylabel().split())
    assert label == "perplexity, times the teacher's on the Brown corpus, out of domain (lower is better)"
    assert axes.get_title() == "lines and large marks: mean of 1 to 2 seeds, small dots: the seeds"
    assert [text.get_text() for text in axes.texts] == ["B b"]  # at one of two columns alone
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["A"]

    for file in (path.parent / "runs").glob("B*"):
        file.unlink()
    assert grid.main(["tables", str(path)]) == 0
    assert drawn[1].axes[0].get_title() == "one seed each"


def test_a_single_result_is_a_table(grid, write):
    path = write()
    save(path, "B b", "10 %", 0, kl=None)
    assert grid.main(["tables", str(path)]) == 0
    assert (path.parent / "table.md").read_text() == ""  # one method: nothing to compare


def test_measures_of_texts(grid):
    one = {"perplexity_ratio": 1.5, "kl": 0.2, "agreement": 0.7}
    recall = {"16": {"student": {"recall": 0.1}, "teacher": {"recall": 0.9}}}
    assert grid.measures({"after": {"news": one | {"recall": recall}}}) == {
        "news: ppl ratio": 1.5, "news: KL": 0.2, "news: agreement": 0.7,
        "copying, gap 16": 0.1, "copying, gap 16, teacher": 0.9,
    }  # fmt: skip


def test_listing_and_tables_do_without_torch(write):
    path = write()
    save(path, "A", "1 %", 0, top1=0.5)
    code = "import sys; sys.modules['torch'] = sys.modules['transformers'] = sys.modules['cab_hf'] = None\n"
    code += f"import runpy; sys.argv = ['grid.py', sys.argv[1], {str(path)!r}]; sys.path[0] = {str(SCRIPT.parent)!r}\n"
    code += f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    for action in ("list", "tables"):
        subprocess.run([sys.executable, "-c", code, action], check=True, capture_output=True)


def test_the_smoke_grid_runs(grid, tmp_path, monkeypatch, capsys):
    values = yaml.safe_load((ROOT / "benchmarks" / "quality" / "smoke" / "grid.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    teacher = ["--output_dir", "teacher", "--max_steps", "2", "--use_cpu", "true", "--cpu_threads", "1"]
    run_recipe(parse_recipe([str(ROOT / "training_args" / "digits_vit.yaml"), *teacher]))
    path = tmp_path / "smoke" / "grid.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(values | {"recipe": str(ROOT / values["recipe"])}, sort_keys=False))
    run = ["run", str(path), "--seeds", "0", "--data", "10 %", "--methods", "CAB", "bridge first"]
    assert grid.main([*run, "--", "--max_steps", "2", "--teacher", "teacher"]) == 0
    found = json.loads((path.parent / "runs" / "bridge-first__10-pct__seed0.json").read_text())
    assert [stage["steps"] for stage in found["curve"]] == [2, 2]
    cab = json.loads((path.parent / "runs" / "cab__10-pct__seed0.json").read_text())
    assert [stage["steps"] for stage in cab["curve"]] == [2] and cab["images_seen"] == 2 * 48
    assert 0 <= cab["measures"]["top1"] <= 1 and cab["measures"]["kl"] > 0
    assert not list((tmp_path / "outputs" / "grid" / "smoke").iterdir())
    assert grid.main(["tables", str(path)]) == 0
    assert "| bridge first |" in (path.parent / "table.md").read_text()
