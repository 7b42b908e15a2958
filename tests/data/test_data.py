"""Documents, hold-outs, packing, padding and collating against naive restatements."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cab_hf.data.documents import load_documents, split_documents
from cab_hf.data.packing import (
    LanguageCollator,
    encode,
    pack_documents,
    pad_documents,
    save_tokens,
    shift_labels,
    vocabulary_digest,
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def make_tokenizer(eos_token: str | None = "</s>", extra: str = "w100") -> PreTrainedTokenizerFast:
    words = ["<pad>", "</s>", "<unk>", *(f"w{index}" for index in range(90)), extra]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token=eos_token, unk_token="<unk>")


def documents_of(*lengths: int) -> Dataset:
    texts = [" ".join(f"w{(7 * row + index) % 90}" for index in range(length)) for row, length in enumerate(lengths)]
    return Dataset.from_dict({"text": texts, "name": [f"doc{row}" for row in range(len(lengths))]})


def tokens_of(documents: Dataset, eos: bool = True) -> list[list[int]]:
    """What the tokenizer of this file must give: word w{i} is token i + 3, the end of a sequence is 1."""
    return [[int(word[1:]) + 3 for word in text.split()] + [1] * eos for text in documents["text"] if text.strip()]


class TestLoadDocuments:
    def test_builtin_needs_no_download(self, tmp_path):
        documents = load_documents("builtin", cache_dir=tmp_path)
        assert documents.column_names == ["text", "name"]
        assert "assignment" in documents["name"]
        assert sum(map(len, documents["text"])) > 300_000

    def test_text_folder_glob_and_file(self, tmp_path):
        folder = tmp_path / "texts"
        (folder / "deep").mkdir(parents=True)
        (folder / "b.md").write_text("second")
        (folder / "a.txt").write_text("first")
        (folder / "deep" / "c.rst").write_text("third")
        (folder / "empty.txt").write_text(" \n")
        (folder / "ignored.bin").write_bytes(b"\xff")
        whole = load_documents(folder, cache_dir=tmp_path / "cache")
        assert whole.to_list() == [
            {"text": "first", "name": "a.txt"},
            {"text": "second", "name": "b.md"},
            {"text": "third", "name": "deep/c.rst"},
        ]
        assert load_documents(f"{folder}/*.md", cache_dir=tmp_path / "cache")["text"][:] == ["second"]
        assert load_documents(str(folder / "a.txt"), cache_dir=tmp_path / "cache")["name"][:] == ["a.txt"]

    def test_edited_file_is_read_again(self, tmp_path):
        file = tmp_path / "a.txt"
        for text in ("before", "afterwards"):
            file.write_text(text)
            assert load_documents(file, cache_dir=tmp_path / "cache")["text"][:] == [text]

    def test_wrong_encoding_names_the_file(self, tmp_path):
        file = tmp_path / "latin.txt"
        file.write_bytes("façade".encode("latin-1"))
        with pytest.raises(ValueError, match="latin.txt is not utf-8.*for instance latin-1"):
            load_documents(file, cache_dir=tmp_path)
        assert load_documents(file, encoding="latin-1", cache_dir=tmp_path)["text"][:] == ["façade"]

    @pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
    def test_tables(self, tmp_path, suffix):
        rows = Dataset.from_dict({"body": ["one", "", "three"], "year": [1789, 1790, 1791], "text": ["x", "y", "z"]})
        path = str(tmp_path / f"rows.{suffix}")
        {"jsonl": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet}[suffix](path)
        documents = load_documents(path, text_column="body", name_column="year", cache_dir=tmp_path / "cache")
        assert list(documents) == [{"text": "one", "name": "1789"}, {"text": "three", "name": "1791"}]
        plain = load_documents(path, cache_dir=tmp_path / "cache")
        assert list(plain) == [{"text": "x"}, {"text": "y"}, {"text": "z"}]

    def test_saved_to_disk(self, tmp_path):
        documents = documents_of(2, 3)
        documents.save_to_disk(tmp_path / "one")
        assert load_documents(tmp_path / "one").to_list() == documents.to_list()
        DatasetDict({"a": documents, "b": documents.select([1])}).save_to_disk(tmp_path / "two")
        assert load_documents(tmp_path / "two", split="b")["name"][:] == ["doc1"]
        with pytest.raises(ValueError, match=r"no split 'train'.*\['a', 'b'\]"):
            load_documents(tmp_path / "two")

    def test_several_sources(self, tmp_path):
        (tmp_path / "a.txt").write_text("first")
        (tmp_path / "b.jsonl").write_text(json.dumps({"text": "second"}) + "\n")
        documents = load_documents([tmp_path / "a.txt", tmp_path / "b.jsonl"], cache_dir=tmp_path / "cache")
        assert documents.to_list() == [{"text": "first"}, {"text": "second"}]

    def test_errors_teach(self, tmp_path, monkeypatch):
        (tmp_path / "a.txt").write_text("x")
        (tmp_path / "b.csv").write_text("body,year\nx,1\n")
        with pytest.raises(ValueError, match=r"no column 'text'.*text_column as one of \['body', 'year'\]"):
            load_documents(tmp_path / "b.csv", cache_dir=tmp_path / "cache")
        with pytest.raises(ValueError, match="mixes files"):
            load_documents(tmp_path)
        (tmp_path / "c.jsonl").write_text('{"text": 3}')
        with pytest.raises(ValueError, match="holds int, not text"):
            load_documents(tmp_path / "c.jsonl", cache_dir=tmp_path / "cache")
        with pytest.raises(FileNotFoundError, match="is no file and no folder"):
            load_documents(tmp_path / "absent")
        with pytest.raises(FileNotFoundError, match="matches no file"):
            load_documents(str(tmp_path / "*.rst"))

        def unreachable(*args, **kwargs):
            raise ConnectionError("offline")

        monkeypatch.setattr("datasets.load_dataset", unreachable)
        with pytest.raises(ConnectionError, match='someone/texts.*could not be reached.*source "builtin"'):
            load_documents("someone/texts")


class TestSplitDocuments:
    def test_order_does_not_matter(self):
        documents = documents_of(*range(1, 31))
        held = split_documents(documents, 0.2)[1]
        assert len(held) == 6
        reverse = documents.select(range(29, -1, -1))
        assert sorted(split_documents(reverse, 0.2)[1]["text"]) == sorted(held["text"])
        assert sorted(split_documents(documents, 0.2, seed=1)[1]["text"]) != sorted(held["text"])
        assert split_documents(documents, 6)[1].to_list() == held.to_list()

    def test_sides_are_disjoint_and_complete(self):
        documents = documents_of(*range(1, 31))
        train, held = split_documents(documents, 7)
        assert set(train["text"]).isdisjoint(held["text"])
        assert set(train["text"]) | set(held["text"]) == set(documents["text"])
        assert train["name"][:] == [name for name in documents["name"] if name in set(train["name"])]

    def test_copies_stay_together(self):
        documents = Dataset.from_dict({"text": ["same"] * 5 + [f"w{index}" for index in range(5)]})
        for seed in range(8):
            train, held = split_documents(documents, 0.3, seed=seed)
            assert set(train["text"]).isdisjoint(held["text"])

    def test_pattern_of_names(self):
        names = [f"{year}_someone.txt" for year in range(1985, 2005)]
        documents = Dataset.from_dict({"text": names, "name": names})
        train, held = split_documents(documents, r"^\d{3}9")
        assert held["name"][:] == ["1989_someone.txt", "1999_someone.txt"] and len(train) == 18

    @pytest.mark.parametrize(
        ("holdout", "message"),
        [
            (1.0, "inside"),
            (0, "from 1 on"),
            (3, "holds out 3 of 3"),
            ("nothing", "holds out 0 of 3"),
            ("doc", "holds out 3 of 3"),
            ("(", "no valid regular expression"),
            ("other*", "holds out 0 of 3"),
        ],
    )
    def test_errors(self, holdout, message):
        with pytest.raises(ValueError, match=message):
            split_documents(documents_of(1, 2, 3), holdout)

    def test_errors_of_kinds(self):
        with pytest.raises(ValueError, match="take"):
            split_documents(documents_of(1, 2).to_iterable_dataset(), 1)
        with pytest.raises(ValueError, match="have no name"):
            split_documents(documents_of(1, 2).remove_columns("name"), "doc")


LLAMA = (
    "{% for m in messages %}{{ bos_token if loop.first }}[{{ m.role }}] {{ m.content }} {{ eos_token }}{% endfor %}"
)
CHATML = "{% for m in messages %}<im> {{ m.role }} {{ m.content }} {{ eos_token }}\n{% endfor %}"


class TestSpecialTokensOnce:
    """Text of a chat template keeps the template's own special tokens; plain text has the tokenizer's, as ever."""

    @staticmethod
    def make(adds: str, template: str):
        words = ["<s>", "</s>", "<im>", "\n", "Ċ", *"abcdefgh", "[user]", "[bot]", "user", "bot", "a</s>"]
        backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="Ċ"))
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
        backend.post_processor = processors.TemplateProcessing(single=adds, special_tokens=[("<s>", 0), ("</s>", 1)])
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "Ċ"}
        made = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **special)
        made.add_tokens(["\n"])
        return made

    @pytest.mark.parametrize("template", [LLAMA, CHATML])
    @pytest.mark.parametrize("adds", ["$A", "<s> $A", "<s> $A </s>", "$A </s>"])
    @pytest.mark.parametrize("turns", [1, 2, 3])
    def test_a_rendered_chat(self, adds, template, turns, tmp_path):
        tokenizer = self.make(adds, template)
        chat = [{"role": ("user", "bot")[turn % 2], "content": "a b c"} for turn in range(turns)]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        right = tokenizer.apply_chat_template(chat, return_dict=False)
        if "<s> $A" in adds and template is CHATML:
            right = [0, *right]  # which its template does not write
        (row,) = pack_documents(
            Dataset.from_dict({"text": [text]}), tokenizer, len(right), drop_last=False, cache_dir=tmp_path
        )["input_ids"]
        assert list(row) == right
        save_tokens(tmp_path / "a.npz", Dataset.from_dict({"text": [text]}), tokenizer)
        assert load_documents(tmp_path / "a.npz", cache_dir=tmp_path)["input_ids"][:] == [right]

    @pytest.mark.parametrize("adds", ["$A", "<s> $A", "<s> $A </s>", "$A </s>"])
    @pytest.mark.parametrize("text", ["a b c", "a </s> b", "b <s> a", "\n", "a"])
    def test_plain_text_is_as_the_tokenizer_has_it(self, adds, text):
        tokenizer = self.make(adds, LLAMA)
        assert encode([text, "a b"], tokenizer) == tokenizer([text, "a b"])["input_ids"]


class TestPackDocuments:
    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("append_eos", [False, True])
    def test_no_token_is_lost(self, tokenizer, tmp_path, streaming, append_eos):
        documents = documents_of(3, 1, 17, 0, 6, 5)
        truth = [token for row in tokens_of(documents, append_eos) for token in row]
        source = documents.to_iterable_dataset() if streaming else documents
        options = {"append_eos": append_eos, "cache_dir": tmp_path}
        kept = [token for row in pack_documents(source, tokenizer, 7, **options) for token in row["input_ids"]]
        assert kept == truth[: len(truth) // 7 * 7]
        whole = list(pack_documents(source, tokenizer, 7, drop_last=False, **options))
        assert [token for row in whole for token in row["input_ids"]] == truth
        assert {len(row["input_ids"]) for row in whole[:-1]} == {7}

    def test_borders(self, tokenizer, tmp_path):
        documents = documents_of(3, 1, 12)
        rows = list(pack_documents(documents, tokenizer, 8, cache_dir=tmp_path))
        # Documents with their end tokens: 4, 2 and 13 tokens; the third goes on in the second block.
        assert rows[0]["seq_idx"] == [0, 0, 0, 0, 1, 1, 2, 2]
        assert rows[0]["position_ids"] == [0, 1, 2, 3, 0, 1, 0, 1]
        ids = rows[0]["input_ids"]
        assert rows[0]["labels"] == [-100, *ids[1:4], -100, ids[5], -100, ids[7]]
        assert rows[1]["seq_idx"] == [0] * 8 and rows[1]["position_ids"] == list(range(8))
        assert rows[1]["labels"] == [-100, *rows[1]["input_ids"][1:]]

    def test_running_text(self, tokenizer, tmp_path):
        rows = list(pack_documents(documents_of(3, 8), tokenizer, 6, isolate_documents=False, cache_dir=tmp_path))
        assert set(rows[0]) == {"input_ids", "labels"}
        assert rows[0]["labels"] == [-100, *rows[0]["input_ids"][1:]]

    def test_processes_and_streams_agree(self, tokenizer, tmp_path):
        documents = documents_of(*range(1, 12))
        rows = pack_documents(documents, tokenizer, 5, cache_dir=tmp_path / "one").to_list()
        assert pack_documents(documents, tokenizer, 5, num_proc=2, cache_dir=tmp_path / "two").to_list() == rows
        assert list(pack_documents(documents.to_iterable_dataset(), tokenizer, 5)) == rows

    def test_special_tokens_are_not_doubled(self, tokenizer, tmp_path):
        documents = Dataset.from_dict({"text": ["w1 w2 </s>", "w3"]})
        rows = list(pack_documents(documents, tokenizer, 5, cache_dir=tmp_path))
        assert rows[0]["input_ids"] == [4, 5, 1, 6, 1]

    def test_documents_do_not_leak_in_a_transformers_model(self, tokenizer, tmp_path):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
        )
        model = LlamaForCausalLM(config).eval()
        documents = documents_of(3, 1, 5)
        rows = pack_documents(documents, tokenizer, 14, drop_last=False, cache_dir=tmp_path).to_list()
        batch = LanguageCollator(0)([*rows, rows[0] | {name: values[:7] for name, values in rows[0].items()}])
        inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
        with torch.no_grad():
            packed = model(**inputs).logits
            alone = [model(torch.tensor([row])).logits[0] for row in tokens_of(documents)]
        torch.testing.assert_close(packed[0, :12], torch.cat(alone), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(packed[1, :7], torch.cat(alone)[:7], rtol=1e-5, atol=1e-5)

    def test_errors(self, tokenizer, tmp_path):
        with pytest.raises(ValueError, match="block_size is 1"):
            pack_documents(documents_of(5), tokenizer, 1)
        with pytest.raises(ValueError, match="no eos_token.*append_eos=False"):
            pack_documents(documents_of(5), make_tokenizer(eos_token=None), 4)
        with pytest.raises(ValueError, match="6 tokens, fewer than one block of block_size 7"):
            pack_documents(documents_of(5), tokenizer, 7)
        with pytest.raises(ValueError, match=r"have the columns \['body'\]"):
            pack_documents(Dataset.from_dict({"body": ["x"]}), tokenizer, 4)


class TestPadDocuments:
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("streaming", [False, True])
    def test_windows(self, tokenizer, side, streaming):
        documents = documents_of(3, 7)
        source = documents.to_iterable_dataset() if streaming else documents
        rows = list(pad_documents(source, tokenizer, 6, padding_side=side))
        truth = tokens_of(documents)
        windows = [truth[0], truth[1][:6], truth[1][6:]]
        assert len(rows) == 3
        for row, window in zip(rows, windows):
            missing = 6 - len(window)
            expected = {
                "input_ids": ([0] * missing, window),
                "attention_mask": ([0] * missing, [1] * len(window)),
                "labels": ([-100] * missing, [-100, *window[1:]]),
            }
            for name, (padding, values) in expected.items():
                assert row[name] == (padding + values if side == "left" else values + padding)


class TestCollator:
    def test_fixed_blocks_pass_through(self):
        rows = [{"input_ids": [4, 5, 6], "labels": [-100, 5, -100]}, {"input_ids": [7, 8, 9], "labels": [-100, 8, 9]}]
        batch = LanguageCollator(0)(rows)
        assert set(batch) == {"input_ids", "labels"}
        assert batch["input_ids"].dtype == torch.int64 and batch["labels"].tolist() == [[-100, 5, -100], [-100, 8, 9]]

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_ragged_rows(self, side):
        batch = LanguageCollator(0, side)([{"input_ids": [4, 5, 6]}, {"input_ids": [7, 8]}])
        left = side == "left"
        assert batch["input_ids"].tolist() == [[4, 5, 6], [0, 7, 8] if left else [7, 8, 0]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1] if left else [1, 1, 0]]
        assert batch["labels"].tolist() == [[-100, 5, 6], [-100, -100, 8] if left else [-100, 8, -100]]

    def test_labels_follow_an_existing_mask(self):
        batch = LanguageCollator(0)([{"input_ids": [0, 0, 4, 5], "attention_mask": [0, 0, 1, 1]}])
        assert batch["labels"].tolist() == [[-100, -100, -100, 5]]

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_of_packed_rows_is_a_document(self, side):
        short = {"input_ids": [4, 5, 6], "labels": [-100, 5, -100], "seq_idx": [0, 0, 1], "position_ids": [0, 1, 0]}
        long = {"input_ids": [4] * 5, "labels": [-100] * 5, "seq_idx": [0] * 5, "position_ids": list(range(5))}
        batch = LanguageCollator(0, side)([long, short])
        assert "attention_mask" not in batch and batch["seq_idx"].dtype == torch.int32
        left = side == "left"
        assert batch["seq_idx"][1].tolist() == ([0, 0, 1, 1, 2] if left else [0, 0, 1, 2, 2])
        assert batch["position_ids"][1].tolist() == ([0, 1, 0, 1, 0] if left else [0, 1, 0, 0, 1])
        assert (batch["labels"][1] != -100).sum() == 1

    def test_empty_rows_never_reach_the_model(self):
        batch = LanguageCollator(0)([{"input_ids": []}, {"input_ids": [4, 5]}])
        assert batch["input_ids"].tolist() == [[4, 5]]
        batch = LanguageCollator(0)([{"input_ids": []}])
        assert batch["input_ids"].shape == (1, 1) and batch["labels"].tolist() == [[-100]]

    def test_accepts_arrays_and_tensors(self):
        rows = [{"input_ids": np.array([4, 5], dtype=np.int32)}, {"input_ids": torch.tensor([6, 7])}]
        assert LanguageCollator(0)(rows)["input_ids"].tolist() == [[4, 5], [6, 7]]

    def test_errors(self):
        with pytest.raises(ValueError, match="padding_side is 'middle'"):
            LanguageCollator(0, "middle")
        with pytest.raises(ValueError, match="pad_token_id is None"):
            LanguageCollator(None)
        with pytest.raises(ValueError, match="the same t"):
            LanguageCollator(0)([{"input_ids": [4, 5], "labels": [4]}])
        with pytest.raises(ValueError, match="different columns"):
            LanguageCollator(0)([{"input_ids": [4]}, {"input_ids": [4], "seq_idx": [0]}])
        with pytest.raises(ValueError, match="Drop attention_mask"):
            LanguageCollator(0)([{"input_ids": [4], "seq_idx": [0], "attention_mask": [1]}])

    def test_shift_labels(self):
        assert shift_labels(torch.tensor([[-100, 5, 6]])).tolist() == [[5, 6, -100]]


class TestTokenFile:
    def test_round_trip_packs_the_same_blocks(self, tokenizer, tmp_path):
        documents = documents_of(3, 0, 9, 4)
        assert save_tokens(tmp_path / "texts.npz", documents, tokenizer) == 16
        assert [file.name for file in tmp_path.iterdir()] == ["texts.npz"]
        tokens = load_documents(tmp_path / "texts.npz", cache_dir=tmp_path / "cache")
        assert tokens["input_ids"][:] == tokens_of(documents, eos=False)
        assert tokens["name"][:] == ["doc0", "doc2", "doc3"]
        packed = pack_documents(tokens, tokenizer, 5, cache_dir=tmp_path / "cache").to_list()
        assert packed == pack_documents(documents, tokenizer, 5, cache_dir=tmp_path / "cache").to_list()
        train, held = split_documents(tokens, 1)
        assert len(train) == 2 and len(held) == 1

    def test_another_vocabulary_is_refused(self, tokenizer, tmp_path):
        save_tokens(tmp_path / "texts.npz", documents_of(3), tokenizer)
        tokens = load_documents(tmp_path / "texts.npz", cache_dir=tmp_path / "cache")
        other = make_tokenizer(extra="w101")
        assert vocabulary_digest(make_tokenizer()) == vocabulary_digest(tokenizer) != vocabulary_digest(other)
        with pytest.raises(ValueError, match="tokenised with another vocabulary"):
            pack_documents(tokens, other, 2, cache_dir=tmp_path / "cache")

    def test_errors(self, tokenizer, tmp_path):
        with pytest.raises(ValueError, match="does not end in .npz"):
            save_tokens(tmp_path / "texts.bin", documents_of(3), tokenizer)
        np.savez(tmp_path / "other.npz", tokens=np.arange(3))
        with pytest.raises(ValueError, match=r"lacks the arrays \['offsets', 'names', 'vocabulary'\]"):
            load_documents(tmp_path / "other.npz", cache_dir=tmp_path / "cache")


def test_packed_blocks_survive_a_round_trip_to_disk(tokenizer, tmp_path):
    blocks = pack_documents(documents_of(9, 9), tokenizer, 5, cache_dir=tmp_path / "cache")
    blocks.save_to_disk(tmp_path / "blocks")
    assert load_from_disk(tmp_path / "blocks").to_list() == blocks.to_list()
