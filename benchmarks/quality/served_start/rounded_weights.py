"""What students lose when their weights are rounded as float16, or their matrices as GGUF's Q8_0 and Q4_0.

    python benchmarks/quality/served_start/rounded_weights.py OUTPUT STUDENT [STUDENT ...]

Students of `smollm2-demo`, as folders; KL on 32,768 held-out tokens, computed in float32 by PyTorch, on a GPU.
"""

import argparse
import json
from pathlib import Path

import torch

from cab_hf import CABMambaForCausalLM
from cab_hf.data import load_documents, pack_documents
from cab_hf.evaluation import compare
from cab_hf.teachers import load_teacher


TEXTS = ("speeches", "brown")


def rounded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """As GGUF stores blocks of 32: whole numbers times a float16 scale."""
    blocks = weight.reshape(-1, 32)
    if kind == "Q8_0":
        low, high, scale = -127, 127, blocks.abs().amax(1, keepdim=True) / 127
    else:
        low, high, scale = -8, 7, blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) / -8
    numbers = (blocks * torch.where(scale == 0, 0, 1 / scale)).round().clamp(low, high)
    return (numbers * scale.half().float()).reshape(weight.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="JSON file for the results")
    parser.add_argument("students", nargs="+", help="folders of students of smollm2-demo")
    arguments = parser.parse_args()
    teacher, tokenizer = load_teacher("smollm2-demo")
    teacher = teacher.float().cuda()
    texts = {
        name: pack_documents(
            load_documents(f"benchmarks/data/cache/tokens/{name}.heldout.npz"), tokenizer, 512, isolate_documents=False
        )
        for name in TEXTS
    }
    results = {}
    for folder in arguments.students:
        student = CABMambaForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda().eval()
        exact = {name: weight.clone() for name, weight in student.named_parameters()}
        for kind in ("f32", "f16", "Q8_0", "Q4_0"):
            for name, parameter in student.named_parameters():
                weight = exact[name]
                if kind == "f16":
                    weight = weight.half().float()
                elif kind.startswith("Q") and weight.dim() == 2:
                    weight = rounded(weight, kind)
                parameter.data.copy_(weight)
            results.setdefault(folder.rstrip("/").split("/")[-1], {})[kind] = {
                name: round(compare(student, teacher, blocks, 16, max_tokens=32768, progress=False)["kl"], 4)
                for name, blocks in texts.items()
            }
    arguments.output.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
