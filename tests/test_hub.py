"""Model cards: valid metadata, no placeholder, only ways of loading that work, and never a card overwritten."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import Mamba2Config, Mamba2ForCausalLM

from cab_hf.hub import build_card, describe_teacher, write_card, write_model_card
from cab_hf.models import CABMambaConfig, CABMambaForCausalLM
from cab_hf.plots import learning_curves


REPORT = {
    "student_perplexity": 31.25,
    "student_perplexity_ci95": [28.5, 34.25],
    "teacher_perplexity": 26.5,
    "teacher_perplexity_ci95": [24.0, 29.0],
    "perplexity_ratio": 1.18,
    "perplexity_ratio_ci95": [1.1, 1.3],
    "kl": 0.3401,
    "kl_ci95": [0.32, 0.36],
    "agreement": 0.71,
    "agreement_ci95": [0.70, 0.72],
    "n_tokens": 6144,
    "n_blocks": 24,
}
RECALL = {"recall": 0.875, "ci95": [0.84, 0.9], "n_tokens": 2016, "n_sequences": 32, "gap": 16, "length": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("students") / "tiny-student"
    torch.manual_seed(0)
    config = CABMambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, mixer_type="mamba2", head_dim=16)
    CABMambaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """Cards of Hub teachers can't be read, and nobody waits for a network to say so."""
    load = ModelCard.load

    def load_local(source, **kwargs):
        if not Path(source).exists():
            raise OSError(f"{source} is on the Hub")
        return load(source, **kwargs)

    monkeypatch.setattr(ModelCard, "load", load_local)


def metadata_of(card: ModelCard) -> dict:
    """The YAML header, read without huggingface_hub."""
    header = re.match(r"---\n(.*?)\n---\n", str(card), re.DOTALL)
    return yaml.safe_load(header.group(1))


def no_placeholder(text: str) -> bool:
    return not re.search(r"\{\{|\}\}|\{%|More Information|TODO|\[your|None\b|nan\b|/tmp/", text)


class TestBuildCard:
    def test_metadata(self, folder):
        card = build_card(
            folder,
            {"speeches, held out": REPORT},
            {"Tokens": "10,027,008", "Hardware": None},
            teacher="org/teacher",
            license="mit",
            datasets=["org/speeches"],
            language="en",
            repo_id="org/student",
        )
        data = metadata_of(card)
        assert data["license"] == "mit" and data["language"] == "en" and data["library_name"] == "transformers"
        assert data["pipeline_tag"] == "text-generation" and data["base_model"] == "org/teacher"
        assert data["datasets"] == ["org/speeches"] and data["tags"] == ["mamba", "cab", "distillation"]
        (entry,) = data["model-index"]
        (result,) = entry["results"]
        (metric,) = result["metrics"]
        assert entry["name"] == "student" and result["task"]["type"] == "text-generation"
        assert metric["type"] == "perplexity" and metric["value"] == 31.25 and "n = 6,144" in metric["name"]
        assert metric["args"] == {"n_tokens": 6144, "ci95": [28.5, 34.25]}
        text = str(card)
        assert "| speeches, held out | student | 31.25 (28.50 to 34.25) | 0.340 (0.320 to 0.360) | 0.710" in text
        assert "| Tokens | 10,027,008 |" in text and "Hardware" not in text
        assert no_placeholder(text)

    def test_round_trip(self, folder, tmp_path):
        card = build_card(folder, {"text": REPORT}, {}, teacher="org/teacher", license="mit")
        assert write_card(tmp_path, card)
        loaded = ModelCard.load(tmp_path / "README.md")
        assert loaded.data.to_dict() == card.data.to_dict()
        assert loaded.data.eval_results[0].metric_value == 31.25

    def test_sections_without_data_are_left_out(self, folder):
        bare = str(build_card(folder, {}, {}, teacher="org/teacher", license="mit"))
        assert not re.search(r"## (Results|Training)|recipe|datasets|model-index|\| \|", bare) and no_placeholder(bare)
        full = str(
            build_card(
                folder,
                {"text": REPORT | {"recall": {"16": {"teacher": RECALL, "student": RECALL | {"recall": 0.0}}}}},
                {"Tokens": 5},
                teacher="org/teacher",
                license="mit",
                recipe="kl_weight: 1.0\n",
            )
        )
        assert "| 16 | 0.875 (0.840 to 0.900) | 0.000" in full and "```yaml\nkl_weight: 1.0\n```" in full
        assert "## Results" in full and "## Training" in full

    def test_describes_the_student(self, folder):
        card = str(build_card(folder, {}, {}, teacher="org/teacher", license="mit"))
        count = sum(parameter.numel() for parameter in CABMambaForCausalLM.from_pretrained(folder).parameters())
        assert f"{count / 1e3:.3g}K parameters (2 layers, width 32, Mamba-2 (SSD) mixers, state size 128)" in card
        assert "# tiny-student\n" in card

    def test_open_interval_of_one_block(self, folder):
        report = REPORT | {"student_perplexity_ci95": [0.0, float("inf")]}
        card = build_card(folder, {"text": report}, {}, teacher="org/teacher", license="mit")
        assert metadata_of(card)["model-index"][0]["results"][0]["metrics"][0]["args"]["ci95"] == [0.0, "inf"]
        assert "| student | 31.25 |" in str(card)

    def test_errors(self, folder, tmp_path):
        with pytest.raises(ValueError, match=r"report on 'text' lacks \['n_tokens'\]"):
            report = {name: value for name, value in REPORT.items() if name != "n_tokens"}
            build_card(folder, {"text": report}, {}, teacher="org/teacher", license="mit")
        with pytest.raises(FileNotFoundError, match="has no config.json"):
            build_card(tmp_path, {}, {}, teacher="org/teacher", license="mit")
        with pytest.raises(ValueError, match="licence of teacher .* is unknown.*license="):
            build_card(folder, {}, {}, teacher=folder)


