"""Students as models of transformers itself.

A student without MLPs is transformers' Mamba (S6) or Mamba-2 (SSD); one with gated SiLU MLPs and SSD mixers, as a
Llama-like teacher gives it, is a GraniteMoeHybrid without experts. The parameters are the same, only the names differ.
vLLM, SGLang and llama.cpp serve all three classes.

A student without an activation after its convolution (`conv_activation=None`) is exported too, although these classes
have a SiLU there: near zero, SiLU is half its argument. Smaller taps make it as linear as is wanted, and what follows
makes up for the factor (`_linearise`). Such a model is to be run, not to be trained further.

Shape legend: `b` batch, `t` token, `h` head, `p` head_dim, `n` state, `g` group, `d` width.
"""

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from cab_hf.export.loading import load_tokenizer, read_student
from cab_hf.export.probe import probe_of, write_probe
from cab_hf.files import written_whole
from cab_hf.models import CABHybridConfig, CABHybridForCausalLM, CABMambaConfig, CABMambaForCausalLM


logger = logging.get_logger(__name__)

# Powers of two, which round no weight. In SSD their product is squared by a norm: it must stay above 2^-60 in float32.
_S6_TAPS = 2.0**-24
_PAIRED_TAPS = (2.0**-22, 2.0**-12)  # of x, and of B and C
_COMPACT_TAPS = (2.0**-16, 2.0**-16)

_HEAD_DIMS = (64, 128, 96, 80, 32)  # that attention kernels know, of CPUs too

_STOCK_CLASSES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "mamba": (MambaConfig, MambaForCausalLM),
    "mamba2": (Mamba2Config, Mamba2ForCausalLM),
    "granite": (GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM),
}
_SHARED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "initializer_range", "tie_word_embeddings", "use_cache"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
)
_MAMBA = (
    *("state_size", "expand", "conv_kernel", "use_bias", "use_conv_bias", "layer_norm_epsilon", "residual_in_fp32"),
    *("rescale_prenorm_residual", "time_step_min", "time_step_max", "time_step_floor"),
)
_STOCK_FIELDS: dict[str, dict[str, str]] = {
    "mamba": {name: name for name in (*_SHARED, *_MAMBA, "time_step_rank")},
    "mamba2": {name: name for name in (*_SHARED, *_MAMBA, "num_heads", "head_dim", "n_groups", "time_step_limit")},
    "granite": {name: name for name in (*_SHARED, "embedding_multiplier", "time_step_limit")}
    | {
        "intermediate_size": "shared_intermediate_size",
        "layer_norm_epsilon": "rms_norm_eps",
        "num_heads": "mamba_n_heads",
        "head_dim": "mamba_d_head",
        "n_groups": "mamba_n_groups",
        "state_size": "mamba_d_state",
        "conv_kernel": "mamba_d_conv",
        "expand": "mamba_expand",
        "use_conv_bias": "mamba_conv_bias",
        "use_bias": "mamba_proj_bias",
    },
}
"""For each stock model: field of the student's config -> field of the stock one."""

_GRANITE_NAMES = (
    ("backbone.embeddings.", "model.embed_tokens."),
    ("backbone.norm_f.", "model.norm."),
    ("backbone.layers.", "model.layers."),
    (".mixer.", ".mamba."),
    (".mlp_norm.", ".post_attention_layernorm."),
    (".mlp.down_proj.", ".shared_mlp.output_linear."),
)
_LLAMA_NAMES = (
    (r"^embed_tokens\.", "backbone.embeddings."),
    (r"^norm\.", "backbone.norm_f."),
    (r"^layers\.", "backbone.layers."),
    (r"\.input_layernorm\.", ".norm."),
    (r"\.self_attn\.mixer\.", ".mixer."),
    (r"\.post_attention_layernorm\.", ".mlp_norm."),
)
_LLAMA_SHAPE = re.compile(
    r"lm_head\.weight|backbone\.(embeddings|norm_f)\.weight|backbone\.layers\.\d+\.((norm|mlp_norm)\.weight|mixer\..+"
    r"|mlp\.(gate|up|down)_proj\.(weight|bias)|self_attn\.[qkvo]_proj\.(weight|bias))"
)
# Before, transformers normed the whole width of a GraniteMoeHybrid's mixer, not each group's.
LEAST_TRANSFORMERS = {"granite": "5.23.0"}


