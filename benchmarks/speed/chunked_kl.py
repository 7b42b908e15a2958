"""Peak memory and time of chunked against dense KL, forward and backward, over a growing number of tokens.

    python benchmarks/speed/chunked_kl.py [--device cpu|cuda] --output FILE.json

Each cell runs in a process of its own, so that its peak is its own: on a CPU the growth of the resident set over what
the inputs took (`ru_maxrss`), on a GPU what torch allocated above the inputs. `ms` is the median of the repeats after
one warm-up, `ms_range` their least and most.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from measuring import measured, save_cells
from torch import Tensor, nn

from cab_hf.distillation.losses import chunked_kl_ce


CHUNK_SIZES = {"cpu": 128, "cuda": 1024}
SETTINGS = {
    "cpu": {"dtype": "float32", "hidden": 64, "vocabularies": [151936], "tokens": [512, 1024, 2048], "repeats": 3},
    "cuda": {
        "dtype": "bfloat16",
        "hidden": 576,
        "vocabularies": [49152, 151936],
        "tokens": [8192, 16384, 32768],
        "repeats": 10,
    },
}


def dense(student_hidden: Tensor, student_head: nn.Linear, teacher_hidden: Tensor, teacher_head: nn.Linear) -> Tensor:
    """The usual way: all logits at once, softmax in float32."""
    with torch.no_grad():
        teacher = F.log_softmax(teacher_head(teacher_hidden), -1, dtype=torch.float32)
    student = F.log_softmax(student_head(student_hidden), -1, dtype=torch.float32)
    return F.kl_div(student, teacher, log_target=True, reduction="sum")


def measure(device: str, method: str, tokens: int, vocabulary: int) -> dict:
    settings = SETTINGS[device]
    dtype = getattr(torch, settings["dtype"])
    torch.manual_seed(0)
    heads = [nn.Linear(settings["hidden"], vocabulary, bias=False, dtype=dtype, device=device) for _ in range(2)]
    student_head, teacher_head = heads[0], heads[1].requires_grad_(False)
    shape = (1, tokens, settings["hidden"])
    student_hidden = torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
    teacher_hidden = torch.randn(shape, dtype=dtype, device=device)

    def step() -> None:
        student_hidden.grad = student_head.weight.grad = None
        if method == "dense":
            loss = dense(student_hidden, student_head, teacher_hidden, teacher_head)
        else:
            chunk_size = CHUNK_SIZES[device]
            loss = chunked_kl_ce(
                student_hidden, student_head, teacher_hidden, teacher_head, chunk_size=chunk_size
            ).total
        loss.backward()

    cell = {"method": method, "vocabulary": vocabulary, "tokens": tokens}
    return cell | measured(step, device, settings["repeats"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=sorted(SETTINGS), default="cpu", help="device that computes")
    parser.add_argument("--output", type=Path, help="JSON file for the results; needed unless --cell is given")
    parser.add_argument("--cell", nargs=3, metavar=("METHOD", "TOKENS", "VOCABULARY"), help="measure one cell only")
    arguments = parser.parse_args()
    if arguments.cell:
        method, tokens, vocabulary = arguments.cell
        print(json.dumps(measure(arguments.device, method, int(tokens), int(vocabulary))))
        return
    if arguments.output is None:
        parser.error("--output FILE.json is missing")

    settings = SETTINGS[arguments.device]
    cells = []
    for vocabulary in settings["vocabularies"]:
        for tokens in settings["tokens"]:
            for method in ("chunked", "dense"):
                command = [sys.executable, __file__, "--device", arguments.device]
                command += ["--cell", method, str(tokens), str(vocabulary)]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                cells.append(json.loads(output.splitlines()[-1]))
                print(cells[-1], flush=True)
    facts = {name: settings[name] for name in ("hidden", "dtype", "repeats")}
    save_cells(arguments.output, arguments.device, cells, **facts, chunk_size=CHUNK_SIZES[arguments.device])


if __name__ == "__main__":
    main()
