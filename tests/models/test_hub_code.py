"""What a saved folder holds; the package without kernels, without network, and with an old transformers."""

import ast
import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from processes import BLOCKED, run_apart
from safetensors.torch import load_file, save_file
from tiny_models import MIXER_TYPES, random_ids, tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_imports

from cab_hf import models
from cab_hf.models import CABMambaConfig, CABMambaForCausalLM, CABMambaModel


CODE = Path(models.__file__).parent
AUTO_MAP = {
    "AutoConfig": "configuration_cab_mamba.CABMambaConfig",
    "AutoModel": "modeling_cab_mamba.CABMambaModel",
    "AutoModelForCausalLM": "modeling_cab_mamba.CABMambaForCausalLM",
    "AutoModelForSequenceClassification": "modeling_cab_mamba.CABMambaForSequenceClassification",
}


WITHOUT_KERNELS = (
    BLOCKED
    + """
import importlib.metadata

version = importlib.metadata.version
importlib.metadata.version = lambda name: "5.21.0" if name == "transformers" else version(name)
try:
    import cab_hf
except ImportError as error:  # such a transformers has no cache for states
    assert "transformers>=5.22 is required" in str(error) and "pip install -U transformers" in str(error)
else:
    raise AssertionError("an old transformers was taken")
importlib.metadata.version = version

import cab_hf
from transformers import AutoModelForCausalLM

for folder in sys.argv[2:]:
    ids = load_file(f"{folder}/ids.safetensors")["ids"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is cab_hf.CABMambaForCausalLM
    loss = model.train()(ids, labels=ids).loss
    loss.backward()
    texts = model.eval().generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    model.save_pretrained(f"{folder}/saved")
    save_file({"loss": loss.detach(), "texts": texts}, f"{folder}/out.safetensors")
assert not any(name.partition(".")[0] in BLOCKED for name in sys.modules)
"""
)


def saved_folders(root: Path) -> tuple[list[Path], list[CABMambaForCausalLM]]:
    folders, saved = [], []
    for mixer_type in MIXER_TYPES:
        folders.append(root / mixer_type)
        saved.append(tiny_model(mixer_type=mixer_type, intermediate_size=24, tie_word_embeddings=False))
        saved[-1].save_pretrained(folders[-1])
        save_file({"ids": random_ids(2, 7)}, folders[-1] / "ids.safetensors")
    return folders, saved


def test_the_package_works_without_kernels_and_network_but_with_no_old_transformers(tmp_path):
    folders, saved = saved_folders(tmp_path)
    run_apart(WITHOUT_KERNELS, "mamba_ssm,causal_conv1d,triton,fla", folders, tmp_path)
    ids = random_ids(2, 7)
    for folder, model in zip(folders, saved):
        found = load_file(folder / "out.safetensors")
        torch.testing.assert_close(found["loss"], model(ids, labels=ids).loss.detach())
        assert torch.equal(found["texts"], model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0))
        assert torch.equal(
            load_file(folder / "saved/model.safetensors")["backbone.embeddings.weight"],
            model.get_input_embeddings().weight,
        )


@pytest.mark.parametrize("mixer_type", MIXER_TYPES)
def test_auto_classes_need_no_trust_where_the_package_is(mixer_type, tmp_path):
    model, ids = tiny_model(mixer_type=mixer_type), random_ids(2, 7)
    model.save_pretrained(tmp_path)
    for trust in ({}, {"trust_remote_code": True}):
        assert type(AutoConfig.from_pretrained(tmp_path, **trust)).__name__ == "CABMambaConfig"
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **trust)
        base = AutoModel.from_pretrained(tmp_path, **trust)
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, model(ids).logits)
            assert torch.equal(base(ids).last_hidden_state, model.backbone(ids).last_hidden_state)
    assert type(AutoConfig.from_pretrained(tmp_path)) is CABMambaConfig
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is CABMambaForCausalLM
    assert type(AutoModelForCausalLM.from_config(model.config)) is CABMambaForCausalLM
    assert type(AutoModel.from_config(model.config)) is CABMambaModel


