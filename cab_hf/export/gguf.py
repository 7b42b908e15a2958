"""Students as GGUF files for llama.cpp, by way of their stock models. Needs the package gguf.

llama.cpp runs Mamba and Mamba-2 by these names, and a Bamba as `granitehybrid` with all multipliers one. Its layers
have no biases around the mixer: a student with `use_bias=True` whose biases are not zero can't be written.

Shapes: `h` head, `n` state, `g` group, `d` width.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cab_hf.export.loading import load_tokenizer, read_student
from cab_hf.export.stock import to_stock
from cab_hf.files import written_whole


try:
    import gguf
except ImportError as error:
    raise ImportError("GGUF files need gguf. Run `pip install cab-hf[export]`.") from error


_ARCHITECTURES = {"mamba": "mamba", "mamba2": "mamba2", "bamba": "granitehybrid"}
_NAMES = {
    "embeddings": "token_embd",
    "embed_tokens": "token_embd",
    "norm_f": "output_norm",
    "final_layernorm": "output_norm",
    "lm_head": "output",
    "norm": "attn_norm",
    "input_layernorm": "attn_norm",
    "pre_ff_layernorm": "ffn_norm",
    "in_proj": "ssm_in",
    "conv1d": "ssm_conv1d",
    "x_proj": "ssm_x",
    "dt_proj": "ssm_dt",
    "out_proj": "ssm_out",
    **{"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"},
    **{"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"},
}
_DIGITS = {"type": "Digits", "individual_digits": True}
_NO_BIAS = ("in_proj.bias", "out_proj.bias", "gate_proj.bias", "up_proj.bias", "down_proj.bias")


def export_gguf(folder: str | Path, out: str | Path, *, compact: bool = False) -> Path:
    """Writes a saved student as a GGUF file in float32, with its tokenizer.

    Args:
        folder: a saved student, or its Hub id.
        out: folder to write `model.gguf` into.
        compact: as in `cab_hf.export.stock.to_stock`.

    Returns:
        The file. Factors of a student with `conv_activation=None` are too small for float16 and integer formats:
        convert it to bfloat16 at most.

    Raises:
        FileExistsError: `out` holds a `model.gguf`.
        ValueError: no stock class or no architecture of llama.cpp has the student's shape, or its tokenizer is of a
            kind that this function does not write.
    """
    path = Path(out) / "model.gguf"
    if path.exists():
        raise FileExistsError(f"{path} exists already; name another folder, or remove it.")
    stock = to_stock(read_student(folder).float(), compact=compact)
    tokenizer = load_tokenizer(folder)
    kind, config = stock.config.model_type, stock.config
    tensors = _tensors(stock)
    vocabulary = {"tokenizer.ggml.model": "none"} if tokenizer is None else _vocabulary(tokenizer, config.vocab_size)

    writer = gguf.GGUFWriter(None, _ARCHITECTURES[kind])
    writer.add_name(Path(folder).name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(2**20)  # a recurrence has no limit, but the format wants a number
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    if kind == "bamba":
        _add_bamba(writer, config)
    else:
        writer.add_feed_forward_length(0)
        writer.add_head_count(0)
        writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
        _add_mixer(writer, config.conv_kernel, int(config.expand * config.hidden_size), config.state_size)
        writer.add_ssm_time_step_rank(config.time_step_rank if kind == "mamba" else config.num_heads)
        if kind == "mamba2":
            writer.add_ssm_group_count(config.n_groups)
    for name, value in vocabulary.items():
        add = {str: writer.add_string, int: writer.add_uint32, bool: writer.add_bool, list: writer.add_array}
        add[type(value)](name, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    with written_whole(path.parent) as unfinished:
        writer.write_header_to_file(unfinished / path.name)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def _add_bamba(writer: gguf.GGUFWriter, config: Any) -> None:
    attention = config.attn_layer_indices
    keys = [config.num_key_value_heads if layer in attention else 0 for layer in range(config.num_hidden_layers)]
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(keys)  # a layer without any is a mixer
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    for add in (writer.add_embedding_scale, writer.add_residual_scale, writer.add_logit_scale):
        add(1.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _add_mixer(writer, config.mamba_d_conv, config.mamba_expand * config.hidden_size, config.mamba_d_state)
    writer.add_ssm_time_step_rank(config.mamba_n_heads)
    writer.add_ssm_group_count(config.mamba_n_groups)


def _add_mixer(writer: gguf.GGUFWriter, kernel: int, width: int, states: int) -> None:
    writer.add_ssm_conv_kernel(kernel)
    writer.add_ssm_inner_size(width)
    writer.add_ssm_state_size(states)


def _tensors(stock: PreTrainedModel) -> dict[str, Tensor]:
    """GGUF's name and value of each tensor."""
    config = stock.config
    ssd = config.model_type != "mamba"
    groups = config.mamba_n_groups if config.model_type == "bamba" else config.n_groups if ssd else 1
    weights, found = dict(stock.state_dict()), {}
    biased = sorted({name.split(".")[-2] for name, t in weights.items() if name.endswith(_NO_BIAS) and t.any()})
    if biased:
        raise ValueError(
            f"llama.cpp has no place for the biases of {', '.join(biased)}, and the student's are not zero. Only "
            "students with use_bias=False and mlp_bias=False can be written, which a start with gate_init='fitted' or "
            "'usual' allows."
        )
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    for name, tensor in weights.items():
        if name.endswith(_NO_BIAS):
            continue
        *path, part, kind = name.split(".")
        place = f"blk.{path[2]}." if "layers" in path else ""
        if kind == "A_log":
            found[f"{place}ssm_a"] = _column(-tensor.exp(), ssd)
        elif kind == "D":
            found[f"{place}ssm_d"] = _column(tensor, ssd)
        elif kind == "dt_bias":
            found[f"{place}ssm_dt.bias"] = tensor
        elif part == "norm" and path[-1] in ("mixer", "mamba"):
            found[f"{place}ssm_norm.weight"] = tensor.unflatten(0, (groups, -1))  # (g, d / g)
        elif part == "conv1d" and kind == "weight":
            found[f"{place}ssm_conv1d.weight"] = tensor.squeeze(1)  # (d, k)
            # llama.cpp wants a bias
            found.setdefault(f"{place}ssm_conv1d.bias", torch.zeros(len(tensor)))
        else:
            found[f"{place}{_NAMES[part]}.{kind}"] = tensor
    return found


