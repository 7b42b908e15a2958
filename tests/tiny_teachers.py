"""Small teachers of any family."""

import copy

import torch
from transformers import AutoModelForCausalLM


IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99, **IDS}
GQA = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
PLAIN = {**SIZES, "intermediate_size": 48}
IMAGES = {"image_size": 8, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TOWER = {**IMAGES, "intermediate_size": 48}
TOWERS = {"vision_config": TOWER, "text_config": PLAIN, "num_labels": 3}


def make(config, implementation="sdpa", seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=implementation).eval()
    return scaled_up(model)


def scaled_up(model):
    """Weights far from tiny, and no bias or norm at its neutral value, so that a mistake shows."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.add_(noise * (0.15 if parameter.ndim > 1 else 0.3))
    return model


def batch(seed=0, length=7):
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(3, 99, (2, length), generator=generator)}


def left_padded(inputs):
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :3] = 0
    return inputs | {"attention_mask": mask}
