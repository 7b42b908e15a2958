"""Memories of heads as they are fitted to a teacher's."""

import pytest
import torch
from torch.nn.functional import softplus

from cab_hf import student_from_teacher
from cab_hf.evaluation.tiny_families import tiny_model
from cab_hf.teachers import Teacher
from cab_hf.transfer import memories
from cab_hf.transfer.memories import fit_memories
from cab_hf.transfer.slots import slots


CHOICE = (2, 8, 16, 24, 32, 64, 256)


def texts(rows: int = 3, length: int = 40) -> torch.Tensor:
    return torch.randint(4, 110, (rows, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def memory_of(mixer) -> torch.Tensor:
    return 1 / (softplus(mixer.dt_bias) * mixer.A_log.exp())


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"start": "served"}, {"keep_rotary": True}])
def test_the_memory_is_the_one_whose_outputs_explain_the_teachers_head(options):
    teacher, ids = tiny_model("llama"), texts()
    student = student_from_teacher(teacher, data=(), **options)
    chosen = fit_memories(student, teacher, {"input_ids": ids}, memories=CHOICE, delays=(0,))
    assert len({tuple(memory.tolist()) for memory, _ in chosen}) > 1  # else nothing is told apart
    for slot, (memory, delay) in zip(slots(student, Teacher(teacher), {"input_ids": ids}, "floor"), chosen):
        torch.testing.assert_close(memory_of(slot.mixer), memory, rtol=1e-4, atol=1e-4)
        theirs = slot.heads.double().flatten(0, 1).transpose(0, 1)  # (h, t, p)
        errors = []
        for one in CHOICE:
            memories._start(slot.mixer, torch.full_like(memory, one), delay)
            ours = slot.mixer(slot.hidden_states)[1].output.unflatten(-1, (4, -1)).double()
            ours = ours.flatten(0, 1).transpose(0, 1)
            map_ = torch.linalg.lstsq(ours, theirs).solution
            errors.append((ours @ map_ - theirs).square().sum((1, 2)))
        best = torch.stack(errors).argmin(0)
        assert (torch.tensor(CHOICE)[best] == memory).float().mean() >= 0.75  # a small pull decides close calls


@torch.no_grad()
@pytest.mark.parametrize("start", ["linear", "served"])
def test_heads_that_a_mixer_could_be_are_found(start, monkeypatch):
    """Each of four teacher's heads is what one of the mixer's says with a memory and a delay of its own."""
    teacher, ids = tiny_model("llama"), texts()
    student = student_from_teacher(teacher, data=(), start=start)
    memory, delay = torch.tensor([1.0, 1.0, 16.0, 16.0]), torch.tensor([0, 1, 1, 0])
    makers = student_from_teacher(teacher, data=(), start=start).mixer_list
    for mixer in makers:
        memories._start(mixer, memory, delay)

    def answering(*given):
        found = slots(*given)
        said = [maker(slot.hidden_states)[1].output.unflatten(-1, (4, -1)) for maker, slot in zip(makers, found)]
        return [slot._replace(heads=heads) for slot, heads in zip(found, said)]

    monkeypatch.setattr(memories, "slots", answering)
    chosen = fit_memories(student, teacher, {"input_ids": ids}, memories=(1, 16), delays=(0, 1, 2))
    for (found, delays), mixer, maker in zip(chosen, student.mixer_list, makers):
        assert torch.equal(found, memory) and torch.equal(delays, delay)
        assert torch.equal(mixer.conv1d.weight, maker.conv1d.weight)
    taps = makers[0].conv1d.weight[: makers[0].config.mixer_width, 0].unflatten(0, (4, -1))  # of x
    assert [head.abs().sum(0).nonzero().item() for head in taps] == [3, 2, 2, 3]


@torch.no_grad()
def test_padding_is_no_text():
    teacher, ids = tiny_model("llama"), texts()
    padded = torch.cat((torch.full((3, 7), 9), ids), dim=1)
    mask = torch.ones_like(padded)
    mask[:, :7] = 0
    plain, other = (student_from_teacher(teacher, data=()) for _ in range(2))
    chosen = fit_memories(plain, teacher, {"input_ids": ids}, memories=CHOICE)
    others = fit_memories(other, teacher, {"input_ids": padded, "attention_mask": mask}, memories=CHOICE)
    for one, two in zip(chosen, others):
        assert torch.equal(torch.stack(one), torch.stack(two))


@pytest.mark.parametrize(
    "options", [{"mixer_type": "mamba"}, {"transition_init": "identity"}, {"num_heads": 2, "n_groups": 2}]
)
def test_other_mixers_stay_as_they_are(options):
    teacher = tiny_model("llama")
    options = options | ({"head_dim": 32, "copy_attention": False} if "num_heads" in options else {})
    student = student_from_teacher(teacher, data=(), **options)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    assert fit_memories(student, teacher, {"input_ids": texts()}) == []
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_a_student_with_data_is_fitted_unless_it_is_given_a_range():
    teacher, data = tiny_model("llama"), {"input_ids": texts()}
    fitted, ranged = (
        student_from_teacher(teacher, data=data),
        student_from_teacher(teacher, data=data, memory_range=(4, 32)),
    )
    choice = torch.tensor(memories.MEMORIES, dtype=torch.float32)
    for mixer, other in zip(fitted.mixer_list, ranged.mixer_list):
        found = memory_of(mixer)
        assert ((found[:, None] / choice).log().abs().amin(1) < 1e-3).all()
        torch.testing.assert_close(memory_of(other), torch.tensor([4.0, 8.0, 16.0, 32.0]), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("options", [{"conv_init": "usual"}, {"conv_kernel": 1}])
def test_taps_that_can_not_delay_stay(options):
    teacher = tiny_model("llama")
    student = student_from_teacher(teacher, data=(), **options)
    taps = [mixer.conv1d.weight.clone() for mixer in student.mixer_list]
    chosen = fit_memories(student, teacher, {"input_ids": texts()}, memories=CHOICE)
    assert not any(delay.any() for _, delay in chosen)
    assert all(torch.equal(mixer.conv1d.weight, before) for mixer, before in zip(student.mixer_list, taps))


def test_what_ends_early_leaves_nothing_behind(monkeypatch):
    teacher = tiny_model("llama")
    student = student_from_teacher(teacher, data=())
    before = {name: value.clone() for name, value in student.state_dict().items()}
    monkeypatch.setattr(memories.torch.linalg, "solve", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit_memories(student, teacher, {"input_ids": texts()}, memories=CHOICE, delays=(1, 0))
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
