"""A talk with a saved model: its state, its stream, its command line."""

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
import torch
from commands import error_of
from tiny_chat import BARE, CHATML, chat_tokenizer
from tiny_distillation import tiny_teacher
from tiny_models import VARIANTS, tiny_model, tiny_vision_model
from transformers import GPT2Config, GPT2LMHeadModel, Mamba2Config, Mamba2ForCausalLM

from cab_hf.cli import main
from cab_hf.runs import chat as chat_module
from cab_hf.runs.chat import Chat, TokenText, printable


TURNS = ("Hi!", "How are\nyou?", "Bye.")
SIZE = 261


def only_writes(model, tokens):
    """Of all tokens a model writes only these, so that a text reads back as the same tokens."""
    others = torch.ones(SIZE, dtype=torch.bool)
    others[list(tokens)] = False
    model.lm_head.register_forward_hook(lambda _, __, logits: logits.masked_fill(others, -1e9))
    return model


def model_of(kind):
    torch.manual_seed(0)
    if kind == "llama":
        return tiny_teacher(vocab_size=SIZE, max_position_embeddings=4096)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=SIZE, n_embd=32, n_layer=2, n_head=2, n_positions=4096))
    if kind == "stock":
        sizes = {"vocab_size": SIZE, "hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8, "num_heads": 8}
        return Mamba2ForCausalLM(Mamba2Config(**sizes, n_groups=1, state_size=8))
    options = {**VARIANTS[kind], "vocab_size": SIZE}
    if "max_position_embeddings" in options:
        options["max_position_embeddings"] = 4096
    return tiny_model(**options)


def letters(tokenizer):
    return tokenizer.convert_tokens_to_ids([*"abcdefghijklmnopqrstuvwxyz", "<|end|>"])


def lengths_read(model):
    counts = []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: counts.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return counts


@pytest.mark.parametrize("kind", ["s6", "s6 positions, plain mlp", "ssd 2 groups, gated mlp", "llama", "gpt2"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_token_is_read_once_and_the_text_is_that_of_reading_it_all_anew(kind, temperature):
    tokenizer = chat_tokenizer()
    model = only_writes(model_of(kind), letters(tokenizer))
    options = {"system": "Be kind.", "max_new_tokens": 9, "temperature": temperature}
    talk = Chat(model, tokenizer, **options, seed=3)
    counts = lengths_read(model)
    read = 0
    for number, turn in enumerate(TURNS):
        drawn = talk._generator.get_state()
        answer = "".join(talk.answer(turn))
        prompt = tokenizer.apply_chat_template(talk.messages[:-1], add_generation_prompt=True, return_dict=False)
        written = len(talk._tokens) - len(prompt)
        assert talk._tokens[: len(prompt)] == prompt
        assert counts == [len(prompt) - read, *[1] * (written - 1)]
        read = len(talk._tokens) - 1
        counts.clear()
        anew = Chat(model, tokenizer, **options)
        anew.messages = talk.messages[: 2 * number + 1]
        anew._generator.set_state(drawn)
        assert "".join(anew.answer(turn)) == answer and len(answer) <= 9
        counts.clear()


def test_answers_in_other_tokens_than_their_text_stay_in_the_state():
    """Two bytes of one text may come as another token: here a special one, letter by letter."""
    tokenizer = chat_tokenizer()
    model = only_writes(model_of("s6"), tokenizer.convert_tokens_to_ids(["a", "b"]))
    tokenizer.add_tokens(["ab", "ba", "aa", "bb"])
    talk = Chat(model, tokenizer, max_new_tokens=6, temperature=1.0)
    answer = "".join(talk.answer("Hi"))
    assert len(answer) == 6 and len(tokenizer(answer)["input_ids"]) < 6
    counts, before = lengths_read(model), len(talk._tokens)
    next(talk.answer("Go on"))
    new = tokenizer("<|end|>\n<|start|>user\nGo on<|end|>\n<|start|>assistant\n")["input_ids"]
    assert counts == [1 + len(new)] and talk._tokens[before : before + len(new)] == new


@pytest.mark.parametrize(
    ("kind", "template"), [("stock", CHATML), ("s6", CHATML.replace("{{ m.content }}", "{{ m.content | upper }}"))]
)
def test_where_a_state_can_not_go_on_all_is_read_anew(kind, template):
    tokenizer = chat_tokenizer(template)
    model = only_writes(model_of(kind), letters(tokenizer))
    talk = Chat(model, tokenizer, max_new_tokens=3, temperature=0.0)
    counts = lengths_read(model)
    for turn in TURNS[:2]:
        counts.clear()
        "".join(talk.answer(turn))
        prompt = tokenizer.apply_chat_template(talk.messages[:-1], add_generation_prompt=True, return_dict=False)
        assert counts[0] == len(prompt)


def test_an_interrupted_answer_stays_and_the_talk_goes_on():
    tokenizer = chat_tokenizer()
    model = only_writes(model_of("s6"), letters(tokenizer)[:-1])
    talk = Chat(model, tokenizer, max_new_tokens=20, temperature=0.0)
    whole = "".join(talk.answer("Hi"))
    talk.reset()
    answer = talk.answer("Hi")
    cut = next(answer) + next(answer)
    answer.close()
    assert talk.messages[-1]["content"] == cut == whole[:2]
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    hook = model.backbone.layers[1].register_forward_hook(interrupt)  # when a part of the cache is updated
    with pytest.raises(KeyboardInterrupt):
        list(talk.answer("More"))
    hook.remove()
    messages = list(talk.messages)
    assert messages[-2]["content"] == "More" and len(messages[-1]["content"]) == 2
    anew = Chat(model, tokenizer, max_new_tokens=20, temperature=0.0)
    anew.messages = messages
    assert "".join(talk.answer("So")) == "".join(anew.answer("So"))


def test_the_end_of_a_turn_ends_the_answer():
    tokenizer = chat_tokenizer()
    model = only_writes(model_of("s6"), [258])
    talk = Chat(model, tokenizer)
    assert list(talk.answer("Hi")) == [] and talk._tokens[-1] == 258
    model.generation_config.eos_token_id = [257, 7]
    assert Chat(model, chat_tokenizer(eos="<eos>")).ends == {257, 7, 0}


def test_without_a_template_the_model_continues():
    tokenizer = chat_tokenizer(None)
    model = only_writes(model_of("s6"), letters(tokenizer)[:-1])
    talk = Chat(model, tokenizer, max_new_tokens=3, temperature=0.0)
    counts = lengths_read(model)
    first, second = ("".join(talk.answer(text)) for text in ("abc", "de"))
    assert counts == [3, 1, 1, 1 + 2, 1, 1]
    whole = Chat(model, tokenizer, max_new_tokens=3, temperature=0.0)
    assert "".join(whole.answer("abc" + first + "de")) == second


def test_no_more_tokens_than_positions():
    tokenizer = chat_tokenizer(None)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=SIZE, n_embd=32, n_layer=2, n_head=2, n_positions=12))
    talk = Chat(only_writes(model, letters(tokenizer)[:-1]), tokenizer, max_new_tokens=50)
    assert len("".join(talk.answer("abcd"))) == 9  # the last one is not read
    with pytest.raises(ValueError, match="positions for 12"):
        list(talk.answer("e"))


CONTROLS = "a\x1b[31mb\x9b2Jc\x1b]0;t\x07d\be\rf\x00g\x7fh\ti\nj\x85k"


def test_no_character_that_steers_a_terminal():
    assert printable(CONTROLS) == "a[31mb2Jc]0;tdefgh\ti\njk"
    assert all(printable(chr(code)) == "" for code in [*range(9), *range(11, 32), *range(127, 160)])


@pytest.mark.parametrize("text", [CONTROLS, "é€𝄞 x", "\ufffd", "ünï"])
def test_a_stream_is_the_text_token_by_token(text):
    tokenizer = chat_tokenizer()
    pieces = TokenText(tokenizer)
    shown = [pieces.add(token) for token in tokenizer(text)["input_ids"]] + [pieces.end()]
    assert "".join(shown) == text
    assert not any("\ufffd" in piece for piece in shown[:-1]) or "\ufffd" in text


def test_incomplete_characters():
    tokenizer = chat_tokenizer()
    tokens = tokenizer("aé€")["input_ids"]
    pieces = TokenText(tokenizer)
    assert [pieces.add(token) for token in tokens[:-1]] == ["a", "", "é", "", ""] and pieces.end() == "\ufffd"
    broken = TokenText(tokenizer)
    assert [broken.add(token) for token in (tokens[1], *tokenizer("bc")["input_ids"])] == ["", "\ufffdb", "c"]
    split = tokenizer("\x9b")["input_ids"]  # C2 9B
    assert len(split) == 2 and printable("".join(map(TokenText(tokenizer).add, split))) == ""


@pytest.fixture
def student(tmp_path):
    model = tiny_model(mixer_type="mamba2", vocab_size=SIZE)
    model.generation_config.eos_token_id = 258
    model.save_pretrained(tmp_path / "student")
    chat_tokenizer().save_pretrained(tmp_path / "student")
    return tmp_path / "student"


def says(monkeypatch, capsys, text, *options):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    capsys.readouterr()
    main(["chat", *map(str, options)])
    return capsys.readouterr()


def test_the_command_through_a_pipe(student, monkeypatch, capsys):
    options = [student, "--max_new_tokens", 5, "--temperature", 0]
    once = says(monkeypatch, capsys, "Hi\n", *options).out
    assert once.endswith("\n") and "> " not in once
    assert says(monkeypatch, capsys, "Hi\n\n/reset\nHi\n/exit\nHi\n", *options).out == 2 * once
    assert says(monkeypatch, capsys, "Hi\nHi", *options).out.startswith(once)
    drawn = [says(monkeypatch, capsys, "Hi\n", *options[:3], "--seed", seed).out for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(printable(one) == one for one in drawn)
    chat_tokenizer("{{ raise_exception('no system') if messages[0].role != 'system' }}" + CHATML).save_pretrained(
        student
    )
    assert says(monkeypatch, capsys, "Hi\n", *options, "--system", "Be kind.").out
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    assert "no system" in error_of(capsys, "chat", *options)


def test_models_of_other_kinds(tmp_path, monkeypatch, capsys):
    tiny_teacher(vocab_size=SIZE).save_pretrained(tmp_path / "teacher")
    chat_tokenizer(BARE).save_pretrained(tmp_path / "teacher")
    options = ["--max_new_tokens", 3]
    assert says(monkeypatch, capsys, "Hi\n", tmp_path / "teacher", *options).out
    plain = says(monkeypatch, capsys, "Hi\nHi\n", "random-llama", *options)
    assert plain.out and plain.err.count("no chat template: it continues") == 1


def test_errors_are_one_line(student, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    assert "max_new_tokens is 0" in error_of(capsys, "chat", student, "--max_new_tokens", 0)
    assert "temperature is -1.0" in error_of(capsys, "chat", student, "--temperature", -1)
    assert "can't be used here" in error_of(capsys, "chat", student, "--device", "nowhere")
    assert "no chat template that could hold it" in error_of(capsys, "chat", "random-llama", "--system", "Be kind.")
    tiny_vision_model().save_pretrained(tmp_path / "images")
    assert "no language model" in error_of(capsys, "chat", tmp_path / "images")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in error_of(capsys, "chat", tmp_path / "empty")
    chat_tokenizer("{{ raise_exception('no turns') }}").save_pretrained(student)
    assert "The chat template refuses" in error_of(capsys, "chat", student)
    for path in student.glob("*token*"):
        path.unlink()
    assert "holds no tokenizer" in error_of(capsys, "chat", student)


def test_what_an_encoding_lacks_is_replaced(monkeypatch):
    class Talk:
        def answer(self, line):
            yield line

    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    chat_module._print_answer(Talk(), "é", stream)
    assert stream.buffer.getvalue() == b"?\n"


def test_ctrl_c_at_a_terminal_stops_the_answer_and_not_the_program(tmp_path):
    model = tiny_model(mixer_type="mamba2", vocab_size=SIZE, tie_word_embeddings=False, lm_head_bias=True)
    tokenizer = chat_tokenizer()
    model.lm_head.bias.data.fill_(-1e4)[letters(tokenizer)[:-1]] = 0.0  # no answer ends by itself
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "cab_hf.cli", "chat", str(tmp_path), "--max_new_tokens", "1000000"]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL) as process:
        os.close(theirs)

        def read_until(text=b"", size=0):
            found, deadline = b"", time.monotonic() + 120
            while text not in found or len(found) < size:
                assert select.select([ours], [], [], max(deadline - time.monotonic(), 0))[0], found
                found += os.read(ours, 10000)

        try:
            read_until(b"> ")
            for _ in range(2):
                os.write(ours, b"Hi\n")
                read_until(size=60)
                process.send_signal(signal.SIGINT)
                read_until(b"> ")
            time.sleep(1)  # a signal between the prompt and the wait for a key is noticed at the next key
            process.send_signal(signal.SIGINT)  # at the prompt
            read_until(b"> ")
            os.write(ours, b"\x04")
            assert process.wait(60) == 0
        finally:
            process.kill()
            os.close(ours)
