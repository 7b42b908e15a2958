"""Rows with facts and questions: what is told, asked, and left alone, and that no evaluation asks for the same."""

import json
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from cab_hf.data.facts import FORMS, MOST, NEEDLE_WORDS, fact_words, insert_facts
from cab_hf.data.packing import IGNORE_INDEX
from cab_hf.data.repeats import insert_repeats
from cab_hf.evaluation import needles
from cab_hf.recipes import parse_recipe
from cab_hf.runs.text import load_blocks
from cab_hf.teachers.demo import random_llama


SMOKE = Path(__file__).parents[2] / "training_args/smoke.yaml"
BYTES = random_llama()[1]  # a character is a token, so places in a text are places in a row
FILLER = "~"
WORDS = ["".join(one) + "ion" for one in product("bdfgklm", "aeo", "lmnr", "aeiou")]


def rows(count: int, length: int, tokenizer=BYTES) -> Dataset:
    """Rows of two documents of nothing but filler."""
    filler = tokenizer.convert_tokens_to_ids(FILLER)
    half = length // 2
    labels = [IGNORE_INDEX, *[filler] * (half - 1), IGNORE_INDEX, *[filler] * (length - half - 1)]
    return Dataset.from_dict(
        {
            "input_ids": [[filler] * length] * count,
            "labels": [labels] * count,
            "seq_idx": [[0] * half + [1] * (length - half)] * count,
            "position_ids": [[*range(half), *range(length - half)]] * count,
        }
    )


def pattern(text: str) -> str:
    """A form as a regular expression with the groups 1, its key, and 2, its value."""
    return re.escape(text.format(key="KEY", value="VALUE")).replace("KEY", "([a-z]+)").replace("VALUE", "([a-z0-9]+)")


def read(text: str) -> tuple[int, dict[str, list[tuple[int, str]]], str]:
    """The form of a row's facts; by key, (place, value) each time that it stands there; and the rest of the text."""
    found = [[match for one in {*form} for match in re.finditer(pattern(one), text)] for form in FORMS]
    (index,) = (index for index, matches in enumerate(found) if matches)
    form = FORMS[index]
    keys, rest = {}, list(text)
    for match in sorted(found[index], key=lambda one: one.start()):
        keys.setdefault(match[1], []).append((match.start(), match[2]))
        rest[match.start() : match.end()] = [""] * (match.end() - match.start())
    for key, ((place, _), *_) in keys.items():
        assert re.match(pattern(form.told), text[place:])[1] == key
        assert re.match(pattern(form.asked), text[keys[key][-1][0] :])[1] == key
    return index, keys, "".join(rest)


@pytest.mark.parametrize("length", [86, 100, 512, 2048])
def test_chosen_rows_tell_facts_and_ask_for_them(length):
    before = rows(120, length)
    forms, counts, kinds = set(), [], set()
    for row in insert_facts(before, 1.0, BYTES, seed=3):
        assert {name: len(values) for name, values in row.items()} == dict.fromkeys(before.column_names, length)
        form, keys, rest = read(BYTES.decode(row["input_ids"]))
        assert set(rest) <= {FILLER}
        for (told, value), (asked, again) in keys.values():  # twice each, else this can't be unpacked
            assert told < asked and value == again
        values = [one[0][1] for one in keys.values()]
        assert all(3 <= len(value) <= 8 for value in values)
        assert len({len(value) if value.isdigit() else "word" for value in values}) == 1
        assert len(keys) == 1 or len(rest) >= length // 2
        forms.add(form)
        counts.append(len(keys))
        kinds.add(values[0].isdigit())
        assert row["labels"] == [IGNORE_INDEX, *row["input_ids"][1:]]
        assert set(row["seq_idx"]) == {0} and row["position_ids"] == list(range(length))
    assert forms == set(range(len(FORMS))) and kinds == {False, True}
    assert min(counts) == 1 and max(counts) <= MOST
    if length == 2048:  # log-uniform: half of them up to 4
        assert max(counts) > 12 and 3 <= np.median(counts) <= 6


