"""Tasks through real lm-eval, on invented questions: scores against plain log-likelihoods, shares by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_model

from cab_hf.evaluation.tasks import Scores, compare_scores, score_tasks
from cab_hf.teachers.demo import random_llama


QUESTIONS = {
    "lambada_openai.jsonl": [
        {"context": f"{name} looked for the {thing} and found the", "continuation": thing}
        for name, thing in (("Anna", "key"), ("Otto", "coat"), ("Ida", "boat"))
    ],
    "piqa.jsonl": [
        {"query": f"Question: {goal}\n", "choices": ["Use a spoon.", "Sing it a long song, then wait."], "gold": gold}
        for goal, gold in (("stir tea", 0), ("calm a cat", 1), ("eat soup", 0), ("open a tin", 1))
    ],
    "arc_challenge.jsonl": [
        {"query": f"Question: {asked}", "choices": ["a stone", "the water of a river", "ice"][:count], "gold": gold}
        for asked, count, gold in (("What flows?", 3, 1), ("What lies?", 2, 0), ("What melts?", 3, 2))
    ],
    "winogrande.jsonl": [
        {"context_options": [f"As {who} was hungry, {who}" for who in pair], "continuation": "ate.", "gold": gold}
        for pair, gold in ((("Anna", "the chair"), 0), (("a stone", "Otto"), 1), (("Ida", "rain"), 0))
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in QUESTIONS.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@torch.no_grad()
def said_of(model, tokenizer, context: str, continuation: str) -> tuple[float, bool]:
    """Log-likelihood of a continuation, and whether each of its tokens is the likeliest."""
    start, ids = len(tokenizer(context)["input_ids"]), tokenizer(context + continuation)["input_ids"]
    logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    places = range(start, len(ids))
    return sum(float(logs[at - 1, ids[at]]) for at in places), all(logs[at - 1].argmax() == ids[at] for at in places)


def test_scores_are_those_of_plain_log_likelihoods(folder):
    pytest.importorskip("lm_eval")
    tokenizer = random_llama()[1]
    model = tiny_model(mixer_type="mamba2", vocab_size=len(tokenizer))
    found = score_tasks(model, tokenizer, folder, batch_size=3)

    def best(options: list[tuple[str, str]], lengths: list[int] | None = None) -> int:
        scores = [said_of(model, tokenizer, *option)[0] for option in options]
        return int(np.argmax([score / length for score, length in zip(scores, lengths or [1] * len(scores))]))

    rows = QUESTIONS["piqa.jsonl"]
    picked = [best([(row["query"] + "Answer:", f" {choice}") for choice in row["choices"]]) for row in rows]
    assert found["piqa"].right.tolist() == [pick == row["gold"] for pick, row in zip(picked, rows)]
    rows = QUESTIONS["arc_challenge.jsonl"]
    picked = [
        best([(row["query"] + "\nAnswer:", f" {one}") for one in row["choices"]], list(map(len, row["choices"])))
        for row in rows
    ]
    assert found["arc_challenge"].right.tolist() == [pick == row["gold"] for pick, row in zip(picked, rows)]
    assert found["arc_challenge"].chance == pytest.approx((1 / 3 + 1 / 2 + 1 / 3) / 3)
    rows = QUESTIONS["winogrande.jsonl"]
    picked = [best([(context, f" {row['continuation']}") for context in row["context_options"]]) for row in rows]
    assert found["winogrande"].right.tolist() == [pick == row["gold"] for pick, row in zip(picked, rows)]
    rows = QUESTIONS["lambada_openai.jsonl"]
    right = [said_of(model, tokenizer, row["context"], f" {row['continuation']}")[1] for row in rows]
    assert found["lambada"].right.tolist() == right and found["lambada"].chance == 0
    assert len(found["piqa"].right) == 4 and "copa" not in found and tokenizer.pad_token is None
    assert len(score_tasks(model, tokenizer, folder, limit=2)["winogrande"].right) == 2


def test_a_model_that_knows_the_answers(folder):
    """The likeliest next byte is that of the true texts, of these as the files and no others have them."""
    pytest.importorskip("lm_eval")
    model, tokenizer = random_llama()
    texts = [f"{row['context']} {row['continuation']}" for row in QUESTIONS["lambada_openai.jsonl"]]
    texts += [f"{row['query']}Answer: {row['choices'][row['gold']]}" for row in QUESTIONS["piqa.jsonl"]]
    texts += [f"{row['query']}\nAnswer: {row['choices'][row['gold']]}" for row in QUESTIONS["arc_challenge.jsonl"]]
    for row in QUESTIONS["winogrande.jsonl"]:
        texts.append(f"{row['context_options'][row['gold']]} {row['continuation']}")
    following = {}
    for ids in (tokenizer(text)["input_ids"] for text in texts):
        following |= {tuple(ids[:end]): ids[end] for end in range(1, len(ids))}
    forward = model.forward

    def knowing(input_ids: torch.Tensor, **kwargs):
        output = forward(input_ids, **kwargs)
        for row, ids in enumerate(input_ids.tolist()):
            for end in range(1, len(ids) + 1):
                if tuple(ids[:end]) in following:
                    output.logits[row, end - 1, following[tuple(ids[:end])]] = 100.0
        return output

    before = score_tasks(model, tokenizer, folder)
    assert not all(scores.right.all() for scores in before.values()) and not before["lambada"].right.any()
    model.forward = knowing
    assert all(scores.right.all() for scores in score_tasks(model, tokenizer, folder).values())


def test_comparison_by_hand():
    def scores(chance: float, *right: int) -> Scores:
        return Scores("acc", chance, np.array(right, dtype=float))

    teacher = {"easy": scores(0.25, *[1] * 9, 0), "hard": scores(0.5, *[0, 1] * 5), "words": scores(0, *[1, 1, 1, 0])}
    student = {"easy": scores(0.25, *[1] * 7, 0, 0, 1), "hard": scores(0.5, *[1] * 10), "words": scores(0, 1, 1, 0, 0)}
    found = compare_scores(student, teacher)
    easy = found["rows"]["easy"]
    assert easy["teacher"] == pytest.approx({"accuracy": 0.9, "stderr": math.sqrt(0.09 / 9)})
    # Two questions lost and one won.
    spread = 2.2622 * np.std([0] * 7 + [-1, -1, 1], ddof=1) / math.sqrt(10)  # Student's t of ten questions
    assert easy["difference"] == pytest.approx(-0.1)
    assert easy["difference_ci95"] == pytest.approx([-0.1 - spread, -0.1 + spread], abs=1e-4)
    above = found["above_chance"]
    # The teacher is at chance in "hard" and exactly three standard errors above it in "words".
    assert above["tasks"] == ["easy"] and above["left_out"] == ["hard", "words"]
    assert above["share"] == pytest.approx(0.55 / 0.65)
    again = compare_scores(teacher, teacher)["above_chance"]
    assert again["share"] == 1 and again["share_ci95"] == [1, 1]
    nothing = compare_scores({"hard": student["hard"]}, {"hard": teacher["hard"]})["above_chance"]
    assert nothing == {"share": None, "share_ci95": None, "tasks": [], "left_out": ["hard"]}


def test_the_shares_interval_covers():
    generator, hits = np.random.default_rng(0), 0
    for _ in range(300):
        teacher, student = {}, {}
        for name, chance, level in (("a", 0.5, 0.8), ("b", 0.25, 0.6)):
            theirs = generator.random(400) < level
            # The student keeps 0.8 of the margin: of what the teacher knows it loses some.
            kept = (chance + 0.8 * (level - chance)) / level
            teacher[name] = Scores("acc", chance, theirs.astype(float))
            student[name] = Scores("acc", chance, (theirs & (generator.random(400) < kept)).astype(float))
        low, high = compare_scores(student, teacher)["above_chance"]["share_ci95"]
        hits += low < 0.8 < high
    assert 0.91 < hits / 300 < 0.98


def test_a_folder_without_tasks(tmp_path):
    model, tokenizer = random_llama()
    with pytest.raises(ValueError, match="there is none of lambada_openai.jsonl, piqa.jsonl"):
        score_tasks(model, tokenizer, tmp_path)
