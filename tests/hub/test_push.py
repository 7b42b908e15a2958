"""Publishing and loading over real HTTP: each process here knows only the address of a Hub, which is on loopback."""

import json
from collections.abc import Iterator
from pathlib import Path

import hub_server
import numpy as np
import pytest
import torch
import yaml
from hub_server import Fault, HubServer, Repository
from huggingface_hub import ModelCard
from PIL import Image
from processes import Worker
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model, tiny_vision_model

from cab_hf import models
from cab_hf.data.images import make_image_processor
from cab_hf.hub.card import build_card, write_card
from cab_hf.hub.publish import shareable, student_files
from cab_hf.teachers.demo import random_llama


hub = hub_server.hub  # the fixture
LANGUAGE, VISION = "org/cab-mamba-130m", "org/tiny-vision"
PROMPT = "the state of"
# What training leaves behind and nobody else needs.
LEFT_BEHIND = [
    "bridge.safetensors",
    "ema.safetensors",
    "training_args.bin",
    "optimizer.pt",
    "history.json",
    "trainer_state.json",
    ".report.json",
    "checkpoint-5/model.safetensors",
    "stages/1-kl/model.safetensors",
    "runs/events.out.tfevents.1",
    "notes.txt",
]


LOAD = """
import sys

if package == "without":
    sys.modules["cab_hf"] = None
    trust = {"trust_remote_code": True}
else:
    import cab_hf
    trust = {}

import torch
from PIL import Image
from transformers import (
    AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer
)

language, vision, prompt, picture = argv
tokenizer = AutoTokenizer.from_pretrained(language, **trust)
student = AutoModelForCausalLM.from_pretrained(language, **trust)
ids = tokenizer(prompt, return_tensors="pt")
words = student.generate(**ids, max_new_tokens=6, do_sample=False)
base = AutoModel.from_pretrained("org/cab-mamba-130m", **trust)
with torch.no_grad():
    states = base(**ids).last_hidden_state
processor = AutoImageProcessor.from_pretrained(vision, **trust)
classifier = AutoModelForImageClassification.from_pretrained(vision, **trust)
pixels = processor(Image.open(picture), return_tensors="pt")["pixel_values"]
with torch.no_grad():
    scores = classifier(pixels).logits
result = {
    "words": words[0].tolist(),
    "scores": scores[0].tolist(),
    "states": states[0, -1].tolist(),
    "modules": [type(student).__module__, type(base).__module__, type(classifier).__module__],
    "eos": student.generation_config.eos_token_id,
}
"""