class TestLoading:
    def test_only_ways_that_work(self, folder, tmp_path):
        text = str(build_card(folder, {}, {}, teacher="org/teacher", license="mit", repo_id="org/student"))
        assert "import cab_hf\nfrom transformers import AutoModelForCausalLM\n\nmodel = " in text
        assert ("trust_remote_code" in text) == ("auto_map" in json.loads((folder / "config.json").read_text()))
        assert "subfolder" not in text and "AutoTokenizer" not in text

    def test_modelling_files_and_stock_class(self, folder, tmp_path):
        config = json.loads((folder / "config.json").read_text())
        stock = Mamba2Config(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_heads=4, head_dim=16, n_groups=1)
        copy = tmp_path / "student"
        CABMambaForCausalLM.from_pretrained(folder).save_pretrained(copy)
        Mamba2ForCausalLM(stock).save_pretrained(copy / "stock")
        (copy / "tokenizer_config.json").write_text("{}")
        (copy / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "a.B"}}))
        text = str(build_card(copy, {}, {}, teacher="t/t", license="mit", repo_id="o/s", stock_subfolder="stock"))
        assert 'model = AutoModelForCausalLM.from_pretrained("o/s", trust_remote_code=True)' in text
        assert "As the `Mamba2ForCausalLM` of transformers itself" in text and 'subfolder="stock"' in text
        assert text.count('tokenizer = AutoTokenizer.from_pretrained("o/s")') == 3
        config.pop("auto_map", None)
        (copy / "config.json").write_text(json.dumps(config))
        assert "trust_remote_code" not in str(build_card(copy, {}, {}, teacher="t/t", license="mit"))
        with pytest.raises(ValueError, match="holds a 'mamba2' model.*stock_subfolder"):
            build_card(copy / "stock", {}, {}, teacher="t/t", license="mit")
        with pytest.raises(FileNotFoundError, match="absent has no config.json"):
            build_card(copy, {}, {}, teacher="t/t", license="mit", stock_subfolder="absent")

    def test_the_shown_lines_run(self, folder, monkeypatch):
        text = str(build_card(folder, {}, {}, teacher="org/teacher", license="mit"))
        code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
        names = {}
        monkeypatch.chdir(folder)
        exec(code, names)
        assert type(names["model"]) is CABMambaForCausalLM


