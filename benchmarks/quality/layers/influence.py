"""How much each layer of a teacher changes its tokens, and the layer map of half its depth that follows.

python benchmarks/quality/layers/influence.py --output benchmarks/quality/layers/smollm2_cpu.json
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cab_hf.data.documents import load_documents
from cab_hf.data.packing import pack_documents
from cab_hf.teachers.loading import load_teacher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--teacher", default="smollm2-demo")
    parser.add_argument("--data", default="builtin")
    parser.add_argument("--rows", type=int, default=8, help="of 256 tokens")
    options = parser.parse_args()
    teacher, tokenizer = load_teacher(options.teacher)
    blocks = pack_documents(load_documents(options.data), tokenizer, 256, isolate_documents=False)
    rows = torch.tensor(blocks[: options.rows]["input_ids"])
    with torch.no_grad():
        states = teacher.float().eval()(rows, output_hidden_states=True).hidden_states
    influence = layer_influence(states)
    report = {"teacher": options.teacher, "data": options.data, "tokens": rows.numel()}
    report |= {"influence": [round(value, 4) for value in influence], "layers": most_influential(influence)}
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def layer_influence(hidden_states: Sequence[Tensor]) -> list[float]:
    """How much each layer turns its tokens: `1 - cos(h_in, h_out)`, the mean over tokens (arXiv 2403.03853, eq. 1).

    Args:
        hidden_states: `(b, t, d)` each: the embeddings, then every layer's output. The last one is behind the final
            norm in most models, which then counts to the last layer.
    """
    return [
        1 - F.cosine_similarity(before.double(), after.double(), dim=-1).mean().item()
        for before, after in zip(hidden_states, hidden_states[1:])
    ]


def most_influential(influence: Sequence[float]) -> list[int]:
    """The more influential half of the layers, in the teacher's order."""
    layers = sorted(range(len(influence)), key=influence.__getitem__, reverse=True)
    return sorted(layers[: len(influence) // 2])


if __name__ == "__main__":
    main()
