"""Students as GGUF files for llama.cpp, by way of their stock models. Needs the package gguf.

llama.cpp runs Mamba and Mamba-2 by these names, and a GraniteMoeHybrid as `granitehybrid`. Its layers have no biases
around the mixer: a student with `use_bias=True` whose biases are not zero can't be written. Its mixers are twice as
wide as the model: those of the model's own width are written twice, the second time without an output.

Shapes: `h` head, `n` state, `g` group, `d` width.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cab_hf.export.loading import load_tokenizer, read_student
from cab_hf.export.probe import probe_of, write_probe
from cab_hf.export.stock import to_stock
from cab_hf.files import written_whole


try:
    import gguf
    from gguf.quants import quantize
except ImportError as error:
    raise ImportError("GGUF files need gguf. Run `pip install cab-hf[export]`.") from error


_ARCHITECTURES = {"mamba": "mamba", "mamba2": "mamba2", "granitemoehybrid": "granitehybrid"}
_NAMES = {
    "embeddings": "token_embd",
    "embed_tokens": "token_embd",
    "norm_f": "output_norm",
    "lm_head": "output",
    "norm": "attn_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "in_proj": "ssm_in",
    "conv1d": "ssm_conv1d",
    "x_proj": "ssm_x",
    "dt_proj": "ssm_dt",
    "out_proj": "ssm_out",
    "output_linear": "ffn_down",
    **{"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"},
}
KINDS = {
    "f32": (gguf.LlamaFileType.ALL_F32, gguf.GGMLQuantizationType.F32),
    "f16": (gguf.LlamaFileType.MOSTLY_F16, gguf.GGMLQuantizationType.F16),
    "q8_0": (gguf.LlamaFileType.MOSTLY_Q8_0, gguf.GGMLQuantizationType.Q8_0),
    "q4_0": (gguf.LlamaFileType.MOSTLY_Q4_0, gguf.GGMLQuantizationType.Q4_0),
}
TOLERANCES = {"q8_0": {"tolerance": 0.2}, "q4_0": {"tolerance": 1.0}}
"""What the check of a quantised file allows, in nats: SmolLM2's student lost 0.08 in 8 bits."""
_SMALL = ("ssm_conv1d.weight", "norm.weight")
WIDTHS = 2  # of llama.cpp's granitehybrid: its mixers' width over the model's
_DIGITS = {"type": "Digits", "individual_digits": True}
_NO_BIAS = ("in_proj.bias", "out_proj.bias")


def export_gguf(folder: str | Path, out: str | Path, *, compact: bool = False, kind: str = "f32") -> Path:
    """Writes a saved student as a GGUF file, with its tokenizer.

    Args:
        folder: a saved student, or its Hub id.
        out: folder to write `model.gguf` into.
        compact: as in `cab_hf.export.stock.to_stock`.
        kind: of the large matrices: "f32", "f16", "q8_0" or "q4_0". Norms, convolutions and transitions stay float32.

    Returns:
        The file.

    Raises:
        FileExistsError: `out` holds a `model.gguf`.
        ValueError: no stock class or no architecture of llama.cpp has the student's shape, or its tokenizer is of a
            kind that this function does not write.
    """
    path = Path(out) / "model.gguf"
    if path.exists():
        raise FileExistsError(f"{path} exists already; name another folder, or remove it.")
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}. It must be one of {', '.join(KINDS)}.")
    student = read_student(folder).float()
    stock = to_stock(student, compact=compact)
    model_type, config = stock.config.model_type, stock.config
    tensors = _tensors(stock)  # says no at once, if at all
    tokenizer, probe = load_tokenizer(folder), probe_of(folder, student)
    vocabulary = {"tokenizer.ggml.model": "none"} if tokenizer is None else _vocabulary(tokenizer, config.vocab_size)

    writer = gguf.GGUFWriter(None, _ARCHITECTURES[model_type])
    writer.add_name(Path(folder).name)
    writer.add_file_type(KINDS[kind][0])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(2**20)  # a recurrence has no limit, but the format wants a number
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    if model_type == "granitemoehybrid":
        _add_granite(writer, config)
    else:
        writer.add_feed_forward_length(0)
        writer.add_head_count(0)
        writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
        _add_mixer(writer, config.conv_kernel, int(config.expand * config.hidden_size), config.state_size)
        writer.add_ssm_time_step_rank(config.time_step_rank if model_type == "mamba" else config.num_heads)
        if model_type == "mamba2":
            writer.add_ssm_group_count(config.n_groups)
    for name, value in vocabulary.items():
        add = {str: writer.add_string, int: writer.add_uint32, bool: writer.add_bool, list: writer.add_array}
        add[type(value)](name, value)
    for name, tensor in tensors.items():
        add_tensor(writer, name, tensor.contiguous().numpy(), kind)
    with written_whole(path.parent) as unfinished:
        writer.write_header_to_file(unfinished / path.name)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        write_probe(unfinished, probe | TOLERANCES.get(kind, {}))
    return path


