"""DistillationTrainer: every loss against a dense restatement, and what the Trainer makes of them."""

import copy
import math
from typing import Any, NamedTuple

import datasets
import pytest
import torch
import torch.nn.functional as F
from tiny_distillation import (
    HEAD_DIM,
    NO_LOSS,
    SIX_LOSSES,
    VOCAB,
    assert_gradients_close,
    assert_logs_close,
    make_trainer,
    one_step,
    ragged_rows,
    real_tokens,
    tiny_student,
    tiny_teacher,
)
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForSequenceClassification
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from cab_hf import CABMambaForCausalLM, CABMambaForSequenceClassification, Teacher
from cab_hf.data.packing import LanguageCollator
from cab_hf.distillation.training_args import LOSSES
from cab_hf.teachers import TeacherAttention


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
def naive_teacher(model: nn.Module, tokens: Tensor, rotate: bool = True) -> NaiveTeacher:
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
        if rotate:
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
    model: nn.Module,
    teacher: nn.Module,
    rows: list[dict[str, Tensor]],
    scales: Tensor | None = None,
    temperature: float = 1.0,
    rotate: bool = True,
    softmax: bool = False,
) -> dict[str, Tensor]:
    """The six parts, one unpadded row at a time. Source: arXiv 2510.19266 for the bridge, floor layer map.

    `scales` `(4, layers)`: mean squares of keys, queries, outputs and hidden states that relative losses divide by.
    `softmax`: over the features of queries and the tokens of keys, before the bridge is compared with them.
    """
    student, weights = model.student, dict(model.named_parameters())
    scales = torch.ones(4, len(LAYER_MAP)) if scales is None else scales
    sums, count, count_labels = dict.fromkeys(LOSSES, torch.zeros(())), 0, 0
    for tokens in real_tokens(rows):
        theirs = naive_teacher(teacher, tokens, rotate)
        if softmax:
            keys, queries = [key.softmax(0) for key in theirs.keys], [query.softmax(-1) for query in theirs.queries]
            theirs = theirs._replace(keys=keys, queries=queries)
        ours = student.backbone(
            tokens[None], use_cache=False, output_projections=True, output_hidden_states=True, output_attentions=True
        )
        logits = student.lm_head(ours.last_hidden_state)[0]
        log_p, log_q = ((one[:-1] / temperature).log_softmax(-1) for one in (theirs.logits, logits))
        sums["kl"] = sums["kl"] + (log_p.exp() * (log_p - log_q)).sum() * temperature**2
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
                "hidden": [(ours.hidden_states[layer + 1][0], hidden_target(student, theirs, layer), 3)],
            }
            for name, compared in pairs.items():
                for mine, target, row in compared:
                    error = ((mine - target) ** 2).mean(-1).sum() / scales[row, layer]
                    sums[name] = sums[name] + error / len(LAYER_MAP)
            distance = ((ours.attentions[layer][0] - theirs.maps[index]) ** 2).sum(-1).mean(0).sum()
            sums["attention"] = sums["attention"] + distance / len(LAYER_MAP)
        count, count_labels = count + len(tokens), count_labels + len(tokens) - 1
    return {name: total / max(count_labels if name in ("kl", "ce") else count, 1) for name, total in sums.items()}


def hidden_target(student: CABMambaForCausalLM, theirs: NaiveTeacher, layer: int) -> Tensor:
    """The student's last state is after its norm, so the inner teacher state that it learns from is normed like it."""
    target = theirs.hidden_states[LAYER_MAP[layer] + 1]
    if layer < len(LAYER_MAP) - 1:
        return target
    norm = student.backbone.norm_f
    return norm.weight.detach() * target * (target.square().mean(-1, keepdim=True) + norm.eps).rsqrt()


def numbers(parts: dict[str, Tensor], weights: dict[str, float] = SIX_LOSSES) -> dict[str, float]:
    """The parts, and their weighted sum as "loss"."""
    return {name: part.item() for name, part in {**parts, "loss": weighted(parts, weights)}.items()}


