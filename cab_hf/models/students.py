"""What all students have around their mixers: norms, MLPs, and how they start and save themselves."""

import shutil
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import PreTrainedModel

from .configuration_cab_mamba import MixerConfig
from .mixers import StateSpaceBranch


UNFILLED = "[More Information Needed]"
CARD_TEXT = """
A Mamba student of cab-hf. Load it with the Auto class of its config and `trust_remote_code=True`, or after
`import cab_hf`. This card says no more, because the model was pushed by itself: publish the folder of its run
(`--push_to_hub`), or write a card by `cab-hf card FOLDER`, to have what was measured.
"""
"""What `push_to_hub` of a model alone says of it."""


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
        up = self.up_proj(hidden_states)
        inner = self.act_fn(up) if self.gate_proj is None else self.act_fn(self.gate_proj(hidden_states)) * up
        return self.down_proj(inner)


class MixerPreTrainedModel(PreTrainedModel):
    """How every student of mixers starts, keeps its precision and saves itself."""

    base_model_prefix = "backbone"
    # Rounded to half precision, these move the transition by more than training does.
    _keep_in_fp32_modules_strict = ["A_log", "D", "dt_bias", "dt_proj"]
    _keep_in_fp32_modules = ["dt_proj"]  # the list that quantisers read, of modules
    supports_gradient_checkpointing = True
    _can_compile_fullgraph = True
    hub_classes: dict[str, str] = {}

    def save_pretrained(self, *args, **kwargs) -> None:
        """As in transformers; the checkpoint's config names all Auto classes, whichever model is saved."""
        if self._auto_class is not None:
            self.config.auto_map = dict(self.hub_classes)
        super().save_pretrained(*args, **kwargs)

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
        if not all(getattr(parameter, "_is_hf_initialized", False) for parameter in module.parameters()):
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
