"""A hybrid made of any teacher: a copy of it, with mixers in place of its attention.

Shapes: `h` head, `p` features of a head, `d` width.
"""

import copy
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from cab_hf.inference import evaluating
from cab_hf.models.configuration_cab_hybrid import CABHybridConfig
from cab_hf.models.configuration_cab_mamba import MixerConfig
from cab_hf.models.modeling_cab_hybrid import CABHybridForCausalLM, CABHybridPreTrainedModel
from cab_hf.models.students import body_of, cast
from cab_hf.teachers.attention_interface import base_of
from cab_hf.teachers.examination import named, tiny_batch
from cab_hf.transfer.copying import OWN_GROUPS, check_fields, fill_the_rest, start_fields
from cab_hf.transfer.reading import Reading, check_readings, exactness, read_attention
from cab_hf.transfer.rotation import kept_rotations, rotary_fields


_EPSILONS = ("eps", "variance_epsilon", "epsilon", "norm_eps")


def hybrid_from_teacher(
    teacher: PreTrainedModel,
    student_class: type[CABHybridPreTrainedModel] = CABHybridForCausalLM,
    *,
    keep_attention: int | Sequence[int | str] = (),
    accept_inexact: float = 0.0,
    start: str = "linear",
    keep_rotary: bool = False,
    copy_attention: bool = True,
    attention_window: int = 0,
    attention_sinks: int = 4,
    **overrides: Any,
) -> CABHybridPreTrainedModel:
    """A copy of a teacher with mixers in place of its attention, or beside a window of it.

    Args:
        teacher: any model of transformers, whole; neither changed nor shared.
        student_class: of the task that the teacher has a head for.
        keep_attention: layers to leave as they are: how many, evenly spread, or their indices among the layers that
            attend, or the paths of their attention modules.
        accept_inexact: largest relative error on random input of what is read; larger ones than rounding are refused
            else. The config notes those that were accepted.
        start: of the mixers, as in `student_config`; with "served" their gates are still to be fitted.
        keep_rotary: causal mixers' states turn as rotary positions turn the queries and keys that they stand for.
        copy_attention: start the mixers from attention's projections.
        attention_window: tokens that attention beside each mixer sees, the token itself among them; 0: none stays.
            Mixers say nothing at first then, so that the student starts as the teacher with a window.
        attention_sinks: first tokens of a row that it sees, too.
        **overrides: fields of `MixerConfig` that all mixers share, but for sizes.

    Raises:
        ValueError: a teacher that is none of transformers' own classes, or whose attention can't be read, or works in
            no window.
    """
    check_fields(MixerConfig, overrides)
    for name, count in (("attention_window", attention_window), ("attention_sinks", attention_sinks)):
        if type(count) is not int or count < 0:
            raise ValueError(f"`{name}` is {count!r}, but it counts tokens. Leave it out, or try 256 and 4.")
    if (
        not type(teacher).__module__.startswith("transformers.models.")
        or vars(teacher).get("hf_quantizer") is not None
    ):
        raise ValueError(
            f"{named(teacher)} is quantised, or its class is not transformers' own: a hybrid could not be loaded. "
            "Load it dequantised (`teacher.dequantize()`), or by a class of transformers (trust_remote_code=False)."
        )
    readings, left_out = read_attention(teacher)
    paths = [path for path, _ in body_of(teacher).named_modules() if path in readings or path in left_out]
    kept = kept_paths(keep_attention, paths)
    readings = {path: one for path, one in readings.items() if path not in kept}
    left_out = {path: reason for path, reason in left_out.items() if path not in kept}
    if not readings and not left_out:
        raise ValueError(
            f"`keep_attention` is {keep_attention!r}, which keeps all {len(paths)} layers that attend: nothing is "
            "left for mixers. Keep fewer."
        )
    check_readings(teacher, readings, left_out, accept_inexact)
    begin = start_fields(start, readings=readings.values())
    fields = begin | {"layer_norm_epsilon": norm_epsilon(teacher)} | overrides
    tolerance = exactness(teacher)
    settings = {path: _settings(one, tolerance, fields) for path, one in readings.items()}
    if keep_rotary:
        for path, rotation in kept_rotations(teacher).items():
            if path in settings and settings[path]["causal"]:
                settings[path] = rotary_fields([rotation]) | settings[path]
    if attention_window:
        modules = {path: body_of(teacher).get_submodule(path) for path in settings}
        for path, one in settings.items():
            if not one["causal"]:
                raise ValueError(
                    f"`attention_window` is {attention_window}, but {path} of a {type(teacher).__name__} attends both "
                    "ways: windows are of causal attention. Leave it out."
                )
            one |= _window_of(modules[path], attention_window, attention_sinks)
    shared = {
        name: value
        for name, value in next(iter(settings.values())).items()
        if all(name in one and one[name] == value for one in settings.values())
    }
    config = CABHybridConfig(
        teacher=teacher.config.to_dict() | {"architectures": [type(teacher).__name__]},
        mixer=shared,
        mixers={
            path: {name: value for name, value in one.items() if name not in shared} for path, one in settings.items()
        },
    )
    student = _copied(teacher, student_class, config)
    fill_the_rest(student, {student.mixers[path].mixer: one for path, one in readings.items() if copy_attention})
    student.requires_grad_(True)
    cast(student, torch.float32)
    with evaluating(student):
        if attention_window:
            _check_windows(student, teacher)
        _measure(student)
    _silence(student)
    return student.eval()


