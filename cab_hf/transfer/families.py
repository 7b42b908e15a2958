"""Where each family of Transformers keeps its weights, and what student its config asks for.

A family is one `Family`: the student's config fields, the paths of embeddings, positions, layers and final norm inside
the base model, and a function that reads one layer. Matrices are `(out, in)`, whatever the teacher stores.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedConfig


class Affine(NamedTuple):
    """`x @ weight.T + bias`: weight `(out, in)`, bias `(out,)` or None."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class TeacherLayer:
    """The weights of one Transformer layer.

    Attributes:
        norm, mlp_norm: norms before attention and MLP; `mlp_norm` is None where one norm feeds both.
        post_norm, post_mlp_norm: norms behind them, or None.
        query, key, value: from the normed hidden states to heads x head_dim.
        output: from heads x head_dim to the residual stream.
        scaling: factor of `query @ key.T`.
        gate, up, down: the MLP; `gate` is None where it has no gate.
    """

    norm: nn.Module | Affine
    mlp_norm: nn.Module | Affine | None
    query: Affine
    key: Affine
    value: Affine
    output: Affine
    scaling: float
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
    layers: str
    final_norm: str
    positions: str | None = None
    read_norm: Callable[[nn.Module], nn.Module | Affine] = lambda norm: norm


def _linear(module: nn.Linear) -> Affine:
    return Affine(module.weight, module.bias)


def _conv1d(module: nn.Module) -> Affine:
    """Of transformers' `Conv1D`, which stores `(in, out)`."""
    return Affine(module.weight.T, module.bias)


def _rows(affine: Affine, rows: slice) -> Affine:
    return Affine(affine.weight[rows], None if affine.bias is None else affine.bias[rows])