def weighted(parts: dict[str, Tensor], weights: dict[str, float] = SIX_LOSSES) -> Tensor:
    return sum(weights[f"{name}_weight"] * part for name, part in parts.items())


# The losses


@pytest.mark.parametrize("relative", [False, True])
def test_the_bridge_starts_at_its_targets_means(tmp_path, relative):
    rows = ragged_rows((11, 3, 5, 2))
    trainer, _ = make_trainer(
        tmp_path, rows=rows, relative_loss=relative, bridge_centered=True, per_device_train_batch_size=3
    )
    started = copy.deepcopy(trainer.model.state_dict())
    trainer._calibrate_targets()
    truths = [naive_teacher(tiny_teacher(), tokens) for tokens in real_tokens(rows)]
    for layer, index in enumerate(LAYER_MAP):
        for row, role in enumerate(("key", "query")):
            targets = torch.cat([(truth.keys if role == "key" else truth.queries)[index] for truth in truths])
            bias = f"bridge.layers.{layer}.0.down.{role}.bias"
            torch.testing.assert_close(trainer.model.state_dict()[bias], targets.mean(0), rtol=1e-4, atol=1e-6)
            scale = (targets - targets.mean(0)).square().mean() if relative else torch.tensor(1.0)
            torch.testing.assert_close(trainer.model.target_scales[row, layer], scale, rtol=1e-3, atol=0)
            started[bias] = trainer.model.state_dict()[bias]
    for name, value in trainer.model.state_dict().items():
        assert name == "target_scales" or torch.equal(value, started[name]), name


def test_a_constant_target_is_not_divided_by_nothing(tmp_path):
    trainer, _ = make_trainer(tmp_path, bridge_centered=True, relative_loss=True)
    means = {
        (layer, role): torch.full_like(linear.bias, 3.0)
        for layer, (mlps,) in enumerate(trainer.model.bridge.layers)
        for role, linear in mlps.down.items()
    }
    trainer.model.calibrate(torch.full((4, 2), 9.0), means)
    torch.testing.assert_close(trainer.model.target_scales, torch.tensor([[9e-4] * 2] * 2 + [[9.0] * 2] * 2))


def test_targets_are_measured_without_compiling_for_few_rows(tmp_path):
    # A teacher first compiled for the measured rows is compiled a second time, for any number of rows.
    trainer, _ = make_trainer(
        tmp_path,
        rows=ragged_rows((11,) * 12),
        relative_loss=True,
        torch_compile=True,
        torch_compile_backend="eager",
        per_device_train_batch_size=12,
    )
    torch._dynamo.reset()
    counters.clear()
    trainer._calibrate_targets()
    assert trainer._is_calibrated and counters["stats"]["unique_graphs"] == 0


