"""Text as Windows, spreadsheets, scrapers and the Hub leave it, and what a hold-out means."""

import csv
import json

import pytest
from datasets import Dataset, load_dataset

from cab_hf.data.documents import load_documents, split_documents, tell_copies


def texts(path, **options):
    return load_documents(path, cache_dir=path.parent / "cache", **options)["text"][:]


def written(folder, **files):
    """A folder of files; `a_txt` becomes a.txt, `train__a_txt` train/a.txt."""
    for name, content in files.items():
        path = folder / "data" / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder / "data"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-le-marked"])
@pytest.mark.parametrize("suffix", ["txt", "md", "csv", "jsonl", "json"])
@pytest.mark.parametrize("asked", ["utf-8", "latin-1"])
def test_a_byte_order_mark_names_the_encoding(tmp_path, encoding, suffix, asked):
    text = "façade 世"
    content = {"csv": f"text\n{text}\n", "json": f'[\n{{"text": "{text}"}}]'}.get(suffix, text)
    content = f'{{"text": "{text}"}}\n' if suffix == "jsonl" else content
    bare = encoding.removesuffix("-marked")
    raw = (b"\xff\xfe" if bare != encoding else b"") + content.encode(bare)
    (tmp_path / f"a.{suffix}").write_bytes(raw)
    assert texts(tmp_path / f"a.{suffix}", encoding=asked) == [text]


@pytest.mark.parametrize("suffix", ["txt", "csv", "jsonl"])
def test_an_encoding_without_a_mark_is_asked_for(tmp_path, suffix):
    content = {"txt": "façade", "csv": "text\nfaçade\n", "jsonl": '{"text": "façade"}\n'}[suffix]
    (tmp_path / f"a.{suffix}").write_bytes(content.encode("latin-1"))
    assert texts(tmp_path / f"a.{suffix}", encoding="latin-1") == ["façade"]
    line = {"txt": 1, "csv": 2, "jsonl": 1}[suffix]
    with pytest.raises(ValueError, match=rf"a.{suffix} is not utf-8: .* in line {line}. .*latin-1"):
        texts(tmp_path / f"a.{suffix}")
    with pytest.raises(ValueError, match="encoding 'latin-x' is unknown"):
        texts(tmp_path / f"a.{suffix}", encoding="latin-x")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_utf_16_read_as_something_else_is_refused(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("Hello".encode("utf-16-le"))
    with pytest.raises(ValueError, match="a.txt: as .* full of NUL.*utf-16"):
        texts(tmp_path / "a.txt", encoding=encoding)


def test_words_that_a_spreadsheet_takes_for_nothing_are_text(tmp_path):
    words = ["NA", "null", "None", "nan", "N/A", "007", "1.0", "True", "1e5", " padded "]
    path = written(tmp_path, a_csv="text,name\n" + "".join(f"{word},{word}\n" for word in words))
    documents = load_documents(path, cache_dir=tmp_path)
    assert documents["text"][:] == documents["name"][:] == words


def test_a_csv_reads_as_datasets_reads_it(tmp_path):
    """Quotes, commas, line breaks and blank lines, and a text longer than the csv module's usual limit."""
    kept = ["plain", 'a "quoted" one', "a, b", "two\nlines", "windows\r\nlines", "x" * 200_000]
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *([str(index), text] for index, text in enumerate(kept))])
        file.write("\r\n")
    reference = load_dataset("csv", data_files=str(path), split="train", cache_dir=str(tmp_path / "reference"))
    assert texts(path) == reference["text"][:] == kept


def test_files_may_differ_in_their_other_columns(tmp_path):
    second = '{"url": "x", "text": "two"}\n{"text": "three", "id": "z"}\n'
    path = written(tmp_path, a_jsonl='{"text": "one", "id": 1}\n', b_jsonl=second)
    Dataset.from_dict({"text": ["four"], "id": [[1]]}).to_parquet(path / "c.parquet")
    (path / "d.csv").write_text("more,text\n,five\n")
    (path / "e.json").write_text(json.dumps({"text": ["six"], "id": [6]}))
    documents = load_documents(path, cache_dir=tmp_path)
    assert documents.to_dict() == {"text": ["one", "two", "three", "four", "five", "six"]}


def test_half_a_surrogate_is_replaced(tmp_path):
    path = written(tmp_path, a_jsonl=r'{"text": "bad \ud83d half"}' + "\n" + r'{"text": "whole \ud83d\ude00"}' + "\n")
    assert texts(path) == ["bad \ufffd half", "whole \U0001f600"]


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        ("jsonl", '{"text": "ok"}\n\n{"text": "cut\n{"text": "ok"}\n', "a.jsonl: line 3 is no JSON"),
        ("jsonl", '{"text": "cut\n{"text": "ok"}\n', "a.jsonl: line 1 is no JSON"),
        ("jsonl", '{"text": "ok"}\n3\n', "a.jsonl: line 2 holds a int"),
        ("json", '[{"text": "ok"},\n{"text": }]', "a.json: line 2 is no JSON"),
        ("csv", "text,name\nok,1\na,b,c\n", "a.csv: line 3 has 3 columns, and the header 2"),
        ("csv", 'text\nok\n"open\nmore\n', "a.csv: a quote is never closed"),
        ("parquet", "PAR1 cut", "a.parquet: "),
        ("jsonl", '{"body": "x"}\n', r"a.jsonl: there is no column 'text'. Pass text_column as one of \['body'\]"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, suffix, content, message):
    (tmp_path / f"a.{suffix}").write_text(content)
    with pytest.raises(ValueError, match=message):
        texts(tmp_path / f"a.{suffix}")


