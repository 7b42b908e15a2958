"""Reads a saved student; whatever is wrong with it is said in one line."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from cab_hf.files import weight_files
from cab_hf.models import (
    CABHybridConfig,
    CABHybridForCausalLM,
    CABMambaConfig,
    CABMambaForCausalLM,
    CABVisionMambaConfig,
    CABVisionMambaForImageClassification,
)


def read_student(
    folder: str | Path,
) -> CABMambaForCausalLM | CABHybridForCausalLM | CABVisionMambaForImageClassification:
    """A saved student; whatever is wrong with it is said in one line.

    Args:
        folder: a folder, or a Hub id.

    Raises:
        ValueError: no model there, another kind of model or head, files that are damaged, or a config of a newer
            version.
    """
    config = read_config(str(folder))
    if not isinstance(config, CABMambaConfig | CABHybridConfig | CABVisionMambaConfig):
        raise ValueError(
            f"{folder} holds a {config.model_type!r} model and no student: name a folder with a 'cab_mamba', "
            "'cab_hybrid' or 'cab_vision_mamba' config, such as a recipe's output folder."
        )
    student_class = {
        "cab_vision_mamba": CABVisionMambaForImageClassification,
        "cab_hybrid": CABHybridForCausalLM,
    }.get(config.model_type, CABMambaForCausalLM)
    saved = (config.architectures or [student_class.__name__])[0]
    if saved != student_class.__name__:
        raise ValueError(
            f"{folder} holds a {saved}, but a {student_class.__name__} is needed here, whose head would start at "
            "random. Name the folder of the distilled student."
        )
    return load_whole(student_class, str(folder))


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a folder or Hub id, or None where it has none."""
    return _load_optional(AutoTokenizer, "tokenizer_config.json", str(folder))


def load_image_processor(folder: str | Path) -> Any:
    """The image processor of a folder or Hub id, or None where it has none."""
    return _load_optional(AutoImageProcessor, "preprocessor_config.json", str(folder))


def read_config(source: str) -> PreTrainedConfig:
    """The config of a folder or Hub id, its fields all known."""
    if Path(source).is_file():
        raise ValueError(f"{source} is a file. Name the folder of a saved model.")
    if (Path(source) / "adapter_config.json").is_file() and not (Path(source) / "config.json").is_file():
        raise ValueError(
            f"{source} holds an adapter, not a whole model. Load the student that it was trained on, put the adapter "
            "on it by `PeftModel.from_pretrained`, and save what its `merge_and_unload()` returns."
        )
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise ValueError(f"{source} holds no model: there is no config.json. Name the folder of a saved model.")
    try:
        values = json.loads(Path(cached_file(source, "config.json")).read_text(encoding="utf-8"))
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise ValueError(_why_not(source, error)) from error
    _check_fields(source, config, values)
    return config


def _check_fields(source: str, config: PreTrainedConfig, values: Mapping[str, Any]) -> None:
    """A field that this version does not know may change what the student computes."""
    if not isinstance(config, CABMambaConfig | CABVisionMambaConfig):
        return
    known = {*type(config)().to_dict(), "auto_map", "quantization_config", "torch_dtype", "_name_or_path"}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(
            f"The config of {source} has fields that this version of cab_hf does not know: {', '.join(unknown)}. It "
            "was saved by a newer one: upgrade cab_hf, or load it with trust_remote_code=True."
        )


def load_whole(model_class: Any, source: str, dtype: Any = "auto", **options: Any) -> PreTrainedModel:
    """A saved model, by its class or an Auto class, that lacks none of its weights."""
    if Path(source).is_dir():
        weight_files(Path(source))
    try:
        model, notes = model_class.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
    except SafetensorError as error:
        raise ValueError(
            f"The weights in {source} are damaged or incomplete ({error}): copy or download the folder again."
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(_why_not(source, error)) from error
    absent = sorted(notes["missing_keys"])
    if absent:
        raise ValueError(
            f"The weights in {source} lack {len(absent)} tensors, such as {absent[0]}: they are not those of its "
            "config. Save the model again, or copy the whole folder."
        )
    return model.eval()


def _load_optional(auto_class: Any, file: str, source: str) -> Any:
    found = cached_file(source, file, _raise_exceptions_for_missing_entries=False)
    return None if found is None else auto_class.from_pretrained(source)


def _why_not(source: str, error: Exception) -> str:
    reason = " ".join(str(error).split())
    if not Path(source).exists():
        return (
            f"There is no folder {source}, and the Hub gave no model of that name: {reason} Name a folder of a saved "
            "model, or connect once without HF_HUB_OFFLINE so that it is in the cache."
        )
    return f"{source} can't be loaded: {reason}"
