"""What a model writes: samples, and how much they repeat."""

from collections.abc import Sequence

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cab_hf.data.packing import encode
from cab_hf.evaluation.metrics import distinct_n, repetition_rate
from cab_hf.inference import check_causal, generating


def generate(
    model: PreTrainedModel, prompts: torch.Tensor, new_tokens: int, batch_size: int = 8, seed: int = 0
) -> dict[str, dict[str, float | int]]:
    """How much a model repeats itself, greedily and sampled at temperature 1.

    Args:
        model: Any causal language model.
        prompts: Token ids (n, t), all real ones.
        new_tokens: Tokens of a continuation at most; one ends early where the model ends it.
        batch_size: Prompts at a time.
        seed: Of the random draws; the global random state is left alone.

    Returns:
        Under `greedy` and `sampled`: `repetition_rate` of 4-grams, `distinct_1`, `distinct_2`, `distinct_3`,
        `n_tokens` made and `n_texts`.
    """
    check_causal(model)
    end = model.generation_config.eos_token_id
    ends = np.atleast_1d([] if end is None else end).astype(int)
    settings = {
        "max_new_tokens": new_tokens,
        "eos_token_id": ends.tolist() or None,
        "pad_token_id": int(ends[0]) if len(ends) else 0,
    }
    report = {}
    for way, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        texts = []
        with generating(model, seed, temperature, **settings):
            for start in tqdm(range(0, len(prompts), batch_size), desc=f"Generating ({way})"):
                batch = prompts[start : start + batch_size].to(model.device)
                out = model.generate(batch, attention_mask=torch.ones_like(batch))
                texts += [_before_end(row, ends) for row in out[:, batch.shape[1] :].tolist()]
        report[way] = {
            "repetition_rate": repetition_rate(texts),
            **{f"distinct_{size}": distinct_n(texts, size) for size in (1, 2, 3)},
            "n_tokens": sum(map(len, texts)),
            "n_texts": len(texts),
        }
    return report


def _before_end(row: list[int], ends: Sequence[int]) -> list[int]:
    return row[: next((place for place, token in enumerate(row) if token in ends), len(row))]


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 64,
    seed: int = 0,
    *,
    temperature: float = 1.0,
) -> str:
    """A continuation of `prompt`, the same for the same seed; the global random state is left alone.

    Args:
        model: Any causal language model.
        tokenizer: Its tokenizer.
        prompt: Text to continue.
        max_new_tokens: Tokens at most; fewer when the model ends the text.
        seed: Of the random draws.
        temperature: Divides the logits; 0.0 takes the most likely token each time.

    Returns:
        The new text, without the prompt.
    """
    check_causal(model)
    input_ids = torch.tensor(encode([prompt], tokenizer), device=model.device)
    settings = {
        "max_new_tokens": max_new_tokens,
        "eos_token_id": model.generation_config.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    }
    with generating(model, seed, temperature, **settings):
        output = model.generate(input_ids, attention_mask=torch.ones_like(input_ids))
    return tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True)
