"""DistillationTrainer: weights over time, the teacher, the optimizer, data, ways to train, errors, and the GPU."""

import copy
import logging
import math
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from tiny_distillation import (
    NO_LOSS,
    SIX_LOSSES,
    VOCAB,
    assert_gradients_close,
    assert_logs_close,
    make_arguments,
    make_trainer,
    one_step,
    ragged_rows,
    real_tokens,
    tiny_student,
    tiny_teacher,
)
from tiny_images import image_rows, make_image_trainer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from cab_hf import DistillationTrainer, Teacher, student_from_teacher
from cab_hf.data.packing import shift_labels
from cab_hf.distillation import modeling_distillation
from cab_hf.distillation.bridge import AttentionBridge
from cab_hf.distillation.cuda_graph import GraphedStep
from cab_hf.distillation.training_args import LOSSES, DistillationTrainingArguments
from cab_hf.teachers.alignment import parse_layer_map


MIXERS = ("mamba", "mamba2")


# Weights over time


def test_weights_follow_their_end_and_decay(tmp_path, monkeypatch):
    steps, seen, bridges = 8, [], []
    distil, bridge_loss = DistillationTrainer._distil, AttentionBridge.loss

    def record(self, model, inputs, weights, active, counts, **kwargs):
        seen.append((dict(zip(LOSSES, weights.tolist())), set(active)))
        return distil(self, model, inputs, weights, active, counts, **kwargs)

    def count_bridge(*args):
        bridges.append(len(seen))
        return bridge_loss(*args)

    def never(*args):
        raise AssertionError("a loss of weight 0 was computed")

    monkeypatch.setattr(DistillationTrainer, "_distil", record)
    monkeypatch.setattr(AttentionBridge, "loss", count_bridge)
    for name in ("attention_loss", "output_loss"):
        monkeypatch.setattr(modeling_distillation, name, never)
    trainer, recorder = make_trainer(
        tmp_path,
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        kl_weight=2.0,
        kl_decay="linear",
        ce_weight=0.5,
        bridge_weight=1.0,
        bridge_end=0.5,
        hidden_weight=0.8,
        hidden_end=0.75,
        hidden_decay="cosine",
    )
    trainer.train()
    assert len(seen) == 2 * steps
    for step in range(steps):
        expected = {
            "kl": 2.0 * (1 - step / 8),
            "ce": 0.5,
            "bridge": 1.0 if step < 4 else 0.0,
            "output": 0.0,
            "hidden": 0.4 * (1 + math.cos(math.pi * step / 6)) if step < 6 else 0.0,
            "attention": 0.0,
        }
        for weights, active in seen[2 * step : 2 * step + 2]:
            assert weights == pytest.approx(expected, abs=1e-6)
            assert active == {name for name, value in expected.items() if value > 0}
        parts = recorder.logs[step]
        assert "output" not in parts
        assert parts["loss"] == pytest.approx(sum(expected[name] * parts.get(name, 0) for name in LOSSES), rel=1e-5)
    assert set(bridges) == set(range(1, 9))  # the batches of the first four steps


def test_parts_are_means_over_the_logging_window(tmp_path):
    options = {**SIX_LOSSES, "max_steps": 6, "per_device_train_batch_size": 4}
    trainer, every = make_trainer(tmp_path, **options)
    trainer.train()
    trainer, third = make_trainer(tmp_path, logging_steps=3, **options)
    trainer.train()
    for window in (0, 1):
        for name in (*LOSSES, "loss"):
            mean = sum(log[name] for log in every.logs[3 * window : 3 * window + 3]) / 3
            assert third.logs[window][name] == pytest.approx(mean, rel=1e-5), name
    # A second run of the same trainer starts a window of its own.
    trainer.args.logging_steps = 2
    third.logs.clear()
    trainer.state.logging_steps = 2
    trainer.train()
    assert third.logs[0]["loss"] == pytest.approx(
        sum(SIX_LOSSES[f"{name}_weight"] * third.logs[0][name] for name in LOSSES), rel=1e-5
    )


# Teacher


