"""Language tasks that people know, over local files, scored by lm-eval: teacher and student on the same questions.

The files are those of mosaicml/llm-foundry, `scripts/eval/local_data` (Apache-2.0), and the prompts are that
project's: scores compare a student with its teacher, not with published ones.

Source: Gao et al., "The language model evaluation harness" (`lm_eval`, an optional package).
"""

import copy
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cab_hf.evaluation.metrics import Z95, mean_interval, standard_error
from cab_hf.inference import check_causal, evaluating


ABOVE_CHANCE = 3.0
"""Standard errors by which a teacher is above chance where its margin counts."""


class _Task(NamedTuple):
    """A file, what counts in it, and what lm-eval has to know.

    `acc_norm` is the accuracy where a choice's log-likelihood is divided by its characters: lm-eval's custom for
    questions whose choices differ much in length.
    """

    file: str
    metric: str
    config: Mapping[str, Any]


def _choice(prompt: str, **others: str) -> dict[str, str]:
    plain = {"doc_to_choice": "choices", "doc_to_target": "gold"}
    return {"output_type": "multiple_choice", "doc_to_text": prompt} | plain | others


# Only before choices lm-eval puts a space by itself.
_LAST_WORD = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{context}}",
    "doc_to_target": "{{' ' + continuation}}",
}
# The two contexts are scored by what follows both (partial evaluation): the text is which one is right.
_CONTEXTS = _choice("gold", doc_to_choice="context_options", doc_to_target="continuation")
TASKS: dict[str, _Task] = {
    "lambada": _Task("lambada_openai.jsonl", "acc", _LAST_WORD),
    "piqa": _Task("piqa.jsonl", "acc", _choice("{{query}}Answer:")),
    "arc_easy": _Task("arc_easy.jsonl", "acc", _choice("{{query}}\nAnswer:")),
    "arc_challenge": _Task("arc_challenge.jsonl", "acc_norm", _choice("{{query}}\nAnswer:")),
    "winogrande": _Task("winogrande.jsonl", "acc", _CONTEXTS),
    "openbook_qa": _Task("openbook_qa.jsonl", "acc_norm", _choice("{{query}}")),
    "copa": _Task("copa.jsonl", "acc", _choice("{{query}}")),
}


class Scores(NamedTuple):
    """What a model got right of a task.

    Attributes:
        metric: "acc" or "acc_norm".
        chance: accuracy of a guess.
        right: (n,) one or zero a question, in the file's order.
    """

    metric: str
    chance: float
    right: np.ndarray


def tasks_in(folder: str | Path) -> dict[str, _Task]:
    """The tasks whose files a folder holds.

    Raises:
        ValueError: There is none.
        ImportError: `lm_eval`, which scores them, is missing.
    """
    present = {name: task for name, task in TASKS.items() if (Path(folder) / task.file).is_file()}
    if not present:
        raise ValueError(
            f"tasks is {str(folder)!r}, where there is none of {', '.join(task.file for task in TASKS.values())}. "
            "Name the folder of these files; mosaicml/llm-foundry has them in scripts/eval/local_data."
        )
    if find_spec("lm_eval") is None:
        raise ImportError('Tasks need lm_eval. Run `pip install "cab-hf[tasks]"`.')
    return present


def score_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, Scores]:
    """What a model gets right of each task that a folder holds.

    Args:
        model: Any causal language model, where it is and in its dtype; log-probabilities are float32.
        tokenizer: Its tokenizer.
        folder: Folder of the files that `TASKS` names; tasks without a file are left out.
        limit: First questions of each file; None for all.
        batch_size: Questions with one choice each in a forward pass; they are sorted by length.

    Returns:
        Name of a task -> `Scores`.

    Raises:
        ValueError: The folder holds none of the files, or a file lacks a field.
        ImportError: `lm_eval` is missing.
    """
    present = tasks_in(folder)
    check_causal(model)
    with _quiet():
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        configs = [
            {
                "task": name,
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(Path(folder).resolve() / task.file)}},
                "test_split": "test",
                "num_fewshot": 0,
                "metric_list": [{"metric": task.metric, "aggregation": "mean", "higher_is_better": True}],
                **task.config,
            }
            for name, task in present.items()
        ]
        # It gives the tokenizer a padding token.
        scorer = HFLM(
            pretrained=model,
            backend="causal",
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=batch_size,
            softmax_dtype="float32",
        )
        with evaluating(model):
            found = evaluate(scorer, TaskManager(include_defaults=False).load(configs), limit=limit, bootstrap_iters=0)
    scores = {}
    for name, task in present.items():
        rows = sorted(found["samples"][name], key=lambda row: row["doc_id"])
        is_choice = task.config["output_type"] == "multiple_choice"
        chance = float(np.mean([1 / len(row["arguments"]) for row in rows])) if is_choice else 0.0
        scores[name] = Scores(task.metric, chance, np.array([float(row[task.metric]) for row in rows]))
    return scores


def compare_scores(student: Mapping[str, Scores], teacher: Mapping[str, Scores]) -> dict[str, Any]:
    """A student's scores beside its teacher's on the same questions.

    Args:
        student: What `score_tasks` says of the student.
        teacher: The same of its teacher, of the same folder and limit.

    Returns:
        `rows`: name of a task -> `metric`, `chance`, `n_questions`; `teacher` and `student`, each with `accuracy` and
        `stderr`; `difference`, the student's accuracy less the teacher's, with its paired 95 % interval
        `difference_ci95`.
        `above_chance`: `share`, the student's margin above chance as a share of the teacher's, both summed over the
        `tasks` where the teacher is `ABOVE_CHANCE` standard errors above it, with its paired interval `share_ci95`;
        None where there is no such task. `left_out` names the others.
    """
    rows = {}
    for name, theirs in teacher.items():
        ours = student[name]
        difference, low, high = mean_interval(ours.right - theirs.right)
        rows[name] = {
            "metric": theirs.metric,
            "chance": theirs.chance,
            "n_questions": len(theirs.right),
            **{
                who: {"accuracy": float(one.right.mean()), "stderr": standard_error(one.right)}
                for who, one in (("teacher", theirs), ("student", ours))
            },
            "difference": difference,
            "difference_ci95": [low, high],
        }
    counted = [
        name
        for name, row in rows.items()
        if row["teacher"]["accuracy"] - row["chance"] > ABOVE_CHANCE * row["teacher"]["stderr"]
    ]
    share, interval = None, None
    if counted:
        margins = {
            who: sum(rows[name][who]["accuracy"] - rows[name]["chance"] for name in counted)
            for who in ("teacher", "student")
        }
        share = margins["student"] / margins["teacher"]
        # Of a ratio of sums of independent means; the questions of a task are the independent units.
        residuals = [student[name].right - share * teacher[name].right for name in counted]
        error = math.sqrt(sum(standard_error(one) ** 2 for one in residuals)) / margins["teacher"]
        interval = [share - Z95 * error, share + Z95 * error]
    return {
        "rows": rows,
        "above_chance": {
            "share": share,
            "share_ci95": interval,
            "tasks": counted,
            "left_out": [name for name in rows if name not in counted],
        },
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what lm-eval says of a model that is loaded already."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
