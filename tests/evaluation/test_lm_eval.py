"""EleutherAI's lm_eval on a saved student, offline and without the package: what it reports is what the model says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model

from cab_hf.teachers.demo import random_llama


pytest.importorskip("lm_eval")

TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""
# An import of the package would fail: the folder must do alone.
RUN = """
import sys
sys.modules["cab_hf"] = None
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""
QUESTIONS = [
    {"question": question, "choices": ["yes", "no, never", "perhaps so"], "answer": answer}
    for question, answer in [
        ("Is it far?", 0),
        ("Does a state of fixed size hold all of a text?", 1),
        ("Why", 2),
        ("It rained for days.", 0),
        ("Two and two are", 1),
        ("A longer question than all the others here, is it not?", 2),
        ("So?", 0),
    ]
]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    _, tokenizer = random_llama()
    tiny_model(mixer_type="mamba2", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def samples_of(student: Path, tmp_path: Path, batch_size: int) -> list[dict]:
    """What lm_eval logged of each question."""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    tasks = tmp_path / "tasks"
    tasks.mkdir(exist_ok=True)
    (tasks / "tiny_choice.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    out = tmp_path / f"out{batch_size}"
    options = {
        "--model": "hf",
        "--model_args": f"pretrained={student},trust_remote_code=True",
        "--tasks": "tiny_choice",
        "--include_path": tasks,
        "--device": "cpu",
        "--batch_size": batch_size,
        "--output_path": out,
    }
    command = [sys.executable, "-c", RUN, *(str(word) for pair in options.items() for word in pair), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    home = {"HF_HOME": str(tmp_path / "home")}
    finished = subprocess.run(
        command, env={**os.environ, **offline, **home}, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    (log,) = out.rglob("samples_tiny_choice*.jsonl")
    return sorted((json.loads(line) for line in log.read_text().splitlines()), key=lambda row: row["doc_id"])


@pytest.mark.slow
def test_log_likelihoods_are_those_of_the_model_at_any_batch_size(student, tmp_path):
    model, (_, tokenizer) = tiny_model(mixer_type="mamba2", vocab_size=257), random_llama()
    for batch_size in (1, 8):
        for row, found in zip(QUESTIONS, samples_of(student, tmp_path, batch_size), strict=True):
            expected = []
            for choice in row["choices"]:
                start, ids = (
                    tokenizer(row["question"])["input_ids"],
                    tokenizer(f"{row['question']} {choice}")["input_ids"],
                )
                with torch.no_grad():
                    log_probabilities = model(torch.tensor([ids])).logits[0].log_softmax(-1)
                expected.append(sum(float(log_probabilities[at - 1, ids[at]]) for at in range(len(start), len(ids))))
            scores = [float(answer[0][0]) for answer in found["resps"]]
            assert scores == pytest.approx(expected, abs=1e-3)
            assert found["acc"] == (max(range(3), key=expected.__getitem__) == row["answer"])
