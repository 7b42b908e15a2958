"""What someone has who installs the wheel, and no clone: from a teacher to a checked export, in an empty folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
QUICK = ["--use_cpu", "true", "--disable_tqdm", "true", "--eval_max_tokens", "512", "--sample_tokens", "4"]
SMALL = ["--block_size", "64", "--license", "mit", "--verify_reload", "false", "--start", "served"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel of this checkout, unpacked where nothing else is."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, cwd=folder)
    (wheel,) = (folder / "dist").glob("cab_hf-*.whl")
    target = folder / "site"
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)], check=True)
    return target


@pytest.mark.slow
def test_distil_card_chat_export_and_check(installed, tmp_path):
    notes = " ".join(f"{number} and {number} is {2 * number}." for number in range(600))
    (tmp_path / "notes.txt").write_text(notes)
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run(*arguments, given=""):
        command = [sys.executable, "-m", "cab_hf.cli", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, input=given, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    where = [sys.executable, "-c", "import cab_hf; print(cab_hf.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout
    assert found.startswith(str(installed))

    student = ["random-llama", "--data", "notes.txt", "--tokens", "2k", "--output_dir", "student", *QUICK, *SMALL]
    assert "3 steps" not in run("distill", *student, "--dry_run")
    assert "stage 1 of 1" in run("distill", *student)
    run("card", "student", "--overwrite")
    card = (tmp_path / "student/README.md").read_text()
    assert "license: mit" in card and "## Sample" in card and "## Use" in card
    assert run("chat", "student", "--max_new_tokens", "4", given="one and one is\n")
    run("export", "student", "served", "--to", "stock")
    assert "transformers" in run("check", "served")
