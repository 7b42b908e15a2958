"""README and the pages under docs: their commands and lines of Python run, their links and names exist."""

import re
import shlex
from dataclasses import fields
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
from transformers import AutoModelForCausalLM

import cab_hf
from cab_hf.cli import COMMANDS, make_parser
from cab_hf.data import load_documents, pack_documents
from cab_hf.recipe_options import ARGUMENT_CLASSES
from cab_hf.recipes import parse_recipe
from cab_hf.teachers import load_teacher
from cab_hf.transfer import FAMILIES, VISION_FAMILIES


ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md")), ROOT / "benchmarks/README.md", ROOT / "CONTRIBUTING.md"]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The commands of a page's shell blocks, as words."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def test_readme_is_short_and_soon_at_its_first_command():
    text = README.read_text()
    assert len(text.encode()) < 10_000
    assert text.index("\nmake demo") < 2_200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert link.startswith("http") or (page.parent / link).exists(), link


@pytest.mark.parametrize("folder", re.findall(r"^(\w+(?:/\w+)?/) {2,}", README.read_text(), flags=re.MULTILINE))
def test_the_tree_of_the_readme(folder):
    assert (ROOT / folder).is_dir()


def test_every_folder_of_the_code_is_in_the_tree():
    packages = {path.parent.name for path in (ROOT / "cab_hf").glob("*/__init__.py")}
    assert packages == set(re.findall(r"^cab_hf/(\w+)/ ", README.read_text(), flags=re.MULTILINE))


def test_rooms_import_from_rooms_above_them():
    rooms = re.findall(r"^\| `(\w+)/` \|", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    for number, room in enumerate(rooms):
        for path in (ROOT / "cab_hf" / room).rglob("*.py"):
            imported = set(re.findall(r"^\s*from cab_hf\.(\w+)[. ]", path.read_text(), flags=re.MULTILINE))
            assert not imported & set(rooms[number + 1 :]), path
    assert set(rooms) == {path.parent.name for path in (ROOT / "cab_hf").glob("*/__init__.py")}


def test_families_are_counted():
    assert f"({len(FAMILIES) + len(VISION_FAMILIES)} families)" in README.read_text()


# Commands and code


def test_make_targets_exist():
    targets = [words[1] for words in commands(README) if words[0] == "make"]
    assert targets == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in targets)


@pytest.mark.parametrize(
    "words",
    [words for page in (README, ROOT / "docs/guide.md") for words in commands(page) if "train_cab.py" in words],
    ids=" ".join,
)
def test_recipe_commands_parse(words, tmp_path, monkeypatch):
    assert words[:2] == ["accelerate", "launch"]
    arguments = words[words.index("train_cab.py") + 1 :]
    monkeypatch.chdir(ROOT)
    cpu = {"use_cpu": "true", "bf16": "false", "cuda_graph": "false", "torch_compile": "false"}
    given = [word for name, value in cpu.items() if f"--{name}" not in arguments for word in (f"--{name}", value)]
    if "--use_cpu" in arguments:
        arguments[arguments.index("--use_cpu") + 1] = "true"
    recipe = parse_recipe([*arguments, *given, "--output_dir", str(tmp_path)])
    assert recipe.stages


def test_options_of_the_readme_exist():
    named = set(re.findall(r"`--(\w+)", README.read_text()))
    assert len(named) >= 10
    known = {field.name for arguments in ARGUMENT_CLASSES for field in fields(arguments)}
    (distil,) = (action.choices["distill"] for action in make_parser()._actions if action.dest == "command")
    assert named <= known | {action.dest for action in distil._actions}


def test_subcommands_of_the_table_parse():
    lines = re.findall(r"^\| `(cab-hf [^`]+)` \|", README.read_text(), flags=re.MULTILINE)
    assert {line.split()[1] for line in lines} == set(COMMANDS)
    for line in lines:
        make_parser().parse_args(line.split()[1:])


@pytest.fixture
def tiny_teacher(tmp_path):
    from cab_hf.teachers.demo import random_llama

    model, tokenizer = random_llama()
    model.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text("A student learns from its teacher, token by token. " * 200)
    return tmp_path


def test_the_lines_of_python_run(tiny_teacher, monkeypatch):
    training, loading = blocks(README, "python")
    lines = [line for line in training.split("\n\n")[1].splitlines() if line]
    assert len(lines) == 6 and len(loading.split("\n\n")[1].splitlines()) == 1
    monkeypatch.chdir(tiny_teacher)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    replaced = {
        "HuggingFaceTB/SmolLM2-135M": "teacher",
        "my-texts/": "text.txt",
        "max_steps=1000": 'max_steps=2, use_cpu=True, report_to="none"',
    }
    for old, new in replaced.items():
        assert training.count(old) == 1, old
        training = training.replace(old, new)
    names: dict = {}
    exec(training, names)
    loaded = AutoModelForCausalLM.from_pretrained("my-mamba")
    assert isinstance(loaded, cab_hf.CABMambaForCausalLM)
    student = names["student"].eval().cpu()
    inputs = torch.arange(3, 20)[None]
    torch.testing.assert_close(loaded(inputs).logits, student(inputs).logits)

    exec(loading.replace("outputs/quickstart_lm", "my-mamba"), names)
    assert isinstance(names["student"], cab_hf.CABMambaForCausalLM)


@pytest.mark.filterwarnings("default::FutureWarning")  # peft's own
@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_lines_of_the_guide_run(number, tiny_teacher, monkeypatch):
    if number == 2:
        pytest.importorskip("peft")
    lines = blocks(ROOT / "docs/guide.md", "python")
    assert len(lines) == 4 and lines[0] == blocks(README, "python")[0]
    monkeypatch.chdir(tiny_teacher)
    teacher, tokenizer = load_teacher("teacher")
    text = load_documents("text.txt")
    names = {"teacher": teacher, "tokenizer": tokenizer, "blocks": pack_documents(text, tokenizer, 512)}
    exec(lines[number], names | {"student": cab_hf.student_from_teacher(teacher)})


# The API pages


def test_every_room_has_a_page():
    pages = {path.stem for path in (ROOT / "docs/api").glob("*.md")}
    assert {path.parent.name for path in (ROOT / "cab_hf").glob("*/__init__.py")} - {"runs"} <= pages


@pytest.mark.parametrize("page", sorted((ROOT / "docs/api").glob("*.md")), ids=lambda page: page.stem)
def test_names_of_the_api_exist(page):
    names = re.findall(r"^::: ([\w.]+)", page.read_text(), flags=re.MULTILINE)
    names += re.findall(r"\]\[(cab_hf[\w.]+)\]", page.read_text())
    assert names
    for name in names:
        assert resolve_name(name) is not None


@pytest.mark.parametrize("room", ["cab_hf.transfer", "cab_hf.distillation", "cab_hf.hub"])
def test_listed_members_are_those_that_a_room_exports(room):
    text = (ROOT / f"docs/api/{room.rpartition('.')[2]}.md").read_text()
    listed = {
        name
        for group in re.findall(r"members:\s*((?:\[[^\]]*\]|(?:\s+- \w+)+))", text)
        for name in re.findall(r"\w+", group)
    }
    module = resolve_name(room)
    exported = {name for name in module.__all__ if hasattr(getattr(module, name), "__doc__") and not name.isupper()}
    borrowed = {name for name in exported if not getattr(module, name).__module__.startswith(room)}
    assert listed == exported - borrowed
