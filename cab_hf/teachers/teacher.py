"""The teacher: a frozen Transformer that hands out queries, keys and attention outputs, as fast as it runs anyway.

Shapes: `b` batch, `t` token, `h` head, `p` head_dim, `d` width, `V` vocabulary.

Source: arXiv 2510.19266, section "Attention Bridge" (keys teach B, queries teach C).
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput, logging

from cab_hf.teachers.attention_interface import AttentionCall, base_of, register_recording
from cab_hf.teachers.rotary import RotaryPlan, find_plan, recorded_tables, relative_error, undo_rotary


logger = logging.get_logger(__name__)

_WORKING = "Llama, Mistral, Qwen, Gemma, Phi, GPT-2, GPT-NeoX, OPT, BERT, ViT, DeiT, DINO, CLIP and others like them"
# Entries that only a loss or the student reads: a teacher that accepts them would compute something else, or more.
_STUDENT_INPUTS = ("labels", "seq_idx", "cache", "cache_position")
# Vocabularies are padded to a multiple (64 to 512) or to a round number: Qwen2.5 by 271 or 399 rows, Phi by 905.
_MAX_VOCABULARY_PADDING = 1024


class TeacherAttention(NamedTuple):
    """What one layer's attention read and wrote.

    Attributes:
        query: `(b, h, t, p)`, as the attention takes it: after rotary embedding and query norm, before the scaling.
        key: `(b, h_kv, t, p)`, after rotary embedding and key norm, before it is repeated for grouped queries.
        output: `(b, t, h, p)`, before the output projection.
    """

    query: Tensor
    key: Tensor
    output: Tensor


@dataclass
class TeacherOutput:
    """One forward pass of the teacher. What was not asked for, or can't be had, is None.

    Attributes:
        last_hidden_state: `(b, t, d)` after the final norm, what the head takes. None when the logits had to come
            from the whole model (`Teacher.head` is None and `logits=True`).
        logits: `(b, t, V)`, or `(b, V)` of a classifier.
        attentions: one `TeacherAttention` a layer.
        hidden_states: `(b, t, d)` each: the embeddings, then every layer's output.
    """

    last_hidden_state: Tensor | None = None
    logits: Tensor | None = None
    attentions: tuple[TeacherAttention, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None


def _body_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part that reads the model's input and writes hidden states: the model itself where it has no head.

    `base_model` is another one in some: DINOv3's reads no pixels, BART's wraps the decoder, and a classifier on CLIP's
    vision tower has none.
    """
    for part in model.base_model.modules():
        if part is not model and isinstance(part, PreTrainedModel):
            if model.main_input_name in inspect.signature(part.forward).parameters:
                return part
    return model


