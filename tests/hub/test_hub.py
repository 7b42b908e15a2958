"""Model cards: valid metadata, no placeholder, only ways of loading that work, and never a card overwritten."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from processes import BLOCKED, run_apart
from tiny_distillation import tiny_teacher
from tiny_models import tiny_config, tiny_vision_model
from transformers import Mamba2Config, Mamba2ForCausalLM

from cab_hf.distillation.training_args import DistillationTrainingArguments
from cab_hf.evaluation.plots import learning_curves
from cab_hf.hub.card import build_card, write_card
from cab_hf.hub.card_sections import HEADS
from cab_hf.hub.publish import check_card, student_files
from cab_hf.hub.sources import dataset_facts, describe_teacher, public_name
from cab_hf.models import CABMambaConfig, CABMambaForCausalLM, CABMambaForSequenceClassification, CABMambaModel
from cab_hf.recipes import build_recipe
from cab_hf.runs.card import describe_losses, describe_method, write_model_card
from cab_hf.teachers.demo import random_llama
from cab_hf.transfer import student_from_teacher


ROOT = Path(__file__).parents[2]
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
NOTHING = RECALL | {"recall": 0.0, "ci95": [0.0, 0.01]}
_WORDS = {"repetition_rate": 0.25, "distinct_1": 0.5, "distinct_2": 0.75, "distinct_3": 0.875, "n_tokens": 640}
EVALUATION = {
    "task": "text-generation",
    "dtype": "float32",
    "hardware": "an old CPU",
    "threads": 2,
    "generation": {
        "prompts": "4 of 32 tokens, from verse",
        "teacher": {"greedy": _WORDS, "sampled": _WORDS},
        "student": {"greedy": _WORDS | {"repetition_rate": 0.625}, "sampled": _WORDS | {"n_tokens": 641}},
    },
    "recall": {
        "copying": {
            "16": {"teacher": RECALL, "student": RECALL | {"recall": 0.043, "ci95": [0.03, 0.06]}},
            "64": {"teacher": RECALL | {"recall": 0.66}, "student": NOTHING},
            "256": {"teacher": RECALL | {"recall": 0.57}, "student": NOTHING},
        },
        "associative": {"16": {"teacher": RECALL | {"recall": 1.0}, "student": NOTHING}},
    },
    "speed": {
        "over": "length",
        "batch_size": 1,
        "repeats": 3,
        "rows": [
            {
                "length": 128,
                "teacher": {"prefill": 900.0, "decode": 30.0, "peak_mib": 600.0},
                "student": {"prefill": 400.0, "decode": 40.0, "peak_mib": 650.0},
            },
            {
                "length": 2048,
                "teacher": {"prefill": 700.0, "decode": 10.0, "peak_mib": None},
                "student": {"prefill": 1400.0, "decode": 40.0, "peak_mib": 700.0},
            },
            {"length": 4096, "teacher": None, "student": {"prefill": 1400.0, "decode": None, "peak_mib": 750.0}},
        ],
        "crossing": {"prefill": 678.4, "decode": 128.0, "peak_mib": None},
    },
}
OF_IMAGES = {
    "student_top1": 0.75,
    "student_top1_ci95": [0.7, 0.8],
    "teacher_top1": 0.875,
    "teacher_top1_ci95": [0.8, 0.9],
    "kl": 0.25,
    "agreement": 0.8,
    "n_images": 400,
}


def section(card: ModelCard | str, title: str) -> str:
    """The text under a heading, or "" where the card has none."""
    found = re.search(rf"\n## {title}\n(.*?)(?=\n## |\Z)", str(card), re.DOTALL)
    return found.group(1).strip() if found else ""


def python_blocks(card: ModelCard | str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", str(card), re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("students") / "tiny-student"
    torch.manual_seed(0)
    config = CABMambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, mixer_type="mamba2", head_dim=16)
    CABMambaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("classifiers") / "moods"
    _, tokenizer = random_llama()
    config = tiny_config(num_labels=3, vocab_size=len(tokenizer), id2label={0: "good", 1: "bad", 2: "neither"})
    CABMambaForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
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
        assert re.findall(r"## (\w+)", bare) == ["Use", "Citation"] and no_placeholder(bare)
        assert not re.search(r"recipe|datasets|model-index|\| \|", bare)
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
        assert re.findall(r"## (\w+)", full) == ["Results", "Recall", "Limits", "Use", "Training", "Citation"]

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


@pytest.mark.parametrize("path", sorted((ROOT / "model_cards").glob("*/README.md")), ids=lambda path: path.parent.name)
def test_finished_cards_say_what_was_evaluated(path):
    card, evaluation = ModelCard.load(path), json.loads((path.parent / "evaluation.json").read_text())
    found = {result.dataset_name: result.metric_value for result in card.data.eval_results}
    of_texts = {name: report["student_perplexity"] for name, report in evaluation.get("texts", {}).items()}
    of_images = {name: report["student_top1"] for name, report in evaluation.get("images", {}).items()}
    assert found == pytest.approx(of_texts | of_images, rel=1e-4) and found
    assert all((path.parent / picture).is_file() for picture in re.findall(r"!\[[^]]*\]\((.+?)\)", card.text))


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
        assert text.count('tokenizer = AutoTokenizer.from_pretrained("o/s")') == 2
        assert text.count('tokenizer = AutoTokenizer.from_pretrained("o/s", trust_remote_code=True)') == 1
        config.pop("auto_map", None)
        (copy / "config.json").write_text(json.dumps(config))
        assert "trust_remote_code" not in str(build_card(copy, {}, {}, teacher="t/t", license="mit"))
        with pytest.raises(ValueError, match="holds a 'mamba2' model.*stock_subfolder"):
            build_card(copy / "stock", {}, {}, teacher="t/t", license="mit")
        with pytest.raises(FileNotFoundError, match="absent has no config.json"):
            build_card(copy, {}, {}, teacher="t/t", license="mit", stock_subfolder="absent")

    def test_the_shown_lines_run(self, folder, monkeypatch):
        text = str(build_card(folder, {}, {}, teacher="org/teacher", license="mit"))
        names = {}
        monkeypatch.chdir(folder)
        exec(python_blocks(text)[0], names)
        assert type(names["model"]) is CABMambaForCausalLM


class TestMeasured:
    def card(self, folder: Path, evaluation: dict, metrics: dict | None = None) -> ModelCard:
        return build_card(folder, metrics or {}, {}, teacher="org/teacher", license="mit", evaluation=evaluation)

    def test_all_that_was_measured_is_there(self, folder):
        card = self.card(folder, EVALUATION, {"verse": REPORT})
        assert "| copying | 64 | 0.660 (0.840 to 0.900) | 0.000 (0.000 to 0.010) | 2,016 |" in section(card, "Recall")
        assert "| associative | 16 | 1.000" in section(card, "Recall")
        generation = section(card, "Generation")
        assert "(4 of 32 tokens, from verse)" in generation and generation.count("\n| greedy |") == 2
        assert "| sampled | student | 0.250 | 0.500 | 0.750 | 0.875 | 641 |" in generation
        speed = section(card, "Speed")
        assert "Measured on an old CPU, float32, 2 threads, batch size 1, 3 timed runs each." in speed
        assert "| length | model | prefill, tokens/s | decoding, tokens/s | peak memory, MiB |" in speed
        assert "| 2,048 | teacher | 700.0 | 10.0 |  |\n| 2,048 | student | 1,400.0 | 40.0 | 700.0 |" in speed
        assert "| 4,096 | teacher |  |  |  |\n| 4,096 | student | 1,400.0 |  | 750.0 |" in speed
        assert "- Prefill: the student is ahead from about 678 on." in speed
        assert "- Decoding: the student is ahead at every length that was measured." in speed
        assert "- Peak memory: the student is not ahead at the greatest length that was measured." in speed
        assert no_placeholder(str(card))

    @pytest.mark.parametrize("left_out", ["generation", "recall", "speed"])
    def test_what_was_not_measured_is_not_there(self, folder, left_out):
        rest = {name: value for name, value in EVALUATION.items() if name != left_out}
        whole, card = self.card(folder, EVALUATION), self.card(folder, rest)
        assert section(whole, left_out.capitalize()) and not section(card, left_out.capitalize())

    def test_lengths_and_tasks(self, folder):
        evaluation = json.loads((ROOT / "benchmarks/quality/hybrids/four/evaluation.json").read_text())
        card = self.card(folder, {name: evaluation[name] for name in ("length", "tasks")})
        length, tasks = section(card, "Length"), section(card, "Tasks")
        assert "| needle | 4,096 | 0.969 (0.893 to 0.991) | 0.672 (0.550 to 0.774) |" in length
        assert "Loss by position on speeches, in nats per token" in length and "| 2,048 to 4,096 | 3.238" in length
        assert (
            "the student holds to 0 tokens (needle 1,024, needles 0, key-value 0, copying 256, loss 4,096)" in length
        )
        assert "| lambada | acc | 0.000 | 0.294 ± 0.020 | 0.200 ± 0.018 | \\-0.094 (-0.126 to -0.062) | 500 |" in tasks
        assert tasks.endswith("summed over lambada, piqa, arc_easy, copa.") and "keeps 0.80 (0.70 to 0.89)" in tasks
        lines = section(card, "Limits").splitlines()[2:]
        assert len(lines) == 2 and lines[1] == "- In tasks it is clearly behind its teacher."
        assert no_placeholder(str(card))
        evaluation["tasks"]["above_chance"]["share_ci95"] = [0.7, 1.01]
        assert not section(self.card(folder, {"tasks": evaluation["tasks"]}), "Limits")

    def test_limits_of_a_student_that_does_not_copy(self, folder):
        lines = section(self.card(folder, EVALUATION, {"verse": REPORT}), "Limits").splitlines()[2:]
        assert lines == [
            "- verse: its perplexity is 1.18 times its teacher's, and its likeliest token is the teacher's at 71 % of "
            "the places.",
            "- Do not rely on it to repeat or look up what its context says: there it is clearly behind its teacher.",
        ]

    def test_limits_of_a_student_that_copies(self, folder):
        gaps = {gap: {"teacher": RECALL, "student": RECALL | {"recall": 0.86}} for gap in ("16", "64", "256")}
        assert not section(self.card(folder, {"recall": {"copying": gaps}}), "Limits")

    def test_a_student_that_is_ahead_has_no_limits(self, folder):
        ahead = {
            "over": "length",
            "repeats": 1,
            "rows": [{"length": 8, "teacher": {"prefill": 1.0}, "student": {"prefill": 2.0}}],
            "crossing": {"prefill": 8.0, "decode": None},
        }
        card = self.card(folder, {"speed": ahead}, {"verse": REPORT | {"student_perplexity": 25.0}})
        assert not section(card, "Limits") and "Decoding" not in str(card)
        assert "Measured on 1 timed run each." in section(card, "Speed")

    def test_an_image_student(self, tmp_path):
        tiny_vision_model().save_pretrained(tmp_path)
        rows = [
            {"batch size": size, "teacher": {"images": 90.0}, "student": {"images": images}}
            for size, images in ((1, 30.0), (4, 60.0), (16, 120.0))
        ]
        evaluation = {"speed": {"over": "batch size", "repeats": 2, "rows": rows, "crossing": {}}}
        report = OF_IMAGES | {"split": "test", "baselines": {"soft KD": OF_IMAGES | {"student_top1": 0.5}}}
        card = self.card(tmp_path, evaluation, {"leaves": report})
        assert "| leaves | soft KD | 0.500 (0.700 to 0.800) | 0.250 | 0.800 | 400 |" in section(card, "Results")
        assert "other methods had the same start" in section(card, "Results")
        assert "| 16 | teacher | 90.0 |\n| 16 | student | 120.0 |" in section(card, "Speed")
        assert section(card, "Limits").splitlines()[2:] == [
            "- Of 400 images (leaves) it gets 75.0 % right, its teacher 87.5 %.",
        ]
        (result,) = card.data.eval_results
        assert result.dataset_split == "test" and result.metric_args["n_images"] == 400
        assert "7 labels" in str(card)

    def test_split_and_data_set_come_from_the_report(self, folder, tmp_path):
        facts = dataset_facts(["org/texts"], "held-out")
        card = self.card(folder, {}, {"one": REPORT | facts, "two": REPORT})
        write_card(tmp_path, card)
        one, two = ModelCard.load(tmp_path / "README.md").data.eval_results
        assert (one.dataset_type, one.dataset_split, one.dataset_name) == ("org/texts", "held-out", "one")
        assert (two.dataset_type, two.dataset_split) == ("two", None)
        assert "split" not in metadata_of(card)["model-index"][0]["results"][1]["dataset"]
        assert dataset_facts([str(tmp_path)], None) == dataset_facts(["org/a", "org/b"], None) == {}


class TestClassifier:
    def test_card(self, classifier):
        report = {"student_accuracy": 0.75, "student_accuracy_ci95": [0.7, 0.8], "n_texts": 200, "split": "test"}
        report |= {"teacher_accuracy": 0.9}
        card = build_card(classifier, {"reviews": report}, {}, teacher="org/teacher", license="mit")
        data = metadata_of(card)
        (result,) = data["model-index"][0]["results"]
        assert data["pipeline_tag"] == result["task"]["type"] == "text-classification"
        assert result["dataset"] == {"name": "reviews", "type": "reviews", "split": "test"}
        (metric,) = result["metrics"]
        assert (metric["type"], metric["value"]) == ("accuracy", 0.75) and "n = 200 texts" in metric["name"]
        assert section(card, "Results").splitlines()[2:] == [
            "| text | model | accuracy | n texts |",
            "| --- | --- | ---: | ---: |",
            "| reviews | teacher | 0.900 | 200 |",
            "| reviews | student | 0.750 (0.700 to 0.800) | 200 |",
        ]
        assert "A Mamba classifier of texts of" in card.text and ", 3 labels)" in card.text
        assert "it gets 75.0 % right, its teacher 90.0 %" in section(card, "Limits") and no_placeholder(str(card))

    def test_the_shown_lines_run(self, classifier, tmp_path, monkeypatch):
        card = build_card(classifier, {}, {}, teacher="org/teacher", license="mit")
        with_package, without = python_blocks(card)
        assert with_package.startswith("import cab_hf\n") and "trust_remote_code=True" in without
        names = {}
        monkeypatch.chdir(classifier)
        exec(with_package, names)
        assert type(names["model"]) is CABMambaForSequenceClassification
        expected = names["pipe"]("A text.", top_k=None)
        assert {one["label"] for one in expected} == {"good", "bad", "neither"}
        script = f"import json, os\nos.chdir({str(classifier)!r})\n{without}\n"
        script += f"json.dump(pipe('A text.', top_k=None), open({str(tmp_path / 'answer.json')!r}, 'w'))\n"
        run_apart(BLOCKED + script, "cab_hf", [], tmp_path)
        answer = json.loads((tmp_path / "answer.json").read_text())
        assert [one["label"] for one in answer] == [one["label"] for one in expected]
        assert [one["score"] for one in answer] == pytest.approx([one["score"] for one in expected], abs=1e-5)

    def test_it_can_be_published(self, classifier):
        write_card(classifier, build_card(classifier, {}, {}, teacher="org/teacher", license="mit"), overwrite=True)
        assert check_card(classifier / "README.md").data.pipeline_tag == "text-classification"
        assert {"README.md", "model.safetensors", "modeling_cab_mamba.py"} <= set(student_files(classifier))

    def test_errors(self, classifier, folder, tmp_path):
        options = {"teacher": "org/teacher", "license": "mit"}
        with pytest.raises(ValueError, match="stock_subfolder is '.', but no class"):
            build_card(classifier, {}, {}, stock_subfolder=".", **options)
        with pytest.raises(ValueError, match=r"lacks \['student_accuracy', 'n_texts'\].*text-classification"):
            build_card(classifier, {"text": REPORT}, {}, **options)
        CABMambaModel.from_pretrained(folder).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="holds a CABMambaModel, but.*with its head"):
            build_card(tmp_path, {}, {}, **options)

    @pytest.mark.parametrize("name", HEADS)
    def test_architectures_tell_heads_apart(self, name, classifier, folder, tmp_path):
        students = {
            "CABMambaForCausalLM": lambda: CABMambaForCausalLM.from_pretrained(folder),
            "CABMambaForSequenceClassification": lambda: CABMambaForSequenceClassification.from_pretrained(classifier),
            "CABHybridForCausalLM": lambda: student_from_teacher(tiny_teacher(), keep_attention=1),
            "CABVisionMambaForImageClassification": tiny_vision_model,
        }
        students[name]().save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["architectures"] == [name] and HEADS[name].auto in config["auto_map"]


class TestLosses:
    def test_weights_and_courses(self, tmp_path):
        def args(**options) -> DistillationTrainingArguments:
            return DistillationTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options)

        plain = args(kl_weight=1.0, bridge_weight=0.0)
        assert describe_losses(plain) == "soft KL to the teacher × 1"
        both = args(kl_weight=0.5, temperature=2.0, bridge_weight=3.0, bridge_end=0.3, bridge_decay="cosine")
        assert describe_losses(both) == (
            "soft KL to the teacher × 0.5, temperature 2; attention bridge (CAB) × 3, cosine decay to its end, off "
            "after 30 % of the steps"
        )
        assert describe_method([plain]) == "soft knowledge distillation"
        assert describe_method([plain, both]) == "attention bridge (CAB) and soft knowledge distillation"
        labels = args(kl_weight=0.0, bridge_weight=0.0, ce_weight=1.0)
        assert describe_method([labels]) == "training on labels"


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

        monkeypatch.setattr("cab_hf.hub.card.ModelCard.load", unreachable)
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
        recipe = build_recipe(
            {
                "output_dir": "/home/someone/out",
                "teacher": "random-llama",
                "license": license,
                "dataset": ["builtin", "org/texts", "/home/someone/private/notes.txt"],
                "student_from": "config",
                "use_cpu": True,
                "kl_weight": 0.0,
                "stages": [{"name": "align"}, {"name": "kl", "kl_weight": 1.0, "bridge_weight": 0.25}],
            }
        )
        stages = [{"name": "align", "steps": 50, "tokens": 4096}, {"name": "kl", "steps": 1200, "tokens": 98304}]
        name = "held-out part of the language reference of CPython, org/texts, notes.txt"
        report = {
            "after": {name: REPORT},
            "stages": stages,
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
            assert "| Stages | align: 50 steps, 4,096 tokens; kl: 1,200 steps, 98,304 tokens |" in text
            assert "| Method | attention bridge (CAB) and soft knowledge distillation |" in text
            assert "| Losses | align: attention bridge (CAB) × 1. kl: soft KL to the teacher × 1; " in text
            assert "attention bridge (CAB) × 0.25 |" in text and "| Start | random weights |" in text
            assert "someone" not in text and "- notes.txt" in text and no_placeholder(text)
            (result,) = ModelCard(text).data.eval_results
            assert (result.dataset_name, result.dataset_split) == (name, "held-out")

    @pytest.mark.parametrize(
        ("source", "public"),
        [
            ("org/texts", "org/texts"),
            ("gpt2", "gpt2"),
            ("Org/a-b_c.1", "Org/a-b_c.1"),
            ("../texts", "texts"),
            ("./texts", "texts"),
            ("org/my--texts", "my--texts"),
            ("org/.texts", ".texts"),
            ("org/texts.git", "texts.git"),
            ("texts/of/mine", "mine"),
        ],
    )
    def test_a_hub_id_is_what_the_hub_takes(self, source, public):
        assert public_name(source) == public

    @pytest.mark.parametrize("on_hub", [True, False])
    def test_what_the_run_saw_says_what_is_of_the_hub(self, folder, tmp_path, on_hub, monkeypatch):
        """Written again where the relative folders do not exist, which look like Hub ids there."""
        monkeypatch.setattr("cab_hf.hub.card.ModelCard.load", lambda name: ModelCard("---\nlanguage: de\n---\n"))
        sources = {"teacher": "outputs/teacher", "dataset": ["data/texts"]}
        recipe = build_recipe({**sources, "output_dir": "out", "license": "mit", "use_cpu": True})
        report = {"after": {"texts": REPORT}, "stages": [], "train_tokens": 1, "hardware": "CPU", "versions": {}}
        report |= {"teacher_parameters": 1, "hub_ids": ["outputs/teacher", "data/texts"] if on_hub else []}
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        assert write_model_card(tmp_path, recipe, report)
        text = (tmp_path / "README.md").read_text()
        found = metadata_of(text)
        assert (found.get("base_model"), found.get("datasets")) == (
            ("outputs/teacher", ["data/texts"]) if on_hub else (None, None)
        )
        assert ("| Teacher | outputs/teacher," in text) == on_hub and ("| Teacher | teacher," in text) != on_hub


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
        drawing = path.read_text()
        assert drawing.count("<svg") == 1
        assert all(f"<!-- {tick} -->" in drawing for tick in ("0.4", "1", "2"))  # as numbers, not as powers
        whole = [{"step": step, "kl": 1.0 / step} for step in (5, 10, 15, 20)]
        drawing = learning_curves(whole, path, title="long " * 30, stages={"outputs": 0, "all": 10}).read_text()
        assert "<!-- stage: all -->" in drawing and drawing.count("<!-- KL to teacher -->") == 1
        assert drawing.count("<!-- long ") > 1  # in lines that fit

        from cab_hf.evaluation.plots import _points

        assert _points(history, "kl") == ([5, 10, 15, 20], [2.0, 1.0, 0.5, 0.4])

    def test_errors(self, tmp_path, monkeypatch):
        with pytest.raises(ValueError, match="1 entries and no positive value"):
            learning_curves([{"step": 1, "kl": 0.0}], tmp_path / "curves.png")
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ImportError, match="pip install matplotlib"):
            learning_curves([{"step": 1, "kl": 1.0}], tmp_path / "curves.png")
