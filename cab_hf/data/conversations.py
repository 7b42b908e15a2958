"""Conversations: rows of messages in, checked and as text; tokens out, through a tokenizer's chat template.

Shape legend: `t` token.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase


MESSAGES = "messages"
PROMPT, COMPLETION = "prompt", "completion"
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# Around what the assistant writes, in the templates that have it.
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Encoded(NamedTuple):
    """A conversation's tokens.

    Attributes:
        input_ids: (t,), with the special tokens that the template writes, and no others.
        learnt: (t,), whether the assistant wrote the token; all are, where nobody asked.
    """

    input_ids: list[int]
    learnt: list[bool]


def has_conversations(columns: Sequence[str]) -> bool:
    """Whether a table holds conversations: a column `messages`, or `prompt` and `completion`, and no column `text`."""
    return "text" not in columns and (MESSAGES in columns or {PROMPT, COMPLETION} <= set(columns))


def read_conversation(row: Mapping[str, Any], column: str = MESSAGES) -> str:
    """A row's conversation as one text of JSON, the same for the same conversation.

    Args:
        row: with a list of messages in `column`, or else with `prompt` and `completion`, both lists of messages or
            both plain text; and perhaps `tools`.
        column: of the messages.

    Returns:
        JSON of {"messages", "first", "tools"?}, where `first` is the first message that is an answer to learn; or of
        {"prompt", "completion"}, where both are plain text, which no template is for.

    Raises:
        ValueError: no messages, an unknown role, content that is no text, or nothing in it.

    Example:
        >>> read_conversation({"messages": [{"role": "user", "content": "Hi"}]})
        '{"messages": [{"role": "user", "content": "Hi"}], "first": 0}'
    """
    if row.get(column) is None and isinstance(row.get(PROMPT), str) and isinstance(row.get(COMPLETION), str):
        pair = {name: row[name] for name in (PROMPT, COMPLETION)}
        if not pair[COMPLETION].strip():
            raise ValueError(f"column {COMPLETION!r} is empty. Fill it, or take the row out.")
        return json.dumps(pair, ensure_ascii=False)
    if column in row or not {PROMPT, COMPLETION} <= row.keys():
        messages = _messages(row.get(column), column)
        first = 0
    else:
        prompt, completion = (_messages(row[name], name) for name in (PROMPT, COMPLETION))
        messages, first = prompt + completion, len(prompt)
    if not any(message["content"].strip() or len(message) > 2 for message in messages):
        raise ValueError("the conversation is empty. Fill it, or take the row out.")
    found: dict[str, Any] = {"messages": messages, "first": first}
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ValueError(f"column 'tools' is no JSON ({error.msg}). Give a list of JSON schemas.") from error
    if tools:
        found["tools"] = _without_none(tools)
    return json.dumps(found, ensure_ascii=False)


def _messages(value: Any, column: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        kind = "nothing" if value is None else type(value).__name__
        raise ValueError(f"column {column!r} holds {kind}, not a list of messages with role and content.")
    if not value:
        raise ValueError(f"column {column!r} has no messages. Fill it, or take the row out.")
    messages = []
    for place, given in enumerate(value):
        if not isinstance(given, dict) or "role" not in given or given["role"] is None:
            keys = sorted(given) if isinstance(given, dict) else type(given).__name__
            raise ValueError(f"message {place + 1} has {keys}, but needs role and content. Rename them.")
        message = _without_none(given)
        if message["role"] not in ROLES:
            raise ValueError(
                f"message {place + 1} has the unknown role {message['role']!r}. Use one of {', '.join(ROLES)}."
            )
        if not {"content", "tool_calls"} & message.keys():
            raise ValueError(f"message {place + 1} has {sorted(given)}, but needs role and content. Fill it.")
        content = message.pop("content", "")
        if isinstance(content, list) and all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in content
        ):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise ValueError(f"message {place + 1} has content of type {type(content).__name__}, not text.")
        messages.append({"role": message.pop("role"), "content": content, **message})
    return messages


def _without_none(value: Any) -> Any:
    """Tables fill up the keys that other rows have by None."""
    if isinstance(value, Mapping):
        return {key: _without_none(one) for key, one in value.items() if one is not None}
    return [_without_none(one) for one in value] if isinstance(value, list) else value


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises a ValueError where a tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise ValueError(
            "The documents are conversations, but tokenizer has no chat template. Use a teacher that was made for "
            "chat, or set tokenizer.chat_template (a file chat_template.jinja in the teacher's folder)."
        )


def render(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **options: Any,
) -> Any:
    """`tokenizer.apply_chat_template`, whose errors are one line that names the conversation."""
    try:
        return tokenizer.apply_chat_template(list(messages), tools=list(tools) if tools else None, **options)
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        raise ValueError(f"The chat template refuses {_named(messages)}: {' '.join(str(error).split())}.") from error


def encode_conversation(text: str, tokenizer: PreTrainedTokenizerBase, finds_answers: bool = True) -> Encoded:
    """The tokens of a conversation, and which of them the assistant wrote.

    A template's `{% generation %}` marks say so. Without them each answer is what its turn adds to the conversation
    before it with the template's prompt for an answer. White space after the token that ends the turn is not part of
    it, nor is a token that the prompt has a part of. Of a row with `prompt` and `completion` only the completion's
    answers count.

    Args:
        text: as [`read_conversation`] gives it.
        tokenizer: with a chat template, unless prompt and completion are plain text.
        finds_answers: False: all tokens count as learnt.

    Raises:
        ValueError: no chat template, one that refuses the conversation, or one that does not show which tokens are
            the assistant's.
    """
    conversation = json.loads(text)
    if PROMPT in conversation:
        return _encode_pair(conversation, tokenizer, finds_answers)
    check_template(tokenizer)
    messages, tools, first = conversation["messages"], conversation.get("tools"), conversation["first"]
    if not finds_answers:
        ids = list(render(messages, tokenizer, tools, return_dict=True)["input_ids"])
        return Encoded(ids, [True] * len(ids))
    if not tokenizer.is_fast:
        raise ValueError(
            f"loss_on='assistant' needs a fast tokenizer, which {type(tokenizer).__name__} is not. Use loss_on='all'."
        )
    written_by = functools.partial(_text, tokenizer=tokenizer, tools=tools)
    whole = written_by(messages)
    found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, places = list(found["input_ids"]), found["offset_mapping"]
    if _MARKS.search(tokenizer.get_chat_template(tools=tools)):
        marked = render(messages, tokenizer, tools, return_dict=True, return_assistant_tokens_mask=True)
        start = len(_beginning(whole, written_by(messages[:first], add_generation_prompt=True), messages))
        return Encoded(ids, [bool(one) and at >= start for one, (at, _) in zip(marked["assistant_masks"], places)])
    learnt = [False] * len(ids)
    for index in range(first, len(messages)):
        if messages[index]["role"] != "assistant":
            continue
        if index == 0:
            raise ValueError(f"{_named(messages)} starts with an answer, for which there is no prompt. {_OUT}")
        before = _beginning(whole, written_by(messages[:index], add_generation_prompt=True), messages)
        after = _beginning(whole, written_by(messages[: index + 1]), messages)
        # A token that the prompt has a part of is not the answer's.
        answer = [token for token, (at, end) in enumerate(places) if len(before) <= at and end <= len(after)]
        if not answer:
            raise ValueError(f"The chat template adds no token for an answer in {_named(messages)}. {_OUT}")
        for token in answer[: _end_of_turn([ids[token] for token in answer], tokenizer)]:
            learnt[token] = True
    return Encoded(ids, learnt)


_OUT = "Use loss_on='all', or a chat template with {% generation %} marks around the assistant's text."


def _encode_pair(pair: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, finds_answers: bool) -> Encoded:
    """Plain prompt and completion, after the special tokens with which the tokenizer begins a text."""

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    prompt, whole = tokens(pair[PROMPT]), tokens(pair[PROMPT] + pair[COMPLETION])
    # Apart where a token would be of both: a prompt that is to be completed has its own tokens, too.
    ids = whole if whole[: len(prompt)] == prompt else prompt + tokens(pair[COMPLETION])
    bare, special = (tokenizer("a", add_special_tokens=adds)["input_ids"] for adds in (False, True))
    begin = special[: next((at for at in range(len(special)) if special[at : at + len(bare)] == bare), 0)]
    added = [] if ids[: len(begin)] == begin else begin
    learnt = [not finds_answers] * (len(added) + len(prompt)) + [True] * (len(ids) - len(prompt))
    return Encoded(added + ids, learnt)


def _text(
    messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, tools: Any, **options: bool
) -> str:
    return render(messages, tokenizer, tools, tokenize=False, **options) if messages else ""


def _beginning(whole: str, part: str, messages: Sequence[Mapping[str, Any]]) -> str:
    if not whole.startswith(part):
        raise ValueError(
            f"The chat template writes {_named(messages)} otherwise when it goes on, so its answers can't be told "
            f"apart. {_OUT}"
        )
    return part


def _end_of_turn(answer: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of an answer up to the special token that ends it, where only white space follows."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    last = next((place for place in reversed(range(len(answer))) if answer[place] in special), None)
    if last is None or tokenizer.decode(answer[last + 1 :]).strip():
        return len(answer)
    return last + 1


def _named(messages: Sequence[Mapping[str, Any]]) -> str:
    start = " ".join(next((one["content"] for one in messages if one["role"] == "user"), "").split())
    return f"the conversation that begins {start[:40]!r}"