class TestTeacher:
    def test_licence_comes_from_the_teachers_card(self, folder, tmp_path):
        teacher = tmp_path / "teacher"
        teacher.mkdir()
        unknown = {"base_model": None, "license": None, "language": None}
        assert describe_teacher(teacher) == {"name": "teacher"} | unknown
        header = "license: apache-2.0\nbase_model: org/origin\nlanguage:\n- de\n- fr\n"
        (teacher / "README.md").write_text(f"---\n{header}---\n# x\n")
        card = build_card(folder, {}, {}, teacher=teacher)
        assert card.data.license == "apache-2.0" and card.data.base_model == "org/origin"
        assert metadata_of(card)["language"] == ["de", "fr"]
        assert no_placeholder(str(card))

    def test_without_a_hub_the_licence_is_unknown(self, monkeypatch):
        def unreachable(*args, **kwargs):
            raise ConnectionError("offline")

        monkeypatch.setattr("cab_hf.hub.ModelCard.load", unreachable)
        unknown = {"license": None, "language": None}
        assert describe_teacher("org/teacher") == {"name": "org/teacher", "base_model": "org/teacher"} | unknown
        assert describe_teacher("smollm2-demo")["license"] == "apache-2.0"


class TestWriting:
    def test_a_card_is_never_overwritten_unasked(self, folder, tmp_path):
        readme = tmp_path / "README.md"
        readme.write_text("mine")
        card = build_card(folder, {}, {}, teacher="org/teacher", license="mit")
        assert not write_card(tmp_path, card) and readme.read_text() == "mine"
        assert write_card(tmp_path, card, overwrite=True) and "# tiny-student" in readme.read_text()

    @pytest.mark.parametrize(("license", "written"), [("mit", True), (None, False)])
    def test_card_of_a_run(self, folder, tmp_path, license, written):
        recipe = SimpleNamespace(
            model=SimpleNamespace(reads_images=False, teacher="random-llama", license=license),
            data=SimpleNamespace(dataset=["builtin", "org/texts", "/home/someone/private/notes.txt"]),
            stages=[("kl", SimpleNamespace(hub_model_id=None))],
            values={"output_dir": "/home/someone/out", "teacher": "random-llama", "dataset": ["/home/someone/a.txt"]},
        )
        report = {
            "after": {"held-out part of builtin": REPORT},
            "stages": [{"name": "kl", "steps": 1200, "tokens": 98304}],
            "teacher_parameters": 134515008,
            "train_tokens": 98304,
            "hardware": "CPU",
            "versions": {"torch": "2.13.0"},
        }
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        assert write_model_card(tmp_path, recipe, report) == written == (tmp_path / "README.md").exists()
        if written:
            text = (tmp_path / "README.md").read_text()
            assert metadata_of(text)["datasets"] == ["org/texts"] and "base_model" not in metadata_of(text)
            assert "| Teacher | random-llama, 135M parameters |" in text
            assert "| Stages | kl: 1,200 steps, 98,304 tokens |" in text
            assert "someone" not in text and "dataset:\n- a.txt" in text and no_placeholder(text)


class TestLearningCurves:
    def test_picture(self, tmp_path):
        matplotlib = pytest.importorskip("matplotlib.image")
        history = [{"step": step, "loss": 3.0 / step, "kl": 2.0 / step, "bridge": 0.0} for step in range(1, 30)]
        history += [{"step": 29, "eval_kl": 0.2}, {"step": 29, "train_runtime": 3.0}]
        path = learning_curves(history, tmp_path / "deep" / "curves.png", title="tiny")
        picture = matplotlib.imread(path)
        assert picture.shape[1] == 1600 and picture.std() > 0.01

    def test_stages_follow_each_other(self, tmp_path):
        history = [{"step": 5, "kl": 2.0}, {"step": 10, "kl": 1.0}, {"step": 5, "kl": 0.5}, {"step": 10, "kl": 0.4}]
        path = learning_curves(history, tmp_path / "curves.svg")
        assert path.read_text().count("<svg") == 1
        from cab_hf.plots import _points

        assert _points(history, "kl") == ([5, 10, 15, 20], [2.0, 1.0, 0.5, 0.4])

    def test_errors(self, tmp_path, monkeypatch):
        with pytest.raises(ValueError, match="1 entries and no positive value"):
            learning_curves([{"step": 1, "kl": 0.0}], tmp_path / "curves.png")
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ImportError, match="pip install matplotlib"):
            learning_curves([{"step": 1, "kl": 1.0}], tmp_path / "curves.png")
