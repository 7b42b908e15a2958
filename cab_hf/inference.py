"""Models in use: where and how they run, in evaluation mode, and what they generate."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from cab_hf.lora import core_of


logger = logging.get_logger(__name__)

_DTYPES = ("float32", "bfloat16")


@contextmanager
def generating(model: PreTrainedModel, seed: int, temperature: float, **settings: Any) -> Iterator[None]:
    """`model.generate` draws from the model's whole distribution, the same for the same seed.

    A model's own settings, which may hold penalties or cut tails, are put aside; the global random state is left
    alone.

    Args:
        model: Any causal language model.
        seed: Of the random draws.
        temperature: Divides the logits; 0.0 takes the most likely token each time.
        settings: Others of a `GenerationConfig`.
    """
    draws = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    core = core_of(model)
    own = core.generation_config
    # As an argument of `generate` it would be filled up with the model's own.
    core.generation_config = GenerationConfig(**(draws if temperature > 0 else {"do_sample": False}), **settings)
    try:
        with evaluating(model), torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield
    finally:
        core.generation_config = own


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Models in evaluation mode and without gradients; each module then has its mode back."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def check_causal(model: PreTrainedModel) -> None:
    """That a language model predicts next tokens, by what it does: BERT's kin are made for it, too.

    Raises:
        ValueError: its first logits change with later tokens.
    """
    vocab_size = core_of(model).config.get_text_config().vocab_size
    with evaluating(model):
        ahead = reads_ahead(lambda ids: model(input_ids=ids).logits, vocab_size, model.device)
    if ahead:
        raise ValueError(
            f"{type(core_of(model)).__name__} reads the tokens behind the one that it stands at, so it predicts no "
            "next tokens. Use a causal language model; BERT and its kin are such only with is_decoder=True."
        )


def reads_ahead(run: Callable[[Tensor], Tensor], vocab_size: int, device: torch.device) -> bool:
    """Whether the first output of a row depends on its other tokens; `run` maps tokens `(b, t)` to `(b, t, d)`."""
    tokens = torch.arange(3, 13, device=device).view(2, 5) % vocab_size
    changed = torch.cat((tokens[:, :1], (tokens[:, 1:] + 1) % vocab_size), dim=1)
    first, second = (run(ids)[:, 0] for ids in (tokens, changed))
    # Rounding may depend on other tokens, where experts or codes share a product; fresh weights move by 1e-3 and more.
    rounding = 5e-4 if first.dtype in (torch.float32, torch.float64) else 2e-3
    return bool((first.float() - second.float()).norm() > rounding * first.float().norm())


def accepted_arguments(model: PreTrainedModel) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(core_of(model).forward).parameters


def num_positions(model: PreTrainedModel) -> int | None:
    """Tokens of a row that a language model has positions for; None: any number. Rotary positions go on beyond it."""
    return getattr(core_of(model).config.get_text_config(), "max_position_embeddings", None)


def check_positions(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> None:
    """That a language model has learned positions for a batch; beyond those of a rotary one it only warns.

    Raises:
        ValueError: a row of more tokens than the table has.
    """
    limit, length = num_positions(model), inputs["input_ids"].shape[1]
    if limit is None or length <= limit or torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return
    mask = inputs.get("attention_mask")
    if "position_ids" in inputs:
        length = int(inputs["position_ids"].max()) + 1
    elif mask is not None:
        length = int((mask != 0).sum(dim=-1).max())
    if length <= limit:
        return
    name = type(core_of(model)).__name__
    if getattr(core_of(model).config.get_text_config(), "rope_parameters", None) is None:
        raise ValueError(
            f"A row has {length} tokens, but {name} has positions for {limit} (`max_position_embeddings`). Give "
            "shorter rows (`block_size`), or another model."
        )
    logger.warning_once(
        f"A row has {length} tokens, more than the {limit} (`max_position_embeddings`) that {name} was trained on: "
        "what it says beyond them may be worth little. Shorter rows (`block_size`) avoid that."
    )


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def place_and_dtype(device: str | None, dtype: str | None) -> tuple[torch.device, torch.dtype]:
    """Where a command runs its models, and in which dtype: on a GPU in bfloat16 if there is one, else in float32.

    Raises:
        ValueError: a device that can't be used here, or another dtype than these two.
    """
    try:
        place = torch.empty(0, device=device or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} can't be used here ({reason}). Use cpu, or leave it out.") from error
    dtype = dtype or ("bfloat16" if place.type == "cuda" else "float32")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}. It must be {' or '.join(_DTYPES)}.")
    return place, getattr(torch, dtype)
