"""Turn any pretrained Transformer into a Mamba: distillation through the attention bridge (arXiv 2510.19266)."""

import importlib
import sys
from pathlib import Path


def _is_command() -> bool:
    """Whether this process is `cab-hf`, which reads its line before it imports torch, and then what it needs."""
    program = sys.argv[0] if sys.argv else ""
    return Path(program).stem in ("cab-hf", "train_cab") or (program == "-m" and "cab_hf.cli" in sys.orig_argv)


if not _is_command():
    from cab_hf import deprecated
    from cab_hf.data import load_documents
    from cab_hf.distillation import (
        AttentionBridge,
        DistillationModel,
        DistillationTrainer,
        DistillationTrainingArguments,
    )
    from cab_hf.models import (
        CABHybridConfig,
        CABHybridForCausalLM,
        CABHybridForSequenceClassification,
        CABHybridModel,
        CABMambaConfig,
        CABMambaForCausalLM,
        CABMambaForSequenceClassification,
        CABMambaModel,
        CABVisionMambaConfig,
        CABVisionMambaForImageClassification,
        CABVisionMambaModel,
    )
    from cab_hf.teachers import RecordedTeacher, Teacher, record_teacher
    from cab_hf.transfer import fit_output_projection, student_from_teacher

    del deprecated
else:

    def __getattr__(name: str) -> object:
        """A name of the package, for a script that is called as the command is."""
        for room in ("data", "models", "teachers", "transfer", "distillation") if name in __all__ else ():
            module = importlib.import_module(f"cab_hf.{room}")
            if hasattr(module, name):
                return getattr(module, name)
        raise AttributeError(f"module 'cab_hf' has no attribute {name!r}")


__version__ = "0.1.0"

__all__ = [
    "AttentionBridge",
    "CABHybridConfig",
    "CABHybridForCausalLM",
    "CABHybridForSequenceClassification",
    "CABHybridModel",
    "CABMambaConfig",
    "CABMambaForCausalLM",
    "CABMambaForSequenceClassification",
    "CABMambaModel",
    "CABVisionMambaConfig",
    "CABVisionMambaForImageClassification",
    "CABVisionMambaModel",
    "DistillationModel",
    "DistillationTrainer",
    "DistillationTrainingArguments",
    "RecordedTeacher",
    "Teacher",
    "__version__",
    "fit_output_projection",
    "load_documents",
    "record_teacher",
    "student_from_teacher",
]
