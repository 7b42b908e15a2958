"""Reads the projections of any attention by asking it: no family is known here.

transformers' attention interface says which modules attend, and shows their queries, keys and values. Each module is
called alone, on one token at position 0 (a rotary embedding does nothing there). A projection that a linear layer
inside explains is that layer's weight. Any other is what the module makes of unit vectors; norms inside are replaced
by what is linear in them. Answered with vectors in attention's place, the module shows its output projection.

All four are then verified on random input, and what is not linear is refused with its error.

Shapes: `b` batch, `t` token, `h` head, `p` features of a head, `d` width, `n` features of a linear layer.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from cab_hf.inference import evaluating
from cab_hf.models.students import body_of
from cab_hf.teachers.attention_interface import answered, collected_calls
from cab_hf.teachers.examination import attending, named, recorded, tiny_batch, tried
from cab_hf.teachers.named_attention import named_modules, named_projections, num_heads
from cab_hf.transfer.families import Affine, read_affine, refuse_codes


logger = logging.get_logger(__name__)

PARTS = ("value", "key", "query", "output")
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Largest relative error of a projection on random input; half precision and quantised weights have `ROUNDED`."""
ROUNDED = 3e-2
_ROWS, _UNITS_AT_ONCE = 8, 1024
_INPUTS = ("hidden_states", "x", "hidden_state", "inputs", "input", "query_states")


@dataclass
class Reading:
    """What one attention module was read to be.

    Attributes:
        path: of the module inside the model's body.
        heads, head_dim, key_dim: query heads, width of a value, width of a key.
        hidden_size, output_size: what it reads and writes; `output_size` is None where its output projection stands
            outside.
        query, key, value: from the hidden states, `(h * p, d)`; grouped ones have fewer heads.
        output: from the heads, `(output_size, h * p)`; None where it stands outside.
        scaling: factor of `query @ key.T`.
        causal: whether an output depends on no later token.
        call: how it is called and answers: `argument`, `returned`, `cache_layer`.
        errors: relative error of each projection on random input, 0 where a linear layer explains it.
    """

    path: str
    heads: int
    head_dim: int
    key_dim: int
    hidden_size: int
    output_size: int | None
    query: Affine
    key: Affine
    value: Affine
    output: Affine | None
    scaling: float
    causal: bool
    call: dict[str, Any]
    errors: dict[str, float] = field(default_factory=dict)


class _Call(NamedTuple):
    """One call of attention: query `(b, h, t, p)`, key and value `(b, h_kv, t, p)`, and what it was answered."""

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float | None
    answer: Tensor  # (b, t, h, p)


@dataclass
class Site:
    """An attention module, and the arguments of one call of it."""

    path: str
    module: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    output: Any = None

    @functools.cached_property
    def argument(self) -> str | None:
        """Keyword of the hidden states; None where they are the first positional argument."""
        if self.args and isinstance(self.args[0], Tensor):
            return None
        return next(name for name in (*_INPUTS, *self.kwargs) if isinstance(self.kwargs.get(name), Tensor))

    @property
    def hidden_states(self) -> Tensor:
        return self.args[0] if self.argument is None else self.kwargs[self.argument]

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """The module's output for other hidden states `(b, t, d)`, without a cache and with no token rotated."""
        rows = hidden_states.shape[0]
        args = tuple(_for_rows(value, rows) for value in self.args)
        kwargs = {name: _for_rows(value, rows) for name, value in self.kwargs.items()}
        return self._call(hidden_states, args, kwargs)

    def again(self, hidden_states: Tensor) -> Tensor:
        """The module's output for other hidden states `(b, t, d)`, called as it was."""
        return self._call(hidden_states, self.args, dict(self.kwargs))

    def _call(self, hidden_states: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        if self.argument is None:
            args = (hidden_states, *args[1:])
        else:
            kwargs[self.argument] = hidden_states
        return first(self.module(*args, **kwargs))


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _for_rows(value: Any, rows: int) -> Any:
    """An argument of a call of one row, for a call of several."""
    if isinstance(value, Cache):
        return None
    if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == 1:
        return value.expand(rows, *value.shape[1:])
    if isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(one, Tensor) for one in value):
        cos, sin = value
        if cos.shape == sin.shape and cos.is_floating_point():
            # Images have no position 0: of a rotation only its factor is kept.
            value = ((cos.square() + sin.square()).sqrt(), torch.zeros_like(sin))
    if isinstance(value, tuple | list):
        return type(value)(_for_rows(one, rows) for one in value) if type(value) in (tuple, list) else value
    return value


