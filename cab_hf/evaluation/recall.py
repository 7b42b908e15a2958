"""What a model finds again in its context: copying, associative recall, and needles in a text.

Shapes: `b` batch, `t` token.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cab_hf.evaluation.language import batches_of, logits_in_pieces
from cab_hf.evaluation.metrics import Recall, recall_of_counts
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


def needle_recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Tensor,
    length: int,
    *,
    needles: int = 1,
    n: int = 64,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
) -> dict[str, float | int | list[float]]:
    """Share of numbers that a model finds in a text, each asked for by the word that it was given to.

    A sequence is a text in which sentences like " The magic number of the river is 4817350." were put, and at its end
    " Again: the magic number of the river is" with the number, for each of the words in another order. A number is
    found when each of its tokens is the most likely one given all (true) tokens before it, so that greedy generation
    would write it. One needle lies at another depth in each sequence, from the beginning to the end; several lie at
    even distances.

    Args:
        model: Any causal language model.
        tokenizer: Its tokenizer.
        text: Token ids (t,) of a text, each sequence another stretch of it; a short one is repeated.
        length: Tokens of a sequence.
        needles: Sentences of a sequence, at most 32.
        n: Sequences.
        seed: Picks words and numbers.
        batch_size: Sequences a forward pass.
        progress: Show a progress bar.

    Returns:
        `recall`, its 95 % interval `ci95` as in `Recall`, `n_needles` counted, `n_sequences`, `length`, `needles`.

    Raises:
        ValueError: `length` is too small for the sentences, or there is no text.

    Source: the tasks of Hsieh et al. (2024), "RULER", there with other sentences and by generation.
    """
    if not len(text):
        raise ValueError("text has no tokens. Give some in which the needles can be hidden.")
    generator = np.random.default_rng(seed)
    sequences, asked = [], []  # asked: of each sequence, the spans of its numbers
    for index in range(n):
        words = generator.choice(_WORDS, needles, replace=False)
        numbers = {str(word): str(generator.integers(10**6, 10**7)) for word in words}
        hidden = [_tokens(tokenizer, f" The magic number of the {word} is {numbers[word]}.") for word in numbers]
        tail, spans = [], []
        for word in generator.permutation(words):
            question = f" Again: the magic number of the {word} is"
            whole, start = _tokens(tokenizer, f"{question} {numbers[word]}"), len(_tokens(tokenizer, question))
            spans.append((len(tail) + start, len(tail) + len(whole)))
            tail += whole + _tokens(tokenizer, ".")
        room = length - len(tail) - sum(map(len, hidden))
        if room < 0:
            raise ValueError(f"length is {length}, but the sentences alone take {length - room} tokens. Give more.")
        offset = index * max(len(text) // n, 1)
        filler = text[torch.arange(offset, offset + room) % len(text)].tolist()
        depths = [index / max(n - 1, 1)] if needles == 1 else [(one + 0.5) / needles for one in range(needles)]
        places = [0, *(round(depth * room) for depth in depths), room]
        row: list[int] = []
        for before, after, sentence in zip(places, places[1:], [*hidden, []]):
            row += filler[before:after] + sentence
        sequences.append(row + tail)
        asked.append([(start - len(tail), end - len(tail)) for start, end in spans])
    keep = 1 - min(start for spans in asked for start, _ in spans)
    tokens, right = torch.tensor(sequences), []
    title = f"{needles} needle{'s' * (needles > 1)} in {length} tokens"
    with evaluating(model):
        for batch in batches_of(model, tokens, batch_size, None, "right", progress, title):
            rows = batch["input_ids"]
            predicted = _likeliest_after(model, rows, keep).to(rows.device)  # (b, keep)
            for row, likeliest in zip(rows, predicted):
                spans = asked[len(right)]
                found = [row[start:end].equal(likeliest[start - 1 : end - 1]) for start, end in spans]
                right.append(sum(found))
    report = recall_of_counts(right, [needles] * n)
    report["n_needles"] = report.pop("n_tokens")
    return report | {"length": length, "needles": needles}


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


_WORDS = (
    "apple bridge candle desert engine forest garden hammer island jacket kitchen lantern mirror needle orange pencil "
    "queen river saddle table umbrella valley window yellow anchor bottle castle doctor eagle flower glove harbour"
).split()


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
            predicted = _likeliest_after(model, tokens, -asked.start)[:, asked]
            metric.add_batch(predictions=predicted.tolist(), references=tokens[:, answers].tolist())
    return metric.compute()


def _likeliest_after(model: PreTrainedModel, tokens: Tensor, keep: int) -> Tensor:
    """The likeliest token after each of the last `keep` tokens of rows (b, t)."""
    pieces = logits_in_pieces(model, tokens, tokens.shape[1] - keep)
    return torch.cat([logits.argmax(-1) for _, logits in pieces], dim=1)
