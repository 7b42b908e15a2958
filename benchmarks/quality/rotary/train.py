"""train_cab.py for a prototype: a pure student whose B and C are rotated by position, as its teacher's keys are.

    python benchmarks/quality/rotary/train.py RECIPE.yaml --student_config "{state_size: 64}" [--option value ...]

What is measured of whole rows holds: KL, perplexity and copying in `report.json`. No cache knows of the rotation, so
the sample is of another model, and so is what the saved folder loads as.
"""

import sys
from pathlib import Path
from unittest.mock import patch

from torch import Tensor
from transformers import PreTrainedModel


ROOT = Path(__file__).parents[3]
sys.path[:0] = [str(ROOT / name) for name in (".", "benchmarks/quality/questions", "benchmarks/quality/recurrences")]

from questions import RotaryMixer, calibrate_output_norm, fit_output_projection  # noqa: E402

import train_cab  # noqa: E402
from cab_hf.recipe_options import ModelArguments  # noqa: E402
from cab_hf.runs import text  # noqa: E402


_build_student = text.build_student


def rotated(
    model: ModelArguments, teacher: PreTrainedModel, layer_map: str, batches: list[dict[str, Tensor]]
) -> PreTrainedModel:
    """As `build_student`; mixers rotate B and C before their output projections are fitted."""
    student = _build_student(model, teacher, layer_map, []).to(teacher.device)
    width = teacher.config.hidden_size // teacher.config.num_attention_heads
    for layer in student.backbone.layers:
        if layer.mixer.config.state_size != width:
            raise ValueError(f"state_size is {layer.mixer.config.state_size}, but keys are {width} wide. Set it so.")
        layer.mixer = RotaryMixer(layer.mixer, teacher.model.rotary_emb).to(teacher.device)
    calibrate_output_norm(student, teacher, batches[0])
    fit_output_projection(student, teacher, batches)
    return student


def main() -> None:
    with patch.object(text, "build_student", rotated):
        train_cab.main()


if __name__ == "__main__":
    main()
