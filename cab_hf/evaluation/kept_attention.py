"""Which layers of attention a hybrid should keep: put back one at a time and measured, without training."""

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
    """The layers of attention that bring a hybrid closest to its teacher, taken greedily.

    With what is taken so far in place, each other layer's attention is put back in turn, and the student measured:
    its KL to the teacher on text, and how much it copies (`copying_recall`, mean over the gaps). The best is taken,
    until there are `count`. By "kl" that is the lowest KL, by "copying" the most copied, by "both" the largest

        share of tokens copied - KL / KL with nothing kept.

    Where two are equal, the lower KL decides, then the earlier layer. "evenly" measures evenly spread layers only.

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
        `n_tokens` of the text, `n_copied` tokens, `seconds`; `teacher` (`copying`), `nothing_kept` (`kl`, `copying`),
        and for each of `steps` the path `kept`, its `kl` and `copying`, and those of all `candidates`.

    Raises:
        ValueError: `count` is none, or all, of the layers, or `by` is unknown.

    Source: KL-guided layer selection (arXiv 2512.20569) restores one layer at a time. Copying counts, too, because the
    KL may hide what it is about (`tests/evaluation/test_kept_attention.py` trains a teacher that shows it).

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

    def copying(model: PreTrainedModel) -> float:
        options = {"length": length, "n": SEQUENCES, "batch_size": batch_size, "progress": False}
        found = [copying_recall(model, vocabulary, gap, **options) for gap in gaps]
        counts["n_copied"] = sum(one["n_tokens"] for one in found)
        return sum(one["recall"] for one in found) / len(found)

    def measured(kept: Sequence[str]) -> dict[str, float]:
        with with_attention(student, {path: attention[path] for path in kept}):
            compared = compare(student, teacher, blocks, batch_size, progress=False)
            counts["n_tokens"] = compared["n_tokens"]
            bar.update()
            return {"kl": compared["kl"], "copying": copying(student)}

    def worth(found: Mapping[str, float]) -> tuple[float, float]:
        scores = {"kl": -found["kl"], "copying": found["copying"]}
        scores["both"] = scores["copying"] - found["kl"] / start["kl"]
        return scores.get(by, 0.0), -found["kl"]

    even, kept, steps = kept_paths(count, paths), [], []
    total = 1 + sum(1 if by == "evenly" else len(paths) - step for step in range(count))
    with tqdm(desc="Choosing attention", total=total, disable=not progress) as bar:
        start, goal = measured([]), copying(teacher)
        for step in range(count):
            others = [even[step]] if by == "evenly" else [path for path in paths if path not in kept]
            candidates = {path: measured([*kept, path]) for path in others}
            best = max(candidates, key=lambda path: worth(candidates[path]))
            kept.append(best)
            steps.append({"kept": best, **candidates[best], "candidates": candidates})
    kept.sort(key=paths.index)
    return {
        "by": by,
        "paths": paths,
        "kept": kept,
        "layers": [paths.index(path) for path in kept],
        "gaps": list(gaps),
        "length": length,
        **counts,
        "teacher": {"copying": goal},
        "nothing_kept": start,
        "steps": steps,
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
    """What was taken when, a line a step, for the terminal."""
    rows = [("nothing kept", choice["nothing_kept"])]
    rows += [(f"+ {step['kept']}", step) for step in choice["steps"]]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  KL {one['kl']:.4f}  copying {one['copying']:.3f}" for name, one in rows]
    return "\n".join([*lines, f"{'teacher':<{width}}  KL 0.0000  copying {choice['teacher']['copying']:.3f}"])
