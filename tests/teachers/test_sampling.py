"""Text that a teacher writes: its distribution, its documents, its file, its errors."""

import numpy as np
import pytest
import torch
from commands import error_of
from datasets import Dataset
from tiny_models import largest_difference
from transformers import LlamaConfig, LlamaForCausalLM

from cab_hf.cli import main
from cab_hf.data.documents import load_documents
from cab_hf.data.packing import pack_documents
from cab_hf.teachers.demo import random_llama
from cab_hf.teachers.sampling import sample_documents


@pytest.fixture(scope="module")
def teacher():
    model, tokenizer = random_llama()
    return model.eval(), tokenizer


def with_constant_logits(tokenizer, logits: torch.Tensor) -> LlamaForCausalLM:
    """A model that predicts one distribution everywhere."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
    config.tie_word_embeddings = False
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:  # the stream keeps the embedding, which is the same for all tokens
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight.copy_(logits[:, None].expand(-1, 8) / 8)
    assert largest_difference(model(torch.tensor([[3, 4]])).logits[0, 1], logits) < 1e-4
    return model


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_follow_the_models_whole_distribution(teacher, temperature):
    tokenizer = teacher[1]
    plain = [token for token in range(len(tokenizer)) if token not in tokenizer.all_special_ids][:6]
    logits = torch.full((len(tokenizer),), -30.0)
    logits[plain] = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5, 0.5])
    model = with_constant_logits(tokenizer, logits)
    model.generation_config.repetition_penalty, model.generation_config.top_k = 1.5, 2  # as some models ship them
    documents = sample_documents(model, tokenizer, 8000, length=40, batch_size=100, temperature=temperature)
    assert model.generation_config.top_k == 2
    tokens = np.concatenate([np.array(row) for row in documents["input_ids"]])
    assert len(tokens) == 8000 and set(tokens) <= set(plain)
    found = np.array([(tokens == token).mean() for token in plain])
    expected = (logits[plain] / temperature).softmax(0).numpy()
    standard_error = np.sqrt(expected * (1 - expected) / len(tokens))
    assert (abs(found - expected) < 4 * standard_error + 1e-9).all()


def test_same_seed_same_documents_and_the_random_state_is_left_alone(teacher):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    once, again, other = (
        sample_documents(*teacher, 90, length=12, batch_size=4, seed=seed)["input_ids"] for seed in (1, 1, 2)
    )
    assert torch.equal(torch.rand(3), expected)
    assert once == again and once != other
    rows = sample_documents(*teacher, 96, length=12, batch_size=4)["input_ids"]
    assert len({tuple(row) for row in rows}) == len(rows)  # batches draw anew


def test_a_document_ends_where_the_model_ends_it(teacher):
    tokenizer = teacher[1]
    end = tokenizer.eos_token_id
    logits = torch.full((len(tokenizer),), -30.0)
    plain = next(token for token in range(len(tokenizer)) if token not in tokenizer.all_special_ids)
    logits[[plain, end]] = torch.tensor([1.0, 0.0])
    rows = sample_documents(with_constant_logits(tokenizer, logits), tokenizer, 300, length=30, batch_size=16)[
        "input_ids"
    ]
    assert all(end not in row[:-1] for row in rows) and len({len(row) for row in rows}) > 3
    assert sum(row[-1] == end for row in rows) >= len(rows) - 2  # e^-9 to reach 30; the last one is cut
    assert sum(map(len, rows)) == 300


def test_prompts_are_continued_from_anywhere_in_the_documents(teacher):
    model, tokenizer = teacher
    text = " ".join(f"word{index} and so on" for index in range(60))
    prompts = Dataset.from_dict({"text": [text]})
    rows = sample_documents(model, tokenizer, 200, length=20, batch_size=4, prompts=prompts, prompt_length=8)
    tokens = tokenizer(text)["input_ids"]
    pieces = {tuple(tokens[start : start + 8]) for start in range(len(tokens) - 7)}
    starts = [tuple(row[:8]) for row in rows["input_ids"] if len(row) >= 8]
    assert len(set(starts)) > 4 and set(starts) <= pieces
    assert all(len(row) <= 20 for row in rows["input_ids"])


def test_the_command_writes_a_file_that_a_recipe_reads(tmp_path, capsys):
    out = tmp_path / "samples.npz"
    main(["sample", "random-llama", str(out), "--tokens", "150", "--length", "30", "--batch_size", "3"])
    assert "150 tokens in" in capsys.readouterr().out
    documents = load_documents(out)
    model, tokenizer = random_llama()
    expected = sample_documents(model, tokenizer, 150, length=30, batch_size=3)
    assert documents["input_ids"] == expected["input_ids"]
    assert len(pack_documents(documents, tokenizer, 16)) >= 9
    # What was written can be prompted from, beside texts it cannot be mixed with.
    more = tmp_path / "more.npz"
    options = ["--tokens", "40", "--length", "12", "--batch_size", "2", "--prompt_length", "4"]
    main(["sample", "random-llama", str(more), "--prompts", str(out), *options])
    assert sum(map(len, load_documents(more)["input_ids"])) == 40


def test_bad_input(teacher, tmp_path, capsys):
    model, tokenizer = teacher
    limit = model.config.max_position_embeddings
    with pytest.raises(
        ValueError, match=f"length is {limit}, .*documents of {limit - 1} tokens. Give a length of at most {limit - 1}"
    ):
        sample_documents(model, tokenizer, 10, length=limit)
    for options, message in (
        ({"num_tokens": 0}, "num_tokens is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"length": 0}, "length is 0"),
        ({"length": 8, "prompts": [], "prompt_length": 8}, "length is 8. Give at least 9"),
        (
            {"prompts": Dataset.from_dict({"text": ["ab"]}), "prompt_length": 30},
            "fewer tokens than a prompt_length of 30",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            sample_documents(model, tokenizer, **{"num_tokens": 10, "length": 40} | options)
    assert "does not end in .npz" in error_of(capsys, "sample", "random-llama", tmp_path / "samples.txt")
    assert "device 'nowhere' can't be used here" in error_of(
        capsys, "sample", "random-llama", tmp_path / "samples.npz", "--device", "nowhere"
    )
    assert not list(tmp_path.iterdir())
