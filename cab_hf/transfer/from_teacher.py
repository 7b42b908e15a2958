"""Makes a student out of a Transformer: its shape, its weights, and its attention as the start of a mixer.

Linear attention `h_t = h_{t-1} + k_t v_t, y_t = q_t h_t` is a state-space recurrence with A = I, so a mixer can start
from the teacher's projections: x <- V, B <- K, C <- Q, output projection <- O. Positions by rotation are left behind:
a mixer knows order by its recurrence.

Shapes: `b` batch, `t` token, `h` head, `p` head_dim, `n` state, `g` group, `d` width.

Source: arXiv 2510.19266, section "Method" (the correspondence); arXiv 2408.15237 and 2604.14191 (the initialisation).
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from cab_hf.distillation.alignment import layer_map as map_layers
from cab_hf.distillation.teacher import Teacher
from cab_hf.models.configuration_cab_mamba import CABMambaConfig
from cab_hf.models.mixers import S6Mixer, SSDMixer, SSMProjections
from cab_hf.models.modeling_cab_mamba import CABMambaForCausalLM, CABMambaPreTrainedModel
from cab_hf.transfer.families import Affine, TeacherLayer, family_of


# As if the mixer were a moving average of the teacher's values: nothing between the copied projections distorts them.
_START = {
    "transition_init": "moving_average",
    "conv_init": "transparent",
    "conv_activation": None,
    "gate_init": "transparent",
    "skip_init": "transparent",
}


def student_from_teacher(
    teacher: PreTrainedModel,
    *,
    student_class: type[CABMambaPreTrainedModel] = CABMambaForCausalLM,
    num_hidden_layers: int | None = None,
    layer_map: str | Sequence[int] = "floor",
    mixer_type: str = "mamba2",
    copy_attention: bool = True,
    copy_weights: bool = True,
    calibration_inputs: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    **config_overrides: Any,
) -> CABMambaPreTrainedModel:
    """Builds a student of the teacher's shape, with its weights wherever a student has a place for them.

    Args:
        teacher: a Transformer of a known family (`cab_hf.transfer.FAMILIES`); neither changed nor shared.
        student_class: class of the student.
        num_hidden_layers: depth of the student; the teacher's when not given.
        layer_map: which teacher layer each student layer is made of: "floor", "uniform", "last", or one index a layer.
        mixer_type: "mamba2" takes over Q, K, V and O; "mamba" V and O.
        copy_attention: copy attention's projections into the mixers.
        copy_weights: copy anything at all; without, the student is random in the teacher's shape.
        calibration_inputs: one batch (`input_ids`, and `attention_mask` if padded) on which the mixers' outputs are
            scaled to those of the teacher's attention.
        dtype: of the student's weights; those that must be float32 stay so.
        **config_overrides: fields of `CABMambaConfig` that are to differ from `student_config`'s choice.

    Returns:
        The student, in eval mode, on the teacher's device.

    Raises:
        ValueError: an unknown family, a feature of the teacher that a student can't express, or sizes that don't fit.
    """
    config = student_config(
        teacher.config, num_hidden_layers=num_hidden_layers, mixer_type=mixer_type, **config_overrides
    )
    layers = map_layers(layer_map, config.num_hidden_layers, teacher.config.num_hidden_layers)
    student = student_class(config).to(teacher.device)
    if copy_weights:
        copy_teacher_weights(student, teacher, layers, copy_attention)
    if calibration_inputs is not None:
        calibrate_output_norm(student, teacher, calibration_inputs, layers)
    if student.can_generate():
        student.generation_config = copy.deepcopy(teacher.generation_config)
    _cast(student, dtype)
    return student.eval()


def student_config(
    teacher_config: PreTrainedConfig,
    *,
    num_hidden_layers: int | None = None,
    mixer_type: str = "mamba2",
    **overrides: Any,
) -> CABMambaConfig:
    """The config of a student of a teacher's shape.

    One mixer head for each attention head, with its own B and C as wide as a key, and the teacher's norms, MLPs,
    residuals and vocabulary. The mixers start transparent: a moving average of the values, without convolution, gate
    or skip. With `mixer_type="mamba"` the state size is S6's usual one.

    Args:
        teacher_config: config of a teacher of a known family.
        num_hidden_layers: depth; the teacher's when not given.
        mixer_type: "mamba2" or "mamba".
        **overrides: any field of `CABMambaConfig`.

    Raises:
        ValueError: an unknown family, or a feature that a student can't express.
    """
    family, values = family_of(teacher_config), teacher_config.to_dict()
    heads = teacher_config.num_attention_heads
    head_dim = values.get("head_dim") or teacher_config.hidden_size // heads
    fields = {
        "vocab_size": teacher_config.vocab_size,
        "hidden_size": teacher_config.hidden_size,
        "num_hidden_layers": teacher_config.num_hidden_layers if num_hidden_layers is None else num_hidden_layers,
        "mixer_type": mixer_type,
        "num_heads": heads,
        "head_dim": head_dim,
        "n_groups": heads,
        "state_size": head_dim if mixer_type == "mamba2" else None,
        "expand": heads * head_dim / teacher_config.hidden_size,
        "use_bias": True,
        "residual_in_fp32": False,
        "tie_word_embeddings": teacher_config.tie_word_embeddings,
        "initializer_range": teacher_config.initializer_range,
        **{name: values.get(name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
        **_START,
        **family.student_fields(teacher_config),
    }
    return CABMambaConfig(**(fields | overrides))


@torch.no_grad()
def copy_teacher_weights(
    student: CABMambaPreTrainedModel,
    teacher: PreTrainedModel,
    layer_map: Sequence[int],
    copy_attention: bool = True,
) -> None:
    """Copies a teacher's weights into a student, in place.

    In an SSD mixer with one group a head, x <- V, B <- K, C <- Q times the attention's scaling (grouped keys and
    values are repeated), and the output projection <- O, biases included. States wider than a key keep their random C
    and get B = 0, silent until they learn.

    An S6 mixer computes B and C from x, so there is no slot for K and Q: x <- V and the output projection <- O are
    copied, and the bridge is what teaches B and C.

    Of Qwen3, the weights of the query and key norms are copied into the projections; their normalisation can't be.

    Args:
        student: a model whose shape follows the teacher (`student_config`).
        teacher: a model of a known family.
        layer_map: the teacher layer of each student layer.
        copy_attention: copy attention's projections too.

    Raises:
        ValueError: an unknown family or sizes that don't fit; the message holds both.
    """
    family, source, target = family_of(teacher.config), teacher.base_model, student.base_model
    _copy("embeddings.weight", target.embeddings.weight, teacher.get_input_embeddings().weight)
    if family.positions is not None and target.position_embeddings is not None:
        positions = source.get_submodule(family.positions).weight
        _copy("position_embeddings.weight", target.position_embeddings.weight, positions)
    _copy_norm("norm_f", target.norm_f, source.get_submodule(family.final_norm))
    _copy_head(student, teacher)

    blocks = source.get_submodule(family.layers)
    for index, (block, teacher_index) in enumerate(zip(target.layers, layer_map, strict=True)):
        layer, name = family.read_layer(blocks[teacher_index]), f"layers.{index}"
        _copy_norm(f"{name}.norm", block.norm, layer.norm)
        if block.mlp is not None:
            if block.mlp_norm is not None:
                _copy_norm(f"{name}.mlp_norm", block.mlp_norm, layer.mlp_norm or layer.norm)
            for part in ("gate", "up", "down"):
                _copy_affine(f"{name}.mlp.{part}_proj", getattr(block.mlp, f"{part}_proj"), getattr(layer, part))
        if copy_attention and isinstance(block.mixer, SSDMixer):
            _copy_attention_to_ssd(f"{name}.mixer", block.mixer, layer)
        elif copy_attention and isinstance(block.mixer, S6Mixer):
            _copy_attention_to_s6(f"{name}.mixer", block.mixer, layer)


@torch.no_grad()
def calibrate_output_norm(
    student: CABMambaPreTrainedModel,
    teacher: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    layer_map: str | Sequence[int] = "floor",
) -> None:
    """Gives every mixer head the output size of the teacher's attention head on one batch, in place.

    What is scaled is the weight of an SSD mixer's output norm, and the columns of an S6 mixer's output projection,
    which has no norm before it: by the ratio of the RMS of teacher and student, over real tokens, from the first layer
    to the last. (The norm alone does not make the RMS one: a head of long memory starts with outputs so small that
    the norm's epsilon counts.)

    Args:
        student: the student to calibrate.
        teacher: the teacher, left as it was.
        inputs: one batch, `input_ids` `(b, t)` and, if padded, `attention_mask` `(b, t)`.
        layer_map: the teacher layer of each student layer, as in `student_from_teacher`.
    """
    layers = map_layers(layer_map, student.config.num_hidden_layers, teacher.config.num_hidden_layers)
    mask = inputs.get("attention_mask")
    with borrowed_teacher(teacher) as borrowed:
        teacher_rms = [_rms(attention.output, mask) for attention in borrowed(inputs, attentions=True).attentions]

    training, handles = student.training, []
    for block, layer in zip(student.base_model.layers, layers, strict=True):
        handles.append(block.mixer.register_forward_hook(_scaling_hook(teacher_rms[layer].to(student.device), mask)))
    try:
        arguments = {
            name: inputs[name].to(student.device) for name in ("input_ids", "attention_mask") if name in inputs
        }
        student.eval().base_model(**arguments, use_cache=False)
    finally:
        student.train(training)
        for handle in handles:
            handle.remove()


def _scaling_hook(teacher_rms: Tensor, mask: Tensor | None) -> Callable:
    """Scales a mixer's output when the mixer runs, for good and in that very pass, which later layers read."""

    def scale(
        mixer: SSDMixer | S6Mixer, args: tuple, result: tuple[Tensor, SSMProjections]
    ) -> tuple[Tensor, SSMProjections]:
        y = result[1].output  # (b, t, d)
        heads = len(teacher_rms) if y.shape[-1] % len(teacher_rms) == 0 else 1
        wanted = teacher_rms if heads > 1 else teacher_rms.square().mean().sqrt()[None]
        own = _rms(y.unflatten(-1, (heads, -1)), mask)  # (h,)
        # A head that is silent on this batch says nothing about its scale.
        ratio = torch.where(own > 0, wanted / own.clamp_min(1e-30), 1.0)
        channels = ratio.repeat_interleave(y.shape[-1] // heads).to(y.dtype)  # (d,)
        if isinstance(mixer, SSDMixer):
            mixer.norm.weight.mul_(channels)
            y = y * channels
        else:
            mixer.out_proj.weight.mul_(channels)
        return mixer.out_proj(y), result[1]._replace(output=y)

    return scale


def _rms(output: Tensor, mask: Tensor | None) -> Tensor:
    """Root mean square `(h,)` of `(b, t, h, p)` over real tokens and features."""
    energy = output.float().square().mean(dim=-1)  # (b, t, h)
    weight = torch.ones_like(energy[..., :1]) if mask is None else mask.to(energy.device)[..., None].ne(0).float()
    # Padding may hold anything, infinities included.
    energy = torch.where(weight > 0, energy, 0.0)
    return (energy.sum(dim=(0, 1)) / weight.sum()).sqrt()


@contextmanager
def borrowed_teacher(model: PreTrainedModel) -> Iterator[Teacher]:
    """A `Teacher` for the block's time; mode, gradients and attention of the model come back as they were."""
    training = {module: module.training for module in model.modules()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    teacher = Teacher(model)
    try:
        yield teacher
    finally:
        teacher.restore()
        for module, mode in training.items():
            module.training = mode
        for parameter in trainable:
            parameter.requires_grad_(True)


def _cast(student: CABMambaPreTrainedModel, dtype: torch.dtype) -> None:
    kept = student._keep_in_fp32_modules_strict
    for name, parameter in student.named_parameters():
        if not any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.to(dtype)
    student.config.dtype = dtype


def _copy(name: str, target: Tensor, source: Tensor) -> None:
    if target.shape != source.shape:
        raise ValueError(
            f"The student's {name} is {tuple(target.shape)}, the teacher's is {tuple(source.shape)}. Leave the sizes "
            "to student_config, or pass copy_attention=False (mixers) or copy_weights=False (everything)."
        )
    target.copy_(source)


def _copy_norm(name: str, target: nn.Module, source: nn.Module) -> None:
    _copy(f"{name}.weight", target.weight, source.weight)
    if isinstance(target, nn.LayerNorm):
        _copy(f"{name}.bias", target.bias, source.bias)


def _copy_bias(name: str, target: Tensor | None, source: Tensor | None) -> None:
    if target is not None and source is not None:
        _copy(name, target, source)
    elif target is not None:
        target.zero_()
    elif source is not None and source.any():
        raise ValueError(
            f"The teacher has a bias for the student's {name}, but the student has none there. Let the config have it "
            "(use_bias, mlp_bias or lm_head_bias: True)."
        )


def _copy_affine(name: str, target: nn.Linear | None, source: Affine | None) -> None:
    if (target is None) != (source is None):
        raise ValueError(
            f"Only one of student and teacher has {name}: the student's MLP must have a gate (gated_mlp) exactly if "
            "the teacher's has one."
        )
    if target is not None:
        _copy(f"{name}.weight", target.weight, source.weight)
        _copy_bias(f"{name}.bias", target.bias, source.bias)


def _copy_head(student: CABMambaPreTrainedModel, teacher: PreTrainedModel) -> None:
    target, source = student.get_output_embeddings(), teacher.get_output_embeddings()
    if target is None or source is None:
        return
    tied = target.weight is student.get_input_embeddings().weight
    if tied and not torch.equal(source.weight, teacher.get_input_embeddings().weight):
        raise ValueError(
            "The student's tie_word_embeddings is True, but the teacher's head and embeddings differ. Set "
            "tie_word_embeddings=False."
        )
    _copy("lm_head.weight", target.weight, source.weight)
    _copy_bias("lm_head.bias", target.bias, source.bias)


def _by_head(x: Tensor, heads: int, head_dim: int) -> Tensor:
    """Rows `(h_kv * p, ...)` of a projection as `(h, p, ...)`, grouped heads repeated."""
    x = x.unflatten(0, (-1, head_dim))
    return x.repeat_interleave(heads // x.shape[0], dim=0)


def _copy_rows(
    name: str, target: Tensor, bias: Tensor | None, source: Affine, head_dim: int, scale: float = 1.0
) -> None:
    """Fills `target` `(h, n, d)` and `bias` `(h, n)`, views of an input projection, with heads of `n` >= `p` rows."""
    _copy(f"{name}.weight", target[:, :head_dim], _by_head(source.weight, len(target), head_dim) * scale)
    rows = None if source.bias is None else _by_head(source.bias, len(target), head_dim) * scale
    _copy_bias(f"{name}.bias", None if bias is None else bias[:, :head_dim], rows)


def _check_heads(name: str, mixer: SSDMixer | S6Mixer, layer: TeacherLayer) -> int:
    """Returns the teacher's head count, or says why the mixer can't take its heads."""
    head_dim, width = mixer.config.head_dim, mixer.config.mixer_width
    teacher_width = layer.query.weight.shape[0]
    if width != teacher_width or width % head_dim or layer.value.weight.shape[0] % head_dim:
        raise ValueError(
            f"The student's {name} has a width (expand * hidden_size) of {width} in heads of {head_dim}, the "
            f"teacher's attention one of {teacher_width} with values of {layer.value.weight.shape[0]}. Leave expand "
            "and head_dim to student_config, or pass copy_attention=False."
        )
    return width // head_dim


def _copy_attention_to_ssd(name: str, mixer: SSDMixer, layer: TeacherLayer) -> None:
    heads = _check_heads(name, mixer, layer)
    config, head_dim = mixer.config, mixer.config.head_dim
    if config.n_groups != heads or config.state_size < head_dim:
        raise ValueError(
            f"The student's {name} has n_groups={config.n_groups} and state_size={config.state_size}, the teacher "
            f"{heads} query heads of {head_dim}. Each head brings its own queries and keys: set n_groups={heads} and "
            f"state_size={head_dim} (or more), or pass copy_attention=False."
        )
    width, states = config.mixer_width, mixer.state_width
    sizes = [width, width, states, states, config.num_heads]
    weights = mixer.in_proj.weight.split(sizes)
    biases = (None,) * 5 if mixer.in_proj.bias is None else mixer.in_proj.bias.split(sizes)
    # Wider states than keys: B = 0 leaves the output as it is, and a random C lets B learn.
    weights[2].zero_()
    if biases[2] is not None:
        biases[2].zero_()
    for part, source, scale in ((1, layer.value, 1.0), (2, layer.key, 1.0), (3, layer.query, layer.scaling)):
        bias = None if biases[part] is None else biases[part].unflatten(0, (heads, -1))
        _copy_rows(f"{name}.in_proj", weights[part].unflatten(0, (heads, -1)), bias, source, head_dim, scale)
    _copy_affine(f"{name}.out_proj", mixer.out_proj, layer.output)


def _copy_attention_to_s6(name: str, mixer: S6Mixer, layer: TeacherLayer) -> None:
    heads = _check_heads(name, mixer, layer)
    width, head_dim = mixer.config.mixer_width, mixer.config.head_dim
    bias = None if mixer.in_proj.bias is None else mixer.in_proj.bias[:width].unflatten(0, (heads, -1))
    target = mixer.in_proj.weight[:width].unflatten(0, (heads, -1))
    _copy_rows(f"{name}.in_proj", target, bias, layer.value, head_dim)
    _copy_affine(f"{name}.out_proj", mixer.out_proj, layer.output)
