"""The moving average of a student: its numbers, its evaluation, its files, and what resuming makes of it."""

import copy
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_distillation import NO_LOSS, SIX_LOSSES
from tiny_images import image_rows, make_image_trainer, stacked, tiny_image_student, tiny_image_teacher
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, TrainerCallback

from cab_hf.distillation.ema import MovingAverage


MIXERS = ("mamba", "mamba2")
KL = {**NO_LOSS, "kl_weight": 1.0}


class Recursion(TrainerCallback):
    """The average written by hand: `average = decay * average + (1 - decay) * new` after each optimizer step."""

    def __init__(self, student: nn.Module, decay: float):
        self.student, self.decay, self.steps = student, decay, 0
        self.average = {n: p.detach().double().clone() for n, p in student.named_parameters()}

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1
        for name, parameter in self.student.named_parameters():
            self.average[name] = self.decay * self.average[name] + (1 - self.decay) * parameter.detach().double()


def assert_average(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=tolerance, atol=tolerance, msg=name)


def averaged(trainer: Any) -> dict[str, Tensor]:
    """The parameters that an evaluation of the average would use."""
    with trainer._ema.in_place_of(trainer.student):
        return {name: p.detach().clone() for name, p in trainer.student.named_parameters()}


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_average_is_the_recursion(tmp_path, decay, accumulation):
    student = tiny_image_student()
    by_hand = Recursion(student, decay)
    trainer, _ = make_image_trainer(
        tmp_path,
        student=student,
        ema_decay=decay,
        max_steps=5,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        callbacks=[by_hand],
    )
    start = {name: p.detach().clone() for name, p in student.named_parameters()}
    trainer.train()
    assert by_hand.steps == 5  # once an optimizer step, not once a batch
    assert_average(averaged(trainer), by_hand.average)
    moved = max((by_hand.average[name] - start[name].double()).abs().max() for name in start)
    behind = max((by_hand.average[name] - p.detach().double()).abs().max() for name, p in student.named_parameters())
    assert moved > 5e-3 and (behind > 1e-3) == (decay > 0)


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_average_does_not_touch_training(tmp_path, mixer):
    runs = []
    for options in ({}, {"ema_decay": 0.9, "eval_dataset": image_rows(3), "eval_strategy": "steps", "eval_steps": 1}):
        trainer, recorder = make_image_trainer(
            tmp_path, student=tiny_image_student(mixer), max_steps=4, **SIX_LOSSES, **options
        )
        trainer.train()
        runs.append((trainer.model.state_dict(), [log["loss"] for log in recorder.logs if "loss" in log]))
    assert runs[0][1] == runs[1][1]
    assert runs[0][0].keys() == runs[1][0].keys()
    assert all(torch.equal(value, runs[1][0][name]) for name, value in runs[0][0].items())


def test_the_average_is_evaluated_beside_the_student(tmp_path):
    rows = image_rows(7)
    trainer, _ = make_image_trainer(
        tmp_path, ema_decay=0.7, max_steps=4, per_device_eval_batch_size=3, eval_dataset=rows, **SIX_LOSSES
    )
    assert not any("ema" in name for name in trainer.evaluate())  # there is none before training
    trainer.train()
    before = copy.deepcopy(trainer.model.state_dict())
    metrics = trainer.evaluate()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    alone, _ = make_image_trainer(tmp_path, per_device_eval_batch_size=3, **SIX_LOSSES)
    alone.model.load_state_dict(before)
    alone._is_calibrated = True
    with torch.no_grad():
        for name, value in averaged(trainer).items():
            alone.student.get_parameter(name).copy_(value)
    expected = alone.evaluate(rows)
    names = ["kl", "ce", "bridge", "output", "hidden", "attention", "loss", "accuracy", "top5_accuracy", "agreement"]
    for name in [*names, "teacher_accuracy", "images"]:
        assert metrics[f"eval_ema_{name}"] == pytest.approx(expected[f"eval_{name}"], rel=1e-6), name
    assert metrics["eval_ema_kl"] != pytest.approx(metrics["eval_kl"], rel=1e-3)
    prediction = trainer.predict(rows).metrics
    assert prediction["test_ema_kl"] == pytest.approx(metrics["eval_ema_kl"])


def test_the_best_student_may_be_chosen_by_its_average(tmp_path):
    trainer, recorder = make_image_trainer(
        tmp_path,
        ema_decay=0.5,
        max_steps=3,
        learning_rate=3.0,  # so large that the last one is not the best
        max_grad_norm=0.0,
        eval_dataset=image_rows(4),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_ema_kl",
        greater_is_better=False,
        **KL,
    )
    trainer.train()
    values = [log["eval_ema_kl"] for log in recorder.logs if "eval_ema_kl" in log]
    best = min(range(3), key=values.__getitem__)
    assert trainer.state.best_metric == pytest.approx(values[best]) and best < 2
    assert trainer.evaluate()["eval_ema_kl"] == pytest.approx(values[best])


