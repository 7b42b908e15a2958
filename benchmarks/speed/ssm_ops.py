"""Time and peak memory of the state-space scans, backend against backend, in a training step (forward and backward).

    python benchmarks/speed/ssm_ops.py [--device cpu|cuda] [--threads N] --output FILE.json

On a CPU the torch paths meet those of transformers (Mamba's loop over tokens, Mamba-2's chunked scan) on equal inputs;
on a GPU torch, mamba_ssm and fla meet each other in bfloat16. A case's variants take turns in one process, so that any
other load on the machine meets all of them: `ms` is the median after one warm-up, `ms_range` the least and most. Peaks
come from one process per variant: on a CPU the growth of the resident set (`ru_maxrss`) over what inputs and a small
warm-up took, on a GPU what torch allocated above the inputs. `difference` is the relative L2 distance of the output to
the case's first variant's. The `length` cases spread one number of tokens over many short or a few long sequences.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers.models.mamba.modeling_mamba import mamba_selective_scan
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from cab_hf.models.ssm_kernels import BACKEND_VARIABLE
from cab_hf.models.ssm_ops import selective_scan, ssd_scan


S6 = {"b": 4, "t": 512, "d": 384, "n": 16}
SSD = {"b": 4, "t": 512, "h": 12, "p": 64, "g": 1, "n": 64}
CASES = {
    "cpu": {
        "s6": (S6, ["torch", "transformers"]),
        "ssd": (SSD, ["torch", "transformers_64", "transformers_256"]),
        "ssd_all_groups": (SSD | {"g": 12}, ["torch", "transformers_64", "transformers_256"]),
        "s6_length": (S6, ["torch_8x512", "torch_1x4096"]),
        "ssd_length": (SSD, ["torch_8x512", "torch_1x4096"]),
    },
    "cuda": {
        "s6": ({"b": 16, "t": 1024, "d": 1536, "n": 16}, ["torch", "mamba_ssm"]),
        "ssd": ({"b": 16, "t": 1024, "h": 24, "p": 64, "g": 1, "n": 128}, ["torch", "mamba_ssm", "fla"]),
        "ssd_all_groups": ({"b": 16, "t": 1024, "h": 9, "p": 64, "g": 9, "n": 64}, ["torch", "mamba_ssm", "fla"]),
        "s6_length": ({"d": 1536, "n": 16}, ["mamba_ssm_32x512", "mamba_ssm_4x4096"]),
        "ssd_length": ({"h": 24, "p": 64, "g": 1, "n": 128}, ["mamba_ssm_32x512", "mamba_ssm_4x4096"]),
    },
}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
REPEATS = {"cpu": 15, "cuda": 20}
REPEATS_OF_MINUTES = 2  # for a case with a variant that takes minutes


def make_inputs(case: str, shape: dict[str, int], device: str) -> dict[str, Tensor]:
    """The operation's arguments, token-first, in the device's dtype; dt, A and D in float32."""
    generator = torch.Generator().manual_seed(0)
    b, t, n = shape["b"], shape["t"], shape["n"]
    width = (shape["d"],) if case.startswith("s6") else (shape["h"], shape["p"])
    steps = width[:1]
    groups = () if case.startswith("s6") else (shape["g"],)
    inputs = {
        "x": torch.randn(b, t, *width, generator=generator),
        "dt": torch.rand(b, t, *steps, generator=generator) * 0.1,
        "A": -torch.rand(*steps, *((n,) if case.startswith("s6") else ()), generator=generator) * 16,
        "B": torch.randn(b, t, *groups, n, generator=generator),
        "C": torch.randn(b, t, *groups, n, generator=generator),
        "D": torch.randn(*steps, generator=generator),
    }
    low = ("x", "B", "C")
    return {name: value.to(device, DTYPES[device] if name in low else None) for name, value in inputs.items()}


def transformers_s6(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    x, dt, B, C = (tensor.transpose(1, 2) for tensor in (x, dt, B, C))
    return mamba_selective_scan(x, dt, A, B, C, D).transpose(1, 2)


def transformers_ssd(chunk_size: int, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    return mamba2_chunk_scan(x, dt, A, B, C, chunk_size, D)


def own(operation: Callable, backend: str, **inputs: Tensor) -> Tensor:
    os.environ[BACKEND_VARIABLE] = backend
    return operation(**inputs)[0]


def shape_of(case: str, variant: str, device: str) -> dict[str, int]:
    shape = CASES[device][case][0]
    if not case.endswith("length"):
        return shape
    b, t = variant.rpartition("_")[2].split("x")
    return shape | {"b": int(b), "t": int(t)}


def make_variant(case: str, variant: str, device: str) -> tuple[Callable, dict[str, Tensor]]:
    """A function from the arguments to the output, and the arguments."""
    inputs = make_inputs(case, shape_of(case, variant, device), device)
    if variant == "transformers":
        return transformers_s6, inputs
    if variant.startswith("transformers"):
        return partial(transformers_ssd, int(variant.rpartition("_")[2])), inputs
    backend = variant.rpartition("_")[0] if case.endswith("length") else variant
    return partial(own, selective_scan if case.startswith("s6") else ssd_scan, backend), inputs


class Step:
    """Forward and backward of one variant, timed apart."""

    def __init__(self, case: str, variant: str, device: str):
        self.function, inputs = make_variant(case, variant, device)
        self.inputs = {name: value.requires_grad_() for name, value in inputs.items()}
        self.device = device
        self.backward_error = ""

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return 1000 * time.perf_counter()

    def run(self) -> tuple[float, float | None]:
        """Milliseconds of the forward and of both; None where the backend has no backward here."""
        started = self.now()
        y = self.function(**self.inputs)
        forward = self.now() - started
        if self.backward_error:
            return forward, None
        try:
            torch.autograd.grad(y, list(self.inputs.values()), torch.ones_like(y))
        except (RuntimeError, NotImplementedError) as error:
            self.backward_error = str(error).splitlines()[0]
            return forward, None
        return forward, self.now() - started


def summary(name: str, times: list[float | None]) -> dict:
    if None in times:
        return {f"{name}_ms": None}
    return {
        f"{name}_ms": round(statistics.median(times), 2),
        f"{name}_ms_range": [round(min(times), 2), round(max(times), 2)],
    }


def time_case(case: str, device: str) -> list[dict]:
    variants = CASES[device][case][1]
    steps, cells, reference = {}, [], None
    for variant in variants:
        cell = {"case": case, "variant": variant, "shape": shape_of(case, variant, device)}
        cells.append(cell)
        try:
            step = Step(case, variant, device)
            with torch.no_grad():
                y = step.function(**step.inputs).float()
        except (ImportError, ValueError) as error:
            cell["error"] = str(error)
            continue
        if not case.endswith("length"):
            reference = y if reference is None else reference
            cell["difference"] = float((y - reference).norm() / reference.norm())
        step.run()
        steps[variant] = step
    times: dict[str, list] = {variant: [] for variant in steps}
    repeats = REPEATS_OF_MINUTES if "transformers" in steps else REPEATS[device]
    for _ in range(repeats):
        for variant, step in steps.items():
            times[variant].append(step.run())
    for cell in cells:
        if cell["variant"] in steps:
            forward, both = zip(*times[cell["variant"]])
            cell["repeats"] = repeats
            cell |= summary("forward", list(forward)) | summary("forward_backward", list(both))
            if steps[cell["variant"]].backward_error:
                cell["backward_error"] = steps[cell["variant"]].backward_error
    return cells


def peak_of(case: str, variant: str, device: str) -> float:
    """MiB that one forward and backward take above the inputs."""
    step = Step(case, variant, device)
    if device == "cuda":
        step.run()  # tunes the kernels
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step.run()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    # the warm-up loads what a first call loads; a few tokens take no memory that counts
    few = {name: value[:1, :8] if value.dim() > 2 else value for name, value in step.inputs.items()}
    step.function(**few).sum().backward()
    before = resident_peak()
    step.run()
    return round((resident_peak() - before) / 2**20, 1)


def resident_peak() -> int:
    """Bytes of this process's largest resident set so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def child(*options: str) -> list | float:
    output = subprocess.run([sys.executable, __file__, *options], check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=sorted(CASES), default="cpu", help="device that computes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of torch")
    parser.add_argument("--output", type=Path, help="JSON file for the results; needed without --time and --peak")
    parser.add_argument("--time", metavar="CASE", help="time one case only and print it")
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "VARIANT"), help="print one variant's peak in MiB only")
    arguments = parser.parse_args()
    device = arguments.device
    torch.set_num_threads(arguments.threads)
    common = ("--device", device, "--threads", str(arguments.threads))
    if arguments.time:
        print(json.dumps(time_case(arguments.time, device)))
        return
    if arguments.peak:
        print(json.dumps(peak_of(*arguments.peak, device)))
        return
    if arguments.output is None:
        parser.error("--output FILE.json is missing")

    cells = []
    for case in CASES[device]:
        for cell in child(*common, "--time", case):
            if "error" not in cell:
                cell["peak_mib"] = child(*common, "--peak", case, cell["variant"])
            cells.append(cell)
            print(cells[-1], flush=True)
    report = {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU {platform.machine()}",
        "threads": None if device == "cuda" else arguments.threads,
        "dtype": str(DTYPES[device]).removeprefix("torch."),
        "versions": {
            name: version_of(name)
            for name in ("torch", "transformers", "mamba-ssm", "causal-conv1d", "flash-linear-attention", "triton")
        },
        "cells": cells,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
