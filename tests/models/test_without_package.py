"""Saved folders are enough: one process that has no cab_hf, no kernels and no network loads, trains and saves them."""

import json
from pathlib import Path

import pytest
import torch
from processes import BLOCKED, run_apart
from safetensors.torch import load_file, save_file
from tiny_models import (
    MIXER_TYPES,
    VISION_VARIANTS,
    largest_difference,
    random_ids,
    random_images,
    shake,
    tiny_config,
    tiny_model,
    tiny_vision_model,
)
from transformers import AutoModel

from cab_hf import models
from cab_hf.models import (
    CABMambaForCausalLM,
    CABMambaForSequenceClassification,
    CABMambaModel,
    modeling_cab_mamba,
    modeling_cab_vision_mamba,
)


CODE = Path(models.__file__).parent
LABELS = torch.tensor([1, 4])
VISION = ["s6, middle", "ssd, first, layer scale, plain mlp"]

# A folder's parent says what is saved in it.
WITHOUT_PACKAGE = (
    BLOCKED
    + """
from pathlib import Path
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

trust = {"trust_remote_code": True}

def language(folder):
    ids = load_file(f"{folder}/inputs.safetensors")["ids"]
    config = AutoConfig.from_pretrained(folder, **trust)
    assert type(config).__name__ == "CABMambaConfig" and "transformers_modules" in type(config).__module__
    model = AutoModelForCausalLM.from_pretrained(folder, **trust)
    assert type(model).__name__ == "CABMambaForCausalLM" and model.can_generate()
    base = AutoModel.from_pretrained(folder, **trust)
    assert type(base).__name__ == "CABMambaModel"
    built = AutoModelForCausalLM.from_config(config, **trust)
    built.load_state_dict(model.state_dict(), strict=True)
    model.save_pretrained(f"{folder}/causal")
    base.save_pretrained(f"{folder}/base")
    again = AutoModelForCausalLM.from_pretrained(f"{folder}/causal", **trust)
    base_again = AutoModel.from_pretrained(f"{folder}/base", **trust)
    with torch.no_grad():
        logits = model(ids).logits
        hidden = base(ids).last_hidden_state
        assert torch.equal(built.eval()(ids).logits, logits) and torch.equal(again(ids).logits, logits)
        assert torch.equal(base_again(ids).last_hidden_state, hidden)
        texts = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    model.train()(ids, labels=ids).loss.backward()
    return {"logits": logits, "hidden": hidden, "texts": texts, "gradient": model.get_input_embeddings().weight.grad}

def classifiers(folder):
    inputs = load_file(f"{folder}/inputs.safetensors")
    model = AutoModelForSequenceClassification.from_pretrained(folder, **trust)
    assert type(model).__name__ == "CABMambaForSequenceClassification"
    with torch.no_grad():
        logits = model(**inputs).logits
    model.save_pretrained(f"{folder}/saved")
    again = AutoModelForSequenceClassification.from_pretrained(f"{folder}/saved", **trust)
    causal = AutoModelForCausalLM.from_pretrained(f"{folder}/saved", **trust)
    assert type(causal).__name__ == "CABMambaForCausalLM"
    with torch.no_grad():
        assert torch.allclose(again(**inputs).logits, logits, atol=1e-6)
    model.train()(**inputs, labels=torch.zeros(len(logits), dtype=torch.long)).loss.backward()
    return {"logits": logits, "gradient": model.score.weight.grad}

def vision(folder):
    images = load_file(f"{folder}/inputs.safetensors")["images"]
    config = AutoConfig.from_pretrained(folder, **trust)
    model = AutoModelForImageClassification.from_pretrained(folder, **trust)
    base = AutoModel.from_pretrained(folder, **trust)
    for thing, name in ((config, "Config"), (model, "ForImageClassification"), (base, "Model")):
        assert type(thing).__name__ == f"CABVisionMamba{name}" and "transformers_modules" in type(thing).__module__
    with torch.no_grad():
        logits, hidden = model(images).logits, base(images).last_hidden_state
    loss = model.train()(images, labels=torch.tensor([1, 4])).loss
    loss.backward()
    model.save_pretrained(f"{folder}/again")
    again = AutoModelForImageClassification.from_pretrained(f"{folder}/again", **trust)
    assert torch.equal(again(images).logits, logits)
    return {"logits": logits, "hidden": hidden, "loss": loss.detach()}

for folder in sys.argv[2:]:
    save_file(globals()[Path(folder).parent.name](folder), f"{folder}/out.safetensors")
assert not any(name.partition(".")[0] in BLOCKED for name in sys.modules)
"""
)