@pytest.mark.parametrize("own_dtype", [False, True])
def test_the_teacher_is_left_alone(tmp_path, own_dtype):
    model = tiny_teacher().train()
    teacher = Teacher(model, dtype=torch.bfloat16) if own_dtype else model
    expected = {
        name: value.to(torch.bfloat16 if own_dtype else value.dtype) for name, value in model.state_dict().items()
    }
    expected = copy.deepcopy(expected)
    trainer, recorder = make_trainer(
        tmp_path, teacher=teacher, max_steps=3, save_strategy="steps", save_steps=3, weight_decay=0.1, **SIX_LOSSES
    )
    trainer.train()
    assert not model.training and not any(module.training for module in model.modules())
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    theirs = {p.data_ptr() for p in model.parameters()}
    trained = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert not theirs & {p.data_ptr() for p in (*trained, *trainer.model.parameters())}
    assert {p.data_ptr() for p in trained} == {p.data_ptr() for p in trainer.model.parameters()}
    assert not any("teacher" in name for name in trainer.model.state_dict())
    size = sum(file.stat().st_size for file in (tmp_path / "checkpoint-3").rglob("model*.safetensors"))
    assert size < 4.2 * sum(p.numel() for p in trainer.student.parameters()) + 20_000
    assert all(math.isfinite(log[name]) for log in recorder.logs[:3] for name in LOSSES)


@pytest.mark.parametrize(
    ("device", "options", "expected"),
    [
        ("cuda", {"dataloader_pin_memory": True}, True),
        ("cuda", {"dataloader_pin_memory": True, "accelerator_config": {"even_batches": False}}, True),
        ("cuda", {"dataloader_pin_memory": False}, False),
        ("cuda", {"dataloader_pin_memory": True, "accelerator_config": {"non_blocking": False}}, False),
        ("cpu", {"dataloader_pin_memory": True}, False),
    ],
)
def test_batches_are_copied_without_waiting_unless_told(tmp_path, monkeypatch, device, options, expected):
    monkeypatch.setattr(DistillationTrainingArguments, "device", torch.device(device))
    arguments = make_arguments(tmp_path, use_cpu=False, **options)
    assert arguments.accelerator_config.non_blocking == expected


def test_teacher_dtype_is_the_arguments(tmp_path):
    trainer, recorder = make_trainer(tmp_path, teacher_dtype="bfloat16", **SIX_LOSSES)
    plain = one_step(tmp_path, **SIX_LOSSES)[1]
    trainer.train()
    assert {p.dtype for p in trainer.teacher.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in trainer.student.parameters()} == {torch.float32}
    assert recorder.logs[0]["bridge"] == pytest.approx(plain["bridge"], rel=0.02)
    assert recorder.logs[0]["bridge"] != plain["bridge"]


# Optimizer


@pytest.mark.parametrize("mixer", MIXERS)
def test_what_decays_and_how_fast_it_learns(tmp_path, mixer):
    student = tiny_student(mixer, intermediate_size=24, use_bias=True, mlp_bias=True, norm_type="layer_norm")
    rates = {"learning_rate": 0.25, "mixer_learning_rate": 0.125, "bridge_learning_rate": 0.5}
    trainer, _ = make_trainer(tmp_path, student=student, weight_decay=0.1, max_steps=2, **rates)
    trainer.create_optimizer()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    settings = {
        names[id(p)]: (group["weight_decay"], group["lr"])
        for group in trainer.optimizer.param_groups
        for p in group["params"]
    }
    assert settings.keys() == set(names.values())
    for name, (decay, learning_rate) in settings.items():
        last = name.rsplit(".", 1)[1]
        is_matrix = last == "weight" and "norm" not in name
        assert decay == (0.1 if is_matrix else 0.0), name
        assert learning_rate == (0.5 if name.startswith("bridge.") else 0.125 if ".mixer." in name else 0.25), name
    plain = {name for name, (decay, _) in settings.items() if decay == 0.0}
    assert {name.rsplit(".", 1)[1] for name in plain} >= {"A_log", "D", "bias", "weight"}
    assert "student.backbone.norm_f.weight" in plain and "student.backbone.embeddings.weight" not in plain
    groups = len(trainer.optimizer.param_groups)
    trainer.train()
    trainer.train()
    assert len(trainer.optimizer.param_groups) == groups


def test_bridge_learning_rate_decides_how_far_it_moves(tmp_path):
    moved = {}
    for rate in (None, 1e-4):
        trainer, _ = make_trainer(tmp_path, bridge_learning_rate=rate)
        before = copy.deepcopy(trainer.model.state_dict())
        trainer.train()
        for part in ("bridge.", "student."):
            moved[rate, part] = max(
                (value - before[name]).abs().max()
                for name, value in trainer.model.state_dict().items()
                if name.startswith(part)
            )
    assert moved[None, "bridge."] == pytest.approx(1e-2, rel=0.01)
    assert moved[1e-4, "bridge."] == pytest.approx(1e-4, rel=0.01)
    assert moved[1e-4, "student."] == moved[None, "student."]


