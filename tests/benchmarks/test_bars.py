"""`benchmarks/quality/bars.json` is what the run files say, and a bar that no row meets is told as missed."""

import copy
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
QUALITY = ROOT / "benchmarks/quality"


@pytest.fixture
def bars(monkeypatch):
    spec = importlib.util.spec_from_file_location("quality_bars", QUALITY / "bars.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def committed():
    return json.loads((QUALITY / "bars.json").read_text())


def test_the_files_are_what_the_runs_say(bars, committed, monkeypatch):
    written = {}
    monkeypatch.setattr(sys, "argv", ["bars.py"])
    monkeypatch.setattr(bars, "write_whole", lambda path, text: written.update({path.name: text}))
    bars.main()
    assert written == {name: (QUALITY / name).read_text() for name in ("bars.json", "bars.md")}
    assert all((QUALITY / file).is_file() for row in committed["rows"] for file in row["run_files"])


def verdict(bars, rows, images, name: str) -> dict:
    (found,) = (one for one in bars.judge(rows, images) if one["name"] == name)
    return found


def test_a_bar_is_met_by_the_row_that_meets_all_of_it(bars, committed):
    rows, images = committed["rows"], committed["images"]
    pure = next(place for place, row in enumerate(rows) if row["student"] == "pure")
    rows[pure] |= {"tokens": 60_000_000, "kl": {"speeches": 0.14, "docs": 0.2, "brown": 0.23}}
    found = verdict(bars, rows, images, "pure, KL")
    assert found["met"] and not found["goal_met"] and found["row"] == pure
    rows[pure]["kl"] = {"speeches": 0.05, "docs": 0.2001, "brown": 0.05}  # one text is above the bar
    assert not verdict(bars, rows, images, "pure, KL")["met"]
    rows[pure] |= {"tokens": 60_000_001, "kl": {"speeches": 0.05, "docs": 0.05, "brown": 0.05}}
    assert not verdict(bars, rows, images, "pure, KL")["met"]


def test_tests_of_retrieval_count_up_to_a_length_and_where_the_teacher_finds_something(bars, committed):
    rows, images, name = committed["rows"], committed["images"], "hybrid, copying and needles, share of the teacher's"
    place = verdict(bars, rows, images, name)["row"]
    row = rows[place]
    row["copying"] = {gap: share * (share > 0.1) for gap, share in row["teacher_copying"].items()}
    row["needles"] = copy.deepcopy(row["teacher_needles"])
    found = verdict(bars, rows, images, name)
    assert found["met"] and found["row"] == place and found["figures"]["up to 4096"] == 1.0
    assert not found["goal_met"] and found["figures"]["up to 8192"] is None
    row["needles"]["needles"]["1024"] *= 0.9
    found = verdict(bars, rows, images, name)
    assert not found["met"] and found["figures"]["up to 4096"] == pytest.approx(0.9)
    row["tasks_above_chance"] |= {"share": 0.9, "share_ci95": [0.8, 1.0]}
    found = verdict(bars, rows, images, "hybrid, tasks, share of the teacher's margin")
    assert found["met"] and found["goal_met"]


def test_the_bridge_is_ahead_where_all_its_seeds_are(bars, committed):
    half = next(row for row in committed["rows"] if row["student"] == "half as deep")

    def row(bridge: bool, *seeds: float) -> dict:
        kl = {"kl": {"speeches": sum(seeds) / len(seeds)}, "kl_seeds": {"speeches": list(seeds)}}
        return half | kl | {"tokens": 20_000_000, "bridge": bridge, "seeds": list(range(len(seeds)))}

    def judged(*rows: dict) -> dict:
        return verdict(bars, rows, [], "half as deep, KL")

    rival = row(False, 0.44, 0.43, 0.42)
    found = judged(row(True, 0.41, 0.40, 0.39), row(True, 0.3), rival, row(False, 0.5, 0.5, 0.5))
    assert found["goal_met"] and found["row"] == 1
    assert list(found["figures"].values())[-1] == pytest.approx(0.01)
    assert not judged(row(True, 0.425, 0.40, 0.39), rival)["goal_met"]
    assert not judged(row(True, 0.3, 0.3), rival)["goal_met"]


def test_image_bars_need_three_seeds(bars, committed):
    images = committed["images"]
    assert verdict(bars, [], images, "images, top-1")["met"]
    for change in ({"seeds": [0, 1]}, {"top1": 0.6}):
        changed = [row | (change if row["student"] == "CAB" else {}) for row in images]
        assert not verdict(bars, [], changed, "images, top-1")["met"]


def test_a_folder_of_a_long_run(bars, tmp_path):
    """Its parts' tokens are summed, its last report counts, and a control of it is a row of its own."""
    root, folder = tmp_path / "benchmarks/quality", tmp_path / "benchmarks/quality/hybrids/four"
    shutil.copytree(QUALITY / "hybrids/auto", folder)
    shutil.copytree(ROOT / "training_args", tmp_path / "training_args")
    evaluation = json.loads((folder / "evaluation.json").read_text())
    evaluation["texts"]["speeches"]["kl"] = 1.5
    (folder / "zeroed").mkdir()
    (folder / "zeroed/evaluation.json").write_text(json.dumps(evaluation | {"control": "zeroed"}))
    (folder / "window").mkdir()
    (folder / "window/evaluation.json").write_text(json.dumps(evaluation | {"control": "window"}))
    whole, window, zeroed = bars.collect(root)
    assert window["student"] == "teacher, window" and window["tokens"] == 0
    reports = [json.loads((folder / name).read_text()) for name in ("report.json", "report_long.json")]
    assert (whole["student"], zeroed["student"]) == ("hybrid-4", "hybrid-4, zeroed")
    assert whole["tokens"] == sum(one["train_tokens"] for one in reports)
    assert whole["kl"]["speeches"] == reports[1]["after"]["speeches"]["kl"] and zeroed["kl"]["speeches"] == 1.5
    assert whole["copying"].keys() == {"16", "64", "256", "1024", "4096"} and whole["needles"]["needle"]["4096"] < 0.3
    assert len(whole["run_files"]) == 3 and zeroed["run_files"] == ["hybrids/four/zeroed/evaluation.json"]
    table = bars.markdown([whole, zeroed], bars.judge([whole, zeroed], []))
    assert "| hybrid-4, zeroed: hybrids/four | 44M | 1 |" in table
