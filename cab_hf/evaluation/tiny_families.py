"""Tiny random models of any causal family of transformers, made from its config class alone.

A field of a config is set by its name, whatever the family; `_OF_FAMILY` holds what these values leave inconsistent.
"""

import copy
import inspect

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


LAYERS = 4
CAUSAL_FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
_BY_VALUE = {
    64: """attention_hidden_size cross_attention_hidden_size d_embed d_model decoder_hidden_size dim emb_dim
        embed_dim embedding_size encoder_hidden_size hidden_size hidden_size_per_layer_input input_embedding_size
        lru_width max_length max_source_positions model_dim n_embd n_embed output_embedding_size
        output_hidden_size projection_dim vocab_embed_dim word_embed_proj_dim""",
    4: """decoder_attention_heads decoder_layers encoder_attention_heads encoder_layers linear_num_value_heads
        mamba_dt_rank mamba_n_heads mamba_num_heads moe_num_experts n_head n_heads n_layer n_layers n_mamba_heads
        n_routed_experts num_attention_heads num_decoder_attention_heads num_decoder_layers
        num_encoder_attention_heads num_encoder_layers num_experts num_heads num_hidden_layers num_layers
        num_local_experts swa_num_attention_heads""",
    2: """attn_layer_period eos_token_id expert_layer_period full_attention_interval index_n_heads
        linear_num_key_heads mamba_expand moe_k moe_top_k moe_topk n_head_kv num_experts_per_tok
        num_experts_per_token num_global_key_value_heads num_key_value_heads num_kv_heads swa_num_key_value_heads
        top_k_experts zero_expert_num""",
    16: """attention_head_dim d_kv global_head_dim head_dim index_head_dim index_topk kv_channels kv_lora_rank
        linear_key_head_dim linear_value_head_dim o_lora_rank qk_head_dim swa_head_dim swa_v_head_dim v_head_dim""",
    96: """d_ff decoder_ffn_dim decoder_mlp_dim dense_intermediate_size dff dim_ff encoder_ffn_dim ffn_dim
        ffn_hidden_size intermediate_size intermediate_size_mlp n_inner shared_intermediate_size""",
    32: """expert_ffn_hidden_size expert_intermediate_size mamba_d_head mamba_head_dim mamba_headdim
        moe_ffn_hidden_size moe_intermediate_size moe_shared_expert_intermediate_size num_buckets
        shared_expert_intermediate_size""",
    128: """mamba_d_ssm max_position_embeddings max_seq_len max_target_positions n_ctx n_positions vocab_size
        vocab_size_per_layer_input""",
    1: """attn_layer_offset bos_token_id decoder_start_token_id expert_layer_offset first_k_dense_replace
        mamba_n_groups mamba_ngroups moe_num_shared_experts n_group n_groups n_shared_experts num_dense_layers
        num_random_blocks num_shared_experts topk_group""",
    24: "q_lora_rank",
    8: """attention_chunk_size attention_window block_size local_attention mamba_d_state qk_nope_head_dim
        qk_rope_head_dim rotary_dim sliding_window sliding_window_size ssm_state_size state_size swa_window_size
        window_size""",
    0: "pad_token_id",
    3: "sep_token_id",
    120: "image_token_id image_token_index",
    121: "video_token_id",
    122: "audio_token_id",
    123: "boi_token_id",
    124: "eoi_token_id",
    80: "max_bucket_distance",
}
_BY_NAME = {name: value for value, names in _BY_VALUE.items() for name in names.split()}
_STAYS_NONE = ("sliding_window", "q_lora_rank", "n_inner", "attention_chunk_size", "block_size")
_LAYER_LISTS = ("layer_types", "mlp_layer_types", "block_types", "layers_block_type")
_OF_FAMILY = {
    "bailing_hybrid": {
        "layer_group_size": 2,
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
        "linear_head_dim": 16,
    },
    "bamba": {"attn_layer_indices": [1, 3]},
    "bert-generation": {"is_decoder": True},
    "codegen": {"rotary_dim": 8},
    "dbrx": {"d_model": 64, "n_heads": 4, "n_layers": 4, "vocab_size": 128, "max_seq_len": 128},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon": {"num_kv_heads": 4, "new_decoder_architecture": False},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "laurel_rank": 8,
        "hidden_size_per_layer_input": 16,
    },
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 16,
    },
    "gemma4_unified_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
    },
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"]},
    "jamba": {"num_experts": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 32, "expand": 2, "n_groups": 1},
    "minimax": {"block_size": 8},
    "mpt": {"n_heads": 4, "max_seq_len": 128},
    "reformer": {
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [32, 32],
        "lsh_attn_chunk_length": 8,
        "local_attn_chunk_length": 8,
        "is_decoder": True,
    },
    "rwkv": {"hidden_size": 64, "attention_hidden_size": 64},
    "whisper": {"max_target_positions": 64, "max_source_positions": 32},
    "xlm": {"emb_dim": 64, "n_layers": 4, "n_heads": 4},
    "xlstm": {"num_heads": 4, "qk_dim_factor": 1.0, "v_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zamba": {
        "mamba_dt_rank": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "n_mamba_heads": 4,
        "mamba_headdim": 32,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "num_mem_blocks": 1,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_model(family: str, **fields: object) -> PreTrainedModel:
    """A causal model of 4 layers, width 64 and 128 tokens, with random weights that are large enough to show errors.

    Args:
        family: a `model_type` of transformers.
        **fields: of its config, to differ.

    Raises:
        ValueError, or what its code raises: no such config can be made.
    """
    torch.manual_seed(0)
    config = _tiny(CONFIG_MAPPING[family], family, **fields)
    config.architectures = config.architectures or []
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > 60e6:
        raise ValueError(f"{family!r} has {size / 1e6:.0f} million parameters when tiny, more than 60.")
    return _speaking(AutoModelForCausalLM.from_config(config).eval())


def tiny_tokens() -> Tensor:
    """`(2, 12)` token ids."""
    return torch.randint(4, 110, (2, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _speaking(model: PreTrainedModel) -> PreTrainedModel:
    """With weights such that every part changes the output."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
        elif parameter.ndim == 1 and parameter.is_floating_point():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def _tiny(config_class: type[PreTrainedConfig], family: str | None = None, **fields: object) -> PreTrainedConfig:
    names = {*inspect.signature(config_class.__init__).parameters, *getattr(config_class, "__dataclass_fields__", ())}
    try:
        default = config_class()
        names |= set(default.to_dict())
    except Exception:  # whatever a family's defaults raise: its fields are known all the same
        default = None
    values = _small(names, default)
    for alias, real in config_class.attribute_map.items():
        if real in values and alias != real:
            values.pop(alias, None)
    for name in ("rope_parameters", "rope_scaling"):
        rope = getattr(default, name, None)
        if isinstance(rope, dict) and rope:
            values[name] = _small_rope(copy.deepcopy(rope))
    for name, part in (config_class.sub_configs or {}).items():
        part = type(getattr(default, name, None)) if part is AutoConfig else part
        try:
            values[name] = _tiny(part)
        except Exception:  # a part that is not needed, or that its own default is right for
            continue
    if "qk_rope_head_dim" in names:
        values["head_dim"] = 8
        values |= {"num_key_value_heads": 4} if "num_key_value_heads" in values else {}
    own = getattr(config_class, "model_type", None)
    values |= _OF_FAMILY.get(own, {}) | _OF_FAMILY.get(family or own, {}) | fields
    return _with_layer_lists(config_class, values, names, default)


def _small(names: set[str], default: PreTrainedConfig | None) -> dict[str, object]:
    """Each field's small value, in the form that its default has: one number, or a list of them."""
    values: dict[str, object] = {}
    for name in names & _BY_NAME.keys():
        value = _BY_NAME[name]
        try:
            current = value if default is None else getattr(default, name, value)
        except Exception:  # a property that this default can't tell
            current = value
        if isinstance(current, list | tuple):
            if name.endswith("token_id"):
                values[name] = value
            elif any(part in name for part in ("head", "size", "dim", "window", "experts")):
                values[name] = [value] * (LAYERS if len(current) > 3 else len(current))
        elif not isinstance(current, str) and not (current is None and name in _STAYS_NONE):
            values[name] = value
    return values


def _small_rope(rope: dict) -> dict:
    for name, value in rope.items():
        if isinstance(value, dict):
            _small_rope(value)
        elif name == "mrope_section":
            rope[name] = [2, 3, 3]
        elif name in ("short_factor", "long_factor"):
            rope[name] = [1.0] * 8
    return rope


def _with_layer_lists(
    config_class: type[PreTrainedConfig], values: dict, names: set[str], default: PreTrainedConfig | None
) -> PreTrainedConfig:
    """The config; where its lists of layers don't fit the depth, with all kinds of them in turn."""
    try:
        return config_class(**values)
    except Exception:  # told by a second failure
        lists = {name: getattr(default, name, None) for name in _LAYER_LISTS if name in names and name not in values}
        kinds = {name: list(dict.fromkeys(given)) for name, given in lists.items() if given}
        lists = {name: [each[i % len(each)] for i in range(LAYERS)] for name, each in kinds.items()}
        return config_class(**values, **lists)
