"""Metrics with their intervals, for `Trainer`, for reports and as `evaluate.Metric`s that need no Hub.

Also what `cab_hf.report` asks of a language model beyond `cab_hf.evaluation`: associative recall and generation.

Shapes: `n` images or sequences, `t` token, `V` classes or vocabulary.
"""

import math
from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import EvalPrediction, PreTrainedModel

from cab_hf.data import IGNORE_INDEX
from cab_hf.evaluation import _batches, _effective_count, _evaluating, _logits, perplexity_of_sums


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
        share = sum(right) / sum(counts)
        independent = _effective_count(right, counts)
        return {
            "recall": share,
            "ci95": list(wilson_interval(share * independent, independent)),
            "n_tokens": sum(counts),
            "n_sequences": len(counts),
        }


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


def associative_recall(
    model: PreTrainedModel,
    vocabulary: int | Sequence[int],
    gap: int,
    *,
    pairs: int = 16,
    n: int = 32,
    seed: int = 0,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> dict[str, float | int | list[float]]:
    """Share of values that a model finds by their keys, shown earlier in its context.

    A sequence is `pairs` of a key and its value, all of them different random tokens, then `gap` random other tokens,
    then the pairs once more in another order. Counted are the values of the second showing, each right when it is the
    most likely token after its key. Unlike `copying_recall` the order does not help.

    Args:
        model: Any causal language model.
        vocabulary: Size of the vocabulary, or the token ids to draw from.
        gap: Tokens between the last pair and the first query.
        pairs: Keys, each with its value.
        n: Sequences.
        seed: Picks the tokens.
        batch_size: Sequences a forward pass.
        device: Where to move the model first; by default it stays where it is.
        progress: Show a progress bar.

    Returns:
        `recall`, its 95 % interval `ci95` as in `Recall`, `n_tokens` counted, `n_sequences`, `gap`, `pairs`.

    Raises:
        ValueError: `vocabulary` has not enough tokens, `pairs` or `n` is below 1, or `gap` is negative.

    Source: the task of Arora et al. (2023), "Zoology", there with queries at random distances.
    """
    pool = np.arange(vocabulary) if isinstance(vocabulary, int) else np.unique(np.asarray(vocabulary))
    if pairs < 1 or gap < 0 or n < 1:
        raise ValueError(f"pairs is {pairs}, gap {gap} and n {n}. They must be at least 1, 0 and 1.")
    needed = 2 * pairs + (gap > 0)
    if len(pool) < needed:
        raise ValueError(
            f"vocabulary has {len(pool)} tokens, fewer than the {needed} that {pairs} pairs and gap {gap} take. Use "
            "fewer pairs or more tokens."
        )
    generator = np.random.default_rng(seed)
    sequences = []
    for _ in range(n):
        shuffled = generator.permutation(pool)
        shown, others = shuffled[: 2 * pairs].reshape(pairs, 2), shuffled[2 * pairs :]
        filler = generator.choice(others, gap) if gap else others[:0]
        sequences.append(np.concatenate([shown.ravel(), filler, generator.permutation(shown).ravel()]))
    tokens = torch.from_numpy(np.stack(sequences))
    found = Recall(keep_in_memory=True)
    with _evaluating(model, device=device):
        title = f"Associative recall over a gap of {gap}"
        for batch in _batches(model, tokens, batch_size, None, "right", progress, title):
            keys = slice(-2 * pairs, None, 2)
            values = slice(1 - 2 * pairs, None, 2)
            found.add_batch(
                predictions=_logits(model, batch)[:, keys].argmax(-1).cpu().numpy(),
                references=batch["input_ids"][:, values].numpy(),
            )
    return found.compute() | {"gap": gap, "pairs": pairs}


def generate(
    model: PreTrainedModel, prompts: Tensor, new_tokens: int, batch_size: int = 8, seed: int = 0
) -> dict[str, dict[str, float | int]]:
    """How much a model repeats itself, greedily and sampled at temperature 1.

    Args:
        model: Any causal language model.
        prompts: Token ids (n, t), all real ones.
        new_tokens: Tokens of a continuation at most; one ends early where the model ends it.
        batch_size: Prompts at a time.
        seed: Of the random draws; the global random state is left alone.

    Returns:
        Under `greedy` and `sampled`: `repetition_rate` of 4-grams, `distinct_1`, `distinct_2`, `distinct_3`,
        `n_tokens` made and `n_texts`.
    """
    # Always given: a teacher's own generation config may penalise repetition or sample.
    ways = {
        "greedy": {"do_sample": False, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0},
        "sampled": {
            "do_sample": True,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "repetition_penalty": 1.0,
            "no_repeat_ngram_size": 0,
        },
    }
    ends = np.atleast_1d(model.generation_config.eos_token_id or [])
    devices = [model.device] if model.device.type == "cuda" else []
    report = {}
    for way, options in ways.items():
        texts = []
        with _evaluating(model), torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            for start in tqdm(range(0, len(prompts), batch_size), desc=f"Generating ({way})"):
                batch = prompts[start : start + batch_size].to(model.device)
                out = model.generate(
                    batch,
                    attention_mask=torch.ones_like(batch),
                    max_new_tokens=new_tokens,
                    pad_token_id=int(ends[0]) if len(ends) else 0,
                    **options,
                )
                texts += [_before_end(row, ends) for row in out[:, batch.shape[1] :].tolist()]
        report[way] = {
            "repetition_rate": repetition_rate(texts),
            **{f"distinct_{size}": distinct_n(texts, size) for size in (1, 2, 3)},
            "n_tokens": sum(map(len, texts)),
            "n_texts": len(texts),
        }
    return report


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


def wilson_interval(right: float, n: float) -> tuple[float, float]:
    """95 % Wilson interval of a share `right / n`; it stays inside [0, 1] and has a width at 0 and 1 too.

    Source: Wilson (1927), "Probable inference, the law of succession, and statistical inference".
    """
    share, weight = right / n, _Z95**2 / n
    middle = (share + weight / 2) / (1 + weight)
    half = _Z95 * math.sqrt(share * (1 - share) / n + weight / (4 * n)) / (1 + weight)
    return max(0.0, middle - half), min(1.0, middle + half)


def _before_end(row: list[int], ends: Sequence[int]) -> list[int]:
    return row[: next((place for place, token in enumerate(row) if token in ends), len(row))]


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