def test_trainable_freezes_the_rest(tmp_path):
    trainer, _ = make_trainer(tmp_path, trainable=r"mixer\.(in_proj|A_log)", max_steps=2, **SIX_LOSSES)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    student = {name for name in moved if name.startswith("student.")}
    assert student == {
        f"student.backbone.layers.{i}.mixer.{name}" for i in (0, 1) for name in ("in_proj.weight", "A_log")
    }
    assert any(name.startswith("bridge.") for name in moved)


def test_the_seed_decides_how_the_bridge_starts(tmp_path):
    starts = []
    for seed, drawn in ((1, 0), (1, 7), (2, 0)):
        student, teacher = tiny_student(), tiny_teacher()
        torch.rand(drawn)
        trainer, _ = make_trainer(tmp_path, student=student, teacher=teacher, seed=seed)
        starts.append(trainer.model.bridge.state_dict()["layers.0.0.up.key.weight"])
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


@pytest.mark.parametrize("kind", ["map", "iterable", "torch"])
def test_datasets_of_any_kind(tmp_path, kind):
    rows = [{name: value.tolist() for name, value in row.items()} | {"text": "a", "id": 3} for row in ragged_rows()]

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from rows

    dataset = {
        "map": lambda: datasets.Dataset.from_list(rows),
        "iterable": lambda: datasets.IterableDataset.from_generator(lambda: iter(rows)),
        "torch": Stream,
    }[kind]()
    trainer, recorder = make_trainer(
        tmp_path,
        rows=dataset,
        eval_dataset=dataset,
        eval_strategy="steps",
        eval_steps=2,
        max_steps=3,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=3,
        **SIX_LOSSES,
    )
    trainer.train()
    assert trainer.state.global_step == 3
    assert all(log[name] > 0 for log in recorder.logs if "loss" in log for name in LOSSES)
    evaluated = [log["eval_tokens"] for log in recorder.logs if "eval_kl" in log]
    assert evaluated == 2 * [sum(map(len, real_tokens(ragged_rows())))]


# Ways to train


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(tmp_path, mixer, reentrant):
    plain = one_step(tmp_path, student=tiny_student(mixer), **SIX_LOSSES)
    student = tiny_student(mixer)
    recomputed = one_step(
        tmp_path,
        student=student,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": reentrant},
        **SIX_LOSSES,
    )
    assert student.is_activation_checkpointing
    assert_gradients_close(recomputed[0], plain[0])
    assert_logs_close(recomputed[1], plain[1])


def test_bfloat16_stays_finite(tmp_path):
    trainer, recorder = make_trainer(tmp_path, bf16=True, max_steps=20, learning_rate=3e-3, **SIX_LOSSES)
    trainer.train()
    assert len(recorder.logs) == 21
    assert all(math.isfinite(value) for log in recorder.logs for value in log.values())
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert recorder.logs[19]["loss"] < recorder.logs[0]["loss"]
    plain = one_step(tmp_path, **SIX_LOSSES)[1]
    for name in LOSSES:
        assert recorder.logs[0][name] == pytest.approx(plain[name], rel=0.05), name


class NoHostSync(TorchDispatchMode):
    """Fails at operations that would make the host wait for a device."""

    waiting = {
        "_local_scalar_dense",
        "item",
        "is_nonzero",
        "equal",
        "nonzero",
        "masked_select",
        "unique",
        "unique_dim",
    }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.waiting, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_step_never_waits_for_the_device(tmp_path, mixer):
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in ragged_rows((11,) * 4)]
    trainer, _ = make_trainer(tmp_path, rows=rows, student=tiny_student(mixer), kl_decay="cosine", **SIX_LOSSES)
    trainer._calibrate_targets()
    trainer.state.max_steps = 10
    batch = torch.utils.data.default_collate(rows)
    with NoHostSync():
        for step in range(2):
            trainer.state.global_step = step
            counts = trainer._get_num_items_in_batch([batch], trainer.args.device)
            trainer.training_step(trainer.model, dict(batch), counts)


