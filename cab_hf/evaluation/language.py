"""What a student is worth: perplexity, distance to its teacher, recall, speed, a sample. Each number with an interval.

Every function works for any causal language model, switches it to eval mode and puts the mode back.

Shapes: `b` batch, `t` token, `V` vocabulary, `n` rows (blocks or sequences).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import datasets
import numpy as np
import torch
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from cab_hf.data.packing import IGNORE_INDEX, LanguageCollator, shift_labels
from cab_hf.evaluation.metrics import (
    Perplexity,
    ratio_interval,
    safe_exp,
)
from cab_hf.inference import accepted_arguments, check_causal, check_positions, evaluating
from cab_hf.lora import core_of
from cab_hf.teachers.teacher import check_vocabularies


# Dataset of rows, or (n, t) token ids, or rows as dicts or lists of token ids.
Blocks = datasets.Dataset | datasets.IterableDataset | torch.Tensor | Sequence[dict | Sequence[int]]

PIECE = 2048
"""Tokens of a forward pass where a row is read in pieces."""

_TRIED = 12  # tokens that show whether a model goes on from its cache
_CHUNK = 512
_MEMORY = ("cache", "past_key_values", "cache_params")


def perplexity(
    model: PreTrainedModel,
    blocks: Blocks,
    batch_size: int = 8,
    *,
    max_tokens: int | None = None,
    padding_side: str = "right",
    progress: bool = True,
) -> dict[str, float | int | list[float]]:
    """Perplexity per token of a causal language model.

    Labels are shifted here; -100 and padding do not count. Log-probabilities are float32 whatever the model's dtype.

    Args:
        model: Any causal language model.
        blocks: Rows of `pack_documents` or `pad_documents`, or bare token ids. Rows with `seq_idx` or `position_ids`
            hold packed documents, which stay apart.
        batch_size: Rows a forward pass; its logits are held in the model's dtype.
        max_tokens: Stop after so many predicted tokens, within a row if need be.
        padding_side: Side on which ragged rows are padded.
        progress: Show a progress bar.

    Returns:
        `perplexity`, its 95 % interval `ci95` (normal approximation over blocks), `nll` in nats per token, `n_tokens`
        predicted, `n_blocks`.

    Raises:
        ValueError: No token to predict, or packed rows for a model that can't keep documents apart.
    """
    sums, counts = [], []
    with evaluating(model):
        for batch in batches_of(model, blocks, batch_size, max_tokens, padding_side, progress, "Perplexity"):
            logits = logits_of(model, batch)
            targets = shift_labels(batch["labels"]).to(logits.device)
            per_row = torch.zeros(len(targets), dtype=torch.float64, device=logits.device)
            for rows, columns, target in _token_chunks(targets):
                nll = F.cross_entropy(logits[rows, columns].float(), target, reduction="none")
                per_row.index_add_(0, rows, nll.double())
            sums += per_row.tolist()
            counts += (targets != IGNORE_INDEX).sum(1).tolist()
    metric = Perplexity(keep_in_memory=True)
    return metric.compute(predictions=[-nll for nll in sums], references=counts)


def compare(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    blocks: Blocks,
    batch_size: int = 8,
    *,
    max_tokens: int | None = None,
    padding_side: str = "right",
    progress: bool = True,
) -> dict[str, float | int | list[float]]:
    """How far a student is from its teacher, over the same tokens in one pass.

    Perplexity alone hides a student that has only adapted to a text: a ratio of 1 may come with a large divergence.
    Where the vocabularies differ by padding, the logits are compared over the smaller one.

    Args:
        student: The student.
        teacher: The teacher, a model of the same vocabulary.
        blocks, batch_size, max_tokens, padding_side, progress: As in `perplexity`.

    Returns:
        `kl`: KL(teacher || student) in nats per predicted token; `agreement`: share of tokens where both models' most
        likely token is the same; `student_perplexity`, `teacher_perplexity`, `perplexity_ratio` (student / teacher),
        `n_tokens`, `n_blocks`. Each of the first five has its 95 % interval over blocks under `..._ci95`.

    Raises:
        ValueError: As in `perplexity`, or the vocabularies differ by more than padding.
    """
    totals = []
    with evaluating(student, teacher):
        for batch in batches_of(student, blocks, batch_size, max_tokens, padding_side, progress, "Comparing", teacher):
            student_logits = logits_of(student, batch)
            teacher_logits = logits_of(teacher, batch)
            vocab_size = check_vocabularies(student_logits.shape[-1], teacher_logits.shape[-1])
            targets = shift_labels(batch["labels"]).to(student_logits.device)
            per_row = torch.zeros(len(targets), 4, dtype=torch.float64, device=student_logits.device)
            for rows, columns, target in _token_chunks(targets):
                ours = F.log_softmax(student_logits[rows, columns, :vocab_size].float(), dim=-1)
                place = rows.to(teacher_logits.device), columns.to(teacher_logits.device)
                theirs = teacher_logits[place][:, :vocab_size].to(ours.device).float().log_softmax(dim=-1)
                values = (
                    F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1),
                    ours.argmax(-1) == theirs.argmax(-1),
                    F.nll_loss(ours, target, reduction="none"),
                    F.nll_loss(theirs, target, reduction="none"),
                )
                per_row.index_add_(0, rows, torch.stack([value.double() for value in values], dim=-1))
            counts = (targets != IGNORE_INDEX).sum(1, keepdim=True)
            totals.append(torch.cat([per_row, counts], dim=1).cpu().numpy())
    kl, agreement, student_nll, teacher_nll, tokens = np.concatenate(totals or [np.zeros((0, 5))]).T

    report: dict[str, float | int | list[float]] = {}
    for name, sums in (
        ("kl", kl),
        ("agreement", agreement),
        ("student_perplexity", student_nll),
        ("teacher_perplexity", teacher_nll),
        ("perplexity_ratio", student_nll - teacher_nll),
    ):
        numbers = ratio_interval(sums, tokens)
        report[name], low, high = map(safe_exp, numbers) if "perplexity" in name else numbers
        report[f"{name}_ci95"] = [max(low, 0.0), min(high, 1.0) if name == "agreement" else high]
    return report | {"n_tokens": int(tokens.sum()), "n_blocks": int(np.count_nonzero(tokens))}


def batches_of(
    model: PreTrainedModel,
    blocks: Blocks,
    batch_size: int,
    max_tokens: int | None,
    padding_side: str,
    progress: bool,
    description: str,
    *others: PreTrainedModel,
) -> Iterator[dict[str, torch.Tensor]]:
    # Padding is masked, so any token serves.
    collate = LanguageCollator(pad_token_id=0, padding_side=padding_side)
    for one in (model, *others):
        check_causal(one)
    if max_tokens is not None:
        blocks = list(_first_tokens(blocks, max_tokens))
    total = None if isinstance(blocks, datasets.IterableDataset) else len(blocks)
    with tqdm(desc=description, total=total, unit=" rows", disable=not progress) as bar:
        for rows in _grouped(map(_row, blocks), batch_size):
            batch = collate(rows)
            for one in (model, *others):
                check_packing(one, batch)
                check_positions(one, batch)
            yield batch
            bar.update(len(rows))


def _row(block: dict | Sequence[int]) -> dict:
    return block if isinstance(block, dict) else {"input_ids": block}


def _first_tokens(blocks: Blocks, max_tokens: int) -> Iterator[dict]:
    """Rows up to the one with the last predicted token that counts; what it predicts after that is not counted."""
    for row in map(_row, blocks):
        labels = np.asarray(row.get("labels", row["input_ids"])).copy()
        if "attention_mask" in row:
            labels[np.asarray(row["attention_mask"]) == 0] = IGNORE_INDEX
            labels[np.flatnonzero(row["attention_mask"])[:1]] = IGNORE_INDEX
        labels[:1] = IGNORE_INDEX
        predicted = np.flatnonzero(labels != IGNORE_INDEX)
        labels[predicted[max_tokens:]] = IGNORE_INDEX
        yield row | {"labels": labels}
        max_tokens -= len(predicted)
        if max_tokens <= 0:
            return


def _grouped(rows: Iterable[dict], size: int) -> Iterator[list[dict]]:
    group = []
    for row in rows:
        group.append(row)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def check_packing(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> None:
    """Raises a ValueError where a batch holds packed documents that a model would not keep apart."""
    if not batch.keys() & {"seq_idx", "position_ids"}:
        return
    needed = "seq_idx" if core_of(model)._is_stateful else "position_ids"
    if needed not in accepted_arguments(model) or needed not in batch:
        raise ValueError(
            f"The rows hold packed documents ({', '.join(batch)}), but {type(model).__name__} keeps documents apart "
            f"only by {needed}. Use rows of pad_documents, or of pack_documents(..., isolate_documents=False)."
        )


def logits_of(model: PreTrainedModel, batch: dict[str, torch.Tensor], first: int = 0) -> torch.Tensor:
    """Logits of rows (b, t) from their token `first` on: (b, t - first, V)."""
    accepted = accepted_arguments(model).keys() - {"labels"}
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name in accepted}
    if "attention_mask" in inputs and "position_ids" in accepted:
        # Learned positions would otherwise count padding on the left.
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    kept = batch["input_ids"].shape[1] - first
    if first and "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = kept
    # With a cache Transformers models would not see the borders between packed documents.
    return model(**inputs, use_cache=False).logits[:, -kept:]


def logits_in_pieces(
    model: PreTrainedModel, tokens: torch.Tensor, first: int = 0, piece: int = PIECE
) -> Iterator[tuple[int, torch.Tensor]]:
    """Logits of rows without padding, a piece at a time: memory does not grow with a row's length as all logits would.

    Args:
        model: Any causal language model. One that takes no cache, or does not go on from it by several tokens as it
            would without it (Jamba's mixers begin anew), reads the rows whole.
        tokens: Token ids (b, t).
        first: The first token whose logits are wanted.
        piece: Tokens a forward pass; later ones go on from the cache of the earlier ones.

    Yields:
        A place in the row, and the logits (b, up to `piece`, V) from there on.
    """
    length = tokens.shape[1]
    memory = next((name for name in _MEMORY if name in accepted_arguments(model)), None)
    if memory is None or length <= piece or not _goes_on(model, memory, tokens[:1, :_TRIED].to(model.device)):
        yield first, logits_of(model, {"input_ids": tokens}, first)
        return
    yield from _pieces(model, memory, tokens.to(model.device), first, piece)


def _pieces(
    model: PreTrainedModel, memory: str, tokens: torch.Tensor, first: int, piece: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """As `logits_in_pieces`, of a model that goes on from its `memory`, the argument that takes its cache."""
    length, cache = tokens.shape[1], None
    mask = torch.ones_like(tokens)
    for start in range(0, length, piece):
        end = min(start + piece, length)
        wanted = end - max(start, first)
        given = {"attention_mask": mask[:, :end]} if "attention_mask" in accepted_arguments(model) else {}
        given |= {memory: cache, "use_cache": True, "logits_to_keep": max(wanted, 1)}
        output = model(input_ids=tokens[:, start:end], **given)
        cache = output[memory]
        if wanted > 0:
            yield end - wanted, output.logits


def _goes_on(model: PreTrainedModel, memory: str, tokens: torch.Tensor) -> bool:
    """Whether the second half of a row `(1, t)` behind a cache is what it is in the whole row, but for rounding."""
    half = tokens.shape[1] // 2
    whole = logits_of(model, {"input_ids": tokens}, half).float()
    ((_, behind),) = _pieces(model, memory, tokens, half, half)
    return bool((behind - whole).norm() < 0.05 * whole.norm())


def _token_chunks(targets: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Row, column and target of the predicted tokens, a bounded number at a time."""
    rows, columns = torch.nonzero(targets != IGNORE_INDEX, as_tuple=True)
    for start in range(0, len(rows), _CHUNK):
        place = rows[start : start + _CHUNK], columns[start : start + _CHUNK]
        yield *place, targets[place]