@torch.no_grad()
def read_attention(model: PreTrainedModel) -> tuple[dict[str, Reading], dict[str, str]]:
    """Finds the attention modules of a model and reads what they compute.

    Args:
        model: any model of transformers, whole, on its device and in its dtype; left as it was.

    Returns:
        Readings by the module's path inside the model's body, in the order of their calls; and what was left out, by
        path, with the reason. Cross-attention is in neither.

    Raises:
        ValueError: it fails on a tiny batch, or no module of it attends.

    Example:
        >>> from cab_hf.teachers.demo import random_llama
        >>> readings, left_out = read_attention(random_llama()[0])
        >>> readings["layers.0.self_attn"].errors["key"]
        0.0
    """
    body = body_of(model)
    for module in body.modules():
        if "in_features" in vars(module):
            refuse_codes(module)
    several = {name: x[:1] for name, x in tiny_batch(model, body).items()}
    one = {name: x[:, :1] if name == "input_ids" else x for name, x in several.items()}
    modules = {path: module for path, module in body.named_modules() if any(module.children())}

    def run(part: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
        return part(**inputs)

    readings: dict[str, Reading] = {}
    with evaluating(model), recorded(body):
        with collected_calls() as calls, called(modules) as single:
            tried(model, run, body, one)
        found, left_out = attending(body, calls)
        read = _read if calls else _read_by_name
        modules = {path: body.get_submodule(path) for path in found} if calls else named_modules(body)
        with called(modules) as whole:
            tried(model, run, body, several)
        if not calls:  # the first pass may have put others in their place
            with called(modules) as single:
                tried(model, run, body, one)
        for index, path in enumerate(found if calls else single):
            if path not in single or path not in whole:
                left_out[path] = "it is not called in every pass"
                continue
            try:
                readings[path] = read(single[path], whole[path])
            except _NotLinear as reason:
                left_out[path] = str(reason)
            else:
                layer = getattr(single[path].module, "layer_idx", None)
                readings[path].call["cache_layer"] = index if layer is None else layer
    if not readings and not left_out:
        raise ValueError(
            f"{named(model)} shows no attention: none of its modules calls transformers' attention interface, and "
            "none has query, key and value under usual names."
        )
    return readings, left_out


def read_layers(model: PreTrainedModel, accept_inexact: float = 0.0) -> list[Reading]:
    """Readings of a model whose layers all attend, one a layer.

    Raises:
        ValueError: attention that can't be read, or not exactly.
    """
    readings, left_out = read_attention(model)
    check_readings(model, readings, left_out, accept_inexact)
    return list(readings.values())


def check_readings(
    model: PreTrainedModel, readings: Mapping[str, Reading], left_out: Mapping[str, str], accept_inexact: float = 0.0
) -> None:
    """That what stands for attention was read, and exactly.

    Args:
        model: the teacher.
        readings: of what a mixer will stand for.
        left_out: of that what was not read, with the reason.
        accept_inexact: largest relative error that is taken all the same.

    Raises:
        ValueError: the first that was not read, or the worst; the message holds its path and number.
    """
    way_out = "Keep it as attention (`keep_attention`)"
    for path, reason in left_out.items():
        raise ValueError(f"{named(model)} can't be read at {path!r}: {reason}. {way_out}.")
    errors = {(path, part): error for path, one in readings.items() for part, error in one.errors.items()}
    (path, part), worst = max(errors.items(), key=lambda item: item[1])
    if worst > max(exactness(model), accept_inexact):
        raise ValueError(
            f"{named(model)} is not linear at {path!r}: on random input its {part} is off by {worst:.1%}, as where a "
            f"norm or gate stands inside. {way_out}, or accept it: `accept_inexact={worst * 1.1:.2g}`."
        )


def exactness(model: PreTrainedModel) -> float:
    """Largest relative error of what counts as exactly read."""
    is_quantised = vars(model).get("hf_quantizer") is not None
    return ROUNDED if is_quantised else TOLERANCES.get(model.dtype, ROUNDED)


class _NotLinear(ValueError):
    """Why a module's attention can't be taken for projections around attention."""


@contextmanager
def called(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Site]]:
    """How each module is first called inside the block, by path."""
    sites: dict[str, Site] = {}

    def note(path: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        sites.setdefault(path, Site(path, module, args, dict(kwargs), output))

    with ExitStack() as stack:
        for path, module in modules.items():
            handle = module.register_forward_hook(functools.partial(note, path), with_kwargs=True)
            stack.callback(handle.remove)
        yield sites


def _ask(site: Site, hidden_states: Tensor, answer: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, _Call]:
    """The module's output, and its call of attention, which `answer` makes of query and value."""
    calls = []

    def note(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        calls.append(_Call(query, key, value, scaling, answer(query, value)))
        return calls[-1].answer

    with answered(note):
        output = site(hidden_states)
    if not calls:
        raise _NotLinear("it attends in other modules' passes only")
    return output, calls[0]


def _read(single: Site, whole: Site) -> Reading:
    hidden = single.hidden_states
    if hidden.ndim != 3:
        raise _NotLinear(f"it reads {hidden.ndim} dimensions")
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(2 * _ROWS, *hidden.shape[1:], generator=generator).to(hidden.device, hidden.dtype)

    def half_silent(query: Tensor, value: Tensor) -> Tensor:
        size = (query.shape[0], query.shape[2], query.shape[1], value.shape[3])
        answers = torch.randn(size, generator=generator).to(value)
        answers[:_ROWS] = 0
        return answers

    with _linears_recorded(single.module) as linears:
        output, call = _ask(single, noise, half_silent)
    heads, key_dim, head_dim = call.query.shape[1], call.query.shape[3], call.value.shape[3]
    if call.query.shape[0] != len(noise) or call.query.shape[2] != hidden.shape[1]:
        raise _NotLinear(f"it reads {tuple(noise.shape)} and attends over {tuple(call.query.shape)}")
    silent = output[:_ROWS]
    change = _relative(silent[:1].expand_as(silent), silent)
    if change > 1e-3 and silent.norm() > 1e-6:
        raise _NotLinear(f"a residual stands inside of it: without attention its output still moves by {change:.0%}")
    seen = {name: getattr(call, name).transpose(1, 2).flatten(2) for name in ("query", "key", "value")}
    seen = {name: x if len(x) == len(noise) else x[:1].expand(len(noise), -1, -1) for name, x in seen.items()}
    maps = {name: _explained(noise, seen[name], linears, getattr(call, name).shape[3]) for name in seen}
    errors = dict.fromkeys(PARTS, 0.0)
    if None in maps.values():
        made = _answers_to_units(single, noise)
        for name in [name for name, affine in maps.items() if affine is None]:
            maps[name] = _affine(made[name])
            error = _relative(_apply(maps[name], noise), seen[name])
            if name != "value":
                error = min(error, _up_to_length(_apply(maps[name], noise), seen[name], key_dim))
            # Another layer's keys and values, which do not follow the input, are no map of it.
            errors[name] = 1.0 if torch.equal(seen[name][0], seen[name][1]) else error
    flat = call.answer.flatten(2)
    outside = output.shape == flat.shape and torch.equal(output, flat)
    maps["output"] = None
    if not outside:
        known = (read_affine(child) for child, x, y in linears if _same(x, flat) and _same(y, output))
        maps["output"] = next(known, None) or _affine(_outputs_of_units(single, noise, flat, heads))
        errors["output"] = _relative(_apply(maps["output"], flat), output)
    return Reading(
        path=single.path,
        heads=heads,
        head_dim=head_dim,
        key_dim=key_dim,
        hidden_size=hidden.shape[2],
        output_size=None if outside else output.shape[2],
        scaling=key_dim**-0.5 if call.scaling is None else float(call.scaling),
        causal=_is_causal(whole),
        call={"argument": single.argument, "returned": _returned(single.output)},
        errors=errors,
        **maps,
    )


def _returned(output: Any) -> int:
    return 0 if isinstance(output, Tensor) else len(output)


def _same(one: Tensor, other: Tensor) -> bool:
    return (
        one.shape[-1] == other.shape[-1]
        and one.numel() == other.numel()
        and torch.equal(one.reshape(-1), other.reshape(-1))
    )


def _relative(read: Tensor, seen: Tensor) -> float:
    return float((read.double() - seen.double()).norm() / (seen.double().norm() + 1e-12))


def _up_to_length(read: Tensor, seen: Tensor, head_dim: int) -> float:
    """The error where a norm behind a projection may have given each head's vector another length."""
    read, seen = (x.double().unflatten(-1, (-1, head_dim)) for x in (read, seen))
    factor = (read * seen).sum(-1, keepdim=True) / (read.square().sum(-1, keepdim=True) + 1e-30)
    return _relative(read * factor.clamp(min=0), seen)


def _apply(affine: Affine, x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x.to(affine.weight.dtype), *affine)


def _affine(answers: Tensor) -> Affine:
    """The map whose answers to zero and then to the unit vectors are `(1 + d, n)`."""
    bias = answers[0].clone()
    return Affine((answers[1:] - bias).T.contiguous(), bias if bias.any() else None)


def _units(size: int, like: Tensor) -> Iterator[Tensor]:
    """A zero vector and the unit vectors, `(rows, size)` at a time."""
    for index in torch.arange(size + 1, device=like.device).split(_UNITS_AT_ONCE):
        yield (index[:, None] == 1 + torch.arange(size, device=like.device)).to(like.dtype)


def _answers_to_units(site: Site, noise: Tensor) -> dict[str, Tensor]:
    """What a module shows of zero and the unit vectors, `(1 + d, h * p)` of each projection, its norms linear."""
    rows: dict[str, list[Tensor]] = {"query": [], "key": [], "value": []}
    with _linear_norms(site.module):
        for units in _units(noise.shape[2], noise):
            silence = _ask(site, units[:, None].expand(-1, noise.shape[1], -1), _silence)[1]
            for name, parts in rows.items():
                shown = getattr(silence, name)[:, :, 0].flatten(1)
                parts.append(shown if len(shown) == len(units) else shown[:1].expand(len(units), -1))
    return {name: torch.cat(parts) for name, parts in rows.items()}


def _silence(query: Tensor, value: Tensor) -> Tensor:
    return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


def _outputs_of_units(site: Site, noise: Tensor, flat: Tensor, heads: int) -> Tensor:
    """What a module makes of zero and the unit vectors in attention's place, `(1 + h * p, n)`."""
    rows = []
    for units in _units(flat.shape[2], flat):
        answer = units[:, None].expand(-1, noise.shape[1], -1).unflatten(2, (heads, -1))
        zeros = noise.new_zeros(len(units), *noise.shape[1:])
        rows.append(_ask(site, zeros, lambda query, value, answer=answer: answer)[0][:, 0])
    return torch.cat(rows)


@contextmanager
def _linears_recorded(module: nn.Module) -> Iterator[list[tuple[nn.Module, Tensor, Tensor]]]:
    """Collects the linear layers inside that are called, with their input and output."""
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []

    def note(child: nn.Module, args: tuple, output: Any) -> None:
        if args and isinstance(output, Tensor):
            seen.append((child, args[0], output))

    kinds = (nn.Linear, Conv1D)
    handles = [
        child.register_forward_hook(note)
        for child in module.modules()
        if isinstance(child, kinds) or hasattr(child, "in_features")
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _explained(
    noise: Tensor, seen: Tensor, linears: list[tuple[nn.Module, Tensor, Tensor]], head_dim: int
) -> Affine | None:
    """The rows of a linear layer that are what was seen `(b, t, h * p)`, head by head in any order; else None."""
    wanted = seen.flatten(0, 1).unflatten(1, (-1, head_dim))  # (r, h, p)
    for child, x, y in linears:
        if not _same(x, noise) or y.shape[-1] % head_dim or y.shape[-1] < seen.shape[-1]:
            continue
        blocks = y.reshape(len(wanted), -1, head_dim)  # (r, n / p, p)
        # The first feature tells which block it can be; the whole is compared below.
        fits = (wanted[:, :, None, 0] == blocks[:, None, :, 0]).all(0)  # (h, n / p)
        if not fits.any(1).all():
            continue
        index = fits.int().argmax(1)
        if torch.equal(blocks[:, index], wanted):
            first, last = index[0].item(), index[-1].item() + 1
            if index.tolist() == list(range(first, last)):
                index = slice(first, last)  # in one piece: no copy
            return Affine(
                *(x if x is None else x.unflatten(0, (-1, head_dim))[index].flatten(0, 1) for x in read_affine(child))
            )
    return None


@contextmanager
def _linear_norms(module: nn.Module) -> Iterator[None]:
    """The norms inside a module give what is linear in them: a product with their weights."""
    handles = []
    for child in module.modules():
        parameter = next(child.parameters(recurse=False), None)
        if child is module or "norm" not in type(child).__name__.lower() or any(child.children()):
            continue
        signs = torch.ones(1 if parameter is None else parameter.shape[-1:])
        signs[1::2] = -1  # of mean 0 and size 1: norms leave it alone
        linear = None
        if parameter is not None:
            signs = signs.expand(parameter.shape).to(parameter)
            signs = signs.view((1,) * (4 - signs.ndim) + signs.shape)
            try:
                plus, minus = child(signs), child(-signs)
            except (TypeError, RuntimeError):
                continue  # it takes more than its input, and stays what it is
            linear = ((plus - minus) / 2 * signs, (plus + minus) / 2)
        handles.append(child.register_forward_hook(functools.partial(_as_linear, linear)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _as_linear(linear: tuple[Tensor, Tensor] | None, child: nn.Module, args: tuple, output: Any) -> Any:
    if linear is None:
        return args[0]
    scale, shift = (one.view(one.shape[4 - max(args[0].ndim, 1) :]) for one in linear)
    return args[0] * scale + shift


def _is_causal(site: Site) -> bool:
    """Whether the first output stays when all later tokens change."""
    hidden = site.hidden_states
    if hidden.shape[1] < 2:
        return False
    noise = torch.randn(2, *hidden.shape[1:], generator=torch.Generator().manual_seed(5)).to(hidden)
    noise[1, 0] = noise[0, 0]
    one, other = site(noise)[:, 0]
    return _relative(one, other) < TOLERANCES.get(hidden.dtype, ROUNDED)


def _read_by_name(single: Site, whole: Site) -> Reading:
    """Of a module that computes attention itself: what its children would compute must be what it computes."""
    module, hidden = single.module, whole.hidden_states
    children = named_projections(module)
    affine = {part: None if child is None else read_affine(child) for part, child in children.items()}
    heads = num_heads(module)
    if hidden.ndim != 3 or affine["query"].weight.shape[0] % heads:
        raise _NotLinear("it computes attention itself, over heads that are not told")
    key_dim = affine["query"].weight.shape[0] // heads
    head_dim = key_dim if affine["value"].weight.shape[0] % key_dim == 0 else affine["value"].weight.shape[0] // heads
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3)).to(hidden)
    seen, causal = whole(noise), _is_causal(whole)
    query, key, value = (
        _apply(affine[part], noise).unflatten(2, (-1, size)).transpose(1, 2)
        for part, size in (("query", key_dim), ("key", key_dim), ("value", head_dim))
    )
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    errors = {}
    for scaling in (key_dim**-0.5, 1.0):
        made = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scaling)
        made = made.transpose(1, 2).flatten(2)
        made = made if affine["output"] is None else _apply(affine["output"], made)
        errors[scaling] = _relative(made, seen) if made.shape == seen.shape else float("inf")
    scaling = min(errors, key=errors.get)
    # One token reads itself alone: its output is that of values and output projection, whatever the positions are.
    first = single.hidden_states
    noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(3)).to(first)
    made = _apply(affine["value"], noise).unflatten(2, (-1, head_dim))
    made = made.repeat_interleave(heads // made.shape[2], 2).flatten(2)
    made = made if affine["output"] is None else _apply(affine["output"], made)
    own = _relative(made, single(noise)) if made.shape == single(noise).shape else float("inf")
    return Reading(
        path=single.path,
        heads=heads,
        head_dim=head_dim,
        key_dim=key_dim,
        hidden_size=hidden.shape[2],
        output_size=None if affine["output"] is None else seen.shape[2],
        scaling=scaling,
        causal=causal,
        call={"argument": single.argument, "returned": _returned(single.output)},
        errors={"value": own, "output": own, "key": errors[scaling], "query": errors[scaling]},
        **affine,
    )
