"""A student goes through TRL's trainers, as any causal model does: a step of SFT, DPO and GRPO each."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from cab_hf import student_from_teacher
from cab_hf.teachers.demo import random_llama


trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of TRL's own arguments

QUIET = {
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}
PROMPTS = ["one and one is", "two and two is", "three and one is", "two and one is"]


@pytest.fixture
def student(tmp_path):
    """Saved and loaded: TRL makes its reference model of a folder."""
    model, tokenizer = random_llama()
    tokenizer.pad_token = tokenizer.eos_token
    student_from_teacher(model, data=()).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "student"), tokenizer


def trained(trainer, student):
    before = {name: weight.detach().clone() for name, weight in student.named_parameters()}
    trainer.train()
    assert trainer.state.global_step == 1
    moved = [name for name, weight in student.named_parameters() if not torch.equal(weight, before[name])]
    assert any("mixer" in name for name in moved) and any("embeddings" in name for name in moved)
    return trainer.state.log_history


def test_sft(tmp_path, student):
    model, tokenizer = student
    rows = Dataset.from_list([{"text": f"{prompt} a number."} for prompt in PROMPTS])
    args = trl.SFTConfig(str(tmp_path), max_length=32, **QUIET)
    log = trained(trl.SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer), model)
    assert log[-1]["train_loss"] > 0


def test_dpo(tmp_path, student):
    model, tokenizer = student
    rows = Dataset.from_list([{"prompt": prompt, "chosen": " two.", "rejected": " a cow."} for prompt in PROMPTS])
    args = trl.DPOConfig(str(tmp_path), max_length=32, **QUIET)
    log = trained(trl.DPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer), model)
    assert log[-1]["train_loss"] == pytest.approx(0.6931, abs=1e-3)  # log 2: policy and reference are one at the start


def test_grpo(tmp_path, student):
    model, tokenizer = student
    torch.manual_seed(0)
    rows = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS])
    args = trl.GRPOConfig(str(tmp_path), num_generations=4, max_completion_length=8, **QUIET)
    rewards = trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **kwargs: [float(text.count("e") + len(set(text))) for text in completions],
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trained(rewards, model)
