"""What a start is fitted on: any of the forms in which a user has data, and always the same tokens of them."""

import logging

import pytest
import torch
from datasets import Dataset
from PIL import Image
from tiny_images import SIZE, image_rows, tiny_image_teacher
from transformers import ViTImageProcessor

from cab_hf import student_from_teacher
from cab_hf.data import pack_documents
from cab_hf.data.documents import as_documents
from cab_hf.teachers.demo import random_llama
from cab_hf.transfer.examples import example_batches


TEXTS = [f"{number} and {number} is {2 * number}. " * 40 for number in range(40)]


def test_texts_rows_and_blocks_are_the_same_tokens(tmp_path):
    teacher, tokenizer = random_llama()
    blocks = pack_documents(as_documents(TEXTS), tokenizer, 512, isolate_documents=False)
    expected = torch.tensor(blocks["input_ids"][:8])
    (tmp_path / "texts.jsonl").write_text("\n".join(f'{{"text": "{text}"}}' for text in TEXTS))
    forms = [TEXTS, [{"text": text} for text in TEXTS], Dataset.from_list([{"text": text} for text in TEXTS]), blocks]
    for data in [*forms, str(tmp_path / "texts.jsonl"), {"input_ids": expected}, [{"input_ids": expected}]]:
        (batch,) = example_batches(data, tokenizer, teacher)
        assert torch.equal(batch["input_ids"], expected)


def test_little_text_is_text_enough():
    teacher, tokenizer = random_llama()
    (batch,) = example_batches(["One and one is two."], tokenizer, teacher)
    assert batch["input_ids"].shape == (1, 16)


def test_conversations_go_through_the_template():
    teacher, tokenizer = random_llama()
    tokenizer.chat_template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    rows = [{"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}] * 8
    (batch,) = example_batches(rows, tokenizer, teacher)
    assert tokenizer.decode(batch["input_ids"][0]).startswith("user: 2 + 2?\nassistant: 4")


def test_images_rows_folders_and_batches(tmp_path):
    teacher = tiny_image_teacher()
    rows = image_rows(8)
    pixels = torch.stack([torch.as_tensor(row["pixel_values"]) for row in rows])
    for data in (rows, {"pixel_values": pixels}):
        (batch,) = example_batches(data, None, teacher)
        assert torch.equal(batch["pixel_values"], pixels)
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        Image.new("RGB", (12, 12), "red").save(tmp_path / label / "one.png")
    processor = ViTImageProcessor(size={"height": SIZE, "width": SIZE})
    (batch,) = example_batches(str(tmp_path), processor, teacher)
    assert batch["pixel_values"].shape == (2, 3, SIZE, SIZE)


def test_what_is_missing_is_said():
    teacher, tokenizer = random_llama()
    with pytest.raises(ValueError, match="`data` is text, but `tokenizer` is None. Pass the teacher's"):
        student_from_teacher(teacher, data=TEXTS)
    with pytest.raises(ValueError, match="`data` is empty"):
        student_from_teacher(teacher, data=[], tokenizer=tokenizer)
    with pytest.raises(ValueError, match="`data` is images, but `tokenizer` is None"):
        example_batches([{"image": Image.new("RGB", (8, 8))}] * 2, None, tiny_image_teacher())


def error(student, teacher, ids):
    """Mean square of the mixers' outputs behind their projections against attention's."""
    with torch.no_grad():
        return float((student(ids).logits - teacher(ids).logits).square().mean())


def test_a_start_with_data_is_closer_and_one_without_says_so(caplog):
    teacher, tokenizer = random_llama()
    ids = torch.tensor([tokenizer(TEXTS[3])["input_ids"][:256]])
    with caplog.at_level(logging.WARNING):
        bare = student_from_teacher(teacher)
    fitted = student_from_teacher(teacher, tokenizer=tokenizer, data=TEXTS)
    assert error(fitted, teacher, ids) < error(bare, teacher, ids)
    by_name = student_from_teacher("random-llama", data=TEXTS)
    for name, weight in fitted.state_dict().items():
        assert torch.equal(weight, by_name.state_dict()[name]), name
