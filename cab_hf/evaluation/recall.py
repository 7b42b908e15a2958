"""What a model finds again in its context: copying and associative recall.

Shapes: `b` batch, `t` token.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cab_hf.evaluation.language import batches_of, logits_in_pieces
from cab_hf.evaluation.metrics import Recall
from cab_hf.inference import evaluating


def copying_recall(
    model: PreTrainedModel,
    vocabulary: int | Sequence[int],
    gap: int,
    *,
    length: int = 64,
    n: int = 32,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
) -> dict[str, float | int | list[float]]:
    """Share of tokens that a model copies from earlier in its context, which perplexity does not show.

    A sequence is `length` different random tokens, `gap` random other tokens, and the first `length` tokens again.
    Counted are the tokens of the repeat but its first, which nothing announces: `length - 1` a sequence, each right
    when it is the most likely one given all (true) tokens before it.

    Args:
        model: Any causal language model.
        vocabulary: Size of the vocabulary, or the token ids to draw from (to leave out special tokens, for instance).
        gap: Tokens between the two copies.
        length: Tokens to copy.
        n: Sequences.
        seed: Picks the tokens.
        batch_size: Sequences a forward pass.
        progress: Show a progress bar.

    Returns:
        `recall`, its 95 % interval `ci95` (Wilson, for the number of independent tokens that the spread between
        sequences speaks for), `n_tokens` counted, `n_sequences`, `gap`, `length`.

    Raises:
        ValueError: `vocabulary` has not enough tokens.
    """
    pool = _pool(vocabulary, length + (gap > 0))
    generator = np.random.default_rng(seed)
    sequences = []
    for _ in range(n):
        shuffled = generator.permutation(pool)
        copied, others = shuffled[:length], shuffled[length:]
        filler = generator.choice(others, gap) if gap else others[:0]
        sequences.append(np.concatenate([copied, filler, copied]))
    asked, answers = slice(-length, -1), slice(1 - length, None)
    found = _recall(model, sequences, asked, answers, f"Recall over a gap of {gap}", batch_size, progress)
    return found | {"gap": gap, "length": length}


def associative_recall(
    model: PreTrainedModel,
    vocabulary: int | Sequence[int],
    gap: int,
    *,
    pairs: int = 16,
    n: int = 32,
    seed: int = 0,
    batch_size: int = 8,
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
        progress: Show a progress bar.

    Returns:
        `recall`, its 95 % interval `ci95` as in `Recall`, `n_tokens` counted, `n_sequences`, `gap`, `pairs`.

    Raises:
        ValueError: `vocabulary` has not enough tokens.

    Source: the task of Arora et al. (2023), "Zoology", there with queries at random distances.
    """
    pool = _pool(vocabulary, 2 * pairs + (gap > 0))
    generator = np.random.default_rng(seed)
    sequences = []
    for _ in range(n):
        shuffled = generator.permutation(pool)
        shown, others = shuffled[: 2 * pairs].reshape(pairs, 2), shuffled[2 * pairs :]
        filler = generator.choice(others, gap) if gap else others[:0]
        sequences.append(np.concatenate([shown.ravel(), filler, generator.permutation(shown).ravel()]))
    keys, values = slice(-2 * pairs, None, 2), slice(1 - 2 * pairs, None, 2)
    title = f"Associative recall over a gap of {gap}"
    found = _recall(model, sequences, keys, values, title, batch_size, progress)
    return found | {"gap": gap, "pairs": pairs}


def _pool(vocabulary: int | Sequence[int], needed: int) -> np.ndarray:
    pool = np.arange(vocabulary) if isinstance(vocabulary, int) else np.unique(np.asarray(vocabulary))
    if len(pool) < needed:
        raise ValueError(f"vocabulary has {len(pool)} tokens, fewer than the {needed} that a sequence takes.")
    return pool


def _recall(
    model: PreTrainedModel,
    sequences: Sequence[np.ndarray],
    asked: slice,
    answers: slice,
    title: str,
    batch_size: int,
    progress: bool,
) -> dict[str, float | int | list[float]]:
    """How often the likeliest token after those at `asked` is the one at `answers`, in sequences of one length."""
    tokens, metric = torch.from_numpy(np.stack(sequences)), Recall(keep_in_memory=True)
    with evaluating(model):
        for batch in batches_of(model, tokens, batch_size, None, "right", progress, title):
            tokens = batch["input_ids"]
            # What is asked stands at the end of the row, so that a place counts from there.
            predicted = likeliest_after(model, tokens, -asked.start)[:, asked]
            metric.add_batch(predictions=predicted.tolist(), references=tokens[:, answers].tolist())
    return metric.compute()


def likeliest_after(model: PreTrainedModel, tokens: Tensor, keep: int) -> Tensor:
    """The likeliest token after each of the last `keep` tokens of rows (b, t)."""
    pieces = logits_in_pieces(model, tokens, tokens.shape[1] - keep)
    return torch.cat([logits.argmax(-1) for _, logits in pieces], dim=1)
