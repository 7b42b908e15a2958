"""What a command line is refused for at once: before torch is imported, and in one line when interrupted there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cab_hf.checks import SPECIAL_SOURCES, check_options, check_source, option_names
from cab_hf.data.image_sources import BUILTIN
from cab_hf.recipe_options import known_options


ROOT = Path(__file__).parents[1]
REFUSED = {
    "--help": "COMMAND",
    "distill --help": "--tokens",
    "distill random-llama --data notes.txt --tokenz 3": "Did you mean '--tokens'?",
    "distill random-llama --data notes.txt --kl_wieght 3": "Did you mean '--kl_weight'?",
    "distill random-llama --data notes.txt --tokens ten": "no positive number",
    "distill random-llama --data notes.txt --recipe lm_best": "none of cifar10_dinov2_small",
    "distill random-llama --data ./note.txt": "`data` './note.txt' is no file and no folder",
    "distill ./nothing --data notes.txt": "`teacher` './nothing' is no file and no folder",
    "evaluate student --data builtin": "required: --teacher",
    "chat student --tempreature 1": "Unknown options: --tempreature 1",
}
# Asks for each line, and says what came of it; nothing of it may need what takes seconds to import.
SCRIPT = """
import contextlib, io, sys
sys.argv[0] = "cab-hf"
from cab_hf.cli import main
for line in sys.argv[1:]:
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()) as said, \\
            contextlib.redirect_stdout(said):
        main(line.split())
    print(" ".join(said.getvalue().split()))
assert not {"torch", "transformers", "datasets", "accelerate"} & sys.modules.keys()
"""
INTERRUPTED = """
import runpy, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_names_of_options_are_those_of_recipes():
    assert option_names() == known_options()
    assert SPECIAL_SOURCES >= BUILTIN.keys()


def test_the_hub_is_asked_once_for_a_source_that_it_has(monkeypatch):
    asked = []

    class Hub:
        def repo_info(self, source: str, **options: object) -> None:
            asked.append((source, options["repo_type"]))
            if len(asked) == 1:
                raise OSError("out of reach")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    with pytest.raises(ConnectionError, match="`data` 'somebody/once' is no file"):
        check_source("data", "somebody/once", "dataset")
    for option in ("data", "dataset", "eval_dataset"):
        check_source(option, "somebody/once", "dataset")
    check_source("teacher", "somebody/once", "model")
    assert asked == [("somebody/once", "dataset")] * 2 + [("somebody/once", "model")]


def test_any_spelling_that_a_recipe_takes_is_known():
    check_options(["--block-size", "64", "--no_bf16", "--stages", "x", "--learning_rate=-1", "-1"], ())
    with pytest.raises(ValueError, match="Unknown option: '--dry-ru'. Did you mean '--dry_run'"):
        check_options(["--dry-ru"], ("dry_run",))


def test_a_mistyped_line_needs_no_torch(tmp_path):
    (tmp_path / "notes.txt").write_text("Some words.")
    command = [sys.executable, "-c", SCRIPT, *REFUSED]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=_environment())
    assert done.returncode == 0, done.stderr
    for line, said, expected in zip(REFUSED, done.stdout.splitlines(), REFUSED.values(), strict=True):
        assert expected in said, line


@pytest.mark.parametrize("program", ["train_cab.py", "cab-hf"])
def test_an_interrupt_while_torch_is_imported_is_one_line(tmp_path, program):
    (tmp_path / "cab-hf").write_text("from cab_hf.cli import main\nmain()\n")  # as pip writes it
    line = {
        "train_cab.py": [str(ROOT / "train_cab.py"), str(ROOT / "training_args/smoke.yaml")],
        "cab-hf": ["cab-hf", "distill", "random-llama", "--data", "builtin"],
    }[program]
    command = [sys.executable, "-c", INTERRUPTED, *line]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=_environment())
    assert done.returncode == 130 and done.stderr.startswith("error: interrupted")
    assert len(done.stderr.splitlines()) == 1


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
