"""What tiny batches tell of a model before it teaches: that its attention can be read, and what its head is.

A model that can't teach is refused here, by what it does and not by its name.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from cab_hf.inference import reads_ahead
from cab_hf.teachers.attention_interface import AttentionCall, base_of, collected_calls, register_recording
from cab_hf.teachers.named_attention import is_cross_attention, named_calls, named_modules
from cab_hf.teachers.rotary import RotaryPlan, find_plan, recorded_tables, relative_error


_WORKING = "Llama, Mistral, Qwen, Gemma, Phi, GPT-2, GPT-NeoX, OPT, BERT, ViT, DeiT, DINO, CLIP and others like them"
Run = Callable[..., ModelOutput]
"""`run(module, inputs, **asked)`: a forward pass of the model or its body, as the teacher makes it."""


@dataclass(frozen=True)
class Examination:
    """
    Attributes:
        paths: of the attention modules inside the body that can be read, in the order of their calls.
        sizes: (heads, key heads, features of a head) of each.
        scalings: factor of `query @ key.T` of each.
        shown_by: "outputs" where every layer attends, and `output_attentions` hands all of it out; "calls" of the
            attention interface, or "names" of projections, where attention is collected module by module.
        obstacle: why no attention can be read, or that of some layers can't; None if all can.
        head: the output embeddings, where `logits == head(last_hidden_state)` exactly.
        has_logits: whether the whole model gives logits; of images one row each.
        norms_last_hidden_state: whether the last of the hidden states has gone through the final norm.
        is_causal: whether no output depends on the tokens behind it.
        isolates: whether packed documents whose positions restart are kept apart.
    """

    paths: tuple[str, ...]
    sizes: tuple[tuple[int, int, int], ...]
    scalings: tuple[float, ...]
    shown_by: Literal["outputs", "calls", "names"]
    obstacle: str | None
    head: nn.Module | None
    has_logits: bool
    norms_last_hidden_state: bool
    is_causal: bool
    isolates: bool


def named(model: PreTrainedModel) -> str:
    """A teacher, as messages call it."""
    return f"The teacher {type(model).__name__} (model_type {model.config.model_type!r})"


def check_whole(name: str, model: nn.Module) -> None:
    """That it is a model all of whose weights are at hand: a teacher answers on every process, and is copied from.

    Raises:
        ValueError: a name, another object, or weights that are offloaded or sharded.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"The {name} is {model!r}, and not a model. Load it first, for instance by "
            "AutoModelForCausalLM.from_pretrained or AutoModelForImageClassification.from_pretrained."
        )
    empty = [key for key, parameter in model.named_parameters() if parameter.is_meta or parameter.numel() == 0]
    if not empty:
        return
    if any("_hf_hook" in vars(module) for module in model.modules()):
        raise ValueError(
            f"The {name}'s weights, such as {empty[0]!r}, are offloaded: accelerate brings them only for a forward "
            "pass (`device_map`, `cpu_offload`). Load the model whole, with device_map='cpu' or without a device_map."
        )
    raise ValueError(
        f"The {name}'s weights, such as {empty[0]!r}, are not on this process: ZeRO-3, or FSDP's "
        "`cpu_ram_efficient_loading`, took them away as it was loaded, or it was made on the meta device. Load it "
        "after the DistillationTrainingArguments are made, and set `fsdp_cpu_ram_efficient_loading: false` in "
        "accelerate's config."
    )


