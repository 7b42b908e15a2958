"""A teacher that was asked once: what it says of a text on disk, for any number of distillations without it.

A record holds, for each document of a text, the teacher's most likely tokens with their log-probabilities and, where
asked for, its attention and hidden states. It is looked up by the document's tokens, so that order, padding, packing,
batch size and number of processes may change between recording and training.

Shape legend: `b` batch, `t` token, `h` head, `p` head_dim, `d` width, `k` recorded tokens, `V` vocabulary.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedConfig
from transformers.utils import logging

from cab_hf.files import open_weights, read_json, write_whole, written_whole
from cab_hf.teachers.examination import check_whole
from cab_hf.teachers.teacher import (
    Teacher,
    TeacherAttention,
    TeacherOutput,
    positions_from_documents,
    with_positions,
)


logger = logging.get_logger(__name__)

INDEX_NAME = "index.json"
# Fields of configs that name, log, start or train a model, but compute nothing in one that is evaluated.
NOT_COMPUTED = re.compile(
    r"_.*|name_or_path|transformers_version|architectures|auto_map|(torch_)?dtype|id2label|label2id|problem_type"
    r"|use_cache|return_dict|output_(attentions|hidden_states|router_logits)|\w+_token_ids?|initializer_\w+|\w*(dropout|pdrop|drop_path)\w*|pretraining_tp"
    r"|tie_word_embeddings|task_specific_params|tokenizer_class|quantization_config"
)
FACTS = (
    "num_hidden_layers",
    "hidden_size",
    "vocab_size",
    "norms_last_hidden_state",
    "removes_rotary",
    "query_sizes",
    "key_sizes",
    "scalings",
    "top_k",
    "attentions",
    "hidden_states",
    "teacher",
    "teacher_weights",
    "computed_in",
    "dtype",
)
DTYPES = ("float16", "bfloat16", "float32")


class Document(NamedTuple):
    """A document's place in a batch.

    Attributes:
        key: digest of its tokens.
        row: row of the batch.
        places: `(n,)` int64, its positions in the row, in order.
    """

    key: str
    row: int
    places: Tensor


class RecordedHead(nn.Module):
    """Logits of recorded rows: the recorded log-probabilities, and what they leave spread evenly over other tokens.

    Args:
        vocab_size: `V`.
        top_k: `k`. With `k = V` nothing is left over, and the logits are the teacher's up to a constant a row.
    """

    def __init__(self, vocab_size: int, top_k: int) -> None:
        super().__init__()
        self.vocab_size, self.top_k = vocab_size, top_k

    def forward(self, rows: Tensor) -> Tensor:
        """`(..., 2 k)` float32, token indices before log-probabilities, to logits `(..., V)`."""
        indices, log_probabilities = rows[..., : self.top_k].long(), rows[..., self.top_k :]
        rest = (1 - log_probabilities.exp().sum(-1, keepdim=True)).clamp(min=1e-12)
        even = (rest / max(self.vocab_size - self.top_k, 1)).log()
        return even.expand(*rows.shape[:-1], self.vocab_size).scatter(-1, indices, log_probabilities)


def record_teacher(
    teacher: Teacher,
    dataset: Any,
    folder: str | Path,
    *,
    data_collator: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Tensor]],
    top_k: int = 64,
    attentions: bool = False,
    hidden_states: bool = False,
    dtype: str = "float16",
    batch_size: int = 8,
    batches_per_shard: int = 32,
    progress: bool = True,
) -> "RecordedTeacher":
    """Writes what a language teacher says of a data set. What is in the record is not asked again.

    A run that was cut off goes on where its last whole shard ends, and another data set of the same teacher adds to
    the record. A token takes `k * (4 + bytes of dtype)` bytes; attention adds queries, keys and outputs of every
    layer, which is far more: meant for little text.

    Args:
        teacher: made with the `remove_rotary` and `dtype` that the distillation asks for.
        dataset: rows that `data_collator` makes batches of.
        folder: of the record.
        top_k: most likely tokens of each position, at most `V`.
        attentions: also queries, keys and outputs: for `bridge_weight`, `output_weight` and `attention_weight`.
        hidden_states: also hidden states, for `hidden_weight`.
        dtype: of what is written, "float16", "bfloat16" or "float32".
        batch_size: rows of a batch.
        batches_per_shard: batches of a file, which is written whole or not at all.
        progress: show it.

    Returns:
        The record, ready to teach.

    Raises:
        ValueError: a teacher without tokens, an option that can't be, or a record of another teacher or other options.
        OverflowError: numbers too large for `dtype`.
    """
    folder = Path(folder)
    _check(teacher, top_k, dtype)
    facts = _facts(teacher, top_k=top_k, attentions=attentions, hidden_states=hidden_states, dtype=dtype)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / INDEX_NAME).is_file():
        _check_same(folder, facts)
    else:
        write_whole(folder / INDEX_NAME, json.dumps(facts, indent=1) + "\n")
    record = RecordedTeacher(folder)
    pending: dict[str, dict[str, Tensor]] = {}
    loader = DataLoader(dataset, batch_size, collate_fn=data_collator)
    for count, batch in enumerate(tqdm(loader, desc="Recording the teacher", disable=not progress), start=1):
        new = {one.key: one for one in documents(batch) if one.key not in record and one.key not in pending}
        if new:
            pending |= _ask(teacher, batch, new.values(), facts)
        if count % batches_per_shard == 0:
            record.add(pending)
            pending = {}
    record.add(pending)
    return record


class RecordedTeacher:
    """A record in the place of the [`Teacher`] that it was made of, which is not loaded.

    Args:
        folder: of [`record_teacher`].

    Raises:
        FileNotFoundError: there is no record.

    Example:
        >>> from cab_hf.data import LanguageCollator, load_documents, pack_documents
        >>> from cab_hf.teachers.demo import random_llama
        >>> model, tokenizer = random_llama()
        >>> blocks = pack_documents(load_documents("builtin"), tokenizer, 64).select(range(8))
        >>> options = {"data_collator": LanguageCollator(0), "progress": False}
        >>> record = record_teacher(Teacher(model), blocks, "record", **options)
        >>> record.is_causal
        True
    """

    reads_images = False
    has_logits = True
    predicts_tokens = is_causal = True
    num_labels = None
    device = torch.device("cpu")

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / INDEX_NAME).is_file():
            raise FileNotFoundError(
                f"{folder} holds no record of a teacher: there is no {INDEX_NAME}. Make one by record_teacher."
            )
        self.facts = read_json(self.folder / INDEX_NAME)
        missing = [name for name in FACTS if name not in self.facts]
        if missing:
            raise ValueError(f"{self.folder / INDEX_NAME} lacks {', '.join(missing)}. Make the record again.")
        if "teacher_config" not in self.facts:
            logger.warning_once(
                f"{folder} was made before records said which config its teacher had and what its shards hold: it is "
                "checked by the teacher's weights only. Make it again to have it checked."
            )
        for name in FACTS[:5]:
            setattr(self, name, self.facts[name])
        self.query_sizes, self.key_sizes, self.scalings = (tuple(self.facts[name]) for name in FACTS[5:8])
        self.head = RecordedHead(self.vocab_size, self.facts["top_k"])
        self._places: dict[str, tuple[Path, int, int]] = {}  # document -> its shard and tokens there
        self._open: dict[Path, Any] = {}
        self._unread: dict[Path, str] = {}  # shard -> the digest that its content must have
        self._shapes: dict[str, tuple[int, ...]] = {}  # tensor -> its shape at one token
        self.num_tokens = 0
        for shard in sorted(self.folder.glob("shard-*.safetensors")):
            self._find(shard)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        """Documents."""
        return len(self._places)

    def compile(self, backend: str = "inductor") -> None:
        """There is nothing to compile."""

    def __call__(
        self,
        inputs: Mapping[str, Tensor],
        *,
        attentions: bool = False,
        hidden_states: bool = False,
        logits: bool = False,
    ) -> TeacherOutput:
        """What the teacher said of a batch, as [`Teacher`] returns it; zeros at padding.

        Args:
            inputs: the batch as the student sees it.
            attentions, hidden_states: as of the teacher.
            logits: has no effect: `head` makes them of the rows.

        Raises:
            ValueError: a document or a kind of target that is not in the record.
        """
        for name, is_asked in (("attentions", attentions), ("hidden_states", hidden_states)):
            if is_asked and not self.facts[name]:
                raise ValueError(
                    f"The losses need the teacher's {name}, which {self.folder} does not hold. Record them with "
                    f"{name}=True into another folder, or set the weights of the losses that read them to 0.0."
                )
        asked = ("indices", "log_probabilities") + ("attention.",) * attentions + ("hidden.",) * hidden_states
        ids, shapes = inputs["input_ids"], self._shapes.items()
        whole = {name: torch.zeros(*ids.shape, *shape) for name, shape in shapes if name.startswith(asked)}
        for document in documents(inputs):
            shard, start, end = self._place_of(document, inputs)
            self._check_content(shard)
            for name, tensor in whole.items():
                tensor[document.row, document.places] = self._open[shard].get_slice(name)[start:end].float()
        whole = {name: tensor.to(ids.device) for name, tensor in whole.items()}
        layers = self.layer_numbers
        return TeacherOutput(
            last_hidden_state=torch.cat([whole["indices"], whole["log_probabilities"]], dim=-1),
            attentions=tuple(self._attention(whole, layer) for layer in layers) if attentions else None,
            hidden_states=tuple(whole[f"hidden.{i}"] for i in (*layers, len(layers))) if hidden_states else None,
        )

    @property
    def paths(self) -> tuple[str, ...]:
        """A record counts layers and knows no modules."""
        return ()

    @property
    def layer_numbers(self) -> range:
        return range(self.num_hidden_layers)

    def check_shows_attention(self, maps: bool = False) -> None:
        """A record says so when it is asked."""

    def add(self, said: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Writes a shard of new documents: digest -> what the teacher says, `(n, ...)` each."""
        if not said:
            return
        taken = [int(path.stem.partition("-")[2]) for path in self.folder.glob("shard-*.safetensors")]
        shard = self.folder / f"shard-{max(taken, default=-1) + 1:05d}.safetensors"
        parts = list(said.values())
        tensors = {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}
        tensors["ends"] = torch.tensor([len(part["indices"]) for part in parts]).cumsum(0)
        tensors["keys"] = torch.tensor([list(bytes.fromhex(key)) for key in said], dtype=torch.uint8)
        with written_whole(self.folder) as unfinished:
            facts = {"record": _digest_of_facts(self.facts), "content": _digest_of_tensors(sorted(tensors.items()))}
            save_file(tensors, unfinished / shard.name, metadata=facts)
        self._find(shard)

    def _find(self, shard: Path) -> None:
        self._open[shard] = open_weights(shard)
        said = self._open[shard].metadata() or {}
        if said or "teacher_config" in self.facts:
            if said.get("record") != _digest_of_facts(self.facts):
                raise ValueError(f"{shard} was not written into this record, or edited since. Remove it.")
            self._unread[shard] = said.get("content", "")
        ends = self._open[shard].get_tensor("ends").tolist()
        keys = self._open[shard].get_tensor("keys").tolist()
        for key, start, end in zip(keys, [0, *ends], ends):
            self._places[bytes(key).hex()] = (shard, start, end)
        self.num_tokens += ends[-1]
        names = sorted(set(self._open[shard].keys()) - {"ends", "keys"})
        self._shapes = {name: tuple(self._open[shard].get_slice(name).get_shape()[1:]) for name in names}

    def _check_content(self, shard: Path) -> None:
        """Before the first of its documents is read: a record may be larger than memory, and is read in any order."""
        content, tensors = self._unread.pop(shard, None), self._open[shard]
        if content not in (
            None,
            _digest_of_tensors((name, tensors.get_tensor(name)) for name in sorted(tensors.keys())),
        ):
            raise ValueError(
                f"{shard} holds other numbers than were recorded: it was edited or damaged. Remove it, and record its "
                "documents again by the same call of record_teacher."
            )

    def _place_of(self, document: Document, inputs: Mapping[str, Tensor]) -> tuple[Path, int, int]:
        if document.key not in self._places:
            tokens = inputs["input_ids"][document.row, document.places].tolist()
            raise ValueError(
                f"A document of {len(tokens)} tokens, {tokens[:5]}..., is not in the record {self.folder}, which "
                f"holds {len(self)} documents. It was made of other data, another tokenizer or other block sizes: "
                "call record_teacher with this data set, which adds to it."
            )
        return self._places[document.key]

    def _attention(self, whole: Mapping[str, Tensor], layer: int) -> TeacherAttention:
        query, key, output = (whole[f"attention.{layer}.{part}"] for part in TeacherAttention._fields)
        return TeacherAttention(query.transpose(1, 2), key.transpose(1, 2), output)


