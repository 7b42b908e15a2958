"""Which teacher layer teaches which student layer, and which teacher token is which student token.

Shape legend: `b` batch, `t` token, `h` head, `p` head_dim, `d` width.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig

from cab_hf.models import CABVisionMambaConfig
from cab_hf.teachers.teacher import Teacher, TeacherAttention, TeacherOutput


if TYPE_CHECKING:
    from cab_hf.teachers.recorded_teacher import RecordedTeacher


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
        ValueError: an unknown rule, or a sequence of another length or out of range.

    Source: arXiv 2510.19266, section "Method" (`floor`); the other rules are not the paper's.
    """
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


def taught_layers(
    config: PreTrainedConfig, teacher: "Teacher | RecordedTeacher", kind: str | Sequence[int] = "floor"
) -> list[int]:
    """Which of a teacher's attentions teaches each mixer of a student: of a hybrid the one in whose place it stands.

    Args:
        config: of the student.
        teacher: whose attention has paths, as that of a record has not; there the layer's number counts.
        kind: of `layer_map`, for a pure student, or for a hybrid of another teacher.
    """
    if config.model_type != "cab_hybrid" or not isinstance(kind, str):
        return layer_map(kind, config.num_hidden_layers, teacher.num_hidden_layers)
    paths = [path for path in config.mixers if path in teacher.paths]
    if len(paths) == len(config.mixers):
        return [teacher.paths.index(path) for path in paths]
    if not teacher.paths and max(config.layer_numbers) < teacher.num_hidden_layers:
        return config.layer_numbers
    return layer_map(kind, config.num_hidden_layers, teacher.num_hidden_layers)


def _checked(layers: Sequence[int], student_layers: int, teacher_layers: int) -> list[int]:
    layers = list(layers)
    if len(layers) != student_layers:
        raise ValueError(
            f"the layer map lists {len(layers)} teacher layers for {student_layers} student layers: "
            "list exactly one for each student layer."
        )
    for student_layer, teacher_layer in enumerate(layers):
        if not 0 <= teacher_layer < teacher_layers:
            raise ValueError(
                f"the layer map gives student layer {student_layer} the teacher layer {teacher_layer}, but the "
                f"teacher has {teacher_layers} layers: use 0 to {teacher_layers - 1}, counted from the first."
            )
    return layers


@dataclass(frozen=True)
class TokenLayout:
    """Where an image model keeps its tokens.

    Attributes:
        grid: rows and columns of patches, which are in reading order.
        class_token: place of the class token among all tokens; None without one.
        registers: tokens right behind the class token that stand for no patch (DINOv2's registers, DeiT's
            distillation token).
    """

    grid: tuple[int, int]
    class_token: int | None = None
    registers: int = 0

    @property
    def extra(self) -> int:
        """Tokens that are no patches."""
        return self.registers + (self.class_token is not None)

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1] + self.extra

    @property
    def order(self) -> list[int]:
        """Places of the class token, of the registers and of the patches, in this order."""
        place = 0 if self.class_token is None else self.class_token
        special = range(place, place + self.extra)
        return [*special, *(index for index in range(self.num_tokens) if index not in special)]


