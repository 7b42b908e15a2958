"""The card that an adapter is published with."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from safetensors import safe_open

from cab_hf.checks import is_repo_id
from cab_hf.hub.card import write_card
from cab_hf.hub.card_sections import plain
from cab_hf.hub.sources import describe_teacher
from cab_hf.models.students import UNFILLED


_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "FEATURE_EXTRACTION": "AutoModel",
    "CABMambaForCausalLM": "AutoModelForCausalLM",
    "CABMambaForSequenceClassification": "AutoModelForSequenceClassification",
    "CABMambaModel": "AutoModel",
    "CABHybridForCausalLM": "AutoModelForCausalLM",
    "CABHybridForSequenceClassification": "AutoModelForSequenceClassification",
    "CABHybridModel": "AutoModel",
    "CABVisionMambaForImageClassification": "AutoModelForImageClassification",
    "CABVisionMambaModel": "AutoModel",
}
_PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForImageClassification": "image-classification",
}


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
    targets = (
        "`{}`".format(targets.replace("|", r"\|"))
        if isinstance(targets, str)
        else ", ".join(f"`{one}`" for one in sorted(targets))
    )
    rows = {
        "Rank": config["r"],
        "Alpha": config["lora_alpha"],
        "Targets": targets,
        "Trained whole": ", ".join(f"`{one}`" for one in sorted(whole)),
        "Numbers stored": f"{sum(map(math.prod, shapes.values())):,}",
        **{key: plain(value) for key, value in (training or {}).items() if value is not None},
    }
    table = [f"| {key} | {value} |" for key, value in rows.items() if value not in (None, "")]
    parts = [
        f"# {plain(name)}",
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
