"""SmolLM2-135M with windows beside mixers that say nothing yet: what `cab-hf evaluate` compares trained students with.

python benchmarks/quality/windows/untrained.py OUTPUT [--kept benchmarks/quality/windows/four/keep_attention.json]
"""

import argparse
import json
from pathlib import Path

from cab_hf import student_from_teacher
from cab_hf.teachers.loading import load_teacher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the student")
    parser.add_argument("--kept", type=Path, help="keep_attention.json of a run, whose layers keep all attention")
    options = parser.parse_args()
    kept = [] if options.kept is None else json.loads(options.kept.read_text())["layers"]
    teacher, tokenizer = load_teacher("smollm2-demo")
    student = student_from_teacher(teacher.float(), keep_attention=kept, attention_window=256, data=(), state_size=128)
    student.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