@torch.no_grad()
def examine(model: PreTrainedModel, body: PreTrainedModel, base: str | None, run: Run) -> Examination:
    """Switches a body to recording attention, if it follows, and proves that it records and changes nothing.

    Args:
        model: the whole teacher.
        body: its `body_of`.
        base: the attention implementation to record.
        run: as the teacher will run them.

    Raises:
        ValueError: an encoder-decoder, another output under recording, or a failure on a tiny batch.
    """
    if model.config.is_encoder_decoder and "decoder_input_ids" in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"{named(model)} is an encoder-decoder, and its decoder attends to two sequences. Pass its encoder, or a "
            f"decoder-only or encoder-only teacher; these work: {_WORKING}."
        )
    if base is None or base.startswith("paged|"):
        raise ValueError(
            f"{named(model)} has attention implementation {base!r}. Load the teacher with attn_implementation='sdpa' "
            "or 'eager'."
        )
    config = body.config.get_text_config()
    batch = tiny_batch(model, body)
    plain = tried(model, run, body, batch)
    asked = {"output_attentions": True} if _switch(body, base) else {}
    with _norms_recorded(body) as normed, collected_calls() as calls:
        output = tried(model, run, body, batch, output_hidden_states=True, **asked)
    is_named = not calls
    if is_named:
        body.set_attn_implementation(base)
        with named_calls(named_modules(body)) as calls:
            tried(model, run, body, batch)
    lacking = [part for part in ("last_hidden_state", "hidden_states") if output.get(part) is None]
    if lacking:
        raise ValueError(hidden(model, f"no part of it hands out {lacking}, only {list(output)}"))
    expected, last = plain.last_hidden_state, output.last_hidden_state
    shown, reasons = attending(body, calls, len(expected))
    obstacle = None if calls else "0 of its 0 attention outputs can be read"
    for path, reason in reasons.items():
        obstacle = f"at {path!r} {reason}"
    given = [call for call in output.get("attentions") or () if isinstance(call, AttentionCall)]
    depth = getattr(config, "num_hidden_layers", None)
    is_whole = len(given) == len(output.get("attentions") or ()) == len(calls) == depth
    shown_by = "names" if is_named else "outputs" if is_whole and len(shown) == len(calls) else "calls"
    seen = list(shown.values())
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 2e-2
    error = relative_error(last, expected)
    if not error <= tolerance:
        raise ValueError(
            f"{named(model)} gives another output when its attention is recorded (relative difference {error:.2e}, at "
            f"most {tolerance:.0e}). It treats attention implementation {base!r} specially; load it with another "
            "attn_implementation ('sdpa' or 'eager')."
        )
    has_logits, head = _find_head(model, run, batch, last) if body is not model else (False, None)
    takes_positions = "position_ids" in inspect.signature(body.forward).parameters
    sizes = tuple((query.shape[1], key.shape[1], query.shape[3]) for (query, key, _), _ in seen)
    return Examination(
        paths=tuple(shown),
        shown_by=shown_by,
        obstacle=obstacle,
        sizes=sizes,
        scalings=tuple(size[2] ** -0.5 if call.scaling is None else call.scaling for call, size in zip(seen, sizes)),
        head=head,
        has_logits=has_logits,
        norms_last_hidden_state=any(
            isinstance(x, Tensor) and torch.equal(x, output.hidden_states[-1]) for x in normed
        ),
        is_causal=model.main_input_name == "input_ids"
        and not reads_ahead(
            lambda tokens: tried(model, run, body, {"input_ids": tokens}).last_hidden_state,
            config.vocab_size,
            model.device,
        ),
        isolates=takes_positions and _keeps_documents_apart(model, body, run, batch, tolerance),
    )


def _implementations(body: PreTrainedModel) -> Callable[[], None]:
    """What gives each part its attention implementation back: set by name, some would refuse it."""
    parts = [part for part in body.modules() if isinstance(part, PreTrainedModel)]
    before = [(part.config, part.config._attn_implementation) for part in parts]

    def restore() -> None:
        for config, name in before:
            config._attn_implementation = name

    return restore


def _switch(body: PreTrainedModel, base: str) -> bool:
    """Switches to recording attention; False, and as it was, where the model does not follow the interface."""
    recording, restore = register_recording(base), _implementations(body)
    try:
        body.set_attn_implementation(recording)
    except (ValueError, AttributeError, ImportError):  # parts of it refuse any other
        restore()
        return False
    return body.config.get_text_config()._attn_implementation == recording


@contextmanager
def recorded(body: PreTrainedModel) -> Iterator[None]:
    """Attention that the block can collect or answer, of a model that follows the interface."""
    before, restore = base_of(body.config.get_text_config()._attn_implementation or "eager"), _implementations(body)
    try:
        _switch(body, before if before in ("sdpa", "eager") else "sdpa")
        yield
    finally:
        restore()


def attending(
    body: PreTrainedModel, calls: list[tuple[nn.Module, AttentionCall]], rows: int | None = None
) -> tuple[dict[str, AttentionCall], dict[str, str]]:
    """The modules that attend once in a pass, by path, and why others can't be read; with `rows`, none in windows."""
    paths = {id(module): path for path, module in body.named_modules()}
    counts = Counter(id(module) for module, _ in calls)
    shown: dict[str, AttentionCall] = {}
    reasons: dict[str, str] = {}
    for module, call in calls:
        path, query, key = paths.get(id(module), ""), call.attention.query, call.attention.key
        if is_cross_attention(path):
            continue
        elif rows not in (None, len(query)):
            return {}, {path: f"it attends inside {len(query)} windows of {rows} inputs"}
        elif counts[id(module)] > 1:
            reasons[path] = f"it attends {counts[id(module)]} times in one pass"
        elif query.ndim != 4 or key.ndim != 4:
            reasons[path] = f"it has queries of {query.ndim} dimensions"
        else:
            shown[path] = call
    return shown, reasons


def _find_head(
    model: PreTrainedModel, run: Run, batch: dict[str, Tensor], last_hidden_state: Tensor
) -> tuple[bool, nn.Module | None]:
    """Whether the whole model gives logits (of images: one row each), and its head where that alone makes them."""
    head = model.get_output_embeddings()
    if head is None:
        # Without a padding token a classifier of texts takes only one at a time.
        batch = {name: value[:1] for name, value in batch.items()}
    logits = tried(model, run, model, batch).get("logits")
    has_logits = logits is not None and (logits.ndim == 2 or model.main_input_name != "pixel_values")
    is_plain = has_logits and head is not None and torch.equal(head(last_hidden_state), logits)
    return has_logits, head if is_plain else None


