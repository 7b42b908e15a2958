"""What a student is worth: perplexity, distance to its teacher, recall, speed, a sample. Each number with an interval.

Every function works for any causal language model, switches it to eval mode and puts the mode back.

Shapes: `b` batch, `t` token, `V` vocabulary, `n` rows (blocks or sequences).
"""

import inspect
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from cab_hf.data.documents import IGNORE_INDEX, LanguageCollator, shift_labels
from cab_hf.distillation.modeling_distillation import core_of
from cab_hf.evaluation.metrics import (
    distinct_n,
    perplexity_of_sums,
    ratio_interval,
    recall_of_counts,
    repetition_rate,
    safe_exp,
)
from cab_hf.teachers.teacher import check_vocabularies


# Dataset of rows, or (n, t) token ids, or rows as dicts or lists of token ids.
Blocks = datasets.Dataset | datasets.IterableDataset | torch.Tensor | Sequence[dict | Sequence[int]]

_CHUNK = 512


def perplexity(
    model: PreTrainedModel,
    blocks: Blocks,
    batch_size: int = 8,
    device: str | torch.device | None = None,
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
        device: Where to move the model first; by default it stays where it is.
        max_tokens: Stop after the row with which that many predicted tokens are reached.
        padding_side: Side on which ragged rows are padded.
        progress: Show a progress bar.

    Returns:
        `perplexity`, its 95 % interval `ci95` (normal approximation over blocks), `nll` in nats per token, `n_tokens`
        predicted, `n_blocks`.

    Raises:
        ValueError: No token to predict, or packed rows for a model that can't keep documents apart.
    """
    sums, counts = [], []
    with evaluating(model, device=device):
        for batch in _batches(model, blocks, batch_size, max_tokens, padding_side, progress, "Perplexity"):
            logits = _logits(model, batch)
            targets = shift_labels(batch["labels"]).to(logits.device)
            per_row = torch.zeros(len(targets), dtype=torch.float64, device=logits.device)
            for rows, columns, target in _token_chunks(targets):
                nll = F.cross_entropy(logits[rows, columns].float(), target, reduction="none")
                per_row.index_add_(0, rows, nll.double())
            sums += per_row.tolist()
            counts += (targets != IGNORE_INDEX).sum(1).tolist()
    return perplexity_of_sums(sums, counts)


def compare(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    blocks: Blocks,
    batch_size: int = 8,
    device: str | torch.device | None = None,
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
        blocks, batch_size, device, max_tokens, padding_side, progress: As in `perplexity`; both models are moved.

    Returns:
        `kl`: KL(teacher || student) in nats per predicted token; `agreement`: share of tokens where both models' most
        likely token is the same; `student_perplexity`, `teacher_perplexity`, `perplexity_ratio` (student / teacher),
        `n_tokens`, `n_blocks`. Each of the first five has its 95 % interval over blocks under `..._ci95`.

    Raises:
        ValueError: As in `perplexity`, or the vocabularies differ by more than padding.
    """
    totals = []
    with evaluating(student, teacher, device=device):
        for batch in _batches(student, blocks, batch_size, max_tokens, padding_side, progress, "Comparing", teacher):
            student_logits = _logits(student, batch)
            teacher_logits = _logits(teacher, batch)
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


def copying_recall(
    model: PreTrainedModel,
    vocabulary: int | Sequence[int],
    gap: int,
    *,
    length: int = 64,
    n: int = 32,
    seed: int = 0,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> dict[str, float | int | list[float]]:
    """Share of tokens that a model copies from earlier in its context, which perplexity does not show.

    A sequence is `length` different random tokens, `gap` random other tokens, and the first `length` tokens again.
    Counted are the tokens of the repeat but its first, which nothing announces: `length - 1` a sequence, each right
    when it is the most likely one given all (true) tokens before it.

    Args:
        model: Any causal language model.
        vocabulary: Size of the vocabulary, or the token ids to draw from (to leave out special tokens, for instance).
        gap: Tokens between the two copies.
        length: Tokens to copy.
        n: Sequences.
        seed: Picks the tokens.
        batch_size: Sequences a forward pass.
        device: Where to move the model first; by default it stays where it is.
        progress: Show a progress bar.

    Returns:
        `recall`, its 95 % interval `ci95` (Wilson, for the number of independent tokens that the spread between
        sequences speaks for), `n_tokens` counted, `n_sequences`, `gap`, `length`.

    Raises:
        ValueError: `vocabulary` has not enough tokens, `length` is below 2, or `gap` is negative.
    """
    pool = np.arange(vocabulary) if isinstance(vocabulary, int) else np.unique(np.asarray(vocabulary))
    if length < 2 or gap < 0 or n < 1:
        raise ValueError(f"length is {length}, gap {gap} and n {n}. They must be at least 2, 0 and 1.")
    if len(pool) < length + (gap > 0):
        raise ValueError(
            f"vocabulary has {len(pool)} tokens, fewer than the {length + (gap > 0)} that length {length} and gap "
            f"{gap} take. Use a smaller length or more tokens."
        )
    generator = np.random.default_rng(seed)
    sequences = []
    for _ in range(n):
        shuffled = generator.permutation(pool)
        copied, others = shuffled[:length], shuffled[length:]
        filler = generator.choice(others, gap) if gap else others[:0]
        sequences.append(np.concatenate([copied, filler, copied]))
    asked, answers = slice(-length, -1), slice(1 - length, None)
    found = _recall(model, sequences, asked, answers, f"Recall over a gap of {gap}", batch_size, device, progress)
    return found | {"gap": gap, "length": length}


def associative_recall(
    model: PreTrainedModel,
    vocabulary: int | Sequence[int],
    gap: int,
    *,
    pairs: int = 16,
    n: int = 32,
    seed: int = 0,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> dict[str, float | int | list[float]]:
    """Share of values that a model finds by their keys, shown earlier in its context.

    A sequence is `pairs` of a key and its value, all of them different random tokens, then `gap` random other tokens,
    then the pairs once more in another order. Counted are the values of the second showing, each right when it is the
    most likely token after its key. Unlike `copying_recall` the order does not help.

    Args:
        model: Any causal language model.
        vocabulary: Size of the vocabulary, or the token ids to draw from.
        gap: Tokens between the last pair and the first query.
        pairs: Keys, each with its value.
        n: Sequences.
        seed: Picks the tokens.
        batch_size: Sequences a forward pass.
        device: Where to move the model first; by default it stays where it is.
        progress: Show a progress bar.

    Returns:
        `recall`, its 95 % interval `ci95` as in `Recall`, `n_tokens` counted, `n_sequences`, `gap`, `pairs`.

    Raises:
        ValueError: `vocabulary` has not enough tokens, `pairs` or `n` is below 1, or `gap` is negative.

    Source: the task of Arora et al. (2023), "Zoology", there with queries at random distances.
    """
    pool = np.arange(vocabulary) if isinstance(vocabulary, int) else np.unique(np.asarray(vocabulary))
    if pairs < 1 or gap < 0 or n < 1:
        raise ValueError(f"pairs is {pairs}, gap {gap} and n {n}. They must be at least 1, 0 and 1.")
    needed = 2 * pairs + (gap > 0)
    if len(pool) < needed:
        raise ValueError(
            f"vocabulary has {len(pool)} tokens, fewer than the {needed} that {pairs} pairs and gap {gap} take. Use "
            "fewer pairs or more tokens."
        )
    generator = np.random.default_rng(seed)
    sequences = []
    for _ in range(n):
        shuffled = generator.permutation(pool)
        shown, others = shuffled[: 2 * pairs].reshape(pairs, 2), shuffled[2 * pairs :]
        filler = generator.choice(others, gap) if gap else others[:0]
        sequences.append(np.concatenate([shown.ravel(), filler, generator.permutation(shown).ravel()]))
    keys, values = slice(-2 * pairs, None, 2), slice(1 - 2 * pairs, None, 2)
    title = f"Associative recall over a gap of {gap}"
    found = _recall(model, sequences, keys, values, title, batch_size, device, progress)
    return found | {"gap": gap, "pairs": pairs}


def generate(
    model: PreTrainedModel, prompts: torch.Tensor, new_tokens: int, batch_size: int = 8, seed: int = 0
) -> dict[str, dict[str, float | int]]:
    """How much a model repeats itself, greedily and sampled at temperature 1.

    Args:
        model: Any causal language model.
        prompts: Token ids (n, t), all real ones.
        new_tokens: Tokens of a continuation at most; one ends early where the model ends it.
        batch_size: Prompts at a time.
        seed: Of the random draws; the global random state is left alone.

    Returns:
        Under `greedy` and `sampled`: `repetition_rate` of 4-grams, `distinct_1`, `distinct_2`, `distinct_3`,
        `n_tokens` made and `n_texts`.
    """
    end = model.generation_config.eos_token_id
    ends = np.atleast_1d([] if end is None else end).astype(int)
    settings = {
        "max_new_tokens": new_tokens,
        "eos_token_id": ends.tolist() or None,
        "pad_token_id": int(ends[0]) if len(ends) else 0,
    }
    report = {}
    for way, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        texts = []
        with generating(model, seed, temperature, **settings):
            for start in tqdm(range(0, len(prompts), batch_size), desc=f"Generating ({way})"):
                batch = prompts[start : start + batch_size].to(model.device)
                out = model.generate(batch, attention_mask=torch.ones_like(batch))
                texts += [_before_end(row, ends) for row in out[:, batch.shape[1] :].tolist()]
        report[way] = {
            "repetition_rate": repetition_rate(texts),
            **{f"distinct_{size}": distinct_n(texts, size) for size in (1, 2, 3)},
            "n_tokens": sum(map(len, texts)),
            "n_texts": len(texts),
        }
    return report


def _recall(
    model: PreTrainedModel,
    sequences: Sequence[np.ndarray],
    asked: slice,
    answers: slice,
    title: str,
    batch_size: int,
    device: str | torch.device | None,
    progress: bool,
) -> dict[str, float | int | list[float]]:
    """How often the likeliest token after those at `asked` is the one at `answers`, in sequences of one length."""
    tokens = torch.from_numpy(np.stack(sequences))
    positions = num_positions(model)
    is_table = getattr(_core(model).config.get_text_config(), "rope_parameters", None) is None
    if positions and is_table and tokens.shape[1] > positions:
        raise ValueError(
            f"{title}: a row has {tokens.shape[1]} tokens, but {type(_core(model)).__name__} has positions for "
            f"{positions}. Use a smaller gap."
        )
    right = []
    with evaluating(model, device=device):
        for batch in _batches(model, tokens, batch_size, None, "right", progress, title):
            predicted = _logits(model, batch)[:, asked].argmax(-1)
            right += (predicted == batch["input_ids"][:, answers].to(predicted.device)).sum(1).tolist()
    return recall_of_counts(right, [tokens[0, answers].numel()] * len(tokens))


def _before_end(row: list[int], ends: Sequence[int]) -> list[int]:
    return row[: next((place for place, token in enumerate(row) if token in ends), len(row))]


def throughput(
    model: PreTrainedModel,
    length: int,
    batch_size: int,
    mode: str = "forward",
    *,
    new_tokens: int = 64,
    repeats: int = 5,
    warmup: int = 2,
    seed: int = 0,
) -> dict[str, float | int | str]:
    """Tokens a second, on random tokens, where the model is and in its dtype.

    Args:
        model: Any causal language model.
        length: Tokens of a row (`forward`) or of a prompt (`generate`).
        batch_size: Rows.
        mode: "forward": one pass over `length` tokens without a cache, counting them; logits of the last token only.
            "generate": greedy decoding of `new_tokens` after the prompt, counting new tokens; the time includes the
            pass over the prompt.
        new_tokens: Tokens to generate a row.
        repeats: Timed runs.
        warmup: Runs before them.
        seed: Picks the tokens.

    Returns:
        `tokens_per_second` (median of the runs), `slowest` and `fastest` run in the same unit, and what was measured:
        `mode`, `length`, `batch_size`, `new_tokens`, `repeats`, `device`, `dtype`.

    Raises:
        ValueError: `mode` is neither "forward" nor "generate".
    """
    if mode not in ("forward", "generate"):
        raise ValueError(f'mode is {mode!r}. It must be "forward" or "generate".')
    device = model.device
    generator = torch.Generator().manual_seed(seed)
    vocab_size = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(vocab_size, (batch_size, length), generator=generator).to(device)

    def run() -> None:
        if mode == "forward":
            model(input_ids=tokens, use_cache=False, logits_to_keep=1)
        else:
            model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )

    seconds = []
    with evaluating(model):
        for index in tqdm(range(warmup + repeats), desc=f"Throughput ({mode}, {length} tokens)"):
            _synchronise(device)
            start = time.perf_counter()
            run()
            _synchronise(device)
            if index >= warmup:
                seconds.append(time.perf_counter() - start)
    counted = batch_size * (length if mode == "forward" else new_tokens)
    return {
        "tokens_per_second": counted / statistics.median(seconds),
        "slowest": counted / max(seconds),
        "fastest": counted / min(seconds),
        "mode": mode,
        "length": length,
        "batch_size": batch_size,
        "new_tokens": new_tokens if mode == "generate" else 0,
        "repeats": repeats,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 64,
    seed: int = 0,
    *,
    temperature: float = 1.0,
) -> str:
    """A continuation of `prompt`, the same for the same seed; the global random state is left alone.

    Args:
        model: Any causal language model.
        tokenizer: Its tokenizer.
        prompt: Text to continue.
        max_new_tokens: Tokens at most; fewer when the model ends the text.
        seed: Of the random draws.
        temperature: Divides the logits; 0.0 takes the most likely token each time.

    Returns:
        The new text, without the prompt.
    """
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    settings = {
        "max_new_tokens": max_new_tokens,
        "eos_token_id": model.generation_config.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    }
    with generating(model, seed, temperature, **settings):
        output = model.generate(**inputs)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@contextmanager
def generating(model: PreTrainedModel, seed: int, temperature: float, **settings: Any) -> Iterator[None]:
    """`model.generate` draws from the model's whole distribution, the same for the same seed.

    A model's own settings, which may hold penalties or cut tails, are put aside; the global random state is left
    alone.

    Args:
        model: Any causal language model.
        seed: Of the random draws.
        temperature: Divides the logits; 0.0 takes the most likely token each time.
        settings: Others of a `GenerationConfig`.
    """
    draws = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    core = _core(model)
    own = core.generation_config
    # As an argument of `generate` it would be filled up with the model's own.
    core.generation_config = GenerationConfig(**(draws if temperature > 0 else {"do_sample": False}), **settings)
    try:
        with evaluating(model), torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield
    finally:
        core.generation_config = own


@contextmanager
def evaluating(*models: nn.Module, device: str | torch.device | None = None) -> Iterator[None]:
    """Models in evaluation mode, without gradients and, if given, on a device; each module then has its mode back."""
    if device is not None:
        for model in models:
            model.to(device)
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _batches(
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
    total = None if max_tokens is not None or isinstance(blocks, datasets.IterableDataset) else len(blocks)
    with tqdm(desc=description, total=total, unit="row", disable=not progress) as bar:
        for rows in _grouped(_rows(blocks, max_tokens), batch_size):
            batch = collate(rows)
            for one in (model, *others):
                check_packing(one, batch)
            yield batch
            bar.update(len(rows))


def _rows(blocks: Blocks, max_tokens: int | None) -> Iterator[dict]:
    found = 0
    for block in blocks:
        row = block if isinstance(block, dict) else {"input_ids": block}
        yield row
        labels = np.asarray(row.get("labels", row["input_ids"]))[1:]
        seen = np.asarray(row["attention_mask"])[1:] if "attention_mask" in row else np.ones_like(labels)
        found += int(np.count_nonzero((labels != IGNORE_INDEX) & (seen != 0)))
        if max_tokens is not None and found >= max_tokens:
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
    needed = "seq_idx" if _core(model)._is_stateful else "position_ids"
    if needed not in _accepted(model) or needed not in batch:
        raise ValueError(
            f"The rows hold packed documents ({', '.join(batch)}), but {type(model).__name__} keeps documents apart "
            f"only by {needed}. Use rows of pad_documents, or of pack_documents(..., isolate_documents=False)."
        )


def _logits(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    accepted = _accepted(model).keys() - {"labels"}
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name in accepted}
    if "attention_mask" in inputs and "position_ids" in accepted:
        # Learned positions would otherwise count padding on the left.
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    # With a cache Transformers models would not see the borders between packed documents.
    return model(**inputs, use_cache=False).logits


def _accepted(model: PreTrainedModel) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(_core(model).forward).parameters


def num_positions(model: PreTrainedModel) -> int | None:
    """Tokens of a row that a language model has positions for; None: any number. Rotary positions go on beyond it."""
    return getattr(_core(model).config.get_text_config(), "max_position_embeddings", None)


def _core(model: PreTrainedModel | nn.Module) -> PreTrainedModel:
    """The model without torch.compile or an adapter around it."""
    return core_of(getattr(model, "_orig_mod", model))


def _token_chunks(targets: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Row, column and target of the predicted tokens, a bounded number at a time."""
    rows, columns = torch.nonzero(targets != IGNORE_INDEX, as_tuple=True)
    for start in range(0, len(rows), _CHUNK):
        place = rows[start : start + _CHUNK], columns[start : start + _CHUNK]
        yield *place, targets[place]


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
