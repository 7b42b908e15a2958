"""Which teacher layer teaches which student layer."""

from collections.abc import Sequence
from typing import Literal


def layer_map(
    kind: Literal["floor", "uniform", "last"] | Sequence[int], student_layers: int, teacher_layers: int
) -> list[int]:
    """Teacher layer of each student layer, for any two depths.

    `floor`, `uniform` and `last` never decrease along the student. For `S` student and `T` teacher layers:

    - `"floor"`: student layer `i` learns from `floor(i * T / S)`, the first layer of its share of the teacher.
    - `"last"`: the last layer of that share, so that the student's last layer learns from the teacher's last. Where
      the student is deeper and a share holds no whole layer, the layer that the share lies in.
    - `"uniform"`: first from first and last from last, evenly spaced between them and rounded half up. A student of
      one layer learns from the teacher's last.
    - a sequence: these layers, counted from 0, in any order.

    Args:
        kind: a rule's name, or one teacher layer for each student layer.
        student_layers: `S`, at least 1.
        teacher_layers: `T`, at least 1.

    Returns:
        `S` layer indices in `[0, T)`.

    Raises:
        ValueError: an unknown rule, a depth below 1, or a sequence of another length or out of range.

    Source: arXiv 2510.19266, section "Method" (`floor`); the other rules are not the paper's.
    """
    for name, depth in (("student_layers", student_layers), ("teacher_layers", teacher_layers)):
        if depth < 1:
            raise ValueError(f"{name} is {depth}, but a model has at least 1 layer.")
    if not isinstance(kind, str):
        return _checked(kind, student_layers, teacher_layers)

    shares = [
        (i * teacher_layers // student_layers, (i + 1) * teacher_layers // student_layers)
        for i in range(student_layers)
    ]
    if kind == "floor":
        return [first for first, _ in shares]
    if kind == "last":
        return [max(first, end - 1) for first, end in shares]
    if kind == "uniform":
        if student_layers == 1:
            return [teacher_layers - 1]
        gaps = student_layers - 1
        return [(2 * i * (teacher_layers - 1) + gaps) // (2 * gaps) for i in range(student_layers)]
    raise ValueError(
        f"layer map {kind!r} is unknown: choose 'floor', 'uniform' or 'last', or list one teacher layer for each of "
        f"the student's {student_layers} layers."
    )


def _checked(layers: Sequence[int], student_layers: int, teacher_layers: int) -> list[int]:
    layers = list(layers)
    if len(layers) != student_layers:
        raise ValueError(
            f"the layer map lists {len(layers)} teacher layers for {student_layers} student layers: "
            "list exactly one for each student layer."
        )
    for student_layer, teacher_layer in enumerate(layers):
        if not isinstance(teacher_layer, int) or isinstance(teacher_layer, bool):
            raise ValueError(
                f"the layer map gives student layer {student_layer} the teacher layer {teacher_layer!r}: "
                "layers are whole numbers."
            )
        if not 0 <= teacher_layer < teacher_layers:
            raise ValueError(
                f"the layer map gives student layer {student_layer} the teacher layer {teacher_layer}, but the "
                f"teacher has {teacher_layers} layers: use 0 to {teacher_layers - 1}, counted from the first."
            )
    return layers
