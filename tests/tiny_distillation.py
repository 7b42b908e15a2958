"""Tiny teachers, students and rows for tests of a whole distillation."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from cab_hf import CABMambaConfig, CABMambaForCausalLM, DistillationTrainer, DistillationTrainingArguments
from cab_hf.distillation.training_args import LOSSES


VOCAB = 61
HEADS, KEY_HEADS, HEAD_DIM = 4, 2, 8
LENGTHS = (11, 3, 7, 1, 9, 5, 2, 11)
SIX_LOSSES = {
    "kl_weight": 1.0,
    "ce_weight": 0.3,
    "bridge_weight": 0.5,
    "output_weight": 0.7,
    "hidden_weight": 0.2,
    "attention_weight": 0.4,
}
NO_LOSS = dict.fromkeys(SIX_LOSSES, 0.0)


def tiny_teacher(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A random Llama of 4 layers with grouped queries and weights large enough for errors to show."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": HEADS * HEAD_DIM,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "max_position_embeddings": 64,
        "initializer_range": 0.15,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **overrides}))


def tiny_student(mixer_type: str = "mamba2", seed: int = 1, **overrides: Any):
    """A random student of 2 layers, as wide as the tiny teacher's attention and with as many heads."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": HEADS * HEAD_DIM,
        "num_hidden_layers": 2,
        "mixer_type": mixer_type,
        "expand": 1,
        "head_dim": HEAD_DIM,
        "state_size": 6,
        "transition_init": "s4d",
    }
    student = CABMambaForCausalLM(CABMambaConfig(**{**sizes, **overrides}))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return student


def make_arguments(folder: Any, **overrides: Any):
    """Arguments of a quiet run on the CPU that saves nothing and logs every step."""
    quiet = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "bridge_centered": False,  # the model as built, for tests that compute a step again
    }
    return DistillationTrainingArguments(**{**quiet, **overrides})


def ragged_rows(
    lengths: Iterable[int] = LENGTHS, width: int = 11, side: str = "right", seed: int = 0, pad_seed: int | None = None
) -> list[dict[str, Tensor]]:
    """Rows {"input_ids", "attention_mask", "labels"} `(width,)` of random tokens, padded on one side.

    The tokens of row `i` depend on `seed` and `i` alone. Padding is token 0, or random with `pad_seed`.
    """
    pads = None if pad_seed is None else torch.Generator().manual_seed(pad_seed)
    rows = []
    for index, length in enumerate(lengths):
        tokens = torch.randint(VOCAB, (width,), generator=torch.Generator().manual_seed(1000 * seed + index))[:length]
        missing = width - length
        padding = (
            torch.zeros(missing, dtype=torch.long)
            if pads is None
            else torch.randint(VOCAB, (missing,), generator=pads)
        )
        first_unseen = tokens.clone()
        first_unseen[:1] = -100
        parts = {
            "input_ids": (tokens, padding),
            "attention_mask": (torch.ones(length, dtype=torch.long), torch.zeros(missing, dtype=torch.long)),
            "labels": (first_unseen, torch.full((missing,), -100)),
        }
        rows.append({name: torch.cat(both if side == "right" else both[::-1]) for name, both in parts.items()})
    return rows


def real_tokens(rows: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    """The unpadded tokens of each row that has any."""
    tokens = [row["input_ids"][row["attention_mask"] != 0] for row in rows]
    return [row for row in tokens if len(row)]


class Recorder(TrainerCallback):
    """Keeps the gradients of each optimizer step and everything that is logged."""

    def __init__(self):
        self.gradients: list[dict[str, Tensor]] = []
        self.logs: list[dict[str, float]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def make_trainer(folder: Any, rows: Any = None, student: Any = None, teacher: Any = None, **options: Any):
    """A trainer of tiny models with a `Recorder` as its last callback, and the recorder."""
    recorder = Recorder()
    keywords = {
        name: options.pop(name) for name in ("eval_dataset", "data_collator", "processing_class") if name in options
    }
    trainer = DistillationTrainer(
        tiny_student() if student is None else student,
        tiny_teacher() if teacher is None else teacher,
        make_arguments(folder, **options),
        train_dataset=ragged_rows() if rows is None else rows,
        callbacks=[recorder],
        **keywords,
    )
    return trainer, recorder


def one_step(folder: Any, **options: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients and log of one optimizer step."""
    trainer, recorder = make_trainer(folder, **options)
    trainer.train()
    return recorder.gradients[0], recorder.logs[0]


def assert_gradients_close(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    assert left.keys() == right.keys()
    largest = max(gradient.abs().max() for gradient in right.values())
    assert largest > 1e-3
    for name, gradient in right.items():
        error = (left[name] - gradient).abs().max()
        assert error <= tolerance * max(gradient.abs().max(), 1e-3 * largest), (name, error, gradient.abs().max())


def assert_logs_close(left: dict[str, float], right: dict[str, float], tolerance: float = 2e-5) -> None:
    for name in (*LOSSES, "loss"):
        assert left[name] == pytest.approx(right[name], rel=tolerance, abs=1e-7), name
