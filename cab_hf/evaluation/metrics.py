"""Metrics with their intervals, for `Trainer`, for reports and as `evaluate.Metric`s that need no Hub.

Shapes: `n` images or sequences, `t` token, `V` classes or vocabulary.
"""

import functools
import math
from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
from transformers import EvalPrediction

from cab_hf.data.packing import IGNORE_INDEX


Z95 = 1.959964
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


class Perplexity(evaluate.Metric):
    """Perplexity of text: `compute(predictions=..., references=...)`, one entry a sequence. It needs no Hub.

    `predictions` are summed log-likelihoods in nats and `references` the numbers of tokens that they sum over; or
    `predictions` are logits (t, V) and `references` labels (t,), which are shifted here: the logits at a token predict
    the next one. Labels of -100 do not count. `evaluate` stores logits as float32 in Arrow, so for whole data sets
    sums are the better choice.

    The result has `perplexity`, `ci95` (over sequences), `nll` in nats per token, `n_tokens` and `n_blocks`.
    """

    def _info(self) -> evaluate.MetricInfo:
        logits = datasets.Sequence(datasets.Sequence(datasets.Value("float32")))
        labels = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description="exp of the mean negative log-likelihood of a token, with a 95 % interval over sequences.",
            citation="",
            inputs_description="predictions: summed log-likelihoods and references: numbers of tokens; or "
            "predictions: logits (t, V) and references: labels (t,).",
            features=[
                datasets.Features({"predictions": logits, "references": labels}),
                datasets.Features({"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}),
            ],
        )

    def _compute(self, predictions: Sequence, references: Sequence) -> dict[str, float | int | list[float]]:
        sums, counts = predictions, references
        if np.ndim(references[0]):
            pairs = [log_likelihood(np.asarray(one), np.asarray(own)) for one, own in zip(predictions, references)]
            sums, counts = zip(*pairs)
        return perplexity_of_sums([-one for one in sums], counts)


class Recall(evaluate.Metric):
    """Share of tokens that were recalled: `compute(predictions=..., references=...)`, one entry a sequence. No Hub.

    `predictions` are the likeliest tokens (t,) at the places of `references` (t,), the true ones; -100 there does not
    count. The result has `recall`, `ci95`, `n_tokens` and `n_sequences`. The interval is Wilson's, for the number of
    independent tokens that the spread between sequences speaks for.
    """

    def _info(self) -> evaluate.MetricInfo:
        tokens = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description="Share of tokens that were recalled, with a 95 % interval over sequences.",
            citation="",
            inputs_description="predictions: token ids (t,); references: the true ones, -100 where none counts.",
            features=datasets.Features({"predictions": tokens, "references": tokens}),
        )

    def _compute(self, predictions: Sequence, references: Sequence) -> dict[str, float | int | list[float]]:
        right, counts = [], []
        for own, true in zip(predictions, references):
            own, true = np.asarray(own), np.asarray(true)
            if own.shape != true.shape:
                raise ValueError(f"predictions are {own.shape} and references {true.shape}; give a token for each.")
            right.append(int(((own == true) & (true != IGNORE_INDEX)).sum()))
            counts.append(int((true != IGNORE_INDEX).sum()))
        if not sum(counts):
            raise ValueError("No token counts: references are all -100. Give at least one true token.")
        return recall_of_counts(right, counts)


def perplexity_of_sums(nll: Sequence[float], tokens: Sequence[int]) -> dict[str, float | int | list[float]]:
    """Perplexity out of each block's sum: exp of the mean negative log-likelihood of a token.

    Args:
        nll: summed negative log-likelihood of each block, in nats.
        tokens: how many tokens each sum is over.

    Returns:
        `perplexity`, `ci95` (over blocks), `nll` in nats per token, `n_tokens`, `n_blocks`.
    """
    mean, low, high = ratio_interval(nll, tokens)
    return {
        "perplexity": safe_exp(mean),
        "ci95": [safe_exp(low), safe_exp(high)],
        "nll": mean,
        "n_tokens": int(np.sum(tokens)),
        "n_blocks": int(np.count_nonzero(tokens)),
    }


def recall_of_counts(right: Sequence[int], counts: Sequence[int]) -> dict[str, float | int | list[float]]:
    """Recall out of each sequence's counts.

    Args:
        right: tokens of each sequence that were recalled.
        counts: tokens of each sequence that count.

    Returns:
        `recall`, `ci95` (Wilson, for the number of independent tokens that the spread between sequences speaks for),
        `n_tokens`, `n_sequences`.
    """
    share = sum(right) / sum(counts)
    return {
        "recall": share,
        "ci95": list(wilson_interval(share, effective_count(right, counts))),
        "n_tokens": sum(counts),
        "n_sequences": len(counts),
    }


def safe_exp(value: float) -> float:
    """exp that overflows to infinity, as a diverged model's perplexity does."""
    return math.exp(value) if value < 700 else math.inf


