"""Layer maps: which teacher layer teaches which student layer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cab_hf.teachers.alignment import layer_map


depths = st.integers(1, 60)


@pytest.mark.parametrize(
    ("kind", "student_layers", "teacher_layers", "expected"),
    [
        ("floor", 24, 12, [i // 2 for i in range(24)]),  # DeiT-T -> Vim-T
        ("floor", 4, 6, [0, 1, 3, 4]),
        ("floor", 3, 7, [0, 2, 4]),
        ("uniform", 4, 6, [0, 2, 3, 5]),
        ("uniform", 3, 7, [0, 3, 6]),
        ("uniform", 5, 2, [0, 0, 1, 1, 1]),
        ("uniform", 1, 6, [5]),
        ("last", 4, 6, [0, 2, 3, 5]),
        ("last", 3, 7, [1, 3, 6]),
        ("last", 4, 2, [0, 0, 1, 1]),
        ("last", 1, 6, [5]),
        ([5, 0, 0], 3, 6, [5, 0, 0]),
        ((1, 2), 2, 6, [1, 2]),
    ],
)
def test_known_maps(kind, student_layers, teacher_layers, expected):
    assert layer_map(kind, student_layers, teacher_layers) == expected


@pytest.mark.parametrize("kind", ["floor", "uniform", "last"])
@given(student_layers=depths, teacher_layers=depths)
def test_maps_fit_any_two_depths(kind, student_layers, teacher_layers):
    layers = layer_map(kind, student_layers, teacher_layers)
    assert len(layers) == student_layers
    assert all(0 <= layer < teacher_layers for layer in layers)
    assert layers == sorted(layers)
    if student_layers == teacher_layers:
        assert layers == list(range(teacher_layers))
    if student_layers >= teacher_layers:
        assert set(layers) == set(range(teacher_layers))  # no teacher layer is left out
    else:
        assert len(set(layers)) == student_layers  # no teacher layer teaches twice
    if kind == "floor":
        assert layers[0] == 0
    if kind == "last":
        assert layers[-1] == teacher_layers - 1
    if kind == "uniform":
        assert layers[-1] == teacher_layers - 1
        assert layers[0] == (0 if student_layers > 1 else teacher_layers - 1)


@given(student_layers=st.integers(2, 60), teacher_layers=depths)
def test_uniform_is_nearest_to_even_spacing(student_layers, teacher_layers):
    for i, layer in enumerate(layer_map("uniform", student_layers, teacher_layers)):
        assert abs(layer - i * (teacher_layers - 1) / (student_layers - 1)) <= 0.5 + 1e-9


@pytest.mark.parametrize(
    ("kind", "student_layers", "teacher_layers", "message"),
    [
        ("first", 3, 6, "'first' is unknown.*'floor', 'uniform' or 'last'"),
        ([0, 1], 3, 6, "lists 2 teacher layers for 3 student layers"),
        ([0, 1, 6], 3, 6, "teacher layer 6, but the teacher has 6 layers: use 0 to 5"),
        ([0, 1, -1], 3, 6, "teacher layer -1, but the teacher has 6 layers"),
    ],
)
def test_bad_maps_say_what_would_fit(kind, student_layers, teacher_layers, message):
    with pytest.raises(ValueError, match=message):
        layer_map(kind, student_layers, teacher_layers)
