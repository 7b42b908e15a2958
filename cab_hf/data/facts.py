"""Text to learn finding from: rows are told facts, and asked for them further on.

What a student must find in its context is one of several things, far back. Plain text hardly asks for that, and
repeated spans ask for what comes next, not for what belongs to a name.

Shape legend: `t` token.
"""

import re
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from cab_hf.data.packing import IGNORE_INDEX
from cab_hf.data.repeats import log_uniform


MOST = 16
FEWEST_WORDS = 256

# Words that an evaluation asks for (`cab_hf.evaluation.needles`), so no training row is given them.
NEEDLE_WORDS = (
    "apple bridge candle desert engine forest garden hammer island jacket kitchen lantern mirror needle orange pencil "
    "queen river saddle table umbrella valley window yellow anchor bottle castle doctor eagle flower glove harbour"
).split()


class Form(NamedTuple):
    """How a value is told and asked for. Both strings hold `{key}`, and `{value}` after it."""

    told: str
    asked: str


FORMS = (
    Form(" The code of the {key} is {value}.", " What is the code of the {key}? {value}."),
    Form(" In this text, {key} stands for {value}.", " As was said, {key} stands for {value}."),
    Form(" My password for {key} is {value}.", " Which password do I have for {key}? It is {value}."),
    Form(" To open the {key} box, dial {value}.", " You want to open the {key} box, so dial {value}."),
    Form("\n{key} = {value}\n", "\n{key} = {value}\n"),
    Form('\n{{"name": "{key}", "value": "{value}"}}\n', '\n{{"name": "{key}", "value": "{value}"}}\n'),
    Form("\nRoom {key}: {value}\n", "\nRoom {key}: {value}\n"),
    Form("\n| {key} | {value} |\n", "\n| {key} | {value} |\n"),
)


def insert_facts(blocks: Dataset, fraction: float, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0) -> Dataset:
    """Writes facts, and questions for them, over text of a share of packed rows; the other rows stay as they are.

    A fact ties a key to a value, as in " The code of the copper is 48213.". A question has the key's words and the
    value again, as in " What is the code of the copper? 48213.". A chosen row has 1 to 16 facts, log-uniformly many,
    but fewer where they would take more than half of it. All are of one form of eight, with different keys. Keys are
    words of the vocabulary. Values are numbers of 3 to 8 digits, or such words. In half of the rows the facts lie at
    random places and all questions stand at the end, in an order of their own. In the others, gaps between a fact and
    its question are uniform, as what is near is found soonest. The row becomes one document, since no state crosses a
    document's border.

    `needle_recall` and `key_value_recall` ask for what was not trained on: no form here is one of theirs, and no key
    or value has one of their 32 words in it. The rows' own text is not searched for these.

    `insert_repeats` with the same seed changes none of these rows while both shares add up to at most 1.

    Args:
        blocks: Rows of `pack_documents`.
        fraction: Share of the rows, drawn by the seed.
        tokenizer: The one that made the rows.
        seed: Picks rows, places and facts; a row's are its own whatever the other rows are.

    Returns:
        Rows of the same columns and length. A shorter last row without room for a question stays as it is.

    Raises:
        ValueError: `fraction` outside [0, 1], rows too short for a fact and its question, or a tokenizer that can't
            write them.

    Example:
        >>> from cab_hf.teachers.demo import random_llama
        >>> tokenizer = random_llama()[1]
        >>> dots = tokenizer("." * 100)["input_ids"]
        >>> (row,) = insert_facts(Dataset.from_dict({"input_ids": [dots], "labels": [dots]}), 1.0, tokenizer, seed=1)
        >>> tokenizer.decode(row["input_ids"])
        '.............. The code of the sipo is nipi..................... What is the code of the sipo? nipi.'
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction is {fraction}, outside [0, 1]. Give the share of rows; 0 leaves them all alone.")
    if fraction == 0.0:
        return blocks
    words = fact_words(tokenizer)
    _check_room(len(blocks[0]["input_ids"]), words, tokenizer)
    changed = blocks.with_format("arrow").map(
        _insert,
        with_indices=True,
        batched=True,
        batch_size=100,
        fn_kwargs={"fraction": fraction, "tokenizer": tokenizer, "words": words, "seed": seed},
        features=blocks.features,
        desc="Inserting facts",
    )
    return changed.with_format(blocks.format["type"])


def fact_words(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What facts are made of: words of four lower-case letters or more that are one token after a space.

    A vocabulary with too few of them gives pairs of syllables instead. None holds a word of `NEEDLE_WORDS`.
    """
    # A token with at most a sign for a space before its letters. Twice, it shows whether that sign is there.
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    twice = [[index] * 2 for index, token in enumerate(tokens) if re.fullmatch(".?[a-z]{4,}", str(token))]
    found = (re.fullmatch(" ?([a-z]+) \\1", text) for text in tokenizer.batch_decode(twice))
    held_out = re.compile("|".join(NEEDLE_WORDS))
    words = {match[1] for match in found if match and not held_out.search(match[1])}
    if len(words) < FEWEST_WORDS:
        syllables = list(map("".join, product("bdfgklmnprstvz", "aeiou")))
        words = set(map("".join, product(syllables, repeat=2)))
    return sorted(words)


