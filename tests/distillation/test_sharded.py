"""FSDP2 and ZeRO-3 on two processes do what one does, started from `training_args/accelerate`.

The file is its own worker: `accelerate launch ... test_sharded.py KIND FOLDER`.
"""

import gc
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_distillation import (
    NO_LOSS,
    SIX_LOSSES,
    Recorder,
    make_arguments,
    make_trainer,
    ragged_rows,
    tiny_student,
    tiny_teacher,
)
from tiny_images import image_rows, tiny_image_student, tiny_image_teacher
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from cab_hf import DistillationTrainer, student_from_teacher
from cab_hf.distillation.checks import check_whole
from cab_hf.distillation.training_args import LOSSES


# PEFT asks for an attribute that transformers renamed.
pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("default::FutureWarning")]

CONFIGS = Path(__file__).parents[2] / "training_args" / "accelerate"
KINDS = ["fsdp2", "zero3"]
ROWS = ragged_rows((11, 3, 0, 1, 9, 5, 2, 11))
FIVE = {**SIX_LOSSES, "attention_weight": 0.0, "max_steps": 3}
# Plain SGD changes weights by their gradients; Adam would hide a wrong factor.
SGD = {**FIVE, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.5}
TRAININGS = {
    "sgd": SGD,
    "untied": {**SGD, "student": {"tie_word_embeddings": False}},
    "images": {**SGD, "images": True},
    "lora": {**SGD, "lora": True},
    "adam, accumulated": {**FIVE, "gradient_accumulation_steps": 2, "weight_decay": 0.1, "bridge_learning_rate": 1e-3},
    "bridge only": {**NO_LOSS, "bridge_weight": 1.0, "max_steps": 2, "student": {"mixer_type": "mamba"}},
    "hidden only": {**NO_LOSS, "hidden_weight": 1.0, "max_steps": 2},
    "after the bridge's end": {**FIVE, "bridge_end": 0.5, "output_end": 0.5, "max_steps": 4},
    "after the logits' end": {**NO_LOSS, "kl_weight": 1.0, "kl_end": 0.5, "bridge_weight": 0.5, "max_steps": 4},
    "after every end": {**NO_LOSS, "bridge_weight": 1.0, "bridge_end": 0.5, "max_steps": 2, "optim": "sgd"},
    "recomputed": {**SGD, "activation_checkpointing": True},
    "hybrid": {**SGD, "student": "hybrid"},
    "partly frozen": {**SGD, "trainable": "in_proj|norm"},
}
SAVED = ["sgd", "untied", "images", "lora"]
SAVING = {**FIVE, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
REFUSED = {
    "fsdp2": [("FSDP_CPU_RAM_EFFICIENT_LOADING", "true"), ("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")],
    "zero3": [("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", "false")],
}


def build(
    folder: Path, kind: str | None, options: dict[str, Any], student: torch.nn.Module | None = None
) -> tuple[DistillationTrainer, Recorder]:
    """A trainer of the same 8 rows at a step, on one process or on two."""
    options = {**options}
    images, adapts, student_options = (options.pop(name, None) for name in ("images", "lora", "student"))
    if student is None:
        if student_options == "hybrid":
            student = student_from_teacher(tiny_teacher(), keep_attention=[1])
            for index, parameter in enumerate(student.parameters()):
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
        else:
            student = tiny_image_student() if images else tiny_student(**(student_options or {}))
    if adapts:
        config = LoraConfig(r=2, target_modules=["in_proj", "out_proj"], init_lora_weights=False)
        student = get_peft_model(student, config)
    batch = 8 // (1 if kind is None else 2) // options.get("gradient_accumulation_steps", 1)
    if kind == "zero3":  # DeepSpeed does not start where the CPU is asked for
        options |= {"use_cpu": False, "ddp_backend": "gloo"}
    args = make_arguments(folder, per_device_train_batch_size=batch, per_device_eval_batch_size=2, **options)
    if kind == "zero3":  # DeepSpeed leaves weights as small as these whole
        args.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    recorder = Recorder()
    trainer = DistillationTrainer(
        student,
        tiny_image_teacher() if images else tiny_teacher(),
        args,
        train_dataset=image_rows(8) if images else ROWS,
        callbacks=[] if kind == "zero3" else [recorder],
    )
    return trainer, recorder


def weights(trainer: DistillationTrainer) -> dict[str, Tensor]:
    """What is trained, student and bridge, on the first process."""
    state = trainer.model.state_dict()
    if trainer._is_sharded:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
    return {name: value.detach().clone() for name, value in state.items()}


def whole_gradients(recorder: Recorder) -> list[dict[str, Tensor]]:
    return [
        {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in step.items()}
        for step in recorder.gradients
    ]


def train(folder: Path, kind: str | None, options: dict[str, Any], resume: str | None = None) -> dict[str, Any]:
    trainer, recorder = build(folder, kind, options)
    before = {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}
    trainer.train(resume_from_checkpoint=resume)
    if kind == "fsdp2":
        blocks = [module for module in trainer.model.modules() if isinstance(module, FSDPModule)]
        assert len(blocks) > trainer._student_config.num_hidden_layers
        assert any(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    elif kind == "zero3":
        assert all(parameter.ds_tensor.ds_numel < parameter.ds_numel for parameter in trainer.model.parameters())
        assert all(parameter.numel() == 0 for parameter in trainer.model.student.parameters())
    results = {
        "before": before,
        "after": weights(trainer),
        "student": {name: value.detach().clone() for name, value in trainer.student.state_dict().items()},
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
        "gradients": whole_gradients(recorder),
    }
    assert not any(isinstance(value, DTensor) for value in results["student"].values())
    if not options.get("images"):
        results["metrics"] = trainer.evaluate(ROWS[:5])
    trainer.save_model(str(folder))
    return results


def two_stages(folder: Path, kind: str | None) -> dict[str, Tensor]:
    """The student of a second trainer that takes over what the first one trained."""
    trainer, _ = build(folder, kind, {**SGD, "max_steps": 2})
    trainer.train()
    again, _ = build(folder, kind, FIVE, trainer.student)
    again.train()
    assert again.student is trainer.student
    return dict(again.student.state_dict())


def refusals(folder: Path, kind: str) -> list[str]:
    """What trainers say that would lose weights."""
    said = []
    for name, value in REFUSED[kind]:
        kept, os.environ[name] = os.environ[name], value
        with pytest.raises(ValueError) as error:
            build(folder, kind, FIVE)
        os.environ[name] = kept
        said.append(str(error.value))
    return said


def everything(folder: Path, kind: str | None) -> dict[str, Any]:
    results: dict[str, Any] = {name: train(folder / name, kind, options) for name, options in TRAININGS.items()}
    results["whole"] = train(folder / "whole", kind, SAVING)
    results["resumed"] = train(folder / "resumed", kind, SAVING, resume=str(folder / "whole" / "checkpoint-2"))
    if kind != "zero3":  # transformers lets bf16 start on the CPU only where the CPU is asked for
        results["bf16"] = train(folder / "bf16", kind, {**SGD, "bf16": True})
    results["two stages"] = two_stages(folder / "plain", kind)
    return results


def on_two_processes(kind: str, folder: Path) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "CUDA"))}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{kind}.yaml")]
    return subprocess.Popen(
        [*command, "--num_processes", "2", "--main_process_port", "0", __file__, kind, str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """What one process makes of it."""
    folder = tmp_path_factory.mktemp("one")
    return folder, everything(folder, None)


@pytest.fixture(scope="module", params=KINDS)
def together(request, tmp_path_factory) -> tuple[str, Path, dict[str, Any]]:
    """The name of what shards, the folder, and what two processes make of the same."""
    if request.param == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    folder = tmp_path_factory.mktemp(request.param)
    process = on_two_processes(request.param, folder)
    request.getfixturevalue("alone")  # meanwhile
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-4000:]
    return request.param, folder, torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.parametrize("name", TRAININGS)
def test_sharded_processes_train_as_one(alone, together, name):
    one, two = alone[1][name], together[2][name]
    for left, right in zip(two["logs"], one["logs"], strict=True):
        for key in ("loss", "grad_norm", *LOSSES):
            if key in right and right[key] != 0:  # a loss that has ended is still measured
                assert left[key] == pytest.approx(right[key], rel=1e-4 if name == "hybrid" else 1e-5), key
    assert two["after"].keys() >= {key for key in one["after"] if "base_layer" not in key}
    change = max((value - one["before"][key]).norm() for key, value in one["after"].items())
    assert change > 1e-3
    for key, value in two["after"].items():
        error = (value - one["after"][key]).norm()
        assert error <= 1e-5 * one["after"][key].norm().clamp(min=1e-3), key
        if TRAININGS[name].get("optim") == "sgd":
            moved = (one["after"][key] - one["before"][key]).norm()
            assert error <= 1e-5 * moved + 1e-6 * one["before"][key].norm() + 1e-7, key
    for key, value in two["student"].items():
        torch.testing.assert_close(value, two["after"][f"student.{key}"], rtol=0, atol=0)


def test_sharded_gradients_are_those_of_one_process(alone, together):
    kind, _, results = together
    if kind != "fsdp2":
        pytest.skip("DeepSpeed keeps gradients to itself; `sgd` above compares what they do")
    for name in ("sgd", "untied", "images"):
        for two, one in zip(results[name]["gradients"], alone[1][name]["gradients"], strict=True):
            assert max(gradient.abs().max() for gradient in one.values()) > 1e-3
            for key, gradient in two.items():
                error = (gradient - one[key]).abs().max()
                assert error <= 1e-5 * max(one[key].abs().max(), 1e-2), (name, key)


def test_sharded_autocast_is_that_of_one_process(alone, together):
    kind, _, results = together
    if kind != "fsdp2":
        pytest.skip("bf16 under DeepSpeed needs a GPU")
    one, two = alone[1]["bf16"], results["bf16"]
    for left, right in zip(two["logs"], one["logs"], strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-2)
    assert {value.dtype for value in two["student"].values()} == {torch.float32}
    assert one["logs"][-1]["loss"] != alone[1]["sgd"]["logs"][-1]["loss"]


def test_sharded_runs_resume(together):
    whole, resumed = (together[2][name] for name in ("whole", "resumed"))
    for left, right in zip(resumed["logs"], whole["logs"], strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-7)
    for name, value in whole["after"].items():
        torch.testing.assert_close(resumed["after"][name], value, rtol=1e-7, atol=1e-8)


def test_sharded_students_evaluate_as_one(alone, together):
    for name, value in alone[1]["whole"]["metrics"].items():
        if name.startswith("eval_") and not name.endswith(("runtime", "per_second")):
            assert together[2]["whole"]["metrics"][name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("name", SAVED)
def test_sharded_students_are_saved_whole(alone, together, name):
    _, folder, results = together
    # No process has a sharded student whole enough to ask it.
    files = {path.name for path in (alone[0] / name).iterdir()} - {"probe.json"}
    assert {path.name for path in (folder / name).iterdir()} == files
    weights_file = "adapter_model.safetensors" if name == "lora" else "model.safetensors"
    saved, of_one = (load_file(path / name / weights_file) for path in (folder, alone[0]))
    assert saved.keys() == of_one.keys()
    for key, value in of_one.items():
        assert (saved[key] - value).norm() <= 1e-5 * value.norm().clamp(min=1e-3), key
    if name in ("sgd", "untied"):
        loaded = AutoModelForCausalLM.from_pretrained(folder / name).state_dict()
        for key, value in results[name]["student"].items():
            assert torch.equal(loaded[key], value), key


def test_one_process_goes_on_from_a_sharded_student(together, tmp_path):
    _, folder, _ = together
    student = AutoModelForCausalLM.from_pretrained(folder / "whole" / "checkpoint-2")
    trainer, recorder = make_trainer(tmp_path, rows=ROWS, student=student, **FIVE)
    trainer.train()
    assert recorder.logs[0]["loss"] < together[2]["whole"]["logs"][0]["loss"]


def test_a_second_stage_takes_over_the_student(alone, together):
    for name, value in alone[1]["two stages"].items():
        error = (together[2]["two stages"][name] - value).norm()
        assert error <= 1e-5 * value.norm(), name


def test_settings_that_lose_weights_are_refused(together):
    kind, _, results = together
    words = {
        "fsdp2": ["cpu_ram_efficient_loading", "FULL_STATE_DICT"],
        "zero3": ["zero3_save_16bit_model: true"],
    }
    for message, word in zip(results["refusals"], words[kind], strict=True):
        assert word in message


def test_models_without_weights_are_refused():
    student = tiny_student()
    check_whole("student", student)
    student.backbone.norm_f.weight = torch.nn.Parameter(torch.empty(0))
    with pytest.raises(ValueError, match="student's weights, such as 'backbone.norm_f.weight'"):
        check_whole("student", student)


def let_fsdp_start() -> None:
    """accelerate starts FSDP on GPUs and their kin only; it then runs on whatever device and backend there is."""
    start = PartialState.__init__

    def start_as_gpu(self, *args, **kwargs):
        start(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = start_as_gpu


if __name__ == "__main__":
    gc.freeze()  # as in conftest.py
    if sys.argv[1] == "fsdp2":
        let_fsdp_start()
    found = everything(Path(sys.argv[2]), sys.argv[1])
    found["refusals"] = refusals(Path(sys.argv[2]) / "plain", sys.argv[1])
    if os.environ["RANK"] == "0":
        torch.save(found, Path(sys.argv[2]) / "results.pt")
    torch.distributed.barrier()  # all is saved
    sys.stdout.flush()
    os._exit(0)  # a thread of the backend that is still alive may abort the interpreter's own end