def test_questions_are_near_and_far():
    length = 4096
    ends, gaps, reordered = 0, [], 0
    for row in insert_facts(rows(300, length), 1.0, BYTES, seed=0):
        text = BYTES.decode(row["input_ids"])
        keys = read(text)[1]
        told, asked = ([key for _, key in sorted((one[at][0], key) for key, one in keys.items())] for at in (0, 1))
        first = min(one[1][0] for one in keys.values())
        if FILLER in text[first:]:
            gaps += [text[told[0] : asked[0]].count(FILLER) for told, asked in keys.values()]
        else:
            ends += 1
            reordered += told != asked
            assert max(one[0][0] for one in keys.values()) < first
    assert 110 < ends < 190
    assert 0.5 * ends < reordered < ends
    # uniform over the filler, which is most of a row
    assert min(gaps) < 0.01 * length and max(gaps) > 0.8 * length
    assert 0.42 < np.mean(np.array(gaps) < 0.45 * length) < 0.58


def test_the_share_is_drawn_by_seed_and_the_rest_is_left_alone():
    blocks = rows(200, 100)
    changed = insert_facts(blocks, 0.25, BYTES, seed=0)
    kept = [before == after for before, after in zip(blocks, changed)]
    assert 130 < sum(kept) < 170
    assert list(changed) == list(insert_facts(blocks, 0.25, BYTES, seed=0))
    assert list(changed) != list(insert_facts(blocks, 0.25, BYTES, seed=1))
    # A row's own draw does not depend on how many rows there are.
    assert list(insert_facts(blocks.select(range(120)), 0.25, BYTES, seed=0)) == list(changed)[:120]
    assert insert_facts(blocks, 0.0, None) is blocks


def test_no_row_is_given_repeats_as_well():
    blocks = rows(300, 100)
    facts, repeats = insert_facts(blocks, 0.4, BYTES, seed=5), insert_repeats(blocks, 0.6, range(50), seed=5)
    by_facts, by_repeats = ([one["seq_idx"] != blocks[0]["seq_idx"] for one in rows] for rows in (facts, repeats))
    assert [one + other for one, other in zip(by_facts, by_repeats)] == [1] * 300
    both = insert_repeats(facts, 0.6, range(50), seed=5)
    assert list(both) == [one if has_facts else other for one, other, has_facts in zip(facts, repeats, by_facts)]


def test_columns_types_and_a_short_last_row_stay():
    blocks = rows(3, 100).select_columns(["input_ids", "labels"])
    filler = blocks[0]["input_ids"][:5]
    short = Dataset.from_dict(
        {name: [*blocks[name], filler] for name in blocks.column_names}, features=blocks.features
    ).select([1, 2, 3])
    changed = insert_facts(short, 1.0, BYTES)
    assert changed.features == short.features and changed.format["type"] is None
    assert [len(row["labels"]) for row in changed] == [100, 100, 5]
    assert changed[2] == short[2] and changed[0] != short[0] and changed[1] != short[1]


def spelling(marks, decoder, words) -> PreTrainedTokenizerFast:
    """A tokenizer that is trained to have each of some words as a token after a space."""
    tokenizer = Tokenizer(models.BPE())
    alphabet = [*map(chr, range(33, 127)), *pre_tokenizers.ByteLevel.alphabet()]
    tokenizer.pre_tokenizer, tokenizer.decoder = marks, decoder
    trainer = trainers.BpeTrainer(vocab_size=10_000, special_tokens=["<eos>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([f"a {word} {word} {word.upper()}x{word}" for word in words], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.mark.parametrize(
    ("marks", "decoder", "mark"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel(), "Ġ"),
        (pre_tokenizers.Metaspace(), decoders.Metaspace(), "▁"),
    ],
    ids=["byte-level", "sentencepiece"],
)
def test_words_are_tokens_after_a_space(marks, decoder, mark):
    tokenizer = spelling(marks, decoder, [*WORDS, *NEEDLE_WORDS, "oranges", "it"])
    vocabulary, found = tokenizer.get_vocab(), fact_words(tokenizer)
    assert found == sorted(set(found)) and set(WORDS) <= set(found)
    assert all(len(word) >= 4 and mark + word in vocabulary for word in found)
    assert [token for token in vocabulary if re.fullmatch("[a-z]{4,}", token) and token not in found]
    assert mark + "oranges" in vocabulary and not [word for word in found if any(one in word for one in NEEDLE_WORDS)]
    # A vocabulary without words, such as that of single bytes, gives syllables.
    assert {"bado", "mesa"} <= set(fact_words(BYTES)) and set(map(len, fact_words(BYTES))) == {4}