def evenly_spread(count: int, total: int) -> list[int]:
    """Places of `count` out of `total`, in the middle of as many equal parts.

    Example:
        >>> evenly_spread(2, 4)
        [1, 3]
    """
    return [(2 * place + 1) * total // (2 * count) for place in range(count)]


def kept_paths(keep_attention: int | Sequence[int | str], paths: Sequence[str]) -> list[str]:
    """The paths of the attention that stays.

    Args:
        keep_attention: a number of layers, or indices and paths.
        paths: of all attention modules, in the order of their calls.

    Raises:
        ValueError: an index or path that there is not.

    Example:
        >>> kept_paths(2, ["a", "b", "c", "d"])
        ['b', 'd']
    """
    count = len(paths)
    if isinstance(keep_attention, int):
        if not 0 <= keep_attention <= count:
            raise ValueError(
                f"`keep_attention` is {keep_attention}, but {count} layers attend: keep 0 to {count - 1}."
            )
        keep_attention = evenly_spread(keep_attention, count)
    kept = []
    for one in [keep_attention] if isinstance(keep_attention, str) else keep_attention:
        if isinstance(one, str) and not one.isdigit():
            found = [path for path in paths if path == one or one.endswith("." + path)]
        else:
            found = list(paths[int(one) : int(one) + 1])
        if not found:
            raise ValueError(
                f"`keep_attention` names {one!r}, but the teacher attends in {count} modules: 0 to {count - 1}, from "
                f"{paths[0]!r} to {paths[-1]!r}."
            )
        kept += found
    return kept


def parse_kept(given: Sequence[str | int]) -> int | list[int | str] | None:
    """The `keep_attention` of a recipe: 'n=4' is a number, digits are indices, the rest paths; None if empty.

    Example:
        >>> parse_kept(["n=4"]), parse_kept(["3", "layers.7.self_attn"])
        (4, [3, 'layers.7.self_attn'])
    """
    given = [str(one) for one in given]
    if len(given) == 1 and given[0].startswith("n=") and given[0][2:].isdigit():
        return int(given[0][2:])
    return None if not given else [int(one) if one.isdigit() else one for one in given]


def attention_for(student: CABHybridPreTrainedModel, teacher: PreTrainedModel) -> dict[str, nn.Module]:
    """Copies of the attention that a hybrid's mixers stand for, as the hybrid would hold it, by its path.

    Args:
        student: whose dtype and configs they take.
        teacher: that the student was made of; neither changed nor shared.

    Returns:
        One module for each mixer, in the order of their calls, on the CPU.
    """
    ours, theirs = student.body, body_of(teacher)
    parts = {path: part for path, part in theirs.named_modules() if isinstance(part, PreTrainedModel)}
    configs = {id(part.config): ours.get_submodule(path).config for path, part in parts.items()}
    found = {}
    for path in student.config.mixers:
        module = copy.deepcopy(theirs.get_submodule(path), dict(configs))
        found[path] = module.to("cpu", student.dtype).requires_grad_(True)
    return found


@contextmanager
def with_attention(student: CABHybridPreTrainedModel, attention: Mapping[str, nn.Module]) -> Iterator[None]:
    """Attention stands where mixers do, by its path, until the block ends."""
    mixers = {path: student.body.get_submodule(path) for path in attention}
    try:
        for path, module in attention.items():
            student.body.set_submodule(path, module)
        yield
    finally:
        for path, mixer in mixers.items():
            student.body.set_submodule(path, mixer)


def put_back(student: CABHybridPreTrainedModel, attention: Mapping[str, nn.Module]) -> None:
    """Puts attention where mixers stand, by its path and for good: the student is the hybrid that keeps these layers.

    Args:
        student: changed in place, its config, too.
        attention: of `attention_for`.
    """
    for path, module in attention.items():
        student.body.set_submodule(path, module.to(student.device).train(student.training))
    config = student.config
    config.mixers = {path: settings for path, settings in config.mixers.items() if path not in attention}
    with evaluating(student):
        _measure(student)


def norm_epsilon(teacher: PreTrainedModel) -> float:
    """Epsilon of the teacher's norms: outputs of mixers are small enough that it counts."""
    for module in teacher.modules():
        if "norm" in type(module).__name__.lower():
            found = [vars(module)[name] for name in _EPSILONS if isinstance(vars(module).get(name), float)]
            if found:
                return found[0]
    return 1e-5


def _settings(reading: Reading, tolerance: float, fields: Mapping[str, Any]) -> dict[str, Any]:
    width = reading.heads * reading.head_dim
    settings = {
        "hidden_size": reading.hidden_size,
        "mixer_type": "mamba2",
        "num_heads": reading.heads,
        "n_groups": reading.heads,
        **OWN_GROUPS,
        "head_dim": reading.head_dim,
        "state_size": reading.key_dim,
        "expand": width / reading.hidden_size,
        **fields,
        "causal": reading.causal,
        "output_size": reading.output_size,
        **reading.call,
    }
    inexact = {part: round(error, 6) for part, error in reading.errors.items() if error > tolerance}
    return settings | ({"inexact": inexact} if inexact else {})


def _window_of(attention: nn.Module, window: int, sinks: int) -> dict[str, int]:
    """Settings of a window beside a mixer, no wider than one that the attention has itself, which sees no sinks."""
    if not hasattr(attention, "config") or "attention_mask" not in inspect.signature(attention.forward).parameters:
        raise ValueError(
            f"`attention_window` is {window}, but a {type(attention).__name__} does not attend through transformers' "
            "attention interface. Leave it out."
        )
    own = _own_window(attention)
    return {"attention_window": min(window, own), "attention_sinks": sinks if own == sys.maxsize else 0}


def _own_window(attention: nn.Module) -> int:
    """Tokens that an attention sees by itself, without sinks."""
    own, config = getattr(attention, "sliding_window", None), attention.config
    types, layer = getattr(config, "layer_types", None), getattr(attention, "layer_idx", None)
    if types and isinstance(layer, int) and "sliding" not in types[layer]:
        return sys.maxsize  # whatever the config says of other layers
    if not hasattr(attention, "sliding_window") and not types:
        own = getattr(config, "sliding_window", None)
    return own if isinstance(own, int) and own > 0 else sys.maxsize


@torch.no_grad()
def _silence(student: CABHybridPreTrainedModel) -> None:
    """Lets mixers beside a window say nothing."""
    for adapter in student.mixers.values():
        last = adapter.mixer.out_proj
        if adapter.window is not None:
            for weight in (adapter.mixer.norm if isinstance(last, nn.Identity) else last).parameters():
                weight.zero_()


def _check_windows(student: CABHybridPreTrainedModel, teacher: PreTrainedModel) -> None:
    """Lets windows see nine tokens: all of them as the teacher does, and fewer, all at once or in pieces.

    Raises:
        ValueError: either differs, where mixers say nothing.
    """
    tokens = tiny_batch(student, student.body).get("input_ids")
    windows = [adapter.window for adapter in student.mixers.values() if adapter.window is not None]
    if tokens is None or not teacher.can_generate():
        raise ValueError(
            f"`attention_window` is given, but a {type(teacher).__name__} generates no "
            "text. Leave it out, or make a student of the causal model: a classifier can be loaded from its folder."
        )
    sizes = [(window.window, window.sinks) for window in windows]
    tokens = tokens[:1].repeat(1, 5)[:, :9]

    def logits(window: int, pieces: tuple[int, ...]) -> Tensor:
        for one in windows:
            one.window, one.sinks = min(window, _own_window(one.attention)), min(one.sinks, 2)
        cache, said = None, []
        for piece in tokens.split(pieces, dim=1):
            output = student(piece, cache=cache, use_cache=True)
            cache = output.cache
            said.append(output.logits)
        return torch.cat(said, dim=1)

    handles = [mixer.out_proj.register_forward_hook(nothing) for mixer in student.mixer_list]
    student._decodes = False  # by captured tokens
    try:
        with evaluating(teacher), torch.no_grad():
            wanted = teacher(tokens.to(teacher.device)).logits.to(tokens.device, torch.float32)
            pairs = [(logits(9, (9,)), wanted), (logits(3, (1, 1, 4, 1, 1, 1)), logits(3, (9,)))]
        errors = [float((one - other).norm() / other.norm()) for one, other in pairs]
        reason = f"a whole window gives an error of {errors[0]:.2g}, one that moves {errors[1]:.2g}"
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        errors, reason = [float("inf")], f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    finally:
        del student._decodes
        for handle in handles:
            handle.remove()
        for one, (window, sinks) in zip(windows, sizes):
            one.window, one.sinks = window, sinks
    rounded = 1e-3 if student.device.type == "cpu" else 1e-2  # products in tf32
    if not (errors[-1] < rounded and errors[0] < (rounded if teacher.dtype == torch.float32 else 0.1)):
        raise ValueError(
            f"`attention_window` is given, but the attention of a {type(teacher).__name__} does not work within one "
            f"({reason}). Leave it out."
        )


def nothing(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    """A forward hook by which a module gives zero."""
    return torch.zeros_like(output)


def _copied(
    teacher: PreTrainedModel, student_class: type[CABHybridPreTrainedModel], config: CABHybridConfig
) -> CABHybridPreTrainedModel:
    """A copy of all but the attention that mixers stand for, and mixers that hold nothing yet."""
    body, memo = body_of(teacher), {}
    for path, window in zip(config.mixers, config.windows):
        if window:
            continue
        attention = body.get_submodule(path)
        for part in (*attention.children(), *attention.parameters(recurse=False), *attention.buffers(recurse=False)):
            memo[id(part)] = part
    inner = copy.deepcopy(teacher, memo)
    before = inner.config.get_text_config()._attn_implementation
    if before is not None and base_of(before) != before:
        inner.set_attn_implementation(base_of(before))
    with torch.device("meta"), no_init_weights():
        student = student_class(config, inner)
    for adapter in student.mixers.values():
        adapter.mixer.to_empty(device=teacher.device)
    for module in inner.modules():
        module._is_hf_initialized = True
    return student


def _measure(student: CABHybridPreTrainedModel) -> None:
    """Notes in a student's config what one forward pass on packed documents tells of its head and of packing."""
    config, head = student.config, student.get_output_embeddings()
    seen: list[Tensor] = []
    handle = student.body.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    tokens = tiny_batch(student, student.body).get("input_ids")
    try:
        if tokens is None:
            return
        config.packs_documents = True
        start, other, end = tokens[:1].split((1, 1, 3), dim=1)
        rows = torch.cat([torch.cat(parts, 1) for parts in ((start, end), (other, end), (end, start))])
        seq_idx = torch.tensor([[0, 1, 1, 1]] * 2 + [[0, 0, 0, 1]], device=rows.device)
        packed = True
        try:
            output = student(rows, seq_idx=seq_idx)
        except (TypeError, ValueError, RuntimeError):
            packed = config.packs_documents = False
            output = student(rows)
    finally:
        handle.remove()
    said = seen[-1] if seen else output[0]
    behind, behind_other, alone = said[0, 1:], said[1, 1:], said[2, :3]
    errors = [float((behind - other).norm() / behind.norm()) for other in (behind_other, alone)]
    logits = output.get("logits")
    if head is not None and logits is not None and student.body is not student.inner:
        # Some heads call a part of the body, whose hook never runs.
        own = {"seq_idx": seq_idx} if packed else {}
        config.has_plain_head = True
        last = seen[-1] if seen else student.read(input_ids=rows, **own)[0]
        config.has_plain_head = torch.equal(head(last), logits)
    config.packs_documents = packed and max(errors) < 1e-3