def test_the_exchange_is_undone_even_by_an_error(tmp_path):
    trainer, _ = make_image_trainer(tmp_path, ema_decay=0.5, max_steps=3)
    trainer.train()
    before, average = copy.deepcopy(trainer.student.state_dict()), averaged(trainer)
    pointers = [p.data_ptr() for p in trainer.student.parameters()]
    prediction_step, calls = trainer.prediction_step, []

    def fail_in_the_average(*args, **kwargs):
        calls.append({name: p.detach().clone() for name, p in trainer.student.named_parameters()})
        if len(calls) == 2:
            raise RuntimeError("broken")
        return prediction_step(*args, **kwargs)

    trainer.prediction_step = fail_in_the_average
    with pytest.raises(RuntimeError, match="broken"):
        trainer.evaluate(image_rows(2))
    assert all(torch.equal(calls[1][name], value) for name, value in average.items())
    assert not all(torch.equal(calls[0][name], value) for name, value in average.items())
    assert all(torch.equal(before[name], value) for name, value in trainer.student.state_dict().items())
    assert all(torch.equal(average[name], value) for name, value in averaged(trainer).items())
    # In place: optimizers, wrappers and CUDA graphs hold these tensors.
    assert [p.data_ptr() for p in trainer.student.parameters()] == pointers


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_average_is_saved_as_a_student_of_its_own(tmp_path, mixer):
    student = tiny_image_student(mixer)
    by_hand = Recursion(student, 0.6)
    trainer, _ = make_image_trainer(tmp_path / "run", student=student, ema_decay=0.6, max_steps=3, callbacks=[by_hand])
    trainer.save_model(tmp_path / "untrained")
    assert not (tmp_path / "untrained" / "ema").exists()
    trainer.train()
    trainer.save_model(tmp_path / "out")
    assert_average(load_file(tmp_path / "out" / "ema" / "model.safetensors"), by_hand.average)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "ema")
    own = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    images = stacked(image_rows())[0]
    with torch.no_grad():
        with trainer._ema.in_place_of(student):
            assert torch.equal(loaded(images).logits, student.eval()(images).logits)
        assert torch.equal(own(images).logits, student(images).logits)
        assert (own(images).logits - loaded(images).logits).abs().max() > 1e-3


def resumed_and_whole(folder: Any, make_student: Any, **options: Any) -> tuple[Any, Any, Any, Any]:
    """Trainers and recorders of a run of 6 steps and of one that resumes at its third."""
    options = {
        "ema_decay": 0.8,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "eval_dataset": image_rows(3),
        "eval_strategy": "steps",
        "eval_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        **SIX_LOSSES,
        **options,
    }
    whole, first = make_image_trainer(folder, rows=image_rows(10), student=make_student(1), **options)
    whole.train()
    resumed, second = make_image_trainer(folder, rows=image_rows(10), student=make_student(5), **options)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    return whole, first, resumed, second


def assert_bit_equal(whole: Any, first: Any, resumed: Any, second: Any) -> None:
    for kind in ("loss", "eval_loss"):
        logs = [[log for log in recorder.logs if kind in log] for recorder in (first, second)]
        kept = logs[0][-len(logs[1]) :]
        names = [name for name in kept[-1] if not name.endswith(("second", "runtime"))]
        assert len(logs[1]) >= 2 and len(names) > 5
        assert [[log[name] for name in names] for log in logs[1]] == [[log[name] for name in names] for log in kept]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    for name, value in averaged(whole).items():
        assert torch.equal(averaged(resumed)[name], value), name


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_resumed_run_is_bit_equal(tmp_path, mixer):
    runs = resumed_and_whole(tmp_path, lambda seed: tiny_image_student(mixer, seed=seed, drop_path_rate=0.3))
    assert_bit_equal(*runs)
    assert (tmp_path / "checkpoint-3" / "ema.safetensors").is_file()
    assert not (tmp_path / "checkpoint-3" / "ema").exists()


