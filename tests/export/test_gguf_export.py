"""Students as GGUF: what is in the file, and llama.cpp's texts where it is installed (the package xllamacpp)."""

import json

import pytest
import torch
from tiny_distillation import tiny_teacher
from tiny_models import tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


gguf = pytest.importorskip("gguf")

from cab_hf.export.gguf import export_gguf  # noqa: E402
from cab_hf.transfer import student_from_teacher  # noqa: E402


SSD = {"mixer_type": "mamba2", "n_groups": 2}
CASES = {
    "mamba": {"mixer_type": "mamba"},
    "mamba2": {**SSD, "use_conv_bias": False},
    "granitehybrid": {**SSD, "n_groups": 4, "intermediate_size": 96, "tie_word_embeddings": False},
    "granitehybrid, as wide as the model": {**SSD, "n_groups": 2, "intermediate_size": 96, "expand": 1.0},
    "granitehybrid, linear": {**SSD, "n_groups": 4, "intermediate_size": 96, "conv_activation": None},
}


def save(folder, tokenizer=None, **settings):
    """A tiny student of sizes that llama.cpp's matrix products take, saved."""
    student = tiny_model(**{"hidden_size": 64, "head_dim": 32, "state_size": 16, "eos_token_id": 0, **settings})
    student.save_pretrained(folder)
    (tiny_tokenizer() if tokenizer is None else tokenizer).save_pretrained(folder)
    return student


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_writes_the_same_text(tmp_path, case):
    xllamacpp = pytest.importorskip("xllamacpp")
    student = save(tmp_path / "student", **CASES[case])
    path = export_gguf(tmp_path / "student", tmp_path / "gguf")
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.n_parallel, parameters.verbosity = str(path), 256, 1, 0
    parameters.warmup, parameters.fit_params = False, False
    parameters.cpuparams.n_threads = 1
    prompt = "Mind the gap: it's the 2nd test of the tokens"
    request = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "logprobs": 1, "ignore_eos": True}
    answer = xllamacpp.Server(parameters).handle_completions(request)
    written = answer["choices"][0]["logprobs"]["content"]
    ids = tiny_tokenizer()(prompt, return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [0]}
    expected = student.generate(ids, **options, return_dict_in_generate=True, output_logits=True)
    assert answer["usage"]["prompt_tokens"] == ids.shape[1]
    assert [token["id"] for token in written] == expected.sequences[0, ids.shape[1] :].tolist()
    assert written[0]["logprob"] == pytest.approx(float(expected.logits[0].log_softmax(-1).max()), abs=1e-3)


def test_the_file_holds_the_student(tmp_path):
    student = save(tmp_path / "student", **CASES["granitehybrid"])
    reader = gguf.GGUFReader(export_gguf(tmp_path / "student", tmp_path / "gguf"))
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    mixer = student.backbone.layers[1].mixer
    torch.testing.assert_close(tensors["blk.1.ssm_a"], -mixer.A_log.detach().exp()[:, None])
    assert torch.equal(tensors["blk.1.ssm_norm.weight"].flatten(), mixer.norm.weight)
    assert tensors["blk.1.ssm_norm.weight"].shape == (4, 32)
    assert torch.equal(tensors["blk.0.ffn_gate.weight"], student.backbone.layers[0].mlp.gate_proj.weight)
    assert torch.equal(tensors["output.weight"], student.lm_head.weight)
    assert not tensors["blk.2.attn_output.weight"].any()  # the silent layer behind the student's two
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "granitehybrid"
    assert fields["granitehybrid.attention.head_count_kv"] == [0, 0, 1]
    assert fields["tokenizer.ggml.tokens"][:2] == ["<eos>", "!"] and fields["tokenizer.ggml.eos_token_id"] == 0
    assert fields["tokenizer.ggml.merges"] == ["h e", "Ġ t", "Ġt he"]
    with pytest.raises(FileExistsError, match="exists already"):
        export_gguf(tmp_path / "student", tmp_path / "gguf")


def test_biases_that_are_zero_are_left_out_and_others_refused(tmp_path):
    student = save(tmp_path / "student", **SSD, use_bias=True)
    with pytest.raises(ValueError, match="no place for the biases of in_proj, out_proj"):
        export_gguf(tmp_path / "student", tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()
    with torch.no_grad():
        for block in student.backbone.layers:
            block.mixer.in_proj.bias.zero_()
            block.mixer.out_proj.bias.zero_()
    student.save_pretrained(tmp_path / "student")
    names = {tensor.name for tensor in gguf.GGUFReader(export_gguf(tmp_path / "student", tmp_path / "gguf")).tensors}
    assert "blk.0.ssm_in.weight" in names and "blk.0.ssm_in.bias" not in names


def test_a_served_student_of_a_llama_can_be_written(tmp_path):
    student = student_from_teacher(tiny_teacher(), start="served")
    student.save_pretrained(tmp_path / "student")
    reader = gguf.GGUFReader(export_gguf(tmp_path / "student", tmp_path / "gguf"))
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    assert torch.equal(tensors["token_embd.weight"], student.backbone.embeddings.weight)  # of size one, no factor
    written, own = tensors["blk.0.ssm_out.weight"], student.backbone.layers[0].mixer.out_proj.weight
    heads = written.unflatten(1, (-1, 2, student.config.head_dim))  # each head twice, the second time without output
    assert torch.equal(heads[:, :, 0].flatten(1), own) and not heads[:, :, 1].any()


def test_tokenizers_of_other_kinds_are_refused(tmp_path):
    words = Tokenizer(models.WordLevel({"<eos>": 0, "the": 1}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    save(tmp_path / "student", tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>"), **SSD)
    with pytest.raises(ValueError, match=r"WordLevel with 0 merges and the pre-tokenizers \['Whitespace'\]"):
        export_gguf(tmp_path / "student", tmp_path / "gguf")
    for file in (tmp_path / "student").glob("tokenizer*"):
        file.unlink()
    reader = gguf.GGUFReader(export_gguf(tmp_path / "student", tmp_path / "gguf"))
    assert reader.fields["tokenizer.ggml.model"].contents() == "none"


def test_a_check_allows_more_of_fewer_bits(tmp_path):
    save(tmp_path / "student", **CASES["mamba2"])
    told = {}
    for kind in ("f16", "q8_0", "q4_0"):
        folder = export_gguf(tmp_path / "student", tmp_path / kind, kind=kind).parent
        told[kind] = json.loads((folder / "export_probe.json").read_text()).get("tolerance")
    assert told == {"f16": None, "q8_0": 0.2, "q4_0": 1.0}
