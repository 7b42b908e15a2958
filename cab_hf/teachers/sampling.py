"""Training text from the teacher itself, where there is little of any other.

A student learns the teacher's next-token distributions only on text that it sees. Text that the teacher writes is
unlimited, and where it starts from nothing it is of all the domains that the teacher knows (sequence-level knowledge
distillation, arXiv 1606.07947, with samples in place of beam search; soft KL on them as in arXiv 2306.13649).

Shape legend: `b` batch, `t` token.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cab_hf.data.packing import TOKENISED, Documents, pack_documents, vocabulary_digest
from cab_hf.inference import check_causal, generating, num_positions


PROMPT_LENGTH = 16
"""Tokens of a prompt, where no other number is asked for."""


def sample_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num_tokens: int,
    *,
    length: int = 512,
    prompts: Documents | None = None,
    prompt_length: int = PROMPT_LENGTH,
    temperature: float = 1.0,
    batch_size: int = 64,
    seed: int = 0,
    torch_compile: bool = False,
) -> Dataset:
    """Documents that a model writes, token by token from its whole distribution.

    Args:
        model: Any causal language model, where it should run and in the dtype it should have.
        tokenizer: Its tokenizer.
        num_tokens: Tokens wanted; the last batch is cut where they are reached.
        length: Tokens of a document at most, those of its prompt included; fewer where the model ends it.
        prompts: Documents as `load_documents` reads them; each sample starts with `prompt_length` tokens of them, from
            anywhere in them. None: with the tokenizer's beginning-of-sequence token, or its end-of-sequence token,
            which is then not part of the document.
        prompt_length: Tokens of a prompt; at least 2.
        temperature: Divides the logits; 1.0 is the model's own distribution, smaller ones are less varied.
        batch_size: Documents written side by side.
        seed: Of all draws. The same seed, batch size and machine give the same documents; the global random state is
            left alone.
        torch_compile: On a GPU, compile the model and give it a cache of fixed size, so that a token is one CUDA
            graph: up to a minute once, then faster. For models that transformers can compile.

    Returns:
        Rows of {"input_ids": int32 (t,), "name": str, "vocabulary": str}: what `save_tokens` writes and
        `pack_documents` packs.

    Raises:
        ValueError: An argument out of range, a length beyond the model's positions, prompts too short for one prompt,
            or a tokenizer without any token to start from.
    """
    _check(num_tokens, length, prompt_length, temperature, batch_size, prompts is not None)
    check_causal(model)
    longest = longest_document(model, prompts is not None)
    if longest is not None and length > longest:
        raise ValueError(
            f"length is {length}, but {type(model).__name__} has positions for documents of {longest} tokens. "
            f"Give a length of at most {longest}."
        )
    starts = _starts(tokenizer, prompts, prompt_length, seed)
    stored = 0 if prompts is not None else 1  # tokens of a start that are not the document's
    batches = (np.stack([*itertools.islice(starts, batch_size)]) for _ in itertools.count())
    written = (
        row[stored:]
        for index, batch in enumerate(batches)
        for row in _generate(model, tokenizer, batch, length + stored, temperature, [seed, index], torch_compile)
    )
    rows: list[list[int]] = []
    missing = num_tokens
    with tqdm(total=num_tokens, desc="Sampling tokens", unit="tok") as progress:
        while missing:
            rows.append(next(written)[:missing])
            missing -= len(rows[-1])
            progress.update(len(rows[-1]))
    digest = vocabulary_digest(tokenizer)
    return Dataset.from_dict(
        {
            "input_ids": rows,
            "name": [f"sample {index}" for index in range(len(rows))],
            "vocabulary": [digest] * len(rows),
        },
        features=TOKENISED,
    )


def longest_document(model: PreTrainedModel, has_prompts: bool) -> int | None:
    """Tokens that a model's positions have room for; without a prompt, one of them is what a document starts from."""
    positions = num_positions(model)
    return None if positions is None else positions - (not has_prompts)


def _check(
    num_tokens: int, length: int, prompt_length: int, temperature: float, batch_size: int, has_prompts: bool
) -> None:
    least = {"num_tokens": (num_tokens, 1), "batch_size": (batch_size, 1), "prompt_length": (prompt_length, 2)}
    least["length"] = (length, prompt_length + 1 if has_prompts else 1)
    for name, (value, lowest) in least.items():
        if value < lowest:
            wanted = " (a prompt and a token more)" if name == "length" and has_prompts else ""
            raise ValueError(f"{name} is {value}. Give at least {lowest}{wanted}.")
    if not temperature > 0.0:
        raise ValueError(f"temperature is {temperature}. Give a positive one; 1.0 is the model's own distribution.")


def _starts(
    tokenizer: PreTrainedTokenizerBase, prompts: Documents | None, prompt_length: int, seed: int
) -> Iterator[np.ndarray]:
    """What samples start from, without end: (t,) each, prompts from any place of the texts, each as likely."""
    if prompts is None:
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if first is None:
            raise ValueError("The tokenizer has neither a bos_token nor an eos_token to start from. Give prompts.")
        while True:
            yield np.array([first])
    rows = pack_documents(
        prompts, tokenizer, 64 * prompt_length, isolate_documents=False, append_eos=False, drop_last=False
    )
    # All rows but the last are full; a prompt may start anywhere in a row where it still fits.
    places_a_row = 63 * prompt_length + 1
    places = (len(rows) - 1) * places_a_row + max(len(rows[-1]["input_ids"]) - prompt_length + 1, 0)
    if places == 0:
        raise ValueError(
            f"prompts hold fewer tokens than a prompt_length of {prompt_length}. Give more text, or a shorter length."
        )
    generator = np.random.default_rng(seed)
    while True:
        row, start = divmod(int(generator.integers(places)), places_a_row)
        yield np.array(rows[row]["input_ids"][start : start + prompt_length])


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    starts: np.ndarray,
    length: int,
    temperature: float,
    seed: list[int],
    torch_compile: bool,
) -> list[list[int]]:
    """Rows of at most `length` tokens, each up to the first token that ends it, that one included.

    Args:
        starts: (b, t) int.
    """
    ends = _end_tokens(model, tokenizer)
    inputs = torch.from_numpy(starts).to(model.device)
    compiles = torch_compile and model.device.type == "cuda" and model._can_compile_fullgraph
    settings = {
        "max_new_tokens": length - inputs.shape[1],
        "eos_token_id": ends or None,
        "pad_token_id": ends[0] if ends else None,
        "cache_implementation": "static" if compiles else None,  # transformers compiles where the cache is static
    }
    with generating(model, int(np.random.SeedSequence(seed).generate_state(1)[0]), temperature, **settings):
        output = model.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs))
    rows = []
    for row in output.cpu().numpy():
        stops = np.flatnonzero(np.isin(row[starts.shape[1] :], ends))
        rows.append(row[: starts.shape[1] + stops[0] + 1 if len(stops) else len(row)].tolist())
    return rows


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a text: the model's own, and the tokenizer's."""
    own = model.generation_config.eos_token_id
    ends = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    return sorted({end for end in ends if end is not None})
