"""Time and peak memory of aligning one layer over its length: the bridge beside the matrix loss, forward and backward.

    python benchmarks/speed/alignment.py [--device cpu|cuda] --output FILE.json

The layer has SmolLM2-135M's sizes: 9 heads of 64 with 3 key heads, state 64. The bridge compares B and C with keys and
queries through its MLPs; the matrix loss compares the mixer's implied attention map, `(9, t, t)`, with the teacher's.
Each cell runs in a process of its own, as in `chunked_kl.py`, and says so where memory does not suffice.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from measuring import measured, save_cells

from cab_hf import CABMambaConfig
from cab_hf.distillation.bridge import AttentionBridge, BridgePair
from cab_hf.distillation.losses import attention_loss
from cab_hf.models.mixers import SSDMixer


HEADS, KEY_HEADS, HEAD_DIM, STATE = 9, 3, 64, 64
LENGTHS = dict.fromkeys(("cpu", "cuda"), [512, 1024, 2048, 4096, 8192, 16384])
REPEATS = 3
LARGEST_MAP = {"cpu": 4096, "cuda": 16384}
"""Tokens above which the matrix loss is not tried: its map alone would take gigabytes, several times over."""


def measure(device: str, method: str, tokens: int) -> dict:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    B, C = (torch.randn(1, tokens, 1, STATE, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    dt = torch.rand(1, tokens, HEADS, device=device, requires_grad=True)
    query = torch.randn(1, HEADS, tokens, HEAD_DIM, device=device, dtype=dtype)
    key = torch.randn(1, KEY_HEADS, tokens, HEAD_DIM, device=device, dtype=dtype)
    sizes = {"expand": 1, "head_dim": HEAD_DIM, "state_size": STATE, "hidden_size": HEADS * HEAD_DIM}
    config = CABMambaConfig(num_hidden_layers=1, mixer_type="mamba2", vocab_size=8, **sizes)
    mixer = SSDMixer(config, 0).to(device)
    mixer.init_mixer_weights()
    bridge = AttentionBridge([STATE], [KEY_HEADS * HEAD_DIM], [HEADS * HEAD_DIM]).to(device)

    def loss() -> torch.Tensor:
        if method == "matrix":
            scores = query @ key.repeat_interleave(HEADS // KEY_HEADS, dim=1).mT * HEAD_DIM**-0.5
            future = torch.ones(tokens, tokens, dtype=torch.bool, device=device).triu(1)
            return attention_loss(mixer.attention_map(B, C, dt), scores.masked_fill(future, -torch.inf).softmax(-1))
        targets = [states.transpose(1, 2).flatten(2) for states in (key, query)]
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return bridge.loss([BridgePair(0, "key", [B], targets[0]), BridgePair(0, "query", [C], targets[1])])

    cell = {"method": method, "tokens": tokens}
    return cell | measured(lambda: loss().backward(), device, REPEATS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=sorted(LENGTHS), default="cpu", help="device that computes")
    parser.add_argument("--output", type=Path, help="JSON file for the results; needed unless --cell is given")
    parser.add_argument("--cell", nargs=2, metavar=("METHOD", "TOKENS"), help="measure one cell only")
    arguments = parser.parse_args()
    if arguments.cell:
        print(json.dumps(measure(arguments.device, arguments.cell[0], int(arguments.cell[1]))))
        return
    if arguments.output is None:
        parser.error("--output FILE.json is missing")
    cells = []
    for tokens in LENGTHS[arguments.device]:
        for method in ("bridge", "matrix"):
            if method == "matrix" and tokens > LARGEST_MAP[arguments.device]:
                continue
            command = [sys.executable, __file__, "--device", arguments.device, "--cell", method, str(tokens)]
            process = subprocess.run(command, capture_output=True, text=True)
            failed = {"method": method, "tokens": tokens, "error": process.stderr.strip().rpartition("\n")[2][:300]}
            cells.append(failed if process.returncode else json.loads(process.stdout.splitlines()[-1]))
            print(cells[-1], flush=True)
    save_cells(arguments.output, arguments.device, cells, repeats=REPEATS)


if __name__ == "__main__":
    main()