def to_stock(student: PreTrainedModel, *, compact: bool = False) -> PreTrainedModel:
    """The student as a model of transformers itself, with equal logits.

    Its weights are copies, in the student's dtype throughout: a student in half precision keeps its transition (A_log,
    D, dt_bias) in float32, the stock classes do not.

    Two things are the stock classes' own and differ from the student's: with `use_bias=True` the convolution of a
    left-padded row sees the projection's bias at padding, and decoding on the torch path ignores `time_step_limit`.

    A GraniteMoeHybrid gets one more layer behind the others: attention and an MLP whose outputs are zero. Without any
    attention layer transformers 5.24 can't generate with it ("`get_seq_length` can only be called on Attention
    layers"). Its config names the `least_transformers_version` that computes several groups rightly.

    Args:
        student: a language student.
        compact: matters only for SSD with `conv_activation=None`. The states are twice as wide as the student's, so
            that errors of the linearised SiLU cancel; with `compact` they keep their width, and logits differ by
            about 1e-4 of their size, less than bfloat16 rounds.

    Returns:
        A `MambaForCausalLM`, `Mamba2ForCausalLM` or `GraniteMoeHybridForCausalLM` in eval mode, on the student's
        device.

    Raises:
        ValueError: no stock class has this shape; the message has every reason.

    Source: the classes that arXiv 2312.00752 and 2405.21060 became in transformers.
    """
    if not isinstance(student, CABMambaForCausalLM | CABHybridForCausalLM):
        raise ValueError(
            f"student is a {type(student).__name__}; transformers has a class of its own for language students alone "
            "(CABMambaForCausalLM, CABHybridForCausalLM). Image students load by trust_remote_code=True."
        )
    config, attention_fields = student.config, {}
    weights = {name: tensor.detach().clone() for name, tensor in student.state_dict().items()}
    if isinstance(student, CABHybridForCausalLM):
        config, weights, attention_fields = _as_llama(student, weights)
    kind = _stock_kind(config)
    reasons = _obstacles(config, kind, student.dtype)
    if reasons:
        raise ValueError(f"{_STOCK_CLASSES[kind][1].__name__} can't hold this student: {'; '.join(reasons)}.")
    if student.dtype != torch.float32:
        logger.warning(
            f"The stock model is {student.dtype} throughout; the student keeps A_log, D and dt_bias float32."
        )
    if config.time_step_limit[0] > 0 or config.time_step_limit[1] < float("inf"):
        logger.warning("transformers ignores time_step_limit in decoding without kernels: texts may differ.")

    fields = {theirs: getattr(config, ours) for ours, theirs in _STOCK_FIELDS[kind].items()}
    expand = _STOCK_FIELDS[kind]["expand"]
    fields[expand] = int(fields[expand])
    if config.conv_activation is None:
        scale = _linearise(weights, config, compact)
        epsilon = _STOCK_FIELDS[kind]["layer_norm_epsilon"]
        fields[epsilon] = fields[epsilon] * scale**2
        if kind == "granite":
            fields["embedding_multiplier"] *= scale
            fields["residual_multiplier"] = scale
        elif kind == "mamba2":
            _scale_residual(weights, config, scale)
        if kind != "mamba" and not compact:
            fields[_STOCK_FIELDS[kind]["state_size"]] *= 2
    if kind == "granite":
        weights = _to_granite(weights)
        head_dim = next((size for size in _HEAD_DIMS if config.hidden_size % size == 0), config.hidden_size)
        heads = config.hidden_size // head_dim
        layers = config.num_hidden_layers
        fields |= {"num_attention_heads": heads, "num_key_value_heads": 1, "position_embedding_type": "rope"}
        fields |= {"attention_multiplier": head_dim**-0.5, "hidden_act": "silu"}
        fields |= {"num_hidden_layers": layers + 1, "layer_types": ["linear_attention"] * layers + ["full_attention"]}
        fields |= {"num_local_experts": 0, "num_experts_per_tok": 0, "intermediate_size": config.intermediate_size}
        fields |= {"least_transformers_version": LEAST_TRANSFORMERS[kind]}
        # A recurrence has no limit, but runtimes take this number for one.
        fields |= {"max_position_embeddings": 2**17} | attention_fields
    config_class, model_class = _STOCK_CLASSES[kind]
    stock = model_class(config_class(**fields, dtype=student.dtype)).to(student.device, student.dtype)
    if kind == "granite" and not attention_fields:
        silent = f"model.layers.{config.num_hidden_layers}."
        for name, tensor in stock.state_dict().items():
            if name.startswith(silent):
                weights[name] = torch.full_like(tensor, float("layernorm" in name))
    stock.load_state_dict(weights, strict=True)
    if config is not student.config:
        _check_equal(student, stock.eval())
    if student.generation_config is not None:
        stock.generation_config = copy.deepcopy(student.generation_config)
    return stock.eval()


