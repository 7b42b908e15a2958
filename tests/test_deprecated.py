"""Names of the release before still work, with a warning that names what to use."""

import pytest

import cab_hf
from cab_hf import transfer
from cab_hf.teachers.demo import random_llama


def test_from_teacher_warns_and_makes_the_same_student():
    teacher, _ = random_llama()
    with pytest.warns(FutureWarning, match="cab_hf.student_from_teacher"):
        old = cab_hf.CABMambaForCausalLM.from_teacher(teacher, num_hidden_layers=1)
    new = cab_hf.student_from_teacher(teacher, num_hidden_layers=1)
    assert type(old) is type(new) and old.config.to_dict() == new.config.to_dict()


def test_vision_student_from_teacher_warns():
    teacher, _ = random_llama()
    with pytest.warns(FutureWarning, match="cab_hf.student_from_teacher"):
        assert transfer.vision_student_from_teacher(teacher).num_parameters() > 0
