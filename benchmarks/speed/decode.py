"""Decoding speed of a teacher and its student over the context before it: 1,024 to 32,768 tokens.

    python benchmarks/speed/decode.py [--device cpu|cuda] --output FILE.json

Both have SmolLM2-135M's shape (random weights, which cost the same). What is timed is one forward pass a token behind
a context, as `generate` runs it, eagerly. The teacher's cache is filled with random keys and values, which cost what
real ones do; the student's state has one size whatever was read, so that its context is a few tokens. `ms` is the
median over tokens, `ms_range` their least and most, `cache_mib` what the context occupies.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from measuring import save_cells
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from cab_hf import student_from_teacher


CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768)
INT8_CONTEXTS = (1024, 8192)
BATCH_SIZES = {"cpu": (1,), "cuda": (1, 16)}
TOKENS, WARM_UP, READ = 24, 4, 16
SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
SHAPE |= {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True}


def full_cache(teacher: LlamaForCausalLM, batch_size: int, context: int) -> DynamicCache:
    config, cache = teacher.config, DynamicCache(config=teacher.config)
    shape = (batch_size, config.num_key_value_heads, context, config.hidden_size // config.num_attention_heads)
    for layer in range(config.num_hidden_layers):
        cache.update(*(torch.randn(shape, device=teacher.device, dtype=teacher.dtype) for _ in range(2)), layer)
    return cache


def cache_bytes(cache: DynamicCache) -> int:
    held = [value for layer in cache.layers for value in vars(layer).values()]
    held = [one for value in held for one in (value.values() if isinstance(value, dict) else [value])]
    tensors = {one.data_ptr(): one for one in held if isinstance(one, torch.Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def read(student: PreTrainedModel, batch_size: int) -> DynamicCache:
    tokens = torch.randint(student.config.vocab_size, (batch_size, READ), device=student.device)
    return student(tokens, use_cache=True, logits_to_keep=1).cache


def decode(model: PreTrainedModel, cache: DynamicCache, batch_size: int) -> list[float]:
    """Milliseconds of each of TOKENS tokens, each chosen from the logits before it."""
    token = torch.zeros(batch_size, 1, dtype=torch.long, device=model.device)
    times = []
    for index in range(WARM_UP + TOKENS):
        start = time.perf_counter()
        token = model(token, cache=cache, use_cache=True).logits.argmax(-1)
        token.sum().item()  # waits for a GPU, as `generate` does to see whether a text has ended
        if index >= WARM_UP:
            times.append(1e3 * (time.perf_counter() - start))
    return times


def measured(teacher: LlamaForCausalLM, student: PreTrainedModel, batch_size: int, context: int) -> Iterator[dict]:
    for name, model in (("teacher", teacher), ("student", student)):
        cache = full_cache(teacher, batch_size, context) if name == "teacher" else read(student, batch_size)
        size = cache_bytes(cache)
        times = decode(model, cache, batch_size)
        yield {
            "model": name,
            "batch_size": batch_size,
            "context": context,
            "ms": round(statistics.median(times), 2),
            "ms_range": [round(min(times), 2), round(max(times), 2)],
            "tokens_per_second": round(1e3 * batch_size / statistics.median(times), 1),
            "cache_mib": round(size / 2**20, 2),
        }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=sorted(BATCH_SIZES), default="cpu", help="device that computes")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the results")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    on_cpu = arguments.device == "cpu"
    dtype = torch.float32 if on_cpu else torch.bfloat16
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(LlamaConfig(**SHAPE, max_position_embeddings=2 * max(CONTEXTS)))
    teacher = teacher.to(arguments.device, dtype).eval()
    models = teacher, student_from_teacher(teacher, dtype=dtype).eval()
    cells = []
    for name, contexts in ((str(dtype).removeprefix("torch."), CONTEXTS), ("int8", INT8_CONTEXTS if on_cpu else ())):
        if name == "int8" and contexts:
            from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic  # torch is to drop it

            models = [quantize_dynamic(model, {nn.Linear: per_channel_dynamic_qconfig}) for model in models]
        for batch_size in BATCH_SIZES[arguments.device]:
            for context in contexts:
                for cell in measured(*models, batch_size, context):
                    cells.append(cell | {"dtype": name})
                    print(cells[-1], flush=True)
    save_cells(arguments.output, arguments.device, cells, tokens=TOKENS)


if __name__ == "__main__":
    main()
