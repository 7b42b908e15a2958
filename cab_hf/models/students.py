"""What all students have around their mixers: norms, MLPs, and how they start and save themselves."""

import inspect
import json
import math
import shutil
from pathlib import Path

import torch
import transformers
from huggingface_hub import ModelCard
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, cached_file, logging

from .configuration_cab_mamba import MixerConfig
from .mixers import StateSpaceBranch, projected


logger = logging.get_logger(__name__)

PROBE_NAME = "probe.json"
UNFILLED = "[More Information Needed]"
CARD_TEXT = """
A Mamba student of cab-hf. Load it with the Auto class of its config and `trust_remote_code=True`, or after
`import cab_hf`. This card says no more, because the model was pushed by itself: publish the folder of its run
(`--push_to_hub`), or write a card by `cab-hf card FOLDER`, to have what was measured.
"""
"""What `push_to_hub` of a model alone says of it."""


def body_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part that reads the model's input and writes hidden states: the model itself where it has no head.

    `base_model` is another one in some: DINOv3's reads no pixels, BART's wraps the decoder, and a classifier on CLIP's
    vision tower has none.
    """
    for part in model.base_model.modules():
        if part is not model and isinstance(part, PreTrainedModel):
            if model.main_input_name in inspect.signature(part.forward).parameters:
                return part
    return model


def positions_from_documents(seq_idx: torch.Tensor) -> torch.Tensor:
    """Position ids `(b, t)` that restart at 0 wherever `seq_idx` `(b, t)` changes."""
    index = torch.arange(seq_idx.shape[-1], device=seq_idx.device).expand_as(seq_idx)
    starts = nn.functional.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
    return index - torch.where(starts, index, 0).cummax(dim=-1).values


def make_norm(config: MixerConfig) -> nn.Module:
    norm = nn.RMSNorm if config.norm_type == "rms_norm" else nn.LayerNorm
    return norm(config.hidden_size, eps=config.layer_norm_epsilon)


class CABMambaMLP(nn.Module):
    """`down(act(gate(x)) * up(x))`, or `down(act(up(x)))` where `config.gated_mlp` is False."""

    def __init__(self, config: MixerConfig):
        super().__init__()
        sizes = (config.hidden_size, config.intermediate_size)
        self.gate_proj = nn.Linear(*sizes, bias=config.mlp_bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(*sizes, bias=config.mlp_bias)
        self.down_proj = nn.Linear(*reversed(sizes), bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        inner = projected(hidden_states, self.up_proj)
        if self.gate_proj is None:
            return projected(self.act_fn(inner), self.down_proj)
        return projected(self.act_fn(projected(hidden_states, self.gate_proj)) * inner, self.down_proj)


class MixerPreTrainedModel(PreTrainedModel):
    """How every student of mixers starts, keeps its precision and saves itself."""

    base_model_prefix = "backbone"
    # Rounded to half precision, these move the transition by more than training does.
    _keep_in_fp32_modules_strict = ["A_log", "D", "dt_bias", "dt_proj", "rotary_frequencies"]
    _keep_in_fp32_modules = ["dt_proj"]  # the list that quantisers read, of modules
    supports_gradient_checkpointing = True
    _can_compile_fullgraph = True
    hub_classes: dict[str, str] = {}

    @property
    def mixer_list(self) -> list[nn.Module]:
        """The mixers, in the order of their calls."""
        return [block.mixer for block in self.base_model.layers]

    def read(self, **inputs) -> ModelOutput:
        """The forward pass without a head, as a distillation makes it."""
        return self.base_model(**inputs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, *args, **kwargs):
        """As in transformers. Under another version than the student was saved with, its probe is asked again."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        saved = model.config.transformers_version
        if saved is not None and saved.split(".")[:2] != transformers.__version__.split(".")[:2]:
            model._ask_again(str(pretrained_model_name_or_path), saved)
        return loaded

    def save_pretrained(self, save_directory: str | Path, *args, **kwargs) -> None:
        """As in transformers; the checkpoint's config names all Auto classes, whichever model is saved.

        Beside it stands what the model makes of a fixed input (`probe.json`), so that another version of transformers
        can be told by what it computes.
        """
        if self._auto_class is not None:
            self.config.auto_map = dict(self.hub_classes)
        super().save_pretrained(save_directory, *args, **kwargs)
        if not kwargs.get("is_main_process", True):
            return
        path = Path(save_directory) / PROBE_NAME
        is_whole = not any(parameter.is_meta or parameter.numel() == 0 for parameter in self.parameters())
        if is_whole and kwargs.get("state_dict") is None:
            probe = {"architecture": type(self).__name__, "outputs": self._probe()}
            path.write_text(json.dumps(probe), encoding="utf-8")
        else:  # these weights can't be asked here, and an older probe is of others
            path.unlink(missing_ok=True)

    @torch.no_grad()
    def _probe(self) -> list[float]:
        """The first numbers that a fixed input gives: of every token, or every class."""
        config = self.config
        if self.main_input_name == "pixel_values":
            shape = (1, config.num_channels, *config.image_height_and_width)
            pixels = torch.linspace(-1, 1, math.prod(shape), device=self.device).mul(100).sin()
            inputs = {"pixel_values": pixels.view(shape).to(self.dtype)}
        else:
            length = min(16, config.max_position_embeddings or 16)
            ids = (7919 * torch.arange(1, length + 1, device=self.device)) % config.vocab_size
            inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
        training = self.training
        try:
            outputs = self.eval()(**inputs, return_dict=True)
        finally:
            self.train(training)
        first = next(value for value in outputs.values() if isinstance(value, torch.Tensor))
        return first[..., :8].flatten().float().tolist()

    def _ask_again(self, source: str, saved: str) -> None:
        path = cached_file(source, PROBE_NAME, _raise_exceptions_for_missing_entries=False)
        probe = {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
        if probe.get("architecture") != type(self).__name__ or getattr(self, "hf_quantizer", None) is not None:
            return
        expected, found = (torch.tensor(numbers) for numbers in (probe["outputs"], self._probe()))
        difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
        message = (
            f"{source} was saved under transformers {saved}. Under {transformers.__version__} what it makes of its "
            f"probe differs by {difference:.1e} of the largest number."
        )
        if difference > (1e-3 if self.dtype == torch.float32 else 0.05):
            logger.warning(f"{message} That is more than rounding: install transformers {saved} where it matters.")
        else:
            logger.info(message)

    def _upload_modified_files(self, working_dir: str, *args, **kwargs):
        # push_to_hub comes here with a card of placeholders where the Hub has none yet.
        path, own = Path(working_dir) / "README.md", Path(self.name_or_path or working_dir) / "README.md"
        if UNFILLED in path.read_text(encoding="utf-8"):
            if own.is_file() and own != path:
                shutil.copyfile(own, path)
            else:
                card = ModelCard.load(path)
                card.text = CARD_TEXT
                card.save(path)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # transformers takes custom code to overwrite loaded weights and so passes over a mixer whose own parameters
        # are loaded, although those of its projections may be missing. This code overwrites nothing.
        if not all(getattr(one, "_is_hf_initialized", False) for one in module.state_dict(keep_vars=True).values()):
            super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, StateSpaceBranch):
            module.init_mixer_weights()


def cast(student: MixerPreTrainedModel, dtype: torch.dtype) -> None:
    """Casts a student's weights, except those that must stay float32, and notes the dtype in its config."""
    kept = student._keep_in_fp32_modules_strict
    for name, parameter in student.named_parameters():
        if not any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.to(dtype)
    student.config.dtype = dtype
