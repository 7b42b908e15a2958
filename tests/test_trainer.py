"""DistillationTrainer: every loss against a dense restatement, and what the Trainer makes of them."""

import copy
import gc
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import datasets
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    HEAD_DIM,
    NO_LOSS,
    SIX_LOSSES,
    VOCAB,
    make_arguments,
    ragged_rows,
    real_tokens,
    tiny_student,
    tiny_teacher,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from cab_hf import DistillationTrainer, Teacher
from cab_hf.distillation import modeling_distillation
from cab_hf.distillation.cuda_graph import GraphedStep
from cab_hf.distillation.modeling_distillation import parse_layer_map, shifted_labels
from cab_hf.distillation.training_args import LOSSES
from cab_hf.packing import LanguageCollator


@pytest.fixture(scope="module", autouse=True)
def quick_collection():
    """Every training starts by a garbage collection, which takes most of a tiny run unless modules are left out."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


LAYER_MAP = (0, 2)
"""floor(i * 4 / 2): the tiny teacher's layers that teach the tiny student's."""

MIXERS = ("mamba", "mamba2")


class NaiveTeacher(NamedTuple):
    """One row alone: logits `(t, V)`, hidden states `(t, d)` each, and per layer q, k, output `(t, h * p)`, map."""

    logits: Tensor
    hidden_states: list[Tensor]
    queries: list[Tensor]
    keys: list[Tensor]
    outputs: list[Tensor]
    maps: list[Tensor]


@torch.no_grad()
def naive_teacher(model: nn.Module, tokens: Tensor) -> NaiveTeacher:
    """Eager attention, projections made again by hand from each layer's input."""
    model.set_attn_implementation("eager")
    outputs, queries, keys = [], [], []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: outputs.append(inputs[0][0]))
        for layer in model.model.layers
    ]
    result = model(tokens[None], output_hidden_states=True, output_attentions=True, use_cache=False)
    for hook in hooks:
        hook.remove()
    cos, sin = model.model.rotary_emb(result.logits, torch.arange(len(tokens))[None])
    for layer, hidden in zip(model.model.layers, result.hidden_states):
        normed = layer.input_layernorm(hidden)
        query, key = (
            projection(normed).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        queries.append(query[0].transpose(0, 1).flatten(1))
        keys.append(key[0].transpose(0, 1).flatten(1))
    maps = [attention[0] for attention in result.attentions]
    return NaiveTeacher(result.logits[0], [h[0] for h in result.hidden_states], queries, keys, outputs, maps)


def mlp(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    up, down = (
        (weights[name.replace("*", place) + ".weight"], weights[name.replace("*", place) + ".bias"])
        for place in ("up", "down")
    )
    return F.linear(F.silu(F.linear(x, *up)), *down)


def naive_losses(
    model: nn.Module, teacher: nn.Module, rows: list[dict[str, Tensor]], scales: Tensor | None = None
) -> dict[str, Tensor]:
    """The six parts, one unpadded row at a time. Source: arXiv 2510.19266 for the bridge, floor layer map.

    `scales` `(4, layers)`: mean squares of keys, queries, outputs and hidden states that relative losses divide by.
    """
    student, weights = model.student, dict(model.named_parameters())
    scales = torch.ones(4, len(LAYER_MAP)) if scales is None else scales
    sums, count, count_labels = dict.fromkeys(LOSSES, torch.zeros(())), 0, 0
    for tokens in real_tokens(rows):
        theirs = naive_teacher(teacher, tokens)
        ours = student.backbone(
            tokens[None], use_cache=False, output_projections=True, output_hidden_states=True, output_attentions=True
        )
        logits = student.lm_head(ours.last_hidden_state)[0]
        log_p, log_q = theirs.logits.log_softmax(-1), logits.log_softmax(-1)
        sums["kl"] = sums["kl"] + (log_p.exp() * (log_p - log_q)).sum()
        sums["ce"] = sums["ce"] + F.cross_entropy(logits[:-1], tokens[1:], reduction="sum")
        for layer, index in enumerate(LAYER_MAP):
            written = ours.projections[layer]
            pairs = {
                "bridge": [
                    (mlp(weights, f"bridge.layers.{layer}.0.*.key", written.B[0].flatten(1)), theirs.keys[index], 0),
                    (
                        mlp(weights, f"bridge.layers.{layer}.0.*.query", written.C[0].flatten(1)),
                        theirs.queries[index],
                        1,
                    ),
                ]
                if model.bridge is not None
                else [],
                "output": [(written.output[0], theirs.outputs[index], 2)],
                "hidden": [(ours.hidden_states[layer + 1][0], theirs.hidden_states[index + 1], 3)],
            }
            for name, compared in pairs.items():
                for mine, target, row in compared:
                    error = ((mine - target) ** 2).mean(-1).sum() / scales[row, layer]
                    sums[name] = sums[name] + error / len(LAYER_MAP)
            distance = ((ours.attentions[layer][0] - theirs.maps[index]) ** 2).sum(-1).mean(0).sum()
            sums["attention"] = sums["attention"] + distance / len(LAYER_MAP)
        count, count_labels = count + len(tokens), count_labels + len(tokens) - 1
    return {name: total / max(count_labels if name == "ce" else count, 1) for name, total in sums.items()}


def numbers(parts: dict[str, Tensor], weights: dict[str, float] = SIX_LOSSES) -> dict[str, float]:
    """The parts, and their weighted sum as "loss"."""
    return {name: part.item() for name, part in {**parts, "loss": weighted(parts, weights)}.items()}


def weighted(parts: dict[str, Tensor], weights: dict[str, float] = SIX_LOSSES) -> Tensor:
    return sum(weights[f"{name}_weight"] * part for name, part in parts.items())


class Recorder(TrainerCallback):
    """Keeps the gradients of each optimizer step and everything that is logged."""

    def __init__(self):
        self.gradients: list[dict[str, Tensor]] = []
        self.logs: list[dict[str, float]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def make_trainer(folder: Any, rows: Any = None, student: Any = None, teacher: Any = None, **options: Any):
    """A trainer of tiny models with a `Recorder` as its last callback, and the recorder."""
    recorder = Recorder()
    keywords = {name: options.pop(name) for name in ("eval_dataset", "data_collator") if name in options}
    trainer = DistillationTrainer(
        tiny_student() if student is None else student,
        tiny_teacher() if teacher is None else teacher,
        make_arguments(folder, **options),
        train_dataset=ragged_rows() if rows is None else rows,
        callbacks=[recorder],
        **keywords,
    )
    return trainer, recorder


def one_step(folder: Any, **options: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients and log of one optimizer step."""
    trainer, recorder = make_trainer(folder, **options)
    trainer.train()
    return recorder.gradients[0], recorder.logs[0]


def assert_gradients_close(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    assert left.keys() == right.keys()
    largest = max(gradient.abs().max() for gradient in right.values())
    assert largest > 1e-3
    for name, gradient in right.items():
        error = (left[name] - gradient).abs().max()
        assert error <= tolerance * max(gradient.abs().max(), 1e-3 * largest), (name, error, gradient.abs().max())


def assert_logs_close(left: dict[str, float], right: dict[str, float], tolerance: float = 2e-5) -> None:
    for name in (*LOSSES, "loss"):
        assert left[name] == pytest.approx(right[name], rel=tolerance, abs=1e-7), name


# The losses


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_step_is_the_dense_restatement(tmp_path, mixer, relative):
    rows = ragged_rows()
    trainer, recorder = make_trainer(
        tmp_path, student=tiny_student(mixer), relative_loss=relative, logits_chunk_size=7, **SIX_LOSSES
    )
    model = copy.deepcopy(trainer.model)
    trainer.train()
    scales = None
    if relative:
        squares = torch.zeros(4, 2)
        for tokens in real_tokens(rows):
            truth = naive_teacher(tiny_teacher(), tokens)
            for layer, index in enumerate(LAYER_MAP):
                targets = truth.keys[index], truth.queries[index], truth.outputs[index], truth.hidden_states[index + 1]
                squares[:, layer] += torch.stack([(target**2).mean(-1).sum() for target in targets])
        scales = squares / sum(map(len, real_tokens(rows)))
        torch.testing.assert_close(trainer.model.target_scales, scales, rtol=1e-4, atol=0)
    parts = naive_losses(model, tiny_teacher(), rows, scales)
    total = weighted(parts)
    names, parameters = zip(*model.named_parameters())
    expected = dict(zip(names, torch.autograd.grad(total, parameters)))

    assert_logs_close(recorder.logs[0], numbers(parts), 2e-4)
    assert min(numbers(parts).values()) > 1e-3
    assert_gradients_close(recorder.gradients[0], expected, 2e-4)


@pytest.mark.parametrize("mixer", MIXERS)
def test_gradients_do_not_depend_on_batch_and_accumulation(tmp_path, mixer):
    rows = ragged_rows((11, 3, 0, 1, 9, 5, 2, 11))
    steps = [
        one_step(
            tmp_path,
            rows=rows,
            student=tiny_student(mixer),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=8 // batch,
            **SIX_LOSSES,
        )
        for batch in (8, 4, 1)
    ]
    for gradients, logs in steps[1:]:
        assert_gradients_close(gradients, steps[0][0])
        assert_logs_close(logs, steps[0][1])


def test_values_do_not_depend_on_batch_and_length(tmp_path):
    weights = {**SIX_LOSSES, "attention_weight": 0.0}
    tokens = ragged_rows()[0]["input_ids"]

    def packed(times: int) -> dict[str, Tensor]:
        row = ragged_rows()[0]
        return {
            "input_ids": tokens.repeat(times),
            "labels": row["labels"].repeat(times),
            "seq_idx": torch.arange(times).repeat_interleave(len(tokens)),
        }

    logs = [
        one_step(tmp_path, rows=[packed(times)] * batch, per_device_train_batch_size=batch, **weights)[1]
        for times, batch in ((1, 1), (1, 2), (3, 1))
    ]
    for name in ("kl", "ce", "bridge", "output", "hidden", "loss"):
        assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-5), name
        assert logs[2][name] == pytest.approx(logs[0][name], rel=1e-5), name


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_effect(tmp_path, side):
    plain = one_step(tmp_path, rows=ragged_rows(), **SIX_LOSSES)
    other = ragged_rows(side=side, width=14, pad_seed=5)
    for row in other:
        row["labels"] = row["input_ids"].clone()  # a label at padding is none
    padded = one_step(tmp_path, rows=other, **SIX_LOSSES)
    assert_gradients_close(padded[0], plain[0])
    assert_logs_close(padded[1], plain[1])


def test_padding_may_hold_nan(tmp_path, monkeypatch):
    plain = one_step(tmp_path, **SIX_LOSSES)
    call = Teacher.__call__

    def poisoned(self, inputs, **kwargs):
        outputs = call(self, inputs, **kwargs)
        padding = inputs["attention_mask"] == 0
        for tensor in (outputs.last_hidden_state, outputs.logits, *(outputs.hidden_states or ())):
            if tensor is not None:
                tensor[padding] = math.nan
        for attention in outputs.attentions or ():
            attention.output[padding] = math.nan
            attention.query.transpose(1, 2)[padding] = math.nan
            attention.key.transpose(1, 2)[padding] = math.nan
        return outputs

    monkeypatch.setattr(Teacher, "__call__", poisoned)
    poisoned_step = one_step(tmp_path, **SIX_LOSSES)
    assert_gradients_close(poisoned_step[0], plain[0])
    assert_logs_close(poisoned_step[1], plain[1])


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_step_without_any_token_is_zero(tmp_path, mixer):
    for rows in (ragged_rows((0, 0)), [{**row, "labels": row["input_ids"]} for row in ragged_rows((0, 0), width=1)]):
        student = tiny_student(mixer)
        before = copy.deepcopy(student.state_dict())
        gradients, logs = one_step(
            tmp_path, rows=rows, student=student, relative_loss=False, max_steps=2, **SIX_LOSSES
        )
        assert all(logs[name] == 0.0 for name in (*LOSSES, "loss", "grad_norm"))
        assert all((gradient == 0).all() for gradient in gradients.values())
        assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


def test_collated_empty_rows_train(tmp_path):
    rows = [{"input_ids": []}, {"input_ids": [4, 5, 6]}, {"input_ids": []}]
    gradients, logs = one_step(
        tmp_path,
        rows=rows,
        data_collator=LanguageCollator(0),
        per_device_train_batch_size=1,
        max_steps=3,
        ce_weight=1.0,
    )
    assert all(math.isfinite(value) for value in logs.values())
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_bridge_learns(tmp_path, mixer):
    student = tiny_student(mixer)
    trainer, recorder = make_trainer(
        tmp_path, student=student, max_steps=40, lr_scheduler_type="constant", **{**NO_LOSS, "bridge_weight": 1.0}
    )
    before = copy.deepcopy(trainer.model.bridge.state_dict())
    trainer.train()
    assert all(not torch.equal(before[name], value) for name, value in trainer.model.bridge.state_dict().items())
    assert recorder.logs[39]["bridge"] < 0.7 * recorder.logs[0]["bridge"]

    gradients = recorder.gradients[0]
    states = 6
    if mixer == "mamba2":
        moved = gradients["student.backbone.layers.1.mixer.in_proj.weight"][64 : 64 + 2 * states]
    else:
        moved = gradients["student.backbone.layers.1.mixer.x_proj.weight"][-2 * states :]
    assert (moved.abs().amax(dim=1) > 1e-6).all()
    # What comes after the last B and C learns nothing from them.
    assert (gradients["student.backbone.layers.1.mixer.out_proj.weight"] == 0).all()
    assert (gradients["student.backbone.norm_f.weight"] == 0).all()


def test_packed_documents_are_separate_rows(tmp_path):
    lengths = (5, 1, 8)
    apart = ragged_rows(lengths, width=14)
    documents = real_tokens(apart)
    packed = {
        "input_ids": torch.cat(documents),
        "labels": torch.cat([row["labels"][row["attention_mask"] != 0] for row in apart]),
        "position_ids": torch.cat([torch.arange(n) for n in lengths]),
        "seq_idx": torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).int(),
    }
    weights = {**SIX_LOSSES, "attention_weight": 0.0}
    for mixer in MIXERS:
        expected = one_step(tmp_path, rows=apart, student=tiny_student(mixer), **weights)
        for left_out in ("position_ids", "seq_idx", None):
            rows = [{name: value for name, value in packed.items() if name != left_out}]
            step = one_step(tmp_path, rows=rows, student=tiny_student(mixer), **weights)
            assert_gradients_close(step[0], expected[0])
            for name in ("kl", "ce", "bridge", "output", "hidden", "loss"):
                assert step[1][name] == pytest.approx(expected[1][name], rel=1e-5), (name, left_out)


# Weights over time


def test_weights_follow_their_end_and_decay(tmp_path, monkeypatch):
    steps, seen, bridges = 8, [], []
    distil, bridge_loss = DistillationTrainer._distil, modeling_distillation.bridge_loss

    def record(self, model, inputs, weights, active, counts, **kwargs):
        seen.append((dict(zip(LOSSES, weights.tolist())), set(active)))
        return distil(self, model, inputs, weights, active, counts, **kwargs)

    def count_bridge(*args):
        bridges.append(len(seen))
        return bridge_loss(*args)

    def never(*args):
        raise AssertionError("a loss of weight 0 was computed")

    monkeypatch.setattr(DistillationTrainer, "_distil", record)
    monkeypatch.setattr(modeling_distillation, "bridge_loss", count_bridge)
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
    assert max(bridges) == 8 and len(bridges) == 8 * 2 * 2


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
    trainer, _ = make_trainer(
        tmp_path, student=student, weight_decay=0.1, bridge_learning_rate=0.5, learning_rate=0.25, max_steps=2
    )
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
        assert learning_rate == (0.5 if name.startswith("bridge.") else 0.25), name
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


# Evaluation


def metrics_of(folder: Any, rows: Any, **options: Any) -> dict[str, float]:
    trainer, _ = make_trainer(folder, **options)
    return trainer.evaluate(rows)


def test_evaluation_is_a_plain_recomputation(tmp_path):
    rows = ragged_rows()
    trainer, _ = make_trainer(
        tmp_path, eval_dataset=rows, per_device_eval_batch_size=3, relative_loss=False, **SIX_LOSSES
    )
    metrics = trainer.evaluate()
    parts = naive_losses(trainer.model, tiny_teacher(), rows)
    ours, theirs, agreeing, labels, count = 0.0, 0.0, 0, 0, 0
    with torch.no_grad():
        for tokens in real_tokens(rows):
            student_logits, teacher_logits = (
                trainer.student(tokens[None]).logits[0],
                tiny_teacher()(tokens[None]).logits[0],
            )
            ours += F.cross_entropy(student_logits[:-1], tokens[1:], reduction="sum")
            theirs += F.cross_entropy(teacher_logits[:-1], tokens[1:], reduction="sum")
            agreeing += (student_logits.argmax(-1) == teacher_logits.argmax(-1)).sum()
            labels, count = labels + len(tokens) - 1, count + len(tokens)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(ours / labels), rel=1e-5)
    assert metrics["eval_teacher_perplexity"] == pytest.approx(math.exp(theirs / labels), rel=1e-5)
    assert metrics["eval_agreement"] == pytest.approx(float(agreeing / count))
    assert metrics["eval_tokens"] == count
    for name, value in numbers(parts).items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=2e-4), name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_evaluation_does_not_depend_on_batch_and_padding(tmp_path, family):
    def teacher() -> nn.Module:
        if family == "llama":
            return tiny_teacher()
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=4, n_head=4, n_positions=64, initializer_range=0.15)
        return GPT2LMHeadModel(config)

    weights = {**SIX_LOSSES, "relative_loss": False}
    plain = metrics_of(tmp_path, ragged_rows(), teacher=teacher(), per_device_eval_batch_size=8, **weights)
    for batch, side in ((1, "right"), (8, "left"), (3, "left")):
        rows = ragged_rows(side=side, width=13, pad_seed=3)
        other = metrics_of(tmp_path, rows, teacher=teacher(), per_device_eval_batch_size=batch, **weights)
        names = [name for name in plain if not name.endswith(("second", "runtime", "time"))]
        assert {"eval_perplexity", "eval_kl", "eval_bridge", "eval_attention", "eval_loss"} <= set(names)
        for name in names:
            assert other[name] == pytest.approx(plain[name], rel=2e-5), (name, batch, side)


def test_evaluation_measures_what_training_does(tmp_path):
    trainer, recorder = make_trainer(tmp_path, **SIX_LOSSES)
    metrics = trainer.evaluate(ragged_rows())
    trainer.train()
    for name in (*LOSSES, "loss"):
        assert metrics[f"eval_{name}"] == pytest.approx(recorder.logs[1][name], rel=1e-5), name


def test_evaluation_without_labels_and_prediction(tmp_path):
    rows = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in ragged_rows()]
    trainer, _ = make_trainer(tmp_path, rows=rows)
    metrics = trainer.evaluate(rows)
    assert metrics["eval_kl"] > 0 and "eval_perplexity" not in metrics
    trainer.train()
    prediction = trainer.predict(ragged_rows())
    assert prediction.predictions is None
    assert prediction.metrics["test_kl"] > 0 and prediction.metrics["test_perplexity"] > 1


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


@pytest.mark.filterwarnings("default::FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_students(tmp_path, checkpointing):
    peft = pytest.importorskip("peft")

    def make_student(seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, target_modules=["in_proj", "out_proj"], init_lora_weights=False)
        return peft.get_peft_model(tiny_student(), config)

    student = make_student()
    options = {**SIX_LOSSES, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    if checkpointing:
        options["activation_checkpointing"] = True
    trainer, recorder = make_trainer(tmp_path, student=student, **options)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    expected = {name for name in before if "lora_" in name or name.startswith("bridge.")}
    # The bridge and the adapters of every layer learn, all else is frozen.
    assert {name for name in moved if name != "target_scales"} == expected
    folder = tmp_path / "checkpoint-2"
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / "model.safetensors").exists()

    merged = copy.deepcopy(make_student()).merge_and_unload()
    model = nn.Module()
    model.student, model.bridge = merged, copy.deepcopy(trainer.model.bridge)
    model.bridge.load_state_dict({n.removeprefix("bridge."): v for n, v in before.items() if n.startswith("bridge.")})
    parts = naive_losses(model, tiny_teacher(), ragged_rows(), scales=trainer.model.target_scales)
    assert_logs_close(recorder.logs[0], numbers(parts), 5e-4)

    resumed, again = make_trainer(tmp_path, student=make_student(seed=5), **options)
    # Only the adapter is saved, so the frozen rest is the one that the first run started from.
    resumed.train(resume_from_checkpoint=str(folder))
    assert again.logs[:2] == recorder.logs[2:4]
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


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
        ({"attention_weight": 1.0, "remove_rotary": True}, ["attention_weight", "1.0", "remove_rotary=False", "0.0"]),
        ({"trainable": "nothing"}, ["trainable='nothing'", "backbone.embeddings.weight"]),
        ({"output_weight": 1.0, "student": lambda: tiny_student(expand=2)}, ["output_weight", "64", "32"]),
        ({"hidden_weight": 1.0, "student": lambda: tiny_student(hidden_size=16)}, ["hidden_weight", "16", "32"]),
        ({"student": lambda: tiny_student(vocab_size=2000)}, ["2000", str(VOCAB)]),
        ({"cuda_graph": True}, ["cuda_graph", "1 on cpu", "cuda_graph=False"]),
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


def test_layer_maps_and_labels_are_read():
    assert parse_layer_map("0, 2,1") == [0, 2, 1] and parse_layer_map("uniform") == "uniform"
    labels, mask = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[0, 1, 1, 1, 0]])
    assert shifted_labels(labels).tolist() == [[6, 7, 8, 9, -100]]
    assert shifted_labels(labels, mask).tolist() == [[-100, 7, 8, -100, -100]]


# On a GPU


def gpu_step(folder: Any, mixer: str, **options: Any) -> tuple[list[dict[str, Tensor]], list[dict[str, float]]]:
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in ragged_rows((32,) * 8, width=32)]
    trainer, recorder = make_trainer(
        folder, rows=rows, student=tiny_student(mixer), use_cpu=False, max_steps=4, learning_rate=1e-3, **options
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_step_never_waits(tmp_path):
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in ragged_rows((11,) * 4)]
    trainer, _ = make_trainer(tmp_path, rows=rows, use_cpu=False, kl_decay="cosine", **SIX_LOSSES)
    trainer._calibrate_targets()
    trainer.state.max_steps = 10
    batch = {name: value.cuda() for name, value in torch.utils.data.default_collate(rows).items()}
    try:
        for step in range(3):
            # The first step may allocate and compile.
            torch.cuda.set_sync_debug_mode("error" if step else "default")
            trainer.state.global_step = step
            counts = trainer._get_num_items_in_batch([batch], trainer.args.device)
            trainer.training_step(trainer.model, dict(batch), counts)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_teacher_may_be_on_another_device(tmp_path):
    plain = one_step(tmp_path, **SIX_LOSSES)
    apart = one_step(tmp_path, teacher_device="cuda", **SIX_LOSSES)
    assert_gradients_close(apart[0], plain[0], 1e-3)
    assert_logs_close(apart[1], plain[1], 1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_refuses_float16(tmp_path):
    with pytest.raises(ValueError, match="fp16=True") as error:
        gpu_step(tmp_path, "mamba2", cuda_graph=True, fp16=True)
    assert "cuda_graph=True" in str(error.value) and "bf16=True" in str(error.value)
