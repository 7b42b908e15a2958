"""What a projection of few rows costs in a captured step: by the library, and with what is around it in one kernel.

    python benchmarks/speed/projections.py --output benchmarks/speed/results/projections_h200.json

SmolLM2-135M's shapes in bfloat16. Each cell is a CUDA graph of one projection in 30 layers, with weights of their own,
and holds the median microseconds a layer (`us`). `library` are the norm's kernel, the library's product and PyTorch's
activation and sum; `one kernel` is `decode_kernels.linear`, by the features and warps of a program and the columns
that it reads at once.
"""

import argparse
import functools
import statistics
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from measuring import save_cells
from torch import Tensor, nn
from torch.nn import functional as F

from cab_hf.models import decode_kernels


ROWS = (2, 16, 64)
LAYERS, TIMES = 30, 20
WIDTH, INNER, STREAM, VOCABULARY = 576, 1536, 2313, 49152
# width, features, with a norm, with a gate, with a sum
SHAPES = {
    "in_proj": (WIDTH, STREAM, True, False, False),
    "out_proj": (WIDTH, WIDTH, False, False, True),
    "gate and up": (WIDTH, INNER, True, True, False),
    "down": (INNER, WIDTH, False, False, True),
}
PROGRAMS = tuple(product((16, 32), (2, 4), (128, 512)))


def graph_us(run: Callable[[], object]) -> float:
    """Median microseconds of one of `LAYERS` in a graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(TIMES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / LAYERS)
    return statistics.median(times)


def by_library(x: Tensor, linear: nn.Linear, norm: nn.Module | None, residual: Tensor | None, gate: nn.Linear | None):
    x = x if norm is None else decode_kernels.normed(x, norm)
    y = linear(x) if gate is None else F.silu(gate(x)) * linear(x)
    return y if residual is None else residual + y


def in_layers(x: Tensor, layers: list, around: tuple, projected: Callable[..., Tensor]) -> Tensor:
    norm, residual = around
    for linear, gate in layers:
        y = projected(x, linear, norm, residual, gate)
    return y


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the results")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    cells = []
    for name, (width, features, has_norm, has_gate, has_sum) in SHAPES.items():
        with torch.device("cuda"):
            linears = [nn.Linear(width, features, bias=False, dtype=torch.bfloat16) for _ in range(LAYERS)]
            gates = [nn.Linear(width, features, bias=False, dtype=torch.bfloat16) for _ in range(LAYERS)]
            norm = nn.RMSNorm(width, eps=1e-5, dtype=torch.bfloat16) if has_norm else None
        for rows in ROWS:
            x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
            residual = torch.randn(rows, features, device="cuda", dtype=torch.bfloat16) if has_sum else None

            around = (norm, residual)
            layers = list(zip(linears, gates if has_gate else [None] * LAYERS))
            every = functools.partial(in_layers, x, layers, around)
            shape = {"projection": name, "rows": rows}
            right = every(by_library)
            us = graph_us(functools.partial(every, by_library))
            cells.append(shape | {"way": "library", "us": round(us, 2)})
            for features_of, warps, columns in PROGRAMS:
                program = {"features": features_of, "warps": warps, "columns": columns}
                decode_kernels._ROW_FEATURES, decode_kernels._ROW_WARPS = features_of, warps
                decode_kernels._ROW_COLUMNS = decode_kernels._ROW_COLUMNS_OF_MANY = columns
                cell = shape | {"way": "one kernel", **program}
                try:
                    got = every(decode_kernels.linear)
                    cell["error"] = round(((got - right).abs().max() / right.abs().max()).item(), 5)
                    cell["us"] = round(graph_us(functools.partial(every, decode_kernels.linear)), 2)
                except Exception as failed:  # too much for a multiprocessor; the other cells are still worth having
                    cell["failed"] = f"{type(failed).__name__}: {failed}"[:200]
                cells.append(cell)
            of_shape = [cell for cell in cells if shape.items() <= cell.items() and "us" in cell]
            print(sorted(of_shape, key=lambda cell: cell["us"])[:3], of_shape[0], flush=True)
            save_cells(arguments.output, "cuda", cells, dtype="bfloat16", layers=LAYERS)


if __name__ == "__main__":
    main()
