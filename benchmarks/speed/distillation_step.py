"""Tokens a second and peak memory of a whole distillation step under the Trainer, beside its parts in the same run.

python benchmarks/speed/distillation_step.py --output benchmarks/speed/results/distillation_step_h200.json

The teacher has the shape of SmolLM2-135M and random weights (speed does not depend on them); the student is its
teacher-shaped SSD student. Parts: the teacher's forward pass with logits, and the student's own training step with
labels. Ceiling: what a step of both parts, one after the other, would reach.
"""

import argparse
import functools
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from cab_hf import (
    CABMambaForCausalLM,
    DistillationTrainer,
    DistillationTrainingArguments,
    Teacher,
    student_from_teacher,
)


SHAPES = {
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
VARIANTS = {
    "kd": {},
    "kd + bridge": {"bridge_weight": 1.0},
    "kd, cuda graph": {"cuda_graph": True},
    "kd, all logits at once, cuda graph": {"logits_chunk_size": 2**20, "cuda_graph": True},
    "kd + bridge, cuda graph": {"bridge_weight": 1.0, "cuda_graph": True},
    "kd, torch.compile": {"torch_compile": True},
    "kd, torch.compile, cuda graph": {"torch_compile": True, "cuda_graph": True},
    "kd + bridge, torch.compile, cuda graph": {"bridge_weight": 1.0, "torch_compile": True, "cuda_graph": True},
    "output matching, cuda graph": {"kl_weight": 0.0, "output_weight": 1.0, "cuda_graph": True},
}


class RandomTokens(Dataset):
    """Blocks of random tokens, made once."""

    def __init__(self, vocab_size: int, length: int, count: int = 512):
        self.tokens = torch.randint(vocab_size, (count, length), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.tokens[index % len(self.tokens)]
        return {"input_ids": row, "labels": row}


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class StepTimer(TrainerCallback):
    """Seconds a step over equal spans of steps, the device synchronised only between spans."""

    def __init__(self, warm_up: int, span: int):
        self.warm_up, self.span, self.marks = warm_up, span, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= self.warm_up and (state.global_step - self.warm_up) % self.span == 0:
            synchronise()
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [(later - earlier) / self.span for earlier, later in zip(self.marks, self.marks[1:])]


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def fresh_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None


def row(seconds: list[float], tokens: int) -> dict[str, float | None]:
    rates = [tokens / one for one in seconds]
    return {
        "tokens_per_second": statistics.median(rates),
        "slowest": min(rates),
        "fastest": max(rates),
        "milliseconds": 1e3 * statistics.median(seconds),
        "peak_gib": peak_gib(),
    }


def timed(step: Callable[[], None], warm_up: int, spans: int, span: int) -> list[float]:
    for _ in range(warm_up):
        step()
    seconds = []
    for _ in range(spans):
        synchronise()
        start = time.perf_counter()
        for _ in range(span):
            step()
        synchronise()
        seconds.append((time.perf_counter() - start) / span)
    return seconds


def student_steps(model: CABMambaForCausalLM, ids: torch.Tensor, options: argparse.Namespace) -> list[float]:
    """Seconds of the student's own training step, on labels."""
    device = ids.device.type
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return timed(step, options.warm_up, options.spans, options.span)


def measure(
    options: argparse.Namespace, batch: int, length: int, results: dict[str, dict], save: Callable[[], None]
) -> None:
    """Fills `results` row by row and saves after each, so that a run that is cut off leaves what it measured."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[options.shape])
    teacher_model = LlamaForCausalLM(config).to(device, torch.bfloat16)
    tokens = batch * length
    ids = torch.randint(config.vocab_size, (batch, length), device=device)

    def student() -> CABMambaForCausalLM:
        return student_from_teacher(teacher_model.cpu().float()).to(device)

    if options.parts:
        fresh_memory()
        with torch.no_grad():
            seconds = timed(lambda: teacher_model(ids, use_cache=False), options.warm_up, options.spans, options.span)
        results["part: teacher forward"] = row(seconds, tokens)

        model = student().train()
        teacher_model.to(device, torch.bfloat16)
        fresh_memory()
        results["part: student step"] = row(student_steps(model, ids, options), tokens)
        del model
        parts = sum(results[name]["milliseconds"] for name in ("part: teacher forward", "part: student step"))
        results["ceiling of the parts"] = {"tokens_per_second": 1e3 * tokens / parts, "milliseconds": parts}

    teacher = Teacher(teacher_model)
    for name in options.variants:
        settings = VARIANTS[name]
        if settings.get("cuda_graph") and device.type != "cuda":
            continue
        fresh_memory()
        args = DistillationTrainingArguments(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=batch,
            max_steps=options.warm_up + options.spans * options.span,
            bf16=True,
            use_cpu=device.type == "cpu",
            learning_rate=1e-4,
            max_grad_norm=1.0,
            report_to=[],
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            **{"bridge_weight": 0.0} | settings,
        )
        timer = StepTimer(options.warm_up, options.span)
        model = student()
        teacher_model.to(device, torch.bfloat16)
        trainer = DistillationTrainer(
            model,
            teacher,
            args,
            train_dataset=RandomTokens(config.vocab_size, length),
            data_collator=collate,
            callbacks=[timer],
        )
        try:
            trainer.train()
            results[name] = row(timer.seconds(), tokens)
        except Exception as error:  # a variant that does not run is a result, too
            results[name] = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        print(f"{batch} x {length} {name}: {results[name]}", flush=True)
        save()
        del trainer, model


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def step_parser(description: str, variants: dict[str, Any]) -> argparse.ArgumentParser:
    """The options of a benchmark of steps."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", choices=variants, default=list(variants))
    parser.add_argument("--warm_up", type=int, default=10)
    parser.add_argument("--spans", type=int, default=3)
    parser.add_argument("--span", type=int, default=10, help="steps timed together")
    return parser


def step_report(options: argparse.Namespace, **facts: Any) -> dict[str, Any]:
    """A report without results: where, of what, over how many steps."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        **facts,
        "steps": {"warm_up": options.warm_up, "spans": options.spans, "span": options.span},
        "versions": {p: installed(p) for p in ("torch", "transformers", "mamba-ssm", "causal-conv1d", "triton")},
        "results": {},
    }


def save_report(options: argparse.Namespace, report: dict[str, Any]) -> None:
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    parser = step_parser(__doc__, VARIANTS)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--batches", nargs="+", default=["32x512", "16x1024"], help="batch x length")
    parser.add_argument("--parts", action=argparse.BooleanOptionalAction, default=True, help="measure them, too")
    options = parser.parse_args()
    report = step_report(options, dtype="bfloat16 autocast", shape=options.shape)
    for batch in options.batches:
        report["results"][batch] = {}
        save = functools.partial(save_report, options, report)
        measure(options, *map(int, batch.split("x")), report["results"][batch], save)
    for batch, table in report["results"].items():
        for name, result in table.items():
            rate, peak = result.get("tokens_per_second", 0), result.get("peak_gib")
            print(f"{batch:>8} {name:<40} {rate:>12,.0f} tokens/s  {peak}")


if __name__ == "__main__":
    main()
