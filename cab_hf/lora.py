"""LoRA for students: which modules an adapter of PEFT can be put on, and the card that an adapter is published with.

PEFT picks targets by `model_type` and knows none of ours, so [`lora_config`] does. Linear layers, embeddings and image
patches can be targets, since a student calls them. The convolution and the norms can't: the one is called with more
than its input and returns activated values, the others are no matrices. `modules_to_save` trains them whole.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from cab_hf.hub.card import describe_teacher, is_repo_id, write_card
from cab_hf.models.students import UNFILLED


if TYPE_CHECKING:
    from peft import LoraConfig


_PROJECTIONS = ["in_proj", "x_proj", "dt_proj", "out_proj", "gate_proj", "up_proj", "down_proj"]

LORA_TARGETS: dict[str, list[str]] = {"cab_mamba": [*_PROJECTIONS], "cab_vision_mamba": [*_PROJECTIONS]}
"""Default targets of each `model_type`: the projections of S6 and SSD mixers, of both directions, and of MLPs.

Targets on request: `embeddings` and `lm_head` where they are not tied, `position_embeddings` of language students, and
`patch_embedding` and `classifier` of image students. The head of a classifier is trained whole by default.
"""

_TASKS = {
    "CABMambaForCausalLM": "CAUSAL_LM",
    "CABMambaForSequenceClassification": "SEQ_CLS",
    "CABMambaModel": "FEATURE_EXTRACTION",
}
_TIED = ("embeddings", "lm_head")
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "FEATURE_EXTRACTION": "AutoModel",
    "CABMambaForCausalLM": "AutoModelForCausalLM",
    "CABMambaForSequenceClassification": "AutoModelForSequenceClassification",
    "CABMambaModel": "AutoModel",
    "CABVisionMambaForImageClassification": "AutoModelForImageClassification",
    "CABVisionMambaModel": "AutoModel",
}
_PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForImageClassification": "image-classification",
}


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


def adapter_card(
    folder: str | Path,
    *,
    base_model: str,
    license: str | None = None,
    datasets: Sequence[str] = (),
    language: str | Sequence[str] | None = None,
    training: Mapping[str, Any] | None = None,
    repo_id: str | None = None,
) -> ModelCard:
    """The card of a saved adapter: what it changes, how to load it, and under which licence. Nothing is made up.

    Args:
        folder: the adapter, as PEFT's `save_pretrained` or `DistillationTrainer.save_model` leaves it.
        base_model: Hub id of the student that the adapter was trained on, with exactly its weights.
        license: licence of the adapter; by default the one that the base model's card names.
        datasets: Hub ids of the training data.
        language: languages of the model, ISO 639-1; by default those of the base model's card.
        training: what to say about the training, one row each; None and "" are left out.
        repo_id: Hub id under which the adapter will be found, for the lines that load it.

    Raises:
        FileNotFoundError: `folder` holds no adapter.
        ValueError: it holds another kind of adapter, `base_model` is no Hub id, or the licence is unknown.
    """
    folder = Path(folder)
    config, shapes = _read_adapter(folder)
    if "/" not in base_model or not is_repo_id(base_model) or Path(base_model).exists():
        raise ValueError(
            f"`base_model` is {base_model!r}, which others can't load. Publish that student, and give its Hub id, \""
            'owner/name".'
        )
    source = {"license": None, "language": None} if license and language else describe_teacher(base_model)
    license = license or source["license"]
    if not license:
        raise ValueError(
            f"The licence of base model {base_model!r} is unknown (no card says it). Pass license, for instance "
            'license="apache-2.0".'
        )
    kind = config["task_type"] or (config.get("auto_mapping") or {}).get("base_model_class")
    if kind not in _AUTO_CLASSES:
        raise ValueError(
            f"{folder / 'adapter_config.json'} is for a {kind!r} model; known are {sorted(_AUTO_CLASSES)}. Make the "
            "adapter's config by `cab_hf.lora.lora_config`."
        )
    auto = _AUTO_CLASSES[kind]
    language = language or source["language"]
    data = ModelCardData(
        language=[language] if isinstance(language, str) else list(language or []) or None,
        license=license,
        library_name="peft",
        pipeline_tag=_PIPELINES.get(auto),
        base_model=base_model,
        base_model_relation="adapter",
        datasets=list(datasets) or None,
        tags=["lora", "mamba", "cab"],
    )
    name = (repo_id or folder.resolve().name).rsplit("/", 1)[-1]
    link = f"[{base_model}](https://huggingface.co/{base_model})"
    whole = {re.sub(r"^base_model\.model\.", "", name).rpartition(".")[0] for name in shapes if ".lora_" not in name}
    targets = config["target_modules"]
    targets = f"`{targets}`" if isinstance(targets, str) else ", ".join(f"`{one}`" for one in sorted(targets))
    rows = {
        "Rank": config["r"],
        "Alpha": config["lora_alpha"],
        "Targets": targets,
        "Trained whole": ", ".join(f"`{one}`" for one in sorted(whole)),
        "Numbers stored": f"{sum(map(math.prod, shapes.values())):,}",
        **(training or {}),
    }
    cells = {key: str(value).replace("|", "\\|") for key, value in rows.items() if value not in (None, "")}
    table = [f"| {key} | {value} |" for key, value in cells.items()]
    parts = [
        f"# {name}",
        f"A LoRA adapter for {link}, a Mamba student of cab-hf, which implements the "
        "[attention bridge (CAB)](https://arxiv.org/abs/2510.19266). It holds changes of that model's weights, and is "
        "of no use without it.",
        "\n".join(["| | |", "|---|---|", *table]),
        "## Use",
        f"```python\n{_loading_code(auto, shapes, base_model, repo_id)}\n```",
        "`model = model.merge_and_unload()` then adds the changes to the weights: a plain model, as fast as its base. "
        "After `import cab_hf`, `trust_remote_code` is not needed.",
        "## Limits",
        f"The adapter belongs to the weights of {link} and fits no others. It inherits that model's knowledge, biases "
        "and licence conditions.",
    ]
    text = "\n\n".join(parts)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def write_adapter_card(folder: str | Path, card: ModelCard, *, overwrite: bool = False) -> bool:
    """Makes a saved adapter ready for `publish_folder`: its card, and the Hub id of its base model in its config.

    PEFT itself writes a card of placeholders, which is replaced, and often the base model's local folder. It writes
    that folder again whenever the adapter is saved, so call this after the last save.

    Args:
        folder: the adapter.
        card: from [`adapter_card`].
        overwrite: replace a `README.md` without placeholders too.

    Returns:
        Whether the card was written.

    Raises:
        FileNotFoundError: `folder` holds no adapter.
        ValueError: it holds another kind of adapter.
    """
    folder = Path(folder)
    config, _ = _read_adapter(folder)
    path = folder / "README.md"
    is_unfilled = path.is_file() and UNFILLED in path.read_text(encoding="utf-8")
    config["base_model_name_or_path"] = card.data.base_model
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    return write_card(folder, card, overwrite=overwrite or is_unfilled)


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


def _read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The config of a LoRA adapter and the shapes of its tensors."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}. Save the adapter there first (save_pretrained).")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{folder / 'adapter_config.json'} is of `peft_type` {config.get('peft_type')!r}, expected 'LORA'. Make "
            "the adapter by `cab_hf.lora.lora_config`."
        )
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as tensors:
        return config, {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}


def _loading_code(auto: str, shapes: Mapping[str, tuple[int, ...]], base_model: str, repo_id: str | None) -> str:
    """Lines that load the adapter; a head that it holds decides how many labels the base model gets."""
    heads = [shape for name, shape in shapes.items() if re.search(r"\.(score|classifier)\.weight$", name)]
    labels = f", num_labels={heads[0][0]}, ignore_mismatched_sizes=True" if heads else ""
    place = json.dumps(repo_id or ".")
    return "\n".join(
        [
            "from peft import PeftModel",
            f"from transformers import {auto}",
            "",
            f"base = {auto}.from_pretrained({json.dumps(base_model)}, trust_remote_code=True{labels})",
            f"model = PeftModel.from_pretrained(base, {place})",
        ]
    )
