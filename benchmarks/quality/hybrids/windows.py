"""How near a Transformer stays to itself when each token sees a window and a few sinks, and nothing is trained.

    python benchmarks/data/prepare_text.py --tokenize
    python benchmarks/quality/hybrids/windows.py --output benchmarks/quality/hybrids/windows_cpu.json

What any student of states must beat, and what rows of a length can show: SmolLM2-135M, held-out text. `cells` holds
for each `text`, `window` and tokens a row (`length`) the KL to the teacher and the perplexity ratio, with intervals.
"""

import argparse
import json
from pathlib import Path

import torch
import transformers

from cab_hf import load_documents
from cab_hf.data import pack_documents
from cab_hf.evaluation import compare
from cab_hf.evaluation.controls import with_window
from cab_hf.teachers.loading import load_teacher


TOKENS = Path("benchmarks/data/cache/tokens")
TEXTS = ("speeches", "python_docs", "brown")
WINDOWS, LENGTHS, SINKS, MOST = (64, 256), (512, 2048), 4, 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the results")
    output = parser.parse_args().output
    teacher, tokenizer = load_teacher("smollm2-demo")
    teacher = teacher.to(torch.float32).eval()
    facts = {"torch": torch.__version__, "transformers": transformers.__version__, "sinks": SINKS, "tokens": MOST}
    cells = []
    for text in TEXTS:
        documents = load_documents(str(TOKENS / f"{text}.heldout.npz"))
        for length in LENGTHS:
            rows = pack_documents(documents, tokenizer, length, isolate_documents=False)
            for window in WINDOWS:
                found = compare(with_window(teacher, window, SINKS), teacher, rows, max_tokens=MOST, batch_size=2)
                cells.append({"text": text, "window": window, "length": length} | found)
                print({name: value for name, value in cells[-1].items() if "ci95" not in name}, flush=True)
                output.write_text(json.dumps(facts | {"cells": cells}, indent=1) + "\n")


if __name__ == "__main__":
    main()
