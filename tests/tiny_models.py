"""Tiny students for the tests, with weights far from their start so that errors show."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cab_hf.models import (
    CABMambaConfig,
    CABMambaForCausalLM,
    CABVisionMambaConfig,
    CABVisionMambaForImageClassification,
)


SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8, "transition_init": "s4d"}
MLP = {"intermediate_size": 24, "hidden_act": "gelu"}

VARIANTS = {
    "s6": {"mixer_type": "mamba"},
    "s6 untied, biases": {
        "mixer_type": "mamba",
        "use_bias": True,
        "use_conv_bias": False,
        "tie_word_embeddings": False,
        "lm_head_bias": True,
    },
    "s6 positions, plain mlp": {
        "mixer_type": "mamba",
        **MLP,
        "gated_mlp": False,
        "norm_type": "layer_norm",
        "max_position_embeddings": 40,
    },
    "ssd 1 group": {"mixer_type": "mamba2", "n_groups": 1, "conv_kernel": 2},
    "ssd 2 groups, gated mlp": {"mixer_type": "mamba2", "n_groups": 2, **MLP},
    "ssd 4 groups, linear conv": {
        "mixer_type": "mamba2",
        "n_groups": 4,
        "conv_activation": None,
        "use_bias": True,
        "time_step_limit": (0.3, 1.2),
        "residual_in_fp32": False,
    },
    "ssd turning states": {"mixer_type": "mamba2", "n_groups": 2, "rotary_frequencies": [0.9, 0.2]},
    "ssd parallel, own norms": {"mixer_type": "mamba2", **MLP, "mlp_bias": True, "parallel_residual": True},
    "ssd parallel, shared norm": {
        "mixer_type": "mamba2",
        **MLP,
        "parallel_residual": True,
        "shared_norm": True,
        "norm_type": "layer_norm",
        "max_position_embeddings": 40,
    },
    "ssd post norms, scaled embeddings": {
        "mixer_type": "mamba2",
        **MLP,
        "post_norms": True,
        "embedding_multiplier": 5.7,
    },
    "mixed": {"mixer_types": ["mamba2", "mamba"], "num_hidden_layers": 2},
}
MIXER_TYPES = ("mamba", "mamba2")

VISION_SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "state_size": 5,
    "image_size": (8, 12),
    "patch_size": 4,
    "num_labels": 7,
    "chunk_size": 4,
    "transition_init": "s4d",
}
VISION_VARIANTS = {
    "s6, middle": {},
    "s6, first, register, gated mlp": {
        "class_token": "first",
        "num_register_tokens": 1,
        "pooling": "class_token_and_registers",
        "intermediate_size": 24,
    },
    "ssd, first, layer scale, plain mlp": {
        "mixer_type": "mamba2",
        "n_groups": 2,
        "class_token": "first",
        "pooling": "class_token_and_mean",
        **MLP,
        "gated_mlp": False,
        "mlp_bias": True,
        "use_bias": True,
        "norm_type": "layer_norm",
        "layer_scale_init": 0.5,
    },
    "mixed, no class token": {"mixer_types": ["mamba2", "mamba"], "class_token": "none", "residual_in_fp32": False},
    "ssd, no positions": {"mixer_type": "mamba2", "use_absolute_positions": False, "layer_scale_init": 0.5},
    "s6, one direction, registers": {"bidirectional": False, "num_register_tokens": 2, "pooling": "mean"},
}


def tiny_config(**overrides) -> CABMambaConfig:
    return CABMambaConfig(**{**SIZES, "state_size": 6, "chunk_size": 4, **overrides})


def tiny_model(seed: int = 0, **overrides) -> CABMambaForCausalLM:
    """A model in eval mode with shaken weights."""
    torch.manual_seed(seed)
    return shake(CABMambaForCausalLM(tiny_config(**overrides)).eval(), seed)


def tiny_vision_config(**overrides) -> CABVisionMambaConfig:
    return CABVisionMambaConfig(**{**VISION_SIZES, **overrides})


def tiny_vision_model(seed: int = 0, **overrides) -> CABVisionMambaForImageClassification:
    """A bidirectional model in eval mode with shaken weights."""
    torch.manual_seed(seed)
    return shake(CABVisionMambaForImageClassification(tiny_vision_config(**overrides)).eval(), seed)


@torch.no_grad()
def shake(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Moves every parameter from its start: biases and D too, decays and time steps to where both matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if name.endswith(("A_log", "dt_bias", "dt_proj.bias")):
            parameter.copy_(0.5 * noise)
        else:
            parameter.add_(0.2 * noise)
    return model


def random_ids(*shape: int, seed: int = 0, vocab_size: int = 99) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def random_images(*shape: int, seed: int = 0) -> torch.Tensor:
    """`(b, c, h, w)`, standard normal; of the tiny vision model's size when only `b` is given."""
    shape = (*shape, 3, 8, 12) if len(shape) == 1 else shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a - b).detach().abs().max()) if a.numel() else 0.0


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of printable ASCII, so that each of its 99 tokens is text."""
    tokens = ["<eos>", *(chr(code) for code in range(33, 127)), "Ġ", "he", "Ġt", "Ġthe"]
    merges = [("h", "e"), ("Ġ", "t"), ("Ġt", "he")]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
