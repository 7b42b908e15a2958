"""How much each layer of a teacher changes its tokens, and the layer map of half its depth that follows.

python benchmarks/quality/layers/influence.py --output benchmarks/quality/layers/smollm2_cpu.json
"""

import argparse
import json
from pathlib import Path

import torch

from cab_hf.data.documents import load_documents
from cab_hf.data.packing import pack_documents
from cab_hf.teachers.alignment import layer_influence, layers_by_influence
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
    half = len(influence) // 2
    report = {"teacher": options.teacher, "data": options.data, "tokens": rows.numel()}
    report |= {"influence": [round(value, 4) for value in influence], "layers": layers_by_influence(states, half)}
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
