"""Two processes distil an image student as one does. The file is its own worker: `torchrun ... FILE FOLDER`."""

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_distillation import NO_LOSS, SIX_LOSSES, assert_gradients_close
from tiny_images import image_rows, make_image_trainer, tiny_image_student, tiny_image_teacher
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from cab_hf.data.augmentation import two_sizes
from cab_hf.distillation.training_args import LOSSES


pytestmark = pytest.mark.distributed

ROWS = image_rows(8)
for index in (0, 1, 2, 5):  # the processes see different numbers of labels
    ROWS[index]["labels"] = -100
LARGE = image_rows(8, size=12)
TRAININGS = {
    "six, averaged": {**SIX_LOSSES, "max_steps": 3, "ema_decay": 0.7},
    "bridge only": {**NO_LOSS, "bridge_weight": 1.0, "max_steps": 2, "mixer": "mamba"},
    "unlabelled": {"rows": image_rows(8, labelled=False)},
    "two sizes, accumulated": {**SIX_LOSSES, "rows": LARGE, "large": True, "gradient_accumulation_steps": 2},
}
EVALUATED = 7
METRICS = [*LOSSES, "loss", "agreement", "accuracy", "top5_accuracy", "teacher_accuracy", "images"]


def small_and_large(batch: dict[str, Tensor], training: bool) -> dict[str, Tensor]:
    ours, theirs = two_sizes(batch["pixel_values"], 8, 12)
    return {**batch, "pixel_values": ours, "teacher_pixel_values": theirs}


def train(folder: Path, processes: int, options: dict[str, Any]) -> dict[str, Any]:
    """Trains on batches of 8 images in all, and returns what is to be compared."""
    options = {"rows": ROWS, **options}
    batch = 8 // processes // options.get("gradient_accumulation_steps", 1)
    if options.pop("large", False):
        options |= {"teacher": tiny_image_teacher(image_size=12), "batch_transform": small_and_large}
    student = tiny_image_student(options.pop("mixer", "mamba2"))
    trainer, recorder = make_image_trainer(
        folder, student=student, per_device_train_batch_size=batch, per_device_eval_batch_size=2, **options
    )
    trainer.train()
    if processes > 1:
        assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    metrics = trainer.evaluate(options["rows"][:EVALUATED])
    results = {"gradients": recorder.gradients, "logs": recorder.logs, "metrics": metrics}
    return {**results, "average": {} if trainer._ema is None else trainer._ema.state_dict()}


def everything(folder: Path, processes: int) -> dict[str, Any]:
    return {name: train(folder, processes, options) for name, options in TRAININGS.items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[dict[str, Any], dict[str, Any]]:
    """What one process and what two processes make of the same."""
    folder = tmp_path_factory.mktemp("two")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "CUDA"))}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    process = subprocess.Popen(
        [*command, str(folder)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    alone = everything(tmp_path_factory.mktemp("one"), 1)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-4000:]
    return alone, torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_do_what_one_does(results, name):
    alone, together = (result[name] for result in results)
    assert len(together["gradients"]) == len(alone["gradients"]) == TRAININGS[name].get("max_steps", 1)
    for step, (left, right) in enumerate(zip(together["gradients"], alone["gradients"])):
        assert_gradients_close(left, right, 2e-5 if step == 0 else 2e-3)
        for key in (key for key in (*LOSSES, "loss") if key in alone["logs"][step]):
            expected = alone["logs"][step][key]
            assert together["logs"][step][key] == pytest.approx(expected, rel=1e-5 if step == 0 else 5e-4), (key, step)
    averages = ("", "ema_") if alone["average"] else ("",)
    compared = [f"eval_{prefix}{metric}" for prefix in averages for metric in METRICS]
    compared = [metric for metric in compared if metric in alone["metrics"]]
    assert {"eval_kl", "eval_bridge", "eval_agreement"} & set(compared)
    assert alone["metrics"]["eval_images"] == EVALUATED
    for metric in compared:
        assert together["metrics"][metric] == pytest.approx(alone["metrics"][metric], rel=1e-3), metric
    assert together["average"].keys() == alone["average"].keys()
    for parameter, value in alone["average"].items():
        torch.testing.assert_close(together["average"][parameter], value, rtol=1e-3, atol=1e-4, msg=parameter)


if __name__ == "__main__":
    gc.freeze()  # as in conftest.py
    found = everything(Path(sys.argv[1]), 2)
    if os.environ["RANK"] == "0":
        torch.save(found, Path(sys.argv[1]) / "results.pt")
    torch.distributed.barrier()  # all is saved
    sys.stdout.flush()
    os._exit(0)  # a thread of the backend that is still alive may abort the interpreter's own end