@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
@pytest.mark.parametrize("ignored", [False, True])
def test_labels_that_are_all_ignored_are_told_once(tmp_path, caplog, monkeypatch, ignored, kl_weight):
    monkeypatch.setattr(logging.getLogger("cab_hf.distillation.trainer"), "propagate", True)
    rows = ragged_rows()
    if ignored:
        rows = [row | {"labels": torch.full_like(row["labels"], -100)} for row in rows]
    options = {**NO_LOSS, "ce_weight": 0.3, "kl_weight": kl_weight}
    trainer, _ = make_trainer(tmp_path, rows, max_steps=3, **options)
    trainer.train()
    trainer.train()
    assert caplog.text.count("labels are all -100") == ignored
    if ignored:
        assert "`ce_weight` is 0.3" in caplog.text and "`kl_weight`" in caplog.text
    batch = torch.utils.data.default_collate(rows)
    with NoHostSync():
        trainer._get_num_items_in_batch([batch], trainer.args.device)


@pytest.mark.parametrize("labels", [torch.tensor(-100), torch.tensor(1)])
def test_labels_of_images_that_are_all_ignored_are_told(tmp_path, caplog, monkeypatch, labels):
    monkeypatch.setattr(logging.getLogger("cab_hf.distillation.trainer"), "propagate", True)
    rows = [row | {"labels": labels} for row in image_rows()]
    trainer, _ = make_image_trainer(tmp_path, rows, **{**NO_LOSS, "ce_weight": 1.0})
    trainer.train()
    assert ("labels are all -100" in caplog.text) == (labels < 0)


# Errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kl_weight": -0.5}, ["kl_weight", "-0.5", "0.0"]),
        ({"bridge_end": 1.5}, ["bridge_end", "1.5", "(0, 1]"]),
        ({"hidden_end": 0.0}, ["hidden_end", "0.0", "(0, 1]"]),
        ({"ce_decay": "slow"}, ["ce_decay", "'slow'", "linear", "cosine"]),
        (NO_LOSS, ["0.0", *NO_LOSS]),
        ({"temperature": 0.0}, ["temperature", "0.0", "positive"]),
        ({"logits_chunk_size": 0}, ["logits_chunk_size", "0", "at least 1"]),
        ({"teacher_dtype": "int8"}, ["teacher_dtype", "'int8'", "bfloat16"]),
        ({"label_smoothing_factor": 0.1}, ["label_smoothing_factor", "0.1", "0.0", "kl_weight"]),
    ],
)
def test_errors_of_the_arguments_teach(tmp_path, options, said):
    with pytest.raises(ValueError) as error:
        make_arguments(tmp_path, **options)
    assert all(word in str(error.value) for word in said), error.value


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layer_map": "0,a"}, ["layer_map", "'0,a'", "'a'", "whole numbers"]),
        ({"layer_map": "0,1,2"}, ["3", "2", "layers"]),
        ({"layer_map": "0,9"}, ["9", "4 layers"]),
        ({"layer_map": ""}, ["''", "floor"]),
        ({"trainable": "nothing"}, ["trainable='nothing'", "backbone.embeddings.weight"]),
        ({"output_weight": 1.0, "student": lambda: tiny_student(expand=2)}, ["output_weight", "64", "32"]),
        ({"hidden_weight": 1.0, "student": lambda: tiny_student(hidden_size=16)}, ["hidden_weight", "16", "32"]),
        ({"student": lambda: tiny_student(vocab_size=2000)}, ["2000", str(VOCAB)]),
        ({"cuda_graph": True}, ["cuda_graph", "is on cpu", "cuda_graph=False"]),
        ({"rows": ragged_rows((0, 0))}, ["first 2 examples", "0 real tokens", "relative_loss=False"]),
        ({"ce_weight": 1.0, "rows": [{"input_ids": torch.arange(5)}]}, ["labels are missing", "ce_weight=0.0"]),
        (
            {"attention_weight": 0.5, "rows": [{"input_ids": torch.arange(5), "seq_idx": torch.zeros(5).int()}]},
            ["attention_weight", "0.5", "seq_idx", "attention_weight=0.0"],
        ),
        (
            {"attention_weight": 0.5, "rows": [{"input_ids": torch.arange(5), "position_ids": torch.arange(5)}]},
            ["attention_weight", "0.5", "position_ids"],
        ),
        (
            {"target_map": "softmax", "rows": [{"input_ids": torch.arange(5), "seq_idx": torch.zeros(5).int()}]},
            ["target_map", "'softmax'", "seq_idx"],
        ),
    ],
)
def test_errors_of_a_run_teach(tmp_path, options, said):
    options = dict(options)
    if "student" in options:
        options["student"] = options["student"]()
    with pytest.raises(ValueError) as error:
        make_trainer(tmp_path, **options)[0].train()
    assert all(word in str(error.value) for word in said), error.value


