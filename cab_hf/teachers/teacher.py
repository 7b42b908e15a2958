"""The teacher: a frozen Transformer that hands out queries, keys and attention outputs, as fast as it runs anyway.

Shapes: `b` batch, `t` token, `h` head, `p` head_dim, `d` width, `V` vocabulary.

Source: arXiv 2510.19266, section "Attention Bridge" (keys teach B, queries teach C).
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import compile_regions
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput, logging

from cab_hf.inference import check_positions
from cab_hf.models.students import body_of, positions_from_documents
from cab_hf.teachers.attention_interface import AttentionCall, TeacherAttention, asked_maps, base_of, collected_calls
from cab_hf.teachers.examination import check_whole, examine, find_rotary, hidden, named
from cab_hf.teachers.named_attention import named_calls
from cab_hf.teachers.rotary import recorded_tables, undo_rotary


logger = logging.get_logger(__name__)

# Entries that only a loss or the student reads: a teacher that accepts them would compute something else, or more.
_STUDENT_INPUTS = ("labels", "seq_idx", "cache", "cache_position")
# Vocabularies are padded to a multiple (64 to 512) or to a round number: Qwen2.5 by 271 or 399 rows, Phi by 905, which
# is 1.8 % of its tokens.
_MAX_VOCABULARY_PADDING, _MAX_SHARE_OF_PADDING, _MULTIPLE = 1024, 0.02, 128


@dataclass
class TeacherOutput:
    """One forward pass of the teacher. What was not asked for, or can't be had, is None.

    Attributes:
        last_hidden_state: `(b, t, d)` after the final norm, what the head takes. None when the logits had to come
            from the whole model (`Teacher.head` is None and `logits=True`).
        logits: `(b, t, V)`, or `(b, V)` of a classifier.
        attentions: one `TeacherAttention` for each of `Teacher.paths`: a layer, if all attend.
        hidden_states: `(b, t, d)` each: the embeddings, then every layer's output.
        maps: of each layer a function that makes its attention map `(b, h, t, t)`, as the teacher applies it.
    """

    last_hidden_state: Tensor | None = None
    logits: Tensor | None = None
    attentions: tuple[TeacherAttention, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    maps: tuple[Callable[[], Tensor], ...] | None = None


def _sent(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A copy there, without waiting; the host alone would read such a copy before it has arrived."""
    return tensor.to(device, dtype, non_blocking=device.type != "cpu")


