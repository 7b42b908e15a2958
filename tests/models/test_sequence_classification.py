"""Sequence classification: padding on either side changes nothing, losses are right, folders load everywhere."""

import json

import pytest
import torch
import torch.nn.functional as F
from tiny_models import VARIANTS, largest_difference, random_ids, shake, tiny_config, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

import cab_hf
from cab_hf import CABMambaForCausalLM, CABMambaForSequenceClassification
from cab_hf.models import modeling_cab_mamba


PAD = 98
LENGTHS = (6, 9, 1, 4)


def classifier(**overrides) -> CABMambaForSequenceClassification:
    torch.manual_seed(0)
    return shake(CABMambaForSequenceClassification(tiny_config(**{"num_labels": 3, **overrides})).eval())


def ragged(side: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Ids and mask `(b, t)` padded on one side, or on both, and the rows alone."""
    rows = [random_ids(length, seed=length, vocab_size=PAD) for length in LENGTHS]
    ids, mask = [], []
    for row in rows:
        free = max(LENGTHS) + 2 - len(row)
        before = {"left": free, "right": 0, "both": free // 2}[side]
        ids.append(F.pad(row, (before, free - before), value=PAD))
        mask.append(F.pad(torch.ones_like(row), (before, free - before)))
    return torch.stack(ids), torch.stack(mask), rows


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_padding_changes_nothing(name):
    model = classifier(**VARIANTS[name])
    for side in ("left", "right", "both"):
        ids, mask, rows = ragged(side)
        # an independent truth: the head on the last hidden state of each row alone
        alone = torch.cat([model.backbone(row[None]).last_hidden_state[:, -1] @ model.score.weight.T for row in rows])
        assert alone.std() > 0.1
        assert largest_difference(torch.cat([model(row[None]).logits for row in rows]), alone) < 1e-5
        assert largest_difference(model(ids, attention_mask=mask).logits, alone) < 1e-4, side
        assert largest_difference(model(ids, attention_mask=mask.bool()).logits, alone) < 1e-4
        embeds = model.get_input_embeddings()(ids)
        assert largest_difference(model(inputs_embeds=embeds, attention_mask=mask).logits, alone) < 1e-4
        # what stands at padding is read nowhere, even with a pad token that says otherwise
        model.config.pad_token_id = int(rows[0][-1])
        assert largest_difference(model(ids * mask, attention_mask=mask).logits, alone) < 1e-4
        model.config.pad_token_id = None


@torch.no_grad()
def test_without_a_mask_the_pad_token_tells_the_end(monkeypatch):
    ids, mask, _ = ragged("right")
    model = classifier(mixer_type="mamba2")
    expected = model(ids, attention_mask=mask).logits
    with pytest.raises(ValueError, match=r"4 rows.*`attention_mask`.*pad_token_id.*one row at a time"):
        model(ids)
    embeds, said = model.get_input_embeddings()(ids), []
    assert torch.equal(model(ids[1:2]).logits, model(ids[1:2], attention_mask=torch.ones(1, ids.shape[1])).logits)

    model.config.pad_token_id = PAD
    monkeypatch.setattr(type(model), "warn_if_padding_and_no_attention_mask", lambda *given: said.append(given))
    monkeypatch.setattr(modeling_cab_mamba.logger, "warning_once", said.append)
    assert largest_difference(model(ids).logits, expected) < 1e-5
    assert len(said) == 1
    # a token like padding inside the text ends nothing, and a row of padding alone does not fail
    inside = ids[1:2, :9].clone()
    inside[0, 3] = PAD
    assert torch.equal(model(inside).logits, model(inside, attention_mask=torch.ones(1, 9)).logits)
    assert model(torch.full((2, 3), PAD)).logits.isfinite().all()
    # embeddings show no padding
    said.clear()
    hidden = model.backbone(inputs_embeds=embeds).last_hidden_state[:, -1]
    assert largest_difference(model(inputs_embeds=embeds).logits, model.score(hidden)) < 1e-5
    assert "`attention_mask`" in said[0]


@torch.no_grad()
def test_packed_rows_cached_chunks_and_outputs():
    model = classifier(mixer_type="mamba2")
    first, second = random_ids(1, 5, seed=1), random_ids(1, 6, seed=2)
    packed = torch.cat([first, second], dim=1)
    whole = model(packed, output_projections=True, output_hidden_states=True, output_attentions=True)
    assert whole.cache is None and whole.loss is None
    assert len(whole.projections) == len(whole.attentions) == 2 and len(whole.hidden_states) == 3
    alone = model(second).logits
    seq_idx = torch.tensor([[0] * 5 + [1] * 6])
    positions = torch.tensor([[*range(5), *range(6)]])
    assert largest_difference(model(packed, seq_idx=seq_idx).logits, alone) < 1e-5
    assert largest_difference(model(packed, position_ids=positions).logits, alone) < 1e-5
    assert largest_difference(whole.logits, alone) > 1e-2
    begun = model(first, use_cache=True)
    ended = model(second, cache=begun.cache, attention_mask=torch.ones(1, 11), use_cache=True)
    assert largest_difference(ended.logits, whole.logits) < 1e-4
    assert torch.equal(model(packed, return_dict=False)[0], whole.logits)


class TestLoss:
    @pytest.mark.parametrize("problem_type", [None, "single_label_classification"])
    def test_one_of_many(self, problem_type):
        model, ids = classifier(problem_type=problem_type), random_ids(4, 5)
        mask, labels = torch.ones_like(ids), torch.tensor([0, 2, 1, -100])
        output = model(ids, attention_mask=mask, labels=labels)
        chances = output.logits.log_softmax(-1)
        torch.testing.assert_close(output.loss, -(chances[0, 0] + chances[1, 2] + chances[2, 1]) / 3)
        summed = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=7).loss
        torch.testing.assert_close(summed, output.loss * 3 / 7)
        assert model.config.problem_type == "single_label_classification"

    @pytest.mark.parametrize("problem_type", [None, "multi_label_classification"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_many_of_many(self, problem_type, dtype):
        model, ids = classifier(problem_type=problem_type), random_ids(2, 5)
        labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]], dtype=dtype)
        output = model(ids, attention_mask=torch.ones_like(ids), labels=labels)
        chances = output.logits.sigmoid()
        expected = -(torch.where(labels > 0.5, chances, 1 - chances)).log().mean()
        torch.testing.assert_close(output.loss, expected)
        # Trainer counts labels over several batches: halves add up to the whole
        parts = [
            model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=labels.numel()).loss for i in (0, 1)
        ]
        torch.testing.assert_close(parts[0] + parts[1], expected)

    @pytest.mark.parametrize("count", [1, 3])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.long])
    def test_regression(self, count, dtype):
        model, ids = classifier(num_labels=count, problem_type="regression" if count > 1 else None), random_ids(2, 5)
        shapes = [(2,), (2, 1)] if count == 1 else [(2, 3)]
        for shape in shapes:
            labels = torch.arange(2 * count).view(shape).to(dtype)
            output = model(ids, attention_mask=torch.ones_like(ids), labels=labels)
            assert output.logits.shape == (2, count)
            expected = (output.logits - labels.view(2, count)).square().mean()
            torch.testing.assert_close(output.loss, expected)
            alone = model(ids[:1], labels=labels[:1], num_items_in_batch=2 * count).loss
            torch.testing.assert_close(alone, (output.logits[0] - labels.view(2, count)[0]).square().sum() / 2 / count)

    @pytest.mark.parametrize(
        ("labels", "match"),
        [
            (torch.zeros(2, 3, dtype=torch.long), r"\(2, 3\).*single_label_classification of 3.*\(2,\)"),
            (torch.zeros(2), r"\(2,\).*multi_label_classification of 3.*\(2, 3\)"),
            (torch.zeros(2, 5), r"\(2, 5\).*\(2, 3\)"),
        ],
    )
    def test_labels_of_another_shape(self, labels, match):
        with pytest.raises(ValueError, match=match):
            classifier()(random_ids(2, 5), attention_mask=torch.ones(2, 5), labels=labels)


@pytest.mark.parametrize("tied", [True, False])
def test_a_causal_student_becomes_a_classifier_and_back(tied, tmp_path):
    causal, ids = tiny_model(mixer_type="mamba", tie_word_embeddings=tied), random_ids(1, 6)
    causal.save_pretrained(tmp_path / "causal")
    model, found = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "causal", num_labels=5, pad_token_id=PAD, output_loading_info=True
    )
    assert type(model) is CABMambaForSequenceClassification is cab_hf.models.CABMambaForSequenceClassification
    assert found["missing_keys"] == {"score.weight"}
    assert found["unexpected_keys"] == (set() if tied else {"lm_head.weight"})
    assert model.score.weight.shape == (5, 32) and model.score.bias is None
    assert 0.01 < float(model.score.weight.detach().std()) < 0.03  # initializer_range
    with torch.no_grad():
        hidden = causal.backbone(ids).last_hidden_state
        assert largest_difference(model.backbone(ids).last_hidden_state, hidden) < 1e-6
        model.save_pretrained(tmp_path / "classifier")
        written = json.loads((tmp_path / "classifier/config.json").read_text())
        assert written["architectures"] == ["CABMambaForSequenceClassification"]
        assert written["auto_map"] == modeling_cab_mamba.AUTO_MAP
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
        assert largest_difference(again(ids).logits, model(ids).logits) < 1e-6
        back, found = CABMambaForCausalLM.from_pretrained(tmp_path / "classifier", output_loading_info=True)
        assert found["missing_keys"] == (set() if tied else {"lm_head.weight"})
        assert largest_difference(back.backbone(ids).last_hidden_state, hidden) < 1e-6
        if tied:
            assert largest_difference(back(ids).logits, causal(ids).logits) < 1e-5
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "classifier")) is CABMambaForCausalLM


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_pipeline_classifies(side):
    words = {word: index for index, word in enumerate(["[PAD]", "good", "bad", "plain", "film"])}
    raw = Tokenizer(WordLevel(words, unk_token="plain"))
    raw.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", padding_side=side)
    model = classifier(num_labels=2, mixer_type="mamba2", id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
    model.config.pad_token_id = 0
    texts = ["good film", "bad bad bad plain film", "film"]
    found = pipeline("text-classification", model=model, tokenizer=tokenizer)(texts, batch_size=3, top_k=None)
    for text, scores in zip(texts, found):
        with torch.no_grad():
            chances = model(torch.tensor([[words[word] for word in text.split()]])).logits.softmax(-1)[0]
        by_label = {one["label"]: one["score"] for one in scores}
        assert by_label == pytest.approx({"no": float(chances[0]), "yes": float(chances[1])}, abs=1e-5)


PROBLEMS = {
    "one of many": ({}, [0, 2, 1, 1]),
    "many of many": ({}, [[1.0, 0, 1], [0.0, 0, 1], [1.0, 1, 0], [0.0, 0, 0]]),
    "regression": ({"problem_type": "regression"}, [[0.5, -1, 1], [0.0, 3, 1], [1.0, 1, 0], [0.0, -2, 0]]),
    "regression of one": ({"num_labels": 1}, [0.5, -1.0, 2.0, 0.0]),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_plain_trainer_trains_the_same_in_one_batch_or_four(problem, tmp_path):
    ids, mask, _ = ragged("left")
    config, labels = PROBLEMS[problem]
    rows = [{"input_ids": i, "attention_mask": m, "labels": one} for i, m, one in zip(ids, mask, labels)]
    weights, losses = [], []
    for size in (4, 1):
        model = classifier(mixer_type="mamba2", **config)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            max_steps=3,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            learning_rate=0.01,
            optim="sgd",
            max_grad_norm=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        weights.append(model.score.weight.detach().clone())
        evaluated = trainer.evaluate()["eval_loss"]
        assert evaluated < losses[-1][-1] < losses[-1][0]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert largest_difference(*weights) < 1e-4
