"""`cab-hf check`: an export is asked in real runtimes, in processes of their own, and compared with its student."""

import json
import sys

import pytest
import torch
from commands import error_of
from safetensors.torch import load_file, save_file
from test_gguf_export import save

from cab_hf.cli import main
from cab_hf.export import export_gguf, export_onnx, export_stock
from cab_hf.export.check import check_export
from cab_hf.export.probe import PROBE_NAME


SSD = {"mixer_type": "mamba2", "n_groups": 2, "intermediate_size": 96, "expand": 1.0}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    save(folder, **SSD)
    return folder


@pytest.fixture(scope="module")
def stock(student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "stock"
    export_stock(student, folder)
    return folder


def only(report, runtime):
    (found,) = (found for name, found in report.items() if name.startswith(f"{runtime} "))
    return found


def test_transformers_agrees(stock, capsys):
    main(["check", str(stock)])
    out = capsys.readouterr().out
    assert "transformers" in out and "96 of 96" in out and "agrees" in out
    found = only(json.loads((stock / "check.json").read_text()), "transformers")
    assert found["agrees"] and found["equal"] == found["n"] == 96 and found["difference"] < 1e-4


def test_llama_cpp_and_onnxruntime_agree(student, tmp_path):
    pytest.importorskip("xllamacpp")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    export_gguf(student, tmp_path / "both")
    export_onnx(student, tmp_path / "onnx", tokens=72)
    for folder, runtime in (("both", "llama.cpp"), ("onnx", "onnxruntime")):
        found = only(check_export(tmp_path / folder), runtime)
        assert found["agrees"] and found["equal"] == 96, found


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
def test_other_kinds_of_gguf_run(student, tmp_path, kind):
    pytest.importorskip("xllamacpp")
    path = export_gguf(student, tmp_path, kind=kind)
    assert path.stat().st_size < 300_000  # of 480 kB in float32
    found = only(check_export(tmp_path, tolerance=0.3), "llama.cpp")
    assert (
        found["equal"] > 0 and found["difference"] < {"f16": 0.01, "q8_0": 0.1, "q4_0": 1.0}[kind]
    )  # of random weights


def test_another_model_than_the_student_is_found(stock, student, tmp_path, capsys):
    folder = tmp_path / "stock"
    export_stock(student, folder)
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if name.endswith("layers.0.mamba.in_proj.weight"):
            weights[name] = weights[name].flip(0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert not only(check_export(folder), "transformers")["agrees"]
    assert "differs from its student in transformers" in error_of(capsys, "check", folder)


def test_a_student_at_hand_is_compared_on_other_texts(stock, student, tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(f"{number}. Mind the gap, and the text that comes after it. " * 3)
    path = tmp_path / "new" / "folder" / "check.json"
    found = check_export(stock, student=student, data=str(tmp_path), output=path)
    assert only(found, "transformers")["agrees"] and json.loads(path.read_text()) == found


def test_what_can_not_be_asked_is_one_line(stock, tmp_path, capsys):
    assert "holds no export" in error_of(capsys, "check", tmp_path)
    assert "is no interpreter" in error_of(capsys, "check", stock, "--python", tmp_path / "python")
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare" / name).write_bytes((stock / name).read_bytes())
    message = error_of(capsys, "check", tmp_path / "bare")
    assert PROBE_NAME in message and "--student" in message
    # A model whose files are not those of its config fails in its runtime, and the runtime's reason is told.
    (tmp_path / "bare" / PROBE_NAME).write_bytes((stock / PROBE_NAME).read_bytes())
    (tmp_path / "bare" / "model.safetensors").write_bytes(b"nothing")
    message = error_of(capsys, "check", tmp_path / "bare")
    assert f"failed under {sys.executable}" in message and "Error" in message


def test_an_older_transformers_is_not_asked(stock, tmp_path):
    folder = tmp_path / "stock"
    folder.mkdir()
    for path in stock.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    assert config["least_transformers_version"] == "5.23.0"
    (folder / "config.json").write_text(json.dumps(config | {"least_transformers_version": "99.0"}))
    assert "needs transformers 99.0" in only(check_export(folder), "transformers")["skipped"]


def test_the_probe_is_what_the_student_says(stock, student):
    from cab_hf.export.loading import read_student

    probe = json.loads((stock / PROBE_NAME).read_text())
    model = read_student(student)
    prompt, (told, greedy, said, ahead) = probe["prompts"][0], probe["rows"][0]
    ids = torch.tensor([prompt + greedy])
    with torch.no_grad():
        logs = model(ids).logits[0].log_softmax(-1)
    torch.testing.assert_close(
        torch.tensor(told + said), logs[:-1].gather(1, ids[0, 1:, None])[:, 0], atol=1e-4, rtol=0
    )
    assert probe["banned"] == [0] and 0 not in greedy
    assert len(greedy) == probe["new_tokens"] == 24 and min(ahead) >= 0