def classifier(mixer_type: str) -> CABMambaForSequenceClassification:
    torch.manual_seed(0)
    config = tiny_config(mixer_type=mixer_type, intermediate_size=24, num_labels=3)
    return shake(CABMambaForSequenceClassification(config).eval())


def causal(mixer_type: str) -> CABMambaForCausalLM:
    return tiny_model(mixer_type=mixer_type, intermediate_size=24, tie_word_embeddings=False)


def padded() -> dict[str, torch.Tensor]:
    """Ids and mask, padded on the left."""
    mask = torch.arange(11) >= 11 - torch.tensor([6, 9, 1, 4]).unsqueeze(1)
    return {"input_ids": random_ids(4, 11, vocab_size=98).where(mask, torch.tensor(98)), "attention_mask": mask.long()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as `language/mamba`, with what the process saved in them."""
    root, folders = tmp_path_factory.mktemp("students"), []

    def save(place: str, model: torch.nn.Module, **inputs: torch.Tensor) -> None:
        folders.append(root / place)
        model.save_pretrained(folders[-1])
        save_file(inputs, folders[-1] / "inputs.safetensors")

    for mixer_type in MIXER_TYPES:
        save(f"language/{mixer_type}", causal(mixer_type), ids=random_ids(2, 7))
        save(f"classifiers/{mixer_type}", classifier(mixer_type), **padded())
    for index, name in enumerate(VISION):
        save(f"vision/{index}", tiny_vision_model(**VISION_VARIANTS[name]), images=random_images(2))
    run_apart(WITHOUT_PACKAGE, "cab_hf,mamba_ssm,causal_conv1d,triton,fla", folders, root)
    return root


@pytest.mark.parametrize("mixer_type", MIXER_TYPES)
def test_language_models_load_train_and_save(root, mixer_type):
    folder, model, ids = root / "language" / mixer_type, causal(mixer_type), random_ids(2, 7)
    found = load_file(folder / "out.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(found["logits"], model(ids).logits, rtol=0, atol=1e-6)
        torch.testing.assert_close(found["hidden"], model.backbone(ids).last_hidden_state, rtol=0, atol=1e-6)
    assert torch.equal(found["texts"], model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0))
    model.train()(ids, labels=ids).loss.backward()
    torch.testing.assert_close(found["gradient"], model.get_input_embeddings().weight.grad, rtol=0, atol=1e-5)
    # what that process saved is again a whole checkpoint, for it and for us
    files = {path.name for path in folder.glob("*.py")}
    for name, model_class in (("causal", CABMambaForCausalLM), ("base", CABMambaModel)):
        again = folder / name
        assert json.loads((again / "config.json").read_text())["auto_map"] == modeling_cab_mamba.AUTO_MAP
        assert {path.name for path in again.glob("*.py")} == files
        for path in again.glob("*.py"):
            assert path.read_bytes() == (CODE / path.name).read_bytes()
        assert type(AutoModel.from_pretrained(again)) is CABMambaModel
        model_class.from_pretrained(again)


@pytest.mark.parametrize("mixer_type", MIXER_TYPES)
def test_classifiers_of_texts_load_train_and_save(root, mixer_type):
    found, model, inputs = (
        load_file(root / "classifiers" / mixer_type / "out.safetensors"),
        classifier(mixer_type),
        padded(),
    )
    output = model.train()(**inputs, labels=torch.zeros(4, dtype=torch.long))
    output.loss.backward()
    torch.testing.assert_close(found["logits"], output.logits.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(found["gradient"], model.score.weight.grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize("index", range(len(VISION)), ids=VISION)
def test_classifiers_of_images_load_train_and_save(root, index):
    folder, model, images = (
        root / "vision" / str(index),
        tiny_vision_model(**VISION_VARIANTS[VISION[index]]),
        random_images(2),
    )
    found = load_file(folder / "out.safetensors")
    with torch.no_grad():
        assert largest_difference(found["logits"], model(images).logits) < 1e-6
        assert largest_difference(found["hidden"], model.backbone(images).last_hidden_state) < 1e-6
        assert largest_difference(found["loss"], model(images, labels=LABELS).loss) < 1e-6
    for checkpoint in (folder, folder / "again"):
        assert json.loads((checkpoint / "config.json").read_text())["auto_map"] == modeling_cab_vision_mamba.AUTO_MAP
        for reference in modeling_cab_vision_mamba.AUTO_MAP.values():
            module, name = reference.split(".")
            assert f"class {name}(" in (checkpoint / f"{module}.py").read_text()
    # the language model's modelling code does not travel with images
    assert not (folder / "modeling_cab_mamba.py").exists()