def _sent(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A copy there, without waiting; the host alone would read such a copy before it has arrived."""
    return tensor.to(device, dtype, non_blocking=device.type != "cpu")


def positions_from_documents(seq_idx: Tensor) -> Tensor:
    """Position ids `(b, t)` that restart at 0 wherever `seq_idx` `(b, t)` changes."""
    index = torch.arange(seq_idx.shape[-1], device=seq_idx.device).expand_as(seq_idx)
    starts = torch.zeros_like(index)
    starts[:, 1:] = torch.where(seq_idx[:, 1:] != seq_idx[:, :-1], index[:, 1:], 0)
    return index - starts.cummax(dim=-1).values


def with_positions(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs with positions counted from the first real token: padding on the left would shift them."""
    mask = inputs.get("attention_mask")
    if mask is None or "position_ids" in inputs:
        return dict(inputs)
    return {**inputs, "position_ids": ((mask != 0).long().cumsum(dim=-1) - 1).clamp(min=0)}


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


class Teacher:
    """A pretrained Transformer that teaches: in eval mode, without gradients, and with its attention readable.

    It is no `nn.Module`, so that no optimiser, DDP wrapper or checkpoint of the student can hold it. The model's
    attention implementation is switched to a recording twin with equal outputs; `restore()` gives the old one back.

    Args:
        model: a model of transformers, with or without a head. Its weights are used, not copied.
        device: where the teacher runs; None leaves the model where it is. Inputs are moved there, results back.
        dtype: what the teacher computes in; None leaves the model's dtype. A teacher with a dtype of its own ignores
            a surrounding autocast.
        remove_rotary: hand out queries and keys without their rotary position embedding. Needs `check`.
        check: run tiny batches that prove the attention readable, the outputs unchanged, and the head plain. Without
            it nothing is verified, `head` is None, and sizes come from the config.

    Attributes:
        model: the wrapped model.
        head: the output embeddings, when `logits == head(last_hidden_state)` exactly; else None (soft-capped or scaled
            logits, a classifier, no head), and logits come from `logits=True`.
        scalings: one factor of `query @ key.T` a layer, as the teacher's attention applies it.
        has_logits: whether the model has a head with logits, so that `logits=True` works; an embedding's projection is
            none. Without `check` any head counts.
        norms_last_hidden_state: whether the last of `hidden_states` has gone through the final norm, as in language
            models; those of ViT and its kin have not. Needs `check`.

    Raises:
        ValueError: the teacher hides its attention, is an encoder-decoder, mixes attention with other layers, fails on
            a tiny batch, changes its output under recording, or has no rotary embedding that could be removed.

    Example:
        >>> teacher = Teacher(AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M"))
        >>> teacher({"input_ids": input_ids}, attentions=True).attentions[0].key.shape  # (b, h_kv, t, p)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        remove_rotary: bool = False,
        check: bool = True,
    ) -> None:
        if not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"model is a {type(model).__name__}; a Teacher takes a PreTrainedModel of transformers. Unwrap it, or "
                "merge adapters first (peft: merge_and_unload())."
            )
        if remove_rotary and not check:
            raise ValueError(
                "remove_rotary=True needs check=True: which features are rotated is found by a tiny batch."
            )
        self.model = model.requires_grad_(False).eval()
        if model.config.is_encoder_decoder:
            raise ValueError(
                f"{self._named()} is an encoder-decoder, and its decoder attends to two sequences. Pass its encoder, "
                f"or a decoder-only or encoder-only teacher; these work: {_WORKING}."
            )
        if device is not None:
            model.to(device)
        if dtype is not None:
            self._cast(dtype)
        self._body = _body_of(model)
        self.config: PreTrainedConfig = self._body.config.get_text_config()
        self.dtype = dtype
        self.head: nn.Module | None = None
        self.has_logits = self._body is not model
        self.norms_last_hidden_state = True
        self._accepted = set(inspect.signature(self._body.forward).parameters)
        self._isolates = "position_ids" in self._accepted
        self._rotary: RotaryPlan | None = None
        self._compiled_base: Callable | None = None

        self._original = base_of(self.config._attn_implementation)
        if self._original is None or self._original.startswith("paged|"):
            raise ValueError(
                f"{self._named()} has attention implementation {self._original!r}. Load the teacher with "
                "attn_implementation='sdpa' or 'eager'."
            )
        if check:
            self._switch_and_check()
            if remove_rotary:
                self._rotary = self._find_rotary()
        else:
            self._body.set_attn_implementation(register_recording(self._original))
            heads = self.config.num_attention_heads
            values = self.config.to_dict()
            head_dim = values.get("head_dim") or self.config.hidden_size // heads
            self._sizes = [(heads, values.get("num_key_value_heads") or heads, head_dim)] * self.num_hidden_layers
            self.scalings = (head_dim**-0.5,) * self.num_hidden_layers

    @torch.no_grad()
    def __call__(
        self,
        inputs: Mapping[str, Tensor],
        *,
        attentions: bool = False,
        hidden_states: bool = False,
        logits: bool = False,
    ) -> TeacherOutput:
        """Runs the teacher.

        Without a padding mask nothing waits for the device, so a CUDA graph may capture the call. (transformers reads
        padding masks and packed positions, except inside a capture.)

        Args:
            inputs: the batch as the student sees it. Entries that the teacher's `forward` does not name, and labels,
                are left out. `seq_idx` `(b, t)` (packed documents) becomes position ids that restart, which keeps the
                teacher's attention inside each document.
            attentions: return one `TeacherAttention` a layer.
            hidden_states: return the embeddings and every layer's output.
            logits: return logits.

        Raises:
            ValueError: logits of a teacher without a head; packed documents together with a padding mask, or for a
                teacher that attends across them.
        """
        main = inputs.get(self.model.main_input_name, next(iter(inputs.values())))
        arguments = self._arguments(inputs)
        # Positions without a padding mask may restart, and mean packed documents then.
        if "position_ids" in arguments and "attention_mask" not in arguments and not self._isolates:
            raise ValueError(
                f"inputs hold packed documents (seq_idx, or position_ids without attention_mask), but {self._named()} "
                "attends across them. Use padded documents instead of packed ones."
            )
        plain_head = self.head is not None
        whole = logits and not plain_head
        if whole and not self.has_logits:
            raise ValueError(
                f"logits=True, but {self._named()} has no head that gives logits. Load it with AutoModelForCausalLM "
                "or another class with a head, or use losses without logits."
            )
        if attentions:
            arguments["output_attentions"] = True
        if hidden_states:
            arguments["output_hidden_states"] = True

        module = self.model if whole else self._body
        rotated = attentions and self._rotary is not None
        if self._compiled_base is not None and not (whole or rotated):
            module = self._compiled_base
        recording = recorded_tables(self._body) if rotated else nullcontext()
        with recording as tables, self._precision():
            output = module(**arguments, return_dict=True)
            last = None if whole else output.last_hidden_state
            scores = output.logits if whole else self.head(last) if logits else None

            read = tuple(self._read(output.attentions, tables)) if attentions else None

        def home(x: Tensor) -> Tensor:
            return _sent(x, main.device)

        return TeacherOutput(
            last_hidden_state=None if last is None else home(last),
            logits=None if scores is None else home(scores),
            attentions=None if read is None else tuple(TeacherAttention(*map(home, attention)) for attention in read),
            hidden_states=tuple(map(home, output.hidden_states)) if hidden_states else None,
        )

    def compile(self, backend: str = "inductor") -> None:
        """Runs the teacher through `torch.compile` from now on; the model itself is left as it is."""
        if self._compiled_base is None:
            self._compiled_base = torch.compile(self._body, backend=backend)

    def restore(self) -> PreTrainedModel:
        """Gives the model back with the attention implementation that it came with."""
        self._body.set_attn_implementation(self._original)
        return self.model

    @property
    def removes_rotary(self) -> bool:
        return self._rotary is not None

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def num_hidden_layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def num_attention_heads(self) -> int:
        """Query heads of the first layer."""
        return self._sizes[0][0]

    @property
    def num_key_value_heads(self) -> int:
        """Key heads of the first layer."""
        return self._sizes[0][1]

    @property
    def head_dim(self) -> int:
        """Features of a head of the first layer."""
        return self._sizes[0][2]

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def vocab_size(self) -> int | None:
        """Rows of the embedding, padding included; None of a teacher without tokens."""
        return self.config.to_dict().get("vocab_size")

    @property
    def predicts_tokens(self) -> bool:
        """Whether it is a language model with its head."""
        return self.model.get_output_embeddings() is not None

    @property
    def num_labels(self) -> int:
        return self.model.config.num_labels

    @property
    def reads_images(self) -> bool:
        return self.model.main_input_name == "pixel_values"

    @property
    def query_sizes(self) -> tuple[int, ...]:
        """Query features (heads x head_dim), one number a layer."""
        return tuple(heads * head_dim for heads, _, head_dim in self._sizes)

    @property
    def key_sizes(self) -> tuple[int, ...]:
        """Key features (key heads x head_dim), one number a layer."""
        return tuple(heads * head_dim for _, heads, head_dim in self._sizes)

    def _named(self) -> str:
        return f"The teacher {type(self.model).__name__} (model_type {self.model.config.model_type!r})"

    def _cast(self, dtype: torch.dtype) -> None:
        """Casts weights only: `model.to(dtype)` would also round the rotary frequencies, which are no weights."""
        saved = self.model.state_dict(keep_vars=True).values()
        for tensor in {id(tensor): tensor for tensor in saved}.values():
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)

    def _precision(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, enabled=False) if self.dtype is not None else nullcontext()

    def _arguments(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """The keyword arguments of the teacher's forward pass for a batch."""
        weight = next(self.model.parameters())
        kept = {k: v for k, v in inputs.items() if k in self._accepted and k not in _STUDENT_INPUTS and v is not None}
        seq_idx = inputs.get("seq_idx")
        if seq_idx is not None:
            if "attention_mask" in kept:
                raise ValueError(
                    "inputs hold both seq_idx (packed documents) and attention_mask; a Transformer with a padding "
                    "mask attends across packed documents. Pack full blocks, or pad single documents."
                )
            if "position_ids" not in self._accepted:
                raise ValueError(
                    f"inputs hold seq_idx (packed documents), but {self._named()} takes no position_ids and attends "
                    "across them. Use padded documents instead of packed ones."
                )
            kept.setdefault("position_ids", positions_from_documents(seq_idx))
        arguments: dict[str, Any] = {}
        for name, value in kept.items():
            dtype = weight.dtype if value.is_floating_point() else None
            arguments[name] = _sent(value, weight.device, dtype)
        # The cache would hide packed documents from the mask, and nothing reads it.
        if "use_cache" in self._accepted:
            arguments["use_cache"] = False
        if "attention_mask" in self._accepted and not arguments.keys() & {"attention_mask", "position_ids"}:
            tokens = arguments.get("input_ids", arguments.get("inputs_embeds"))
            if tokens is not None:
                # No mask would make transformers search for packed documents, which waits for the device.
                nothing_padded = torch.ones((), dtype=torch.bool, device=tokens.device)
                arguments["attention_mask"] = nothing_padded.expand(tokens.shape[:2])
        return arguments

    def _read(self, calls: tuple[AttentionCall, ...], tables: list[Any] | None) -> Iterator[TeacherAttention]:
        if self._rotary is None:
            for query, key, output, _ in calls:
                yield TeacherAttention(query, key, output)
            return
        for (query, key, output, _), index in zip(calls, self._rotary.tables, strict=True):
            if index is not None:
                query, key = (undo_rotary(x, tables[index], self._rotary.layout) for x in (query, key))
            yield TeacherAttention(query, key, output)

    def _tiny_batch(self) -> dict[str, Tensor]:
        name, values = self.model.main_input_name, self.config.to_dict()
        if name == "input_ids" and self.vocab_size is not None:
            tokens = 3 + torch.arange(2 * 5).view(2, 5) * 7
            return {"input_ids": (tokens % self.vocab_size).to(self.device)}
        if name == "pixel_values":
            # Models for images of any size may name none.
            size, channels = values.get("image_size") or 64, values.get("num_channels", 3)
            height, width = (size, size) if isinstance(size, int) else size
            pixels = torch.linspace(-1, 1, 2 * channels * height * width).sin()
            return {"pixel_values": pixels.view(2, channels, height, width).to(self.device)}
        raise ValueError(
            f"{self._named()} takes {name!r} and has vocab_size {self.vocab_size}; a tiny batch can only be made of "
            f"'pixel_values', or of 'input_ids' with a vocab_size. These work: {_WORKING}."
        )

    def _try(self, module: PreTrainedModel, batch: Mapping[str, Tensor], **asked: bool) -> ModelOutput:
        """A forward pass on a tiny batch. Whatever a stranger's code raises there, this teacher can't teach."""
        try:
            with self._precision():
                return module(**self._arguments(batch), **asked, return_dict=True)
        except Exception as error:
            shapes = {name: tuple(value.shape) for name, value in batch.items()}
            raise ValueError(
                f"{self._named()} fails on a tiny batch {shapes}, by {type(error).__name__}: {error}. A teacher must "
                f"run on its {self.model.main_input_name!r} alone; these work: {_WORKING}."
            ) from error

    @torch.no_grad()
    def _switch_and_check(self) -> None:
        """Switches to recording attention, and proves on a tiny batch that it records and changes nothing."""
        name = register_recording(self._original)
        self._body.set_attn_implementation(name)
        if self.config._attn_implementation != name:
            raise ValueError(self._hidden("it does not follow transformers' AttentionInterface"))
        batch = self._tiny_batch()
        self._body.set_attn_implementation(self._original)
        plain = self._try(self._body, batch)
        self._body.set_attn_implementation(name)
        with _norms_recorded(self._body) as normed:
            output = self._try(self._body, batch, output_attentions=True, output_hidden_states=True)
        calls = output.get("attentions") or ()
        readable = [call for call in calls if isinstance(call, AttentionCall)]
        lacking = [part for part in ("last_hidden_state", "hidden_states") if output.get(part) is None]
        if lacking:
            raise ValueError(self._hidden(f"no part of it hands out {lacking}, only {list(output)}"))
        expected, last = plain.last_hidden_state, output.last_hidden_state
        if not calls or len(readable) != len(calls):
            raise ValueError(self._hidden(f"{len(readable)} of its {len(calls)} attention outputs can be read"))
        if len(calls) != self.num_hidden_layers:
            kinds = self.config.to_dict().get("layer_types") or ()
            others = {i: kind for i, kind in enumerate(kinds) if "attention" not in kind or "linear" in kind}
            lacking = f"; without attention are {others}" if others else ""
            raise ValueError(
                f"{self._named()} has {self.num_hidden_layers} layers, but {len(calls)} of them attend{lacking}. "
                f"Every layer of a teacher must attend; these work: {_WORKING}."
            )
        if readable[0].query.shape[0] != len(expected):
            raise ValueError(
                self._hidden(f"it attends inside {len(readable[0].query)} windows of {len(expected)} inputs")
            )
        tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 2e-2
        error = relative_error(last, expected)
        if not error <= tolerance:
            raise ValueError(
                f"{self._named()} gives another output when its attention is recorded (relative difference "
                f"{error:.2e}, at most {tolerance:.0e}). It treats attention implementation {self._original!r} "
                "specially; load it with another attn_implementation ('sdpa' or 'eager')."
            )
        self._sizes = [(call.query.shape[1], call.key.shape[1], call.query.shape[3]) for call in readable]
        self.scalings = tuple(
            size[2] ** -0.5 if c.scaling is None else c.scaling for c, size in zip(calls, self._sizes)
        )
        self.norms_last_hidden_state = any(
            isinstance(x, Tensor) and torch.equal(x, output.hidden_states[-1]) for x in normed
        )
        if self.has_logits:
            self._check_head(batch, last)
        self._isolates = self._isolates and self._keeps_documents_apart(batch, tolerance)

    def _keeps_documents_apart(self, batch: dict[str, Tensor], tolerance: float) -> bool:
        """Whether the second of two packed documents ignores the first: some models do not see restarts."""
        tokens = batch[self.model.main_input_name]
        positions = torch.tensor([[0, 1, 2, 0, 1]], device=self.device).expand_as(tokens)
        outputs = []
        for first in (tokens[:, :3], tokens[:, :3].flip(0)):
            packed = {self.model.main_input_name: torch.cat((first, tokens[:, 3:]), dim=1), "position_ids": positions}
            outputs.append(self._try(self._body, packed).last_hidden_state[:, 3:])
        return relative_error(*outputs) <= tolerance

    def _check_head(self, batch: dict[str, Tensor], last_hidden_state: Tensor) -> None:
        """Finds whether the whole model gives logits (of images: one row each), and whether its head is plain."""
        head = self.model.get_output_embeddings()
        if head is None:
            # Without a padding token a classifier of texts takes only one at a time.
            batch = {name: value[:1] for name, value in batch.items()}
        logits = self._try(self.model, batch).get("logits")
        self.has_logits = logits is not None and (logits.ndim == 2 or not self.reads_images)
        if self.has_logits and head is not None:
            with self._precision():
                self.head = head if torch.equal(head(last_hidden_state), logits) else None

    def _hidden(self, reason: str) -> str:
        return (
            f"{self._named()} hides its attention: {reason}. Queries and keys can be read from models that support "
            f"set_attn_implementation; these work: {_WORKING}. Losses without attention do not need a Teacher."
        )

    @torch.no_grad()
    def _find_rotary(self) -> RotaryPlan:
        if "position_ids" not in self._accepted:
            raise ValueError(
                f"remove_rotary=True, but {self._named()} takes no position_ids to find a rotation by, and one by an "
                "image's coordinates stays. Set it to False."
            )
        batch = self._tiny_batch()
        length = batch[self.model.main_input_name].shape[1]
        runs, all_tables = [], []
        for start in (0, min(64, self.config.max_position_embeddings - length)):
            positions = torch.arange(start, start + length, device=self.device).expand(2, -1)
            arguments = self._arguments(batch | {"position_ids": positions})
            with recorded_tables(self._body) as tables, self._precision():
                calls = self._body(**arguments, output_attentions=True, return_dict=True).attentions
            if not tables:
                raise ValueError(
                    f"remove_rotary=True, but {self._named()} has no rotary_emb module: it has no rotary embedding, "
                    "or one that can't be read. Set remove_rotary=False."
                )
            runs.append([(call.query, call.key) for call in calls])
            all_tables.append(tables)
        plan = find_plan(runs, all_tables)
        tolerance = 1e-2 if runs[0][0][1].dtype in (torch.float32, torch.float64) else 0.2
        if not plan.error <= tolerance:
            raise ValueError(
                f"remove_rotary=True, but no known layout undoes the rotary embedding of {self._named()}: "
                f"unrotated keys or queries still depend on the position (relative difference {plan.error:.2e}, at "
                f"most {tolerance:.0e}). Known are halves and interleaved pairs at the start of a head. Set "
                "remove_rotary=False."
            )
        if all(index is None for index in plan.tables):
            raise ValueError(f"remove_rotary=True, but no layer of {self._named()} rotates its keys: set it to False.")
        return plan


def check_vocabularies(
    student_vocab_size: int,
    teacher_vocab_size: int,
    student_tokenizer: Any | None = None,
    teacher_tokenizer: Any | None = None,
) -> int:
    """Returns the number of vocabulary entries that student and teacher share, or says why they share none.

    Embeddings are often padded to a round number of rows, so the sizes of one tokenizer's models may differ; logits
    are then compared over the smaller size. With both tokenizers the answer is exact; without them a difference of at
    most 1,024 rows is taken for padding (among common models the widest is Phi's, 905).

    Args:
        student_vocab_size: rows of the student's output embeddings.
        teacher_vocab_size: rows of the teacher's output embeddings.
        student_tokenizer: optional tokenizer of the student (anything with `get_vocab()`).
        teacher_tokenizer: optional tokenizer of the teacher.

    Returns:
        The size to slice both logits to.

    Raises:
        ValueError: the tokenizers differ, their tokens do not fit, or the sizes differ by more than padding.
    """
    shared = min(student_vocab_size, teacher_vocab_size)
    sizes = f"student_vocab_size={student_vocab_size} and teacher_vocab_size={teacher_vocab_size}"
    way_out = (
        "The student must read the teacher's tokens: build it with the teacher's vocabulary "
        "(vocab_size=teacher_vocab_size) and save it with the teacher's tokenizer."
    )
    known = student_tokenizer is not None and teacher_tokenizer is not None
    if known:
        student_tokens, teacher_tokens = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
        if student_tokens != teacher_tokens:
            differing = len(student_tokens.items() ^ teacher_tokens.items())
            raise ValueError(
                f"Student and teacher use different tokenizers: {len(student_tokens)} and {len(teacher_tokens)} "
                f"tokens, {differing} entries (token, id) in only one of them ({sizes}). {way_out}"
            )
        needed = max(teacher_tokens.values(), default=-1) + 1
        if shared < needed:
            raise ValueError(f"The tokenizer needs {needed} rows, but {sizes}. {way_out}")
    difference = abs(student_vocab_size - teacher_vocab_size)
    if difference > _MAX_VOCABULARY_PADDING and not known:
        raise ValueError(
            f"{sizes} differ by {difference}, more than padding explains ({_MAX_VOCABULARY_PADDING}). {way_out} If "
            "it is padding, pass both tokenizers to prove it."
        )
    if difference:
        logger.info(
            f"{sizes} differ by {difference} padding rows: logits are compared over the first {shared} tokens."
        )
    return shared


@contextmanager
def borrowed_teacher(model: PreTrainedModel) -> Iterator[Teacher]:
    """A `Teacher` for the block's time; mode, gradients and attention of the model come back as they were."""
    training = {module: module.training for module in model.modules()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    implementation = model.config.get_text_config()._attn_implementation  # perhaps another Teacher's
    teacher = Teacher(model)
    try:
        yield teacher
    finally:
        model.set_attn_implementation(implementation)
        for module, mode in training.items():
            module.training = mode
        for parameter in trainable:
            parameter.requires_grad_(True)
