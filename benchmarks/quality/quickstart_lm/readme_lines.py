"""README's lines of Python with the demo's teacher and text, on as many tokens as the demo: how near do they end?

    python benchmarks/quality/quickstart_lm/readme_lines.py --output FILE.json

A step reads one row of 512 tokens. Held out are the demo's documents; it measures on as many of their tokens.
"""

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import cab_hf
from cab_hf.data import pack_documents, split_documents
from cab_hf.evaluation.language import compare
from cab_hf.teachers.loading import load_teacher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="smollm2-demo", help="as for the lines (default: smollm2-demo)")
    parser.add_argument("--steps", type=int, default=110, help="rows to train on (default: 110)")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the result")
    arguments = parser.parse_args()
    text, heldout = split_documents(cab_hf.load_documents("builtin"), "0.1")
    model, tokenizer = load_teacher(arguments.teacher)
    blocks = pack_documents(heldout, tokenizer, 256)
    model.float()

    started, teacher = time.perf_counter(), arguments.teacher
    with tempfile.TemporaryDirectory() as folder:
        options = {"per_device_train_batch_size": 1, "use_cpu": True, "save_strategy": "no", "report_to": "none"}
        student = cab_hf.student_from_teacher(teacher, data=text)
        before = compare(student, model, blocks, 4, max_tokens=6144)
        args = cab_hf.DistillationTrainingArguments(
            folder, bridge_weight=0.1, max_steps=arguments.steps, teacher_dtype="float32", **options
        )
        trainer = cab_hf.DistillationTrainer(student, teacher, args, train_dataset=text)
        trainer.train()
    result = {
        "teacher": teacher,
        "train_tokens": arguments.steps * 512,
        "seconds": round(time.perf_counter() - started, 1),
        "hardware": f"{platform.machine()} CPU",
        "before": before,
        "after": compare(student, model, blocks, 4, max_tokens=6144),
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"perplexity {result['after']['student_perplexity']:.1f}, KL {result['after']['kl']:.2f}")


if __name__ == "__main__":
    main()
