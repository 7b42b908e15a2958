"""Loads a teacher with its tokenizer or image processor."""

from pathlib import Path

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cab_hf.inference import check_causal
from cab_hf.teachers.demo import demo_cache, fetch_smollm2, random_llama


def load_teacher(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, by Hub id, folder, or one of the built-in names.

    Raises:
        ValueError: a model of another kind, or one that reads the tokens that it should predict.
    """
    if name == "random-llama":
        return random_llama()
    source = teacher_source(name)
    config = AutoConfig.from_pretrained(source)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"`teacher` {name!r} is of the model type {config.model_type!r}, which is no language model. Name one, or "
            "an image student beside an image teacher."
        )
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    check_causal(model)
    return model, tokenizer


def teacher_source(name: str) -> str | Path:
    """Where transformers finds a teacher: the demo's is fetched first."""
    return fetch_smollm2(demo_cache()) if name == "smollm2-demo" else name


def load_any_teacher(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | BaseImageProcessor]:
    """A language model with its tokenizer, or an image model with its processor: whichever the name is of.

    Raises:
        FileNotFoundError: neither a folder nor the Hub has it.
    """
    if name == "random-llama":
        return load_teacher(name)
    try:
        config = AutoConfig.from_pretrained(teacher_source(name))
    except OSError as error:
        raise FileNotFoundError(
            f"The teacher {name!r} is no folder of a model (seen from {Path.cwd()}), and the Hub gave none of that "
            f"name: {str(error).splitlines()[0]} Name a folder or a Hub id, or pass the model itself."
        ) from error
    return load_image_teacher(name) if reads_images(config) else load_teacher(name)


def reads_images(config: PreTrainedConfig) -> bool:
    """Whether a teacher of this config reads images, and not texts."""
    heads = config.architectures or []
    return any("ForImageClassification" in head for head in heads) or (
        type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and hasattr(config, "patch_size")
    )


def load_image_teacher(name: str) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """An image model, with its classifier where it has one, and its processor."""
    config = AutoConfig.from_pretrained(name)
    is_classifier = any("ForImageClassification" in one for one in config.architectures or ())
    auto = AutoModelForImageClassification if is_classifier else AutoModel
    model = auto.from_pretrained(name, dtype="auto")
    if model.main_input_name != "pixel_values":
        raise ValueError(
            f"`teacher` {name!r} reads {model.main_input_name!r}, but `task` is 'image-classification'. Name an image "
            "model (of CLIP its vision model), or set `task: text-generation`."
        )
    return model, AutoImageProcessor.from_pretrained(name)
