"""Configuration of a hybrid: a Transformer of any family with state-space mixers where its attention stood."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from .configuration_cab_mamba import MixerConfig


_LEFT_OUT = ("auto_map", "quantization_config", "dtype", "torch_dtype", "_name_or_path", "transformers_version")
WINDOW_FIELDS = ("attention_window", "attention_sinks")
CALL_FIELDS = ("causal", "cache_layer", "argument", "returned", "output_size", "inexact", *WINDOW_FIELDS)


@strict
class CABHybridConfig(PreTrainedConfig):
    r"""
    Configuration of a [`CABHybridForCausalLM`] and its kin: the teacher's config, and what stands for its attention.

    A nested config never runs code: `auto_map` is dropped wherever it stands in it.

    Args:
        teacher (`dict`): `to_dict()` of the teacher's config, with its `architectures`. Its `model_type` must be one
            of transformers itself.
        mixer (`dict`): settings that all mixers share.
        mixers (`dict`): of each mixer the settings of its own, by the path of the attention module inside the model's
            body, in the order of their calls. Settings are fields of [`MixerConfig`] and

            - `causal` (`bool`): whether a token reads earlier ones only;
            - `cache_layer` (`int`): index of its layer in a cache;
            - `argument` (`str`, *optional*): keyword of its hidden states; None where they are the first argument;
            - `returned` (`int`): length of the tuple that it returns; 0 for a bare tensor;
            - `output_size` (`int`, *optional*): width of its output; None where the output projection stands outside;
            - `inexact` (`dict`, *optional*): relative errors of what was not read exactly, by projection;
            - `attention_window` (`int`, *optional*): tokens that the teacher's attention, beside the mixer, sees,
              itself among them; 0 or nothing: there is none;
            - `attention_sinks` (`int`, *optional*): first tokens that it sees, too.
        has_plain_head (`bool`, defaults to `False`): whether logits are the head of the last hidden state and no more.
        packs_documents (`bool`, defaults to `False`): whether documents whose positions restart are kept apart.
        tie_word_embeddings, pad_token_id, bos_token_id, eos_token_id: the teacher's when not given.

    Raises:
        ValueError: a teacher's model type that is none of transformers', or a mixer without sizes.

    Example:
        >>> CABHybridConfig(teacher={"model_type": "llama", "hidden_size": 64}).hidden_size
        64
    """

    model_type = "cab_hybrid"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    teacher: dict | None = None
    mixer: dict | None = None
    mixers: dict | None = None
    has_plain_head: bool = False
    packs_documents: bool = False

    tie_word_embeddings: bool | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        self.teacher = _without_code(self.teacher or {"model_type": "llama"})
        self.mixer, mixers = self.mixer or {}, self.mixers or {}
        self.mixers = {path: mixers[path] for path in sorted(mixers, key=self._place)}  # a JSON file sorts by letters
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(self.teacher.get("tie_word_embeddings", False))
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if getattr(self, name) is None:
                setattr(self, name, self.teacher.get(name))
        for name in ("id2label", "label2id"):
            if self.teacher.get(name) is not None and "num_labels" not in kwargs:
                kwargs.setdefault(name, self.teacher[name])
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of the `@strict` validation: that the teacher is known, and each mixer whole."""
        kind = self.teacher.get("model_type")
        if kind not in CONFIG_MAPPING or kind.startswith("cab_"):
            raise ValueError(
                f"`teacher` has the model type {kind!r}, which is none of this transformers'. Install the version "
                "that the student was saved with, or take a teacher of transformers itself."
            )
        for path in self.mixers:
            settings = self.settings(path)
            lacking = [name for name in ("hidden_size", "num_heads", "causal", "cache_layer") if name not in settings]
            if lacking:
                raise ValueError(f"`mixers` has no {', '.join(lacking)} for {path!r}: give it there or in `mixer`.")

    @property
    def teacher_config(self) -> PreTrainedConfig:
        """A fresh config of the teacher's class."""
        values = {**self.teacher, "tie_word_embeddings": self.tie_word_embeddings}
        return AutoConfig.for_model(values.pop("model_type"), **values)

    def get_text_config(self, *args, **kwargs) -> PreTrainedConfig:
        """The teacher's: caches are made after it."""
        return self.teacher_config.get_text_config(*args, **kwargs)

    @property
    def hidden_size(self) -> int:
        return self.get_text_config().hidden_size

    @property
    def vocab_size(self) -> int | None:
        return getattr(self.get_text_config(), "vocab_size", None)

    @property
    def max_position_embeddings(self) -> int | None:
        return getattr(self.get_text_config(), "max_position_embeddings", None)

    @property
    def depth(self) -> int:
        """All layers of the teacher."""
        return getattr(self.get_text_config(), "num_hidden_layers", len(self.mixers))

    @property
    def state_size(self) -> int:
        """Width of the widest B."""
        return max((self.mixer_config(path).state_size for path in self.mixers), default=0)

    @property
    def num_hidden_layers(self) -> int:
        """Mixers, which a distillation counts; kept attention is none."""
        return len(self.mixers)

    @property
    def layer_mixer_types(self) -> list[str]:
        """The mixer type of each mixer."""
        return [self.mixer_config(path).mixer_type for path in self.mixers]

    @property
    def mixer_widths(self) -> list[int]:
        """Channels inside each mixer."""
        return [self.mixer_config(path).mixer_width for path in self.mixers]

    @property
    def projection_sizes(self) -> list[int]:
        """Width of each mixer's B, and of its C."""
        return [size for path in self.mixers for size in self.mixer_config(path).projection_sizes]

    @property
    def windows(self) -> list[int]:
        """Tokens that attention beside each mixer sees; 0 where there is none."""
        return [self.settings(path).get("attention_window", 0) for path in self.mixers]

    @property
    def layer_numbers(self) -> list[int]:
        """The number of the layer that each mixer stands in, as its path has it."""
        return [
            next((int(part) for part in path.split(".") if part.isdigit()), index)
            for index, path in enumerate(self.mixers)
        ]

    @property
    def bidirectional(self) -> bool:
        return not all(self.settings(path)["causal"] for path in self.mixers)

    def _place(self, path: str) -> tuple:
        """By which mixers are in the order of their calls: their layer, and numbers in their path by value."""
        parts = [(part.isdigit(), int(part) if part.isdigit() else part) for part in path.split(".")]
        return self.mixers[path].get("cache_layer", 0), parts

    def settings(self, path: str) -> dict[str, Any]:
        """All settings of a mixer, shared ones and its own."""
        return {**self.mixer, **self.mixers[path]}

    def mixer_config(self, path: str) -> MixerConfig:
        """Sizes and start of a mixer."""
        fields = {name: value for name, value in self.settings(path).items() if name not in CALL_FIELDS}
        return MixerConfig(num_hidden_layers=1, **fields)


def _without_code(values: Any) -> Any:
    """A nested config without what could run code, and without what belongs to the outer one."""
    if isinstance(values, list):
        return [_without_code(value) for value in values]
    if isinstance(values, dict):
        return {name: _without_code(value) for name, value in values.items() if name not in _LEFT_OUT}
    return values


__all__ = ["CABHybridConfig"]
