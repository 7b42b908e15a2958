"""What gives a pure state-space student the copying of its teacher? A toy that a CPU can train.

    python benchmarks/quality/recall/toy.py [--steps 1500] [--only NAME ...] [--output FILE]

A two-layer Transformer learns to copy: random tokens in which spans come again after a gap. It is distilled, by KL
alone, behind or beside another loss, into students that differ in their text, start, state, taps and decay.
`toy_cpu.json` beside this file then holds the recall of each at three gaps (`copying_recall`, spans of 16), and the
training KL at the end. What is finished stays; the teacher is trained anew where its folder is missing, a little
differently on another processor: compare students of one file.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from cab_hf import (
    CABMambaConfig,
    CABMambaForCausalLM,
    DistillationTrainer,
    DistillationTrainingArguments,
    student_from_teacher,
)
from cab_hf.data.packing import IGNORE_INDEX, LanguageCollator
from cab_hf.data.repeats import insert_repeats
from cab_hf.evaluation.recall import copying_recall
from cab_hf.transfer import fit_output_projection


RESULTS = Path(__file__).parent / "toy_cpu.json"
TEACHER = Path("outputs/recall_toy/teacher")
VOCABULARY, LENGTH, ROWS, BATCH = 256, 64, 6400, 64
GAPS, SPAN = (1, 8, 24), 16
COMMON = {"max_steps": 1500, "per_device_train_batch_size": BATCH, "lr_scheduler_type": "cosine", "warmup_steps": 100}
COMMON |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 100}
COMMON |= {"weight_decay": 0.01, "learning_rate": 3e-3}
FIRST = 0.3  # share of the steps that a student's first losses have before the KL


class Student(NamedTuple):
    """What tells one student from the others.

    Attributes:
        repeats: spans come again in its text.
        fields: of its config; None: a Mamba-2 from scratch with its usual start.
        first: weights of the losses that come before the KL.
        beside: weights of the losses beside the KL; labels are those of the tokens that come again.
        previous: half of the channels that are written start with the token before, as previous-token heads read it.
    """

    repeats: bool
    fields: dict[str, Any] | None = {}
    first: dict[str, float] = {}
    beside: dict[str, float] = {}
    previous: bool = False


USUAL_TAPS = {"conv_init": "usual", "conv_activation": "silu"}
STUDENTS = {
    "random tokens, fitted weights": Student(False),
    "repeats, fitted weights": Student(True),
    "repeats, state of 64": Student(True, {"state_size": 64}),
    "repeats, usual taps": Student(True, USUAL_TAPS),
    "repeats, usual taps, state of 64": Student(True, USUAL_TAPS | {"state_size": 64}),
    "repeats, usual Mamba-2": Student(True, None),
    "random tokens, state of 64": Student(False, {"state_size": 64}),
    "repeats, A as the identity": Student(True, {"transition_init": "identity"}),
    "repeats, mixer outputs first": Student(True, first={"output_weight": 1.0}),
    "repeats, attention maps first": Student(True, first={"attention_weight": 1.0}),
    "repeats, bridge first": Student(True, first={"bridge_weight": 1.0, "bridge_centered": False}),
    "repeats, previous-token taps": Student(True, previous=True),
    "repeats, labels of what comes again": Student(True, beside={"ce_weight": 1.0}),
}


def rows(repeats: bool, seed: int) -> Dataset:
    ids = np.random.default_rng(seed).integers(VOCABULARY, size=(ROWS, LENGTH))
    blocks = Dataset.from_dict({"input_ids": ids, "labels": ids})
    return insert_repeats(blocks, float(repeats), range(VOCABULARY), seed=seed)


def label_repeats(text: Dataset, seed: int) -> Dataset:
    """The same rows, with labels at those tokens alone that came again."""
    ids = np.array(text["input_ids"][:])
    labels = np.where(ids == np.array(rows(False, seed)["input_ids"][:]), IGNORE_INDEX, ids)
    return text.remove_columns("labels").add_column("labels", labels.tolist())


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


@torch.no_grad()
def read_previous_tokens(student: CABMambaForCausalLM) -> None:
    for layer in student.backbone.layers:
        taps = layer.mixer.conv1d.weight  # (d, 1, k)
        taps[: student.config.mixer_width : 2] = taps[: student.config.mixer_width : 2].roll(-1, dims=-1)


def make_student(teacher: LlamaForCausalLM, kind: Student, text: Dataset) -> CABMambaForCausalLM:
    if kind.fields is None:
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "head_dim": 16, "state_size": 64, "mixer_type": "mamba2"}
        return CABMambaForCausalLM(CABMambaConfig(vocab_size=VOCABULARY, transition_init="s4d", **sizes))
    batches = [{"input_ids": torch.tensor(text[start : start + 16]["input_ids"])} for start in (0, 16, 32, 48)]
    student = student_from_teacher(teacher, calibration_inputs=batches[0], **kind.fields)
    if kind.previous:
        read_previous_tokens(student)
    fit_output_projection(student, teacher, batches, "floor")
    return student


def distil(teacher: LlamaForCausalLM, kind: Student, steps: int) -> dict[str, Any]:
    set_seed(0)
    text, started = rows(kind.repeats, 1), time.time()
    text = label_repeats(text, 1) if kind.beside else text
    student = make_student(teacher, kind, text)
    before = recall(student)
    before_kl = round(FIRST * steps) if kind.first else 0
    for weights, count in ((kind.first | {"kl_weight": 0.0}, before_kl), (kind.beside, steps - before_kl)):
        if count == 0:
            continue
        losses = {"bridge_weight": 0.0} | weights
        length = {"max_steps": count, "logging_steps": min(COMMON["logging_steps"], count)}
        args = DistillationTrainingArguments(output_dir=tempfile.mkdtemp(), **losses, **COMMON | length)
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
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = {"steps": options.steps, "students": {}}
    if options.output.is_file():
        report = json.loads(options.output.read_text())
    teacher = make_teacher(options.steps)
    report |= {"teacher": recall(teacher), "gaps": GAPS, "span": SPAN, "torch": torch.__version__}
    print(f"teacher: {report['teacher']}", flush=True)
    for name in options.only:
        if name not in report["students"]:
            report["students"][name] = distil(teacher, STUDENTS[name], options.steps)
            options.output.write_text(json.dumps(report, indent=1) + "\n")
        print(f"{name}: {report['students'][name]}", flush=True)


if __name__ == "__main__":
    main()