@pytest.mark.parametrize("name", ["compute_metrics", "compute_loss_func", "model_init"])
def test_options_that_would_be_ignored_raise(tmp_path, name):
    with pytest.raises(ValueError, match=f"`{name}` is not used here"):
        DistillationTrainer(tiny_student(), tiny_teacher(), make_arguments(tmp_path), **{name: print})


def test_a_graph_refuses_another_shape():
    step = GraphedStep(nn.Linear(1, 1), Callable, accumulates=False)
    step.shapes = {"input_ids": torch.Size([2, 8])}
    with pytest.raises(ValueError) as error:
        step({"input_ids": torch.zeros(1, 8)}, torch.zeros(6), frozenset({"kl"}), torch.zeros(2))
    assert all(word in str(error.value) for word in ("[2, 8]", "[1, 8]", "cuda_graph=False"))


@pytest.mark.parametrize("accumulates", [False, True])
def test_without_a_graph_gradients_of_the_last_step_do_not_lie_beside_the_next(accumulates):
    model, kept, alive = nn.Linear(2, 1), [], []

    def distil(model, inputs, *_):
        alive.append([one() is not None for one in kept])
        loss = model(inputs["x"]).sum()
        return SimpleNamespace(loss=loss, parts=loss.detach()[None])

    step = GraphedStep(model, distil, accumulates)
    step._capture = lambda inputs, weights, counts: vars(step).update(
        inputs={name: value.clone() for name, value in inputs.items()}, weights=weights, counts=counts, graph=None
    )
    for scale in (1.0, 2.0):
        model.zero_grad()
        for _ in range(2 if accumulates else 1):
            step({"x": torch.full((1, 2), scale)}, torch.zeros(6), frozenset({"kl"}), torch.zeros(2))
            kept[:] = [weakref.ref(one.grad) for one in model.parameters()] if not accumulates else []
            kept += [weakref.ref(one) for one in step.gradients] if accumulates else []
        torch.testing.assert_close(model.weight.grad, torch.full((1, 2), scale * (2 if accumulates else 1)))
    assert not any(map(any, alive))


def test_layer_maps_and_labels_are_read():
    assert parse_layer_map("0, 2,1") == [0, 2, 1] and parse_layer_map("uniform") == "uniform"
    labels, mask = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[0, 1, 1, 1, 0]])
    assert shift_labels(labels).tolist() == [[6, 7, 8, 9, -100]]
    assert shift_labels(labels, mask).tolist() == [[-100, 7, 8, -100, -100]]


# On a GPU


def unmasked_rows(length: int) -> list[dict[str, Tensor]]:
    return [{name: row[name] for name in ("input_ids", "labels")} for row in ragged_rows((length,) * 8, width=length)]


def gpu_step(folder: Any, mixer: str, **options: Any) -> tuple[list[dict[str, Tensor]], list[dict[str, float]]]:
    trainer, recorder = make_trainer(
        folder,
        rows=unmasked_rows(32),
        student=tiny_student(mixer),
        use_cpu=False,
        max_steps=4,
        learning_rate=1e-3,
        **options,
    )
    trainer.train()
    return recorder.gradients, recorder.logs


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_graphed_step_is_the_eager_one(tmp_path, mixer, accumulation):
    options = {
        **SIX_LOSSES,
        "bridge_end": 0.5,
        "kl_decay": "linear",
        "per_device_train_batch_size": 8 // accumulation,
        "gradient_accumulation_steps": accumulation,
    }
    eager, graphed = (gpu_step(tmp_path, mixer, cuda_graph=graph, **options) for graph in (False, True))
    for step in range(4):
        # Steps follow from each other, so small differences grow.
        assert_gradients_close(graphed[0][step], eager[0][step], 1e-3 * 4**step)
        assert_logs_close(graphed[1][step], eager[1][step], 1e-3)


class NoWaiting(TrainerCallback):
    """From the second step to the last, whatever makes the host wait for the device is an error."""

    def on_step_end(self, args, state, control, **kwargs):
        torch.cuda.set_sync_debug_mode("error" if 2 <= state.global_step < args.max_steps else "default")


