"""Which student a teacher becomes, and that a hybrid with nothing kept starts as the pure class does."""

import logging

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig
from transformers.utils import logging as transformers_logging

from cab_hf.evaluation.tiny_families import tiny_model, tiny_tokens
from cab_hf.models import CABHybridForCausalLM, CABHybridForSequenceClassification, CABMambaForCausalLM
from cab_hf.recipes import ModelArguments
from cab_hf.runs.student import build_student
from cab_hf.transfer import FAMILIES, fit_output_projection, student_from_teacher
from cab_hf.transfer.hybrid import hybrid_from_teacher, kept_paths, parse_kept


@pytest.mark.parametrize("start", ["linear", "served"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_a_hybrid_that_keeps_nothing_is_the_pure_student(family, start):
    teacher, tokens = tiny_model(family), tiny_tokens()
    pure = student_from_teacher(teacher, start=start)
    student = student_from_teacher(teacher, start=start, keep_attention=0)
    assert type(pure) is CABMambaForCausalLM and type(student) is CABHybridForCausalLM
    expected, found = pure(tokens).logits, student(tokens).logits
    assert float((found - expected).norm() / expected.norm()) < 3e-6


@torch.no_grad()
def test_fits_and_calibrations_are_those_of_the_pure_student():
    teacher, inputs = tiny_model("llama"), {"input_ids": tiny_tokens()}
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :4] = 0
    inputs["attention_mask"] = mask
    students = [student_from_teacher(teacher, keep_attention=kept, calibration_inputs=inputs) for kept in (None, 0)]
    for student in students:
        fit_output_projection(student, teacher, [inputs])
    expected, found = (student(**inputs).logits for student in students)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    kept = student_from_teacher(teacher, keep_attention=[1], calibration_inputs=inputs)
    before = kept.mixer_list[0].out_proj.weight.clone()
    attention = kept.body.layers[1].self_attn.o_proj.weight.clone()
    fit_output_projection(kept, teacher, [inputs])
    assert not torch.equal(kept.mixer_list[0].out_proj.weight, before)
    assert torch.equal(kept.body.layers[1].self_attn.o_proj.weight, attention)


@pytest.mark.parametrize(
    ("family", "options", "name", "reason"),
    [
        ("llama", {}, "CABMambaForCausalLM", "a table says what a pure student of 'llama' is"),
        ("olmo2", {}, "CABHybridForCausalLM", "no table says what a pure student of 'olmo2' is"),
        ("llama", {"keep_attention": 1}, "CABHybridForCausalLM", "keep_attention is 1"),
        ("llama", {"student_class": CABHybridForCausalLM}, "CABHybridForCausalLM", "it was asked for"),
    ],
)
def test_the_log_says_which_student_it_is_and_why(family, options, name, reason, caplog):
    transformers_logging.enable_propagation()
    logger = logging.getLogger("cab_hf.transfer.student")
    logger.setLevel(logging.INFO)
    with caplog.at_level(logging.INFO, logger=logger.name):
        student = student_from_teacher(tiny_model(family), **options)
    assert type(student).__name__ == name
    assert f"The student is a {name}: {reason}." in caplog.text


def test_layers_are_kept_by_count_index_or_path():
    paths = [f"layers.{index}.self_attn" for index in range(30)]
    assert [paths.index(path) for path in kept_paths(4, paths)] == [3, 11, 18, 26]
    assert kept_paths([3, "model.layers.17.self_attn", "29"], paths) == [paths[3], paths[17], paths[29]]
    assert kept_paths("12", paths) == kept_paths(paths[12], paths) == [paths[12]]
    assert kept_paths(0, paths) == kept_paths([], paths) == []
    for wrong in (31, [30], ["layers.30.self_attn"]):
        with pytest.raises(ValueError, match="keep_attention.*30"):
            kept_paths(wrong, paths)
    assert (parse_kept([]), parse_kept(["n=0"]), parse_kept(["1", "a.b"])) == (None, 0, [1, "a.b"])
    teacher = tiny_model("llama")
    with pytest.raises(ValueError, match="keeps all 4 layers.*Keep fewer"):
        student_from_teacher(teacher, keep_attention=4)


def test_kept_layers_are_the_teachers_and_nothing_is_shared():
    teacher = tiny_model("mixtral")
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = student_from_teacher(teacher, keep_attention=["layers.2.self_attn"])
    assert list(student.mixers) == [f"layers.{index}.self_attn" for index in (0, 1, 3)]
    theirs, ours = teacher.model.layers[2].state_dict(), student.body.layers[2].state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    places = {parameter.data_ptr() for parameter in teacher.parameters()}
    assert not places & {parameter.data_ptr() for parameter in student.parameters()}
    assert student.inner.config is not teacher.config and student.mixers["layers.0.self_attn"].config is not None
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in student.parameters())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_tied_weights_stay_tied_and_dtypes_are_as_asked():
    teacher = tiny_model("llama", tie_word_embeddings=True).to(torch.bfloat16)
    student = student_from_teacher(teacher, keep_attention=1)
    assert student.inner.lm_head.weight is student.get_input_embeddings().weight
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    half = student_from_teacher(teacher, keep_attention=1, dtype=torch.bfloat16)
    assert (
        half.mixer_list[0].A_log.dtype == torch.float32 and half.get_input_embeddings().weight.dtype == teacher.dtype
    )
    assert torch.isfinite(half(tiny_tokens()).logits).all()


def test_what_is_for_pure_students_or_can_not_load_is_refused(tmp_path):
    teacher = tiny_model("olmo2")
    for options in ({"num_hidden_layers": 2}, {"mixer_type": "mamba"}, {"copy_weights": False}):
        with pytest.raises(ValueError, match="is for pure students, but this is a hybrid.*'olmo2'"):
            student_from_teacher(teacher, **options)
    with pytest.raises(ValueError, match="no field 'stat_size'"):
        student_from_teacher(teacher, stat_size=3)
    with pytest.raises(ValueError, match="keep_attention.*CABMambaForCausalLM has no attention"):
        student_from_teacher(tiny_model("llama"), keep_attention=1, student_class=CABMambaForCausalLM)
    own = type("OwnLlama", (type(tiny_model("llama")),), {"__module__": "somewhere.else"})
    with pytest.raises(ValueError, match="OwnLlama.*not transformers' own.*trust_remote_code=False"):
        hybrid_from_teacher(own(LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)))
    with pytest.raises(ValueError, match="can't be read at 'layers.0.self_attn': it attends 2 times.*keep_attention"):
        student_from_teacher(tiny_model("diffllama"))


def test_a_classifier_becomes_a_hybrid_classifier(tmp_path):
    config = tiny_model("llama").config
    config.num_labels, config.pad_token_id = 3, 0
    teacher = AutoModelForSequenceClassification.from_config(config).eval()
    student = student_from_teacher(teacher, student_class=CABHybridForSequenceClassification, keep_attention=[1])
    assert student(tiny_tokens()).logits.shape == (2, 3)
    assert torch.equal(student.inner.score.weight, teacher.score.weight)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.num_labels == 3 and torch.equal(loaded(tiny_tokens()).logits, student(tiny_tokens()).logits)


def test_a_recipe_keeps_attention():
    model = ModelArguments(teacher="random-llama", keep_attention=["n=2"], calibration="none")
    student = build_student(model, tiny_model("llama"), "floor", [])
    assert list(student.mixers) == ["layers.0.self_attn", "layers.2.self_attn"]
