"""What `cab-hf coverage` says of families: a sample at each run, all of them where they are asked for."""

import json

import pytest

from cab_hf.cli import main
from cab_hf.evaluation import coverage
from cab_hf.evaluation.coverage import cover, missed, page, passes
from cab_hf.evaluation.tiny_families import CAUSAL_FAMILIES


EXACT = ["llama", "gpt2", "bert", "gemma2", "gpt_oss", "mixtral", "olmo2", "opt", "biogpt", "bamba"]
INEXACT = ["deepseek_v3", "qwen3_next", "bitnet"]
REFUSED = {"bloom": "shows no attention", "diffllama": "attends 2 times in one pass"}


def test_a_sample_of_families_passes_or_is_refused_with_its_reason(tmp_path):
    rows = {row["family"]: row for row in cover([*EXACT, *INEXACT, *REFUSED], tmp_path / "coverage.md")}
    for family in EXACT:
        assert passes(rows[family]), rows[family]
        assert rows[family]["captured"] is True and rows[family]["read"] <= rows[family]["exactness"]
    assert rows["bert"]["decoder"] and not rows["llama"]["decoder"]
    for family in INEXACT:
        assert passes(rows[family]) and rows[family]["read"] > 0.05, rows[family]
    for family, reason in REFUSED.items():
        assert missed(rows[family]) == ["read"] and reason in rows[family]["read"]
    text = (tmp_path / "coverage.md").read_text()
    assert "| llama | yes | exact | yes | - |" in text and "Of 15 families 15 can be built tiny. 13" in text
    assert json.loads((tmp_path / "coverage.json").read_text())["families"] == list(rows.values())


def test_what_the_teacher_misses_itself_does_not_count_and_all_else_does():
    row = {"family": "x", "built": True, "captured": True, "read": 0.0, "exactness": 1e-4, "kept": 0}
    row |= dict.fromkeys((*coverage.CHECKS, "teacher_cache", "teacher_left_padding"), True)
    assert passes(row)
    for check in coverage.CHECKS:
        assert missed(row | {check: "why"}) == [check]
        assert "| x | yes | exact | no | " in page([row | {check: False}])
    assert passes(row | {"left_padding": False, "teacher_left_padding": False})
    assert passes(row | {"cache": False, "half": False, "teacher_cache": "an error"})
    assert not passes(row | {"saved": False, "teacher_cache": False})
    assert missed({"family": "x", "built": "no config"}) == ["built"]
    assert missed({"family": "x", "built": True, "read": "hidden"}) == ["read"]


def test_a_family_that_hangs_or_dies_takes_nobody_with_it(monkeypatch, capsys):
    def check(family):
        raise SystemExit(3) if family == "dies" else TimeoutError("never mind")

    monkeypatch.setattr(coverage, "check_family", check)
    rows = cover(["dies", "llama"])
    assert "its process ended" in rows[0]["built"] and rows[1]["built"] == "TimeoutError: never mind"
    monkeypatch.setattr(coverage, "CAUSAL_FAMILIES", ["llama"])
    main(["coverage"])
    assert "0 of 1 families" in capsys.readouterr().out


@pytest.mark.families
@pytest.mark.timeout(3600)
def test_all_causal_families():
    rows = cover()
    assert len(rows) == len(CAUSAL_FAMILIES) >= 196
    assert sum(row.get("captured") is True for row in rows) >= 162
    assert sum(map(passes, rows)) >= 150
