"""Families without a table, trained and not only built: does the KL of their students fall?

A tiny teacher of each family is trained on real text first (Python's language reference, as bytes). Its student, whose
attention is mixers in every layer, is then distilled by KL and the bridge.

    python benchmarks/quality/hybrids/families.py                 # three families, some minutes on two cores
    python benchmarks/quality/hybrids/families.py olmo2 --keep 1  # one, with one layer of attention kept
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
import transformers
from datasets import Dataset

from cab_hf import DistillationTrainer, DistillationTrainingArguments, fit_output_projection, student_from_teacher
from cab_hf.data.documents import load_documents
from cab_hf.evaluation.tiny_families import tiny_model


FAMILIES = ("olmo2", "mixtral", "gemma2")
LENGTH, ROWS, HELD_OUT = 96, 16, 64
SIZES = {"vocab_size": 256, "max_position_embeddings": 256, "pad_token_id": 0, "sliding_window": 64}
HERE = Path(__file__).parent


def pieces() -> torch.Tensor:
    """The text's bytes `(pieces, LENGTH)`, in a fixed random order."""
    text = "\n".join(document["text"] for document in load_documents("builtin")).encode()
    count = len(text) // LENGTH
    tokens = torch.frombuffer(bytearray(text[: count * LENGTH]), dtype=torch.uint8).long().view(count, LENGTH)
    return tokens[torch.randperm(count, generator=torch.Generator().manual_seed(0))]


def train(model: torch.nn.Module, tokens: torch.Tensor, steps: int, seed: int) -> float:
    """Trains a model on next bytes; the last loss, in nats a byte."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    model.train()
    for _ in range(steps):
        batch = tokens[torch.randint(len(tokens), (ROWS,), generator=generator)]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    return float(loss.detach())


@torch.no_grad()
def kl(student: torch.nn.Module, teacher: torch.nn.Module, tokens: torch.Tensor) -> float:
    """KL of the teacher to the student, in nats a byte."""
    ours, theirs = (model(input_ids=tokens, use_cache=False).logits.log_softmax(-1) for model in (student, teacher))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def distil(family: str, steps: int, keep: int | None, seed: int) -> dict:
    """One family's row: its teacher's loss, and the KL of its student before and after."""
    start = time.time()
    tokens = pieces()
    held_out, tokens = tokens[:HELD_OUT], tokens[HELD_OUT:]
    teacher = tiny_model(family, **SIZES)
    loss = train(teacher, tokens, steps, seed)
    student = student_from_teacher(teacher, keep_attention=keep, accept_inexact=1.0)
    built = kl(student, teacher, held_out)
    fit_output_projection(student, teacher, [{"input_ids": tokens[:HELD_OUT]}])
    fitted = kl(student, teacher, held_out)
    with tempfile.TemporaryDirectory() as folder:
        args = DistillationTrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=ROWS,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            kl_weight=1.0,
            bridge_weight=0.1,
            seed=seed,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=max(steps // 4, 1),
            use_cpu=not torch.cuda.is_available(),
        )
        rows = Dataset.from_dict({"input_ids": tokens.tolist()}).with_format("torch")
        DistillationTrainer(student, teacher, args, train_dataset=rows).train()
    student = student.eval().to(held_out.device)
    last = kl(student, teacher.to(held_out.device), held_out)
    return {
        "family": family,
        "student": type(student).__name__,
        "kept": len(teacher.model.layers) - len(student.mixers),
        "teacher_loss": round(loss, 3),
        "kl_built": round(built, 4),
        "kl_fitted": round(fitted, 4),
        "kl_trained": round(last, 4),
        "falls_by": round(built / last, 1),
        "seconds": round(time.time() - start),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(FAMILIES), help=f"model types (default: {FAMILIES})")
    parser.add_argument("--steps", type=int, default=800, help="of the teacher, and of its student (default: 800)")
    parser.add_argument("--keep", type=int, help="layers of attention to keep")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=str(HERE / "families_cpu.json"), help="JSON file for the rows")
    arguments = parser.parse_args()
    rows = []
    for family in arguments.families:
        rows.append(distil(family, arguments.steps, arguments.keep, arguments.seed))
        print(json.dumps(rows[-1]), flush=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    settings = {"steps": arguments.steps, "rows": ROWS, "length": LENGTH, "seed": arguments.seed, **versions}
    Path(arguments.output).write_text(json.dumps({"settings": settings, "families": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