@pytest.fixture(scope="module")
def worker(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    worker = Worker(hub.endpoint, tmp_path_factory.mktemp("worker"))
    worker.run("from cab_hf.hub.publish import check_access, publish_folder")
    yield worker
    worker.close()


@pytest.fixture(autouse=True)
def no_faults(hub: HubServer) -> Iterator[None]:
    yield
    hub.faults.clear()
    assert hub.leaked_tokens == []


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a recipe leaves, with everything in it that is not published."""
    folder = tmp_path_factory.mktemp("students") / "language"
    student = tiny_model(mixer_type="mamba2", vocab_size=257, eos_token_id=0, bos_token_id=0)
    student.generation_config.eos_token_id = 7
    student.save_pretrained(folder)
    random_llama()[1].save_pretrained(folder)
    for name in LEFT_BEHIND:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"left behind")
    (folder / "plots").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "plots" / "curves.png")
    recipe = {"teacher": "/home/somebody/teacher", "output_dir": "/home/somebody/out", "hub_token": "good-token"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"kl_weight": 1.0}))
    (folder / "report.json").write_text(json.dumps({"folder": "/home/somebody/out", "seconds": 1.5}))
    teacher = tmp_path_factory.mktemp("teacher")
    (teacher / "README.md").write_text("---\nlicense: mit\nbase_model: org/teacher\n---\n")
    write_card(folder, build_card(folder, {}, {}, teacher=teacher, repo_id=LANGUAGE))
    return folder


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("students") / "vision"
    tiny_vision_model(mixer_type="mamba2", image_size=8).save_pretrained(folder)
    make_image_processor(size=8).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\nlibrary_name: transformers\n---\n# tiny-vision\n")
    return folder


@pytest.fixture()
def copy(language: Path, tmp_path: Path) -> Path:
    """A small copy of the language student, to be spoilt."""
    for name in student_files(language):
        if "/" not in name and name not in ("recipe.yaml", "report.json"):
            (tmp_path / name).write_bytes((language / name).read_bytes())
    return tmp_path


def head(hub: HubServer, repo_id: str) -> dict[str, bytes]:
    return hub.repositories[repo_id].head.files


def set_bias(folder: Path, value: float) -> None:
    """Makes weights that the Hub does not hold yet, whatever the repository."""
    weights = load_file(folder / "model.safetensors")
    weights["backbone.layers.0.mixer.dt_bias"].fill_(value)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


class TestPublishing:
    def test_one_commit_holds_the_student_and_no_more(self, hub, worker, language):
        oid = worker.run(worker.publish(language, LANGUAGE, commit_message="Upload tiny student"))
        repository = hub.repositories[LANGUAGE]
        assert repository.titles == ["initial commit", "Upload tiny student"] and repository.head.oid == oid
        assert not repository.private
        code = {"configuration_cab_mamba", "generation", "modeling_cab_mamba", "students"}
        code |= {"mixers", "ssm_ops", "ssm_kernels", "s6_scan", "ssd_scan", "state_rotation", "kernel_operators"}
        code |= {"decoding", "decode_kernels", "states"}
        assert repository.head.files.keys() == {
            ".gitattributes",
            "README.md",
            "config.json",
            "generation_config.json",
            "probe.json",
            "model.safetensors",
            "plots/curves.png",
            "recipe.yaml",
            "report.json",
            "tokenizer.json",
            "tokenizer_config.json",
            *(f"{name}.py" for name in code),
        }
        for name in ("model.safetensors", "config.json", "README.md", "plots/curves.png", "mixers.py"):
            assert repository.head.files[name] == (language / name).read_bytes()
        assert ModelCard(repository.head.files["README.md"].decode()).data.license == "mit"

    def test_nothing_of_the_machine_and_no_token_is_published(self, hub, worker, language, copy):
        files = head(hub, LANGUAGE)
        assert yaml.safe_load(files["recipe.yaml"]) == {"teacher": "teacher", "kl_weight": 1.0}
        assert json.loads(files["report.json"]) == {"seconds": 1.5}
        assert not any(b"good-token" in content or b"somebody" in content for content in files.values())
        (copy / "chat_template.jinja").write_text("{# good-token #}")
        assert "chat_template.jinja contains the Hub token" in worker.fails(worker.publish(copy, "org/leak"))
        assert "org/leak" not in hub.repositories

    def test_again_is_no_second_commit(self, hub, worker, language):
        before, count = hub.repositories[LANGUAGE].head.oid, len(hub.requests)
        assert worker.run(worker.publish(language, LANGUAGE, overwrite_card=True)) == before
        assert not any(line.startswith("PUT") for line in hub.requests[count:])

    def test_a_card_on_the_hub_stays_unless_asked(self, hub, worker, copy):
        hub.repositories["org/theirs"] = Repository()
        hub.repositories["org/theirs"].commit("main", "by hand", {"README.md": b"theirs", "notes.md": b"kept"})
        worker.run(worker.publish(copy, "org/theirs"))
        assert head(hub, "org/theirs")["README.md"] == b"theirs" and "config.json" in head(hub, "org/theirs")
        assert "org/theirs keeps its own README.md" in worker.log.read_text()
        worker.run(worker.publish(copy, "org/theirs", overwrite_card=True))
        assert head(hub, "org/theirs")["README.md"] == (copy / "README.md").read_bytes()
        assert head(hub, "org/theirs")["notes.md"] == b"kept"

    def test_weights_that_would_be_loaded_instead_go(self, hub, worker, copy):
        stale = {"pytorch_model.bin", "adapter_config.json", "model.safetensors.index.json"}
        stale |= {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
        hub.repositories["org/older"] = Repository()
        hub.repositories["org/older"].commit("main", "older", dict.fromkeys([*stale, "stock/model.safetensors"], b"x"))
        worker.run(worker.publish(copy, "org/older"))
        files = head(hub, "org/older")
        assert not stale & files.keys() and {"model.safetensors", "stock/model.safetensors"} <= files.keys()
        assert len(hub.repositories["org/older"].titles) == 3

    def test_own_namespace_private_and_a_branch(self, hub, worker, copy):
        worker.run(worker.publish(copy, "mine", private=True, revision="trial"))
        repository = hub.repositories["someone/mine"]
        assert repository.private and "config.json" not in repository.head.files
        assert "config.json" in repository.branches["trial"][-1].files

    def test_an_adapter_goes_beside_a_whole_model(self, hub, worker, copy):
        worker.run(worker.publish(copy, "org/adapted"))
        (copy / "config.json").unlink()
        (copy / "model.safetensors").rename(copy / "adapter_model.safetensors")
        (copy / "adapter_config.json").write_text("{}")
        worker.run(worker.publish(copy, "org/adapted"))
        names = {"model.safetensors", "adapter_model.safetensors", "adapter_config.json"}
        assert names <= head(hub, "org/adapted").keys()

    def test_sharded_weights(self, hub, worker, copy):
        student = models.CABMambaForCausalLM.from_pretrained(copy)
        student.save_pretrained(copy, max_shard_size="40KB")
        assert "one of them is an older save" in worker.fails(worker.publish(copy, "org/shards"))
        (copy / "model.safetensors").unlink()
        shards = sorted(path.name for path in copy.glob("model-*.safetensors"))
        assert len(shards) > 1
        worker.run(worker.publish(copy, "org/shards"))
        assert {*shards, "model.safetensors.index.json"} <= head(hub, "org/shards").keys()
        (copy / shards[0]).unlink()
        assert f"names {shards[:1]}, which is not there" in worker.fails(worker.publish(copy, "org/shards"))


class TestLoading:
    @pytest.mark.parametrize("package", ["with", "without"])
    def test_another_process_generates_and_classifies(self, package, hub, worker, language, vision, tmp_path):
        if VISION not in hub.repositories:
            worker.run(worker.publish(language, LANGUAGE))
            worker.run(worker.publish(vision, VISION))
        picture = tmp_path / "picture.png"
        pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(picture)
        before = len(hub.requests)
        if package == "with":
            reader = worker
        else:
            (tmp_path / "reader").mkdir()
            reader = Worker(hub.endpoint, tmp_path / "reader")
        found = reader.run(f"package = {package!r}\nargv = {[LANGUAGE, VISION, PROMPT, str(picture)]}\n" + LOAD)
        if package == "without":
            reader.close()
        assert any(line.endswith("model.safetensors") for line in hub.requests[before:])
        root = "cab_hf.models" if package == "with" else "transformers_modules"
        assert all(module.startswith(root) for module in found["modules"])
        assert found["eos"] == 7

        # by hand: bytes become tokens and pixels numbers without tokenizer and processor
        student = tiny_model(mixer_type="mamba2", vocab_size=257, eos_token_id=0, bos_token_id=0)
        vocabulary = json.loads((language / "tokenizer.json").read_text())["model"]["vocab"]
        ids = [vocabulary["Ġ" if letter == " " else letter] for letter in PROMPT]
        with torch.no_grad():
            states = student.backbone(torch.tensor([ids])).last_hidden_state[0, -1]
            torch.testing.assert_close(torch.tensor(found["states"]), states, rtol=0, atol=1e-5)
            while len(ids) < len(PROMPT) + 6 and ids[-1] != 7:
                ids.append(int(student(torch.tensor([ids])).logits[0, -1].argmax()))
        assert found["words"] == ids
        processor = json.loads((vision / "preprocessor_config.json").read_text())
        mean, std = (torch.tensor(processor[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
        images = (torch.tensor(pixels).permute(2, 0, 1) / 255 - mean) / std
        with torch.no_grad():
            scores = tiny_vision_model(mixer_type="mamba2", image_size=8)(images[None]).logits[0]
        torch.testing.assert_close(torch.tensor(found["scores"]), scores, rtol=0, atol=1e-4)


class TestOtherWaysToPush:
    def test_push_to_hub_of_transformers(self, hub, worker, copy):
        card = (copy / "README.md").read_bytes()
        worker.run(worker.publish(copy, "org/by-transformers"))
        hub.repositories["org/by-transformers"].commit("main", "all but the card", {"README.md": card})
        worker.run(
            f"from cab_hf import CABMambaForCausalLM\n"
            f"CABMambaForCausalLM.from_pretrained({str(copy)!r}).push_to_hub('org/by-transformers')"
        )
        files = head(hub, "org/by-transformers")
        assert files["README.md"] == card
        assert files["model.safetensors"] == (copy / "model.safetensors").read_bytes()
        assert {path.name for path in copy.glob("*.py")} <= files.keys()

    @pytest.mark.parametrize("has_card", [True, False])
    def test_push_to_hub_of_transformers_makes_no_card_of_placeholders(self, hub, worker, copy, has_card):
        name = f"org/alone-{has_card}".lower()
        if not has_card:
            (copy / "README.md").unlink()
        worker.run(
            f"from cab_hf import CABMambaForCausalLM\n"
            f"CABMambaForCausalLM.from_pretrained({str(copy)!r}).push_to_hub({name!r})"
        )
        card = head(hub, name)["README.md"]
        if has_card:
            assert card == (copy / "README.md").read_bytes()
        assert b"More Information Needed" not in card and b"library_name: transformers" in card

    def test_push_to_hub_of_the_trainer(self, hub, worker, tmp_path):
        made = f"""
from tiny_distillation import make_trainer, tiny_teacher

teacher = tiny_teacher()
teacher.name_or_path = "org/teacher"
options = {{"hub_model_id": "org/trained", "hub_token": "good-token"}}
trainer, _ = make_trainer({str(tmp_path / "run")!r}, teacher=teacher, **options)
trainer.train()
"""
        worker.run(made)
        assert "licence of teacher 'org/teacher' is unknown" in worker.fails("trainer.push_to_hub()")
        assert "org/trained" not in hub.repositories
        worker.run("result = trainer.push_to_hub(license='mit').oid")
        files = head(hub, "org/trained")
        assert hub.repositories["org/trained"].titles == ["initial commit", "End of training"]
        card = ModelCard(files["README.md"].decode())
        assert card.data.license == "mit" and card.data.base_model == "org/teacher"
        assert "generated automatically" not in card.text and "cab-hf" in card.text
        assert "training_args.bin" not in files and "bridge.safetensors" not in files
        # a card that somebody has improved stays, here and there
        (tmp_path / "run" / "README.md").write_text("---\nlicense: mit\n---\nimproved\n")
        worker.run("trainer.student.lm_head.weight.data += 1")
        assert worker.run("result = trainer.push_to_hub('again', blocking=False).result().oid")
        assert hub.repositories["org/trained"].titles[-1] == "again"
        assert head(hub, "org/trained")["README.md"] == files["README.md"]
        assert (tmp_path / "run" / "README.md").read_text().endswith("improved\n")
        assert head(hub, "org/trained")["model.safetensors"] != files["model.safetensors"]


class TestFaults:
    """Each is one line that names the way out, and leaves the repository as it was."""

    def test_a_connection_that_breaks_during_an_upload(self, hub, worker, copy):
        set_bias(copy, 1.0)
        hub.faults.append(Fault("PUT .*", "cut", times=2))
        worker.run("sleeps.clear()")
        worker.run(worker.publish(copy, "org/cut"))
        assert hub.faults[0].times == 0 and len(worker.run("result = sleeps")) == 2
        assert head(hub, "org/cut")["model.safetensors"] == (copy / "model.safetensors").read_bytes()
        assert hub.repositories["org/cut"].titles == ["initial commit", "Upload student"]

    def test_a_connection_that_stays_broken(self, hub, worker, copy):
        repository = hub.repositories["org/broken"] = Repository()
        set_bias(copy, 2.0)
        hub.faults.append(Fault("PUT .*", "cut", times=1000))
        error = worker.fails(worker.publish(copy, "org/broken"))
        assert error.startswith("ConnectionError: No connection to") and "run it again" in error
        assert repository.titles == ["initial commit"]
        hub.faults.clear()
        worker.run(worker.publish(copy, "org/broken"))
        assert repository.head.files["model.safetensors"] == (copy / "model.safetensors").read_bytes()

    @pytest.mark.parametrize("kind", ["cut", "lost", 503])
    @pytest.mark.parametrize("request_", ["create", "commit"])
    def test_a_fault_at_the_first_or_the_last_request(self, request_, kind, hub, worker, copy):
        repo_id = f"org/{request_}-{kind}"
        hub.faults.append(Fault(f"POST .*/{request_}(/main)?", kind))
        worker.run(worker.publish(copy, repo_id))
        assert hub.repositories[repo_id].titles == ["initial commit", "Upload student"]
        assert hub.faults[0].times == 0

    def test_a_hub_that_fails(self, hub, worker, copy):
        hub.faults.append(Fault("POST .*/commit/main", 500, times=3))
        error = worker.fails(worker.publish(copy, "org/fails"))
        assert "500 Internal Server Error" in error and "as the test" in error
        assert hub.repositories["org/fails"].titles == ["initial commit"]

    def test_a_hub_without_xet_storage(self, hub, worker, copy):
        pytest.importorskip("hf_xet")
        set_bias(copy, 3.0)
        start = "from huggingface_hub import constants\nconstants.HF_HUB_DISABLE_XET = False\n"
        error = worker.fails(start + worker.publish(copy, "org/xet"))
        worker.run("constants.HF_HUB_DISABLE_XET = True")
        assert error.startswith("ConnectionError: No connection to") and "404" in error
        assert error.endswith("A Hub without Xet storage needs HF_HUB_DISABLE_XET=1.")
        assert hub.repositories["org/xet"].titles == ["initial commit"]

    def test_somebody_else_commits_meanwhile(self, hub, worker, copy, monkeypatch):
        repository = hub.repositories["org/busy"] = Repository()
        moved = []

        def find(revision):
            if "POST /api/models/org/busy/preupload/main" in hub.requests and not moved:
                moved.append(repository.commit("main", "theirs", {"README.md": b"theirs"}))
            return Repository.find(repository, revision)

        monkeypatch.setattr(repository, "find", find)
        worker.run(worker.publish(copy, "org/busy"))
        assert repository.titles == ["initial commit", "theirs", "Upload student"]
        assert repository.head.files["README.md"] == b"theirs"

    @pytest.mark.parametrize(
        ("token", "repo_id", "message"),
        [
            ("bad-token", "org/new", "Invalid credentials in Authorization header"),
            ("other-token", "org/new", "403 Forbidden: You don't have the rights to create"),
            ("other-token", "org/public", "403 Forbidden: You don't have the rights to write"),
            ("read-token", "org/public", "Make sure your token has the correct permissions"),
            ("good-token", "org/a/b", "Repo id must"),
        ],
    )
    def test_tokens_and_owners(self, token, repo_id, message, hub, worker, copy):
        hub.repositories["org/public"] = Repository()
        before = len(hub.requests)
        assert message in worker.fails(worker.publish(copy, repo_id, token=token))
        assert message in worker.fails(f"check_access({repo_id!r}, token={token!r})")
        assert not any("preupload" in line or line.startswith("PUT") for line in hub.requests[before:])
        assert "org/new" not in hub.repositories and hub.repositories["org/public"].titles == ["initial commit"]

    def test_no_token(self, worker, copy):
        code = worker.publish(copy, "org/new")
        error = worker.fails(f"import os\ntoken = os.environ.pop('HF_TOKEN')\n{code}")
        worker.run("os.environ['HF_TOKEN'] = token")
        assert error.startswith("ValueError: There is no Hub token. Run `hf auth login`, set HF_TOKEN")

    def test_access_is_checked_before_a_training(self, hub, worker):
        assert worker.run("result = check_access('early')") == "someone/early"
        assert hub.repositories["someone/early"].titles == ["initial commit"]

    def test_no_network(self, hub, worker, copy):
        start = "from huggingface_hub import constants\nhere, constants.ENDPOINT = constants.ENDPOINT, 'http://127.0.0.1:9'\n"
        error = worker.fails(start + worker.publish(copy, "org/new"))
        worker.run("constants.ENDPOINT = here")
        assert error.startswith("ConnectionError: No connection to http://127.0.0.1:9 (")


class TestFoldersThatAreRefused:
    """Before the Hub is asked anything."""

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("config.json", None, "has no config.json, so it is no saved student. Save it by `save_pretrained`"),
            ("config.json", b"{", "config.json is damaged and can't be read"),
            ("config.json", b'{"model_type": "cab_mamba"}', "has no auto_map"),
            ("mixers.py", None, "needs the modelling file mixers.py, which is not in"),
            ("modeling_cab_mamba.py", None, "needs the modelling file modeling_cab_mamba.py, which is not in"),
            ("model.safetensors", None, "has no model.safetensors, so it is no saved student"),
            ("model.safetensors", b"", "(0 bytes) is cut off or no safetensors file"),
            ("model.safetensors", -10, "is cut off or no safetensors file"),
            ("README.md", None, "has no README.md. A recipe writes one once its `license` is known"),
            ("README.md", b"---\nlanguage: en\n---\n", "README.md names no licence. Add `license:`"),
            ("README.md", b"# no metadata", "README.md names no licence. Add `license:`"),
            ("README.md", b"---\nlicense: [mit\n---\n", "has metadata that can't be read"),
            ("README.md", b"---\nlicense: mit\n---\n[More Information Needed]", "still says"),
        ],
    )
    def test_message(self, name, content, message, hub, worker, copy):
        if content is None:
            (copy / name).unlink()
        else:
            is_cut = isinstance(content, int)
            (copy / name).write_bytes((copy / name).read_bytes()[:content] if is_cut else content)
        before = len(hub.requests)
        error = worker.fails(worker.publish(copy, "org/refused"))
        assert error.startswith("ValueError: ") and message in error
        assert len(hub.requests) == before


def test_shareable():
    value = {"a": ["/x/y.txt", "org/name", "~/z"], "b": {"hub_token": "t", "output_dir": "o", "c": 1}, "d": None}
    assert shareable(value) == {"a": ["y.txt", "org/name", "z"], "b": {"c": 1}, "d": None}


def test_an_adapter_of_a_local_folder_is_refused(tmp_path):
    """PEFT writes where the base was loaded from; that place is no one else's."""
    base = tmp_path / "base"
    base.mkdir()
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    with pytest.raises(ValueError, match="base.*Hub id"):
        student_files(tmp_path)