CARD = """---
configs:
- config_name: small
  default: true
  data_files: [{split: train, path: small/train-*}, {split: test, path: small/test-*}]
- config_name: large
  data_files: [{split: train, path: large/*}]
---
# A card is no document
"""


@pytest.fixture
def download(tmp_path):
    """As `hf download --repo-type dataset` leaves it."""
    for part in ("small/train", "small/test", "large/train"):
        path = tmp_path / "download" / f"{part}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict({"text": [f"{part} {index}" for index in range(10)]}).to_parquet(path)
    (tmp_path / "download/LICENSE.txt").write_text("A licence is no document.")
    (tmp_path / "download/README.md").write_text(CARD)
    return tmp_path / "download"


def test_a_download_is_read_by_its_card(download):
    assert texts(download) == [f"small/train {index}" for index in range(10)]
    assert texts(download, split="test") == [f"small/test {index}" for index in range(10)]
    assert texts(download, split="test[:20%]+train[1:3]") == [
        "small/test 0", "small/test 1", "small/train 1", "small/train 2"
    ]  # fmt: skip
    assert texts(download, config_name="large")[0] == "large/train 0"
    for options in ({}, {"config_name": "large"}, {"split": "test"}):
        name = options.get("config_name")
        split = options.get("split", "train")
        reference = load_dataset(str(download), name, split=split, cache_dir=str(download.parent / "reference"))
        assert texts(download, **options) == reference["text"][:]
    with pytest.raises(ValueError, match=r"no split 'dev'.*\['train', 'test'\]"):
        texts(download, split="dev")
    with pytest.raises(ValueError, match="by its card .*huge.*small"):
        texts(download, config_name="huge")


@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
def test_splits_of_file_names(tmp_path, suffix):
    """Names that put every file into a split are splits; a folder where only some do is one text, as ever."""
    rows = {name: f'{{"text": "{name}"}}\n' if suffix == "jsonl" else name for name in ("train", "test", "other")}
    path = written(tmp_path, **{f"{name}_{suffix}": rows[name] for name in ("train", "test")})
    assert (texts(path), texts(path, split="test")) == (["train"], ["test"])
    (path / f"other.{suffix}").write_text(rows["other"])
    assert texts(path) == ["other", "test", "train"]


def test_kinds_that_only_datasets_reads(tmp_path):
    Dataset.from_dict({"text": ["one"]}).to_json(tmp_path / "data/train.jsonl.gz", compression="gzip")
    assert texts(tmp_path / "data") == ["one"]


def test_slices_count_the_rows_of_the_file(tmp_path):
    path = written(tmp_path, a_jsonl="".join(f'{{"text": "{text}"}}\n' for text in ("a", "", "b", "c")))
    assert texts(path / "a.jsonl", split="train[:3]") == ["a", "b"]


NAMES = ["doc01.txt", "doc02.txt", "doc11.txt", "deep/doc03.txt", "1989 (a).txt", "1990.txt"]


@pytest.mark.parametrize(
    ("holdout", "held"),
    [
        ("doc0*", ["doc01.txt", "doc02.txt", "deep/doc03.txt"]),
        ("doc?1.txt", ["doc01.txt", "doc11.txt"]),
        ("deep/*", ["deep/doc03.txt"]),
        ("texts/doc0*", ["doc01.txt", "doc02.txt", "deep/doc03.txt"]),
        ("*.txt", None),
        ("doc11.txt", ["doc11.txt"]),
        ("some/where/doc11.txt", ["doc11.txt"]),
        ("1989 (a).txt", ["1989 (a).txt"]),
        (r"^\d{3}9", ["1989 (a).txt"]),
        ("^doc0.*", ["doc01.txt", "doc02.txt"]),
        ("doc[01]1", ["doc01.txt", "doc11.txt"]),
        ("1", ["doc02.txt"]),  # a number, whichever it is
    ],
)
def test_a_hold_out_is_a_file_a_glob_or_a_regular_expression(holdout, held):
    documents = Dataset.from_dict({"text": NAMES, "name": NAMES})
    if held is None:
        with pytest.raises(ValueError, match="6 of 6"):
            split_documents(documents, holdout)
    elif holdout == "1":
        assert len(split_documents(documents, holdout)[1]) == 1
    else:
        assert split_documents(documents, holdout)[1]["name"][:] == held


@pytest.mark.parametrize("holdout", ["0.25", 0.25])
def test_a_single_document_holds_out_its_end(holdout):
    paragraphs = [f"Paragraph {index}, of two\nlines." for index in range(20)]
    text = "\n\n".join(paragraphs)
    training, held = split_documents(Dataset.from_dict({"text": [text], "name": ["a.txt"]}), holdout)
    assert training["text"][0] + held["text"][0] == text and held["name"][:] == ["a.txt"]
    assert held["text"][0] == "\n\n".join(paragraphs[15:])
    for other in ("\n".join(f"line {index}" for index in range(40)), "word " * 80, "x" * 40):
        one, two = (part["text"][0] for part in split_documents(Dataset.from_dict({"text": [other]}), holdout))
        assert one + two == other and 0.15 < len(two) / len(other) < 0.35 and two[0] in "lwx"
    tokens = Dataset.from_dict({"input_ids": [list(range(40))]})
    assert split_documents(tokens, holdout)[1]["input_ids"][:] == [list(range(30, 40))]
    with pytest.raises(ValueError, match="holds out 1 of 1.*a fraction"):
        split_documents(Dataset.from_dict({"text": [text]}), 1)


def test_evaluated_copies_are_told():
    documents = Dataset.from_dict({"text": ["a", "b", "c"]})
    assert tell_copies(documents, Dataset.from_dict({"text": ["b", "x", "c"]}), "news") == 2
    assert tell_copies(documents, Dataset.from_dict({"text": ["B"]}), "news") == 0
