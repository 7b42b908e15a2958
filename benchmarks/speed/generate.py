"""What a token of `generate` costs on a GPU: a student, its teacher, and mamba_ssm's own step of the same shape.

    python benchmarks/speed/generate.py --output FILE.json

SmolLM2-135M's shape (random weights, which cost the same) in bfloat16, state 64. `cells` holds for each `model`,
`way`, `batch_size` and `context` the median of milliseconds a token (`ms`) and their range. Caches of a long context
are filled with random values, which cost what real ones do; a student's state has one size whatever was read. A `way`
of `generate()` is the call as it comes, `static` is `generate` with a static cache, which transformers compiles,
`step` a bare forward pass of one token, `eager` a student's `generate()` without its captured step, and `first call` a
process's first `generate`. `prefill` holds the time to the first token of prompts, and the memory above what was there
before. A cell that fails keeps its error.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from decode import SHAPE, full_cache, read
from measuring import save_cells
from transformers import Cache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache, StoppingCriteria

from cab_hf import student_from_teacher
from cab_hf.models.decoding import DECODE_VARIABLE


CONTEXTS = {512: (1, 16, 64), 32000: (1, 16, 64)}
PREFILLS = tuple(512 * 4**power for power in range(5))
PIECE = 8192
TOKENS, WARM_UP = 64, 8
POSITIONS = 262144
ONE_TOKEN = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


class Clock(StoppingCriteria):
    """Notes when each token is there; never stops."""

    def __init__(self):
        self.times: list[float] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        self.times.append(time.perf_counter())  # the loop waits for the device in each turn
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def models() -> tuple[LlamaForCausalLM, PreTrainedModel]:
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(LlamaConfig(**SHAPE, max_position_embeddings=POSITIONS))
    teacher = teacher.to("cuda", torch.bfloat16).eval()
    return teacher, student_from_teacher(teacher).eval()


def static_cache(teacher: LlamaForCausalLM, batch_size: int, context: int) -> StaticCache:
    config = teacher.config
    cache = StaticCache(config=config, max_cache_len=context + TOKENS + 1)
    shape = (batch_size, config.num_key_value_heads, context, config.hidden_size // config.num_attention_heads)
    for layer in range(config.num_hidden_layers):
        keys = torch.randn(shape, device=teacher.device, dtype=teacher.dtype)
        cache.update(keys, keys, layer)
    return cache


def generated(model: PreTrainedModel, make_cache: Callable[[], Cache], batch_size: int, context: int) -> list[float]:
    """Milliseconds of each token of the second of two calls behind a context."""
    for _ in range(2):
        clock = Clock()
        model.generate(
            torch.ones(batch_size, 1, dtype=torch.long, device=model.device),
            attention_mask=torch.ones(batch_size, context + 1, dtype=torch.long, device=model.device),
            cache=make_cache(),
            max_new_tokens=TOKENS,
            stopping_criteria=[clock],
            **ONE_TOKEN,
        )
    return [1e3 * (later - sooner) for sooner, later in zip(clock.times[WARM_UP:], clock.times[WARM_UP + 1 :])]


@torch.no_grad()
def stepped(step: Callable[[], object]) -> list[float]:
    times = []
    for index in range(WARM_UP + TOKENS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        if index >= WARM_UP:
            times.append(1e3 * (time.perf_counter() - started))
    return times


def student_step(student: PreTrainedModel, batch_size: int) -> Callable[[], object]:
    cache, token = read(student, batch_size), torch.zeros(batch_size, 1, dtype=torch.long, device="cuda")
    return lambda: student(token, cache=cache)


def mamba_ssm_step(batch_size: int) -> Callable[[], object]:
    """The captured step of mamba_ssm's own model, as its `generate(cg=True)` replays it."""
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    from mamba_ssm.utils.generation import update_graph_cache

    width = SHAPE["hidden_size"]
    heads = SHAPE["num_attention_heads"]
    config = MambaConfig(
        d_model=width,
        d_intermediate=SHAPE["intermediate_size"],
        n_layer=SHAPE["num_hidden_layers"],
        vocab_size=SHAPE["vocab_size"],
        ssm_cfg={"layer": "Mamba2", "d_state": 64, "headdim": width // heads, "ngroups": heads, "expand": 1},
    )
    model = MambaLMHeadModel(config, device="cuda", dtype=torch.bfloat16).eval()
    graph = update_graph_cache(model, None, batch_size, 16, 32, dtype=torch.bfloat16)
    ids, positions = (
        torch.zeros(batch_size, 1, dtype=torch.long, device="cuda"),
        torch.full((batch_size, 1), 16).cuda(),
    )
    return lambda: graph.run(ids, positions, 16)


class Report:
    def __init__(self, path: Path):
        self.path, self.cells, self.prefill = path, [], []

    def measure(self, model: str, way: str, batch_size: int, context: int, run: Callable[[], list[float]]) -> None:
        cell = {"model": model, "way": way, "batch_size": batch_size, "context": context}
        started = time.perf_counter()
        try:
            times = run()
            cell["ms"] = round(statistics.median(times), 3)
            cell["ms_range"] = [round(min(times), 3), round(max(times), 3)]
        except Exception as error:  # the other cells are still worth having
            cell["error"] = f"{type(error).__name__}: {error}"[:300]
        cell["measured_in_s"] = round(time.perf_counter() - started, 1)
        self.cells.append(cell)
        self.save()
        print(cell, flush=True)
        torch.cuda.empty_cache()

    def measure_prefill(self, name: str, model: PreTrainedModel, context: int, piece: int | None = None) -> None:
        cell = {"model": name, "context": context, "piece": piece}
        try:
            ids = torch.randint(SHAPE["vocab_size"], (1, context), device="cuda")
            times = []
            for _ in range(4):
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before, started = torch.cuda.memory_allocated(), time.perf_counter()
                model.generate(ids, max_new_tokens=1, prefill_chunk_size=piece, **ONE_TOKEN)
                torch.cuda.synchronize()
                times.append(1e3 * (time.perf_counter() - started))
            cell["ms"] = round(statistics.median(times[1:]), 2)
            cell["first_ms"] = round(times[0], 1)
            cell["peak_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
        except Exception as error:
            cell["error"] = f"{type(error).__name__}: {error}"[:300]
        self.prefill.append(cell)
        self.save()
        print(cell, flush=True)
        torch.cuda.empty_cache()

    def save(self) -> None:
        facts = {"dtype": "bfloat16", "tokens": TOKENS, "transformers": transformers.__version__}
        save_cells(self.path, "cuda", self.cells, prefill=self.prefill, **facts)


def first_call() -> None:
    """Prints how long the first `generate` of this process took to its first tokens."""
    _, student = models()
    clock, ids = Clock(), torch.randint(SHAPE["vocab_size"], (1, 512), device="cuda")
    torch.cuda.synchronize()
    started = time.perf_counter()
    student.generate(ids, max_new_tokens=64, stopping_criteria=[clock], **ONE_TOKEN)
    seconds = [round(at - started, 3) for at in clock.times]
    rest = [1e3 * (later - sooner) for sooner, later in zip(clock.times[2:], clock.times[3:])]
    print(json.dumps({"first_token_s": seconds[0], "second_token_s": seconds[1], "ms": statistics.median(rest)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--first_call", action="store_true", help="time this process's first call alone")
    parser.add_argument("--only", choices=("student", "all"), default="all", help="leave the teacher out")
    arguments = parser.parse_args()
    if arguments.first_call:
        first_call()
        return
    report = Report(arguments.output)
    ran = subprocess.run([sys.executable, __file__, "--first_call"], capture_output=True, text=True)
    first = json.loads(ran.stdout.splitlines()[-1]) if ran.returncode == 0 else {"error": ran.stderr[-300:]}
    report.cells.append({"model": "student", "way": "first call", "batch_size": 1, "context": 512} | first)
    print(first, flush=True)
    teacher, student = models()
    for context, batch_sizes in CONTEXTS.items():
        for rows in batch_sizes:
            run = partial(generated, student, partial(read, student, rows), rows, context)
            report.measure("student", "generate()", rows, context, run)
    for rows in (1, 16, 64):
        report.measure("student", "step", rows, 16, partial(stepped, student_step(student, rows)))
        report.measure("mamba_ssm", "step", rows, 16, lambda rows=rows: stepped(mamba_ssm_step(rows)))
    os.environ[DECODE_VARIABLE] = "eager"
    report.measure("student", "eager", 1, 512, lambda: generated(student, lambda: read(student, 1), 1, 512))
    del os.environ[DECODE_VARIABLE]
    if arguments.only == "all":
        for context, batch_sizes in CONTEXTS.items():
            for rows in batch_sizes:
                for way, make in (("generate()", full_cache), ("static", static_cache)):
                    if context == 512 and rows > 1:
                        continue  # a minute of compiling for figures that decide nothing
                    run = partial(generated, teacher, partial(make, teacher, rows, context), rows, context)
                    report.measure("teacher", way, rows, context, run)
    for context in PREFILLS:
        report.measure_prefill("student", student, context)
        if arguments.only == "all":
            report.measure_prefill("teacher", teacher, context)
    report.measure_prefill("student", student, PREFILLS[-1], PIECE)


if __name__ == "__main__":
    main()
