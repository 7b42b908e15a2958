"""Rotations as they are read of any teacher, and students whose states turn so."""

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM

from cab_hf import student_from_teacher
from cab_hf.evaluation.tiny_families import tiny_model, tiny_tokens
from cab_hf.export import to_stock
from cab_hf.teachers import Teacher
from cab_hf.transfer.rotation import read_rotations


ROTARY = {
    "llama": (8, False),
    "gpt_neox": (2, False),  # a quarter of each head
    "gptj": (4, True),  # by no module of its own
    "glm": (4, True),  # half of each head
    "cohere": (8, True),
    "gpt_oss": (8, False),  # with sinks, for which a row of one token is no row of equal states
}


@pytest.mark.parametrize("family", ROTARY)
def test_rotations_are_read_of_any_family(family):
    rotations = read_rotations(tiny_model(family)).values()
    pairs, interleaved = ROTARY[family]
    for one in rotations:
        assert one.interleaved == interleaved
        assert int((one.frequencies.abs() > 1e-7).sum()) == pairs
        assert one.frequencies[0] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_what_does_not_rotate_is_told(family, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("cab_hf.transfer.rotation"), "propagate", True)
    model = tiny_model(family)
    assert set(read_rotations(model).values()) <= {None}
    assert student_from_teacher(model, data=(), keep_rotary=True).mixer_list[0].pairs == 0
    assert "no state of the student turns" in caplog.text


def test_layers_may_differ():
    layers = ["sliding_attention", "full_attention"] * 2
    model = tiny_model("gemma3_text", layer_types=layers)
    local, other = list(read_rotations(model).values())[:2]
    assert not torch.equal(local.frequencies, other.frequencies)
    student = student_from_teacher(model, data=(), keep_rotary=True, accept_inexact=2.0)
    found = [mixer.rotary_frequencies for mixer in student.mixer_list]
    assert torch.equal(found[0], local.frequencies) and torch.equal(found[3], other.frequencies)
    no_rope = student_from_teacher(tiny_model("smollm3"), data=(), keep_rotary=True)
    assert [mixer.pairs for mixer in no_rope.mixer_list] == [8, 8, 8, 0]


def test_half_precision_reads_what_the_modules_hold(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    one, other = (list(read_rotations(each).values())[0] for each in (model, half))
    assert torch.equal(one.frequencies, other.frequencies)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gptj", "glm"])
def test_scores_are_those_of_the_teachers_queries_and_keys(family):
    teacher, ids, seen = tiny_model(family), tiny_tokens(), []
    fields = {"transition_init": "identity", "gate_init": "usual"}  # decays of one
    student = student_from_teacher(teacher, data=(), keep_rotary=True, **fields)
    mixer = student.mixer_list[0]
    handle = mixer.register_forward_hook(lambda mixer, inputs, output: seen.append(output[1]))
    student(ids)
    handle.remove()
    ours = mixer.attention_map(seen[0].B, seen[0].C, torch.ones_like(seen[0].time_step))
    query, key, _ = Teacher(teacher)({"input_ids": ids}, attentions=True).attentions[0]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    theirs = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    torch.testing.assert_close(ours.tril(-1), theirs.tril(-1), atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_hybrids_turn_and_generate_as_whole_rows_do():
    teacher, ids = tiny_model("llama"), tiny_tokens()
    student = student_from_teacher(teacher, data=(), keep_rotary=True, keep_attention=1)
    assert [mixer.pairs for mixer in student.mixer_list] == [8, 8, 8]
    whole, cache, said = student(ids).logits, None, []
    for piece in ids.split((5, 1, 1, 5), dim=1):
        output = student(piece, cache=cache, use_cache=True)
        cache = output.cache
        said.append(output.logits)
    torch.testing.assert_close(torch.cat(said, dim=1), whole, atol=1e-4, rtol=1e-4)


def test_stock_classes_hold_no_turning_states():
    with pytest.raises(ValueError, match="its states turn"):
        to_stock(student_from_teacher(tiny_model("llama"), data=(), keep_rotary=True))
