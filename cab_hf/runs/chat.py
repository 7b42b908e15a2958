"""A talk with a saved model: turns in, text out as it comes, and a state that goes on from turn to turn.

Shape legend: `b` batch, `t` token, `V` vocabulary.
"""

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, TextIO

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from cab_hf.data.conversations import render
from cab_hf.data.packing import encode
from cab_hf.export.loading import load_tokenizer, load_whole, read_config
from cab_hf.inference import accepted_arguments, check_causal, check_positions, place_and_dtype
from cab_hf.lora import core_of
from cab_hf.models.generation import StatefulGenerationMixin
from cab_hf.teachers.loading import load_teacher


BUILT_IN = ("smollm2-demo", "random-llama")
# C0 and C1 but tab and newline, and DEL: what steers a terminal.
_CONTROLS = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {0x09, 0x0A})
_CACHE_NAMES = ("cache", "cache_params", "past_key_values")
_REPLACEMENT = "\ufffd"


def printable(text: str) -> str:
    r"""Text without the characters that steer a terminal; newlines and tabs stay.

    Example:
        >>> printable("\x1b[2Jred\r\n")
        '[2Jred\n'
    """
    return text.translate(_CONTROLS)


class TokenText:
    """Text of tokens that come one by one: what is sure of it, as soon as it is.

    Args:
        tokenizer: whose tokens they are; special ones are left out of the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start = self._shown = 0  # tokens whose text is known, and those of them that the next ones depend on

    def add(self, token: int) -> str:
        """The text that a token completes; empty within a character of several tokens."""
        self._tokens.append(token)
        return self._next(is_last=False)

    def end(self) -> str:
        """What is left, incomplete characters as U+FFFD."""
        return self._next(is_last=True)

    def _next(self, is_last: bool) -> str:
        # Some tokenizers write a token otherwise at the start of a text, so the last ones are read again with it.
        known = self._decode(self._tokens[self._start : self._shown])
        text = self._decode(self._tokens[self._start :])
        if not is_last and text.endswith(_REPLACEMENT):
            return ""
        self._start, self._shown = self._shown, len(self._tokens)
        return text[len(known) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Chat:
    """A conversation with a model.

    The model reads each token once: its cache goes on from turn to turn. Only where the template writes earlier turns
    otherwise once there are later ones, or where an answer was interrupted, is the whole conversation read anew.
    Without a chat template a turn is text, which the model continues, and the next turn goes on from there.

    Args:
        model: any causal language model; it is put into evaluation mode.
        tokenizer: its tokenizer.
        system: the system's message, for a tokenizer with a chat template.
        max_new_tokens: tokens of an answer at most.
        temperature: divides the logits; 0.0 takes the most likely token each time.
        seed: of all draws; the global random state is left alone.

    Raises:
        ValueError: an argument out of range, a `system` without a template, or a model that is no causal one.

    Example:
        >>> from cab_hf.teachers.demo import random_llama
        >>> chat = Chat(*random_llama(), max_new_tokens=4, temperature=0.0)
        >>> len("".join(chat.answer("Hello"))) > 0
        True
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.7,
        seed: int = 0,
    ) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}. Give at least 1.")
        if not temperature >= 0.0:
            raise ValueError(f"temperature is {temperature}. Give 0 (the most likely token each time) or more.")
        self.has_template = bool(tokenizer.chat_template)
        if system is not None and not self.has_template:
            raise ValueError("system is given, but the model has no chat template that could hold it. Leave it out.")
        check_causal(model)
        self.model, self.tokenizer = model.eval(), tokenizer
        # Other recurrent models forget their state where they read several tokens at once.
        self._goes_on = isinstance(model, StatefulGenerationMixin) or not model._is_stateful
        inner = getattr(core_of(model), "inner", model)  # a hybrid hands on what its teacher's class takes
        self._cache_name = next(name for name in _CACHE_NAMES if name in accepted_arguments(inner))
        self.system, self.max_new_tokens, self.temperature = system, max_new_tokens, temperature
        ends = model.generation_config.eos_token_id
        self.ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
        self._generator = torch.Generator(model.device).manual_seed(seed)
        self.reset()

    def reset(self) -> None:
        """Begins a new conversation."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self._tokens: list[int] = []  # of the conversation, as it was read and written
        self._rendered = ""  # its text, by the template
        self._forget()

    def _forget(self) -> None:
        self._cache, self._num_read = None, 0

    def answer(self, text: str) -> Iterator[str]:
        """The model's answer, piece by piece, as it comes; what it wrote until an interrupt stays in the conversation.

        Args:
            text: of the user's turn.

        Raises:
            ValueError: the template refuses the turn, nothing to read, or no positions are left.
        """
        before = len(self.messages)
        asked = [*self.messages, {"role": "user", "content": text}]
        tokens, rendered = self._with_turn(asked, text)
        self._check_length(tokens)
        if not self._goes_on or tokens[: self._num_read] != self._tokens[: self._num_read]:
            self._forget()
        self._tokens, self.messages = tokens, asked
        pieces, written = TokenText(self.tokenizer), len(tokens)
        is_whole = False
        try:
            for token in self._generate():
                self._tokens.append(token)
                if token in self.ends:
                    break
                if piece := printable(pieces.add(token)):
                    yield piece
            if piece := printable(pieces.end()):
                yield piece
            is_whole = True
        finally:
            if not is_whole:  # a forward pass may have been cut short, so the cache holds nobody knows what
                self._forget()
            self._close(rendered, self._tokens[written:], before + 1)

    def _with_turn(self, messages: list[dict[str, str]], text: str) -> tuple[list[int], str]:
        """Tokens and text of the conversation with a new turn, after those that are there where they can stay."""
        if not self.has_template:
            bare = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            tokens = [*self._tokens, *bare] if self._tokens else encode([text], self.tokenizer)[0]
            if not tokens:
                raise ValueError("there is nothing to continue. Write some text.")
            return tokens, ""
        rendered = render(messages, self.tokenizer, tokenize=False, add_generation_prompt=True)
        whole = self._encode(rendered)
        known = self._tokens
        if whole[: len(known)] == known or not known or not rendered.startswith(self._rendered):
            return whole, rendered
        # The answer was written in other tokens than its text is read in. They stay, if the new turn's are as ever.
        added = self._encode(rendered[len(self._rendered) :])
        return (known + added if self._encode(self._rendered) + added == whole else whole), rendered

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _check_length(self, tokens: list[int]) -> None:
        check_positions(self.model, {"input_ids": torch.empty(1, len(tokens), device="meta")})

    def _close(self, rendered: str, written: list[int], place: int) -> None:
        """Puts an answer into the conversation."""
        ended = bool(written) and written[-1] in self.ends
        if not self.has_template:
            self.messages = []
            if ended:  # of the text: the next turn begins another
                self.reset()
            return
        answer = self._decode(written[:-1] if ended else written)
        del self.messages[place:]
        self.messages.append({"role": "assistant", "content": answer})
        self._rendered = rendered + answer + (self._decode(written[-1:]) if ended else "")

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _generate(self) -> Iterator[int]:
        """New tokens, after those of the conversation that the cache has not read."""
        if self._cache is None:
            self._cache = DynamicCache(config=self.model.config)
        for _ in range(self.max_new_tokens):
            new = torch.tensor([self._tokens[self._num_read :]], device=self.model.device)
            mask = torch.ones(1, len(self._tokens), dtype=torch.long, device=self.model.device)
            with torch.no_grad():
                output = self.model(
                    input_ids=new, attention_mask=mask, use_cache=True, **{self._cache_name: self._cache}
                )
            self._num_read = len(self._tokens)
            yield self._draw(output.logits[0, -1].float())
            if self._at_the_end():
                return

    def _at_the_end(self) -> bool:
        try:
            self._check_length(self._tokens)
        except ValueError:
            return True
        return False

    def _draw(self, logits: torch.Tensor) -> int:
        """A token of `(V,)` logits."""
        logits = logits[: len(self.tokenizer)]  # those beyond are padding of the vocabulary
        if self.temperature == 0.0:
            return int(logits.argmax())
        shares = (logits / self.temperature).softmax(-1)
        return int(torch.multinomial(shares, 1, generator=self._generator))


def chat(
    folder: str,
    *,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.7,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    stdin: TextIO | None = None,
    stdout: TextIO | None = None,
) -> None:
    """Talks with a saved model: a line in is a turn, `/reset` begins anew, `/exit` and the end of input end it.

    Ctrl-C stops an answer. At a terminal the program goes on after it, and after a turn that is refused.

    Args:
        folder: of a student or of any other causal language model, its Hub id, or the name of a built-in teacher.
        system, max_new_tokens, temperature, seed: as [`Chat`] has them.
        device, dtype: as [`~cab_hf.inference.place_and_dtype`] has them.
        stdin, stdout: the process's own if not given.

    Raises:
        ValueError: no language model there, no tokenizer, or a bad argument.
    """
    stdin, stdout = stdin or sys.stdin, stdout or sys.stdout
    place, kind = place_and_dtype(device, dtype)
    model, tokenizer = _load(folder)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    talk = Chat(model.to(place, kind), tokenizer, system=system, **settings)
    at_terminal = stdin.isatty()
    if not talk.has_template:
        print("This model has no chat template: it continues what you write.", file=sys.stderr)
    if at_terminal:
        with suppress(ImportError):  # where there is none, a line can't be edited
            import readline  # noqa: F401
        print("/reset begins anew, /exit ends. Ctrl-C stops an answer.", file=sys.stderr)
    while True:
        try:
            line = _read_line(stdin, stdout, at_terminal)
            if line is None or line.strip() == "/exit":
                return
            if line.strip() == "/reset":
                talk.reset()
            elif line.strip():
                _print_answer(talk, line, stdout)
        except KeyboardInterrupt:  # at the prompt
            if not at_terminal:
                raise
            print(file=stdout, flush=True)
        except ValueError as error:
            if not at_terminal:
                raise
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)


def _read_line(stdin: TextIO, stdout: TextIO, at_terminal: bool) -> str | None:
    """A turn, or None at the end of input."""
    try:
        if at_terminal and stdin is sys.stdin:
            return input("> ")
    except EOFError:
        print(file=stdout)
        return None
    line = stdin.readline()
    return line.removesuffix("\n") if line else None


def _print_answer(talk: Chat, line: str, stdout: TextIO) -> None:
    encoding = stdout.encoding or "utf-8"
    answer = talk.answer(line)
    try:
        for piece in answer:
            stdout.write(piece.encode(encoding, "replace").decode(encoding))
            stdout.flush()
    except KeyboardInterrupt:
        answer.close()
    print(file=stdout, flush=True)


def _load(folder: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if folder in BUILT_IN:
        return load_teacher(folder)
    config = read_config(folder)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{folder} holds a {config.model_type!r} model, which is no language model. Name one.")
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise ValueError(f"{folder} holds no tokenizer. Save that of its teacher there: tokenizer.save_pretrained.")
    return load_whole(AutoModelForCausalLM, folder), tokenizer
