"""LoRA: every target takes part and merges, others are refused, and an adapter is published with its card."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import hub_server
import peft
import pytest
import torch
import yaml
from hub_server import HubServer
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from processes import Worker
from tiny_distillation import SIX_LOSSES, make_trainer, tiny_student, tiny_teacher
from tiny_models import (
    VARIANTS,
    VISION_VARIANTS,
    largest_difference,
    random_ids,
    random_images,
    shake,
    tiny_config,
    tiny_model,
    tiny_vision_model,
)

from cab_hf import CABMambaForSequenceClassification
from cab_hf.hub.adapters import adapter_card, write_adapter_card
from cab_hf.hub.publish import check_card, student_files
from cab_hf.lora import LORA_TARGETS, lora_config


pytestmark = pytest.mark.filterwarnings("default::FutureWarning")  # peft's own
hub = hub_server.hub  # the fixture
BASE, ADAPTER = "org/tiny-base", "org/tiny-adapter"

LOAD_WITHOUT_PACKAGE = """
sys.modules["cab_hf"] = None
import torch
from huggingface_hub import ModelCard
text = ModelCard.load({repo!r}).text
exec(text.split("```python")[1].split("```")[0])
with torch.no_grad():
    result = model(input_ids=torch.tensor({ids!r})).logits.tolist()
    assert "transformers_modules" in type(model.get_base_model()).__module__
