"""What every student takes from its teacher: the mixers' shape and start, and the weights of a block.

Shapes: `h` head, `p` head_dim, `n` state, `d` width.
"""

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from cab_hf.models.mixers import BidirectionalSSDMixer, S6Mixer, SSDMixer, inverse_softplus
from cab_hf.transfer.families import Affine, TeacherLayer
from cab_hf.transfer.reading import Reading


# As if the mixer were a moving average of the teacher's values: nothing between the copied projections distorts them.
_START = {
    "transition_init": "moving_average",
    "conv_init": "transparent",
    "conv_activation": None,
    "gate_init": "transparent",
    "skip_init": "transparent",
}

# What stock classes and llama.cpp hold, too: no biases around the mixer, and SiLU after the convolution.
STARTS = ("linear", "served")

_FILLED = "_is_hf_initialized"  # by which transformers knows what it must not start

VALUE_TAPS = 1 / 8
"""Taps of the values in front of a SiLU, which is half its argument near zero: a tenth of a value is 2.5 % off."""


OWN_GROUPS = {"chunk_size": 64}
"""Of scans whose heads have a B and C each: mamba_ssm's backward pass works on chunk x chunk for each of them, and a
training step of SmolLM2's shape is 9 % faster than in chunks of 256 (`benchmarks/speed/results/scale_h200.json`)."""


def start_fields(start: str, mixer_type: str = "mamba2", readings: Iterable[Reading] = ()) -> dict[str, Any]:
    """Fields of a mixer's config that `start` asks for, with a bias behind it where the readings have one.

    Raises:
        ValueError: no start of these mixers.
    """
    if start not in STARTS or (start == "served" and mixer_type != "mamba2"):
        raise ValueError(
            f"start is {start!r} with mixer_type {mixer_type!r}. It must be {' or '.join(map(repr, STARTS))}, and "
            "'served' is for mamba2."
        )
    fields = {**_START, "use_bias": True}
    if start == "served":
        outputs = (one.output for one in readings if one.output is not None)
        has_bias = any(output.bias is not None and bool(output.bias.any()) for output in outputs)
        fields |= {"conv_activation": "silu", "use_bias": has_bias, "gate_init": "fitted"}
    return fields


