"""Compares an export with its student, token by token, in every runtime that it is shown."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cab_hf.export import runtimes
from cab_hf.export.loading import read_student
from cab_hf.export.probe import PROBE_NAME, probe_of
from cab_hf.files import write_whole


TOLERANCE = 0.02


def check_export(
    export: str | Path,
    *,
    student: str | Path | None = None,
    data: str = "builtin",
    pythons: Sequence[str | Path] = (),
    tolerance: float | None = None,
    output: str | Path | None = None,
) -> dict[str, Any]:
    """Asks an export in each runtime, and compares what it says with its student.

    Args:
        export: folder that `cab-hf export` wrote.
        student: folder or Hub id of the student, for a probe on `data`; by default the export's own probe, which was
            made as it was written.
        data: texts for that probe, as `load_documents` takes them.
        pythons: interpreters of other environments, with vLLM or another transformers, say. This one is always asked.
        tolerance: largest mean difference of log-probabilities, in nats; by default 0.02, or what the export's probe
            says of its quantised weights. Where a greedy token differs, the student's own must be ahead by no more
            than ten times that.
        output: JSON file for the report; by default `check.json` in the export.

    Returns:
        Of each runtime, by name and version, `equal` of `n` greedy tokens before the first that differs, `difference`
        (mean of log-probabilities, in nats), `largest`, and `agrees`; or why it was `skipped`.

    Raises:
        ValueError: no export there, no probe, or a Python path that is none.
        RuntimeError: no runtime here has anything to say, or one of them failed.
    """
    export = Path(export)
    kinds = [files for _, files, _ in runtimes.RUNTIMES.values()]
    if not any(any(export.glob(files)) for files in kinds):
        raise ValueError(
            f"{export} holds no export ({', '.join(dict.fromkeys(kinds))}). Write one by `cab-hf export`."
        )
    if student is not None:
        probe = probe_of(student, read_student(student).float(), data)
    elif (export / PROBE_NAME).is_file():
        probe = json.loads((export / PROBE_NAME).read_text(encoding="utf-8"))
    else:
        raise ValueError(f"{export} has no {PROBE_NAME}. Name its student by `student` (--student).")
    if tolerance is None:
        tolerance = probe.get("tolerance", TOLERANCE)
    report: dict[str, Any] = {}
    for python in [sys.executable, *map(str, pythons)]:
        for name, found in _ask(python, export, probe).items():
            key = f"{name} {found['version']}"
            report[key] = found if "skipped" in found else _compared(found["rows"], probe["rows"], tolerance)
    if not report:
        packages = ", ".join(package for package, _, _ in runtimes.RUNTIMES.values())
        raise RuntimeError(f"No runtime for {export} is installed ({packages}). Name an interpreter that has one.")
    path = Path(output or export / "check.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(report, indent=1) + "\n")
    return report


def _ask(python: str, export: Path, probe: Mapping[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        asked, answers = Path(folder) / "probe.json", Path(folder) / "answers.json"
        asked.write_text(json.dumps(probe), encoding="utf-8")
        command = [python, runtimes.__file__, *map(str, (export.resolve(), asked, answers))]
        try:
            process = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            reason = f"{python} is no interpreter ({error.strerror})"
            raise ValueError(f"{reason}. Name bin/python of an environment.") from error
        if process.returncode == 0:
            return json.loads(answers.read_text(encoding="utf-8"))
    lines = process.stderr.strip().splitlines() or ["no message"]
    # An engine in processes of its own ends by saying that one of them did.
    causes = [line for line in lines if "Error: " in line and "Engine" not in line.rpartition("Error: ")[0][-40:]]
    raise RuntimeError(f"{export} failed under {python}: {(causes or lines)[-1].rpartition('] ')[2]}")


def _compared(rows: Sequence[Sequence], expected: Sequence[Sequence], tolerance: float) -> dict[str, Any]:
    differences, equal, is_tie = [], 0, True
    for (told, greedy, said), (own_told, own_greedy, own_said, ahead) in zip(rows, expected, strict=True):
        differences += [abs(one - other) for one, other in zip(told or [], own_told)]
        same = next((i for i, pair in enumerate(zip(greedy, own_greedy)) if pair[0] != pair[1]), len(own_greedy))
        differences += [abs(one - other) for one, other in zip(said[:same], own_said)]
        equal += same
        is_tie &= same == len(own_greedy) or ahead[same] <= 10 * tolerance
    mean = sum(differences) / max(len(differences), 1)
    return {
        "equal": equal,
        "n": sum(len(row[1]) for row in expected),
        "difference": mean,
        "largest": max(differences, default=0.0),
        "agrees": bool(differences) and mean <= tolerance and is_tie,
    }


def describe(report: Mapping[str, Mapping[str, Any]]) -> str:
    """A report as a table, for the terminal."""
    lines = [f"  {'':<28}{'greedy tokens':>15}{'mean difference':>17}{'largest':>10}"]
    for name, found in report.items():
        if "skipped" in found:
            lines.append(f"  {name:<28}skipped: {found['skipped']}")
            continue
        verdict = "agrees" if found["agrees"] else "DIFFERS"
        count = f"{found['equal']} of {found['n']}"
        lines.append(f"  {name:<28}{count:>15}{found['difference']:>17.5f}{found['largest']:>10.4f}  {verdict}")
    return "\n".join(lines)
