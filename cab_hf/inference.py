"""Models in use: where and how they run, in evaluation mode, and what they generate."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from cab_hf.lora import core_of


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


def accepted_arguments(model: PreTrainedModel) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(core_of(model).forward).parameters


def num_positions(model: PreTrainedModel) -> int | None:
    """Tokens of a row that a language model has positions for; None: any number. Rotary positions go on beyond it."""
    return getattr(core_of(model).config.get_text_config(), "max_position_embeddings", None)


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
