"""Which layers of attention a hybrid should keep: replaced one at a time and measured, without training."""

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

    With all attention in its place, each layer's mixer takes over alone, and the student is measured: its KL to the
    teacher on text, and how much it copies (`copying_recall`, mean over the gaps). The layers whose mixers do worst
    keep their attention: by "kl" those that raise the KL most, by "copying" those without which least is copied, by
    "both" those of the largest

        share of all layers' rise of the KL + share of all layers' loss of copying,

    where a loss within two standard errors is none. "evenly" measures, too, but takes evenly spread layers.

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
        each path in `replaced`.

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

    with tqdm(desc="Choosing attention", total=2 + len(paths), disable=not progress) as bar:
        all_kept = measured(paths)
        replaced = {path: measured([one for one in paths if one != path]) for path in paths}
        rate = all_kept["copying"]
        surely = rate - 2 * (rate * (1 - rate) / counts["n_copied"]) ** 0.5  # two standard errors below
        missed = {
            "kl": {path: max(one["kl"] - all_kept["kl"], 0.0) for path, one in replaced.items()},
            "copying": {path: max(surely - one["copying"], 0.0) for path, one in replaced.items()},
        }
        missed["both"] = {
            path: sum(one[path] / (sum(one.values()) or 1.0) for one in missed.values()) for path in paths
        }
        if by == "evenly":
            kept = kept_paths(count, paths)
        else:
            kept = sorted(paths, key=lambda path: (missed[by][path], missed["kl"][path]), reverse=True)[:count]
            kept.sort(key=paths.index)
        chosen = measured(kept)
    return {
        "by": by,
        "paths": paths,
        "kept": list(kept),
        "layers": [paths.index(path) for path in kept],
        "gaps": list(gaps),
        "length": length,
        **counts,
        "all_kept": all_kept,
        "replaced": replaced,
        "chosen": chosen,
        "seconds": round(time.perf_counter() - began, 1),
    }


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