def check_fields(config_class: type[PreTrainedConfig], fields: Iterable[str]) -> None:
    """That a config has these fields: transformers keeps any others, which nothing reads.

    Raises:
        ValueError: one that it does not have; the message names the nearest.
    """
    known = config_class()
    for name in fields:
        if not hasattr(known, name):
            near = difflib.get_close_matches(name, vars(known), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{config_class.__name__} has no field {name!r}.{hint}")


def mixer_fields(
    teacher_config: PreTrainedConfig,
    num_hidden_layers: int | None,
    mixer_type: str,
    start: str = "linear",
    readings: Iterable[Reading] = (),
) -> dict[str, Any]:
    """Fields of a student's config: the teacher's width and depth, one transparent mixer head an attention head.

    Args:
        teacher_config: config of a teacher.
        num_hidden_layers: depth; the teacher's when None.
        mixer_type: "mamba2", whose B and C are as wide as a key, or "mamba", whose state size is S6's usual one.
        start, readings: of `start_fields`.
    """
    heads = teacher_config.num_attention_heads
    head_dim = teacher_config.to_dict().get("head_dim") or teacher_config.hidden_size // heads
    return {
        "hidden_size": teacher_config.hidden_size,
        "num_hidden_layers": teacher_config.num_hidden_layers if num_hidden_layers is None else num_hidden_layers,
        "mixer_type": mixer_type,
        "num_heads": heads,
        "head_dim": head_dim,
        "n_groups": heads,
        "state_size": head_dim if mixer_type == "mamba2" else None,
        "expand": heads * head_dim / teacher_config.hidden_size,
        "residual_in_fp32": False,
        "initializer_range": teacher_config.initializer_range,
        **start_fields(start, mixer_type, readings),
    }


def copy_block(name: str, block: nn.Module, layer: TeacherLayer) -> None:
    """Copies a layer's norms and MLP into a student's block called `name`."""
    copy_norm(f"{name}.norm", block.norm, layer.norm)
    _copy_post_norm(f"{name}.post_norm", getattr(block, "post_norm", None), layer.post_norm)
    if block.mlp is not None:
        if block.mlp_norm is not None:
            copy_norm(f"{name}.mlp_norm", block.mlp_norm, layer.mlp_norm or layer.norm)
        _copy_post_norm(f"{name}.post_mlp_norm", getattr(block, "post_mlp_norm", None), layer.post_mlp_norm)
        for part in ("gate", "up", "down"):
            copy_affine(f"{name}.mlp.{part}_proj", getattr(block.mlp, f"{part}_proj"), getattr(layer, part))


def unfilled(student_class: type[PreTrainedModel], config: PreTrainedConfig, device: torch.device) -> PreTrainedModel:
    """A student whose weights hold nothing yet: what is copied is not drawn first."""
    with torch.device("meta"), no_init_weights():
        student = student_class(config)
    student.to_empty(device=device)
    student.tie_weights()
    return student


@torch.no_grad()
def fill_the_rest(student: PreTrainedModel, readings: Mapping[SSDMixer | S6Mixer, Reading]) -> None:
    """Starts every weight of an `unfilled` student that nothing was copied to, and each mixer from its reading."""
    for mixer, reading in readings.items():
        config = mixer.config
        is_decided = config.gate_init != "usual" and config.transition_init == "moving_average"
        if isinstance(mixer, SSDMixer) and is_decided and config.state_size == reading.key_dim:
            gate, *_, steps = mixer.in_proj.weight.split(_rows_of(mixer))
            gate.zero_(), steps.zero_()
            _filled(mixer.in_proj.weight)
            if reading.output is not None:
                _filled(mixer.out_proj.weight)
    student.initialize_weights()
    for name, mixer in student.named_modules():
        if mixer in readings:
            copy_reading(name, mixer, readings[mixer])
    for parameter in student.parameters():
        vars(parameter).pop(_FILLED, None)


def _filled(parameter: Tensor) -> None:
    setattr(parameter, _FILLED, True)


def copy_reading(name: str, mixer: SSDMixer | S6Mixer, attention: Reading) -> None:
    """Copies what an attention module was read to be into a mixer called `name`.

    An SSD mixer takes x <- V, B <- K, C <- Q and the output projection <- O, an S6 mixer V and O.

    Raises:
        ValueError: sizes that don't fit; the message holds both.
    """
    config, width, is_ssd = mixer.config, attention.heads * attention.head_dim, isinstance(mixer, SSDMixer)
    if config.mixer_width != width or is_ssd and config.head_dim != attention.head_dim:
        raise ValueError(
            f"The student's {name} has a width (expand * hidden_size) of {config.mixer_width} in heads of "
            f"{config.head_dim}, the teacher's attention one of {width} in heads of {attention.head_dim}. Leave "
            "expand and head_dim to the teacher, or pass copy_attention=False."
        )
    if is_ssd:
        _copy_attention_to_ssd(name, mixer, attention)
        return
    bias = None if mixer.in_proj.bias is None else mixer.in_proj.bias[:width]
    rows = (mixer.in_proj.weight[:width], bias, attention.value, attention.heads, attention.head_dim)
    _copy_rows(f"{name}.in_proj", *rows)
    copy_affine(f"{name}.out_proj", mixer.out_proj, attention.output)


def copy_tensor(name: str, target: Tensor, source: Tensor) -> None:
    """Copies in place.

    Raises:
        ValueError: for different shapes; the message holds `name` and both.
    """
    if target.shape != source.shape:
        raise ValueError(
            f"The student's {name} is {tuple(target.shape)}, the teacher's is {tuple(source.shape)}. Leave the sizes "
            "to the teacher, or pass copy_attention=False (mixers) or copy_weights=False (everything)."
        )
    target.copy_(source)
    _filled(target)


def copy_norm(name: str, target: nn.Module, source: nn.Module | Affine) -> None:
    copy_tensor(f"{name}.weight", target.weight, source.weight)
    if isinstance(target, nn.LayerNorm):
        copy_bias(f"{name}.bias", target.bias, source.bias)


def _copy_post_norm(name: str, target: nn.Module | None, source: Affine | None) -> None:
    if (target is None) != (source is None):
        raise ValueError(
            f"Only one of student and teacher has {name}: the student must have norms behind mixer and MLP "
            "(post_norms) exactly if the teacher's layers have them."
        )
    if target is not None:
        copy_norm(name, target, source)


def copy_bias(name: str, target: Tensor | None, source: Tensor | None) -> None:
    if target is not None and source is not None:
        copy_tensor(name, target, source)
    elif target is not None:
        target.zero_()
        _filled(target)
    elif source is not None and source.any():
        raise ValueError(
            f"The teacher has a bias for the student's {name}, but the student has none there. Let the config have it "
            "(use_bias, mlp_bias or lm_head_bias: True)."
        )


def copy_affine(name: str, target: nn.Linear | None, source: Affine | None) -> None:
    if (target is None) != (source is None):
        raise ValueError(
            f"Only one of student and teacher has {name}: the student's MLP must have a gate (gated_mlp) exactly if "
            "the teacher's has one."
        )
    if target is not None:
        copy_tensor(f"{name}.weight", target.weight, source.weight)
        copy_bias(f"{name}.bias", target.bias, source.bias)


def _copy_rows(
    name: str, target: Tensor, bias: Tensor | None, source: Affine, heads: int, head_dim: int, scale: float = 1.0
) -> None:
    """Fills `target` `(h * n, d)` and `bias` `(h * n,)`, views of an input projection, with heads of `n` >= `p` rows.

    A grouped head goes to all heads of its group, without a copy in between.
    """
    groups = source.weight.shape[0] // head_dim
    for part, rows, given in (("weight", target, source.weight), ("bias", bias, source.bias)):
        if rows is not None:
            rows = rows.unflatten(0, (groups, heads // groups, -1))[:, :, :head_dim]
        if given is not None:
            given = given.unflatten(0, (groups, 1, -1)).expand(-1, heads // groups, *(-1,) * given.ndim)
        copy_bias(f"{name}.{part}", rows, given)
        if rows is not None and scale != 1.0:
            rows *= scale


def _rows_of(mixer: SSDMixer) -> list[int]:
    """Rows of an input projection: gate, x, B, C and time step."""
    width, states = mixer.config.mixer_width, mixer.state_width
    return [width, width, states, states, mixer.config.num_heads]


def _copy_attention_to_ssd(name: str, mixer: SSDMixer, attention: Reading) -> None:
    config, heads, key_dim = mixer.config, attention.heads, attention.key_dim
    if config.n_groups != heads or config.state_size < key_dim:
        raise ValueError(
            f"The student's {name} has n_groups={config.n_groups} and state_size={config.state_size}, the teacher "
            f"{heads} query heads of {key_dim}. Each head brings its own queries and keys: set n_groups={heads} and "
            f"state_size={key_dim} (or more), or pass copy_attention=False."
        )
    sizes = _rows_of(mixer)
    weights = mixer.in_proj.weight.split(sizes)
    is_causal = not isinstance(mixer, BidirectionalSSDMixer)
    has_silu = is_causal and config.conv_activation == "silu"
    # The convolution's bias stands right behind the projection's and does the same.
    in_convolution = is_causal and mixer.in_proj.bias is None and mixer.conv1d.bias is not None
    biases = (None,) * 5 if mixer.in_proj.bias is None else mixer.in_proj.bias.split(sizes)
    if in_convolution:
        biases = (None, *mixer.conv1d.bias.split(sizes[1:4]), None)
    # Wider states than keys: B = 0 leaves the output as it is, and a random C lets B learn.
    if config.state_size > key_dim:
        weights[2].zero_()
    if biases[2] is not None:
        biases[2].zero_()
    # Where a SiLU follows, keys and queries are of about one size; without, only their product counts.
    of_keys = math.sqrt(attention.scaling) if has_silu else 1.0
    rows = (
        (1, attention.value, attention.head_dim, 1.0),
        (2, attention.key, key_dim, of_keys),
        (3, attention.query, key_dim, attention.scaling / of_keys),
    )
    for part, source, size, scale in rows:
        _copy_rows(f"{name}.in_proj", weights[part], biases[part], source, heads, size, scale)
    if in_convolution:
        mixer.conv1d.bias.mul_(mixer.conv1d.weight.sum(dim=(1, 2)))
    if attention.output is not None:
        copy_affine(f"{name}.out_proj", mixer.out_proj, attention.output)
    if has_silu and (config.conv_init, config.transition_init) == ("transparent", "moving_average"):
        _keep_values_linear(mixer)


def _keep_values_linear(mixer: SSDMixer) -> None:
    """Takes the values to where SiLU is nearly linear; longer time steps of slower decays undo the factor."""
    width, gain = mixer.config.mixer_width, 2 / VALUE_TAPS
    mixer.conv1d.weight[:width] *= VALUE_TAPS
    if mixer.conv1d.bias is not None:
        mixer.conv1d.bias[:width] *= VALUE_TAPS
    mixer.A_log -= math.log(gain)
    mixer.dt_bias.copy_(inverse_softplus(gain * mixer.averaging_time_steps(mixer.config.num_heads)))
