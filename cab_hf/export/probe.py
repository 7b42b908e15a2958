"""What a student says of a few texts, kept beside its exports, so that they can be checked anywhere."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from cab_hf.data.documents import load_documents
from cab_hf.data.packing import tokens_of
from cab_hf.export.loading import load_tokenizer
from cab_hf.inference import generating


PROBE_NAME = "export_probe.json"  # a student's own is `probe.json`, and both may lie in one folder
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 4, 48, 24


@torch.no_grad()
def make_probe(
    student: PreTrainedModel, prompts: Sequence[Sequence[int]], new_tokens: int = NEW_TOKENS
) -> dict[str, Any]:
    """What a language student says of some prompts, to be compared with what its export says.

    Args:
        student: the student, where it is and in its dtype.
        prompts: token ids, two or more each.
        new_tokens: length of the greedy continuations.

    Returns:
        `prompts`, `new_tokens`, `banned` (tokens that end a text, which a continuation leaves out) and `rows`: of each
        prompt the log-probabilities of its tokens from the second on, the greedy continuation, its log-probabilities,
        and how far each is ahead of the next likeliest token.
    """
    end = student.generation_config.eos_token_id
    banned = [] if end is None else [end] if isinstance(end, int) else list(end)
    rows, settings = [], {"max_new_tokens": new_tokens, "pad_token_id": 0, "suppress_tokens": banned or None}
    with generating(student, seed=0, temperature=0.0, **settings):
        for prompt in prompts:
            ids = torch.tensor([prompt], device=student.device)
            first = student(ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
            told = first.gather(1, ids[0, 1:, None])[:, 0].tolist()
            options = {"output_logits": True, "return_dict_in_generate": True}
            out = student.generate(ids, attention_mask=torch.ones_like(ids), **options)
            logs = torch.cat([step.float().log_softmax(-1) for step in out.logits])
            greedy = out.sequences[0, ids.shape[1] :]
            said = logs.gather(1, greedy[:, None])[:, 0]
            others = logs.scatter(1, greedy[:, None], -torch.inf)
            others[:, banned] = -torch.inf
            rows.append([told, greedy.tolist(), said.tolist(), (said - others.amax(1)).tolist()])
    prompts = [list(prompt) for prompt in prompts]
    return {"prompts": prompts, "new_tokens": new_tokens, "banned": banned, "rows": rows}


def probe_of(
    folder: str | Path, student: PreTrainedModel, data: str = "builtin", longest: int = PROMPT_TOKENS + NEW_TOKENS
) -> dict[str, Any]:
    """`make_probe` on the beginnings of texts, with the folder's tokenizer; without one, on fixed token ids.

    Args:
        folder: of the student.
        student: read from it.
        data: texts, as `load_documents` takes them.
        longest: tokens of a prompt with its continuation, at most.
    """
    new_tokens = min(NEW_TOKENS, longest // 2)
    length = min(PROMPT_TOKENS, longest - new_tokens)
    tokenizer, size = load_tokenizer(folder), student.config.vocab_size
    if tokenizer is None:
        rows = [[7919 * (row + 1) * (place + 1) % size for place in range(length)] for row in range(PROMPTS)]
        return make_probe(student, rows, new_tokens)
    rows = []
    for document in load_documents(data):
        ids = tokens_of(document, tokenizer)
        if len(ids) >= length:
            rows.append(ids[:length])
        if len(rows) == PROMPTS:
            return make_probe(student, rows, new_tokens)
    raise ValueError(f"Of the texts in {data!r} {len(rows)} have {length} tokens; {PROMPTS} are needed. Give others.")


def write_probe(folder: Path, probe: Mapping[str, Any]) -> None:
    """Writes a probe into the folder of an export."""
    (folder / PROBE_NAME).write_text(json.dumps(probe), encoding="utf-8")