def test_a_teacher_is_compiled_once_for_all_layers():
    tokens, captured = {"input_ids": torch.arange(22).view(2, 11)}, []
    for depth in (2, 12):  # dynamo gives up after eight graphs of one function
        teacher = Teacher(tiny_teacher(num_hidden_layers=depth))
        asked = {"attentions": True, "hidden_states": True}
        expected = teacher(tokens, **asked)
        torch._dynamo.reset()
        counters.clear()
        teacher.compile("eager")
        found = teacher(tokens, **asked)
        captured.append(counters["stats"]["calls_captured"])
        assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
        pairs = zip(found.hidden_states, expected.hidden_states, strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
        pairs = zip(found.attentions, expected.attentions, strict=True)
        assert all(torch.equal(one.key, other.key) for one, other in pairs)
        assert not any("_orig_mod" in name for name in teacher.model.state_dict())
    assert captured[0] == captured[1] > 0


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(
    "student", [{"mixer_type": "mamba"}, {"mixer_type": "mamba2"}, {"mixer_type": "mamba2", "n_groups": 2}]
)
def test_a_step_is_the_dense_restatement(tmp_path, student, relative):
    rows = ragged_rows()
    trainer, recorder = make_trainer(
        tmp_path, student=tiny_student(**student), relative_loss=relative, logits_chunk_size=7, **SIX_LOSSES
    )
    model = copy.deepcopy(trainer.model)
    trainer.train()
    scales = None
    if relative:
        squares = torch.zeros(4, 2)
        for tokens in real_tokens(rows):
            truth = naive_teacher(tiny_teacher(), tokens)
            for layer, index in enumerate(LAYER_MAP):
                targets = truth.keys[index], truth.queries[index], truth.outputs[index]
                targets = *targets, hidden_target(model.student, truth, layer)
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


@pytest.mark.parametrize(
    ("options", "naive"),
    [
        ({"temperature": 2.5}, {"temperature": 2.5}),
        ({"remove_rotary": True, "attention_weight": 0.0}, {"rotate": False}),
        ({"target_map": "softmax"}, {"softmax": True}),
    ],
)
def test_options_of_the_losses_are_the_dense_restatement(tmp_path, options, naive):
    trainer, recorder = make_trainer(tmp_path, **{**SIX_LOSSES, "relative_loss": False, **options})
    model = copy.deepcopy(trainer.model)
    trainer.train()
    weights = {**SIX_LOSSES, **options}
    expected = numbers(naive_losses(model, tiny_teacher(), ragged_rows(), **naive), weights)
    for name in (*LOSSES, "loss"):
        if name == "attention" and weights["attention_weight"] == 0.0:
            assert name not in recorder.logs[0]
        else:
            assert recorder.logs[0][name] == pytest.approx(expected[name], rel=1e-3), name


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
        hidden = padding[:, None, :, None]
        outputs.attentions = tuple(
            TeacherAttention(
                attention.query.masked_fill(hidden, math.nan),
                attention.key.masked_fill(hidden, math.nan),
                attention.output.masked_fill(padding[..., None, None], math.nan),
            )
            for attention in outputs.attentions
        )
        unseen = hidden | padding[:, None, None, :]
        outputs.maps = tuple(lambda make=make: make().masked_fill(unseen, math.nan) for make in outputs.maps)
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


def test_rows_that_make_no_batch_raise(tmp_path):
    options = {"per_device_train_batch_size": 4, "dataloader_drop_last": True}
    trainer, _ = make_trainer(tmp_path, ragged_rows([5, 6, 7]), **options)
    message = "has 3 rows, which make no batch: `per_device_train_batch_size` is 4 .*dataloader_drop_last=False"
    with pytest.raises(ValueError, match=message):
        trainer.train()
    trainer, _ = make_trainer(tmp_path, [], relative_loss=True)
    with pytest.raises(ValueError, match="has 0 rows, which make no batch"):
        trainer.train()


@pytest.mark.parametrize("relative_loss", [False, True])
@pytest.mark.parametrize("streams", [False, True])
def test_text_that_is_not_tokenised_teaches(tmp_path, streams, relative_loss):
    texts = datasets.Dataset.from_list([{"text": "abc", "id": 1}] * 8)
    rows = texts.to_iterable_dataset() if streams else texts
    options = {"relative_loss": relative_loss, "bridge_centered": False, "max_steps": 1}
    trainer, _ = make_trainer(tmp_path, rows, **options)
    with pytest.raises(
        ValueError, match=r"columns \['text', 'id'\].*no `input_ids`.*cab_hf.data.packing.pack_documents"
    ):
        trainer.train()

    def tokenise(rows):
        return {"input_ids": torch.tensor([[ord(letter) % VOCAB for letter in row["text"]] for row in rows])}

    trainer, recorder = make_trainer(tmp_path, rows, data_collator=tokenise, remove_unused_columns=False, **options)
    trainer.train()
    assert recorder.logs[0]["kl"] > 0


def test_a_compiled_student_is_refused(tmp_path):
    with pytest.raises(ValueError, match="student is a torch.compile of a model.*`torch_compile=True`"):
        make_trainer(tmp_path, student=torch.compile(tiny_student()))


@pytest.mark.filterwarnings("default::FutureWarning")  # peft's own
def test_a_transformer_is_no_student(tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_teacher(), peft.LoraConfig(target_modules=["q_proj"]))
    pairs = (tiny_teacher(), tiny_teacher()), (tiny_teacher(), tiny_student()), (adapted, tiny_teacher())
    for student, teacher in pairs:
        with pytest.raises(ValueError, match="student is a LlamaForCausalLM.*DistillationTrainer.student, teacher"):
            make_trainer(tmp_path, student=student, teacher=teacher)


def test_a_checkpoint_that_is_not_there_is_not_taken_for_a_student(tmp_path):
    with pytest.raises(FileNotFoundError, match="`resume_from_checkpoint` is '.*checkpoint-9', which is no folder"):
        make_trainer(tmp_path)[0].train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


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


# Evaluation


def metrics_of(folder: Any, rows: Any, **options: Any) -> dict[str, float]:
    trainer, _ = make_trainer(folder, **options)
    return trainer.evaluate(rows)


def test_evaluation_is_a_plain_recomputation(tmp_path):
    rows = ragged_rows()
    for row in rows:  # so few tokens that the models often agree
        row["input_ids"] %= 5
        row["labels"] = torch.where(row["labels"] < 0, -100, row["input_ids"])
    teacher = tiny_teacher(vocab_size=5)
    trainer, _ = make_trainer(
        tmp_path,
        eval_dataset=rows,
        student=tiny_student(vocab_size=5),
        teacher=copy.deepcopy(teacher),
        per_device_eval_batch_size=3,
        relative_loss=False,
        **SIX_LOSSES,
    )
    metrics = trainer.evaluate()
    parts = naive_losses(trainer.model, teacher, rows)
    ours, theirs, agreeing, labels, count = 0.0, 0.0, 0, 0, 0
    with torch.no_grad():
        for tokens in real_tokens(rows):
            student_logits, teacher_logits = (
                trainer.student(tokens[None]).logits[0],
                teacher(tokens[None]).logits[0],
            )
            ours += F.cross_entropy(student_logits[:-1], tokens[1:], reduction="sum")
            theirs += F.cross_entropy(teacher_logits[:-1], tokens[1:], reduction="sum")
            agreeing += (student_logits.argmax(-1) == teacher_logits.argmax(-1))[:-1].sum()
            labels, count = labels + len(tokens) - 1, count + len(tokens)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(ours / labels), rel=1e-5)
    assert metrics["eval_teacher_perplexity"] == pytest.approx(math.exp(theirs / labels), rel=1e-5)
    assert 0.1 < agreeing / labels < 0.9
    assert metrics["eval_agreement"] == pytest.approx(float(agreeing / labels))
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


def test_who_predicts_no_tokens_is_told_so(tmp_path):
    classifier = LlamaForSequenceClassification(tiny_teacher().config).eval()
    with pytest.raises(ValueError, match="`kl_weight` is 1.0, but the teacher LlamaForSequenceClassification"):
        make_trainer(tmp_path, teacher=classifier, kl_weight=1.0)
    # Its attention can teach.
    trainer, _ = make_trainer(tmp_path, teacher=classifier, **NO_LOSS | {"bridge_weight": 1.0})
    trainer.train()
    metrics = trainer.evaluate(ragged_rows())
    assert metrics["eval_bridge"] > 0 and metrics["eval_perplexity"] > 1
    assert not {"eval_kl", "eval_agreement", "eval_teacher_perplexity"} & metrics.keys()

    student = CABMambaForSequenceClassification(tiny_student().config)
    with pytest.raises(ValueError, match="student CABMambaForSequenceClassification predicts no tokens"):
        make_trainer(tmp_path, student=student)


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
