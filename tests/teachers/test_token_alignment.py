"""Which teacher token is which student token: every rule on an example that can be read."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cab_hf import CABVisionMambaConfig
from cab_hf.teachers.alignment import (
    TokenLayout,
    align_targets,
    align_tokens,
    student_layout,
    teacher_layout,
)
from cab_hf.teachers.teacher import TeacherAttention, TeacherOutput


def tokens(*values: float) -> Tensor:
    """One sequence `(1, t, 2)` whose tokens hold their value and its negative."""
    column = torch.tensor(values, dtype=torch.float32)
    return torch.stack([column, -column], dim=-1)[None]


def layout(rows: int, columns: int, class_token: int | None = None, registers: int = 0) -> TokenLayout:
    return TokenLayout((rows, columns), class_token, registers)


# The teacher's class token is 100, its registers 200, 201, ..., its patches 1, 2, 3, ... in reading order.
MOVES = {
    "class token to the middle": ((100, 1, 2, 3, 4), layout(2, 2, 0), layout(2, 2, 2), (1, 2, 100, 3, 4)),
    "the middle of an odd number": ((100, 1, 2, 3), layout(1, 3, 0), layout(1, 3, 1), (1, 100, 2, 3)),
    "the middle of one patch is before it": ((100, 1), layout(1, 1, 0), layout(1, 1, 0), (100, 1)),
    "class token stays first": ((100, 1, 2), layout(1, 2, 0), layout(1, 2, 0), (100, 1, 2)),
    "class token to the end": ((100, 1, 2), layout(1, 2, 0), layout(1, 2, 2), (1, 2, 100)),
    "class token from the middle": ((1, 100, 2), layout(1, 2, 1), layout(1, 2, 0), (100, 1, 2)),
    "class token left out": ((100, 1, 2), layout(1, 2, 0), layout(1, 2), (1, 2)),
    "a teacher without one": ((1, 2, 3), layout(1, 3), layout(1, 3), (1, 2, 3)),
    "distillation token left out": ((100, 200, 1, 2), layout(1, 2, 0, 1), layout(1, 2, 1), (1, 100, 2)),
    "registers left out": (
        (100, 200, 201, 202, 1, 2, 3, 4),
        layout(2, 2, 0, 3),
        layout(2, 2, 2),
        (1, 2, 100, 3, 4),
    ),
    "class token and registers left out": ((100, 200, 201, 1, 2), layout(1, 2, 0, 2), layout(1, 2), (1, 2)),
    "registers kept behind a moved class token": (
        (100, 200, 201, 1, 2),
        layout(1, 2, 0, 2),
        layout(1, 2, 1, 2),
        (1, 100, 200, 201, 2),
    ),
    "registers kept at the front": ((100, 200, 1), layout(1, 1, 0, 1), layout(1, 1, 0, 1), (100, 200, 1)),
    "two columns become four": ((1, 5), layout(1, 2), layout(1, 4), (1, 2, 4, 5)),
    "four rows become two": ((1, 3, 10, 20), layout(4, 1), layout(2, 1), (2, 15)),
    "rows and columns are not mixed up": ((1, 2, 3, 4, 5, 6), layout(3, 2), layout(1, 2), (3, 4)),
    "resized around a class token in the middle": (
        (100, 200, 1, 5),
        layout(1, 2, 0, 1),
        layout(1, 4, 2),
        (1, 2, 100, 4, 5),
    ),
    "resized with registers kept": ((100, 200, 1, 5), layout(1, 2, 0, 1), layout(1, 4, 0, 1), (100, 200, 1, 2, 4, 5)),
}


@pytest.mark.parametrize("name", MOVES)
def test_tokens_move_as_written(name):
    given_tokens, source, target, expected = MOVES[name]
    x = tokens(*given_tokens)
    torch.testing.assert_close(align_tokens(x, 1, source, target), tokens(*expected))
    # Heads in front of the tokens, as queries and keys have them.
    heads = torch.stack([x, 2 * x], dim=1)
    expected_heads = torch.stack([tokens(*expected), 2 * tokens(*expected)], dim=1)
    torch.testing.assert_close(align_tokens(heads, 2, source, target), expected_heads)
    torch.testing.assert_close(align_tokens(heads, -2, source, target), expected_heads)


def test_an_equal_layout_gives_the_tensor_back():
    x = tokens(100, 1, 2)
    assert align_tokens(x, 1, layout(1, 2, 0), layout(1, 2, 0)) is x
    targets = TeacherOutput(hidden_states=(x,))
    assert align_targets(targets, layout(1, 2, 0), layout(1, 2, 0), {0}) is targets


def naive_resize(plane: Tensor, rows: int, columns: int) -> Tensor:
    """Bilinear on a grid `(r, c)`, pixel centres at halves, edges repeated: one value after the other."""
    resized = torch.zeros(rows, columns, dtype=plane.dtype)
    for i in range(rows):
        for j in range(columns):
            y = min(max((i + 0.5) * plane.shape[0] / rows - 0.5, 0), plane.shape[0] - 1)
            x = min(max((j + 0.5) * plane.shape[1] / columns - 0.5, 0), plane.shape[1] - 1)
            for row in {math.floor(y), math.ceil(y)}:
                for column in {math.floor(x), math.ceil(x)}:
                    resized[i, j] += (1 - abs(y - row)) * (1 - abs(x - column)) * plane[row, column]
    return resized


sides = st.integers(1, 5)


@given(grid=st.tuples(sides, sides), new=st.tuples(sides, sides), place=st.sampled_from(["first", "middle", "none"]))
def test_any_grid_is_resized_bilinearly(grid, new, place):
    x = torch.randn(2, 3, 1 + grid[0] * grid[1], 2, generator=torch.Generator().manual_seed(0))  # (b, h, t, p)
    index = {"first": 0, "middle": new[0] * new[1] // 2, "none": None}[place]
    aligned = align_tokens(x, 2, TokenLayout(grid, 0), TokenLayout(new, index))
    kept = [token for token in range(aligned.shape[2]) if token != index]
    assert aligned.shape == (2, 3, new[0] * new[1] + (index is not None), 2)
    assert index is None or torch.equal(aligned[:, :, index], x[:, :, 0])
    for b, h, p in ((0, 0, 0), (1, 2, 1)):
        expected = naive_resize(x[b, h, 1:, p].view(grid), *new)
        torch.testing.assert_close(aligned[b, h, kept, p].view(new), expected, rtol=1e-5, atol=1e-5)


def test_resizing_keeps_the_dtype_and_passes_on_gradients():
    x = tokens(1, 5).to(torch.bfloat16).requires_grad_()
    aligned = align_tokens(x, 1, layout(1, 2), layout(1, 4))
    assert aligned.dtype == torch.bfloat16
    aligned[..., 0].sum().backward()
    assert x.grad[..., 0].tolist() == [[2.0, 2.0]]


def test_targets_are_aligned_where_they_are_read():
    def attention(*values: float, output: bool = True) -> TeacherAttention:
        x = tokens(*values)
        return TeacherAttention(x[:, None], 2 * x[:, None], 3 * x[:, :, None] if output else None)

    before, moved = (100, 1, 2), (1, 100, 2)
    targets = TeacherOutput(
        last_hidden_state=tokens(*before),
        logits=torch.ones(1, 3),
        attentions=(attention(*before), attention(*before), attention(*before, output=False)),
        hidden_states=(tokens(*before), 4 * tokens(*before)),
    )
    aligned = align_targets(targets, layout(1, 2, 0), layout(1, 2, 1), {1, 2})
    assert aligned.attentions[0] is targets.attentions[0]
    for mine, expected in zip(aligned.attentions[1], attention(*moved)):
        assert torch.equal(mine, expected)
    assert aligned.attentions[2].output is None
    assert torch.equal(aligned.attentions[2].key, attention(*moved).key)
    assert torch.equal(aligned.hidden_states[1], 4 * tokens(*moved))
    assert aligned.logits is targets.logits and torch.equal(targets.hidden_states[0], tokens(*before))


# Layouts of models


@pytest.mark.parametrize(
    ("num_tokens", "image_size", "patch_size", "expected"),
    [
        (4, (8, 8), 4, layout(2, 2)),
        (5, (8, 8), 4, layout(2, 2, 0)),
        (6, (8, 8), 4, layout(2, 2, 0, 1)),
        (10, (8, 12), [4, 4], layout(2, 3, 0, 3)),
        (7, (8, 12), (4, 4), layout(2, 3, 0)),
        (3, (9, 8), (8, 4), layout(1, 2, 0)),  # pixels beyond the last whole patch make none
    ],
)
def test_a_teachers_layout(num_tokens, image_size, patch_size, expected):
    found = teacher_layout(num_tokens, image_size, patch_size)
    assert found == expected and found.num_tokens == num_tokens


@pytest.mark.parametrize(
    ("class_token", "registers", "image_size", "expected"),
    [
        ("middle", 0, (8, 8), layout(2, 2, 2)),
        ("middle", 0, (12, 12), layout(3, 3, 4)),  # of the images' grid, not of the config's
        ("middle", 2, (8, 12), layout(2, 3, 3, 2)),
        ("first", 1, (8, 8), layout(2, 2, 0, 1)),
        ("none", 0, (8, 8), layout(2, 2)),
    ],
)
def test_a_students_layout(class_token, registers, image_size, expected):
    config = CABVisionMambaConfig(
        hidden_size=16, image_size=8, patch_size=4, class_token=class_token, num_register_tokens=registers
    )
    assert student_layout(config, image_size) == expected


@pytest.mark.parametrize("place", [0, 1, 2, 4])
def test_the_order_of_a_layout_names_every_place_once(place):
    one = layout(2, 2, place, 2)
    assert one.order == [place, place + 1, place + 2, *(i for i in range(7) if not place <= i < place + 3)]
    assert one.num_tokens == 7 and one.extra == 3


# Errors


def test_errors_teach():
    with pytest.raises(ValueError, match="4 tokens.*4 x 4 patches.*windows.*ViT"):
        teacher_layout(4, (16, 16), 4)
    with pytest.raises(ValueError, match="3 tokens in dimension 1.*source layout has 5"):
        align_tokens(tokens(1, 2, 3), 1, layout(2, 2, 0), layout(2, 2, 2))
    with pytest.raises(ValueError, match="student has a class token.*class_token='none'"):
        align_tokens(tokens(1, 2), 1, layout(1, 2), layout(1, 2, 1))
    with pytest.raises(ValueError, match="2 register tokens and the teacher 1.*num_register_tokens=1 or 0"):
        align_tokens(tokens(100, 200, 1), 1, layout(1, 1, 0, 1), layout(1, 1, 0, 2))
    with pytest.raises(ValueError, match="3 register tokens and the teacher 0"):
        align_tokens(tokens(100, 1), 1, layout(1, 1, 0), layout(1, 1, 0, 3))
