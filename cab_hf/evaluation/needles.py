"""What a model finds again in a text: needles, and the values of keys.

Both are asked for in words, as models read them in training; random tokens are in `recall`. Shapes: `b` batch, `t`
token.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cab_hf.data.facts import NEEDLE_WORDS
from cab_hf.evaluation.language import batches_of
from cab_hf.evaluation.metrics import recall_of_counts
from cab_hf.evaluation.recall import likeliest_after
from cab_hf.inference import evaluating


class _Form(NamedTuple):
    """How a number is told and asked for: the words before it, with the place of its key, what follows it, digits."""

    told: str
    asked: str
    end: str
    digits: int


class Rows(NamedTuple):
    """Sequences that ask for numbers.

    Attributes:
        tokens: (sequences, t).
        asked: of each sequence the spans of its numbers, counted from its end.
    """

    tokens: Tensor
    asked: list[list[tuple[int, int]]]


_SENTENCE = _Form(" The magic number of the {} is", " Again: the magic number of the {} is", ".", 7)
_LINE = _Form("\n{}:", "\n{}:", "", 4)


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
        `recall`, its 95 % interval `ci95` as in `Recall`, `n_needles` counted, `n_sequences`, `length`.

    Raises:
        ValueError: `length` is too small for the sentences, there is no text, or there are too many needles.

    Source: the tasks of Hsieh et al. (2024), "RULER", there with other sentences and by generation.
    """
    rows = needle_rows(tokenizer, text, length, needles=needles, n=n, seed=seed)
    return _found(model, rows, batch_size, progress, f"{needles} needle{'s' * (needles > 1)} in {length} tokens")


def needle_rows(
    tokenizer: PreTrainedTokenizerBase, text: Tensor, length: int, *, needles: int = 1, n: int = 64, seed: int = 0
) -> Rows:
    """The sequences of `needle_recall`, with its arguments and errors."""
    depths = np.linspace(0, 1, n)[:, None] if needles == 1 else np.tile((np.arange(needles) + 0.5) / needles, (n, 1))
    return _rows(tokenizer, text, length, _SENTENCE, depths, seed)


def key_value_recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Tensor,
    length: int,
    *,
    pairs: int = 8,
    n: int = 32,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
) -> dict[str, float | int | list[float]]:
    """Share of numbers that a model finds by their keys, all of which stand before a text.

    A sequence is lines like "river: 4817", then a text, then the same lines in another order. A number is found as in
    `needle_recall`.

    Args:
        model, tokenizer, text, length, n, seed, batch_size, progress: As in `needle_recall`.
        pairs: Lines, at most 32.

    Returns:
        As `needle_recall`.

    Raises:
        ValueError: As `needle_recall`.
    """
    rows = key_value_rows(tokenizer, text, length, pairs=pairs, n=n, seed=seed)
    return _found(model, rows, batch_size, progress, f"{pairs} pairs before a text, {length} tokens")


def key_value_rows(
    tokenizer: PreTrainedTokenizerBase, text: Tensor, length: int, *, pairs: int = 8, n: int = 32, seed: int = 0
) -> Rows:
    """The sequences of `key_value_recall`, with its arguments and errors."""
    return _rows(tokenizer, text, length, _LINE, np.zeros((n, pairs)), seed)


def _rows(
    tokenizer: PreTrainedTokenizerBase, text: Tensor, length: int, form: _Form, depths: np.ndarray, seed: int
) -> Rows:
    """Numbers that are put into texts at depths (sequences, numbers), from 0 to 1, growing."""
    if not len(text):
        raise ValueError("text has no tokens. Give some in which the needles can be hidden.")
    n, count = depths.shape
    if count > len(NEEDLE_WORDS):
        raise ValueError(f"There are {count} numbers to find, and {len(NEEDLE_WORDS)} words for them. Ask for fewer.")
    generator = np.random.default_rng(seed)
    begins = [tokenizer.bos_token_id] if tokenizer("")["input_ids"] == [tokenizer.bos_token_id] else []
    sequences, asked = [], []
    for index in range(n):
        words = generator.choice(NEEDLE_WORDS, count, replace=False)
        numbers = dict(zip(words, generator.integers(10 ** (form.digits - 1), 10**form.digits, count)))
        hidden = [_tokens(tokenizer, f"{form.told.format(word)} {numbers[word]}{form.end}") for word in words]
        tail, spans = [], []
        for word in generator.permutation(words):
            question = form.asked.format(word)
            whole = _tokens(tokenizer, f"{question} {numbers[word]}")
            spans.append((len(tail) + len(_tokens(tokenizer, question)), len(tail) + len(whole)))
            tail += whole + _tokens(tokenizer, form.end)
        if not form.end:  # else the text may go on with the last number
            hidden[-1] = hidden[-1] + _tokens(tokenizer, "\n")
        room = length - len(begins) - len(tail) - sum(map(len, hidden))
        if room < 0:
            raise ValueError(f"length is {length}, but what is told and asked takes {length - room} tokens. Use more.")
        place = index * max(len(text) // n, 1)
        filler = text[torch.arange(place, place + room) % len(text)].tolist()
        places = [0, *(round(depth * room) for depth in depths[index]), room]
        row = list(begins)
        for before, after, told in zip(places, places[1:], [*hidden, []]):
            row += filler[before:after] + told
        sequences.append(row + tail)
        asked.append([(start - len(tail), end - len(tail)) for start, end in spans])
    return Rows(torch.tensor(sequences), asked)


def _found(
    model: PreTrainedModel, rows: Rows, batch_size: int, progress: bool, title: str
) -> dict[str, float | int | list[float]]:
    """Recall of the numbers of rows."""
    keep = 1 - min(start for spans in rows.asked for start, _ in spans)
    right = []
    with evaluating(model):
        for batch in batches_of(model, rows.tokens, batch_size, None, "right", progress, title):
            predicted = likeliest_after(model, batch["input_ids"], keep).cpu()  # (b, keep)
            for row, likeliest in zip(batch["input_ids"], predicted):
                spans = rows.asked[len(right)]
                right.append(
                    sum(row[start : end or None].equal(likeliest[start - 1 : end - 1]) for start, end in spans)
                )
    report = recall_of_counts(right, list(map(len, rows.asked)))
    report["n_needles"] = report.pop("n_tokens")
    return report | {"length": rows.tokens.shape[1]}


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
