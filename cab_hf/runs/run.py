"""A whole run of a recipe: claim its folder, distil, evaluate, save; what is finished is reused."""

import importlib.util
import json
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers.integrations import get_available_reporting_integrations

from cab_hf.checks import check_source
from cab_hf.evaluation.plots import learning_curves
from cab_hf.files import write_whole
from cab_hf.hub.publish import CARD_NAME, check_access, publish_folder
from cab_hf.recipe_options import default_of
from cab_hf.recipes import RECIPE_NAME, REPORT_NAME, Recipe, parse_recipe, without
from cab_hf.runs import images as run_images
from cab_hf.runs import text as run_text
from cab_hf.runs.card import check_finite, hub_ids, license_of, write_model_card
from cab_hf.runs.inputs import INPUTS_NAME


# Options that do not change what a run computes: a finished run may be asked for again with others.
FREE_OPTIONS = {
    "sample_prompt",
    "sample_tokens",
    "verify_reload",
    "disable_tqdm",
    "report_to",
    "resume_from_checkpoint",
    "push_to_hub",
    "hub_model_id",
    "hub_token",
    "hub_private_repo",
    "hub_revision",
    "hub_strategy",
    "cpu_threads",
}
WITHOUT_PACKAGE = """
import sys
sys.modules["cab_hf"] = None  # an import of the package would fail: the folder must do alone
"""


def run_recipe(recipe: Recipe) -> dict[str, Any]:
    """Distils, evaluates and saves a student; what an earlier run of the same recipe finished is reused.

    `output_dir` then holds the student (weights, config, modelling files, tokenizer or image processor, card),
    `report.json`, `recipe.yaml`, and under `stages/` each stage's checkpoints and its own loadable student. A recipe
    with `finetune` trains the teacher itself on labels; a teacher whose folder is missing is made by its
    `teacher_recipe` first.

    Returns:
        The report that is also in `report.json`.

    Raises:
        FileNotFoundError: the teacher can only be a folder, and is none.
        ValueError: `output_dir` holds a run of another recipe, or with `push_to_hub` the token may not write or the
            recipe makes a teacher.
        ConnectionError: with `push_to_hub`, the Hub can't be reached.
    """
    folder, args, repo_id = recipe.output_dir, recipe.stages[-1].args, None
    if recipe.model.cpu_threads is not None:
        torch.set_num_threads(recipe.model.cpu_threads)
    pushes = args.push_to_hub and recipe.is_main_process
    if pushes:  # before a long training, not after it
        if recipe.model.finetune:
            raise ValueError(
                "`push_to_hub` publishes students with their cards; `finetune` makes a teacher. Leave it out, and "
                f"push the result with `hf upload ORG/NAME {folder}`."
            )
        if not (folder / CARD_NAME).is_file() and license_of(recipe) is None:
            raise ValueError(
                f"The licence of teacher {recipe.model.teacher!r} is unknown, and a student without one is not "
                "published. Say it by `--license`, for instance `--license apache-2.0`."
            )
        repo_id = check_access(args.hub_model_id or folder.name, token=args.hub_token, private=args.hub_private_repo)
    _check_sources(recipe)
    report = _claim(folder, recipe)
    if report is None:
        report = _run(recipe)
        for name, one in (report["after"] or {}).items():
            check_finite(name, one)
        if recipe.is_main_process:
            report["hub_ids"] = hub_ids(recipe)
            if repo_id is not None:
                report["repo_id"] = repo_id
            if not recipe.model.finetune:
                draw_learning_curves(folder, report)
                write_model_card(folder, recipe, report)
            # Last: a folder with a report is a finished run.
            write_whole(folder / REPORT_NAME, json.dumps(report, indent=1))
    else:
        print(f"{folder} already holds this run's result; it is reused. Remove the folder to train again.")
    if recipe.is_main_process:
        print(summary(report))
        if recipe.data.verify_reload and not recipe.model.finetune:
            print(reload_in_fresh_process(recipe))
        if not recipe.model.finetune:
            print(next_commands(recipe))
    if pushes:
        name_in_card(folder / CARD_NAME, repo_id)
        commit = publish_folder(
            folder,
            repo_id,
            token=args.hub_token,
            private=args.hub_private_repo,
            revision=args.hub_revision,
        )
        print(f"The student is on the Hub: {commit.commit_url}")
    return report


def _run(recipe: Recipe) -> dict[str, Any]:
    _make_teacher(recipe)
    if recipe.model.reads_images:
        return run_images.finetune(recipe) if recipe.model.finetune else run_images.distil_images(recipe)
    return run_text.finetune(recipe) if recipe.model.finetune else run_text.distil_text(recipe)


def _check_sources(recipe: Recipe) -> None:
    """That trackers, models and data are there, before `output_dir` is this recipe's and anything is read."""
    known = get_available_reporting_integrations()
    missing = [
        name for stage in (*recipe.stages, *recipe.baselines) for name in stage.args.report_to if name not in known
    ]
    if missing:
        raise ImportError(
            f"`report_to` is {missing[0]!r}, but that tracker is not installed or not known; installed are {known}. "
            "Install its package, or set `report_to: none`."
        )
    model, data = recipe.model, recipe.data
    if model.teacher_recipe is None and "model_type" not in model.teacher_config:
        check_source("teacher", model.teacher, "model")
    if model.student is not None and not model.finetune:
        check_source("student", model.student, "model")
    for source in data.dataset:
        check_source("dataset", source, "dataset")
    for source in data.eval_dataset:
        check_source("eval_dataset", source.partition("=")[2] or source, "dataset")


