"""Documents to fixed blocks of tokens: packing, padding, collating, and a compact file of tokens.

Shapes: `b` batch, `t` token.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import datasets
import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, Value
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from cab_hf.data.conversations import encode_conversation


logger = logging.get_logger(__name__)

Documents = Dataset | IterableDataset
LossOn = Literal["all", "assistant"]

IGNORE_INDEX = -100
TOKEN_SUFFIX = ".npz"
TOKENS = datasets.List(Value("int32"))
TOKENISED = Features({"input_ids": TOKENS, "name": Value("string"), "vocabulary": Value("string")})
# Raised when the rows of a block change: `datasets` finds cached blocks by these arguments, not by the code.
_BLOCK_LAYOUT = 1


def pack_documents(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    *,
    isolate_documents: bool = True,
    append_eos: bool = True,
    loss_on: LossOn = "all",
    drop_last: bool = True,
    num_proc: int | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Documents:
    """Joins all documents into one run of tokens and cuts it into blocks of equal size: no token is padding.

    Every token is in exactly one block, but those of a last incomplete block when `drop_last`.
    `labels` are the `input_ids`, not shifted, with -100 where a token must not be predicted: at the first of a block
    and, with `isolate_documents`, at the first of a document. So the count of labels that are not -100 is the count
    of predicted tokens, at which cross-entropy and KL count.

    Args:
        documents: Rows of {"text"}, {"conversation"} or {"input_ids", "vocabulary"}, as `load_documents` gives them.
            A conversation is one document; the tokenizer's chat template writes it, with its special tokens.
        tokenizer: Its special tokens are added the way it does it by itself, but not to text that has them already.
        block_size: Tokens a block.
        isolate_documents: Also give `seq_idx`, which numbers the documents inside a block, so that a student's state
            is reset, and `position_ids`, which restart at 0, from which Transformers models (called without an
            attention mask and with `use_cache=False`) build an attention mask of separate documents.
            False: a block is one running text.
        append_eos: End each document by the tokenizer's end-of-sequence token, where nothing else ends it so.
        loss_on: "assistant": labels are -100 outside of the tokens that the assistant wrote, or of completions.
        drop_last: Drop the last incomplete block instead of returning it shorter.
        num_proc: Processes that tokenise.
        cache_dir: Where `datasets` keeps the blocks; its own default otherwise.

    Returns:
        Rows of {"input_ids": int32 (t,), "labels": int32 (t,), "seq_idx"?: int32 (t,), "position_ids"?: int32 (t,)}.

    Raises:
        ValueError: `block_size` is below 2, the tokenizer has no end-of-sequence token or no chat template, another
            tokenizer made the tokens, there are fewer tokens than one block, or `loss_on` is "assistant" for
            documents without an assistant, or under a template that does not tell its tokens.
    """
    _check_block_size(block_size)
    tokens = _tokenize(documents, tokenizer, append_eos, num_proc, loss_on)
    fields = ("input_ids", "labels", "seq_idx", "position_ids") if isolate_documents else ("input_ids", "labels")
    features = Features(dict.fromkeys(fields, TOKENS))
    arguments = {
        "documents": tokens,
        "block_size": block_size,
        "isolate_documents": isolate_documents,
        "drop_last": drop_last,
        "layout": _BLOCK_LAYOUT,
    }
    if isinstance(documents, IterableDataset):
        return IterableDataset.from_generator(_blocks, features=features, gen_kwargs=arguments)
    found = learnt = 0
    for batch in tokens.iter(1000):
        found += sum(map(len, batch["input_ids"]))
        learnt += sum(map(sum, batch.get("learnt", ())))
    if found < (block_size if drop_last else 1):
        raise ValueError(
            f"The documents have {found} tokens, fewer than one block of block_size {block_size}. "
            "Use a smaller block_size, drop_last=False, or more text."
        )
    if loss_on == "assistant" and not learnt:
        raise ValueError("loss_on is 'assistant', but no conversation has an answer of the assistant. Use 'all'.")
    return Dataset.from_generator(
        _blocks, features=features, gen_kwargs=arguments, cache_dir=None if cache_dir is None else str(cache_dir)
    )


def pad_documents(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    *,
    padding_side: str = "right",
    append_eos: bool = True,
    loss_on: LossOn = "all",
    num_proc: int | None = None,
) -> Documents:
    """Gives each document rows of its own: windows of `block_size` tokens, the last one padded.

    Args:
        documents: Rows of {"text"}, {"conversation"} or {"input_ids", "vocabulary"}, as `load_documents` gives them.
        tokenizer: Gives the padding token, or its end-of-sequence token where it has none.
        block_size: Tokens a row.
        padding_side: "right" or "left".
        append_eos: End each document by the tokenizer's end-of-sequence token, where nothing else ends it so.
        loss_on: As in `pack_documents`.
        num_proc: Processes that tokenise.

    Returns:
        Rows of {"input_ids", "attention_mask", "labels"}, each int32 (t,); labels are -100 at padding and at the
        first token of a row.

    Raises:
        ValueError: A bad `block_size` or `padding_side`, a tokenizer without padding and end-of-sequence token, or
            tokens that another tokenizer made.
    """
    _check_block_size(block_size)
    _check_padding_side(padding_side)
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if pad_token_id is None:
        raise ValueError("tokenizer has neither a pad_token nor an eos_token. Set tokenizer.pad_token first.")
    tokens = _tokenize(documents, tokenizer, append_eos, num_proc, loss_on)
    function = functools.partial(_windows, block_size=block_size, padding_side=padding_side, pad_token_id=pad_token_id)
    features = Features(dict.fromkeys(("input_ids", "attention_mask", "labels"), TOKENS))
    progress = {} if isinstance(tokens, IterableDataset) else {"num_proc": num_proc, "desc": "Padding documents"}
    return tokens.map(function, batched=True, remove_columns=columns_of(tokens), features=features, **progress)


@dataclass
class LanguageCollator:
    """Rows of tokens to a batch of tensors.

    Rows of equal length pass through as they are: no attention mask is made up, so nothing is masked needlessly.
    Ragged rows are padded, with `attention_mask` 0 and labels -100 there. Ragged rows of *packed* documents get no
    attention mask, which would hide the document borders from a Transformers model; their padding is one more
    document, with labels -100. Empty rows are dropped with one warning.

    Args:
        pad_token_id: Token written at padding.
        padding_side: "right" or "left".
    """

    pad_token_id: int
    padding_side: str = "right"

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "LanguageCollator":
        """One that pads by the tokenizer's padding token or, where it has none, by its end of sequence."""
        return cls(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)

    def __post_init__(self) -> None:
        _check_padding_side(self.padding_side)
        if self.pad_token_id is None or self.pad_token_id < 0:
            raise ValueError(
                f"pad_token_id is {self.pad_token_id!r}. Give a token id, for instance tokenizer.eos_token_id."
            )

    def __call__(self, rows: Sequence[dict]) -> dict[str, torch.Tensor]:
        """Collates a batch.

        Args:
            rows: Each {"input_ids", "labels"?, "attention_mask"?, "seq_idx"?, "position_ids"?} of sequences (t,).

        Returns:
            Tensors (b, t) under the same names, and always `labels`. `seq_idx` is int32, the others are int64.

        Raises:
            ValueError: Rows have different columns, or one row's columns have different lengths.
        """
        batch = [self._row(row) for row in rows]
        kept = [row for row in batch if len(row["input_ids"])]
        if len(kept) < len(batch):
            logger.warning_once("Dropped rows without any token. Filter them out of the dataset to silence this.")
        if not kept:
            # A step must still run on every process, so an ignored token stands in for an empty batch.
            kept = [{"input_ids": np.array([self.pad_token_id]), "labels": np.array([IGNORE_INDEX])}]
        if len({frozenset(row) for row in kept}) > 1:
            raise ValueError(f"Rows have different columns: {sorted({tuple(row) for row in kept})}. Use one kind.")

        length = max(len(row["input_ids"]) for row in kept)
        is_packed = "seq_idx" in kept[0] or "position_ids" in kept[0]
        if not is_packed and any(len(row["input_ids"]) < length for row in kept):
            for row in kept:
                row.setdefault("attention_mask", np.ones(len(row["input_ids"]), dtype=np.int64))
        if is_packed and "attention_mask" in kept[0]:
            raise ValueError(
                "Rows have seq_idx or position_ids and also attention_mask. Drop attention_mask: with it Transformers "
                "models ignore the borders between packed documents."
            )
        padded = [self._pad(row, length) for row in kept]
        return {name: torch.tensor(np.stack([row[name] for row in padded]), dtype=_DTYPES[name]) for name in padded[0]}

    def _row(self, row: dict) -> dict[str, np.ndarray]:
        arrays = {name: np.asarray(row[name], dtype=np.int64) for name in _DTYPES if name in row}
        lengths = {name: array.shape for name, array in arrays.items()}
        if len(set(lengths.values())) > 1 or any(len(shape) != 1 for shape in lengths.values()):
            raise ValueError(f"The columns of one row have the shapes {lengths}. Each must be (t,) with the same t.")
        if "labels" not in arrays:
            labels = arrays["input_ids"].copy()
            if "attention_mask" in arrays:
                labels[arrays["attention_mask"] == 0] = IGNORE_INDEX
            arrays["labels"] = labels
        real = np.flatnonzero(arrays.get("attention_mask", np.ones_like(arrays["labels"])))
        # Nothing stands before the first token, or only padding does: it can't be predicted.
        arrays["labels"] = arrays["labels"].copy()
        arrays["labels"][real[:1]] = IGNORE_INDEX
        return arrays

    def _pad(self, row: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
        missing = length - len(row["input_ids"])
        if not missing:
            return row
        left = self.padding_side == "left"
        padding = {
            "input_ids": np.full(missing, self.pad_token_id),
            "labels": np.full(missing, IGNORE_INDEX),
            "attention_mask": np.zeros(missing, dtype=np.int64),
            "position_ids": np.arange(missing),
        }
        if "seq_idx" in row:
            padding["seq_idx"] = np.full(missing, row["seq_idx"][0] - 1 if left else row["seq_idx"][-1] + 1)
        padded = {
            name: np.concatenate((padding[name], values) if left else (values, padding[name]))
            for name, values in row.items()
        }
        if "seq_idx" in padded:
            padded["seq_idx"] -= min(0, padded["seq_idx"][0])
        return padded


_DTYPES = {
    "input_ids": torch.int64,
    "labels": torch.int64,
    "attention_mask": torch.int64,
    "seq_idx": torch.int32,
    "position_ids": torch.int64,
}


def shift_labels(labels: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Targets of the positions that predict them: `labels` one step to the left, -100 at the end and around padding.

    Args:
        labels: (b, t), integer.
        mask: (b, t). Where it is zero a token neither predicts nor is predicted, whatever its label says.

    Returns:
        (b, t), same dtype.
    """
    if mask is not None:
        labels = labels.masked_fill(mask == 0, IGNORE_INDEX)
    labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    return labels if mask is None else labels.masked_fill(mask == 0, IGNORE_INDEX)


def save_tokens(path: str | os.PathLike, documents: Dataset, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokenises documents and writes them to one compressed `.npz` file, which `load_documents` reads back.

    About 1.2 bytes a token: a way to carry a corpus to a machine without a network. No end-of-sequence token is
    added here, `pack_documents` does that. The file remembers its tokenizer's vocabulary by a digest.

    Args:
        path: File name, ending in `.npz`. It appears complete or not at all.
        documents: Rows of {"text", "name"?}, of {"conversation", "name"?}, of which the file keeps the tokens and not
            who wrote them, or of {"input_ids", "vocabulary", "name"?}, written as they are.
        tokenizer: Its special tokens are added to a text the way it does it by itself.

    Returns:
        The number of tokens written.

    Raises:
        ValueError: `path` does not end in `.npz`, or `documents` are tokenised with another vocabulary.
    """
    path = check_token_path(path)
    columns, digest = set(documents.column_names), vocabulary_digest(tokenizer)
    if not columns & {"text", "conversation"} and not {"input_ids", "vocabulary"} <= columns:
        raise ValueError(
            f"documents have the columns {documents.column_names}, but need text, or input_ids and vocabulary."
        )
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    arrays, names = [np.zeros(0, dtype=dtype)], []
    for index, document in enumerate(tqdm(documents, desc=f"Writing {path.name}")):
        if "text" in columns:
            rows = _token_rows({"text": [document["text"]]}, tokenizer, eos_token_id=None)["input_ids"]
        elif "conversation" in columns:
            rows = [tokens_of(document, tokenizer)]
        else:
            batch = {"input_ids": [document["input_ids"]], "vocabulary": [document["vocabulary"]]}
            rows = _checked_tokens(batch, tokenizer, digest, eos_token_id=None)["input_ids"]
        for row in rows:
            arrays.append(np.asarray(row, dtype=dtype))
            names.append(document.get("name", str(index)))
    tokens = np.concatenate(arrays)
    offsets = np.cumsum([len(array) for array in arrays])
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.stem}.{os.getpid()}{TOKEN_SUFFIX}")
    try:
        np.savez_compressed(
            scratch, tokens=tokens, offsets=offsets, names=np.array(names, dtype=np.str_), vocabulary=np.array(digest)
        )
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    return len(tokens)


def check_token_path(path: str | os.PathLike) -> Path:
    """The path of a file of tokens.

    Raises:
        ValueError: it does not end in `.npz`.
    """
    if Path(path).suffix != TOKEN_SUFFIX:
        raise ValueError(f"path is {path}, which does not end in {TOKEN_SUFFIX}.")
    return Path(path)


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over a tokenizer's tokens and their ids: equal exactly when the vocabularies are."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def content_of(columns: Sequence[str]) -> str:
    """The column that holds what documents say: `text`, `conversation` or `input_ids`."""
    return next((name for name in ("text", "conversation") if name in columns), "input_ids")


def _tokenize(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    append_eos: bool,
    num_proc: int | None,
    loss_on: LossOn,
) -> Documents:
    """Rows of `input_ids` and, with a loss on the assistant alone, `learnt`, which says which of them it wrote."""
    if append_eos and tokenizer.eos_token_id is None:
        raise ValueError("append_eos is True, but tokenizer has no eos_token. Set it, or pass append_eos=False.")
    if loss_on not in get_args(LossOn):
        raise ValueError(f"loss_on is {loss_on!r}. It must be {' or '.join(map(repr, get_args(LossOn)))}.")
    columns = columns_of(documents)
    eos_token_id = tokenizer.eos_token_id if append_eos else None
    features = {"input_ids": TOKENS}
    if loss_on == "assistant":
        features["learnt"] = datasets.List(Value("bool"))
        if "conversation" not in columns:
            raise ValueError(
                f"loss_on is 'assistant', but documents have the columns {columns} and no conversations. Use "
                "'all', or data with the columns messages, or prompt and completion."
            )
    if "text" in columns:
        function = functools.partial(_token_rows, tokenizer=tokenizer, eos_token_id=eos_token_id)
    elif "conversation" in columns:
        function = functools.partial(
            _conversation_rows, tokenizer=tokenizer, eos_token_id=eos_token_id, finds_answers=loss_on == "assistant"
        )
    elif "input_ids" in columns and "vocabulary" in columns:
        function = functools.partial(
            _checked_tokens,
            tokenizer=tokenizer,
            vocabulary=vocabulary_digest(tokenizer),
            eos_token_id=eos_token_id,
        )
    else:
        raise ValueError(
            f"documents have the columns {columns}, but need text, or input_ids and vocabulary. "
            "Read them by load_documents."
        )
    progress = {} if isinstance(documents, IterableDataset) else {"num_proc": num_proc, "desc": "Tokenising documents"}
    return documents.map(function, batched=True, remove_columns=columns, features=Features(features), **progress)


def _conversation_rows(
    batch: dict[str, list], tokenizer: PreTrainedTokenizerBase, eos_token_id: int | None, finds_answers: bool
) -> dict[str, list]:
    rows = {"input_ids": [], "learnt": []}
    for text in batch["conversation"]:
        ids, learnt = encode_conversation(text, tokenizer, finds_answers)
        rows["input_ids"].append(_with_end(ids, eos_token_id, tokenizer))
        # An added end ends the answer, where no token of the template does.
        rows["learnt"].append(learnt + learnt[-1:] * (len(rows["input_ids"][-1]) - len(ids)))
    return rows if finds_answers else {"input_ids": rows["input_ids"]}


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens of each text, with the special tokens that the tokenizer adds by itself.

    Those that stand in the text already, as a chat template writes them, are not added a second time.
    """
    if not texts:
        return []
    rows = tokenizer(list(texts), return_attention_mask=False, return_token_type_ids=False, verbose=False)["input_ids"]
    bare, whole = (tokenizer("a", add_special_tokens=adds)["input_ids"] for adds in (False, True))
    begin = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
    first, last = whole[:begin], whole[begin + len(bare) :]
    for index, row in enumerate(rows):
        if first and row[len(first) : 2 * len(first)] == first:
            row = row[len(first) :]
        if last and _is_ended(row[: -len(last)], last[-1], tokenizer):
            row = row[: -len(last)]
        rows[index] = row
    return rows


def tokens_of(document: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of one document, of whichever kind, without an added end."""
    if "input_ids" in document:
        return list(document["input_ids"])
    if "conversation" in document:
        return encode_conversation(document["conversation"], tokenizer, finds_answers=False).input_ids
    return encode([document["text"]], tokenizer)[0]


def _is_ended(row: Sequence[int], token: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether nothing but white space, which chat templates write there, follows the last of these tokens."""
    tail = list(row[-8:])[::-1]
    return token in tail and not tokenizer.decode(tail[: tail.index(token)][::-1]).strip()


def _with_end(row: list[int], eos_token_id: int | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return row if eos_token_id is None or _is_ended(row, eos_token_id, tokenizer) else [*row, eos_token_id]


def _token_rows(
    batch: dict[str, list], tokenizer: PreTrainedTokenizerBase, eos_token_id: int | None
) -> dict[str, list]:
    rows = encode([text for text in batch["text"] if text is not None and text.strip()], tokenizer)
    return {"input_ids": [_with_end(row, eos_token_id, tokenizer) for row in rows if len(row)]}


def _checked_tokens(
    batch: dict[str, list], tokenizer: PreTrainedTokenizerBase, vocabulary: str, eos_token_id: int | None
) -> dict[str, list]:
    for found in set(batch["vocabulary"]):
        if found != vocabulary:
            raise ValueError(
                f"The documents were tokenised with another vocabulary ({found[:12]}) than that of tokenizer "
                f"({vocabulary[:12]}). Use the tokenizer they were written with, or tokenise the texts again."
            )
    return {"input_ids": [_with_end(list(row), eos_token_id, tokenizer) for row in batch["input_ids"] if len(row)]}


def _blocks(
    documents: Documents, block_size: int, isolate_documents: bool, drop_last: bool, layout: int
) -> Iterator[dict]:
    del layout
    block = {name: np.zeros(block_size, dtype=np.int32) for name in ("input_ids", "labels", "seq_idx", "position_ids")}
    fields = list(block) if isolate_documents else ["input_ids", "labels"]
    filled = pieces = 0
    for document in documents:
        tokens = np.asarray(document["input_ids"], dtype=np.int32)
        labels = _labels(document, tokens)
        start = 0
        while start < len(tokens):
            size = min(block_size - filled, len(tokens) - start)
            place = slice(filled, filled + size)
            block["input_ids"][place] = tokens[start : start + size]
            block["labels"][place] = labels[start : start + size]
            if isolate_documents or filled == 0:
                block["labels"][filled] = IGNORE_INDEX
            block["seq_idx"][place] = pieces
            block["position_ids"][place] = np.arange(size)
            start += size
            filled += size
            pieces += 1
            if filled == block_size:
                yield {name: block[name].copy() for name in fields}
                filled = pieces = 0
    if filled and not drop_last:
        yield {name: block[name][:filled].copy() for name in fields}


def _labels(document: Mapping[str, list], tokens: np.ndarray) -> np.ndarray:
    return np.where(document["learnt"], tokens, IGNORE_INDEX) if "learnt" in document else tokens


def _windows(
    batch: dict[str, list], block_size: int, padding_side: str, pad_token_id: int
) -> dict[str, list[list[int]]]:
    rows = {"input_ids": [], "attention_mask": [], "labels": []}
    for index, document in enumerate(batch["input_ids"]):
        tokens = np.asarray(document, dtype=np.int32)
        marked = _labels({name: column[index] for name, column in batch.items()}, tokens)
        for start in range(0, len(tokens), block_size):
            window = tokens[start : start + block_size]
            missing = block_size - len(window)
            width = (missing, 0) if padding_side == "left" else (0, missing)
            labels = marked[start : start + block_size].copy()
            labels[0] = IGNORE_INDEX
            rows["input_ids"].append(np.pad(window, width, constant_values=pad_token_id).tolist())
            rows["attention_mask"].append(np.pad(np.ones_like(window), width).tolist())
            rows["labels"].append(np.pad(labels, width, constant_values=IGNORE_INDEX).tolist())
    return rows


def columns_of(documents: Documents) -> list[str]:
    """Column names of a dataset or stream; reads the first row of a stream that does not know them."""
    if documents.column_names is not None:
        return list(documents.column_names)
    return list(next(iter(documents)))


def _check_block_size(block_size: int) -> None:
    if block_size < 2:
        raise ValueError(f"block_size is {block_size}, but predicting a next token takes at least 2 tokens a block.")


def _check_padding_side(padding_side: str) -> None:
    if padding_side not in ("left", "right"):
        raise ValueError(f'padding_side is {padding_side!r}. It must be "left" or "right".')
