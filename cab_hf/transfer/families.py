"""Where each family of Transformers keeps its weights, and what student its config asks for.

A family is one `Family`: the student's config fields, the paths of embeddings, positions, layers and final norm inside
the base model, and a function that reads one layer's norms and MLP. Attention is read by asking it (`reading.py`).
Matrices are `(out, in)`, whatever the teacher stores.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D


class Affine(NamedTuple):
    """`x @ weight.T + bias`: weight `(out, in)`, bias `(out,)` or None."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class TeacherLayer:
    """The weights of one Transformer layer but its attention's.

    Attributes:
        norm, mlp_norm: norms before attention and MLP; `mlp_norm` is None where one norm feeds both.
        post_norm, post_mlp_norm: norms behind them, or None.
        gate, up, down: the MLP; `gate` is None where it has no gate.
    """

    norm: nn.Module | Affine
    mlp_norm: nn.Module | Affine | None
    gate: Affine | None
    up: Affine
    down: Affine
    post_norm: Affine | None = None
    post_mlp_norm: Affine | None = None


@dataclass(frozen=True)
class Family:
    """How to read a family of teachers.

    Attributes:
        student_fields: from the teacher's config to fields of the student's. Raises ValueError for what a student
            can't express.
        read_layer: from one layer's module to its weights.
        layers, final_norm: paths inside the base model.
        positions: path of the learned position embedding, or None.
        read_norm: from a norm's module to its weights.
    """

    student_fields: Callable[[PreTrainedConfig], dict[str, Any]]
    read_layer: Callable[[nn.Module], TeacherLayer]
    layers: str = "layers"
    final_norm: str = "norm"
    positions: str | None = None
    read_norm: Callable[[nn.Module], nn.Module | Affine] = lambda norm: norm


_KNOWN_CODES = ("Params4bit", "Int8Params")