def documents(inputs: Mapping[str, Tensor]) -> Iterator[Document]:
    """The documents of a batch: what a teacher's attention can't see across.

    Args:
        inputs: `input_ids` `(b, t)`, and `attention_mask`, `seq_idx` or `position_ids` where there are any.
    """
    ids, mask = inputs["input_ids"].cpu(), inputs.get("attention_mask")
    if mask is not None:
        starts = torch.zeros_like(ids, dtype=torch.bool)
    else:
        positions = inputs.get("position_ids")
        if inputs.get("seq_idx") is not None:
            positions = positions_from_documents(inputs["seq_idx"])
        starts = torch.zeros_like(ids, dtype=torch.bool) if positions is None else positions.cpu() == 0
    for row in range(len(ids)):
        real = torch.arange(ids.shape[1]) if mask is None else mask[row].cpu().nonzero()[:, 0]
        if len(real):
            edges = [0, *(starts[row, real][1:].nonzero()[:, 0] + 1).tolist(), len(real)]
            for start, end in zip(edges, edges[1:]):
                places = real[start:end]
                yield Document(_digest(ids[row, places]), row, places)


def _ask(
    teacher: Teacher, batch: Mapping[str, Tensor], new: Iterable[Document], facts: Mapping[str, Any]
) -> dict[str, dict[str, Tensor]]:
    """What the teacher says of some documents of a batch, on the CPU: digest -> tensors `(n, ...)`."""
    batch = {name: value.to(teacher.device) for name, value in batch.items() if name != "labels"}
    output = teacher(
        with_positions(batch),
        attentions=facts["attentions"],
        hidden_states=facts["hidden_states"],
        logits=teacher.head is None,
    )
    dtype, said = getattr(torch, facts["dtype"]), {}
    for one in new:
        rows = (one.row, one.places.to(teacher.device))
        scores = output.logits[rows] if teacher.head is None else teacher.head(output.last_hidden_state[rows])
        best = scores.float().log_softmax(-1).topk(facts["top_k"], sorted=False)
        parts = {"indices": best.indices.int(), "log_probabilities": best.values.to(dtype)}
        for layer, attention in enumerate(output.attentions or ()):
            heads_last = (attention.query.transpose(1, 2), attention.key.transpose(1, 2), attention.output)
            for name, tensor in zip(TeacherAttention._fields, heads_last):
                parts[f"attention.{layer}.{name}"] = tensor[rows].to(dtype)
        for layer, hidden in enumerate(output.hidden_states or ()):
            parts[f"hidden.{layer}"] = hidden[rows].to(dtype)
        for name, tensor in parts.items():
            if not torch.isfinite(tensor).all():
                raise OverflowError(f"{name} holds numbers too large for {facts['dtype']}. Record with bfloat16.")
        said[one.key] = {name: tensor.cpu() for name, tensor in parts.items()}
    return said