def _keeps_documents_apart(
    model: PreTrainedModel, body: PreTrainedModel, run: Run, batch: dict[str, Tensor], tolerance: float
) -> bool:
    """Whether the second of two packed documents ignores the first: some models do not see restarts."""
    tokens = batch[model.main_input_name]
    positions = torch.tensor([[0, 1, 2, 0, 1]], device=tokens.device).expand_as(tokens)
    outputs = []
    for first in (tokens[:, :3], tokens[:, :3].flip(0)):
        packed = {model.main_input_name: torch.cat((first, tokens[:, 3:]), dim=1), "position_ids": positions}
        outputs.append(tried(model, run, body, packed).last_hidden_state[:, 3:])
    return relative_error(*outputs) <= tolerance


@torch.no_grad()
def find_rotary(model: PreTrainedModel, body: PreTrainedModel, run: Run) -> RotaryPlan:
    """How the rotary embedding of an examined teacher's queries and keys is undone.

    Raises:
        ValueError: it has none, or one in an unknown layout.
    """
    if "position_ids" not in inspect.signature(body.forward).parameters:
        raise ValueError(
            f"remove_rotary=True, but {named(model)} takes no position_ids to find a rotation by, and one by an "
            "image's coordinates stays. Set it to False."
        )
    batch = tiny_batch(model, body)
    tokens = batch[model.main_input_name]
    runs, all_tables = [], []
    for start in (0, min(64, body.config.get_text_config().max_position_embeddings - tokens.shape[1])):
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device).expand(2, -1)
        with recorded_tables(body) as tables:
            seen = run(body, batch | {"position_ids": positions}, output_attentions=True).attentions
        if not tables:
            raise ValueError(
                f"remove_rotary=True, but {named(model)} has no rotary_emb module: it has no rotary embedding, or one "
                "that can't be read. Set remove_rotary=False."
            )
        runs.append([call.attention[:2] for call in seen])
        all_tables.append(tables)
    plan = find_plan(runs, all_tables)
    tolerance = 1e-2 if runs[0][0][1].dtype in (torch.float32, torch.float64) else 0.2
    if not plan.error <= tolerance:
        raise ValueError(
            f"remove_rotary=True, but no known layout undoes the rotary embedding of {named(model)}: unrotated keys "
            f"or queries still depend on the position (relative difference {plan.error:.2e}, at most "
            f"{tolerance:.0e}). Known are halves and interleaved pairs at the start of a head. Set "
            "remove_rotary=False."
        )
    if all(index is None for index in plan.tables):
        raise ValueError(f"remove_rotary=True, but no layer of {named(model)} rotates its keys: set it to False.")
    return plan


def tiny_batch(model: PreTrainedModel, body: PreTrainedModel) -> dict[str, Tensor]:
    """Two rows of five tokens, or two images, on the model's device."""
    name, values = model.main_input_name, body.config.get_text_config().to_dict()
    vocab_size = values.get("vocab_size")
    if name == "input_ids" and vocab_size is not None:
        tokens = 3 + torch.arange(2 * 5).view(2, 5) * 7
        return {"input_ids": (tokens % vocab_size).to(model.device)}
    if name == "pixel_values":
        # Models for images of any size may name none.
        size, channels = values.get("image_size") or 64, values.get("num_channels", 3)
        height, width = (size, size) if isinstance(size, int) else size
        pixels = torch.linspace(-1, 1, 2 * channels * height * width).sin()
        return {"pixel_values": pixels.view(2, channels, height, width).to(model.device)}
    raise ValueError(
        f"{named(model)} takes {name!r} and has vocab_size {vocab_size}; a tiny batch can only be made of "
        f"'pixel_values', or of 'input_ids' with a vocab_size. These work: {_WORKING}."
    )


def tried(
    model: PreTrainedModel, run: Run, module: PreTrainedModel, batch: Mapping[str, Tensor], **asked: bool
) -> ModelOutput:
    """A forward pass on a tiny batch.

    Raises:
        ValueError: whatever a stranger's code raises there: this teacher can't teach.
    """
    try:
        return run(module, batch, **asked)
    except Exception as error:
        shapes = {name: tuple(value.shape) for name, value in batch.items()}
        raise ValueError(
            f"{named(model)} fails on a tiny batch {shapes}, by {type(error).__name__}: {error}. A teacher must run "
            f"on its {model.main_input_name!r} alone; these work: {_WORKING}."
        ) from error


def hidden(model: PreTrainedModel, reason: str) -> str:
    """What is said where a teacher's attention is asked for that can't be read."""
    return (
        f"{named(model)} hides its attention: {reason}. Queries and keys can be read from models that support "
        f"set_attn_implementation; these work: {_WORKING}. Losses without attention do not need a Teacher."
    )


@contextmanager
def _norms_recorded(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what the model's norms return inside the block."""
    outputs: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda module, args, output: outputs.append(output))
        for module in model.modules()
        if "norm" in type(module).__name__.lower() and not any(module.children())
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