def _make_teacher(recipe: Recipe) -> None:
    """Runs the recipe of a teacher whose folder is missing, or unfinished."""
    model = recipe.model
    if model.teacher_recipe is None or (Path(model.teacher) / REPORT_NAME).is_file():
        return
    print(f"The teacher {model.teacher} does not exist yet: {model.teacher_recipe} makes it.")
    shared = [
        option
        for name in ("use_cpu", "cpu_threads", "disable_tqdm", "data_dir", "bf16")
        if name in recipe.values
        for option in (f"--{name}", str(recipe.values[name]))
    ]
    run_recipe(parse_recipe([model.teacher_recipe, "--output_dir", model.teacher, *shared]))


def draw_learning_curves(folder: Path, report: dict[str, Any]) -> None:
    """Draws the losses of all stages, one after the other, where matplotlib is there to do it."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    log, steps, begins = [], 0, {}
    for stage in report["stages"]:
        begins[stage["name"]] = steps
        log += [entry | {"step": entry["step"] + steps} for entry in stage["log"]]
        steps += stage["steps"]
    if any(entry.get("loss", 0) > 0 for entry in log):
        title = f"Training losses of {folder.name}"
        learning_curves(log, folder / "learning_curves.png", title=title, stages=begins)


def summary(report: dict[str, Any]) -> str:
    """A short table of a report, for the terminal."""
    return (run_images.image_summary if report.get("task") == "image-classification" else run_text.text_summary)(
        report
    )


def name_in_card(path: Path, repo_id: str) -> None:
    """The lines of a card that load the student from inside its folder load it by its id from now on."""
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        named = text.replace('.from_pretrained("."', f'.from_pretrained("{repo_id}"')
        named = named.replace(", from inside this folder:", ":").replace(
            "cab-hf export . ", f"cab-hf export {repo_id} "
        )
        if named != text:
            write_whole(path, named)


def next_commands(recipe: Recipe) -> str:
    """What to type next."""
    folder, model, data = recipe.output_dir, recipe.model, recipe.data
    sources = data.eval_dataset or data.dataset
    place = f" --data_dir {recipe.images.data_dir}" if model.reads_images and recipe.images.data_dir else ""
    kind, runtime = ("onnx", "onnxruntime") if model.reads_images else ("stock", "vLLM")
    unlicensed = "" if license_of(recipe) else " --license NAME"
    exports = {f"cab-hf export {folder} {folder}-{kind} --to {kind}": f"for {runtime}"}
    commands = {
        f"cab-hf evaluate {folder} --teacher {model.teacher} --data {' '.join(sources)}{place}": "measure more",
        **({} if model.attention_window else exports),  # no stock class has windows beside mixers
        f"cab-hf card {folder} --overwrite{unlicensed}": "its model card, with new measurements",
        "the same command with --push_to_hub true": "publish it",
    }
    if not model.reads_images:
        commands = {f"cab-hf chat {folder}": "talk to it"} | commands
    width = max(map(len, commands))
    return "\n".join(["next:", *(f"  {command:<{width}}  # {what}" for command, what in commands.items()), ""])


def reload_in_fresh_process(recipe: Recipe) -> str:
    """What the saved student makes of an example in a new process in which `cab_hf` can't be imported."""
    folder = recipe.output_dir.resolve()
    with tempfile.TemporaryDirectory() as elsewhere:
        if recipe.model.reads_images:
            title, code = "says of a test image", run_images.PIPELINE
            arguments = [run_images.write_test_image(recipe, Path(elsewhere))]
        else:
            title, code = "continues", run_text.PIPELINE
            arguments = [recipe.data.sample_prompt or "The", str(recipe.data.sample_tokens)]
        process = subprocess.run(
            [sys.executable, "-c", WITHOUT_PACKAGE + code, str(folder), *arguments],
            cwd=elsewhere,
            capture_output=True,
            text=True,
        )
    if process.returncode:
        raise RuntimeError(f"The saved student did not load in a fresh process:\n{process.stderr[-2000:]}")
    return f"In a fresh process without cab_hf, the student {title}:\n{process.stdout.strip()}\n"


def differences(found: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """What two recipes' results can differ by, as texts; an option that is not there has its default."""
    found, asked = without(found, FREE_OPTIONS), without(asked, FREE_OPTIONS)
    names = sorted(found.keys() | asked.keys())
    pairs = [(name, *(values.get(name, default_of(name)) for values in (found, asked))) for name in names]
    shown = [(name, *(textwrap.shorten(repr(one), 60) for one in both)) for name, *both in pairs if both[0] != both[1]]
    return [f"{name}: {there} there, {now} now" for name, there, now in shown]


def has_begun(folder: Path) -> bool:
    """Whether a run's folder holds more than its recipe and what it is to read: a step, or anything else."""
    bare = {folder / RECIPE_NAME, folder / "stages" / INPUTS_NAME}
    return any(path.is_file() and path not in bare for path in folder.rglob("*"))


def _claim(folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    """Makes `output_dir` this recipe's; returns the report if the run is finished there."""
    path = folder / RECIPE_NAME
    if path.is_file() and any(other != path for other in folder.iterdir()):  # alone, of a run that never began
        differing = differences(yaml.safe_load(path.read_text()) or {}, recipe.values)
        if differing and not has_begun(folder):
            (folder / "stages" / INPUTS_NAME).unlink(missing_ok=True)
        elif differing:
            raise ValueError(
                f"`output_dir` {folder} holds a run of another recipe ({'; '.join(differing[:4])}). Choose another "
                "`--output_dir`, or remove the folder."
            )
    if (folder / REPORT_NAME).is_file():
        return json.loads((folder / REPORT_NAME).read_text())
    if recipe.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        # Sorted keys and plain types only, so that a run reads what another one wrote.
        write_whole(path, yaml.safe_dump(without(recipe.values, {"hub_token"})))
    return None
