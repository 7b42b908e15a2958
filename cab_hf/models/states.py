"""A prompt's state as a file: what a student remembers of a text, a few MB however long it is.

Shape legend: `b` batch, `d` width, `k` convolution taps, `h` head, `p` head_dim, `n` state.
"""

import hashlib
import os
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.cache_utils import Cache, DynamicCache


FORMAT = "cab_hf.state.1"
_SAMPLE = 64  # values of each parameter that a fingerprint holds


def fingerprint(model: nn.Module) -> str:
    """A hash of a model's parameters and buffers: their names, shapes, dtypes and a sample of their values."""
    found = hashlib.sha256()
    for name, parameter in chain(model.named_parameters(), model.named_buffers()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(len(flat) // _SAMPLE, 1)].double().cpu()
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode() + sample.numpy().tobytes())
    return found.hexdigest()


def save_state(model: nn.Module, cache: Cache, file: str | os.PathLike) -> None:
    """Writes a cache's states, with the model's fingerprint. The file appears whole or not at all.

    Raises:
        ValueError: for a cache that has read nothing.
    """
    if not cache.has_previous_state():
        raise ValueError("`cache` has read nothing: there is no state to save. Pass one that a forward pass filled.")
    count, last = max((vars(cache).get(name, (0, None)) for name in ("read", "reading")), key=lambda one: one[0])
    tensors = {}
    for layer in range(len(cache.layers)):
        tensors[f"{layer}.conv"] = cache.get_conv_state(layer).contiguous()  # (b, d, k)
        tensors[f"{layer}.recurrent"] = cache.get_recurrent_state(layer).contiguous()  # (b, h, p, n) or (b, d, n)
    if last is not None:
        tensors["last"] = last.contiguous()  # (b, 1)
    facts = {"format": FORMAT, "model": fingerprint(model), "tokens": str(count)}
    path = Path(file)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, scratch, metadata=facts)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def load_state(model: nn.Module, file: str | os.PathLike) -> DynamicCache:
    """A cache with the states of a file, on the model's device, to go on from.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut, of another kind, of another model, or holds other shapes or dtypes.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"There is no state in {file}.")
    try:
        with safe_open(file, framework="pt", device=str(model.device)) as held:
            facts = held.metadata() or {}
            tensors = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118, it is no dict
    except SafetensorError as error:
        raise ValueError(f"{file} is cut or no safetensors file: {str(error).splitlines()[0]}") from None
    if facts.get("format") != FORMAT:
        raise ValueError(f"{file} holds no state: its format is {facts.get('format')!r}, not {FORMAT!r}.")
    if facts["model"] != fingerprint(model):
        raise ValueError(f"{file} was made by other weights than this model's. Read the prompt anew, and save it.")
    last, layers = tensors.pop("last", None), len(model.config.layer_types)
    rows = len(next(iter(tensors.values()))) if tensors else 0
    # What a state looks like, the model itself tells.
    with torch.no_grad():
        made = model(torch.zeros(rows or 1, 1, dtype=torch.long, device=model.device), use_cache=True).cache
    cache = DynamicCache(config=model.config)
    for layer in range(layers):
        states = {"conv": made.get_conv_state(layer), "recurrent": made.get_recurrent_state(layer)}
        for name, wanted in states.items():
            state = tensors.pop(f"{layer}.{name}", None)
            if state is None or state.shape != wanted.shape or state.dtype != wanted.dtype:
                found = "nothing" if state is None else f"{tuple(state.shape)} of {state.dtype}"
                raise ValueError(
                    f"{file} holds {found} as the {name} state of layer {layer}; this model's is "
                    f"{tuple(wanted.shape)} of {wanted.dtype}."
                )
            states[name] = state
        cache.update_conv_state(states["conv"], layer)
        cache.update_recurrent_state(states["recurrent"], layer)
    if tensors:
        raise ValueError(f"{file} holds {sorted(tensors)[0]}, which this model of {layers} layers has no place for.")
    cache.read = (int(facts["tokens"]), last)
    return cache
