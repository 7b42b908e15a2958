"""Two processes do what one does. The file is its own worker: `torchrun ... test_distributed.py FOLDER`."""

import copy
import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_distillation import (
    NO_LOSS,
    SIX_LOSSES,
    assert_gradients_close,
    make_trainer,
    ragged_rows,
    tiny_student,
    tiny_teacher,
)
from tiny_images import image_rows, make_image_trainer, tiny_image_student, tiny_image_teacher
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import default_collate

from cab_hf import DistillationTrainer, student_from_teacher
from cab_hf.data.augmentation import two_sizes
from cab_hf.distillation import trainer as trainer_module
from cab_hf.distillation.cuda_graph import GraphedStep, sum_over_processes
from cab_hf.distillation.training_args import LOSSES


# PEFT asks for an attribute that transformers renamed.
pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("default::FutureWarning")]

ROWS = ragged_rows((11, 3, 0, 1, 9, 5, 2, 11))
TRAININGS = {
    "six": {**SIX_LOSSES, "max_steps": 2},
    "accumulated": {**SIX_LOSSES, "gradient_accumulation_steps": 2, "weight_decay": 0.1},
    "bridge only": {**NO_LOSS, "bridge_weight": 1.0, "max_steps": 2, "mixer": "mamba"},
    "hidden only": {**NO_LOSS, "hidden_weight": 1.0, "relative_loss": False},
    "after the bridge's end": {**SIX_LOSSES, "bridge_end": 0.5, "output_end": 0.5, "max_steps": 4},
    "after every end": {**NO_LOSS, "bridge_weight": 1.0, "bridge_end": 0.5, "max_steps": 2},
    "centered": {**SIX_LOSSES, "bridge_centered": True},
    "partly frozen": {**SIX_LOSSES, "trainable": "in_proj|norm"},
    "lora": {**SIX_LOSSES, "lora": True},
    "recomputed": {**SIX_LOSSES, "activation_checkpointing": True},
    "graphed": {**SIX_LOSSES, "max_steps": 2, "cuda_graph": True},
    "graphed, accumulated": {**SIX_LOSSES, "max_steps": 2, "gradient_accumulation_steps": 2, "cuda_graph": True},
    "compiled": {**SIX_LOSSES, "max_steps": 2, "torch_compile_backend": "eager"},
    "hybrid": {**SIX_LOSSES, "max_steps": 2, "mixer": "hybrid"},
    "hybrid, bridge only, recomputed": {
        **NO_LOSS,
        "bridge_weight": 1.0,
        "max_steps": 2,
        "mixer": "hybrid",
        "activation_checkpointing": True,
    },
}
SHARDED = {
    **{name: {**NO_LOSS, f"{name}_weight": 1.0} for name in ("kl", "bridge", "output", "hidden")},
    "five": {**SIX_LOSSES, "attention_weight": 0.0},
}
EVALUATIONS = {"even": 8, "three of four": 7, "one of four": 5, "one alone": 1}
METRICS = [f"eval_{name}" for name in (*LOSSES, "loss", "agreement", "tokens", "perplexity", "teacher_perplexity")]

IMAGE_ROWS = image_rows(8)
for index in (0, 1, 2, 5):  # the processes see different numbers of labels
    IMAGE_ROWS[index]["labels"] = -100
IMAGE_TRAININGS = {
    "six, averaged": {**SIX_LOSSES, "max_steps": 3, "ema_decay": 0.7},
    "images, bridge only": {**NO_LOSS, "bridge_weight": 1.0, "max_steps": 2, "mixer": "mamba"},
    "unlabelled": {"rows": image_rows(8, labelled=False)},
    "two sizes, accumulated": {
        **SIX_LOSSES,
        "attention_weight": 0.0,  # maps of equal grids only
        "rows": image_rows(8, size=12),
        "large": True,
        "gradient_accumulation_steps": 2,
    },
}
EVALUATED = 7
IMAGE_METRICS = [*LOSSES, "loss", "agreement", "accuracy", "top5_accuracy", "teacher_accuracy", "images"]


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows: list[dict[str, Tensor]]):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


class RunAgain(GraphedStep):
    """Where there is no GPU, a step runs as one that can't be captured."""

    def _capture(self, inputs: dict[str, Tensor], weights: Tensor, counts: Tensor) -> None:
        self.inputs = {name: value.clone() for name, value in inputs.items()}
        self.weights, self.counts, self.graph = weights.clone(), counts.clone(), None