def _column(tensor: Tensor, ssd: bool) -> Tensor:
    """SSD's `(h,)` as `(h, 1)`; S6's as it is."""
    return tensor[:, None] if ssd else tensor


def _vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> dict[str, Any]:
    """Metadata of a byte-level BPE tokenizer that splits like GPT-2's, or digit by digit like SmolLM's."""
    parts = (
        json.loads(tokenizer.backend_tokenizer.to_str())
        if tokenizer.is_fast
        else {"model": {"type": "slow one"}, "normalizer": None}
    )
    splits = parts.get("pre_tokenizer") or {}
    splits = splits.get("pretokenizers", [splits])
    levels = [{name: value for name, value in split.items() if name != "trim_offsets"} for split in splits]
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    known = {"gpt-2": [bytes_], "smollm": [_DIGITS, bytes_]}
    pre = next((name for name, split in known.items() if split == levels), None)
    merges = parts["model"].get("merges") or []
    if not merges or parts["normalizer"] or pre is None:
        raise ValueError(
            f"The tokenizer is a {parts['model']['type']} with {len(merges)} merges and the pre-tokenizers "
            f"{[split.get('type') for split in splits]}; only byte-level BPE that splits like GPT-2's or SmolLM's is "
            "written. To write the weights alone, remove the tokenizer from a copy of the folder."
        )
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [int(gguf.TokenType.UNUSED)] * vocab_size
    added = {token["id"]: token["special"] for token in parts["added_tokens"]}
    for token, index in tokenizer.get_vocab().items():
        kind = gguf.TokenType.NORMAL
        if index in added:
            kind = gguf.TokenType.CONTROL if added[index] else gguf.TokenType.USER_DEFINED
        tokens[index], types[index] = token, int(kind)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    metadata = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "merges": merges}
    first = tokenizer("a")["input_ids"][0]
    metadata["add_bos_token"] = first == tokenizer.bos_token_id
    for name, index in (("bos", tokenizer.bos_token_id), ("eos", tokenizer.eos_token_id)):
        if index is not None:
            metadata[f"{name}_token_id"] = index
    return {f"tokenizer.ggml.{name}": value for name, value in metadata.items()}