def read_weight(module: nn.Module) -> Tensor:
    """The values that a linear layer, convolution or embedding computes with, `(out, ...)` whatever it stores.

    Raises:
        ValueError: codes of a quantised module, but those of bitsandbytes and torchao.
    """
    weight = getattr(module, "weight", None)
    if type(weight).__name__ in _KNOWN_CODES:
        import bitsandbytes
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        state = getattr(weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            # A pass on a CPU has packed 4-bit codes in an order that only the product can read.
            ones = torch.eye(module.in_features, dtype=torch.bfloat16, device=weight.device)
            return bitsandbytes.matmul_4bit(ones, weight, quant_state=state).T
        return dequantize_bnb_weight(weight, getattr(module, "state", None))
    if type(weight).__module__.startswith("torchao."):
        return weight.dequantize()
    refuse_codes(module)
    return weight.T if isinstance(module, Conv1D) else weight


def refuse_codes(module: nn.Module) -> None:
    """That what a module stores are its weights, or codes that `read_weight` knows.

    Raises:
        ValueError: other codes.
    """
    weight = getattr(module, "weight", None)
    if type(weight).__name__ in _KNOWN_CODES or type(weight).__module__.startswith("torchao."):
        return
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.element_size() == 1:
        kept = "no `weight`" if weight is None else f"a `weight` of {weight.dtype}"
        raise ValueError(
            f"A {type(module).__name__} of the teacher has {kept}: it is quantised (`quantization_config`), and a "
            "student can't start from codes. Load the teacher as it was before, or dequantised "
            "(`teacher.dequantize()`, or `dequantize=True` in its `quantization_config`), or pass copy_weights=False."
        )


def read_affine(module: nn.Module) -> Affine:
    """Weight, as [`read_weight`] has it, and bias."""
    return Affine(read_weight(module), module.bias)


def _split(fused: nn.Linear, *sizes: int) -> tuple[Affine, ...]:
    """The rows of one projection that holds several, in order."""
    weight, bias = read_affine(fused)
    biases = (None,) * len(sizes) if bias is None else bias.split(sizes)
    return tuple(map(Affine, weight.split(sizes), biases))


def _layer(block: nn.Module, up: Affine, down: Affine, gate: Affine | None = None) -> TeacherLayer:
    """Of a block whose norms have Llama's names; where MLP and attention share one, there is no second."""
    mlp_norm = getattr(block, "post_attention_layernorm", None)
    return TeacherLayer(norm=block.input_layernorm, mlp_norm=mlp_norm, gate=gate, up=up, down=down)


def _with_norms(layer: TeacherLayer, read_norm: Callable[[nn.Module], Affine]) -> TeacherLayer:
    return replace(layer, norm=read_norm(layer.norm), mlp_norm=read_norm(layer.mlp_norm))


def _fields(
    config: PreTrainedConfig,
    norm_type: str,
    epsilon: float,
    *,
    gated: bool,
    mlp_bias: bool = False,
    hidden_act: str | None = None,
) -> dict[str, Any]:
    """Fields of MLP and norms; the activation is the config's `hidden_act` when not given."""
    return {
        "intermediate_size": config.intermediate_size,
        "gated_mlp": gated,
        "mlp_bias": mlp_bias,
        "hidden_act": hidden_act or config.hidden_act,
        "norm_type": norm_type,
        "layer_norm_epsilon": epsilon,
    }


def _llama_fields(config: PreTrainedConfig) -> dict[str, Any]:
    values = config.to_dict()
    mlp_bias = values.get("mlp_bias", values.get("use_bias", False))
    return _fields(config, "rms_norm", config.rms_norm_eps, gated=True, mlp_bias=mlp_bias)


def _llama_layer(block: nn.Module) -> TeacherLayer:
    mlp = block.mlp
    return _layer(block, read_affine(mlp.up_proj), read_affine(mlp.down_proj), read_affine(mlp.gate_proj))


def _arcee_fields(config: PreTrainedConfig) -> dict[str, Any]:
    return _llama_fields(config) | {"gated_mlp": False}


def _arcee_layer(block: nn.Module) -> TeacherLayer:
    return _layer(block, read_affine(block.mlp.up_proj), read_affine(block.mlp.down_proj))


def _glm_layer(block: nn.Module) -> TeacherLayer:
    """As Llama's, with gate and up in one projection."""
    mlp = block.mlp
    gate, up = _split(mlp.gate_up_proj, *[mlp.down_proj.in_features] * 2)
    return _layer(block, up, read_affine(mlp.down_proj), gate)


def _olmo_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """A student does not clip queries, keys and values (`clip_qkv`)."""
    return _fields(config, "layer_norm", 1e-5, gated=True)


def _olmo_norm(norm: nn.Module) -> Affine:
    """OLMo's norms have no weights."""
    return Affine(torch.ones(norm.normalized_shape), None)


def _olmo_layer(block: nn.Module) -> TeacherLayer:
    return _with_norms(_llama_layer(block), _olmo_norm)


def _stablelm_fields(config: PreTrainedConfig) -> dict[str, Any]:
    parallel = config.use_parallel_residual
    return _fields(config, "layer_norm", config.layer_norm_eps, gated=True) | {
        "parallel_residual": parallel,
        "shared_norm": parallel,
    }


def _starcoder2_fields(config: PreTrainedConfig) -> dict[str, Any]:
    return _fields(config, "layer_norm", config.norm_epsilon, gated=False, mlp_bias=config.use_bias)


def _starcoder2_layer(block: nn.Module) -> TeacherLayer:
    return _layer(block, read_affine(block.mlp.c_fc), read_affine(block.mlp.c_proj))


def _gemma_norm(norm: nn.Module) -> Affine:
    """Gemma's norms multiply by one more than their weights."""
    return Affine(1.0 + norm.weight.float(), None)


def _gemma_fields(config: PreTrainedConfig) -> dict[str, Any]:
    return _llama_fields(config) | {"embedding_multiplier": config.hidden_size**0.5}


def _gemma_layer(block: nn.Module) -> TeacherLayer:
    return _with_norms(_llama_layer(block), _gemma_norm)


def _gemma3_fields(config: PreTrainedConfig) -> dict[str, Any]:
    if config.final_logit_softcapping is not None:
        raise ValueError(
            f"The teacher's final_logit_softcapping is {config.final_logit_softcapping}, but a student's logits have "
            "no cap. Use a Gemma 3 without (all released ones), or build a student from a CABMambaConfig."
        )
    fields = _fields(config, "rms_norm", config.rms_norm_eps, gated=True, hidden_act=config.hidden_activation)
    return fields | {"post_norms": True, "embedding_multiplier": config.hidden_size**0.5}


def _gemma3_layer(block: nn.Module) -> TeacherLayer:
    return replace(
        _llama_layer(block),
        norm=_gemma_norm(block.input_layernorm),
        mlp_norm=_gemma_norm(block.pre_feedforward_layernorm),
        post_norm=_gemma_norm(block.post_attention_layernorm),
        post_mlp_norm=_gemma_norm(block.post_feedforward_layernorm),
    )


def _gpt2_fields(config: PreTrainedConfig) -> dict[str, Any]:
    if config.add_cross_attention:
        raise ValueError(
            "The teacher's add_cross_attention is True, but a student has one sequence to read. Load a GPT-2 without "
            "cross-attention."
        )
    return {
        "intermediate_size": config.n_inner or 4 * config.hidden_size,
        "gated_mlp": False,
        "mlp_bias": True,
        "hidden_act": config.activation_function,
        "norm_type": "layer_norm",
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "max_position_embeddings": config.max_position_embeddings,
    }


def _gpt2_layer(block: nn.Module) -> TeacherLayer:
    up, down = read_affine(block.mlp.c_fc), read_affine(block.mlp.c_proj)
    return TeacherLayer(norm=block.ln_1, mlp_norm=block.ln_2, gate=None, up=up, down=down)


def _phi_fields(config: PreTrainedConfig) -> dict[str, Any]:
    return _fields(config, "layer_norm", config.layer_norm_eps, gated=False, mlp_bias=True) | {
        "parallel_residual": True,
        "shared_norm": True,
        "lm_head_bias": True,
    }


def _phi_layer(block: nn.Module) -> TeacherLayer:
    return _layer(block, read_affine(block.mlp.fc1), read_affine(block.mlp.fc2))


def _gpt_neox_fields(config: PreTrainedConfig) -> dict[str, Any]:
    fields = _fields(config, "layer_norm", config.layer_norm_eps, gated=False, mlp_bias=True)
    return fields | {"parallel_residual": config.use_parallel_residual}


def _gpt_neox_layer(block: nn.Module) -> TeacherLayer:
    return _layer(block, read_affine(block.mlp.dense_h_to_4h), read_affine(block.mlp.dense_4h_to_h))


_LLAMA = Family(_llama_fields, _llama_layer)

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "smollm3"), _LLAMA),
    **dict.fromkeys(("ernie4_5", "exaone", "helium", "internlm3", "seed_oss"), _LLAMA),
    "arcee": Family(_arcee_fields, _arcee_layer),
    "gemma": Family(_gemma_fields, _gemma_layer, read_norm=_gemma_norm),
    "gemma3_text": Family(_gemma3_fields, _gemma3_layer, read_norm=_gemma_norm),
    "glm": Family(_llama_fields, _glm_layer),
    "olmo": Family(_olmo_fields, _olmo_layer, read_norm=_olmo_norm),
    "phi3": Family(_llama_fields, _glm_layer),
    "stablelm": Family(_stablelm_fields, _llama_layer),
    "starcoder2": Family(_starcoder2_fields, _starcoder2_layer),
    "gpt2": Family(_gpt2_fields, _gpt2_layer, layers="h", final_norm="ln_f", positions="wpe"),
    "phi": Family(_phi_fields, _phi_layer, final_norm="final_layernorm"),
    "gpt_neox": Family(_gpt_neox_fields, _gpt_neox_layer, final_norm="final_layer_norm"),
}


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a teacher's config, of a composite one that of its language model.

    Raises:
        ValueError: for a family without a table; the message lists the known ones.
    """
    config = config.get_text_config()
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"No table says where a teacher of model_type {config.model_type!r} keeps its weights; known are "
            f"{sorted(FAMILIES)}. Any teacher can teach a student that is built from a config: "
            "CABMambaForCausalLM(CABMambaConfig(vocab_size=..., hidden_size=..., num_hidden_layers=...))."
        )
    return FAMILIES[config.model_type]
