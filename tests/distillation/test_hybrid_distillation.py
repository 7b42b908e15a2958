"""Hybrids distilled: every loss and the bridge, layers found by paths, and teachers that show a part or nothing."""

import copy

import pytest
import torch
from tiny_distillation import NO_LOSS, SIX_LOSSES, VOCAB, make_arguments, ragged_rows, tiny_student, tiny_teacher
from transformers import AutoConfig, AutoModelForCausalLM

from cab_hf import DistillationTrainer, Teacher, student_from_teacher
from cab_hf.distillation.modeling_distillation import DistillationModel
from cab_hf.evaluation.tiny_families import tiny_model


def hybrid_of(teacher, **options):
    return student_from_teacher(teacher, keep_attention=[1], **options)


def trained(student, teacher, folder, rows=None, **arguments):
    trainer = DistillationTrainer(
        student, teacher, make_arguments(folder, **arguments), train_dataset=rows or ragged_rows()
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_every_loss_works_on_a_hybrid_and_falls(tmp_path):
    teacher = tiny_teacher()
    student = hybrid_of(teacher)
    log = trained(student, teacher, tmp_path, max_steps=30, learning_rate=3e-3, **SIX_LOSSES)
    for name in ("kl", "ce", "bridge", "output", "hidden", "attention"):
        assert 0 < log[-1][name], name
    for name in ("kl", "bridge", "output"):
        assert log[-1][name] < 0.7 * log[0][name], (name, log[0][name], log[-1][name])


def test_the_bridges_gradient_reaches_b_and_c_of_a_hybrid_and_no_kept_attention(tmp_path):
    teacher = Teacher(tiny_teacher())
    student = hybrid_of(copy.deepcopy(teacher.model)).train()
    args = make_arguments(tmp_path, **NO_LOSS | {"bridge_weight": 1.0})
    model = DistillationModel(student, teacher, args)
    tokens = torch.arange(22).view(2, 11) % VOCAB
    counts = {"num_tokens": torch.tensor(22), "num_labels": torch.tensor(0)}
    model(
        targets=teacher({"input_ids": tokens}, attentions=True),
        teacher_head=teacher.head,
        weights=torch.tensor([0, 0, 1, 0, 0, 0]) if args.used_losses[0] == "bridge" else torch.ones(6),
        active=frozenset({"bridge"}),
        input_ids=tokens,
        **counts,
    ).loss.backward()
    for mixer in student.mixer_list:
        width, states = mixer.config.mixer_width, mixer.state_width
        B, C = mixer.in_proj.weight.grad[2 * width : 2 * width + 2 * states].split(states)
        assert B.abs().sum() > 0 and C.abs().sum() > 0
    attention = student.body.layers[1].self_attn
    assert attention.o_proj.weight.grad.abs().sum() > 0  # it stands before the mixers of layers 2 and 3
    assert not student.body.layers[3].mlp.down_proj.weight.grad.any()


def test_layers_meet_by_their_paths_and_not_by_their_number(tmp_path):
    teacher = Teacher(tiny_teacher())
    model = DistillationModel(hybrid_of(teacher.model), teacher, make_arguments(tmp_path))
    assert model.layer_map == model.teacher_layers == model.student_layers == [0, 2, 3]


def test_a_hybrid_that_is_its_teacher_has_no_hidden_loss(tmp_path):
    """With mixers that copy the teacher's attention, every hidden state is compared with its own counterpart."""
    teacher = tiny_teacher()
    student = hybrid_of(teacher)
    originals = {path: copy.deepcopy(teacher.model.get_submodule(path)) for path in student.mixers}
    for path, adapter in student.mixers.items():
        adapter.forward = originals[path].forward
    wrapped = Teacher(copy.deepcopy(teacher))
    model = DistillationModel(student, wrapped, make_arguments(tmp_path, **NO_LOSS | {"hidden_weight": 1.0}))
    tokens = torch.arange(22).view(2, 11) % VOCAB
    output = model(
        targets=wrapped({"input_ids": tokens}, hidden_states=True),
        teacher_head=None,
        weights=torch.ones(6),
        active=frozenset({"hidden"}),
        num_tokens=torch.tensor(22),
        num_labels=torch.tensor(0),
        input_ids=tokens,
    )
    assert float(output.loss) < 1e-8


@pytest.mark.parametrize("rows", ["padded", "packed"])
def test_the_trainer_keeps_the_columns_of_a_hybrid(rows, tmp_path):
    teacher = tiny_teacher()
    student = hybrid_of(teacher)
    data = ragged_rows()
    if rows == "packed":
        seq_idx = torch.tensor([0] * 5 + [1] * 6)
        data = [{"input_ids": row["input_ids"], "seq_idx": seq_idx} for row in ragged_rows([11] * 8)]
    log = trained(student, teacher, tmp_path, data, max_steps=2, kl_weight=1.0, bridge_weight=1.0)
    assert log[0]["kl"] > 0 and log[0]["bridge"] > 0


def test_soft_capped_logits_are_compared_as_the_teacher_makes_them(tmp_path):
    teacher = tiny_model("gemma2")
    student = student_from_teacher(teacher)
    assert not student.config.has_plain_head
    rows = [{"input_ids": row["input_ids"]} for row in ragged_rows([11] * 8)]
    log = trained(student, teacher, tmp_path, rows, max_steps=20, learning_rate=1e-3, kl_weight=1.0, bridge_weight=0.0)
    assert log[-1]["kl"] < 0.7 * log[0]["kl"]
    same = copy.deepcopy(teacher)
    twin = student_from_teacher(teacher, keep_attention=[0, 1, 2])
    twin.mixers["layers.3.self_attn"].forward = same.model.layers[3].self_attn.forward
    assert trained(twin, teacher, tmp_path / "twin", rows, kl_weight=1.0, bridge_weight=0.0)[0]["kl"] < 1e-6


@pytest.mark.parametrize("family", ["bloom", "mamba"])
def test_kl_alone_needs_no_attention(family, tmp_path):
    sizes = {"hidden_size": 32, "vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    layers = {"n_layer": 2, "n_head": 4} if family == "bloom" else {"num_hidden_layers": 2}
    teacher = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **layers))
    log = trained(tiny_student(), teacher, tmp_path, kl_weight=1.0, bridge_weight=0.0)
    assert log[0]["kl"] > 0
    with pytest.raises(ValueError, match="hides its attention"):
        trained(tiny_student(), teacher, tmp_path, kl_weight=1.0, bridge_weight=1.0)


@pytest.mark.parametrize(("family", "shown"), [("qwen3_next", 1), ("jamba", 2), ("gpt_neo", 4)])
def test_a_teacher_teaches_by_the_layers_that_it_shows(family, shown, tmp_path):
    teacher = tiny_model(family)
    rows = [{"input_ids": row["input_ids"]} for row in ragged_rows([11] * 8)]
    student = student_from_teacher(teacher, accept_inexact=1.0)
    assert len(student.mixers) == shown
    log = trained(student, teacher, tmp_path, rows, max_steps=2, kl_weight=1.0, bridge_weight=1.0, hidden_weight=0.1)
    assert min(log[0][name] for name in ("kl", "bridge", "hidden")) > 0
    pure = tiny_student(vocab_size=128)
    log = trained(pure, teacher, tmp_path, rows, kl_weight=1.0, bridge_weight=1.0)
    assert log[0]["bridge"] > 0
