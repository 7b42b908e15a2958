"""What gives a pure state-space student the copying of its teacher? A toy that a CPU can train.

    python benchmarks/quality/recall/toy.py [--steps 1500] [--only NAME ...]

A two-layer Transformer learns to copy: random tokens in which spans come again after a gap. It is distilled, by KL
alone, into students that differ in their text, start, state and taps. `toy_cpu.json` beside this file then holds the
recall of each at three gaps (`copying_recall`, spans of 16), and the training KL at the end. What is finished stays.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from cab_hf import CABMambaConfig, CABMambaForCausalLM, DistillationTrainer, DistillationTrainingArguments
from cab_hf.evaluation import copying_recall
from cab_hf.packing import LanguageCollator
from cab_hf.repeats import insert_repeats
from cab_hf.transfer import fit_output_projection


RESULTS = Path(__file__).parent / "toy_cpu.json"
TEACHER = Path("outputs/recall_toy/teacher")
VOCABULARY, LENGTH, ROWS, BATCH = 256, 64, 6400, 64
GAPS, SPAN = (1, 8, 24), 16
COMMON = {"max_steps": 1500, "per_device_train_batch_size": BATCH, "lr_scheduler_type": "cosine", "warmup_steps": 100}
COMMON |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 100}
COMMON |= {"weight_decay": 0.01, "learning_rate": 3e-3}
# name -> (text repeats spans, fields of the student's config; None: a Mamba-2 with its usual start)
STUDENTS: dict[str, tuple[bool, dict[str, Any] | None]] = {
    "random tokens, fitted weights": (False, {}),
    "repeats, fitted weights": (True, {}),
    "repeats, state of 64": (True, {"state_size": 64}),
    "repeats, usual taps": (True, {"conv_init": "usual", "conv_activation": "silu"}),
    "repeats, usual taps, state of 64": (True, {"conv_init": "usual", "conv_activation": "silu", "state_size": 64}),
    "repeats, usual Mamba-2": (True, None),
    "random tokens, state of 64": (False, {"state_size": 64}),
}


def rows(repeats: bool, seed: int) -> Dataset:
    ids = np.random.default_rng(seed).integers(VOCABULARY, size=(ROWS, LENGTH))
    blocks = Dataset.from_dict({"input_ids": ids, "labels": ids})
    return insert_repeats(blocks, float(repeats), range(VOCABULARY), seed=seed)


def recall(model: torch.nn.Module) -> dict[str, float]:
    model.eval()
    one = {gap: copying_recall(model, VOCABULARY, gap, length=SPAN, n=64, progress=False) for gap in GAPS}
    return {str(gap): round(report["recall"], 3) for gap, report in one.items()}


def make_teacher(steps: int) -> LlamaForCausalLM:
    if (TEACHER / "config.json").is_file():
        return LlamaForCausalLM.from_pretrained(TEACHER)
    set_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, max_position_embeddings=128))
    args = TrainingArguments(output_dir=tempfile.mkdtemp(), **COMMON | {"max_steps": steps})
    Trainer(model, args, train_dataset=rows(True, 0), data_collator=LanguageCollator(0)).train()
    model.save_pretrained(TEACHER)
    return model


def make_student(teacher: LlamaForCausalLM, fields: dict[str, Any] | None, text: Dataset) -> CABMambaForCausalLM:
    if fields is None:
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "head_dim": 16, "state_size": 64, "mixer_type": "mamba2"}
        return CABMambaForCausalLM(CABMambaConfig(vocab_size=VOCABULARY, transition_init="s4d", **sizes))
    batches = [{"input_ids": torch.tensor(text[start : start + 16]["input_ids"])} for start in (0, 16, 32, 48)]
    student = CABMambaForCausalLM.from_teacher(teacher, calibration_inputs=batches[0], **fields)
    fit_output_projection(student, teacher, batches, "floor")
    return student


def distil(teacher: LlamaForCausalLM, repeats: bool, fields: dict[str, Any] | None, steps: int) -> dict[str, Any]:
    set_seed(0)
    text, started = rows(repeats, 1), time.time()
    student = make_student(teacher, fields, text)
    before = recall(student)
    args = DistillationTrainingArguments(
        output_dir=tempfile.mkdtemp(), bridge_weight=0.0, **COMMON | {"max_steps": steps}
    )
    trainer = DistillationTrainer(student, teacher, args, train_dataset=text, data_collator=LanguageCollator(0))
    trainer.train()
    log = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    return {
        "recall_before": before,
        "recall": recall(student),
        "training_kl": round(log[-1], 4),
        "parameters": student.num_parameters(),
        "seconds": round(time.time() - started),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500, help="of the teacher and of every student")
    parser.add_argument("--only", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"steps": options.steps, "students": {}}
    teacher = make_teacher(options.steps)
    report |= {"teacher": recall(teacher), "gaps": GAPS, "span": SPAN, "torch": torch.__version__}
    print(f"teacher: {report['teacher']}", flush=True)
    for name in options.only:
        if name not in report["students"]:
            report["students"][name] = distil(teacher, *STUDENTS[name], options.steps)
            RESULTS.write_text(json.dumps(report, indent=1) + "\n")
        print(f"{name}: {report['students'][name]}", flush=True)


if __name__ == "__main__":
    main()
