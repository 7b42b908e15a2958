"""How good a student is before any training, by the way in which it starts.

python benchmarks/quality/starts/starts.py --output benchmarks/quality/starts/starts_cpu.json

Teacher: SmolLM2-135M. Text: Python's language reference; the calibration reads training documents, the evaluation
held-out ones. Every student has the teacher's embeddings, norms, MLPs and head; the starts differ in the mixers.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

import torch

from cab_hf import CABMambaForCausalLM, student_from_teacher
from cab_hf.data.documents import load_documents, split_documents
from cab_hf.data.packing import LanguageCollator, pack_documents
from cab_hf.evaluation.language import compare
from cab_hf.teachers.loading import load_teacher
from cab_hf.transfer import calibrate_output_norm, fit_memories, fit_output_projection


USUAL = {"conv_init": "usual", "conv_activation": "silu", "gate_init": "usual", "skip_init": "usual"}
STARTS = {
    "random mixers": {"copy_attention": False},
    "copied, usual Mamba-2 around them": {**USUAL, "transition_init": "s4d"},
    "copied, transparent, A ~ I": {"transition_init": "identity"},
    "copied, transparent, moving averages": {},
    "the same, D = 1": {"skip_init": "usual"},
    "the same, SiLU after the convolution": {"conv_activation": "silu"},
    "S6, V and O copied": {"mixer_type": "mamba"},
}
FITTED = ("random mixers", "copied, transparent, A ~ I", "copied, transparent, moving averages", "the same, D = 1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--teacher", default="smollm2-demo")
    parser.add_argument("--calibration_tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--eval_tokens", type=int, default=2048)
    options = parser.parse_args()

    teacher, tokenizer = load_teacher(options.teacher)
    teacher = teacher.float().eval()
    training, heldout = split_documents(load_documents("builtin"), 0.1)
    blocks, heldout = (pack_documents(part, tokenizer, 512, isolate_documents=False) for part in (training, heldout))
    collate = LanguageCollator(tokenizer.eos_token_id)
    results = {}

    def evaluate(name: str, student: CABMambaForCausalLM, started: float) -> None:
        report = compare(student, teacher, heldout, batch_size=2, max_tokens=options.eval_tokens, progress=False)
        results[name] = report | {"seconds_to_build": round(started, 1)}
        print(f"{name:<70} perplexity {report['student_perplexity']:>12,.0f}   KL {report['kl']:.3f}", flush=True)

    for name, settings in STARTS.items():
        torch.manual_seed(0)
        start = time.perf_counter()
        batch = collate([blocks[i] for i in range(2)])
        student = student_from_teacher(teacher, **settings)
        calibrate_output_norm(student, teacher, {"input_ids": batch["input_ids"]})
        evaluate(f"{name}; RMS", student, time.perf_counter() - start)
        if name not in FITTED:
            continue
        state = {key: value.clone() for key, value in student.state_dict().items()}
        for tokens in options.calibration_tokens:
            student.load_state_dict(state)
            start = time.perf_counter()
            batches = [
                {"input_ids": collate([blocks[i], blocks[i + 1]])["input_ids"]} for i in range(0, tokens // 512, 2)
            ]
            fit_output_projection(student, teacher, batches)
            evaluate(f"{name}; output projections fitted on {tokens:,} tokens", student, time.perf_counter() - start)
            if settings == {}:
                student.load_state_dict(state)
                start = time.perf_counter()
                fit_memories(student, teacher, {"input_ids": torch.cat([one["input_ids"] for one in batches])})
                calibrate_output_norm(student, teacher, batches[0])
                fit_output_projection(student, teacher, batches)
                evaluate(f"{name}; memories, too, fitted on {tokens:,} tokens", student, time.perf_counter() - start)

    report = {
        "teacher": options.teacher,
        "eval_tokens": options.eval_tokens,
        "seed": 0,
        "dtype": "float32",
        "versions": {package: version(package) for package in ("torch", "transformers")},
        "results": results,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