def with_positions(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs with positions counted from the first real token: padding on the left would shift them."""
    mask = inputs.get("attention_mask")
    if mask is None or "position_ids" in inputs:
        return dict(inputs)
    return {**inputs, "position_ids": ((mask != 0).long().cumsum(dim=-1) - 1).clamp(min=0)}


class Teacher:
    """A pretrained Transformer that teaches: in eval mode, without gradients, and with its attention readable.

    It is no `nn.Module`, so that no optimiser, DDP wrapper or checkpoint of the student can hold it. The model's
    attention implementation is switched to a recording twin with equal outputs; `restore()` gives the old one back.
    A tiny batch proves that the attention can be read, that recording changes nothing, and what the head is
    (`cab_hf.teachers.examination`).

    Args:
        model: a model of transformers, with or without a head. Its weights are used, not copied.
        device: where the teacher runs; None leaves the model where it is. Inputs are moved there, results back.
        dtype: what the teacher computes in; None leaves the model's dtype. A teacher with a dtype of its own ignores
            a surrounding autocast.
        remove_rotary: hand out queries and keys without their rotary position embedding.

    Attributes:
        model: the wrapped model.
        head: the output embeddings, when `logits == head(last_hidden_state)` exactly; else None (soft-capped or scaled
            logits, a classifier, no head), and logits come from `logits=True`.
        paths: of the attention modules inside the body that can be read, in the order of their calls.
        scalings: one factor of `query @ key.T` for each of them, as the teacher's attention applies it.
        is_causal: whether no output of a language model depends on the tokens behind it.
        has_logits: whether the model has a head with logits, so that `logits=True` works; an embedding's projection is
            none.
        norms_last_hidden_state: whether the last of `hidden_states` has gone through the final norm, as in language
            models; those of ViT and its kin have not.

    Raises:
        ValueError: the teacher is an encoder-decoder, fails on a tiny batch, changes its output under recording, or
            has no rotary embedding that could be removed.

    Example:
        >>> from cab_hf.teachers.demo import random_llama
        >>> teacher = Teacher(random_llama()[0])
        >>> input_ids = torch.arange(12).view(2, 6)
        >>> teacher({"input_ids": input_ids}, attentions=True).attentions[0].key.shape  # (b, h_kv, t, p)
        torch.Size([2, 2, 6, 8])
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        remove_rotary: bool = False,
    ) -> None:
        if not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"model is a {type(model).__name__}; a Teacher takes a PreTrainedModel of transformers. Unwrap it, or "
                "merge adapters first (peft: merge_and_unload())."
            )
        if model.device.type == "meta":
            check_whole("teacher", model)
        self.model = model.requires_grad_(False).eval()
        if device is not None:
            model.to(device)
        if dtype is not None:
            self._cast(dtype)
        self.dtype = dtype
        self._body = body_of(model)
        self.config: PreTrainedConfig = self._body.config.get_text_config()
        self._accepted = set(inspect.signature(self._body.forward).parameters)
        self._isolates = "position_ids" in self._accepted
        self._compiled_base: Callable | None = None
        self._original = base_of(self.config._attn_implementation)
        with self._precision():
            found = examine(model, self._body, self._original, self._run)
        self.head, self.has_logits, self.is_causal = found.head, found.has_logits, found.is_causal
        self.norms_last_hidden_state = found.norms_last_hidden_state
        self.paths, self.scalings, self._sizes = found.paths, found.scalings, found.sizes
        self._shown_by, self._obstacle = found.shown_by, found.obstacle
        self._rotary = find_rotary(model, self._body, self._run) if remove_rotary else None
        self._isolates = found.isolates  # last: the examination itself moves positions

    @torch.no_grad()
    def __call__(
        self,
        inputs: Mapping[str, Tensor],
        *,
        attentions: bool = False,
        hidden_states: bool = False,
        logits: bool = False,
        maps: bool = False,
    ) -> TeacherOutput:
        """Runs the teacher.

        Without a padding mask nothing waits for the device, so a CUDA graph may capture the call. (transformers reads
        padding masks and packed positions, except inside a capture.)

        Args:
            inputs: the batch as the student sees it. Entries that the teacher's `forward` does not name, and labels,
                are left out. `seq_idx` `(b, t)` (packed documents) becomes position ids that restart, which keeps the
                teacher's attention inside each document.
            attentions: return one `TeacherAttention` for each of `paths`.
            hidden_states: return the embeddings and every layer's output.
            logits: return logits.
            maps: return functions that make attention maps, so that one layer's exist at a time.

        Raises:
            ValueError: attention that can't be read; logits of a teacher without a head; packed documents together
                with a padding mask, or for a teacher that attends across them.
        """
        main = inputs.get(self.model.main_input_name, next(iter(inputs.values())))
        arguments = self._arguments(inputs)
        plain_head = self.head is not None
        whole = logits and not plain_head
        if whole and not self.has_logits:
            raise ValueError(
                f"logits=True, but {named(self.model)} has no head that gives logits. Load it with "
                "AutoModelForCausalLM or another class with a head, or use losses without logits."
            )
        if attentions or maps:
            self.check_shows_attention(maps)
        collects = attentions and self._shown_by != "outputs"
        if attentions and not collects:
            arguments["output_attentions"] = True
        if hidden_states:
            arguments["output_hidden_states"] = True

        module = self.model if whole else self._body
        rotated = attentions and self._rotary is not None
        if self._compiled_base is not None and not (whole or rotated or maps or collects):
            module = self._compiled_base
        recording = recorded_tables(self._body) if rotated else nullcontext()
        asking = asked_maps() if maps else nullcontext()
        collecting = self._collecting() if collects else nullcontext()
        with recording as tables, asking as makers, self._precision(), collecting as calls:
            output = module(**arguments, return_dict=True)
            last = None if whole else output.last_hidden_state
            scores = output.logits if whole else self.head(last) if logits else None

            read = self._read(self._ordered(calls) if collects else output.attentions, tables) if attentions else None

        def home(x: Tensor) -> Tensor:
            return _sent(x, main.device)

        def make(answer: Callable[[], Tensor]) -> Tensor:
            with torch.no_grad(), self._precision():
                return home(answer())

        return TeacherOutput(
            last_hidden_state=None if last is None else home(last),
            logits=None if scores is None else home(scores),
            attentions=None if read is None else tuple(attention.map(home) for attention in read),
            hidden_states=tuple(map(home, output.hidden_states)) if hidden_states else None,
            maps=tuple(functools.partial(make, answer) for answer in makers) if maps else None,
        )

    def check_shows_attention(self, maps: bool = False) -> None:
        """That its attention can be read; with `maps`, its attention maps too.

        Raises:
            ValueError: it can't; the message has the reason.
        """
        if not self.paths:
            raise ValueError(hidden(self.model, self._obstacle or "no module of it attends"))
        if maps and self._shown_by != "outputs":
            raise ValueError(
                f"{named(self.model)} shows attention in {len(self.paths)} modules, not layer by layer, so that no "
                "map can be made of it. Set `attention_weight=0.0`, or use `bridge_weight`."
            )

    def _collecting(self) -> AbstractContextManager:
        if self._shown_by == "names":
            return named_calls({path: self._body.get_submodule(path) for path in self.paths})
        return collected_calls()

    def _ordered(self, calls: list[tuple[nn.Module, AttentionCall]]) -> tuple[AttentionCall, ...]:
        by_module = {id(module): call for module, call in calls}
        return tuple(by_module[id(self._body.get_submodule(path))] for path in self.paths)

    def compile(self, backend: str = "inductor") -> None:
        """Runs the teacher through `torch.compile` from now on; the model itself is left as it is.

        Its layers are compiled once for all of them, where they are of one class: as one graph, 30 layers would take
        a minute.
        """
        if self._compiled_base is None:
            lists = [one for one in self._body.modules() if isinstance(one, nn.ModuleList | nn.ModuleDict)]
            kinds = [{type(one) for one in each.children()} for each in lists]
            # accelerate would compile a list of different modules as if it were one
            alike = all(isinstance(each, nn.ModuleList) and len(kind) == 1 for each, kind in zip(lists, kinds))
            compiles = compile_regions if lists and alike else torch.compile
            self._compiled_base = compiles(self._body, backend=backend)

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
        """Layers that can teach: those whose attention can be read; all where none can."""
        return len(self.paths) or self._depth

    @property
    def _depth(self) -> int:
        return getattr(self.config, "num_hidden_layers", 0)

    @property
    def layer_numbers(self) -> tuple[int, ...]:
        """The number of each such layer among all, by which hidden states are counted."""
        if len(self.paths) in (0, self._depth):
            return tuple(range(self._depth))
        numbers = ((int(part) for part in path.split(".") if part.isdigit()) for path in self.paths)
        return tuple(next(number, index) for index, number in enumerate(numbers))

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
        """Whether it is a causal language model with its head."""
        return self.is_causal and self.model.get_output_embeddings() is not None

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

    def _cast(self, dtype: torch.dtype) -> None:
        """Casts weights only: `model.to(dtype)` would also round the rotary frequencies, which are no weights."""
        if vars(self.model).get("hf_quantizer") is not None:
            raise ValueError(
                f"dtype is {dtype}, but {named(self.model)} is quantised (`quantization_config`), and its codes can't "
                "be cast. Leave the dtype (`teacher_dtype`) out, or load it dequantised."
            )
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
        if seq_idx is not None and "attention_mask" in kept:
            raise ValueError(
                "inputs hold both seq_idx (packed documents) and attention_mask; a Transformer with a padding mask "
                "attends across packed documents. Pack full blocks, or pad single documents."
            )
        # Positions without a padding mask may restart, and mean packed documents then.
        if not self._isolates and (seq_idx is not None or "position_ids" in kept and "attention_mask" not in kept):
            raise ValueError(
                f"inputs hold packed documents (seq_idx, or position_ids without attention_mask), but "
                f"{named(self.model)} attends across them. Use padded documents instead of packed ones."
            )
        if seq_idx is not None:
            kept.setdefault("position_ids", positions_from_documents(seq_idx))
        if "input_ids" in kept:
            check_positions(self.model, kept)
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

    def _run(self, module: PreTrainedModel, inputs: Mapping[str, Tensor], **asked: bool) -> ModelOutput:
        with self._precision():
            return module(**self._arguments(inputs), **asked, return_dict=True)

    def _read(self, calls: tuple[AttentionCall, ...], tables: list[Any] | None) -> tuple[TeacherAttention, ...]:
        if self._rotary is None:
            return tuple(call.attention for call in calls)
        unrotated = []
        for (attention, _), index in zip(calls, self._rotary.tables, strict=True):
            if index is not None:
                turned = (attention.query, attention.key)
                query, key = (undo_rotary(x, tables[index], self._rotary.layout) for x in turned)
                attention = attention._replace(query=query, key=key)
            unrotated.append(attention)
        return tuple(unrotated)


def check_vocabularies(
    student_vocab_size: int,
    teacher_vocab_size: int,
    student_tokenizer: Any | None = None,
    teacher_tokenizer: Any | None = None,
) -> int:
    """Returns the number of vocabulary entries that student and teacher share, or says why they share none.

    Embeddings are often padded to a round number of rows, so the sizes of one tokenizer's models may differ; logits
    are then compared over the smaller size. With both tokenizers the answer is exact; without them a difference of
    less than 128 rows, or of at most 2 % and 1,024 rows, is taken for padding (among common models the widest is
    Phi's, 905).

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
    padding = max(_MULTIPLE - 1, min(_MAX_VOCABULARY_PADDING, int(shared * _MAX_SHARE_OF_PADDING)))
    if difference > padding and not known:
        raise ValueError(
            f"{sizes} differ by {difference}, more than padding explains ({padding}). {way_out} If "
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
