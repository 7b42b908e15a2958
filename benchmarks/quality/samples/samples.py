"""Little text, and what the teacher writes beside it: the data of `grid.yaml` beside this file.

    python benchmarks/quality/small_lm/teacher.py
    python benchmarks/quality/samples/samples.py

Of the training speeches 1 % and 5 % of the documents, and 1M tokens that the small teacher writes: from nothing, and,
another million each, continuing pieces of either share. All go to `outputs/small_lm/tokens`.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cab_hf.data.documents import load_documents, split_documents
from cab_hf.data.packing import save_tokens
from cab_hf.teachers.sampling import sample_documents


OUTPUT = Path("outputs/small_lm")
SHARES = {"1pct": 0.01, "5pct": 0.05}
SAMPLING = {"num_tokens": 1_000_000, "length": 256, "batch_size": 512, "prompt_length": 16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    if not (OUTPUT / "teacher").is_dir():
        parser.error(f"there is no {OUTPUT / 'teacher'}. Run `python benchmarks/quality/small_lm/teacher.py` first")
    torch.set_num_threads(1)
    model, tokenizer = (kind.from_pretrained(OUTPUT / "teacher") for kind in (AutoModelForCausalLM, AutoTokenizer))
    documents = load_documents(OUTPUT / "tokens/speeches.train.npz")
    prompts = {"nothing": None}
    for name, share in SHARES.items():
        prompts[name] = split_documents(documents, share)[1]
        print(f"{name}: {save_tokens(OUTPUT / f'tokens/speeches.{name}.npz', prompts[name], tokenizer):,} tokens")
    for name, texts in prompts.items():
        samples = sample_documents(model, tokenizer, prompts=texts, **SAMPLING)
        save_tokens(OUTPUT / f"tokens/samples.{name}.npz", samples, tokenizer)


if __name__ == "__main__":
    main()
