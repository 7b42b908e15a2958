"""Rows with repeated spans: what repeats, what stays, and that a seed decides it."""

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from cab_hf.data.packing import IGNORE_INDEX
from cab_hf.data.repeats import LONGEST, SHORTEST, insert_repeats
from cab_hf.recipes import parse_recipe
from cab_hf.runs.text import load_blocks
from cab_hf.teachers.demo import random_llama


SMOKE = Path(__file__).parents[2] / "training_args/smoke.yaml"


def rows(count: int, length: int) -> Dataset:
    """Rows of tokens that are all different, of two documents each."""
    ids = [list(range(1000 + row * length, 1000 + (row + 1) * length)) for row in range(count)]
    half = length // 2
    documents = [0] * half + [1] * (length - half)
    positions = [*range(half), *range(length - half)]
    labels = [[IGNORE_INDEX, *row[1:half], IGNORE_INDEX, *row[half + 1 :]] for row in ids]
    return Dataset.from_dict(
        {
            "input_ids": ids,
            "labels": labels,
            "seq_idx": [documents] * count,
            "position_ids": [positions] * count,
        }
    )


def repeats(ids: list[int]) -> list[tuple[int, int]]:
    """(place, distance to its repeat) of each token that comes again, the tokens of the rows being different."""
    last, found = {}, []
    for place, token in enumerate(ids):
        if token in last:
            found.append((last[token], place - last[token]))
        last[token] = place
    return found


@pytest.mark.parametrize("length", [17, 18, 64, 512])
def test_chosen_rows_hold_spans_that_come_again(length):
    blocks = rows(40, length)
    changed = insert_repeats(blocks, 1.0, range(10_000_000), seed=3)
    distances, random_spans = [], 0
    for before, row in zip(blocks, changed):
        assert {name: len(values) for name, values in row.items()} == dict.fromkeys(before, length)
        found = repeats(row["input_ids"])
        assert len(found) >= SHORTEST
        # Neighbours repeat at one distance: a run of them is a span.
        runs = np.split([distance for _, distance in found], 1 + np.flatnonzero(np.diff([d for _, d in found])))
        for run in runs:
            assert len(run) >= SHORTEST and run[0] > len(run) or len(runs) > 1
            assert len(run) <= LONGEST or length < LONGEST
            distances.append(run[0])
        random_spans += any(a != b for a, b in zip(row["input_ids"][:SHORTEST], before["input_ids"]))
        assert row["labels"] == [IGNORE_INDEX, *row["input_ids"][1:]]
        assert set(row["seq_idx"]) == {0} and row["position_ids"] == list(range(length))
    assert 8 < random_spans < 32
    assert min(distances) >= SHORTEST + 1 and max(distances) < length


def test_the_share_is_drawn_by_seed_and_the_rest_is_left_alone():
    blocks = rows(200, 32)
    changed = insert_repeats(blocks, 0.25, range(50), seed=0)
    kept = [before == after for before, after in zip(blocks, changed)]
    assert 130 < sum(kept) < 170
    assert list(changed) == list(insert_repeats(blocks, 0.25, range(50), seed=0))
    assert list(changed) != list(insert_repeats(blocks, 0.25, range(50), seed=1))
    # A row's own draw does not depend on how many rows there are.
    assert list(insert_repeats(blocks.select(range(20)), 0.25, range(50), seed=0)) == list(changed)[:20]
    assert insert_repeats(blocks, 0.0, [], seed=0) is blocks


def test_columns_of_running_text_stay_two():
    blocks = rows(3, 32).select_columns(["input_ids", "labels"])
    assert insert_repeats(blocks, 1.0, range(50)).column_names == ["input_ids", "labels"]


@pytest.mark.parametrize(
    ("length", "fraction", "tokens", "message"),
    [
        (32, 1.5, [1], "fraction is 1.5, outside"),
        (32, 0.5, [], "tokens is empty"),
        (16, 0.5, [1], "Rows have 16 tokens.*take 17"),
    ],
)
def test_bad_arguments(length, fraction, tokens, message):
    with pytest.raises(ValueError, match=message):
        insert_repeats(rows(2, length), fraction, tokens)


def test_a_recipe_repeats_spans_in_training_rows_alone(tmp_path):
    model, tokenizer = random_llama()
    recipes = [parse_recipe([str(SMOKE), "--repeat_fraction", fraction]) for fraction in ("0", "0.5")]
    plain, repeating = (
        load_blocks(one.data, tokenizer, model, one.args, tmp_path / str(index)) for index, one in enumerate(recipes)
    )
    changed = [before != after for before, after in zip(plain[0], repeating[0])]
    assert 0.3 < sum(changed) / len(changed) < 0.7
    for name, blocks in plain[1].items():
        assert list(blocks) == list(repeating[1][name])
