"""Metrics on examples worked out by hand, against naive restatements, and from a Trainer."""

import math

import numpy as np
import pytest
import torch
from tiny_models import random_ids, tiny_model
from transformers import (
    EvalPrediction,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.modeling_outputs import CausalLMOutput

from cab_hf.evaluation.generation import generate
from cab_hf.evaluation.language import perplexity
from cab_hf.evaluation.metrics import (
    Perplexity,
    Recall,
    TopKAccuracy,
    distinct_n,
    image_metrics,
    log_likelihood,
    mean_interval,
    repetition_rate,
    student_t95,
    top_k_accuracy,
    wilson_interval,
)
from cab_hf.evaluation.recall import associative_recall


def test_by_hand():
    logits = [[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0], [1.0, 3.0, 2.0, 0.0], [9.0, 0.0, 0.0, 1.0]]
    result = top_k_accuracy(np.array(logits), np.array([0, 1, 2, 1]), k=(1, 2, 3, 4))
    # Ranks from the top: 0, 2, 1, and 2, since of the two zeros that of the smaller index comes first.
    assert [result[f"top{k}"] for k in (1, 2, 3, 4)] == [0.25, 0.5, 1.0, 1.0]
    assert result["n"] == 4


def test_equals_sorting():
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(200, 12)).astype(np.float32), generator.integers(0, 12, 200)
    ranked = [sorted(range(12), key=lambda j, row=row: -row[j]) for row in logits]
    result = TopKAccuracy(keep_in_memory=True).compute(predictions=logits, references=labels)
    for k in (1, 5):
        assert result[f"top{k}"] == pytest.approx(np.mean([label in row[:k] for row, label in zip(ranked, labels)]))
        low, high = result[f"top{k}_ci95"]
        assert 0 < low < result[f"top{k}"] < high < 1
    assert set(result) == {"top1", "top1_ci95", "top5", "top5_ci95", "n"}


def test_ids_of_classes_tell_top_1():
    metric = TopKAccuracy(keep_in_memory=True)
    result = metric.compute(predictions=[1, 2, 3, 3], references=[1, 2, 0, 3])
    assert result["top1"] == 0.75 and "top5" not in result
    with pytest.raises(ValueError, match="only top-1"):
        metric.compute(predictions=[1, 2], references=[1, 2], k=(1, 5))


def test_batches_add_up():
    generator = np.random.default_rng(1)
    logits, labels = generator.normal(size=(30, 7)), generator.integers(0, 7, 30)
    metric = TopKAccuracy(keep_in_memory=True)
    for start in (0, 13, 26):
        metric.add_batch(predictions=logits[start : start + 13], references=labels[start : start + 13])
    expected = top_k_accuracy(logits.astype(np.float32), labels)
    assert metric.compute(k=(1, 5)) == expected


def test_few_classes_have_no_top_5():
    result = top_k_accuracy(np.eye(5), np.arange(5))
    assert result["top1"] == 1.0 and "top5" not in result


def test_broken_logits_never_count_as_right():
    logits = np.array([[np.nan, 0.0], [0.0, np.nan], [np.inf, 0.0], [-np.inf, -np.inf], [1.0, 0.0]])
    assert top_k_accuracy(logits, np.zeros(5, dtype=int))["top1"] == 0.2