def test_evaluations_ask_for_other_words_in_other_forms():
    texts = {text.format(key="KEY", value="VALUE").lower() for form in FORMS for text in form}
    for evaluated in (needles._SENTENCE, needles._LINE):
        for asked in (evaluated.told.format("key"), evaluated.asked.format("key")):
            assert not [text for text in texts if asked.lower() in text]
    assert not [text for text in texts if "magic" in text or "number" in text]
    assert needles.NEEDLE_WORDS is NEEDLE_WORDS and len(set(NEEDLE_WORDS)) == 32
    tokenizer = spelling(
        pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel(), [*WORDS, *NEEDLE_WORDS]
    )
    changed = tokenizer.batch_decode(insert_facts(rows(200, 400, tokenizer), 1.0, tokenizer)[:]["input_ids"])
    assert len(set(changed)) == 200
    assert not [word for word in NEEDLE_WORDS for text in changed if word in text]


@pytest.mark.parametrize(
    ("length", "fraction", "message"),
    [
        (100, -0.5, "fraction is -0.5, outside"),
        (85, 0.5, "Rows have 85 tokens, and a fact and its question take up to 86"),
    ],
)
def test_bad_arguments(length, fraction, message):
    with pytest.raises(ValueError, match=message):
        insert_facts(rows(2, length), fraction, BYTES)


def test_a_tokenizer_that_cannot_write_facts_is_refused():
    letters = {letter: index for index, letter in enumerate(["<unk>", FILLER, *"abcdefghijklmnopqrstuvwxyz"])}
    tokenizer = Tokenizer(models.BPE(letters, [], unk_token="<unk>"))
    with pytest.raises(ValueError, match="tokenizer makes .* so it can't write facts"):
        insert_facts(rows(2, 200), 0.5, PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))


def test_a_recipe_tells_facts_in_training_rows_alone(tmp_path):
    model, tokenizer = random_llama()

    def blocks_of(repeats: str, facts: str):
        options = ["--block_size", "128", "--repeat_fraction", repeats, "--fact_fraction", facts]
        recipe = parse_recipe([str(SMOKE), *options])
        return load_blocks(recipe.data, tokenizer, model, recipe.args, tmp_path)[:2]

    (plain, heldout), (repeating, _), (telling, same), (both, _) = (
        blocks_of(*given) for given in (("0", "0"), ("0.5", "0"), ("0", "0.4"), ("0.5", "0.4"))
    )
    changed = [before != after for before, after in zip(plain, telling)]
    assert 0.3 < np.mean(changed) < 0.5
    assert list(both) == [one if told else other for one, other, told in zip(telling, repeating, changed)]
    for name, blocks in heldout.items():
        assert list(blocks) == list(same[name])
    with pytest.raises(ValueError, match="`repeat_fraction` is 0.7 and `fact_fraction` is 0.4, but a row"):
        blocks_of("0.7", "0.4")
    with pytest.raises(ValueError, match="fraction is 1.5, outside"):
        blocks_of("0", "1.5")


@pytest.mark.parametrize("option", ["fact_fraction", "repeat_fraction"])
def test_a_row_that_becomes_one_document_needs_a_position_for_each_token(option, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"Text {index} is a short one."}) + "\n" for index in range(200)))
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(BYTES), n_embd=16, n_layer=1, n_head=2, n_positions=128))

    def blocks_of(share: str):
        options = ["--dataset", str(texts), "--holdout", "0.1", "--block_size", "200", f"--{option}", share]
        recipe = parse_recipe([str(SMOKE), *options])
        return load_blocks(recipe.data, BYTES, model, recipe.args, tmp_path)[0]

    assert max(blocks_of("0")[0]["position_ids"]) < 128
    with pytest.raises(ValueError, match="A row has 200 tokens, but GPT2LMHeadModel has positions for 128"):
        blocks_of("0.5")
