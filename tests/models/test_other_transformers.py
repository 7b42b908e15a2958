"""A student's folder alone, under other versions of transformers: `make test-versions` installs them.

`OTHER_TRANSFORMERS` names folders that hold one version each, as `pip install --no-deps --target FOLDER` leaves them.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from tiny_models import MIXER_TYPES, random_ids, tiny_model


FOLDERS = [folder for folder in os.environ.get("OTHER_TRANSFORMERS", "").split(os.pathsep) if folder]
SCRIPT = """
import json, sys, torch, transformers
sys.modules["cab_hf"] = None
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
model.generation_config.eos_token_id = None
ids = torch.tensor(json.loads(sys.argv[2]))
mask = torch.ones_like(ids)
mask[0, :3] = 0
options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
with torch.no_grad():
    said = [model.generate(ids, **options, **more).tolist() for more in ({}, {"use_cache": False}, {"num_beams": 3})]
    print(json.dumps([transformers.__version__, model(ids).logits[0, -1].tolist(), *said]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not FOLDERS, reason="OTHER_TRANSFORMERS names no folder: run `make test-versions`")
@pytest.mark.parametrize("mixer_type", MIXER_TYPES)
@pytest.mark.parametrize("folder", FOLDERS)
def test_logits_and_texts_are_equal(folder, mixer_type, tmp_path):
    model, ids = tiny_model(mixer_type=mixer_type).eval(), random_ids(2, 9)
    model.save_pretrained(tmp_path / "student")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "student"), json.dumps(ids.tolist())]
    other = {"PYTHONPATH": folder, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    process = subprocess.run(command, env={**os.environ, **other}, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    version, logits, *said = json.loads(process.stdout.splitlines()[-1])
    assert version in folder
    model.generation_config.eos_token_id = None
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(logits), model(ids).logits[0, -1], atol=1e-5, rtol=1e-4)
    for found, more in zip(said, ({}, {"use_cache": False}, {"num_beams": 3})):
        assert found == model.generate(ids, **options, **more).tolist()
