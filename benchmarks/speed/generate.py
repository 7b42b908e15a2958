"""What a token of `generate` costs on a GPU: of a student, its teacher, a hybrid and mamba_ssm's model of that shape.

    python benchmarks/speed/generate.py --output FILE.json [--only student teacher hybrid windowed ...]

SmolLM2-135M's shape (random weights, which cost the same), all models in bfloat16, state 64. `cells` holds for each
`model`, `way`, `batch_size` and `context` the median of milliseconds a token (`ms`) and their range. A `way` of
`generate()` is the call as it comes (mamba_ssm's with its graph), `static` is `generate` with a static cache, which
transformers compiles, `step` a bare forward pass of one token, `eager` a student's `generate()` without its captured
step, and `first call` a process's first `generate`, with Triton's cache empty (`compiled anew`) and filled. A
teacher's cache is filled with random values, which cost what real ones do; a student's state has one size whatever
was read; a hybrid reads its context, one with `windows` has 256 tokens of attention beside each mixer. `prefill` holds
the time to the first token of a prompt, read whole or in pieces, and the memory above what was there before.

A cell that fails keeps its error. Each cell is written when it is there: a later run into the same file measures what
is missing or failed, and two GPUs may share the parts and the file.
"""

import argparse
import fcntl
import functools
import gc
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from decode import SHAPE, full_cache, read
from measuring import save_cells
from transformers import Cache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache, StoppingCriteria

from cab_hf import student_from_teacher
from cab_hf.models.decoding import DECODE_VARIABLE


DEVICE = "cuda"
ROWS = (1, 16, 64)
NEAR, FAR = 512, 32000
PREFILLS = tuple(512 * 4**power for power in range(5))
PIECE = 8192
TOKENS, WARM_UP = 64, 8
POSITIONS = 262144
KEPT, WINDOW = 4, 256
ONE_TOKEN = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


class Clock(StoppingCriteria):
    """Notes when each token is there; never stops."""

    def __init__(self):
        self.times: list[float] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        self.times.append(time.perf_counter())  # the loop waits for the device in each turn
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def between(self, first: int) -> list[float]:
        """Milliseconds of each token behind the first ones."""
        return [1e3 * (later - sooner) for sooner, later in zip(self.times[first:], self.times[first + 1 :])]


@functools.cache
def teacher() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, max_position_embeddings=POSITIONS))
    return model.to(DEVICE, torch.bfloat16).eval()


@functools.cache
def student(kept: int | None = None, window: int = 0) -> PreTrainedModel:
    options = {"keep_attention": kept, "attention_window": window, "dtype": torch.bfloat16}
    return student_from_teacher(teacher(), **options).eval()


