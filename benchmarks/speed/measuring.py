"""What the benchmarks of single cells share: how a cell is measured, and the file of its results."""

import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def measured(step: Callable[[], None], device: str, repeats: int) -> dict:
    """Peak memory above what is there now, and milliseconds after one warm-up: the median and the range."""

    def timed() -> float:
        started = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - started)

    before = torch.cuda.memory_allocated() if device == "cuda" else resident_peak()
    timed()
    times = [timed() for _ in range(repeats)]
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident_peak()
    return {
        "peak_mib": round((peak - before) / 2**20, 1),
        "ms": round(statistics.median(times), 2),
        "ms_range": [round(min(times), 2), round(max(times), 2)],
    }


def resident_peak() -> int:
    """Bytes of this process's largest resident set so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def save_cells(path: Path, device: str, cells: list[dict[str, Any]], **facts: Any) -> None:
    """Writes cells with what they were measured on and the facts that hold for all of them."""
    on_cuda = device == "cuda"
    report = {
        "device": torch.cuda.get_device_name() if on_cuda else f"CPU {platform.machine()}",
        "threads": None if on_cuda else torch.get_num_threads(),
        "torch": torch.__version__,
        **facts,
        "cells": cells,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(report, indent=1) + "\n")
    scratch.replace(path)  # the file is there whole, whenever a run ends
