"""Checkpoints of a distillation: which one is whole, and how its student is loaded."""

import json
import re
from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, logging

from cab_hf.files import open_weights, weight_files


logger = logging.get_logger(__name__)

TRAINER_STATE_NAME = "trainer_state.json"
PREFIX = "student."


def checkpoints(folder: str | Path) -> dict[Path, int]:
    """The checkpoints of a run, whole or not, with their steps, in the order of these."""
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    found = {path: pattern.fullmatch(path.name) for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    steps = {path: int(match[1]) for path, match in found.items() if match}
    return dict(sorted(steps.items(), key=itemgetter(1)))


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint of a run that was written to its end, or None.

    The trainer's state is a checkpoint's last file: a run killed while saving leaves it out, or unreadable.
    """
    for path in reversed(checkpoints(folder)):
        try:
            json.loads((path / TRAINER_STATE_NAME).read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            logger.warning(f"{path} is incomplete (killed while saving?) and is left out.")
            continue
        return str(path)
    return None


def load_student(student: nn.Module, folder: Path) -> None:
    """Loads weights that `save_pretrained` wrote into a student that already exists.

    Raises:
        ValueError: the folder lacks weights of the student, or holds others; nothing is loaded then.
    """
    saved = _saved_shapes(student, folder)
    _check_equal(saved, _own_shapes(student, student.state_dict(), saved), folder)
    if not isinstance(student, PreTrainedModel):
        student.load_adapter(str(folder), student.active_adapter, is_trainable=True)
        return
    for shard in weight_files(folder):
        student.load_state_dict(load_file(shard), strict=False)


def check_written_by(model: nn.Module, folder: Path, rest: dict[str, Tensor]) -> None:
    """That a checkpoint's weights are those of this [`DistillationModel`], by their names and shapes.

    Args:
        model: what would be filled.
        folder: the checkpoint.
        rest: its weights that are not the student's.

    Raises:
        ValueError: another student or bridge wrote it.
    """
    state = model.state_dict()
    saved = _saved_shapes(model.student, folder)
    of_student = {name.removeprefix(PREFIX): one for name, one in state.items() if name.startswith(PREFIX)}
    own = _own_shapes(model.student, of_student, saved)
    own |= {name: shape for name, shape in _shapes(state).items() if not name.startswith(PREFIX)}
    _check_equal(saved | _shapes(rest), own, folder)


def _own_shapes(
    student: nn.Module, state_dict: dict[str, Tensor], saved: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Of what a student saves, in the names that it saves them by."""
    if isinstance(student, PreTrainedModel):
        return _shapes(_once(student, state_dict))
    from peft import get_peft_model_state_dict

    own = get_peft_model_state_dict(student, adapter_name=student.active_adapter, save_embedding_layers=False)
    # Whole embeddings are saved by rules of PEFT's own, which may ask the Hub.
    return _shapes(own | {name: tensor for name, tensor in student.state_dict().items() if name in saved})


def _check_equal(saved: Mapping[str, tuple], own: Mapping[str, tuple], folder: Path) -> None:
    differing = [
        f"{name} is {saved.get(name, 'missing')} there and {own.get(name, 'missing')} here"
        for name in own | saved
        if own.get(name) != saved.get(name)
    ]
    if differing:
        raise ValueError(
            f"{folder} was written by another student or bridge, or is not whole. {len(differing)} weights differ, "
            f"such as: {'; '.join(differing[:3])}. Resume with the options that it was written with, or start anew: "
            "without `resume_from_checkpoint`, and in another `output_dir`."
        )


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _saved_shapes(student: nn.Module, folder: Path) -> dict[str, tuple[int, ...]]:
    """Of the student's weights in a folder; none where it holds those of an adapter instead, or of a whole model."""
    is_whole = isinstance(student, PreTrainedModel)
    shapes = {}
    for path in weight_files(folder) if is_whole else [folder / ADAPTER_SAFE_WEIGHTS_NAME]:
        if path.is_file():
            tensors = open_weights(path)
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
    return shapes


@torch.no_grad()
def fill_everywhere(student: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Gives the student of every process the weights that the first process holds in `state_dict`."""
    student.load_state_dict(state_dict, strict=False)
    broadcast([*student.parameters(), *student.buffers()])


def student_weights(student: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The student's part of what was gathered of a distillation: a tied weight is there once."""
    of_student = {name.removeprefix(PREFIX): tensor for name, tensor in state_dict.items() if name.startswith(PREFIX)}
    return _once(student, of_student)


def _once(student: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    once = {name for name, _ in student.named_parameters()}
    repeated = {name for name, _ in student.named_parameters(remove_duplicate=False)} - once
    return {name: tensor for name, tensor in state_dict.items() if name not in repeated}


__all__ = [
    "check_written_by",
    "checkpoints",
    "fill_everywhere",
    "last_whole_checkpoint",
    "load_student",
    "student_weights",
]
