"""Which layers of attention a hybrid should keep: taken away in rounds and measured, without training."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from cab_hf.evaluation.language import Blocks, compare
from cab_hf.evaluation.recall import copying_recall
from cab_hf.models import CABHybridForCausalLM
from cab_hf.transfer.hybrid import kept_paths, with_attention


GAPS = (16, 64, 256)
Measured = Mapping[str, float]
SEQUENCES = 16  # of each gap


def choose_attention(
    student: CABHybridForCausalLM,
    teacher: PreTrainedModel,
    attention: Mapping[str, nn.Module],
    count: int,
    blocks: Blocks,
    vocabulary: int | Sequence[int],
    *,
    by: Literal["both", "kl", "copying", "evenly"] = "both",
    gaps: Sequence[int] = GAPS,
    length: int = 64,
    batch_size: int = 8,
    progress: bool = True,
) -> dict[str, Any]:
    """The layers whose attention a hybrid misses most.

    At first all attention is in its place. In each round every layer's mixer (and window, if it has one) takes over
    alone, and the student is measured: its KL to the teacher on text, and how much it copies (`copying_recall`, mean
    over the gaps). Then a third of the layers lose their attention for good: those whose mixers cost least, by "kl"
    in the KL, by "copying" in what is copied, by "both" in

        share of all layers' rise of the KL + share of all layers' loss of copying,

    where a loss within two standard errors is none. Rounds go on until `count` layers are left. "evenly" measures one
    round, too, but takes evenly spread layers.

    Args:
        student: with a mixer in place of each module of `attention`, aligned; it is as before in the end.
        teacher: of the student.
        attention: of `cab_hf.transfer.hybrid.attention_for`, which must be made before the teacher's weights are
            rounded.
        count: layers to take, fewer than there are.
        blocks: rows of text to measure the KL on, as `compare` takes them.
        vocabulary: as in `copying_recall`.
        by: what is best.
        gaps, length: tokens between the two copies, and of a copy.
        batch_size: rows a forward pass.
        progress: show a progress bar.

    Returns:
        `kept`, of `paths`, and `layers`, their indices, in the order of their calls; `by`, `gaps`, `length`,
        `n_tokens` of the text, `n_copied` tokens, `seconds`; `kl` and `copying` of `all_kept`, of `chosen` and of
        each path in `replaced`, the first round. All are in `rounds`: the layers that were `left` before, their `kl`
        and `copying`, and those of each path `replaced` beside the ones taken away before.

    Raises:
        ValueError: `count` is none, or all, of the layers, or `by` is unknown.

    Source: HALO (arXiv 2601.22156) scores layers by what replacing one costs. Putting one back where all are replaced,
    as KL-guided selection (arXiv 2512.20569) does, told nothing here: copying takes several layers, and one alone
    copies nothing (`benchmarks/quality/hybrids/auto`).

    Example:
        >>> import torch
        >>> from cab_hf.transfer import attention_for, put_back, student_from_teacher
        >>> from cab_hf.teachers.demo import random_llama
        >>> teacher, _ = random_llama()
        >>> student = student_from_teacher(teacher, keep_attention=0, data=())  # and align it
        >>> attention = attention_for(student, teacher)
        >>> rows = torch.arange(64).view(2, 32)
        >>> choice = choose_attention(student, teacher, attention, 1, rows, vocabulary=257, progress=False)
        >>> put_back(student, {path: attention[path] for path in choice["kept"]})
        >>> len(student.mixers)
        3
    """
    began = time.perf_counter()
    paths = list(attention)
    check_count(count, len(paths))
    if by not in ("both", "kl", "copying", "evenly"):
        raise ValueError(f"`by` is {by!r}. Choose 'both', 'kl', 'copying' or 'evenly'.")
    attention = {path: module.to(student.device) for path, module in attention.items()}
    counts = {}

    def measured(kept: Sequence[str]) -> dict[str, float]:
        options = {"length": length, "n": SEQUENCES, "batch_size": batch_size, "progress": False}
        with with_attention(student, {path: attention[path] for path in kept}):
            compared = compare(student, teacher, blocks, batch_size, progress=False)
            found = [copying_recall(student, vocabulary, gap, **options) for gap in gaps]
        counts.update(n_tokens=compared["n_tokens"], n_copied=sum(one["n_tokens"] for one in found))
        bar.update()
        return {"kl": compared["kl"], "copying": sum(one["recall"] for one in found) / len(found)}

    with tqdm(desc="Choosing attention", disable=not progress) as bar:
        all_kept = now = measured(paths)
        kept, rounds = list(paths), []
        while len(kept) > count:
            replaced = {path: measured([one for one in kept if one != path]) for path in kept}
            rounds.append({"left": kept, **now, "replaced": replaced})
            cost = _costs(now, replaced, counts["n_copied"])
            if by == "evenly":
                kept = kept_paths(count, paths)
            else:
                order = sorted(kept, key=lambda path: (cost[by][path], cost["kl"][path]))
                gone = order[: min(len(kept) - count, max(len(kept) // 3, 1))]
                kept = [path for path in kept if path not in gone]
            now = measured(kept)
    return {
        "by": by,
        "paths": paths,
        "kept": list(kept),
        "layers": [paths.index(path) for path in kept],
        "gaps": list(gaps),
        "length": length,
        **counts,
        "all_kept": all_kept,
        "replaced": rounds[0]["replaced"],
        "chosen": now,
        "rounds": rounds,
        "seconds": round(time.perf_counter() - began, 1),
    }


def _costs(now: Measured, replaced: Mapping[str, Measured], n_copied: int) -> dict[str, dict[str, float]]:
    """What taking each layer away costs, by each way to count."""
    rate = now["copying"]
    surely = rate - 2 * (rate * (1 - rate) / n_copied) ** 0.5  # two standard errors below
    cost = {
        "kl": {path: max(one["kl"] - now["kl"], 0.0) for path, one in replaced.items()},
        "copying": {path: max(surely - one["copying"], 0.0) for path, one in replaced.items()},
    }
    cost["both"] = {path: sum(one[path] / (sum(one.values()) or 1.0) for one in cost.values()) for path in replaced}
    return cost


def check_count(count: int, layers: int) -> None:
    """That some of the layers can be chosen.

    Raises:
        ValueError: none of them, all or more.
    """
    if not 0 < count < layers:
        raise ValueError(
            f"`keep_attention` is to choose {count} of {layers} layers that attend. Choose 1 to {layers - 1}."
        )


def choice_table(choice: Mapping[str, Any]) -> str:
    """What each layer's mixer does alone, a line a layer, for the terminal."""
    rows = [("all attention kept", choice["all_kept"])]
    rows += [(path + (", kept" if path in choice["kept"] else ""), one) for path, one in choice["replaced"].items()]
    rows += [("what is chosen", choice["chosen"])]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  KL {one['kl']:.4f}  copying {one['copying']:.3f}" for name, one in rows)
