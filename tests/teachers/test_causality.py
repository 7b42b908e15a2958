"""Who may teach next tokens, and over how many: a probe of causality, and the end of a teacher's positions."""

import logging

import pytest
import torch
from tiny_distillation import (
    NO_LOSS,
    VOCAB,
    DistillationTrainer,
    make_arguments,
    ragged_rows,
    tiny_student,
    tiny_teacher,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    DistilBertConfig,
    Gemma3TextConfig,
    GPT2Config,
    MixtralConfig,
    ModernBertConfig,
    RobertaConfig,
)

from cab_hf.data.packing import LanguageCollator
from cab_hf.evaluation.generation import generate, sample
from cab_hf.evaluation.language import compare, perplexity
from cab_hf.evaluation.recall import copying_recall
from cab_hf.teachers.demo import random_llama
from cab_hf.teachers.loading import load_teacher
from cab_hf.teachers.recorded_teacher import record_teacher
from cab_hf.teachers.sampling import sample_documents
from cab_hf.teachers.teacher import Teacher


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
MARKS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
AHEAD = {
    "bert, masked": (AutoModelForMaskedLM, BertConfig, SIZES),
    "bert, lm head": (AutoModelForCausalLM, BertConfig, SIZES),
    "roberta": (AutoModelForCausalLM, RobertaConfig, SIZES),
    "modernbert": (AutoModelForMaskedLM, ModernBertConfig, SIZES | MARKS),
    "distilbert": (AutoModelForMaskedLM, DistilBertConfig, DISTIL),
    "gemma3, both ways": (
        AutoModelForCausalLM,
        Gemma3TextConfig,
        SIZES | {"num_key_value_heads": 2, "head_dim": 8, "use_bidirectional_attention": True},
    ),
}
CAUSAL = {
    "bert decoder": (AutoModelForCausalLM, BertConfig, SIZES | {"is_decoder": True}),
    "gpt2": (AutoModelForCausalLM, GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}),
    "mixtral": (AutoModelForCausalLM, MixtralConfig, SIZES | {"num_key_value_heads": 2}),
}


def make(kind, start=0.3, vocab_size=VOCAB):
    auto, config_class, sizes = kind
    torch.manual_seed(0)
    start = {} if config_class is DistilBertConfig else {"initializer_range": start}
    return auto.from_config(config_class(vocab_size=vocab_size, **sizes, **start)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", [0.02, 0.3])
@pytest.mark.parametrize("name", [*AHEAD, *CAUSAL])
def test_a_probe_decides(name, start, dtype):
    teacher = Teacher(make((AHEAD | CAUSAL)[name], start).to(dtype))
    assert teacher.is_causal == teacher.predicts_tokens == (name in CAUSAL)


@pytest.mark.parametrize("name", AHEAD)
def test_no_next_tokens_are_learnt_from_one_that_reads_them(name, tmp_path, caplog):
    model, rows = make(AHEAD[name]), ragged_rows()
    for option in ("kl_weight", "ce_weight"):
        args = make_arguments(tmp_path, **NO_LOSS | {option: 0.5, "bridge_weight": 1.0})
        with pytest.raises(ValueError, match=f"`{option}` is 0.5, but the teacher .* is bidirectional"):
            DistillationTrainer(tiny_student(), model, args, train_dataset=rows)
    args = make_arguments(tmp_path, **NO_LOSS | {"bridge_weight": 1.0})
    with caplog.at_level(logging.WARNING):
        trainer = DistillationTrainer(tiny_student(), model, args, train_dataset=rows, eval_dataset=rows)
    assert "is bidirectional: beyond its first layer, what ['bridge'] compare has seen tokens" in caplog.text
    assert trainer.train().training_loss > 0
    assert not {"eval_kl", "eval_teacher_perplexity"} & trainer.evaluate().keys()
    with pytest.raises(ValueError, match="predicts no tokens from those before"):
        record_teacher(Teacher(model), rows, tmp_path / "r", data_collator=LanguageCollator(0), top_k=4)


@pytest.mark.parametrize("name", AHEAD)
def test_no_next_tokens_are_measured_or_written_by_one(name):
    model, student, tokenizer = make(AHEAD[name]), tiny_student(), random_llama()[1]
    rows = torch.randint(3, VOCAB, (2, 9))
    for use in (
        lambda: perplexity(model, rows, progress=False),
        lambda: compare(student, model, rows, progress=False),
        lambda: copying_recall(model, VOCAB, 2, length=4, n=2, progress=False),
        lambda: generate(model, rows, 2),
        lambda: sample(model, tokenizer, "a"),
        lambda: sample_documents(model, tokenizer, 4, length=4),
    ):
        with pytest.raises(ValueError, match="reads the tokens behind.*predicts no next tokens"):
            use()


def test_a_recipes_teacher(tmp_path):
    tokenizer = random_llama()[1]
    for name, is_causal in (("bert, lm head", False), ("roberta", False), ("bert decoder", True)):
        path = tmp_path / name
        make((AHEAD | CAUSAL)[name], vocab_size=len(tokenizer)).save_pretrained(path)
        tokenizer.save_pretrained(path)
        if is_causal:
            assert Teacher(load_teacher(str(path))[0]).is_causal
        else:
            with pytest.raises(ValueError, match="is_decoder=True"):
                load_teacher(str(path))


def test_rows_longer_than_a_table_of_positions(tmp_path):
    model, student = make(CAUSAL["gpt2"]), tiny_student()
    rows = torch.randint(3, VOCAB, (2, 17))
    message = "A row has 17 tokens, but GPT2LMHeadModel has positions for 16"
    for use in (
        lambda: Teacher(model)({"input_ids": rows}),
        lambda: perplexity(model, rows, progress=False),
        lambda: compare(student, model, rows, progress=False),
    ):
        with pytest.raises(ValueError, match=message):
            use()
    # Packed documents and padding take no more positions than their tokens.
    restarting = torch.cat((torch.arange(9), torch.arange(8)))[None].expand(2, -1)
    mask = torch.ones_like(rows)
    mask[:, :4] = 0
    for more in (
        {"position_ids": restarting},
        {"attention_mask": mask, "position_ids": mask.cumsum(-1).sub(1).clamp(0)},
    ):
        assert Teacher(model)({"input_ids": rows, **more}, logits=True).logits.shape == (2, 17, VOCAB)


def test_rows_longer_than_a_rotary_teachers_training(caplog):
    model = tiny_teacher(max_position_embeddings=16)
    with caplog.at_level(logging.WARNING):
        Teacher(model)({"input_ids": torch.randint(3, VOCAB, (1, 16))})
        assert "trained on" not in caplog.text
        Teacher(model)({"input_ids": torch.randint(3, VOCAB, (1, 19))})
    assert "A row has 19 tokens, more than the 16 (`max_position_embeddings`) that LlamaForCausalLM" in caplog.text