@pytest.mark.filterwarnings("default::FutureWarning")
def test_lora_students(tmp_path):
    peft = pytest.importorskip("peft")

    def make_student(seed: int) -> nn.Module:
        student = tiny_image_student()
        torch.manual_seed(seed)
        config = peft.LoraConfig(
            r=2, target_modules=["in_proj", "out_proj"], modules_to_save=["classifier"], init_lora_weights=False
        )
        return peft.get_peft_model(student, config)

    by_hand = Recursion(make_student(1), 0.8)
    whole, first, resumed, second = resumed_and_whole(tmp_path, make_student)
    assert_bit_equal(whole, first, resumed, second)
    logs = [log for log in first.logs if "eval_ema_kl" in log]
    assert logs[-1]["eval_ema_kl"] != logs[-1]["eval_kl"]
    whole.save_model(tmp_path / "out")
    own, average = (
        peft.PeftModel.from_pretrained(tiny_image_student(), folder)
        for folder in (tmp_path / "out", tmp_path / "out" / "ema")
    )
    expected = averaged(whole)
    names = [name for name in expected if "lora_" in name or "modules_to_save" in name]
    assert len(names) == 2 * 2 * 2 + 2
    assert set(load_file(tmp_path / "checkpoint-3" / "ema.safetensors")) == set(names)
    for name in names:
        assert torch.equal(average.get_parameter(name), expected[name]), name
        assert not torch.equal(own.get_parameter(name), expected[name]), name
    frozen = set(by_hand.average) - set(names)
    assert all(torch.equal(expected[name].double(), by_hand.average[name]) for name in frozen)


def test_a_partly_frozen_student(tmp_path):
    student = tiny_image_student()
    by_hand = Recursion(student, 0.5)
    trainer, _ = make_image_trainer(
        tmp_path, student=student, ema_decay=0.5, max_steps=3, trainable="in_proj", callbacks=[by_hand]
    )
    trainer.train()
    assert_average(averaged(trainer), by_hand.average)
    assert set(trainer._ema.state_dict()) == {n for n, p in student.named_parameters() if p.requires_grad}


def test_autocast_averages_float32_weights(tmp_path):
    student = tiny_image_student()
    by_hand = Recursion(student, 0.9)
    trainer, _ = make_image_trainer(
        tmp_path, student=student, ema_decay=0.9, max_steps=4, bf16=True, callbacks=[by_hand]
    )
    trainer.train()
    assert_average(averaged(trainer), by_hand.average)


def test_a_student_in_bfloat16_is_averaged_in_float32(tmp_path):
    """Steps of a slow average are below bfloat16's resolution: rounded at each, it would never move."""
    student = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    average = MovingAverage(student, 0.999)
    with torch.no_grad():
        student.weight.fill_(1.0)
        average.on_train_begin(None, None, None)
        student.weight.fill_(2.0)
        for _ in range(1000):
            average.on_step_end(None, None, None)
    expected = 2 - 0.999**1000
    assert average.state_dict()["weight"].item() == pytest.approx(expected, rel=1e-4)
    for _ in range(3):
        with average.in_place_of(student):
            assert student.weight.dtype == torch.bfloat16
            assert student.weight.item() == pytest.approx(expected, rel=2**-8)
        assert student.weight.item() == 2.0
    assert average.state_dict()["weight"].item() == pytest.approx(expected, rel=1e-4)

    again = MovingAverage(nn.Linear(1, 1, bias=False).to(torch.bfloat16), 0.999)
    again.load_state_dict(average.state_dict())
    assert torch.equal(again.state_dict()["weight"], average.state_dict()["weight"])

    whole = tiny_image_student().to(torch.bfloat16)
    trainer, recorder = make_image_trainer(tmp_path, student=whole, ema_decay=0.9, max_steps=3, **KL)
    trainer.train()
    trainer.save_model(tmp_path / "out")
    saved = load_file(tmp_path / "out" / "ema" / "model.safetensors")
    assert {name: value.dtype for name, value in saved.items()} == {n: p.dtype for n, p in whole.named_parameters()}


# Errors


def test_errors_teach(tmp_path):
    for decay in (-0.1, 1.0, 1.5):
        with pytest.raises(ValueError, match=rf"`ema_decay` must be in \[0, 1\), got {decay}"):
            make_image_trainer(tmp_path, ema_decay=decay)
    average = MovingAverage(tiny_image_student(), 0.9)
    names = [name for name, _ in tiny_image_student().named_parameters()]
    other = dict(tiny_image_student(num_hidden_layers=3).named_parameters())
    with pytest.raises(ValueError) as error:
        average.load_state_dict(other)
    lacking = len(other) - len(names)
    assert f"{lacking} parameters differ" in str(error.value) and "backbone.layers.2" in str(error.value)


def test_a_checkpoint_without_an_average_is_named(tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_image_trainer(tmp_path, **options)[0].train()
    trainer, _ = make_image_trainer(tmp_path, ema_decay=0.9, **options)
    with pytest.raises(ValueError) as error:
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert all(word in str(error.value) for word in ("checkpoint-1", "ema.safetensors", "ema_decay"))
    # The other way round there is nothing to go on from, and nothing is missed.
    make_image_trainer(tmp_path / "averaged", ema_decay=0.9, **options)[0].train()
    trainer, recorder = make_image_trainer(tmp_path / "averaged", teacher=tiny_image_teacher(), **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "averaged" / "checkpoint-1"))
    assert trainer.state.global_step == 2