"""


def classifier(**overrides) -> CABMambaForSequenceClassification:
    torch.manual_seed(0)
    return shake(CABMambaForSequenceClassification(tiny_config(num_labels=3, pad_token_id=98, **overrides)).eval())


STUDENTS = {
    **{f"language, {name}": (lambda sizes=sizes: tiny_model(**sizes)) for name, sizes in VARIANTS.items()},
    **{f"image, {name}": (lambda sizes=sizes: tiny_vision_model(**sizes)) for name, sizes in VISION_VARIANTS.items()},
    "classifier, s6": lambda: classifier(mixer_type="mamba"),
    "classifier, ssd": lambda: classifier(mixer_type="mamba2", intermediate_size=24),
}


def inputs_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return (
        {"pixel_values": random_images(2)} if "vision" in model.config.model_type else {"input_ids": random_ids(2, 7)}
    )


def check_adapter(model: torch.nn.Module, config: LoraConfig) -> None:
    """Every trainable tensor gets a gradient, the adapter changes the output, and merging changes nothing more."""
    adapted = get_peft_model(model, config).eval()
    inputs = inputs_of(model)
    logits = adapted(**inputs).logits
    logits.square().mean().backward()
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert any("lora_A" in name or "lora_embedding_A" in name for name in names)
    for name in names:
        assert float(adapted.get_parameter(name).grad.abs().max()) > 0, name
    with torch.no_grad():
        with adapted.disable_adapter():
            assert largest_difference(adapted(**inputs).logits, logits) > 1e-3
        merged = adapted.merge_and_unload()
        assert type(merged) is type(model)
        assert largest_difference(merged(**inputs).logits, logits) < 1e-5 * float(logits.abs().max())


@pytest.mark.parametrize("name", STUDENTS)
def test_every_default_target_learns_and_merges(name):
    model = STUDENTS[name]()
    config = lora_config(model, r=2, init_lora_weights=False)
    last_names = {one.rpartition(".")[2] for one, module in model.named_modules() if type(module) is torch.nn.Linear}
    assert config.target_modules == last_names - {"lm_head", "score", "classifier"}
    assert config.target_modules <= set(LORA_TARGETS[model.config.model_type])
    assert config.modules_to_save == (["classifier"] if name.startswith("image") else None)
    check_adapter(model, config)


@pytest.mark.parametrize("name", ["language, s6", "language, ssd 2 groups, gated mlp", "image, s6, middle"])
def test_the_usual_start_reaches_b_first_and_then_a(name):
    model = STUDENTS[name]()
    adapted, inputs = get_peft_model(model, lora_config(model, r=2)).train(), inputs_of(model)
    optimizer = torch.optim.SGD([one for one in adapted.parameters() if one.requires_grad], lr=0.5)
    for part in ("lora_B", "lora_A"):
        optimizer.zero_grad()
        adapted(**inputs).logits.square().mean().backward()
        found = [(name, one.grad) for name, one in adapted.named_parameters() if part in name]
        assert len(found) > 4 and all(float(gradient.abs().max()) > 0 for _, gradient in found)
        optimizer.step()


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (lambda: tiny_model(tie_word_embeddings=False), ["lm_head"]),
        (lambda: tiny_model(tie_word_embeddings=False), ["embeddings"]),
        (lambda: tiny_model(**VARIANTS["s6 positions, plain mlp"]), ["position_embeddings", "in_proj"]),
        (lambda: tiny_model(mixer_type="mamba2"), "all-linear"),
        (lambda: tiny_model(mixer_type="mamba2"), r".*layers\.1\.mixer\.(in|out)_proj"),
        (tiny_vision_model, ["patch_embedding"]),
        (tiny_vision_model, ["classifier"]),
        (tiny_vision_model, "all-linear"),
        (lambda: classifier(), "all-linear"),
    ],
)
def test_other_targets_learn_and_merge(make, targets):
    model = make()
    config = lora_config(model, r=2, target_modules=targets, init_lora_weights=False)
    has_head = "vision" in model.config.model_type and targets != ["classifier"]
    assert config.modules_to_save == (["classifier"] if has_head else None)
    check_adapter(model, config)


@pytest.mark.parametrize("name", ["conv1d", "norm"])
def test_what_is_no_target_can_be_trained_whole(name):
    check_adapter(tiny_model(), lora_config(tiny_model(), r=2, modules_to_save=[name], init_lora_weights=False))


@pytest.mark.parametrize(
    ("make", "options", "match"),
    [
        (tiny_model, {"target_modules": ["conv1d"]}, r"mixer\.conv1d'.*CausalConv1d.*modules_to_save.*'in_proj'"),
        (tiny_model, {"target_modules": r".*\.conv1d"}, "CausalConv1d"),
        (lambda: tiny_model(mixer_type="mamba2"), {"target_modules": ["norm"]}, "RMSNorm"),
        (tiny_vision_model, {"target_modules": ["in_proj", "backward"]}, "backward'.*S6Branch"),
        (tiny_model, {"target_modules": ["A_log"]}, "'A_log' is a parameter, not a module"),
        (tiny_model, {"target_modules": ["q_proj"]}, "'q_proj' is no module.*'in_proj'"),
        (tiny_model, {"target_modules": ["lm_head"]}, "'lm_head'.*tie_word_embeddings.*merged into both"),
        (tiny_model, {"target_modules": ["embeddings"]}, "embeddings'.*tie_word_embeddings"),
        (classifier, {"target_modules": ["score"]}, "'score', which PEFT trains whole"),
        (tiny_model, {"target_parameters": ["A_log"]}, r"\['A_log'\].*attention maps.*target_modules"),
        (tiny_teacher, {}, "'llama'.*'cab_mamba', 'cab_vision_mamba'"),
    ],
)
def test_what_cannot_be_adapted_is_refused(make, options, match):
    with pytest.raises(ValueError, match=match):
        lora_config(make(), **options)


def test_the_reason_to_refuse_a_tied_head():
    """PEFT itself only warns, and merging then changes the embeddings too."""
    model, ids = tiny_model(), random_ids(2, 7)
    with pytest.warns(UserWarning, match="tie_word_embeddings"), torch.no_grad():
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)).eval()
        before = adapted(input_ids=ids).logits
        assert largest_difference(adapted.merge_and_unload()(ids).logits, before) > 0.1


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("students") / "base"
    tiny_student().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# tiny-base\n")
    return folder


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """What a distillation of a student with an adapter saves, and that student."""
    student = type(tiny_student()).from_pretrained(base)
    student = get_peft_model(student, lora_config(student, r=2))
    folder = tmp_path_factory.mktemp("adapters") / "tiny-adapter"
    trainer, _ = make_trainer(folder, student=student, **SIX_LOSSES, max_steps=3, learning_rate=0.1)
    trainer.train()
    trainer.save_model()
    return folder, student.eval()


@pytest.fixture(scope="module")
def worker(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    worker = Worker(hub.endpoint, tmp_path_factory.mktemp("worker"))
    yield worker
    worker.close()


def test_a_trainer_pushes_an_adapter_again_and_again(hub: HubServer, worker, base, tmp_path):
    worker.run(
        f"""
