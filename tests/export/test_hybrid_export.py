"""Hybrids of Llama-like teachers as GraniteMoeHybrid, mixers and kept attention alike; others say why not."""

import pytest
import torch
from test_gguf_export import tiny_tokenizer
from transformers import AutoModelForCausalLM, GraniteMoeHybridForCausalLM

from cab_hf.evaluation.tiny_families import tiny_model, tiny_tokens
from cab_hf.export import gguf as gguf_export
from cab_hf.export.check import check_export
from cab_hf.export.gguf import export_gguf
from cab_hf.export.loading import read_student
from cab_hf.export.stock import export_stock, to_stock
from cab_hf.transfer import student_from_teacher


GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.mark.parametrize("start", ["linear", "served"])
@pytest.mark.parametrize("kept", [[1], [0, 3]])
@pytest.mark.parametrize("family", ["llama", "mistral"])
@torch.no_grad()
def test_logits_and_texts_are_those_of_transformers_own_class(family, kept, start, tmp_path):
    student = student_from_teacher(tiny_model(family, sliding_window=None), keep_attention=kept, start=start)
    for parameter in student.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    student.save_pretrained(tmp_path / "student")
    tokens = tiny_tokens()
    exported = export_stock(tmp_path / "student", tmp_path / "stock")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert type(stock) is type(exported) is GraniteMoeHybridForCausalLM
    assert stock.config.layer_types == ["full_attention" if i in kept else "linear_attention" for i in range(4)]
    torch.testing.assert_close(stock(tokens).logits, student(tokens).logits, rtol=1e-3, atol=2e-4)
    assert torch.equal(stock.generate(tokens, **GREEDY), student.generate(tokens, **GREEDY))


def test_a_hybrid_folder_is_read_as_a_student(tmp_path):
    student = student_from_teacher(tiny_model("llama"), keep_attention=1)
    student.save_pretrained(tmp_path)
    assert torch.equal(read_student(tmp_path)(tiny_tokens()).logits, student(tiny_tokens()).logits)


@pytest.mark.parametrize(
    ("family", "fields", "said"),
    [
        ("mixtral", {}, "'mixtral': it has weights such as .*(gate|experts)"),
        ("mistral", {"sliding_window": 2}, "gives other logits"),
        ("granite", {"residual_multiplier": 0.5}, "gives other logits"),
    ],
)
def test_what_is_no_llama_is_refused(family, fields, said):
    student = student_from_teacher(tiny_model(family, **fields), keep_attention=[1])
    with pytest.raises(ValueError, match=f"{said}.*trust_remote_code"):
        to_stock(student)


def test_llama_cpp_rotates_kept_attention_as_transformers_does(tmp_path):
    pytest.importorskip("xllamacpp")
    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 32, "vocab_size": len(tokenizer)}
    teacher = tiny_model("llama", **sizes, eos_token_id=0)
    student = student_from_teacher(teacher, keep_attention=[1, 2], start="served")
    student.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    export_gguf(tmp_path / "student", tmp_path / "gguf")
    report = check_export(tmp_path / "gguf")
    assert report and all(found["agrees"] and found["difference"] < 2e-3 for found in report.values()), report
    stock = to_stock(student)
    stock.config.rope_parameters = {"rope_type": "linear", "factor": 2.0}
    with pytest.raises(ValueError, match="rope_type 'linear'.*--to stock"):
        gguf_export._add_granite(gguf_export.gguf.GGUFWriter(None, "granitehybrid"), stock.config)