def _check_room(length: int, words: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses rows without room for the longest fact and its question, and a tokenizer without tokens for them."""
    word, number = max(words, key=len), "12345678"
    pairs = [
        form.told.format(key=word, value=value) + form.asked.format(key=word, value=value)
        for form in FORMS
        for value in (word, number)
    ]
    rows = _encode(pairs, tokenizer)
    for pair, text in zip(pairs, tokenizer.batch_decode(rows)):
        read = "".join(text.split())
        if any(read.count(part) < pair.count(part) for part in (word, number)):
            raise ValueError(f"tokenizer makes {text!r} of {pair!r}, so it can't write facts. Use fraction=0.")
    longest = max(map(len, rows))
    if length < longest:
        raise ValueError(
            f"Rows have {length} tokens, and a fact and its question take up to {longest}. Use a larger block_size, "
            "or fraction=0."
        )


def _insert(
    table: pa.Table,
    indices: Sequence[int],
    fraction: float,
    tokenizer: PreTrainedTokenizerBase,
    words: Sequence[str],
    seed: int,
) -> pa.Table:
    """All facts of a batch of rows are tokenised in one call, which is what takes the time."""
    chosen, texts = [], []
    for place, index in enumerate(indices):
        generator = np.random.default_rng([seed, index])
        # `insert_repeats` takes the rows at the low end of the same draw.
        if generator.random() < 1 - fraction:
            continue
        count = log_uniform(generator, 1, MOST)
        chosen.append((place, generator, count))
        texts += _facts(generator, count, words)
    pieces = iter(_encode(texts, tokenizer))
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    offsets = columns["input_ids"].offsets.to_numpy()
    offsets = offsets - offsets[0]
    values = {name: column.flatten().to_numpy().copy() for name, column in columns.items()}
    for place, generator, count in chosen:
        pairs = [(next(pieces), next(pieces)) for _ in range(count)]
        row = slice(offsets[place], offsets[place + 1])
        ids = values["input_ids"][row]
        if not _write(ids, pairs, generator):
            continue
        labels = ids.copy()
        labels[0] = IGNORE_INDEX
        changed = {"labels": labels, "seq_idx": 0, "position_ids": np.arange(len(ids))}
        for name in changed.keys() & values.keys():
            values[name][row] = changed[name]
    return pa.table(
        {
            name: pa.ListArray.from_arrays(pa.array(offsets), pa.array(values[name]), type=column.type)
            for name, column in columns.items()
        }
    )


def _facts(generator: np.random.Generator, count: int, words: Sequence[str]) -> list[str]:
    """Facts of one form, each followed by its question."""
    form = FORMS[generator.integers(len(FORMS))]
    drawn = [words[at] for at in generator.choice(len(words), 2 * count, replace=False)]
    keys, values = drawn[:count], drawn[count:]
    if generator.random() < 0.5:
        digits = int(generator.integers(3, 9))
        values = generator.integers(10 ** (digits - 1), 10**digits, count)
    return [text.format(key=key, value=value) for key, value in zip(keys, values) for text in form]


def _write(ids: np.ndarray, pairs: Sequence[tuple[list[int], list[int]]], generator: np.random.Generator) -> bool:
    """Writes facts and questions over a row (t,), as many as fit into half of it, or else one; False without room."""
    sizes = np.cumsum([len(told) + len(asked) for told, asked in pairs])
    pairs = pairs[: max(1, int((sizes <= len(ids) // 2).sum()))]
    room = len(ids) - int(sizes[len(pairs) - 1])  # tokens of text that stay
    if room < 0:
        return False
    # Of each piece: the tokens of text before it, and its rank among pieces that have as many.
    placed = []
    at_the_end = generator.random() < 0.5
    for rank, (told, asked) in zip(generator.permutation(len(pairs)), pairs):
        gap = 0 if at_the_end else int(generator.integers(0, room, endpoint=True))
        place = int(generator.integers(0, room - gap, endpoint=True))
        placed += [(place, -1, told), (room if at_the_end else place + gap, int(rank), asked)]
    begin = passed = 0
    for place, _, piece in sorted(placed, key=lambda one: one[:2]):
        begin += place - passed
        ids[begin : begin + len(piece)] = piece
        begin, passed = begin + len(piece), place
    return True


def _encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