from tiny_distillation import make_trainer
from peft import get_peft_model
from cab_hf import CABMambaForCausalLM
from cab_hf.lora import lora_config
student = CABMambaForCausalLM.from_pretrained({str(base)!r})
student = get_peft_model(student, lora_config(student, r=2))
options = {{"hub_model_id": "org/pushed-adapter", "hub_token": "good-token"}}
trainer, _ = make_trainer({str(tmp_path / "run")!r}, student=student, **options)
trainer.train()
"""
    )
    assert "licence of base model 'org/other'" in worker.fails("trainer.push_to_hub(base_model='org/other')")
    worker.run("result = trainer.push_to_hub(base_model='org/base', license='mit').oid")
    first = hub.repositories["org/pushed-adapter"].head.files
    card = ModelCard(first["README.md"].decode())
    assert (card.data.license, card.data.base_model) == ("mit", "org/base") and "Needed" not in card.text
    assert json.loads(first["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    # The base and licence of the first time are known by now.
    worker.run("[p.data.add_(1) for n, p in trainer.student.named_parameters() if 'lora_B' in n]")
    worker.run("result = trainer.push_to_hub().oid")
    second = hub.repositories["org/pushed-adapter"].head.files
    assert second["README.md"] == first["README.md"]
    assert second["adapter_config.json"] == first["adapter_config.json"]
    assert second["adapter_model.safetensors"] != first["adapter_model.safetensors"]


def test_a_distilled_adapter_is_published_and_loads_without_the_package(
    hub: HubServer, worker, base, trained, tmp_path
):
    folder, student = trained
    with pytest.raises(ValueError, match="Hub id"):  # PEFT names the base by its local folder
        student_files(folder)
    with pytest.raises(ValueError, match="names no licence"):  # PEFT's own card
        check_card(folder / "README.md")
    worker.run("from cab_hf.hub import adapter_card, publish_folder, write_adapter_card")
    worker.run(worker.publish(base, BASE))
    # The licence and the language are those of the base model's card, on the Hub.
    worker.run(
        f"card = adapter_card({str(folder)!r}, base_model={BASE!r}, repo_id={ADAPTER!r}, training={{'Steps': 3}})\n"
        f"result = write_adapter_card({str(folder)!r}, card)"
    )
    assert student_files(folder) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    worker.run(worker.publish(folder, ADAPTER))

    files = hub.repositories[ADAPTER].head.files
    assert set(files) == {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == BASE
    assert not any(str(base.parent.parent).encode() in content for content in files.values())
    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.language, card.data.base_model) == ("mit", ["en"], BASE)

    (tmp_path / "reader").mkdir()
    reader = Worker(hub.endpoint, tmp_path / "reader")
    ids = random_ids(2, 7, vocab_size=61)
    logits = reader.run("import sys\n" + LOAD_WITHOUT_PACKAGE.format(repo=ADAPTER, ids=ids.tolist()))
    reader.close()
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(logits), student(input_ids=ids).logits, rtol=0, atol=1e-5)
        with student.disable_adapter():
            assert largest_difference(torch.tensor(logits), student(input_ids=ids).logits) > 1e-3


def saved_adapter(folder: Path, model: torch.nn.Module, **options) -> Path:
    get_peft_model(model, lora_config(model, r=2, **options)).save_pretrained(folder)
    return folder


class TestCard:
    @pytest.mark.parametrize(
        ("make", "auto", "task", "labels"),
        [
            (tiny_model, "AutoModelForCausalLM", "text-generation", None),
            (classifier, "AutoModelForSequenceClassification", "text-classification", 3),
            (tiny_vision_model, "AutoModelForImageClassification", "image-classification", 7),
            (lambda: tiny_model().backbone, "AutoModel", None, None),
        ],
    )
    def test_says_what_is_there(self, make, auto, task, labels, tmp_path):
        folder = saved_adapter(tmp_path / "out", make())
        card = adapter_card(folder, base_model=BASE, license="mit", language="en", datasets=["org/texts"])
        data = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", str(card), re.DOTALL).group(1))
        assert data.pop("pipeline_tag", None) == task
        assert data == {
            "license": "mit",
            "language": ["en"],
            "library_name": "peft",
            "base_model": BASE,
            "base_model_relation": "adapter",
            "datasets": ["org/texts"],
            "tags": ["lora", "mamba", "cab"],
        }
        text = card.text
        stored = peft.utils.load_peft_weights(str(folder))
        assert f"| Numbers stored | {sum(one.numel() for one in stored.values()):,} |" in text
        assert "| Targets | `dt_proj`, `in_proj`, `out_proj`, `x_proj` |" in text and "| Rank | 2 |" in text
        assert f"{auto}.from_pretrained({json.dumps(BASE)}, trust_remote_code=True" in text
        assert ("Trained whole" in text) == (labels is not None) == (f"num_labels={labels}," in text)
        assert str(tmp_path) not in text and not re.search(r"\{|\}|None|More Information", text)

    def test_code_of_a_new_head_runs(self, tmp_path, monkeypatch):
        """The base is a causal student without any head for labels; the adapter brings it."""
        causal = tiny_model(mixer_type="mamba2")
        causal.save_pretrained(tmp_path / "org/base")
        model = CABMambaForSequenceClassification.from_pretrained(tmp_path / "org/base", num_labels=4)
        folder = tmp_path / "org/adapter"
        adapted = get_peft_model(model, lora_config(model, r=2, init_lora_weights=False)).eval()
        adapted.save_pretrained(folder)
        card = adapter_card(folder, base_model="org/base", license="mit", language="en", repo_id="org/adapter")
        monkeypatch.chdir(tmp_path)
        names = {}
        exec(card.text.split("```python")[1].split("```")[0], names)
        ids = random_ids(1, 7)
        with torch.no_grad():
            assert largest_difference(names["model"](input_ids=ids).logits, adapted(input_ids=ids).logits) < 1e-6

    def test_written_over_placeholders_only(self, tmp_path):
        folder = saved_adapter(tmp_path / "out", tiny_model(), target_modules=r".*\.(in|out)_proj")
        card = adapter_card(folder, base_model=BASE, license="mit", language="en")
        assert r"| Targets | `.*\.(in\|out)_proj` |" in card.text
        assert write_adapter_card(folder, card)
        assert check_card(folder / "README.md").data.license == "mit"
        config = LoraConfig.from_pretrained(str(folder))
        assert config.base_model_name_or_path == BASE and config.r == 2
        (folder / "README.md").write_text("---\nlicense: mit\n---\n# my own\n")
        assert not write_adapter_card(folder, card)
        assert "# my own" in (folder / "README.md").read_text()
        assert write_adapter_card(folder, card, overwrite=True)

    def test_refuses_what_nobody_could_use(self, tmp_path, monkeypatch):
        folder = saved_adapter(tmp_path / "out", tiny_model())
        monkeypatch.setattr(
            "cab_hf.hub.adapters.describe_teacher", lambda name: {"license": None, "language": None, "name": name}
        )
        with pytest.raises(ValueError, match=f"licence of base model '{BASE}' is unknown.*license="):
            adapter_card(folder, base_model=BASE)
        for local in (str(tmp_path), "./out", "../out", "out", "org/my--base"):
            with pytest.raises(ValueError, match="`base_model`.*others can't load.*owner/name"):
                adapter_card(folder, base_model=local, license="mit")
        with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json"):
            adapter_card(tmp_path, base_model=BASE, license="mit")
        config = json.loads((folder / "adapter_config.json").read_text())
        for change, match in (
            ({"peft_type": "IA3"}, "`peft_type` 'IA3', expected 'LORA'"),
            ({"task_type": "SEQ_2_SEQ_LM"}, "'SEQ_2_SEQ_LM' model"),
        ):
            (folder / "adapter_config.json").write_text(json.dumps(config | change))
            with pytest.raises(ValueError, match=match):
                adapter_card(folder, base_model=BASE, license="mit", language="en")