AS_IN_A_RUN = {
    "use_cpu": False,
    "dataloader_pin_memory": True,
    "logging_strategy": "no",
    "max_grad_norm": 1.0,
    "max_steps": 6,
    "bf16": True,
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("auto", {}),
        ("torch", {"gradient_accumulation_steps": 2}),
        ("torch", {"kl_decay": "cosine"}),
        ("torch", {"images": True, "attention_weight": 0.0}),
    ],
    ids=str,
)
def test_a_training_step_never_waits_for_the_device(tmp_path, monkeypatch, backend, options):
    monkeypatch.setenv("CAB_SSM_BACKEND", backend)
    options = AS_IN_A_RUN | SIX_LOSSES | options
    # Where text has a mask, transformers looks into it.
    if options.pop("images", False):
        trainer, _ = make_image_trainer(tmp_path, image_rows(48), **options)
    else:
        trainer, _ = make_trainer(tmp_path, unmasked_rows(11), **options)
    trainer.add_callback(NoWaiting())
    try:
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.state.global_step == 6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_teacher_may_be_on_another_device(tmp_path):
    plain = one_step(tmp_path, **SIX_LOSSES)
    apart = one_step(tmp_path, teacher_device="cuda", **SIX_LOSSES)
    assert_gradients_close(apart[0], plain[0], 1e-3)
    assert_logs_close(apart[1], plain[1], 1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_teacher_on_the_cpu_waits_for_its_batch(tmp_path):
    options = {"dataloader_pin_memory": True, "per_device_train_batch_size": 2, **SIX_LOSSES}
    together = gpu_step(tmp_path, "mamba2", **options)[1]
    apart = gpu_step(tmp_path, "mamba2", teacher_device="cpu", **options)[1]
    for step in range(4):
        assert_logs_close(apart[step], together[step], 1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_refuses_float16(tmp_path):
    with pytest.raises(ValueError, match="fp16=True") as error:
        gpu_step(tmp_path, "mamba2", cuda_graph=True, fp16=True)
    assert "cuda_graph=True" in str(error.value) and "bf16=True" in str(error.value)


def test_hidden_states_are_compared_under_the_same_norm(tmp_path):
    """transformers returns a last layer's state after the final norm; the floor map pairs it with one that is not."""
    trainer, _ = make_trainer(tmp_path, hidden_weight=1.0, kl_weight=0.0, bridge_weight=0.0)
    model = trainer.model.eval()
    assert model.layer_map == [0, 2]
    tokens = torch.arange(7)[None]
    targets = trainer.teacher({"input_ids": tokens}, hidden_states=True)
    states = model.core.base_model(tokens, output_hidden_states=True).hidden_states
    student, teacher = model._hidden_pair(states, targets, 0)
    assert torch.equal(student, states[1]) and torch.equal(teacher, targets.hidden_states[1])
    student, teacher = model._hidden_pair(states, targets, 1)
    assert torch.equal(student, states[2])
    assert torch.equal(teacher, model.core.base_model.norm_f(targets.hidden_states[3]))
    model.teacher_layers = [3, 3]
    student, teacher = model._hidden_pair(states, targets, 0)
    assert torch.equal(student, model.core.base_model.norm_f(states[1])) and torch.equal(
        teacher, targets.hidden_states[4]
    )


def test_a_given_teacher_must_agree_on_rotary(tmp_path):
    with pytest.raises(ValueError, match="remove_rotary. is True.*False"):
        make_trainer(tmp_path, teacher=Teacher(tiny_teacher()), remove_rotary=True)


@pytest.mark.parametrize("removes", [False, True])
def test_the_bridge_of_turning_states_wants_keys_without_positions(removes, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("cab_hf.distillation.checks"), "propagate", True)
    teacher = tiny_teacher()
    student = student_from_teacher(teacher, data=(), keep_rotary=True)
    make_trainer(tmp_path, student=student, teacher=teacher, bridge_weight=1.0, remove_rotary=removes)
    assert ("Set `remove_rotary=True`" in caplog.text) is not removes


def test_losses_that_all_end_early_warn(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("cab_hf.distillation.training_args"), "propagate", True)
    make_trainer(tmp_path, kl_weight=0.0, bridge_weight=1.0, bridge_end=0.5)
    assert "bridge_end=0.5" in caplog.text