@pytest.mark.parametrize("model_class", [CABMambaForCausalLM, CABMambaModel])
def test_every_checkpoint_names_all_auto_classes(model_class, tmp_path):
    model = tiny_model(mixer_type="mamba2")
    model = model if model_class is CABMambaForCausalLM else model.backbone
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["auto_map"] == AUTO_MAP
    assert written["architectures"] == [model_class.__name__]
    for reference in AUTO_MAP.values():
        module, name = reference.split(".")
        assert f"class {name}(" in (tmp_path / f"{module}.py").read_text()
    # the map of a repository that the model came from does not stay
    model.config.auto_map = {name: f"someone/else--{reference}" for name, reference in AUTO_MAP.items()}
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["auto_map"] == AUTO_MAP


def test_travelling_files_import_only_what_travels(tmp_path):
    tiny_model(mixer_type="mamba2").save_pretrained(tmp_path)
    travelling = {path.stem for path in tmp_path.glob("*.py")}
    models = {"configuration_cab_mamba", "generation", "modeling_cab_mamba", "students"}
    decoding = {"decoding", "decode_kernels", "kernel_operators", "states"}
    assert travelling == models | decoding | {
        "mixers",
        "ssm_ops",
        "ssm_kernels",
        "s6_scan",
        "ssd_scan",
        "state_rotation",
    }
    allowed = {"torch", "transformers", "huggingface_hub", "safetensors", *sys.stdlib_module_names}
    for stem in sorted(travelling):
        asked = set(get_imports(CODE / f"{stem}.py"))  # what transformers wants to be installed
        assert asked <= allowed, f"{stem}: {asked - allowed}"
        for node in ast.walk(ast.parse((CODE / f"{stem}.py").read_text())):
            if isinstance(node, ast.Import):
                found = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found = {node.module.partition(".")[0]}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 and node.module in travelling, ast.unparse(node)
                continue
            else:
                continue
            # the one that may be missing, in a `try` that transformers passes over
            optional = {"triton"} if stem == "decode_kernels" else set()
            assert found <= allowed | optional, f"{stem}: {ast.unparse(node)}"


class TestOtherVersions:
    """A student says by its probe whether another transformers computes what it did."""

    @pytest.fixture
    def folder(self, tmp_path):
        model = tiny_model(mixer_type="mamba2", n_groups=2)
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"transformers_version": "5.99.0"}))
        return tmp_path

    def told(self, folder, caplog) -> str:
        logger = logging.getLogger("cab_hf.models.students")
        logger.addHandler(caplog.handler)
        with caplog.at_level(logging.INFO, logger=logger.name):
            CABMambaForCausalLM.from_pretrained(folder)
        logger.removeHandler(caplog.handler)
        return "\n".join(f"{record.levelname} {record.getMessage()}" for record in caplog.records)

    def test_equal_outputs_are_no_warning(self, folder, caplog):
        said = self.told(folder, caplog)
        assert "INFO" in said and "saved under transformers 5.99.0" in said and "WARNING" not in said

    def test_other_outputs_are_told_with_their_number(self, folder, caplog):
        probe = json.loads((folder / "probe.json").read_text())
        probe["outputs"] = [1.25 * number for number in probe["outputs"]]
        (folder / "probe.json").write_text(json.dumps(probe))
        said = self.told(folder, caplog)
        assert "WARNING" in said and "differs by 2.0e-01 of the largest number" in said and "5.99.0" in said

    def test_a_student_without_a_probe_or_of_another_head_loads(self, folder, caplog):
        AutoModel.from_pretrained(folder)
        (folder / "probe.json").unlink()
        assert self.told(folder, caplog) == ""

    def test_the_same_version_asks_nothing(self, tmp_path, caplog):
        tiny_model().save_pretrained(tmp_path)
        (tmp_path / "probe.json").write_text("{")
        assert self.told(tmp_path, caplog) == ""
