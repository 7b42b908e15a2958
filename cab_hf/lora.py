"""LoRA for students: which modules an adapter of PEFT can be put on, and the card that an adapter is published with.

PEFT picks targets by `model_type` and knows none of ours, so [`lora_config`] does.

Targets can be linear layers, embeddings and the patch embedding. Norms can't: they are no matrices. Neither can the
convolution: it is called with more than its input, and what it returns is activated. `modules_to_save` trains both
whole.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel


if TYPE_CHECKING:
    from peft import LoraConfig


_PROJECTIONS = ["in_proj", "x_proj", "dt_proj", "out_proj", "gate_proj", "up_proj", "down_proj"]

LORA_TARGETS: dict[str, list[str]] = {
    "cab_mamba": [*_PROJECTIONS],
    "cab_hybrid": [*_PROJECTIONS, "q_proj", "k_proj", "v_proj", "o_proj"],
    "cab_vision_mamba": [*_PROJECTIONS],
}
"""Default targets of each `model_type`: the projections of S6 and SSD mixers, of both directions, and of MLPs; of a
hybrid those of kept attention, too, by their usual names.

Targets on request: `embeddings` and `lm_head` where they are not tied, `position_embeddings` of language students, and
`patch_embedding` and `classifier` of image students. The head of a classifier is trained whole by default.
"""

_TASKS = {
    "CABMambaForCausalLM": "CAUSAL_LM",
    "CABMambaForSequenceClassification": "SEQ_CLS",
    "CABMambaModel": "FEATURE_EXTRACTION",
    "CABHybridForCausalLM": "CAUSAL_LM",
    "CABHybridForSequenceClassification": "SEQ_CLS",
    "CABHybridModel": "FEATURE_EXTRACTION",
}
_TIED = ("embeddings", "lm_head")


def lora_config(
    student: PreTrainedModel,
    r: int = 8,
    *,
    target_modules: Sequence[str] | str | None = None,
    modules_to_save: Sequence[str] | None = None,
    **kwargs: Any,
) -> "LoraConfig":
    """A `peft.LoraConfig` for a student, of targets that really take part in its forward pass.

    Args:
        student: a student of this package; not changed.
        r: rank of the update of each target.
        target_modules: names or, as one string, a regular expression over whole names, or "all-linear"; by default
            those of `LORA_TARGETS` that the student has.
        modules_to_save: modules trained and saved whole; by default an image student's `classifier`, unless it is a
            target. To these PEFT always adds the `score` of a sequence classifier.
        kwargs: other fields of `peft.LoraConfig`. `task_type` follows from the student's class.

    Raises:
        ImportError: without the package peft.
        ValueError: for a model that is no student, for targets that it does not have or that can't be adapted, and
            for `target_parameters`.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("LoRA needs the package peft: pip install 'cab-hf[peft]'.") from error
    model_type = student.config.model_type
    if model_type not in LORA_TARGETS:
        raise ValueError(
            f"`student` is a {model_type!r} model; known are {sorted(LORA_TARGETS)}. Make a `peft.LoraConfig` itself "
            "for other models, and pass a student without adapters."
        )
    if kwargs.get("target_parameters"):
        raise ValueError(
            f"`target_parameters` is {kwargs['target_parameters']}: PEFT would wrap the mixers that own these, and "
            f"hide their attention maps. Name modules by `target_modules`, such as {LORA_TARGETS[model_type]}."
        )
    modules = {name: module for name, module in student.named_modules() if name}
    if target_modules is None:
        names = [name for name in LORA_TARGETS[model_type] if _matching(modules, [name])]
    else:
        names = target_modules if isinstance(target_modules, str) else list(target_modules)
        _check_targets(student, modules, names)
    classes = [base.__name__ for base in type(student).__mro__]
    kwargs.setdefault("task_type", next((_TASKS[name] for name in classes if name in _TASKS), None))
    if modules_to_save is None and isinstance(modules.get("classifier"), nn.Linear):
        if names == "all-linear":
            kwargs.setdefault("exclude_modules", ["classifier"])
        modules_to_save = [] if "classifier" in _matching(modules, names) else ["classifier"]
    return LoraConfig(r=r, target_modules=names, modules_to_save=list(modules_to_save or []) or None, **kwargs)


def _matching(modules: Iterable[str], targets: Sequence[str] | str) -> list[str]:
    """The names that PEFT would take for targets."""
    if isinstance(targets, str):
        return [name for name in modules if re.fullmatch(targets, name)]
    return [name for name in modules if any(name == one or name.endswith(f".{one}") for one in targets)]


def _check_targets(student: PreTrainedModel, modules: Mapping[str, nn.Module], names: list[str] | str) -> None:
    if names == "all-linear":
        return
    defaults = LORA_TARGETS[student.config.model_type]
    for one in [names] if isinstance(names, str) else names:
        found = _matching(modules, names if isinstance(names, str) else [one])
        if not found:
            parameters = [name for name, _ in student.named_parameters() if name.rpartition(".")[2] == one]
            reason = "is a parameter, not a module" if parameters else "is no module of the student"
            raise ValueError(f"`target_modules`: {one!r} {reason}. The default targets are {defaults}.")
        for name in found:
            module, last = modules[name], name.rpartition(".")[2]
            if not isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
                raise ValueError(
                    f"`target_modules` names {name!r}, a {type(module).__name__}, which is no linear layer, so a "
                    "change of low rank there would not be what the student computes. Leave it out (convolutions and "
                    f"norms can be trained whole by `modules_to_save`); the default targets are {defaults}."
                )
            if name == "score":
                raise ValueError(
                    "`target_modules` names 'score', which PEFT trains whole in every sequence classifier. Leave it "
                    f"out; the default targets are {defaults}."
                )
            if last in _TIED and student.config.tie_word_embeddings and student.get_output_embeddings() is not None:
                raise ValueError(
                    f"`target_modules` names {name!r}, but `tie_word_embeddings` is True: the embeddings and the head "
                    f"are one weight, and an adapter on one of them would be merged into both. Leave it out; the "
                    f"default targets are {defaults}."
                )


def core_of(model: nn.Module) -> PreTrainedModel:
    """The model without `torch.compile` and an adapter of PEFT around it, whose signatures hide what it takes."""
    model = getattr(model, "_orig_mod", model)
    return model if isinstance(model, PreTrainedModel) else model.get_base_model()