def train(folder: Path, processes: int, options: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Trains on batches of 8 rows in all, and returns what is to be compared."""
    options = {**options, **more}
    batch = 8 // processes // options.get("gradient_accumulation_steps", 1)
    mixer = options.pop("mixer", "mamba2")
    hybrid = mixer == "hybrid"
    student = student_from_teacher(tiny_teacher(), keep_attention=[1]) if hybrid else tiny_student(mixer)
    if options.pop("lora", False):
        config = LoraConfig(r=2, target_modules=["in_proj", "out_proj"], init_lora_weights=False)
        student = get_peft_model(student, config)
    resume = options.pop("resume", None)
    trainer, recorder = make_trainer(folder, rows=ROWS, student=student, per_device_train_batch_size=batch, **options)
    if trainer.args.cuda_graph:
        trainer._check_graph = lambda: None  # that this is a GPU
        trainer_module.GraphedStep = RunAgain
    trainer.train(resume_from_checkpoint=resume)
    if processes > 1 and trainer.args.cuda_graph:
        assert trainer.model_wrapped is trainer.model  # which sums its gradients itself
    elif processes > 1:
        wrapped = getattr(trainer.model_wrapped, "_orig_mod", trainer.model_wrapped)
        assert isinstance(wrapped, DistributedDataParallel)
        assert not wrapped.find_unused_parameters
    return {"gradients": recorder.gradients, "logs": recorder.logs, "state": dict(trainer.model.state_dict())}


def small_and_large(batch: dict[str, Tensor], training: bool) -> dict[str, Tensor]:
    ours, theirs = two_sizes(batch["pixel_values"], 8, 12)
    return {**batch, "pixel_values": ours, "teacher_pixel_values": theirs}


def train_on_images(folder: Path, processes: int, options: dict[str, Any]) -> dict[str, Any]:
    """Trains on batches of 8 images in all, and returns what is to be compared."""
    options = {"rows": IMAGE_ROWS, **options}
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


def evaluate(folder: Path, rows: Any) -> dict[str, float]:
    trainer, _ = make_trainer(folder, per_device_eval_batch_size=2, relative_loss=False, **SIX_LOSSES)
    metrics = trainer.evaluate(rows)
    return {name: metrics[name] for name in METRICS}


def run_out(folder: Path, processes: int) -> int:
    """Steps of a run whose stream ends before `max_steps`, and starts again."""
    rows = Stream(ragged_rows((11, 3, 5, 2)))
    trainer, _ = make_trainer(
        folder, rows=rows, per_device_train_batch_size=2 // processes, max_steps=5, ce_weight=1.0
    )
    trainer.train()
    return trainer.state.global_step


def shard(folder: Path, options: dict[str, Any]) -> float:
    """Largest difference that FSDP2 makes to a gradient, over that parameter's largest."""
    trainer, _ = make_trainer(folder, rows=ROWS, **options)
    trainer._calibrate_targets()
    mesh, rank, sharded = init_device_mesh("cpu", (2,)), trainer.args.process_index, copy.deepcopy(trainer.model)
    for module in (*sharded.student.backbone.layers, sharded):
        fully_shard(module, mesh=mesh)
    counts = trainer._local_counts(default_collate(ROWS))
    for model, rows in ((trainer.model, ROWS), (sharded, ROWS[4 * rank : 4 * rank + 4])):
        loss = trainer._distil(model.train(), default_collate(rows), *trainer._weights(), counts).loss
        (loss * len(ROWS) / len(rows)).backward()
    errors = []
    for whole, part in zip(trainer.model.parameters(), sharded.parameters()):
        gradient = torch.zeros_like(whole) if part.grad is None else part.grad.full_tensor()
        errors.append((gradient - whole.grad).abs().max() / whole.grad.abs().max().clamp(min=1e-4))
    return max(errors).item()


def summed() -> bool:
    """Whether gradients of many shapes are added up over two processes, in place."""
    generator = torch.Generator().manual_seed(3)
    whole = [torch.randn(shape, generator=generator) for shape in ((3,), (), (2, 5), (40,), (1, 2), (6,), (2, 2))]
    whole[2], whole[5] = whole[2].T, whole[5].double()
    rank = torch.distributed.get_rank()
    ours = [(rank + 1) * gradient for gradient in whole]
    places = [gradient.data_ptr() for gradient in ours]
    sum_over_processes(ours, bucket_bytes=64)
    same = [torch.equal(gradient, 3 * expected) for gradient, expected in zip(ours, whole)]
    return all(same) and places == [gradient.data_ptr() for gradient in ours]


def everything(folder: Path, processes: int) -> dict[str, Any]:
    results = {name: train(folder / "plain", processes, options) for name, options in TRAININGS.items()}
    results |= {name: train_on_images(folder / "plain", processes, rest) for name, rest in IMAGE_TRAININGS.items()}
    results |= {name: evaluate(folder / "plain", ROWS[:count]) for name, count in EVALUATIONS.items()}
    results["stream"] = evaluate(folder / "plain", Stream(ROWS[:8]))
    results["run out"] = run_out(folder / "plain", processes)
    saving = {**SIX_LOSSES, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    results["whole"] = train(folder / "saved", processes, saving)
    results["resumed"] = train(folder / "saved", processes, saving, resume=str(folder / "saved" / "checkpoint-2"))
    if processes > 1:
        results["summed"] = summed()
        results["sharded"] = {name: shard(folder, options) for name, options in SHARDED.items()}
    return results


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
def test_two_processes_train_as_one(results, name):
    alone, together = (result[name] for result in results)
    assert len(together["gradients"]) == len(alone["gradients"])
    for step, (left, right) in enumerate(zip(together["gradients"], alone["gradients"])):
        if all((gradient == 0).all() for gradient in right.values()):
            assert name == "after every end" and all((gradient == 0).all() for gradient in left.values())
        else:
            assert_gradients_close(left, right, 2e-5 if step == 0 else 1e-3)
    for step, (left, right) in enumerate(zip(together["logs"][:-1], alone["logs"][:-1], strict=True)):
        assert left.keys() == right.keys()
        for key in (*LOSSES, "loss"):
            if key in right:
                assert left[key] == pytest.approx(right[key], rel=1e-5 if step == 0 else 2e-4, abs=1e-7), (key, step)
    torch.testing.assert_close(together["state"]["target_scales"], alone["state"]["target_scales"])


@pytest.mark.parametrize("name", IMAGE_TRAININGS)
def test_two_processes_do_on_images_what_one_does(results, name):
    alone, together = (result[name] for result in results)
    assert len(together["gradients"]) == len(alone["gradients"]) == IMAGE_TRAININGS[name].get("max_steps", 1)
    for step, (left, right) in enumerate(zip(together["gradients"], alone["gradients"])):
        assert_gradients_close(left, right, 2e-5 if step == 0 else 2e-3)
        for key in (key for key in (*LOSSES, "loss") if key in alone["logs"][step]):
            expected = alone["logs"][step][key]
            assert together["logs"][step][key] == pytest.approx(expected, rel=1e-5 if step == 0 else 5e-4), (key, step)
    averages = ("", "ema_") if alone["average"] else ("",)
    compared = [f"eval_{prefix}{metric}" for prefix in averages for metric in IMAGE_METRICS]
    compared = [metric for metric in compared if metric in alone["metrics"]]
    assert {"eval_kl", "eval_bridge", "eval_agreement"} & set(compared)
    assert alone["metrics"]["eval_images"] == EVALUATED
    for metric in compared:
        assert together["metrics"][metric] == pytest.approx(alone["metrics"][metric], rel=1e-3), metric
    assert together["average"].keys() == alone["average"].keys()
    for parameter, value in alone["average"].items():
        torch.testing.assert_close(together["average"][parameter], value, rtol=1e-3, atol=1e-4, msg=parameter)


@pytest.mark.parametrize("name", [*EVALUATIONS, "stream"])
def test_two_processes_evaluate_as_one(results, name):
    alone, together = (result[name] for result in results)
    for metric in METRICS:
        assert together[metric] == pytest.approx(alone[metric], rel=1e-5), metric


def test_two_processes_resume_bit_for_bit(results):
    for result in results:
        assert result["resumed"]["logs"][:-1] == result["whole"]["logs"][2:-1]
        for name, value in result["whole"]["state"].items():
            assert torch.equal(result["resumed"]["state"][name], value), name


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_gradients_are_the_whole_ones(results, name):
    assert results[1]["sharded"][name] < 1e-4


def test_gradients_of_many_shapes_are_added_up(results):
    assert results[1]["summed"] is True


def test_maps_of_sharded_weights_teach(tmp_path, monkeypatch):
    create = DistillationTrainer.create_accelerator_and_postprocess

    def create_sharding(self):
        create(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(DistillationTrainer, "create_accelerator_and_postprocess", create_sharding)
    with pytest.raises(ValueError) as error:
        make_trainer(tmp_path, attention_weight=0.5)
    assert all(word in str(error.value) for word in ("attention_weight", "0.5", "FSDP", "DDP", "attention_weight=0.0"))


def test_a_stream_may_end_early(results):
    assert [result["run out"] for result in results] == [5, 5]


if __name__ == "__main__":
    gc.freeze()  # as in conftest.py
    found = everything(Path(sys.argv[1]), 2)
    if os.environ["RANK"] == "0":
        torch.save(found, Path(sys.argv[1]) / "results.pt")
    torch.distributed.barrier()  # all is saved
    sys.stdout.flush()
    os._exit(0)  # a thread of the backend that is still alive may abort the interpreter's own end
