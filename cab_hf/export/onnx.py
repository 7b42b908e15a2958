"""Students as ONNX, for scoring: inputs to logits at once. No state goes in or out, so it is not for writing."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cab_hf.export.loading import read_student
from cab_hf.export.probe import probe_of, write_probe
from cab_hf.files import written_whole
from cab_hf.models import CABMambaForCausalLM, CABVisionMambaForImageClassification
from cab_hf.models.s6_scan import chunked_scan


class _Logits(torch.nn.Module):
    """A student as a function of one tensor."""

    def __init__(self, student: PreTrainedModel) -> None:
        super().__init__()
        self.student = student
        self.options = {"use_cache": False} if isinstance(student, CABMambaForCausalLM) else {}

    def forward(self, inputs: Tensor) -> Tensor:
        return self.student(**{self.student.main_input_name: inputs}, **self.options).logits


def to_program(student: PreTrainedModel, tokens: int = 128) -> torch.export.ExportedProgram:
    """The student's forward pass, inputs to logits, as `torch.export` traces it: any batch, one length.

    A language student is causal, so that shorter texts may be filled up on the right with any tokens: the logits in
    front of them do not change.

    Args:
        student: a language or image student on the CPU, whose scans run in torch.
        tokens: length of texts; an image student takes images of its `image_size`.

    Returns:
        The program of `input_ids` `(b, tokens)`, int64, or `pixel_values` `(b, c, height, width)`, in the student's
        dtype; its output are the logits.

    Raises:
        ValueError: a model that is no student, or no tokens.
    """
    config = student.config
    if isinstance(student, CABMambaForCausalLM):
        if tokens < 1:
            raise ValueError(f"tokens is {tokens}, but a text has at least 1.")
        example = torch.zeros(2, tokens, dtype=torch.long)
    elif isinstance(student, CABVisionMambaForImageClassification):
        example = torch.zeros(2, config.num_channels, *config.image_height_and_width, dtype=student.dtype)
    elif any(getattr(config, "windows", ())):
        raise ValueError(
            f"`attention_window` of this {type(student).__name__} is {max(config.windows)}, and no export has "
            "attention beside mixers. It loads by trust_remote_code=True."
        )
    else:
        raise ValueError(
            f"student is a {type(student).__name__}; give a pure student with its head. A hybrid's folder is exported "
            "as a stock model (--to stock) or for llama.cpp (--to gguf)."
        )
    batch = {"inputs": {0: torch.export.Dim("batch")}}
    with torch.no_grad():
        return torch.export.export(_Logits(student.eval()), (example,), dynamic_shapes=batch)


def export_onnx(folder: str | Path, out: str | Path, *, tokens: int = 128) -> Path:
    """Writes a saved student's forward pass as ONNX, in float32: `to_program`'s, for onnxruntime and its kin.

    S6's scan, which ONNX has no operator for, becomes a `Scan` over tokens.

    Args:
        folder: a saved student, or its Hub id.
        out: folder to write `model.onnx` into.
        tokens: length of texts.

    Returns:
        The file.

    Raises:
        FileExistsError: `out` holds a `model.onnx`.
        OSError: it can't be written.
        ImportError: onnx or onnxscript is missing.
        ValueError: the folder holds no student that can be read.
    """
    path = Path(out) / "model.onnx"
    if path.exists():
        raise FileExistsError(f"{path} exists already; name another folder, or remove it.")
    student = read_student(folder).float()
    program = to_program(student, tokens)
    try:
        from cab_hf.export.onnx_operators import selective_scan
    except ImportError as error:
        raise ImportError("ONNX needs onnx and onnxscript. Run `pip install cab-hf[export]`.") from error

    exported = torch.onnx.export(
        program,
        dynamo=True,
        input_names=[student.main_input_name],
        output_names=["logits"],
        custom_translation_table={chunked_scan._opoverload: selective_scan},
        verbose=False,
    )
    probe = probe_of(folder, student, longest=tokens) if isinstance(student, CABMambaForCausalLM) else None
    with written_whole(path.parent) as unfinished:
        exported.save(unfinished / path.name)
        if probe is not None:
            write_probe(unfinished, probe)
    return path
