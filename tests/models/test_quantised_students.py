"""Students whose Linear layers hold codes: what is computed in float stays so, in every place."""

import importlib.util

import pytest
import torch
from tiny_models import MIXER_TYPES
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    BitsAndBytesConfig,
    TorchAoConfig,
)
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from cab_hf.models import (
    CABMambaConfig,
    CABMambaForCausalLM,
    CABMambaForSequenceClassification,
    CABVisionMambaConfig,
    CABVisionMambaForImageClassification,
)


START = {"transition_init": "s4d", "initializer_range": 0.1, "num_hidden_layers": 2}


class CodedLinear(nn.Linear):
    """Stores codes of one byte, and computes in the dtype of its input, as quantisers do."""

    def forward(self, x):
        assert x.dtype in (torch.float32, torch.bfloat16), f"the input was cast to {x.dtype}"
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def coded(model, dtype):
    for module in model.modules():
        if type(module) is nn.Linear:
            scale = module.weight.detach().abs().amax(1, keepdim=True) / 120
            codes = (module.weight.detach() / scale).round().to(dtype)
            module.__class__, module.scale = CodedLinear, scale
            module.weight = nn.Parameter(codes, requires_grad=False)
    return model


def off(got, right):
    return float((got - right).norm() / right.norm())


def students(mixer_type, path):
    torch.manual_seed(0)
    # Sizes that bitsandbytes takes on a CPU: rows in blocks of 32.
    sizes = {"hidden_size": 128, "mixer_type": mixer_type, "head_dim": 8, "state_size": 32, "time_step_rank": 64}
    text = CABMambaConfig(vocab_size=64, tie_word_embeddings=False, pad_token_id=0, **sizes, **START)
    vision = CABVisionMambaConfig(image_size=8, patch_size=4, num_labels=32, **sizes, **START)
    for model in (
        CABMambaForCausalLM(text),
        CABMambaForSequenceClassification(text),
        CABVisionMambaForImageClassification(vision),
    ):
        folder = path / type(model).__name__
        model.eval().save_pretrained(folder)
        yield model, folder


IDS = torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("mixer_type", MIXER_TYPES)
def test_a_layers_codes_are_no_dtype_to_compute_in(mixer_type, dtype, tmp_path):
    for model, folder in students(mixer_type, tmp_path):
        inputs = PIXELS if model.main_input_name == "pixel_values" else IDS
        right = model(inputs, output_projections=True)
        got = coded(type(model).from_pretrained(folder).eval(), dtype)(inputs, output_projections=True)
        loose = 1 if dtype == torch.int8 else 5
        assert off(got.projections[0].time_step, right.projections[0].time_step) < 0.01 * loose
        assert off(got.logits, right.logits) < 0.05 * loose


@pytest.mark.parametrize("skip", [None, ["lm_head"]])
def test_quantisers_leave_the_time_steps_in_float(skip, tmp_path):
    for model, _ in students("mamba", tmp_path):
        # As every quantiser of transformers asks for the modules that it must not convert.
        kept = HfQuantizer.get_modules_to_not_convert(model, skip, model._keep_in_fp32_modules)
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        converted = [name for name in linear if should_convert_module(name, kept)]
        assert converted and not any("dt_proj" in name for name in converted)


@torch.no_grad()
@pytest.mark.parametrize("mixer_type", MIXER_TYPES)
def test_dynamic_int8(mixer_type, tmp_path):
    """A module whose `weight` is a method."""
    quantization = pytest.importorskip("torch.ao.quantization")
    model = next(model for model, _ in students(mixer_type, tmp_path))
    linear = [name for name, module in model.named_modules() if type(module) is nn.Linear and "dt_proj" not in name]
    got = quantization.quantize_dynamic(model, dict.fromkeys(linear, quantization.per_channel_dynamic_qconfig))
    right = model(IDS).logits
    assert off(got(IDS).logits, right) < 0.2
    cache = got(IDS[:, :8], use_cache=True).cache
    steps = [got(IDS[:, t : t + 1], cache=cache).logits for t in range(8, 12)]
    assert off(torch.cat(steps, dim=1), right[:, 8:]) < 0.2


@torch.no_grad()
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize(("bits", "most"), [(8, 0.02), (4, 0.2)])
@pytest.mark.parametrize("mixer_type", MIXER_TYPES)
def test_bitsandbytes(mixer_type, bits, most, tmp_path):
    options = {f"load_in_{bits}bit": True, "bnb_4bit_compute_dtype": torch.float32}
    for model, folder in students(mixer_type, tmp_path):
        reads_images = model.main_input_name == "pixel_values"
        inputs = PIXELS if reads_images else IDS
        right = model(inputs, output_projections=True)
        for skip in (None, ["dt_proj", "lm_head", "score", "classifier"]):
            config = BitsAndBytesConfig(**options, llm_int8_skip_modules=skip)
            got = type(model).from_pretrained(folder, quantization_config=config, device_map="cpu")(
                inputs, output_projections=True
            )
            assert off(got.projections[0].time_step, right.projections[0].time_step) < most


@torch.no_grad()
@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
@pytest.mark.parametrize("mixer_type", MIXER_TYPES)
def test_torchao(mixer_type, tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig

    for model, folder in students(mixer_type, tmp_path):
        if isinstance(model, CABMambaForSequenceClassification):
            continue
        reads_images = model.main_input_name == "pixel_values"
        auto = AutoModelForImageClassification if reads_images else AutoModelForCausalLM
        got = auto.from_pretrained(folder, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
        inputs = PIXELS if reads_images else IDS
        assert off(got(inputs).logits, model(inputs).logits) < 0.05