# Computed by hand: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) with z = 1.96.
@pytest.mark.parametrize(
    "right, n, low, high",
    [(5, 10, 0.2366, 0.7634), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_wilson(right, n, low, high):
    assert wilson_interval(right / n, n) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(
    "predictions, labels, message",
    [
        (np.zeros((0, 3)), np.zeros(0, dtype=int), "at least one image"),
        (np.zeros((2, 3)), np.zeros(3, dtype=int), r"\(2, 3\) and labels \(3,\)"),
        (np.zeros((2, 3)), np.array([0, 3]), "from 0 to 3, but predictions have 3 classes"),
        (np.zeros((2, 3)), np.array([0, -100]), "-100"),
    ],
)
def test_what_does_not_fit_raises(predictions, labels, message):
    with pytest.raises(ValueError, match=message):
        top_k_accuracy(predictions, labels)


def test_image_metrics_gives_numbers_from_the_first_of_several_outputs():
    logits = np.arange(24.0).reshape(3, 8)
    result = image_metrics(EvalPrediction(predictions=(logits, logits), label_ids=np.array([7, 3, 0])))
    assert set(result) == {"top1", "top1_low", "top1_high", "top5", "top5_low", "top5_high"}
    assert all(isinstance(value, float) for value in result.values())
    assert result["top1"] == pytest.approx(1 / 3) and result["top5"] == pytest.approx(2 / 3)


def test_a_trainer_reports_them(tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=6,
    )
    model = ViTForImageClassification(config)
    rows = [{"pixel_values": torch.randn(3, 8, 8), "labels": index % 6} for index in range(9)]
    arguments = TrainingArguments(output_dir=tmp_path, use_cpu=True, report_to="none", per_device_eval_batch_size=4)
    found = Trainer(model=model, args=arguments, eval_dataset=rows, compute_metrics=image_metrics).evaluate()
    with torch.no_grad():
        chosen = model.eval()(torch.stack([row["pixel_values"] for row in rows])).logits.argmax(1).tolist()
    expected = np.mean([a == row["labels"] for a, row in zip(chosen, rows)])
    assert found["eval_top1"] == pytest.approx(expected)


def test_intervals_of_means_of_few_values_are_students():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 3, 4, 15, 60, 999, 5000):
        assert student_t95(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-6)
    values = [1.0, 2.0, 4.0]
    mean, low, high = mean_interval(values)
    assert (low, high) == pytest.approx(stats.t.interval(0.95, 2, mean, stats.sem(values)))
    assert mean_interval([1.0])[1:] == (-math.inf, math.inf)


class TestPerplexity:
    def test_of_sums(self):
        found = Perplexity(keep_in_memory=True).compute(predictions=[-2.0, -6.0, -1.0], references=[2, 3, 1])
        assert found["perplexity"] == pytest.approx(math.exp(9 / 6))
        assert found["n_tokens"] == 6 and found["n_blocks"] == 3
        assert found["ci95"][0] < found["perplexity"] < found["ci95"][1]

    def test_of_logits(self):
        generator = np.random.default_rng(0)
        logits = [generator.normal(size=(length, 5)) for length in (4, 6)]
        labels = [np.array([0, 3, -100, 1]), np.array([4, 4, 0, 1, 2, -100])]
        naive, count = 0.0, 0
        for row, own in zip(logits, labels):
            for place in range(len(own) - 1):
                if own[place + 1] >= 0:
                    naive -= math.log(math.exp(row[place][own[place + 1]]) / sum(map(math.exp, row[place])))
                    count += 1
        metric = Perplexity(keep_in_memory=True)
        found = metric.compute(predictions=[row.tolist() for row in logits], references=[x.tolist() for x in labels])
        assert found["nll"] == pytest.approx(naive / count, rel=1e-6) and found["n_tokens"] == count == 6

    def test_logits_of_any_size_are_finite(self):
        assert log_likelihood(np.array([[1000.0, 0.0], [0.0, 0.0]]), np.array([0, 0])) == (0.0, 1)
        assert log_likelihood(np.zeros((1, 3)), np.array([2])) == (0.0, 0)
        with pytest.raises(ValueError, match=r"\(2, 3\) and references \(3,\)"):
            log_likelihood(np.zeros((2, 3)), np.zeros(3, dtype=int))

    @pytest.mark.parametrize("mixer_type", ["mamba", "mamba2"])
    def test_batch_and_padding_side_do_not_matter(self, mixer_type):
        model = tiny_model(mixer_type=mixer_type)
        rows = [random_ids(length, seed=length).tolist() for length in (5, 17, 2, 9, 12, 3, 7, 11, 6)]
        with torch.no_grad():
            alone = [model(torch.tensor([row])).logits[0].numpy() for row in rows]
        sums = [log_likelihood(logits, np.array(row)) for logits, row in zip(alone, rows)]
        predictions, references = zip(*sums)
        expected = Perplexity(keep_in_memory=True).compute(predictions=predictions, references=references)
        for batch_size in (1, 8):
            for side in ("left", "right"):
                found = perplexity(model, rows, batch_size, padding_side=side, progress=False)
                assert found["nll"] == pytest.approx(expected["nll"], rel=1e-5), (batch_size, side)
                assert found["ci95"] == pytest.approx(expected["ci95"], rel=1e-4)
                assert found["n_tokens"] == expected["n_tokens"] == sum(map(len, rows)) - len(rows)

    @pytest.mark.parametrize("mixer_type", ["mamba", "mamba2"])
    def test_the_log_likelihood_of_each_row_is_the_same_on_either_side(self, mixer_type):
        model = tiny_model(mixer_type=mixer_type)
        rows = [random_ids(length, seed=length).tolist() for length in (5, 17, 2, 9, 12, 3, 7, 11)]
        for side in ("left", "right"):
            ids, mask = torch.full((8, 17), 98), torch.zeros(8, 17, dtype=torch.long)
            places = [slice(17 - len(row), 17) if side == "left" else slice(0, len(row)) for row in rows]
            for index, (row, place) in enumerate(zip(rows, places)):
                ids[index, place], mask[index, place] = torch.tensor(row), 1
            with torch.no_grad():
                together = model(ids, attention_mask=mask).logits
            for index, (row, place) in enumerate(zip(rows, places)):
                with torch.no_grad():
                    alone = model(torch.tensor([row])).logits[0].numpy()
                found = log_likelihood(together[index, place].numpy(), np.array(row))
                assert found == pytest.approx(log_likelihood(alone, np.array(row)), abs=1e-3, rel=1e-5)


class TestRecall:
    def test_by_hand(self):
        predictions, references = [[1, 2, 3], [4, 5, 6], [7, 8, 9]], [[1, 0, 3], [-100, 5, 6], [0, 0, 0]]
        found = Recall(keep_in_memory=True).compute(predictions=predictions, references=references)
        assert found["recall"] == pytest.approx(4 / 8) and found["n_tokens"] == 8 and found["n_sequences"] == 3
        # Rows that are right or wrong as a whole speak for fewer trials than tokens.
        assert wilson_interval(4 / 8, 8)[1] <= found["ci95"][1] <= wilson_interval(1.5 / 3, 3)[1]

    def test_what_does_not_fit_raises(self):
        with pytest.raises(ValueError, match="all -100"):
            Recall(keep_in_memory=True).compute(predictions=[[1, 2]], references=[[-100, -100]])
        with pytest.raises(ValueError, match=r"\(2,\) and references \(1,\)"):
            Recall(keep_in_memory=True).compute(predictions=[[1, 2]], references=[[1]])


class Lookup(LlamaForCausalLM):
    """Predicts what followed an earlier token of the same id, the last one; token 0 where there is none."""

    def __init__(self, vocab_size: int = 60) -> None:
        sizes = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
        super().__init__(LlamaConfig(vocab_size=vocab_size, **sizes))
        self.seen: list[list[int]] = []

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> CausalLMOutput:
        self.seen += input_ids.tolist()
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for row, tokens in enumerate(input_ids.tolist()):
            for now, token in enumerate(tokens):
                before = [place for place in range(now) if tokens[place] == token]
                logits[row, now, tokens[before[-1] + 1] if before else 0] = 1.0
        return CausalLMOutput(logits=logits)


class TestAssociativeRecall:
    @pytest.mark.parametrize("gap", [0, 7])
    def test_a_model_that_looks_up_is_right(self, gap):
        model = Lookup()
        found = associative_recall(model, range(1, 60), gap, pairs=5, n=6, batch_size=4, progress=False)
        assert found["recall"] == 1.0 and found["ci95"][0] < 1.0
        assert found["n_tokens"] == 30 and found["n_sequences"] == 6 and found["gap"] == gap
        seen = [tokens for tokens in model.seen if len(tokens) > 5]  # without those that ask whether it is causal
        for tokens in seen:
            shown, filler, asked = tokens[:10], tokens[10 : 10 + gap], tokens[10 + gap :]
            pairs = [set(zip(part[::2], part[1::2])) for part in (shown, asked)]
            assert pairs[0] == pairs[1] and len(set(shown)) == 10 and not set(shown) & set(filler)
        assert any(tokens[:10] != tokens[10 + gap :] for tokens in seen)

    def test_a_model_that_knows_nothing_is_at_chance(self):
        found = associative_recall(tiny_model(), 99, 4, pairs=8, n=8, progress=False)
        assert found["recall"] < 0.2

    def test_the_seed_picks_the_tokens(self):
        models = [Lookup() for _ in range(3)]
        for model, seed in zip(models, (0, 0, 1)):
            associative_recall(model, range(1, 60), 3, pairs=4, n=2, seed=seed, progress=False)
        assert models[0].seen == models[1].seen != models[2].seen

    def test_too_few_tokens_raise(self):
        with pytest.raises(ValueError, match="fewer than the 61"):
            associative_recall(Lookup(), 60, 1, pairs=30)


class TestGeneration:
    def test_by_hand(self):
        texts = [[1, 2, 1, 2, 1, 2], [3]]
        assert distinct_n(texts, 1) == 3 / 7
        assert distinct_n(texts, 2) == 2 / 5
        # 2-grams of the first text: 12 21 12 21 12; the second has none.
        assert repetition_rate(texts, 2) == pytest.approx(3 / 5)
        assert repetition_rate([[1, 1, 1, 1, 1], [1, 2, 3, 4]], 4) == pytest.approx(1 / 4)
        assert distinct_n([], 1) == repetition_rate([[1]], 4) == 0.0

    def test_is_that_of_generate(self):
        model, prompts = tiny_model(mixer_type="mamba2"), random_ids(3, 6)
        model.generation_config.eos_token_id = None
        state = torch.random.get_rng_state()
        found = generate(model, prompts, 7, batch_size=2)
        assert torch.equal(state, torch.random.get_rng_state())
        assert found == generate(model, prompts, 7, batch_size=2)
        texts = [model.generate(row[None], max_new_tokens=7, do_sample=False)[0, 6:].tolist() for row in prompts]
        assert found["greedy"]["distinct_2"] == distinct_n(texts, 2)
        assert found["greedy"]["repetition_rate"] == repetition_rate(texts)
        assert found["greedy"]["n_tokens"] == 21 and found["sampled"]["n_texts"] == 3

    def test_nothing_counts_after_the_end(self):
        model, prompts = tiny_model(mixer_type="mamba2"), random_ids(2, 6)
        model.generation_config.eos_token_id = list(range(99))
        assert generate(model, prompts, 7)["greedy"]["n_tokens"] == 0
