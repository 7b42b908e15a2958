"""`DistillationTrainer` with names, texts and defaults in place of models, blocks and options."""

import pytest
import torch
from tiny_images import image_rows, tiny_image_student, tiny_image_teacher

from cab_hf import DistillationTrainer, DistillationTrainingArguments, student_from_teacher
from cab_hf.data import pack_documents
from cab_hf.data.documents import as_documents
from cab_hf.distillation.trainer import default_learning_rate
from cab_hf.teachers.demo import random_llama


TEXTS = [f"{number} and {number} is {2 * number}. " * 60 for number in range(32)]
QUIET = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "report_to": "none", "max_steps": 2}


@pytest.fixture
def folders(tmp_path):
    model, tokenizer = random_llama()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "teacher")
    student_from_teacher(model, data=()).save_pretrained(tmp_path / "student")
    return tmp_path


def test_names_and_texts_train_as_models_and_blocks_do(folders):
    model, tokenizer = random_llama()
    blocks = pack_documents(as_documents(TEXTS), tokenizer, 512, isolate_documents=False)
    args = DistillationTrainingArguments(str(folders / "out"), **QUIET)
    by_hand = DistillationTrainer(student_from_teacher(model, data=()), model, args, train_dataset=blocks)
    by_hand.train()
    for rows in (TEXTS, [{"text": text} for text in TEXTS]):
        named = DistillationTrainer(
            str(folders / "student"), folders / "teacher", args, train_dataset=rows, eval_dataset=rows[:16]
        )
        named.train()
        assert named.processing_class.eos_token == tokenizer.eos_token
        for name, weight in by_hand.student.state_dict().items():
            torch.testing.assert_close(named.student.state_dict()[name], weight, msg=name)
    assert named.evaluate()["eval_loss"] > 0


def test_defaults_are_of_a_distillation():
    model, _ = random_llama()
    student = student_from_teacher(model, data=())
    trainer = DistillationTrainer(student, model)
    assert trainer.args.output_dir == "trainer_output" and trainer.args.logging_steps == 10
    assert trainer.args.learning_rate == default_learning_rate(student.config) == pytest.approx(2 * 6e-4)
    images = DistillationTrainer(
        tiny_image_student(), tiny_image_teacher(), DistillationTrainingArguments(**QUIET), train_dataset=image_rows()
    )
    assert images.args.learning_rate == default_learning_rate(images.student.config) < trainer.args.learning_rate
    given = DistillationTrainer(student, model, DistillationTrainingArguments(learning_rate=1e-3, **QUIET))
    assert given.args.learning_rate == 1e-3


def test_repr_names_what_is_trained():
    model, _ = random_llama()
    trainer = DistillationTrainer(student_from_teacher(model, data=()), model, DistillationTrainingArguments(**QUIET))
    shown = repr(trainer)
    for text in ("CABMambaForCausalLM (", "LlamaForCausalLM (53,600)", "kl=1", "bridge=1", "layer_map='floor'"):
        assert text in shown
