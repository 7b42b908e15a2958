"""Speed and peak memory of a model on random input.

Shape legend: `b` batch, `c` channel.
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from cab_hf.inference import evaluating, num_positions, synchronise


def text_speed(
    model: PreTrainedModel, length: int, *, batch_size: int = 1, new_tokens: int = 16, repeats: int = 3
) -> dict[str, float | None] | None:
    """Speed and peak memory of a causal language model behind a prompt of random tokens.

    Args:
        model: Any causal language model, where it is and in its dtype.
        length: Tokens of the prompt.
        batch_size: Prompts.
        new_tokens: Tokens that decoding is timed over.
        repeats: Timed runs.

    Returns:
        `prefill`: tokens a second of one pass over the prompt. `decode`: new tokens a second after it, from the time
        of `new_tokens` + 1 less that of one; None where the noise is larger than that. `peak_mib`: the weights and
        what was allocated at once beside them while the prompt was read and continued. None altogether where the
        model's positions end before `length`.
    """
    limit = num_positions(model)
    if limit is not None and length + new_tokens + 1 > limit:
        return None
    options = {"repeats": repeats, "warmup": 1}
    prefill = throughput(model, length, batch_size, **options)["tokens_per_second"]
    short = throughput(model, length, batch_size, "generate", new_tokens=1, **options)
    long = throughput(model, length, batch_size, "generate", new_tokens=new_tokens + 1, **options)
    first = batch_size / short["tokens_per_second"]
    rest = batch_size * (new_tokens + 1) / long["tokens_per_second"] - first
    vocab_size = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(model.device)

    def read_and_continue() -> None:
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=2,
            min_new_tokens=2,
            do_sample=False,
            pad_token_id=0,
        )

    with evaluating(model):
        peak = _peak_bytes(model, read_and_continue)
    return {
        "prefill": prefill,
        "decode": batch_size * new_tokens / rest if rest > 0 else None,
        "peak_mib": None if peak is None else peak / 2**20,
    }


def image_speed(model: PreTrainedModel, size: int, batch_size: int, *, repeats: int = 3) -> dict[str, float | None]:
    """Images a second (`images`, the median) and `peak_mib` of an image model on random pixels (b, c, size, size).

    Args:
        model: Any image model with `num_channels` in its config, where it is and in its dtype.
        size: Height and width of the images.
        batch_size: Images a forward pass.
        repeats: Timed runs, after one that is not.
    """
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch_size, model.config.num_channels, size, size, generator=generator)
    pixels = pixels.to(model.device, model.dtype)
    seconds = []
    with evaluating(model):
        for index in range(1 + repeats):
            start = time.perf_counter()
            # Reading a number waits for a GPU to finish.
            model(pixel_values=pixels)[0].sum().item()
            if index:
                seconds.append(time.perf_counter() - start)
        peak = _peak_bytes(model, lambda: model(pixel_values=pixels))
    return {"images": batch_size / statistics.median(seconds), "peak_mib": None if peak is None else peak / 2**20}


def _peak_bytes(model: PreTrainedModel, run: Callable[[], Any]) -> int | None:
    """Bytes of a model's weights and of all that was allocated at once beside them; None where nobody counts."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    if model.device.type == "cuda":
        before = torch.cuda.memory_allocated(model.device)
        torch.cuda.reset_peak_memory_stats(model.device)
        run()
        return weights + torch.cuda.max_memory_allocated(model.device) - before
    if model.device.type != "cpu":
        return None
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return weights + peak


def throughput(
    model: PreTrainedModel,
    length: int,
    batch_size: int,
    mode: str = "forward",
    *,
    new_tokens: int = 64,
    repeats: int = 5,
    warmup: int = 2,
    seed: int = 0,
) -> dict[str, float | int | str]:
    """Tokens a second, on random tokens, where the model is and in its dtype.

    Args:
        model: Any causal language model.
        length: Tokens of a row (`forward`) or of a prompt (`generate`).
        batch_size: Rows.
        mode: "forward": one pass over `length` tokens without a cache, counting them; logits of the last token only.
            "generate": greedy decoding of `new_tokens` after the prompt, counting new tokens; the time includes the
            pass over the prompt.
        new_tokens: Tokens to generate a row.
        repeats: Timed runs.
        warmup: Runs before them.
        seed: Picks the tokens.

    Returns:
        `tokens_per_second` (median of the runs), `slowest` and `fastest` run in the same unit, and what was measured:
        `mode`, `length`, `batch_size`, `new_tokens`, `repeats`, `device`, `dtype`.

    Raises:
        ValueError: `mode` is neither "forward" nor "generate".
    """
    if mode not in ("forward", "generate"):
        raise ValueError(f'mode is {mode!r}. It must be "forward" or "generate".')
    device = model.device
    generator = torch.Generator().manual_seed(seed)
    vocab_size = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(vocab_size, (batch_size, length), generator=generator).to(device)

    def run() -> None:
        if mode == "forward":
            model(input_ids=tokens, use_cache=False, logits_to_keep=1)
        else:
            model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )

    seconds = []
    with evaluating(model):
        for index in tqdm(range(warmup + repeats), desc=f"Throughput ({mode}, {length} tokens)"):
            synchronise(device)
            start = time.perf_counter()
            run()
            synchronise(device)
            if index >= warmup:
                seconds.append(time.perf_counter() - start)
    counted = batch_size * (length if mode == "forward" else new_tokens)
    return {
        "tokens_per_second": counted / statistics.median(seconds),
        "slowest": counted / max(seconds),
        "fastest": counted / min(seconds),
        "mode": mode,
        "length": length,
        "batch_size": batch_size,
        "new_tokens": new_tokens if mode == "generate" else 0,
        "repeats": repeats,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
