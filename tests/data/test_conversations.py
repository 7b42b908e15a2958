"""Conversations as documents: which rows are read, which tokens come out, and which of them are the assistant's."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from tiny_chat import BARE, CHAT, CHATML, MARKED, chat_tokenizer

from cab_hf.data.conversations import encode_conversation, read_conversation
from cab_hf.data.documents import load_documents, split_documents, tell_copies
from cab_hf.data.packing import pack_documents, pad_documents, save_tokens


CHATS = [
    CHAT,
    [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"}],
    [{"role": "user", "content": "Without an answer"}],
]


def written(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def loaded(tmp_path, rows, **options):
    return load_documents(written(tmp_path / "chats.jsonl", rows), cache_dir=tmp_path, **options)


def packed(documents, tokenizer, tmp_path, **options):
    """Tokens, labels and document numbers of all documents in one block."""
    options = {"drop_last": False, "cache_dir": tmp_path} | options
    (row,) = pack_documents(documents, tokenizer, 2000, **options)
    return row


def learnt(text, tokenizer):
    ids, marks = encode_conversation(text, tokenizer)
    runs = np.flatnonzero(np.diff([False, *marks, False])).reshape(-1, 2)
    return [tokenizer.decode(ids[start:end]) for start, end in runs]


class TestReading:
    def test_every_source_gives_the_same_documents(self, tmp_path):
        rows = [{"messages": chat} for chat in CHATS]
        truth = list(map(read_conversation, rows))
        assert loaded(tmp_path, rows)["conversation"][:] == truth
        (tmp_path / "array.json").write_text(json.dumps(rows))
        assert load_documents(tmp_path / "array.json", cache_dir=tmp_path)["conversation"][:] == truth
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
        assert load_documents(tmp_path / "rows.parquet", cache_dir=tmp_path)["conversation"][:] == truth
        Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
        assert load_documents(tmp_path / "saved", cache_dir=tmp_path)["conversation"][:] == truth
        (tmp_path / "folder").mkdir()
        written(tmp_path / "folder/train.jsonl", rows[:2]), written(tmp_path / "folder/test.jsonl", rows[2:])
        parts = [
            load_documents(tmp_path / "folder", split=split, cache_dir=tmp_path)["conversation"][:]
            for split in ("train", "test", "train[:1]")
        ]
        assert parts == [truth[:2], truth[2:], truth[:1]]

    def test_columns(self, tmp_path):
        rows = [{"talk": chat, "name": f"n{index}", "messages": "x"} for index, chat in enumerate(CHATS)]
        documents = loaded(tmp_path, rows, text_column="talk")
        assert documents.column_names == ["conversation", "name"] and documents["name"][:] == ["n0", "n1", "n2"]
        assert documents["conversation"][:] == [read_conversation({"messages": chat}) for chat in CHATS]
        both = loaded(tmp_path, [{"text": "plain", "messages": CHAT}])
        assert both.to_list() == [{"text": "plain"}]  # as ever
        pair = loaded(tmp_path, [{"prompt": "a", "completion": "b"}])
        assert json.loads(pair["conversation"][0]) == {"prompt": "a", "completion": "b"}
        (tmp_path / "a.csv").write_text("prompt,completion\na,b\n")
        assert load_documents(tmp_path / "a.csv", cache_dir=tmp_path).to_list() == pair.to_list()

    def test_what_a_table_fills_up_is_left_out(self, tmp_path):
        call = [{"type": "function", "function": {"name": "f", "arguments": {"x": "1"}}}]
        chat = [
            {"role": "user", "content": [{"type": "text", "text": "f of "}, {"type": "text", "text": "1?"}]},
            {"role": "assistant", "content": None, "tool_calls": call},
            {"role": "tool", "content": "2", "name": "f", "tool_calls": None},
        ]
        found = json.loads(read_conversation({"messages": chat, "tools": [{"name": "f", "description": None}]}))
        assert found["messages"] == [
            {"role": "user", "content": "f of 1?"},
            {"role": "assistant", "content": "", "tool_calls": call},
            {"role": "tool", "content": "2", "name": "f"},
        ]
        assert found["tools"] == [{"name": "f"}]
        assert json.loads(read_conversation({"messages": chat, "tools": '[{"name": "f"}]'}))["tools"] == [
            {"name": "f"}
        ]

    @pytest.mark.parametrize(
        ("row", "said"),
        [
            ({"messages": []}, "no messages"),
            ({"messages": None}, "holds nothing"),
            ({"messages": "Hi"}, "holds str"),
            ({"messages": [{"role": "bot", "content": "Hi"}]}, "message 1 has the unknown role 'bot'"),
            ({"messages": [*CHAT, {"from": "human", "value": "Hi"}]}, "message 6 has ['from', 'value']"),
            ({"messages": [{"role": "user", "content": {"a": 1}}]}, "content of type dict"),
            ({"messages": [{"role": "user", "content": " "}]}, "is empty"),
            ({"messages": CHAT, "tools": "{"}, "column 'tools' is no JSON"),
            ({"prompt": "a", "completion": " "}, "column 'completion' is empty"),
            ({"prompt": "a", "completion": CHAT}, "column 'prompt' holds str"),
        ],
    )
    def test_bad_rows_are_named(self, tmp_path, row, said):
        good = {"messages": CHAT} if "messages" in row else {"prompt": "a", "completion": "b"}
        with pytest.raises(ValueError) as error:
            loaded(tmp_path, [good, row])
        assert "chats.jsonl: row 2: " in str(error.value) and said in str(error.value)
        assert "\n" not in str(error.value)

    def test_bad_rows_of_a_saved_data_set_are_named(self, tmp_path):
        Dataset.from_list([{"messages": CHAT}, {"messages": []}]).save_to_disk(tmp_path / "saved")
        with pytest.raises(ValueError, match=r"saved', row 2: column 'messages' has no messages"):
            load_documents(tmp_path / "saved", cache_dir=tmp_path)

    def test_texts_and_conversations_do_not_mix(self, tmp_path):
        written(tmp_path / "a.jsonl", [{"text": "a"}]), written(tmp_path / "b.jsonl", [{"messages": CHAT}])
        for source in (tmp_path, [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]):
            with pytest.raises(ValueError, match=r"mix.* texts.* conversations"):
                load_documents(source, cache_dir=tmp_path)

    def test_held_out_ones_are_whole_and_the_same_in_any_order(self, tmp_path):
        rows = [{"messages": [{"role": "user", "content": f"number {index}"}]} for index in range(40)]
        training, kept = split_documents(loaded(tmp_path, [*rows, *rows[:5]]), 0.2)
        again = split_documents(loaded(tmp_path, [*rows[:5], *reversed(rows)]), 0.2)
        assert set(kept["conversation"]) == set(again[1]["conversation"])
        assert not set(kept["conversation"]) & set(training["conversation"]) and len(kept) + len(training) == 45
        assert tell_copies(training, loaded(tmp_path, rows), "all") == len(set(training["conversation"]))
        with pytest.raises(ValueError, match="one conversation, which is not cut"):
            split_documents(loaded(tmp_path, rows[:1]), 0.2)


class TestTokens:
    @pytest.mark.parametrize("template", [CHATML, MARKED])
    def test_what_the_template_writes_and_no_token_more(self, tmp_path, template):
        tokenizer = chat_tokenizer(template)
        row = packed(loaded(tmp_path, [{"messages": chat} for chat in CHATS]), tokenizer, tmp_path)
        apart = [tokenizer.apply_chat_template(chat, return_dict=False) for chat in CHATS]
        assert list(row["input_ids"]) == sum(apart, [])
        assert list(row["seq_idx"]) == sum(([index] * len(ids) for index, ids in enumerate(apart)), [])
        labels = sum(([-100, *ids[1:]] for ids in apart), [])
        assert list(row["labels"]) == labels

    def test_an_end_where_the_template_writes_none(self, tmp_path):
        tokenizer = chat_tokenizer(BARE)
        row = packed(loaded(tmp_path, [{"messages": CHATS[1]}]), tokenizer, tmp_path, loss_on="assistant")
        assert tokenizer.decode(row["input_ids"]) == "user: One?\nassistant: 1\n<|end|>"
        assert tokenizer.decode([token for token in row["labels"] if token >= 0]) == "1\n<|end|>"

    def test_another_end_is_not_the_answers(self, tmp_path):
        tokenizer = chat_tokenizer(CHATML, eos="<eos>")
        row = packed(loaded(tmp_path, [{"messages": CHATS[1]}]), tokenizer, tmp_path, loss_on="assistant")
        assert tokenizer.decode(row["input_ids"]).endswith("1<|end|>\n<eos>")
        assert tokenizer.decode([token for token in row["labels"] if token >= 0]) == "1<|end|>"

    @pytest.mark.parametrize("template", [CHATML, MARKED])
    @pytest.mark.parametrize("isolate", [True, False])
    def test_labels_are_the_assistants(self, tmp_path, template, isolate):
        tokenizer = chat_tokenizer(template)
        documents = loaded(tmp_path, [{"messages": chat} for chat in CHATS])
        options = {"isolate_documents": isolate, "loss_on": "assistant"}
        row = packed(documents, tokenizer, tmp_path, **options)
        ids, labels = np.array(row["input_ids"]), np.array(row["labels"])
        assert (labels[labels >= 0] == ids[labels >= 0]).all()
        assert tokenizer.decode(ids[labels >= 0]) == "Hello.<|end|>Bye\nnow.<|end|>1<|end|>"
        blocks = pack_documents(documents, tokenizer, 7, drop_last=False, cache_dir=tmp_path, **options)
        cut = np.concatenate([block["labels"] for block in blocks])
        assert ((cut == labels) | (np.arange(len(cut)) % 7 == 0)).all()

    def test_padded_rows_and_streams_agree(self, tmp_path):
        tokenizer = chat_tokenizer()
        documents = loaded(tmp_path, [{"messages": chat} for chat in CHATS])
        whole = packed(documents, tokenizer, tmp_path, loss_on="assistant")
        rows = list(pad_documents(documents, tokenizer, 100, loss_on="assistant"))
        kept = [np.array(row["labels"])[np.array(row["attention_mask"]) != 0] for row in rows]
        assert np.concatenate(kept).tolist() == list(whole["labels"])
        (stream,) = pack_documents(
            documents.to_iterable_dataset(), tokenizer, 2000, drop_last=False, loss_on="assistant"
        )
        assert {name: list(value) for name, value in stream.items()} == {
            name: list(value) for name, value in whole.items()
        }

    @pytest.mark.parametrize("template", [CHATML, MARKED])
    def test_completions(self, template):
        tokenizer = chat_tokenizer(template)
        text = read_conversation({"prompt": CHAT[:4], "completion": CHAT[4:]})
        assert learnt(text, tokenizer) == ["Bye\nnow.<|end|>"]
        assert encode_conversation(text, tokenizer, finds_answers=False).input_ids == tokenizer.apply_chat_template(
            CHAT, return_dict=False
        )
        plain = read_conversation({"prompt": "2 + 2 =", "completion": " 4"})
        tokenizer.chat_template = None
        assert learnt(plain, tokenizer) == [" 4"]
        assert tokenizer.decode(encode_conversation(plain, tokenizer).input_ids) == "2 + 2 = 4"

    def test_a_token_across_the_border_is_not_learnt(self):
        tokenizer = chat_tokenizer()
        tokenizer.add_tokens(["\n\n"])
        chat = [CHATS[1][0], {"role": "assistant", "content": "\nOne"}]
        assert learnt(read_conversation({"messages": chat}), tokenizer) == ["One<|end|>"]

    def test_tools_go_to_the_template(self):
        tokenizer = chat_tokenizer("{% for t in tools or [] %}{{ t.name }};{% endfor %}" + CHATML)
        ids = encode_conversation(read_conversation({"messages": CHAT, "tools": [{"name": "add"}]}), tokenizer)[0]
        assert tokenizer.decode(ids).startswith("add;<|start|>system")

    @pytest.mark.parametrize(
        ("template", "said"),
        [
            (
                CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else '...' }}"),
                "otherwise when it goes on",
            ),
            ("{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}", "adds no token"),
            ("{{ raise_exception('No system\nhere') }}", "template refuses the conversation that begins 'Hi, é!': No"),
            (None, "no chat template. Use a teacher"),
        ],
    )
    def test_templates_that_do_not_serve(self, tmp_path, template, said):
        documents = loaded(tmp_path, [{"messages": CHAT}])
        with pytest.raises(ValueError) as error:
            pack_documents(documents, chat_tokenizer(template), 8, loss_on="assistant")
        assert said in str(error.value) and "\n" not in str(error.value)

    def test_answers_that_can_not_be(self, tmp_path):
        tokenizer = chat_tokenizer()
        with pytest.raises(ValueError, match="no conversation has an answer"):
            pack_documents(loaded(tmp_path, [{"messages": CHATS[2]}]), tokenizer, 8, loss_on="assistant")
        with pytest.raises(ValueError, match="loss_on is 'assistant', but documents have the columns"):
            pack_documents(Dataset.from_dict({"text": ["a b c"]}), tokenizer, 8, loss_on="assistant")
        with pytest.raises(ValueError, match="loss_on is 'user'. It must be 'all' or 'assistant'"):
            pack_documents(loaded(tmp_path, [{"messages": CHAT}]), tokenizer, 8, loss_on="user")
        with pytest.raises(ValueError, match="starts with an answer"):
            encode_conversation(read_conversation({"messages": CHAT[2:]}), tokenizer)

    def test_a_file_of_tokens(self, tmp_path):
        tokenizer = chat_tokenizer()
        documents = loaded(tmp_path, [{"messages": chat} for chat in CHATS])
        save_tokens(tmp_path / "a.npz", documents, tokenizer)
        read = load_documents(tmp_path / "a.npz", cache_dir=tmp_path)
        assert packed(read, tokenizer, tmp_path) == packed(documents, tokenizer, tmp_path)