def ratio_interval(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float, float]:
    """Mean per token and its 95 % interval, taking rows, whose tokens hang together, as the independent unit.

    Args:
        sums: (n,) sum of a quantity over each row's tokens.
        counts: (n,) tokens of each row; rows without any do not count.

    Returns:
        (mean, low, high), by the normal approximation of a ratio of sums; infinitely wide for a single row.

    Raises:
        ValueError: There is no token.
    """
    sums, counts = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    sums, counts = sums[counts > 0], counts[counts > 0]
    rows = len(counts)
    if not rows:
        raise ValueError("There is no token to predict. Give rows of two tokens or more, with labels beside -100.")
    mean = sums.sum() / counts.sum()
    if rows == 1:
        return float(mean), -math.inf, math.inf
    error = math.sqrt(rows / (rows - 1) * np.square(sums - mean * counts).sum()) / counts.sum()
    return float(mean), float(mean - Z95 * error), float(mean + Z95 * error)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values (n,); infinite for a single one."""
    values = np.asarray(values, dtype=np.float64)
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.inf


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of independent values (n,) and its 95 % interval by Student's t: (mean, low, high)."""
    mean, error = float(np.mean(values)), standard_error(values)
    spread = student_t95(max(len(values) - 1, 1)) * error
    return mean, mean - spread, mean + spread


@functools.cache
def student_t95(freedom: int) -> float:
    """Standard errors of a 95 % interval by Student's t.

    Args:
        freedom: Degrees of freedom, at least 1.

    Example:
        >>> round(student_t95(1), 3), round(student_t95(15), 3)
        (12.706, 2.131)
    """
    low, high = Z95, 13.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, freedom) < 0.95 else (low, middle)
    return high


def _t_within(limit: float, freedom: int) -> float:
    """Probability that Student's t is within ± a limit.

    Source: Abramowitz and Stegun (1964), "Handbook of Mathematical Functions", equations 26.7.3 and 26.7.4.
    """
    angle, is_odd = math.atan(limit / math.sqrt(freedom)), freedom % 2
    powers = np.arange(is_odd, freedom - 1, 2)
    factors = np.cumprod([1.0, *((powers[1:] - 1) / powers[1:])])[: len(powers)]
    total = float(np.sin(angle) * (factors * np.cos(angle) ** powers).sum())
    return 2 / math.pi * (angle + total) if is_odd else total


def wilson_interval(share: float, n: float) -> tuple[float, float]:
    """95 % interval of a share seen in `n` independent trials, sensible also at 0 and 1.

    Source: Wilson (1927), "Probable inference, the law of succession, and statistical inference".
    """
    centre = share + Z95**2 / (2 * n)
    spread = Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    scale = 1 + Z95**2 / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def effective_count(right: Sequence[int], counts: Sequence[int]) -> float:
    """Independent trials that would spread as much as the rows do: at least the rows, at most the tokens."""
    share, low, high = ratio_interval(right, counts)
    error = (high - low) / (2 * Z95)
    if error == 0 or math.isinf(error):
        return len(counts)
    return float(np.clip(share * (1 - share) / error**2, len(counts), sum(counts)))


def log_likelihood(logits: np.ndarray, labels: np.ndarray) -> tuple[float, int]:
    """Summed log-likelihood of a sequence in nats, and how many tokens it sums over.

    Args:
        logits: (t, V); those at a token predict the next one.
        labels: Integers (t,), not shifted; -100 does not count.

    Raises:
        ValueError: Shapes that do not fit.
    """
    if logits.ndim != 2 or logits.shape[:1] != labels.shape:
        raise ValueError(f"predictions are {logits.shape} and references {labels.shape}; give (t, V) and (t,).")
    targets = labels[1:]
    places = np.flatnonzero(targets != IGNORE_INDEX)
    chosen = logits[places].astype(np.float64)
    largest = chosen.max(axis=1, initial=-math.inf)
    normalisers = largest + np.log(np.exp(chosen - largest[:, None]).sum(axis=1))
    return float((chosen[np.arange(len(places)), targets[places]] - normalisers).sum()), len(places)


def distinct_n(texts: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams of all texts together, as a share of their n-grams; 0.0 where no text has n tokens.

    Args:
        texts: Token ids of each text.
        n: Tokens of an n-gram.

    Source: Li et al. (2016), "A diversity-promoting objective function for neural conversation models".
    """
    grams = [gram for text in texts for gram in _n_grams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition_rate(texts: Sequence[Sequence[int]], n: int = 4) -> float:
    """Share of n-grams that occurred before in the same text, the mean over texts that have any; 0.0 where none has.

    Args:
        texts: Token ids of each text.
        n: Tokens of an n-gram.

    Source: Welleck et al. (2020), "Neural text generation with unlikelihood training", seq-rep-4.
    """
    shares = [1 - len(set(grams)) / len(grams) for text in texts if (grams := _n_grams(text, n))]
    return sum(shares) / len(shares) if shares else 0.0


def crossing_length(
    lengths: Sequence[int], student: Sequence[float | None], teacher: Sequence[float | None]
) -> float | None:
    """The length from which the student stays ahead: where the logarithm of student / teacher crosses zero.

    Args:
        lengths: Growing.
        student: Its speed at each, None where there is none.
        teacher: The teacher's.

    Returns:
        Interpolated linearly in the logarithms of length and of the ratio; the first length where the student is ahead
        from the start; None where it is not ahead at the last one, or nothing was measured.
    """
    points = [
        (length, math.log(ours / theirs))
        for length, ours, theirs in zip(lengths, student, teacher, strict=True)
        if ours and theirs
    ]
    if not points or points[-1][1] <= 0:
        return None
    behind = [index for index, (_, ratio) in enumerate(points) if ratio <= 0]
    if not behind:
        return float(points[0][0])
    (near, y0), (far, y1) = points[behind[-1]], points[behind[-1] + 1]
    return near * (far / near) ** (-y0 / (y1 - y0))


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
        result[f"top{one}_ci95"] = list(wilson_interval(right / len(labels), len(labels)))
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


def _n_grams(text: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(text[start : start + n]) for start in range(len(text) - n + 1)]


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
