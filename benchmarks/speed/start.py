"""How long a student of a 1B teacher takes to be made on a CPU: the pure class and a hybrid, in a process each.

    python benchmarks/speed/start.py --output benchmarks/speed/results/start_cpu.json

The teacher has a Llama's shape (22 layers of width 2,048) and random weights in float32, which are made before the
clock starts. Output projections are not fitted: that is a choice of data, and costs by its tokens. `seconds` are of
each call in turn; the first one also pays for memory that the process touches for the first time. `peak_gib` is the
largest resident set, `models_gib` what the weights of both models take.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from measuring import resident_peak, save_cells
from transformers import LlamaConfig, LlamaForCausalLM

from cab_hf import student_from_teacher


SHAPE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
SHAPE |= {"num_key_value_heads": 4, "vocab_size": 32000}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
STUDENTS = {"pure": {}, "hybrid": {"keep_attention": 4}}


def measure(name: str, calls: int, shape: dict[str, int]) -> dict:
    """Seconds of each call, in this process."""
    teacher = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    options = STUDENTS[name] if shape is SHAPE else dict.fromkeys(STUDENTS[name], 1)
    seconds, student = [], None
    for _ in range(calls):
        del student
        started = time.perf_counter()
        student = student_from_teacher(teacher, data=(), **options)
        seconds.append(round(time.perf_counter() - started, 2))
    weights = sum(one.numel() * one.element_size() for model in (teacher, student) for one in model.parameters())
    sizes = {"teacher_parameters": teacher.num_parameters(), "student_parameters": student.num_parameters()}
    memory = {"peak_gib": round(resident_peak() / 2**30, 2), "models_gib": round(weights / 2**30, 2)}
    return {"student": name, "seconds": seconds, **memory, **sizes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--calls", type=int, default=3, help="students that each process makes")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to try the script")
    parser.add_argument("--student", choices=STUDENTS, help="one process of a cell, which runs itself")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = TINY if arguments.tiny else SHAPE
    if arguments.student:
        print(json.dumps(measure(arguments.student, arguments.calls, shape)))
        return
    cells = []
    for name in STUDENTS:
        line = [sys.executable, __file__, *sys.argv[1:], "--student", name]
        run = subprocess.run(line, capture_output=True, text=True, check=True)
        cells.append(json.loads(run.stdout.splitlines()[-1]))
        print(cells[-1], flush=True)
    save_cells(arguments.output, "cpu", cells, dtype="float32", shape=shape)


if __name__ == "__main__":
    main()