def _scaled_heads(affine: Affine, scale: Tensor) -> Affine:
    """Every head's rows times `scale` `(head_dim,)`."""
    scale = scale.repeat(affine.weight.shape[0] // len(scale))
    return Affine(affine.weight * scale[:, None], None if affine.bias is None else affine.bias * scale)


def _split(fused: nn.Linear, *sizes: int) -> tuple[Affine, ...]:
    """The rows of one projection that holds several, in order."""
    biases = (None,) * len(sizes) if fused.bias is None else fused.bias.split(sizes)
    return tuple(map(Affine, fused.weight.split(sizes), biases))


def _projections(attention: nn.Module) -> dict[str, Any]:
    output = attention.o_proj if hasattr(attention, "o_proj") else attention.dense
    return {
        "query": _linear(attention.q_proj),
        "key": _linear(attention.k_proj),
        "value": _linear(attention.v_proj),
        "output": _linear(output),
        "scaling": attention.scaling,
    }


def _layer(
    block: nn.Module, attention: dict[str, Any], up: Affine, down: Affine, gate: Affine | None = None
) -> TeacherLayer:
    """Of a block whose norms have Llama's names; where MLP and attention share one, there is no second."""
    mlp_norm = getattr(block, "post_attention_layernorm", None)
    return TeacherLayer(norm=block.input_layernorm, mlp_norm=mlp_norm, **attention, gate=gate, up=up, down=down)


def _llama_fields(config: PreTrainedConfig) -> dict[str, Any]:
    values = config.to_dict()
    return {
        "intermediate_size": config.intermediate_size,
        "gated_mlp": True,
        "mlp_bias": values.get("mlp_bias", values.get("use_bias", False)),
        "hidden_act": config.hidden_act,
        "norm_type": "rms_norm",
        "layer_norm_epsilon": config.rms_norm_eps,
    }


def _llama_layer(block: nn.Module) -> TeacherLayer:
    mlp = block.mlp
    projections = _projections(block.self_attn)
    return _layer(block, projections, _linear(mlp.up_proj), _linear(mlp.down_proj), _linear(mlp.gate_proj))


def _arcee_fields(config: PreTrainedConfig) -> dict[str, Any]:
    return _llama_fields(config) | {"gated_mlp": False}


def _arcee_layer(block: nn.Module) -> TeacherLayer:
    return _layer(block, _projections(block.self_attn), _linear(block.mlp.up_proj), _linear(block.mlp.down_proj))


def _glm_layer(block: nn.Module, attention: dict[str, Any] | None = None) -> TeacherLayer:
    """As Llama's, with gate and up in one projection."""
    mlp = block.mlp
    gate, up = _split(mlp.gate_up_proj, *[mlp.down_proj.in_features] * 2)
    return _layer(block, attention or _projections(block.self_attn), up, _linear(mlp.down_proj), gate)


def _phi3_layer(block: nn.Module) -> TeacherLayer:
    """As GLM's, with query, key and value in one projection, too."""
    attention = block.self_attn
    fused, output = attention.qkv_proj, _linear(attention.o_proj)
    width = attention.o_proj.in_features
    query, key, value = _split(fused, width, *[(fused.out_features - width) // 2] * 2)
    projections = {"query": query, "key": key, "value": value, "output": output, "scaling": attention.scaling}
    return _glm_layer(block, projections)


def _olmo_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """As Llama's, with norms that have no weights. A student does not clip queries, keys and values (`clip_qkv`)."""
    return {
        "intermediate_size": config.intermediate_size,
        "gated_mlp": True,
        "hidden_act": config.hidden_act,
        "norm_type": "layer_norm",
        "layer_norm_epsilon": 1e-5,
    }


def _stablelm_fields(config: PreTrainedConfig) -> dict[str, Any]:
    if config.qk_layernorm:
        raise ValueError(
            "The teacher's qk_layernorm is True: its queries and keys are normalised per head, which a student's "
            "projections can't express. Use a StableLM with qk_layernorm=False, or build a student from a "
            "CABMambaConfig."
        )
    return {
        "intermediate_size": config.intermediate_size,
        "gated_mlp": True,
        "hidden_act": config.hidden_act,
        "norm_type": "layer_norm",
        "layer_norm_epsilon": config.layer_norm_eps,
        "parallel_residual": config.use_parallel_residual,
        "shared_norm": config.use_parallel_residual,
    }


def _starcoder2_fields(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "intermediate_size": config.intermediate_size,
        "gated_mlp": False,
        "mlp_bias": config.use_bias,
        "hidden_act": config.hidden_act,
        "norm_type": "layer_norm",
        "layer_norm_epsilon": config.norm_epsilon,
    }


def _starcoder2_layer(block: nn.Module) -> TeacherLayer:
    return _layer(block, _projections(block.self_attn), _linear(block.mlp.c_fc), _linear(block.mlp.c_proj))


def _qwen3_layer(block: nn.Module) -> TeacherLayer:
    """As Llama's, with the weights of the per-head query and key norms folded into the projections.

    The normalisation itself divides by each token's RMS, which no linear projection can do: the student starts with
    queries and keys of the right direction and the wrong length.
    """
    layer, attention = _llama_layer(block), block.self_attn
    query = _scaled_heads(layer.query, attention.q_norm.weight)
    return replace(layer, query=query, key=_scaled_heads(layer.key, attention.k_norm.weight))


def _gemma_norm(norm: nn.Module) -> Affine:
    """Gemma's norms multiply by one more than their weights."""
    return Affine(1.0 + norm.weight.float(), None)


def _gemma_fields(config: PreTrainedConfig) -> dict[str, Any]:
    return _llama_fields(config) | {"embedding_multiplier": config.hidden_size**0.5}


def _gemma_layer(block: nn.Module) -> TeacherLayer:
    layer = _llama_layer(block)
    return replace(layer, norm=_gemma_norm(layer.norm), mlp_norm=_gemma_norm(layer.mlp_norm))


def _gemma3_fields(config: PreTrainedConfig) -> dict[str, Any]:
    if config.final_logit_softcapping is not None:
        raise ValueError(
            f"The teacher's final_logit_softcapping is {config.final_logit_softcapping}, but a student's logits have "
            "no cap. Use a Gemma 3 without (all released ones), or build a student from a CABMambaConfig."
        )
    return {
        "intermediate_size": config.intermediate_size,
        "gated_mlp": True,
        "hidden_act": config.hidden_activation,
        "norm_type": "rms_norm",
        "layer_norm_epsilon": config.rms_norm_eps,
        "post_norms": True,
        "embedding_multiplier": config.hidden_size**0.5,
    }


def _gemma3_layer(block: nn.Module) -> TeacherLayer:
    """With the weights of the query and key norms folded into the projections, as of Qwen3."""
    layer, attention = _llama_layer(block), block.self_attn
    return replace(
        layer,
        norm=_gemma_norm(block.input_layernorm),
        mlp_norm=_gemma_norm(block.pre_feedforward_layernorm),
        post_norm=_gemma_norm(block.post_attention_layernorm),
        post_mlp_norm=_gemma_norm(block.post_feedforward_layernorm),
        query=_scaled_heads(layer.query, _gemma_norm(attention.q_norm).weight),
        key=_scaled_heads(layer.key, _gemma_norm(attention.k_norm).weight),
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
    fused = _conv1d(block.attn.c_attn)
    width = fused.weight.shape[1]
    query, key, value = (_rows(fused, slice(i * width, (i + 1) * width)) for i in range(3))
    return TeacherLayer(
        norm=block.ln_1,
        mlp_norm=block.ln_2,
        query=query,
        key=key,
        value=value,
        output=_conv1d(block.attn.c_proj),
        scaling=block.attn.scaling,
        gate=None,
        up=_conv1d(block.mlp.c_fc),
        down=_conv1d(block.mlp.c_proj),
    )


def _phi_fields(config: PreTrainedConfig) -> dict[str, Any]:
    if config.qk_layernorm:
        raise ValueError(
            "The teacher's qk_layernorm is True: its queries and keys are normalised per head with a shift, which a "
            "student's projections can't express. Use a Phi with qk_layernorm=False (all released ones), or build a "
            "student from a CABMambaConfig."
        )
    return {
        "intermediate_size": config.intermediate_size,
        "gated_mlp": False,
        "mlp_bias": True,
        "hidden_act": config.hidden_act,
        "norm_type": "layer_norm",
        "layer_norm_epsilon": config.layer_norm_eps,
        "parallel_residual": True,
        "shared_norm": True,
        "lm_head_bias": True,
    }


def _phi_layer(block: nn.Module) -> TeacherLayer:
    return _layer(block, _projections(block.self_attn), _linear(block.mlp.fc1), _linear(block.mlp.fc2))


def _gpt_neox_fields(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "intermediate_size": config.intermediate_size,
        "gated_mlp": False,
        "mlp_bias": True,
        "hidden_act": config.hidden_act,
        "norm_type": "layer_norm",
        "layer_norm_epsilon": config.layer_norm_eps,
        "parallel_residual": config.use_parallel_residual,
    }


def _gpt_neox_layer(block: nn.Module) -> TeacherLayer:
    attention, mlp = block.attention, block.mlp
    fused = _linear(attention.query_key_value)
    # Rows are ordered (head, one of query, key and value, head_dim).
    by_role = fused.weight.unflatten(0, (-1, 3, attention.head_size)).unbind(1)
    biases = (None,) * 3
    if fused.bias is not None:
        biases = [bias.flatten() for bias in fused.bias.unflatten(0, (-1, 3, attention.head_size)).unbind(1)]
    query, key, value = (Affine(weight.flatten(0, 1), bias) for weight, bias in zip(by_role, biases, strict=True))
    output, up, down = _linear(attention.dense), _linear(mlp.dense_h_to_4h), _linear(mlp.dense_4h_to_h)
    projections = {"query": query, "key": key, "value": value, "output": output, "scaling": attention.scaling}
    return _layer(block, projections, up, down)


_LLAMA = Family(_llama_fields, _llama_layer, layers="layers", final_norm="norm")

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "ministral", "ministral3", "qwen2", "smollm3"), _LLAMA),
    **dict.fromkeys(("ernie4_5", "exaone", "helium", "internlm3", "seed_oss"), _LLAMA),
    "arcee": Family(_arcee_fields, _arcee_layer, layers="layers", final_norm="norm"),
    "gemma": Family(_gemma_fields, _gemma_layer, layers="layers", final_norm="norm", read_norm=_gemma_norm),
    "gemma3_text": Family(_gemma3_fields, _gemma3_layer, layers="layers", final_norm="norm", read_norm=_gemma_norm),
    "glm": Family(_llama_fields, _glm_layer, layers="layers", final_norm="norm"),
    "olmo": Family(_olmo_fields, _llama_layer, layers="layers", final_norm="norm"),
    "phi3": Family(_llama_fields, _phi3_layer, layers="layers", final_norm="norm"),
    "stablelm": Family(_stablelm_fields, _llama_layer, layers="layers", final_norm="norm"),
    "starcoder2": Family(_starcoder2_fields, _starcoder2_layer, layers="layers", final_norm="norm"),
    "qwen3": Family(_llama_fields, _qwen3_layer, layers="layers", final_norm="norm"),
    "gpt2": Family(_gpt2_fields, _gpt2_layer, layers="h", final_norm="ln_f", positions="wpe"),
    "phi": Family(_phi_fields, _phi_layer, layers="layers", final_norm="final_layernorm"),
    "gpt_neox": Family(_gpt_neox_fields, _gpt_neox_layer, layers="layers", final_norm="final_layer_norm"),
}


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a teacher's config.

    Raises:
        ValueError: for a family without a table; the message lists the known ones.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"No table says where a teacher of model_type {config.model_type!r} keeps its weights; known are "
            f"{sorted(FAMILIES)}. Any teacher can teach a student that is built from a config: "
            "CABMambaForCausalLM(CABMambaConfig(vocab_size=..., hidden_size=..., num_hidden_layers=...))."
        )
    return FAMILIES[config.model_type]