def add_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: str) -> None:
    """Adds a float32 tensor, in one of `KINDS` where it is a large matrix of rows that this kind can hold."""
    stored = KINDS[kind][1]
    is_large = name.endswith("weight") and values.ndim == 2 and not name.endswith(_SMALL)
    if is_large and stored.name != "F32" and not (stored.name.startswith("Q") and values.shape[1] % 32):
        writer.add_tensor(name, quantize(values, stored), raw_dtype=stored)
    else:
        writer.add_tensor(name, values)


def _add_granite(writer: gguf.GGUFWriter, config: Any) -> None:
    keys = [config.num_key_value_heads if kind == "full_attention" else 0 for kind in config.layer_types]
    writer.add_feed_forward_length(config.shared_intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(keys)  # a layer without any is a mixer
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"Kept attention has rope_type {rope['rope_type']!r}, which is written for 'default' alone. Export it as "
            "a stock model (--to stock), which transformers and vLLM run."
        )
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_logit_scale(config.logits_scaling)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _add_mixer(writer, config.mamba_d_conv, WIDTHS * config.hidden_size, config.mamba_d_state)
    writer.add_ssm_time_step_rank(config.mamba_n_heads * WIDTHS // config.mamba_expand)
    writer.add_ssm_group_count(config.mamba_n_groups)


def _widened(weights: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Mixers of the model's width with every head twice: the same function, as the copy's output is multiplied by 0.

    The norm behind a mixer takes the mean square of each group, which copies leave as it is.
    """
    heads, width = config.mamba_n_heads, config.hidden_size
    states = 2 * config.mamba_n_groups * config.mamba_d_state

    def twice(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (heads, -1)).repeat_interleave(2, dim=0).flatten(0, 1)

    found = dict(weights)
    for name, tensor in weights.items():
        if ".mamba." not in name:
            continue
        if ".in_proj." in name:
            gate, x, B_and_C, dt = tensor.split([width, width, states, heads])
            tensor = torch.cat((twice(gate), twice(x), B_and_C, twice(dt)))
        elif ".conv1d." in name:
            x, B_and_C = tensor.split([width, states])
            tensor = torch.cat((twice(x), B_and_C))
        elif name.endswith("out_proj.weight"):
            columns = tensor.T.unflatten(0, (heads, -1))
            tensor = torch.stack((columns, torch.zeros_like(columns)), dim=1).flatten(0, 2).T
        elif not name.endswith("out_proj.bias"):
            tensor = twice(tensor)
        found[name] = tensor
    return found


def _interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows `(h * p, ...)` in llama.cpp's order: it rotates neighbours, transformers the two halves of a head."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _add_mixer(writer: gguf.GGUFWriter, kernel: int, width: int, states: int) -> None:
    writer.add_ssm_conv_kernel(kernel)
    writer.add_ssm_inner_size(width)
    writer.add_ssm_state_size(states)


def _tensors(stock: PreTrainedModel) -> dict[str, Tensor]:
    """GGUF's name and value of each tensor."""
    config = stock.config
    ssd = config.model_type != "mamba"
    is_granite = config.model_type == "granitemoehybrid"
    groups = config.mamba_n_groups if is_granite else config.n_groups if ssd else 1
    weights, found = dict(stock.state_dict()), {}
    if is_granite and config.mamba_expand == 1:
        weights = _widened(weights, config)
    elif is_granite and config.mamba_expand != WIDTHS:
        raise ValueError(
            f"The student's mixers are {config.mamba_expand} times as wide as the model; llama.cpp's granitehybrid "
            f"runs {WIDTHS} times, and 1 time by writing every head twice. Use expand=1 or 2."
        )
    biased = sorted({name.split(".")[-2] for name, t in weights.items() if name.endswith(_NO_BIAS) and t.any()})
    if biased:
        raise ValueError(
            f"llama.cpp has no place for the biases of {', '.join(biased)}, and the student's are not zero. Only "
            "students with use_bias=False can be written: begin one by --start served."
        )
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    for name in weights:
        if ".q_proj." in name or ".k_proj." in name:
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            weights[name] = _interleaved(weights[name], heads)
    for name, tensor in weights.items():
        if name.endswith(_NO_BIAS):
            continue
        *path, part, kind = name.split(".")
        place = f"blk.{path[2]}." if "layers" in path else ""
        if part == "input_linear":
            for half, values in zip(("ffn_gate", "ffn_up"), tensor.chunk(2)):
                found[f"{place}{half}.weight"] = values
        elif kind == "A_log":
            found[f"{place}ssm_a"] = _column(-tensor.exp(), ssd)
        elif kind == "D":
            found[f"{place}ssm_d"] = _column(tensor, ssd)
        elif kind == "dt_bias":
            found[f"{place}ssm_dt.bias"] = tensor
        elif part == "norm" and path and path[-1] in ("mixer", "mamba"):
            found[f"{place}ssm_norm.weight"] = tensor.unflatten(0, (groups, -1))  # (g, d / g)
        elif part == "conv1d" and kind == "weight":
            found[f"{place}ssm_conv1d.weight"] = tensor.squeeze(1)  # (d, k)
            # llama.cpp wants a bias
            found.setdefault(f"{place}ssm_conv1d.bias", torch.zeros(len(tensor)))
        else:
            found[f"{place}{'output_norm' if part == 'norm' and not place else _NAMES[part]}.{kind}"] = tensor
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
