"""Top-k accuracy with its interval, for `Trainer` and for reports. Shapes: `n` images, `V` classes."""

import math
from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
from transformers import EvalPrediction


_Z95 = 1.959964
_TOP = (1, 5)


class TopKAccuracy(evaluate.Metric):
    """Share of images whose label is among the k likeliest: `compute(predictions=..., references=...)`.

    It needs no Hub. `predictions` are logits (n, V) or, for top-1 alone, class ids (n,); `references` are labels (n,).
    `k` are the k to count; by default 1 and 5, or 1 alone where predictions are ids or there are at most 5 classes.
    The result has `top1`, `top5`, ..., the number of images `n`, and `top1_ci95`, a Wilson interval, and so on.
    """

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="Share of images whose label is among the k likeliest classes, with 95 % Wilson intervals.",
            citation="",
            inputs_description="predictions: logits or class ids; references: labels; k: which k, by default 1 and 5.",
            features=[
                datasets.Features({"predictions": datasets.Sequence(datasets.Value("float32")), "references": label}),
                datasets.Features({"predictions": datasets.Value("int64"), "references": label}),
            ],
        )

    def _compute(
        self, predictions: Sequence, references: Sequence[int], k: Sequence[int] | None = None
    ) -> dict[str, float | int | list[float]]:
        return top_k_accuracy(np.asarray(predictions), np.asarray(references), k)


def top_k_accuracy(
    predictions: np.ndarray, labels: np.ndarray, k: Sequence[int] | None = None
) -> dict[str, float | int | list[float]]:
    """Top-k accuracies and their 95 % Wilson intervals.

    Among equal logits the class of the smaller index counts as the likelier, as `argmax` has it. Where a label's
    logit is no finite number, or another one is NaN and so could be anything, the image does not count as right.

    Args:
        predictions: Logits (n, V), or class ids (n,), integers.
        labels: Integers (n,).
        k: Which k; by default 1, and 5 where there are logits of more than 5 classes.

    Returns:
        `top1`, `top1_ci95` = [low, high], the same for each other k, and `n`.

    Raises:
        ValueError: No image, shapes that do not fit, a label that is no class, or a k that the predictions can't tell.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if labels.ndim != 1 or len(labels) == 0 or predictions.shape[:1] != labels.shape or predictions.ndim > 2:
        raise ValueError(
            f"predictions are {predictions.shape} and labels {labels.shape}. Give logits (n, V) or class ids (n,), "
            "and labels (n,), for at least one image."
        )
    if predictions.ndim == 1:
        classes, rank = 1, (predictions != labels).astype(np.int64)
    else:
        classes, rank = predictions.shape[1], _rank(predictions, labels)
    wanted = [one for one in _TOP if one == 1 or one < classes] if k is None else list(k)
    if not wanted or min(wanted) < 1 or max(wanted) > classes:
        reason = "class ids tell only top-1" if predictions.ndim == 1 else f"there are {classes} classes"
        raise ValueError(f"k is {wanted}, but {reason}. Give k from 1 to {classes}.")
    result: dict[str, float | int | list[float]] = {}
    for one in wanted:
        right = int((rank < one).sum())
        result[f"top{one}"] = right / len(labels)
        result[f"top{one}_ci95"] = list(wilson_interval(right, len(labels)))
    return result | {"n": len(labels)}


def image_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` of a `Trainer`: `top1`, `top5` and the ends of their intervals as numbers of their own.

    Args:
        prediction: Logits (n, V), or a tuple that starts with them, and labels (n,).

    Returns:
        `top1`, `top1_low`, `top1_high` and, with more than 5 classes, the same for 5.
    """
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    result = top_k_accuracy(logits, prediction.label_ids)
    flat: dict[str, float] = {}
    for name in ("top1", "top5"):
        if name in result:
            low, high = result[f"{name}_ci95"]
            flat |= {name: result[name], f"{name}_low": low, f"{name}_high": high}
    return flat


def wilson_interval(right: int, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a share `right / n`; it stays inside [0, 1] and has a width at 0 and 1 too.

    Source: Wilson (1927), "Probable inference, the law of succession, and statistical inference".
    """
    share, weight = right / n, _Z95**2 / n
    middle = (share + weight / 2) / (1 + weight)
    half = _Z95 * math.sqrt(share * (1 - share) / n + weight / (4 * n)) / (1 + weight)
    return max(0.0, middle - half), min(1.0, middle + half)


def _rank(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes are likelier than the label (n,)."""
    classes = logits.shape[1]
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"labels run from {labels.min()} to {labels.max()}, but predictions have {classes} classes. Leave images "
            "without a label out, or check num_labels of the model."
        )
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    earlier = np.arange(classes) < labels[:, None]
    likelier = (logits > own) | ((logits == own) & earlier) | np.isnan(logits)
    return np.where(np.isfinite(own[:, 0]), likelier.sum(axis=1), classes)
