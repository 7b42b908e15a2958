"""What a layer's mixer costs alone: SmolLM2-135M, one layer's attention replaced, outputs fitted, nothing trained.

    python benchmarks/data/prepare_text.py --tokenize
    python benchmarks/quality/hybrids/replaced.py --output benchmarks/quality/hybrids/replaced_cpu.json

`choose_attention` measures, as `keep_attention: auto:4` does behind the stage of outputs.
"""

import argparse
import json
from pathlib import Path

import torch
import transformers

from cab_hf import load_documents, student_from_teacher
from cab_hf.data import pack_documents
from cab_hf.evaluation import choose_attention
from cab_hf.evaluation.kept_attention import choice_table
from cab_hf.evaluation.plots import kept_attention
from cab_hf.teachers.loading import load_teacher
from cab_hf.transfer import attention_for, fit_output_projection


TOKENS = Path("benchmarks/data/cache/tokens")
FIT_ROWS, TEXT_ROWS, LENGTH = 8, 2, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, required=True, help="JSON file for the result; the picture is beside it"
    )
    output = parser.parse_args().output
    teacher, tokenizer = load_teacher("smollm2-demo")
    teacher = teacher.to(torch.float32).eval()
    rows = pack_documents(
        load_documents(str(TOKENS / "speeches.train.npz")), tokenizer, LENGTH, isolate_documents=False
    ).with_format("torch")
    spread = rows.select(range(0, len(rows), len(rows) // (FIT_ROWS + TEXT_ROWS)))["input_ids"][:]
    inputs = {"input_ids": spread[:FIT_ROWS]}
    student = student_from_teacher(
        teacher, keep_attention=0, data=(), calibration_inputs=inputs, state_size=128
    ).eval()
    fit_output_projection(student, teacher, [inputs])
    choice = choose_attention(
        student,
        teacher,
        attention_for(student, teacher),
        4,
        spread[FIT_ROWS : FIT_ROWS + TEXT_ROWS],
        sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids)),
        gaps=(64,),
    )
    choice["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    output.write_text(json.dumps(choice, indent=1))
    kept_attention(choice, output.with_suffix(".png"))
    print(choice_table(choice))


if __name__ == "__main__":
    main()