def _digest(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.long().contiguous().numpy().tobytes()).hexdigest()[:32]


def _check(teacher: Teacher, top_k: int, dtype: str) -> None:
    check_whole("teacher", teacher.model)
    if any(type(parameter).__module__.startswith("torchao.") for parameter in teacher.model.parameters()):
        raise ValueError(
            "The teacher is quantised by torchao (`quantization_config`), which shows no bytes to know weights by. "
            "Record it without quantisation, or by bitsandbytes."
        )
    if len(teacher.paths) not in (0, teacher.config.num_hidden_layers):
        raise ValueError(
            f"Only {len(teacher.paths)} of the teacher's {teacher.config.num_hidden_layers} layers show attention, "
            "and a record counts layers. Distil from the teacher itself."
        )
    if not teacher.predicts_tokens:
        raise ValueError(
            f"The teacher {type(teacher.model).__name__} predicts no tokens from those before. Load a causal language "
            "model, with AutoModelForCausalLM."
        )
    if not 1 <= top_k <= teacher.vocab_size:
        raise ValueError(f"top_k is {top_k}; it must be between 1 and the teacher's vocab_size, {teacher.vocab_size}.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}. It must be one of {', '.join(DTYPES)}.")


def _facts(teacher: Teacher, **options: Any) -> dict[str, Any]:
    """What a record says of itself: the options, and which teacher it is of."""
    return {
        "teacher": type(teacher.model).__name__,
        "teacher_weights": _digest_of_tensors(sorted(teacher.model.state_dict().items())),
        "teacher_config": _computed(teacher.model.config),
        "computed_in": str(teacher.dtype or teacher.model.dtype).removeprefix("torch."),
        "num_hidden_layers": teacher.num_hidden_layers,
        "hidden_size": teacher.hidden_size,
        "vocab_size": teacher.vocab_size,
        "query_sizes": list(teacher.query_sizes),
        "key_sizes": list(teacher.key_sizes),
        "scalings": list(teacher.scalings),
        "norms_last_hidden_state": teacher.norms_last_hidden_state,
        "removes_rotary": teacher.removes_rotary,
        **options,
    }


def _computed(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a config, and of those in it, that a teacher's outputs may depend on, as JSON reads them again."""

    def of(fields: Mapping[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in fields.items() if not NOT_COMPUTED.fullmatch(str(name))}
        return {str(name): of(value) if isinstance(value, Mapping) else value for name, value in kept.items()}

    return json.loads(json.dumps(of(config.to_dict()), default=str))


def _digest_of_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _digest_of_facts(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _check_same(folder: Path, facts: Mapping[str, Any]) -> None:
    def flat(values: Mapping[str, Any]) -> dict[str, Any]:
        # A field that only one of two versions of transformers knows says nothing.
        config = {f"teacher_config.{name}": value for name, value in (values.get("teacher_config") or {}).items()}
        return {name: value for name, value in values.items() if name != "teacher_config"} | config

    found, now = flat(read_json(folder / INDEX_NAME)), flat(facts)
    differing = [name for name in found.keys() & now.keys() if found[name] != now[name]]
    if differing:
        name = min(differing)
        raise ValueError(
            f"{folder} is a record of another teacher or of other options: {name} is {found[name]!r} there and "
            f"{now[name]!r} now (differing: {', '.join(sorted(differing))}). Name another folder, or remove this one."
        )