def student_layout(config: CABVisionMambaConfig, image_size: Sequence[int]) -> TokenLayout:
    """The layout of an image student's tokens for images of a height and width, in pixels."""
    grid = (image_size[0] // config.patch_size, image_size[1] // config.patch_size)
    return TokenLayout(grid, config.class_token_index(grid[0] * grid[1]), config.num_register_tokens)


def teacher_layout(num_tokens: int, image_size: Sequence[int], patch_size: int | Sequence[int]) -> TokenLayout:
    """The layout of a Vision Transformer's tokens: class token first, then registers, then patches.

    Args:
        num_tokens: tokens of the teacher's attention.
        image_size: height and width of the teacher's images, in pixels.
        patch_size: side, or height and width, of the teacher's patches.

    Raises:
        ValueError: fewer tokens than patches, as where attention stays inside windows or patches are merged.
    """
    sides = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
    grid = (image_size[0] // sides[0], image_size[1] // sides[1])
    extra = num_tokens - grid[0] * grid[1]
    if extra < 0:
        raise ValueError(
            f"The teacher attends over {num_tokens} tokens, but its images have {grid[0]} x {grid[1]} patches: its "
            "queries and keys are no global sequence (windows, or merged patches), so that no student token has its "
            "counterpart. Use a teacher such as ViT, DeiT, DINOv2, BEiT or CLIP, or losses without attention."
        )
    return TokenLayout(grid, class_token=0 if extra else None, registers=max(extra - 1, 0))


def align_tokens(x: Tensor, token_dim: int, source: TokenLayout, target: TokenLayout) -> Tensor:
    """A teacher's tokens at the places of the student's.

    The class token moves to the student's place; registers stay only where the student has as many, behind its class
    token; patches of another grid are resized bilinearly on the grid, in float32.

    Args:
        x: features last, tokens in dimension `token_dim`: `(b, t, d)` or `(b, h, t, p)`.
        token_dim: the dimension of tokens.
        source: the teacher's layout.
        target: the student's layout.

    Returns:
        `x`'s shape but for the number of tokens; `x` itself where the layouts are equal.

    Raises:
        ValueError: `x` has another number of tokens than `source`, or the student has tokens that the teacher lacks.

    Source: arXiv 2510.19266, section "Method", and its released vision code (the class token's move).
    """
    if source == target:
        return x
    if x.shape[token_dim] != source.num_tokens:
        raise ValueError(
            f"x has {x.shape[token_dim]} tokens in dimension {token_dim}, but the source layout has "
            f"{source.num_tokens}: pass the layout of the images that x was made of."
        )
    if target.class_token is not None and source.class_token is None:
        raise ValueError(
            "The student has a class token and the teacher has none: nothing teaches it. Use class_token='none', "
            "which pools over the patches."
        )
    if target.registers not in (0, source.registers):
        raise ValueError(
            f"The student has {target.registers} register tokens and the teacher {source.registers}: use "
            f"num_register_tokens={source.registers} or 0."
        )
    kept, places = _indices(source, target, x.device)
    if source.grid == target.grid:
        return x.index_select(token_dim, kept[places])
    x = x.index_select(token_dim, kept)
    special, patches = x.split([target.extra, x.shape[token_dim] - target.extra], dim=token_dim)
    x = torch.cat([special, _resize(patches, token_dim, source.grid, target.grid)], dim=token_dim)
    return x.index_select(token_dim, places)


def align_targets(
    targets: TeacherOutput, source: TokenLayout, target: TokenLayout, layers: Collection[int]
) -> TeacherOutput:
    """What an image teacher made, with its tokens at the places of the student's (`align_tokens`).

    Args:
        targets: of the teacher.
        source, target: layouts of the teacher and of the student.
        layers: the teacher's layers that are read; the others' attention is left as it is.

    Returns:
        The same, with aligned `attentions`, `hidden_states` and `maps`.
    """
    if source == target:
        return targets
    attentions, hidden_states = targets.attentions, targets.hidden_states
    if attentions is not None:
        attentions = tuple(
            _align_attention(attention, source, target) if index in layers else attention
            for index, attention in enumerate(attentions)
        )
    if hidden_states is not None:
        hidden_states = tuple(align_tokens(states, 1, source, target) for states in hidden_states)
    maps = targets.maps
    if maps is not None:
        maps = tuple(functools.partial(_align_map, make, source, target) for make in maps)
    return replace(targets, attentions=attentions, hidden_states=hidden_states, maps=maps)


def _align_map(make: Callable[[], Tensor], source: TokenLayout, target: TokenLayout) -> Tensor:
    """A map `(b, h, t, t)` at the student's places; what went to tokens that the student lacks goes to the others."""
    if source.grid != target.grid:
        raise ValueError(
            f"Attention maps are compared patch by patch, but the teacher's images have {source.grid} patches and the "
            f"student's {target.grid}. Use equal grids, or set `attention_weight=0.0`."
        )
    whole = make()
    kept, places = _indices(source, target, whole.device)
    kept = kept[places]
    part = whole.index_select(2, kept).index_select(3, kept)
    if source.num_tokens == target.num_tokens:
        return part
    return part / part.sum(dim=-1, keepdim=True)


def align_with_student(
    seen: TeacherOutput,
    patch_size: int | Sequence[int],
    teacher_images: Sequence[int],
    student: CABVisionMambaConfig,
    student_images: Sequence[int],
    layers: Collection[int],
) -> TeacherOutput:
    """`align_targets` between a Vision Transformer and a student.

    Args:
        seen: of the teacher; with attentions or hidden states.
        patch_size: of the teacher.
        teacher_images, student_images: height and width of each model's images, in pixels.
        student: the student's config.
        layers: the teacher's layers that are read.
    """
    if seen.attentions is not None:
        num_tokens = seen.attentions[0].query.shape[2]
    else:
        num_tokens = seen.hidden_states[0].shape[1]
    source = teacher_layout(num_tokens, teacher_images, patch_size)
    return align_targets(seen, source, student_layout(student, student_images), layers)


def _align_attention(attention: TeacherAttention, source: TokenLayout, target: TokenLayout) -> TeacherAttention:
    query, key, output = attention
    return TeacherAttention(
        align_tokens(query, 2, source, target),
        align_tokens(key, 2, source, target),
        None if output is None else align_tokens(output, 1, source, target),
    )


def _resize(patches: Tensor, token_dim: int, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    moved = patches.movedim(token_dim, -1)  # (..., p, t)
    planes = moved.reshape(-1, 1, *source).float()
    resized = F.interpolate(planes, size=target, mode="bilinear", align_corners=False)
    return resized.view(*moved.shape[:-1], -1).movedim(-1, token_dim).to(patches.dtype)


@functools.cache
def _indices(source: TokenLayout, target: TokenLayout, device: torch.device) -> tuple[Tensor, Tensor]:
    """The source's tokens that are kept, special ones first; and of these, resized, each place's in the target.

    Made and copied to a device once for all layers and steps: a copy would wait for the device.
    """
    kept = source.order[: target.extra] + source.order[source.extra :]
    order = target.order
    places = sorted(range(target.num_tokens), key=order.__getitem__)
    return torch.tensor(kept, device=device), torch.tensor(places, device=device)


def parse_layer_map(text: str) -> str | list[int]:
    """The `layer_map` argument: the name of a rule, or indices such as "0,2,5".

    Raises:
        ValueError: for a list that holds something else than whole numbers.
    """
    if not text[:1].isdigit():
        return text
    indices = text.split(",")
    for index in indices:
        if not index.strip().isdigit():
            raise ValueError(f"`layer_map` is {text!r}, but {index!r} is no layer: list whole numbers, as in '0,2,5'.")
    return [int(index) for index in indices]