@functools.cache
def mamba_ssm_model() -> torch.nn.Module:
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    width, heads = SHAPE["hidden_size"], SHAPE["num_attention_heads"]
    config = MambaConfig(
        d_model=width,
        d_intermediate=SHAPE["intermediate_size"],
        n_layer=SHAPE["num_hidden_layers"],
        vocab_size=SHAPE["vocab_size"],
        ssm_cfg={"layer": "Mamba2", "d_state": 64, "headdim": width // heads, "ngroups": heads, "expand": 1},
    )
    return MambaLMHeadModel(config, device=DEVICE, dtype=torch.bfloat16).eval()


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def tokens(rows: int, count: int) -> torch.LongTensor:
    return torch.randint(SHAPE["vocab_size"], (rows, count), device=DEVICE)


def static_cache(model: LlamaForCausalLM, batch_size: int, context: int) -> StaticCache:
    config = model.config
    cache = StaticCache(config=config, max_cache_len=context + TOKENS + 1)
    shape = (batch_size, config.num_key_value_heads, context, config.hidden_size // config.num_attention_heads)
    for layer in range(config.num_hidden_layers):
        keys = torch.randn(shape, device=model.device, dtype=model.dtype)
        cache.update(keys, keys, layer)
    return cache


def generated(model: PreTrainedModel, make_cache: Callable[[], Cache], rows: int, context: int) -> list[float]:
    """Milliseconds of each token of the second of two calls behind a context; the first one is short."""
    for count in (WARM_UP, TOKENS):
        clock = Clock()
        model.generate(
            torch.ones(rows, 1, dtype=torch.long, device=model.device),
            attention_mask=torch.ones(rows, context + 1, dtype=torch.long, device=model.device),
            cache=make_cache(),
            max_new_tokens=count,
            stopping_criteria=[clock],
            **ONE_TOKEN,
        )
        gc.collect()  # two caches of a long context are too much
    return clock.between(WARM_UP)


def student_generated(rows: int, context: int) -> list[float]:
    return generated(student(), lambda: read(student(), rows), rows, context)


def teacher_generated(rows: int, context: int) -> list[float]:
    return generated(teacher(), lambda: full_cache(teacher(), rows, context), rows, context)


def compiled(rows: int, context: int) -> list[float]:
    torch._dynamo.reset()  # else shapes of the cells before make these dynamic, and the step slower
    try:
        return generated(teacher(), lambda: static_cache(teacher(), rows, context), rows, context)
    finally:
        torch._dynamo.reset()  # frees the graphs


def eager(rows: int, context: int) -> list[float]:
    os.environ[DECODE_VARIABLE] = "eager"
    try:
        return student_generated(rows, context)
    finally:
        del os.environ[DECODE_VARIABLE]


def hybrid(rows: int, context: int, window: int = 0, kept: int | None = None) -> list[float]:
    model, prompt = student(KEPT if kept is None else kept, window), tokens(rows, context)
    return generated(model, lambda: model(prompt, use_cache=True, logits_to_keep=1).cache, rows, context)


def stepped(step: Callable[[], object]) -> list[float]:
    times = []
    for index in range(WARM_UP + TOKENS):
        wait()
        started = time.perf_counter()
        step()
        wait()
        if index >= WARM_UP:
            times.append(1e3 * (time.perf_counter() - started))
    return times


def student_step(rows: int, context: int) -> list[float]:
    cache, token = read(student(), rows), torch.zeros(rows, 1, dtype=torch.long, device=DEVICE)
    return stepped(lambda: student()(token, cache=cache))


@torch.inference_mode()  # in which its buffers are made
def mamba_ssm_step(rows: int, context: int) -> list[float]:
    """The captured step of mamba_ssm's own model, as its `generate(cg=True)` replays it."""
    from mamba_ssm.utils.generation import update_graph_cache

    graph = update_graph_cache(mamba_ssm_model(), None, rows, context, context + TOKENS)
    ids = torch.zeros(rows, 1, dtype=torch.long, device=DEVICE)
    positions = torch.full_like(ids, context)
    return stepped(lambda: graph.run(ids, positions, context))


def mamba_ssm_generated(rows: int, context: int) -> list[float]:
    """Its loop never waits for the device, so that a token is a difference of two calls."""
    prompt = tokens(rows, context)

    def seconds(count: int) -> float:
        wait()
        started = time.perf_counter()
        mamba_ssm_model().generate(prompt, max_length=context + count, cg=True)
        wait()
        return time.perf_counter() - started

    seconds(WARM_UP + TOKENS)  # captures, for the longest
    return [1e3 * (seconds(WARM_UP + TOKENS) - seconds(WARM_UP)) / TOKENS for _ in range(5)]


def first_token(name: str, context: int, piece: int | None) -> dict[str, float]:
    model, prompt, times = teacher() if name == "teacher" else student(), tokens(1, context), []
    for _ in range(4):
        wait()
        before, started = torch.cuda.memory_allocated(), time.perf_counter()
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        model.generate(prompt, max_new_tokens=1, prefill_chunk_size=piece, **ONE_TOKEN)
        wait()
        times.append(1e3 * (time.perf_counter() - started))
    peak = torch.cuda.max_memory_allocated() - before
    return {
        "ms": round(statistics.median(times[1:]), 2),
        "first_ms": round(times[0], 1),
        "peak_mib": round(peak / 2**20, 1),
    }


def first_call() -> None:
    """Prints how long the first `generate` of this process took to its first tokens."""
    model, clock, prompt = student(), Clock(), tokens(1, NEAR)
    wait()
    started = time.perf_counter()
    model.generate(prompt, max_new_tokens=TOKENS, stopping_criteria=[clock], **ONE_TOKEN)
    first, second = (round(at - started, 3) for at in clock.times[:2])
    ms = round(statistics.median(clock.between(WARM_UP)), 3)
    print(json.dumps({"first_token_s": first, "second_token_s": second, "ms": ms}))


def in_a_new_process(kernels: str) -> dict[str, float]:
    command, environment = [sys.executable, __file__, "--first_call"], os.environ | {"TRITON_CACHE_DIR": kernels}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    if ran.returncode:
        raise RuntimeError(ran.stderr.strip()[-250:])
    return json.loads(ran.stdout.splitlines()[-1])


def said(times: list[float]) -> dict[str, Any]:
    return {"ms": round(statistics.median(times), 3), "ms_range": [round(min(times), 3), round(max(times), 3)]}


class Report:
    """The results in a file, which another process may write to as well.

    Raises:
        SystemExit: the file holds results of another device or of other versions.
    """

    def __init__(self, path: Path):
        self.path = path
        self.facts = {"dtype": "bfloat16", "tokens": TOKENS, "transformers": transformers.__version__}
        if importlib.util.find_spec("mamba_ssm"):
            self.facts["mamba_ssm"] = importlib.metadata.version("mamba_ssm")
        path.parent.mkdir(parents=True, exist_ok=True)
        held = self.held()
        here = {"torch": torch.__version__, **self.facts}
        here["device"] = torch.cuda.get_device_name() if DEVICE == "cuda" else held.get("device")
        other = [f"{name} {held[name]} for {value}" for name, value in here.items() if held.get(name, value) != value]
        if other:
            sys.exit(f"{path} holds results of {', '.join(other)}. Write to a new file.")

    def held(self) -> dict[str, Any]:
        return json.loads(self.path.read_text()) if self.path.exists() else {"cells": [], "prefill": []}

    def add(self, table: str, key: dict[str, Any], run: Callable[[], dict[str, Any]]) -> None:
        """Runs what is not in the table yet."""
        if any(key.items() <= cell.items() and "error" not in cell for cell in self.held()[table]):
            return
        started = time.perf_counter()
        try:
            found = run()
        except Exception as error:  # the other cells are still worth having
            found = {"error": f"{type(error).__name__}: {error}"[:300]}
        cell = key | found | {"measured_in_s": round(time.perf_counter() - started, 1)}
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            held = self.held()
            held[table] = [one for one in held[table] if not key.items() <= one.items()] + [cell]
            save_cells(self.path, DEVICE, held["cells"], prefill=held["prefill"], **self.facts)
        finally:
            os.close(folder)
        print(cell, flush=True)
        gc.collect()
        torch.cuda.empty_cache()

    def token(self, model: str, way: str, rows: int, context: int, run: Callable[[int, int], list[float]]) -> None:
        key = {"model": model, "way": way, "batch_size": rows, "context": context}
        self.add("cells", key, lambda: said(run(rows, context)))


def student_cells(report: Report) -> None:
    for context in (NEAR, FAR):
        for rows in ROWS:
            report.token("student", "generate()", rows, context, student_generated)
    for rows in ROWS:
        report.token("student", "step", rows, 16, student_step)
    report.token("student", "eager", 1, NEAR, eager)


def mamba_ssm_cells(report: Report) -> None:
    for rows in ROWS:
        report.token("mamba_ssm", "step", rows, 16, mamba_ssm_step)
    for rows in ROWS:
        report.token("mamba_ssm", "generate()", rows, NEAR, mamba_ssm_generated)


def teacher_cells(report: Report) -> None:
    for context in (FAR, NEAR):
        for rows in ROWS:
            report.token("teacher", "static", rows, context, compiled)
    for context in (FAR, NEAR):
        for rows in ROWS:
            report.token("teacher", "generate()", rows, context, teacher_generated)


def hybrid_cells(report: Report) -> None:
    for context in (FAR, NEAR):
        report.token("hybrid", "generate()", 1, context, hybrid)


def windowed_cells(report: Report) -> None:
    for name, kept in (("hybrid, windows", KEPT), ("windows", 0)):
        run = functools.partial(hybrid, window=WINDOW, kept=kept)
        for context in (FAR, NEAR):
            report.token(name, "generate()", 1, context, run)


def prefill_cells(report: Report) -> None:
    wanted = [("student", context, None) for context in PREFILLS]
    wanted += [("student", context, PIECE) for context in PREFILLS if context > PIECE]
    wanted += [("teacher", context, None) for context in PREFILLS]
    for name, context, piece in wanted:
        key = {"model": name, "context": context, "piece": piece}
        report.add("prefill", key, lambda name=name, t=context, piece=piece: first_token(name, t, piece))


def first_cells(report: Report) -> None:
    key = {"model": "student", "way": "first call, compiled anew", "batch_size": 1, "context": NEAR}
    with tempfile.TemporaryDirectory() as kernels:
        report.add("cells", key, lambda: in_a_new_process(kernels))

        def again() -> dict[str, float]:
            if not os.listdir(kernels):  # the cell before was in the file
                in_a_new_process(kernels)
            return in_a_new_process(kernels)

        report.add("cells", key | {"way": "first call, compiled before"}, again)


PARTS = {
    "student": student_cells,
    "mamba_ssm": mamba_ssm_cells,
    "prefill": prefill_cells,
    "hybrid": hybrid_cells,
    "windowed": windowed_cells,
    "teacher": teacher_cells,
    "first": first_cells,
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file for the results; what it holds is not measured again")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts, in this order")
    parser.add_argument("--first_call", action="store_true", help="time this process's first call alone")
    arguments = parser.parse_args()
    if arguments.first_call:
        first_call()
        return
    if arguments.output is None:
        parser.error("--output is needed")
    report = Report(arguments.output)
    for part in arguments.only:
        PARTS[part](report)


if __name__ == "__main__":
    main()