def _as_llama(
    student: CABHybridForCausalLM, weights: dict[str, Tensor]
) -> tuple[CABMambaConfig, dict[str, Tensor], dict[str, Any]]:
    """A hybrid of a Llama-like teacher as a pure student's config and names, and what a stock class asks of attention.

    Raises:
        ValueError: other modules than Llama's, or mixers of several shapes.
    """
    config, teacher = student.config, student.body.config
    if any(config.windows):
        raise ValueError(
            f"GraniteMoeHybridForCausalLM can't hold this hybrid: `attention_window` is {max(config.windows)}, and it "
            "has no attention beside mixers. It loads by trust_remote_code=True."
        )
    renamed = {}
    for name, tensor in weights.items():
        new = re.sub(r"^hybrid\.(model\.)?", "", name)
        for theirs, ours in _LLAMA_NAMES:
            new = re.sub(theirs, ours, new)
        renamed[new] = tensor
    foreign = [name for name in renamed if not _LLAMA_SHAPE.fullmatch(name)]
    shapes = {json.dumps(config.mixer_config(path).to_dict(), sort_keys=True) for path in config.mixers}
    if foreign or len(shapes) > 1:
        reason = f"weights such as {foreign[0]!r}" if foreign else f"mixers of {len(shapes)} shapes"
        raise ValueError(
            f"GraniteMoeHybridForCausalLM can't hold this hybrid of a {config.teacher['model_type']!r}: it has "
            f"{reason}. It loads by trust_remote_code=True."
        )
    mixer = config.mixer_config(next(iter(config.mixers))).to_dict()
    depth = len(student.body.layers)
    names = CABMambaConfig().to_dict().keys() & (
        mixer.keys() - {"architectures", "model_type", "transformers_version"}
    )
    pure = CABMambaConfig(
        **{name: mixer[name] for name in names}
        | {"num_hidden_layers": depth, "vocab_size": config.vocab_size, "residual_in_fp32": False}
        | {"tie_word_embeddings": config.tie_word_embeddings, "intermediate_size": teacher.intermediate_size}
        | {name: getattr(config, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        | {"hidden_act": teacher.hidden_act, "mlp_bias": any(".mlp.up_proj.bias" in name for name in renamed)}
    )
    kept = [index for index in range(depth) if index not in config.layer_numbers]
    if not kept:
        return pure, renamed, {}
    attention = student.body.layers[kept[0]].self_attn
    return (
        pure,
        renamed,
        {
            "num_hidden_layers": depth,
            "layer_types": ["full_attention" if index in kept else "linear_attention" for index in range(depth)],
            "num_attention_heads": teacher.num_attention_heads,
            "num_key_value_heads": teacher.num_key_value_heads,
            "attention_multiplier": attention.scaling,
            "attention_bias": any(".self_attn.o_proj.bias" in name for name in renamed),
            "rope_parameters": copy.deepcopy(teacher.rope_parameters),
            "max_position_embeddings": teacher.max_position_embeddings,
        },
    )


@torch.no_grad()
def _check_equal(student: CABHybridForCausalLM, stock: PreTrainedModel) -> None:
    """That a hybrid's export computes what it does: windows, norms inside attention and the like show here."""
    ids = (7919 * torch.arange(1, 33, device=student.device) % student.config.vocab_size)[None]
    expected, found = student.eval()(ids, use_cache=False).logits, stock(ids, use_cache=False).logits
    error = float((found.float() - expected.float()).norm() / expected.float().norm())
    if error > (1e-3 if student.dtype == torch.float32 else 0.05):
        raise ValueError(
            f"As a {type(stock).__name__} this hybrid of a {student.config.teacher['model_type']!r} gives other "
            f"logits (relative difference {error:.1e}): its attention or its blocks do more than a Llama's. It loads "
            "by trust_remote_code=True."
        )


def export_stock(folder: str | Path, out: str | Path, *, compact: bool = False) -> PreTrainedModel:
    """Writes a saved student as a model of transformers itself, with its tokenizer and generation config.

    Args:
        folder: a saved student, or its Hub id.
        out: folder to write; it must not hold a model.
        compact: as in `to_stock`.

    Returns:
        The model that was written, of `to_stock`.

    Raises:
        FileExistsError: `out` holds a model.
        OSError: it can't be written; nothing of the model is left there then.
        ValueError: no stock class has the student's shape, or the folder holds no student that can be read.
    """
    out = Path(out)
    if (out / "config.json").exists():
        raise FileExistsError(f"{out} holds a model already; name another folder, or remove it.")
    student = read_student(folder)
    stock = to_stock(student, compact=compact)
    tokenizer, probe = load_tokenizer(folder), probe_of(folder, student)
    with written_whole(out) as unfinished:
        stock.save_pretrained(unfinished)
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        write_probe(unfinished, probe)
    return stock


def stock_class_name(config: CABMambaConfig | CABHybridConfig) -> str | None:
    """The class of transformers that `export_stock` makes of students of a config; None where none has the shape.

    Of a hybrid only its weights tell.
    """
    if isinstance(config, CABHybridConfig):
        return None
    kind = _stock_kind(config)
    return None if _obstacles(config, kind, torch.float32) else _STOCK_CLASSES[kind][1].__name__


def _stock_kind(config: CABMambaConfig) -> str:
    if config.intermediate_size:
        return "granite"
    return "mamba" if config.layer_mixer_types[:1] == ["mamba"] else "mamba2"


def _obstacles(config: CABMambaConfig, kind: str, dtype: torch.dtype) -> list[str]:
    """Every reason why the stock class can't hold a student, each with a way out where there is one."""
    reasons = []
    wanted = "mamba" if kind == "mamba" else "mamba2"
    others = [index for index, mixer in enumerate(config.layer_mixer_types) if mixer != wanted]
    if others:
        reasons.append(f"layers {others} have {'SSD' if wanted == 'mamba' else 'S6'} mixers (mixer_type={wanted!r})")
    if config.norm_type != "rms_norm":
        reasons.append(f"its norm_type is {config.norm_type!r}, not 'rms_norm'")
    if config.max_position_embeddings:
        reasons.append(f"it has {config.max_position_embeddings} learned positions (max_position_embeddings)")
    if config.rotary_frequencies:
        reasons.append("its states turn (keep_rotary)")
    if config.lm_head_bias:
        reasons.append("its head has a bias (lm_head_bias)")
    if config.post_norms:
        reasons.append("norms stand behind its mixers, too (post_norms)")
    if config.embedding_multiplier != 1.0 and kind != "granite":
        reasons.append(f"its embeddings are multiplied by {config.embedding_multiplier:g} (embedding_multiplier)")
    if config.expand != int(config.expand):
        reasons.append(
            f"its mixers are {config.mixer_width} wide, expand={config.expand:g} times hidden_size="
            f"{config.hidden_size}, and expand must be whole"
        )
    if dtype == torch.float16 and config.conv_activation is None:
        reasons.append("conv_activation=None needs factors that float16 can't hold (load it in bfloat16 or float32)")
    if kind == "granite":
        if config.mlp_bias:
            reasons.append("its MLP has biases (mlp_bias)")
        if config.parallel_residual:
            reasons.append("mixer and MLP run side by side (parallel_residual)")
        if not config.gated_mlp:
            reasons.append("its MLP has no gate (gated_mlp=False)")
        if config.hidden_act != "silu":
            reasons.append(f"its MLP has the activation {config.hidden_act!r}, not 'silu'")
    return reasons


def _linearise(weights: dict[str, Tensor], config: CABMambaConfig, compact: bool) -> float:
    """Makes room for a SiLU after convolutions that have none, in place.

    With taps of `e` times their size, SiLU gives `e / 2` times their output, with an error of `(e / 2) |u|` to it.

    S6 makes B and C of x, so that two later projections undo the factor.

    SSD multiplies x, B and C: y is `s` times itself, `s` being all factors together. The norm behind it undoes that if
    epsilon is `s^2` times itself. Epsilon is every norm's, so that the residual stream must be `s` times itself too:
    by a GraniteMoeHybrid's multipliers, or in a Mamba-2 by its weights (`_scale_residual`).
    The error of x costs nothing, as its taps may be tiny; that of B and C goes when each state has a twin of opposite
    sign: SiLU is half its argument plus an even function, which cancels in `silu(b) silu(c) + silu(-b) silu(-c)`.

    Returns:
        `s`; 1.0 for S6.
    """
    if "mamba2" not in config.layer_mixer_types:
        _scale(weights, {"conv1d.weight": _S6_TAPS, "conv1d.bias": _S6_TAPS})
        _scale(weights, {"x_proj.weight": 2 / _S6_TAPS, "out_proj.weight": 2 / _S6_TAPS})
        return 1.0
    x_taps, state_taps = _COMPACT_TAPS if compact else _PAIRED_TAPS
    state_gain = state_taps**2 / (4 if compact else 2)
    scale = x_taps / 2 * state_gain
    width, states = config.mixer_width, config.n_groups * config.state_size
    for name in [name for name in weights if ".mixer." in name]:
        if ".conv1d." in name:
            x, B, C = weights[name].split([width, states, states])
            B, C = B * state_taps, C * state_taps
            if not compact:
                B, C = (_twins(tensor, config.n_groups, sign=-1) for tensor in (B, C))
            weights[name] = torch.cat((x * x_taps, B, C))
        elif ".in_proj." in name and not compact:
            gate, x, B, C, dt = weights[name].split([width, width, states, states, config.num_heads])
            B, C = (_twins(tensor, config.n_groups, sign=1) for tensor in (B, C))
            weights[name] = torch.cat((gate, x, B, C, dt))
    _scale(weights, {"mixer.D": state_gain})
    return scale


def _scale_residual(weights: dict[str, Tensor], config: CABMambaConfig, scale: float) -> None:
    _scale(weights, dict.fromkeys(("embeddings.weight", "out_proj.weight", "out_proj.bias"), scale))
    if config.tie_word_embeddings:
        _scale(weights, {"lm_head.weight": scale, "norm_f.weight": 1 / scale})


def _scale(weights: Mapping[str, Tensor], factors: Mapping[str, float]) -> None:
    for name, tensor in weights.items():
        for ending, factor in factors.items():
            if name.endswith(ending):
                tensor.mul_(factor)


def _twins(rows: Tensor, groups: int, sign: int) -> Tensor:
    """Rows `(g * n, ...)`, each group's followed by their twins: `(g * 2n, ...)`."""
    rows = rows.unflatten(0, (groups, -1))  # (g, n, ...)
    return torch.cat((rows, sign * rows), dim=1).flatten(0, 1)


def _to_granite(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights by a GraniteMoeHybrid's names; the MLP's gate and its other half are one matrix there."""
    renamed = {}
    for name, tensor in weights.items():
        if ".mlp.up_proj." in name:
            continue
        if ".mlp.gate_proj." in name:
            tensor = torch.cat((tensor, weights[name.replace("gate_proj", "up_proj")]))
            name = name.replace(".mlp.gate_proj.", ".shared_mlp.input_linear.")
        for ours, theirs in _GRANITE_NAMES:
            name = name.replace(ours, theirs)
        renamed[re.sub(r"(layers\.\d+)\.norm\.", r"\1.input_layernorm.", name)] = tensor
    return renamed
