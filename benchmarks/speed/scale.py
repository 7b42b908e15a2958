"""What a distillation step reaches on one GPU and on several, by the Trainer under `torchrun`.

    python benchmarks/speed/scale.py --output benchmarks/speed/results/scale_h200.json

Teacher and student have one shape, random weights and random tokens, which cost the same as others; the loss is the
KL, in bfloat16. `cells` holds for each `shape`, `gpus` and `way` the `tokens_per_second` of all GPUs together with
their range, the milliseconds of a step (`ms`), the largest `peak_gib` of a GPU, and `first_step_s`: from the call of
`train()` to the end of the first step, compilation included. Each cell has processes and a time limit of its own, and
is saved when it is done. A cell that fails keeps its error. Cells of the file that have a result are not run again.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from distillation_step import SHAPES, RandomTokens, StepTimer, collate, installed, peak_gib, synchronise
from measuring import save_cells
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from cab_hf import DistillationTrainer, DistillationTrainingArguments, Teacher, student_from_teacher


LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
# sizes, rows and tokens a row of a GPU
MODELS = {
    "135M": (SHAPES["smollm2-135m"], 32, 512),
    "1B": (LLAMA_1B, 8, 2048),
    "tiny": (SHAPES["tiny"], 2, 32),
}
COMPILED, GRAPH = {"torch_compile": True}, {"cuda_graph": True}
BOTH = COMPILED | GRAPH
OPERATORS = {"CAB_COMPILE_TRAINING": "operators"}
UNSPLIT = "compile, not split for DDP"
WHOLE_TEACHER = "compile+graph, teacher as one graph"
# Where each head has its own B and C, the scan's workspaces of tokens x tokens grow with its chunk: 64 by default.
CHUNKS = {f"compile+graph, chunks of {size}": size for size in (32, 128, 256)}
# arguments of the Trainer, variables of the environment
WAYS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "eager": ({}, {}),
    "graph": (GRAPH, {}),
    "compile": (COMPILED, {}),
    "compile+graph": (BOTH, {}),
    "compile, operators": (COMPILED, OPERATORS),
    "compile+graph, operators": (BOTH, OPERATORS),
    UNSPLIT: (COMPILED, {}),
    WHOLE_TEACHER: (BOTH, {}),
    "compile+graph, 4096 logits": (BOTH | {"logits_chunk_size": 4096}, {}),
    "compile+graph, 16384 logits": (BOTH | {"logits_chunk_size": 16384}, {}),
    "compile+graph, tf32": (BOTH | {"tf32": True}, {}),
    "compile+graph, tuned by descent": (BOTH, {"TORCHINDUCTOR_COORDINATE_DESCENT_TUNING": "1"}),
    "compile+graph, products tuned": (BOTH, {"TORCHINDUCTOR_MAX_AUTOTUNE_GEMM": "1"}),
} | dict.fromkeys(CHUNKS, (BOTH, {}))
WARM_UP, SPANS, SPAN = 5, 3, 5


class FirstStep(TrainerCallback):
    """Seconds until the first step is done."""

    def __init__(self):
        self.started, self.seconds = time.perf_counter(), 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            synchronise()
            self.seconds = time.perf_counter() - self.started


class Kernels(TrainerCallback):
    """The kernels of the last steps, by the time they take."""

    def __init__(self, steps: int = 2):
        device = "CUDA" if torch.cuda.is_available() else "CPU"
        self.profile = torch.profiler.profile(activities=[getattr(torch.profiler.ProfilerActivity, device)])
        self.steps, self.rows = steps, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == args.max_steps - self.steps:
            synchronise()
            self.profile.start()
        elif state.global_step == args.max_steps:
            synchronise()
            self.profile.stop()
            events = self.profile.key_averages()
            name = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            rows = [(getattr(one, name) / 1e3 / self.steps, one.count / self.steps, one.key[:120]) for one in events]
            rows.sort(reverse=True)
            self.rows = [{"ms": round(ms, 3), "calls": calls, "kernel": kernel} for ms, calls, kernel in rows[:60]]


def measure(shape: str, way: str, bridge: bool, profiled: bool, file: Path) -> None:
    """One cell, on one of its processes; the first one writes it."""
    torch._dynamo.config.optimize_ddp = way != UNSPLIT
    sizes, rows, length = MODELS[shape]
    args = DistillationTrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=rows,
        max_steps=WARM_UP + SPANS * SPAN + 2 * profiled,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        learning_rate=1e-4,
        max_grad_norm=1.0,
        bridge_weight=float(bridge),
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        **WAYS[way][0],
    )
    torch.manual_seed(0)
    with args.device:
        model = LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16)
    student, teacher = student_from_teacher(model, data=(), chunk_size=CHUNKS.get(way, 64)), Teacher(model)
    if way == WHOLE_TEACHER:
        teacher._compiled_base = torch.compile(teacher._body)
    timer, first = StepTimer(WARM_UP, SPAN), FirstStep()
    kernels = [Kernels()] if profiled and args.process_index == 0 else []
    trainer = DistillationTrainer(
        student,
        teacher,
        args,
        train_dataset=RandomTokens(sizes["vocab_size"], length),
        data_collator=collate,
        callbacks=[timer, first, *kernels],
    )
    trainer.train()
    peak = torch.tensor(peak_gib() or 0.0, device=args.device)
    peak = trainer.accelerator.gather(peak).max().item() or None
    if args.process_index == 0:
        seconds = timer.seconds()
        rates = [args.world_size * rows * length / one for one in seconds]
        cell = {
            "tokens_per_second": round(statistics.median(rates)),
            "range": [round(min(rates)), round(max(rates))],
            "ms": round(1e3 * statistics.median(seconds), 1),
            "peak_gib": peak,
            "first_step_s": round(first.seconds, 1),
            "rows": rows,
            "length": length,
        }
        cell |= {"kernels": kernels[0].rows} if kernels else {}
        file.write_text(json.dumps(cell))
    if args.world_size > 1:
        torch.distributed.barrier()  # the cell is written
        os._exit(0)  # a thread of the backend that is still alive may hold up the interpreter's own end


def run(shape: str, gpus: int, way: str, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """A cell in processes of its own, one a GPU, or why there is none."""
    file, log = Path(tempfile.mkdtemp(), "cell.json"), tempfile.TemporaryFile("w+")
    of_several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)] if gpus > 1 else []
    command = [sys.executable, *of_several, __file__, "--cell", shape, way, "--output", str(file)]
    devices = ",".join(os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")[:gpus])
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": devices} | WAYS[way][1]
    process = subprocess.Popen(
        command + ["--bridge"] * options.bridge + ["--profile"] * options.profile,
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    is_late = False
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        is_late = True
        process.terminate()  # torchrun ends its processes then, which are in sessions of their own
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if file.is_file():
        return json.loads(file.read_text())
    log.seek(0)
    said = [line for line in log.read().splitlines() if "Error" in line][:3]
    ended = f"no result after {seconds:.0f} s" if is_late else f"exit {process.returncode}"
    return {"error": " | ".join([ended, *said])[:600]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--shapes", nargs="+", choices=MODELS, default=["135M", "1B"])
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["compile+graph", "eager"])
    parser.add_argument("--bridge", action="store_true", help="with the bridge beside the KL")
    parser.add_argument("--profile", action="store_true", help="list the kernels of two more steps in the cell")
    parser.add_argument("--cell_seconds", type=float, default=200, help="limit of one cell")
    parser.add_argument("--all_seconds", type=float, default=1e9, help="limit of all: no cell begins that may pass it")
    parser.add_argument("--cell", nargs=2, metavar=("SHAPE", "WAY"), help="one process of a cell, which runs itself")
    options = parser.parse_args()
    if options.cell:
        measure(*options.cell, options.bridge, options.profile, options.output)
        return
    started = time.perf_counter()
    cells = json.loads(options.output.read_text())["cells"] if options.output.is_file() else []
    for shape in options.shapes:
        for way in options.ways:
            for gpus in options.gpus:
                key = {"shape": shape, "gpus": gpus, "way": way, "bridge": options.bridge}
                if any(key.items() <= cell.items() and "error" not in cell for cell in cells):
                    continue
                left = options.all_seconds - (time.perf_counter() - started)
                if left < min(30, options.all_seconds):
                    return
                cell = key | run(shape, gpus, way, options, min(left, options.cell_seconds))
                cells = [one for one in cells if not key.items() <= one.items()] + [cell]
                print({name: value for name, value in cell.items() if name != "kernels"}, flush=True)
                versions = {name: installed(name) for name in ("mamba-ssm", "causal-conv1d", "triton", "accelerate")}
                device = "cuda" if torch.cuda.is_available() else "cpu"
                steps = {"warm_up": WARM_UP, "spans": SPANS, "span": SPAN}
                facts = {"transformers": transformers.__version__, "versions": versions, "steps": steps}
                save_cells(options.output, device, cells, dtype="bfloat16 autocast", **facts)


if __name__ == "__main__":
    main()
