"""Top-k accuracy on examples worked out by hand, and from a Trainer."""

import numpy as np
import pytest
import torch
from transformers import EvalPrediction, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from cab_hf.metrics import TopKAccuracy, image_metrics, top_k_accuracy, wilson_interval


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
    assert wilson_interval(right, n) == pytest.approx((low, high), abs=1e-4)


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
