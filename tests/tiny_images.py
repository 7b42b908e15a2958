"""Tiny image teachers and students, and a naive restatement of everything that is distilled between them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tiny_distillation import Recorder, make_arguments
from torch import Tensor, nn
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
)

from cab_hf import CABVisionMambaConfig, CABVisionMambaForImageClassification, DistillationTrainer
from cab_hf.distillation.training_args import LOSSES


CLASSES = 7
HEADS, HEAD_DIM, WIDTH = 4, 8, 32
SIZE, PATCH = 8, 4
NAMES = {"id2label": {i: str(i) for i in range(CLASSES)}, "label2id": {str(i): i for i in range(CLASSES)}}
SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 4,
    "num_attention_heads": HEADS,
    "image_size": SIZE,
    "patch_size": PATCH,
}
STRONG = {"initializer_range": 0.15}  # weights large enough for errors to show
FAMILIES: dict[str, tuple[type, type, dict[str, Any], int]] = {
    "vit": (ViTForImageClassification, ViTConfig, {"intermediate_size": 48, **STRONG, **NAMES}, 1),
    "deit": (DeiTForImageClassification, DeiTConfig, {"intermediate_size": 48, **STRONG, **NAMES}, 2),
    "deit two heads": (
        DeiTForImageClassificationWithTeacher,
        DeiTConfig,
        {"intermediate_size": 48, **STRONG, **NAMES},
        2,
    ),
    "dinov2": (Dinov2ForImageClassification, Dinov2Config, {"mlp_ratio": 2, **STRONG, **NAMES}, 1),
    "dinov2 registers": (
        Dinov2WithRegistersForImageClassification,
        Dinov2WithRegistersConfig,
        {"mlp_ratio": 2, "num_register_tokens": 3, **STRONG, **NAMES},
        4,
    ),
    "beit": (BeitForImageClassification, BeitConfig, {"intermediate_size": 48, **STRONG, **NAMES}, 1),
    "clip": (CLIPVisionModel, CLIPVisionConfig, {"intermediate_size": 48, "initializer_factor": 3.0}, 1),
    "siglip": (SiglipVisionModel, SiglipVisionConfig, {"intermediate_size": 48}, 0),
}
"""Class, config, options, and tokens in front of the patches."""


def tiny_image_teacher(family: str = "vit", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random teacher of 4 layers for images of 8 x 8 pixels in 4 patches."""
    torch.manual_seed(seed)
    model_class, config_class, options, _ = FAMILIES[family]
    return model_class(config_class(**{**SIZES, **options, **overrides}))


def tiny_image_student(
    mixer_type: str = "mamba2", class_token: str = "middle", seed: int = 1, **overrides: Any
) -> CABVisionMambaForImageClassification:
    """A random student of 2 layers, as wide as the tiny teacher's attention and with as many heads."""
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "mixer_type": mixer_type,
        "class_token": class_token,
        "expand": 1,
        "head_dim": HEAD_DIM,
        "state_size": 6,
        "transition_init": "s4d",
        "image_size": SIZE,
        "patch_size": PATCH,
        **NAMES,
    }
    student = CABVisionMambaForImageClassification(CABVisionMambaConfig(**{**sizes, **overrides}))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return student


def image_rows(count: int = 8, size: int = SIZE, seed: int = 0, labelled: bool = True) -> list[dict[str, Any]]:
    """Rows {"pixel_values" `(3, size, size)`, "labels"}: row `i` depends on `seed` and `i` alone."""
    rows = []
    for index in range(count):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        row = {"pixel_values": torch.randn(3, size, size, generator=generator)}
        rows.append({**row, "labels": int(torch.randint(CLASSES, (), generator=generator))} if labelled else row)
    return rows


def stacked(rows: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Images `(b, 3, size, size)` and labels: `(b,)`, or `(b, classes)` where they are probabilities."""
    return torch.stack([row["pixel_values"] for row in rows]), torch.stack(
        [torch.tensor(row["labels"]) for row in rows]
    )


def make_image_trainer(
    folder: Any, rows: Any = None, student: nn.Module | None = None, teacher: Any = None, **options: Any
) -> tuple[DistillationTrainer, Recorder]:
    """A trainer of tiny image models with a `Recorder` as its last callback, and the recorder."""
    recorder = Recorder()
    names = ("eval_dataset", "data_collator", "batch_transform", "callbacks")
    keywords = {name: options.pop(name) for name in names if name in options}
    trainer = DistillationTrainer(
        tiny_image_student() if student is None else student,
        tiny_image_teacher() if teacher is None else teacher,
        make_arguments(folder, **options),
        train_dataset=image_rows() if rows is None else rows,
        callbacks=[*keywords.pop("callbacks", []), recorder],
        **keywords,
    )
    return trainer, recorder


def image_step(folder: Any, **options: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients and log of one optimizer step."""
    trainer, recorder = make_image_trainer(folder, **options)
    trainer.train()
    return recorder.gradients[0], recorder.logs[0]


class NaiveImageTeacher(NamedTuple):
    """Per layer `(b, t, h * p)`, in the teacher's own order of tokens: what its linear layers wrote and read."""

    logits: Tensor | None
    hidden_states: list[Tensor]
    queries: list[Tensor]
    keys: list[Tensor]
    outputs: list[Tensor]


@torch.no_grad()
def naive_image_teacher(model: PreTrainedModel, images: Tensor, **kwargs: Any) -> NaiveImageTeacher:
    """A teacher's queries, keys and attention outputs, by hooks on its projections."""
    queries, keys, outputs, hooks = [], [], [], []
    for name, module in model.named_modules():
        last = name.rsplit(".", 1)[-1]
        if last in ("q_proj", "k_proj"):
            kept = queries if last == "q_proj" else keys
            hooks.append(module.register_forward_hook(lambda *call, kept=kept: kept.append(call[2])))
        if last in ("o_proj", "out_proj") and ".head." not in f".{name}":
            hooks.append(module.register_forward_pre_hook(lambda _, inputs: outputs.append(inputs[0])))
    result = model.eval()(pixel_values=images, output_hidden_states=True, **kwargs)
    for hook in hooks:
        hook.remove()
    return NaiveImageTeacher(result.get("logits"), list(result.hidden_states), queries, keys, outputs)


def moved_tokens(x: Tensor, extra: int, student: Any, grid: tuple[int, int] = (2, 2)) -> Tensor:
    """A teacher's tokens `(b, t, d)` in the student's order: its class token put where the student has it.

    Args:
        x: class token and registers, `extra` of them, then the patches.
        extra: tokens in front of the patches.
        student: the student's config; its grid of patches is the images' grid.
        grid: the teacher's grid of patches.
    """
    special, patches = x[:, :extra], x[:, extra:]
    if grid != student.grid:
        planes = patches.transpose(1, 2).unflatten(2, grid)
        patches = F.interpolate(planes, size=student.grid, mode="bilinear").flatten(2).transpose(1, 2)
    if student.class_token == "none":
        return patches
    kept = special[:, : 1 + student.num_register_tokens]
    place = patches.shape[1] // 2 if student.class_token == "middle" else 0
    return torch.cat([patches[:, :place], kept, patches[:, place:]], dim=1)


def mapped(x: Tensor, kind: str, role: str) -> Tensor:
    """A target map written out; `x` `(b, t, h * p)`."""
    if kind == "softmax":
        exponentials = x.exp()
        return exponentials / exponentials.sum(1 if role == "key" else 2, keepdim=True)
    if kind == "elu1":
        return torch.where(x > 0, x + 1, x.exp())
    return {"none": x, "relu": x * (x > 0), "exp": x.exp()}[kind]


def naive_bridge_mlp(weights: dict[str, Tensor], layer: int, direction: int, role: str, x: Tensor) -> Tensor:
    up, down = (f"bridge.layers.{layer}.{direction}.{place}.{role}" for place in ("up", "down"))
    hidden = x @ weights[f"{up}.weight"].T + weights[f"{up}.bias"]
    return (hidden * hidden.sigmoid()) @ weights[f"{down}.weight"].T + weights[f"{down}.bias"]


def naive_bridge_loss(
    model: nn.Module,
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    images: Tensor,
    kind: str = "none",
    relative: bool = False,
) -> Tensor:
    """The paper's bridge of a bidirectional student, in the mean over images, tokens, features and layers.

    Args:
        model: student and bridge.
        queries, keys: one `(b, t, h * p)` a student layer, in the student's order of tokens.
        images: the student's.
        kind: the target map.
        relative: divide by the mean square of the mapped targets.

    Source: arXiv 2510.19266, section "Method": the backward branch learns from reversed queries and keys.
    """
    weights, total = dict(model.named_parameters()), 0.0
    written = model.student.backbone(images, output_projections=True).projections
    for layer, (query, key) in enumerate(zip(queries, keys, strict=True)):
        shown = {
            (0, "key"): written[layer].B,
            (0, "query"): written[layer].C,
            (1, "key"): written[layer].backward_B,
            (1, "query"): written[layer].backward_C,
        }
        for (direction, role), projection in shown.items():
            target = mapped(key if role == "key" else query, kind, role)
            scale = target.square().mean() if relative else 1.0
            target = target[:, range(target.shape[1] - 1, -1, -1)] if direction else target
            prediction = naive_bridge_mlp(weights, layer, direction, role, projection.flatten(2))
            total = total + (prediction - target).square().mean() / scale / len(queries)
    return total


def naive_image_losses(
    model: nn.Module,
    teacher: NaiveImageTeacher,
    images: Tensor,
    labels: Tensor | None,
    layers: Sequence[int],
    extra: int = 1,
    relative: bool = False,
    temperature: float = 1.0,
    kind: str = "none",
) -> dict[str, Tensor]:
    """The six parts over a whole batch of equal images. `extra`: the teacher's tokens in front of its patches."""
    student, config = model.student, model.student.config
    ours = student.backbone(
        images, output_projections=True, output_attentions=True, output_hidden_states=True, return_dict=True
    )
    logits = student.classifier(ours.pooler_output)
    parts = dict.fromkeys(LOSSES, torch.zeros(()))
    if teacher.logits is not None:
        log_p, log_q = ((one / temperature).log_softmax(-1) for one in (teacher.logits, logits))
        parts["kl"] = (log_p.exp() * (log_p - log_q)).sum(-1).mean() * temperature**2
    if labels is not None and labels.is_floating_point():
        parts["ce"] = -(labels * logits.log_softmax(-1)).sum(-1).mean()
    elif labels is not None:
        known = labels >= 0
        parts["ce"] = -logits.log_softmax(-1)[known, labels[known]].mean()

    def picked(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [moved_tokens(tensors[layer], extra, config) for layer in layers]

    queries, keys, outputs = picked(teacher.queries), picked(teacher.keys), picked(teacher.outputs)
    hidden_states = picked(teacher.hidden_states[1:])
    norm = student.backbone.norm_f
    # The student's last state is after its norm, and the teacher's are before any.
    mean_square = hidden_states[-1].square().mean(-1, keepdim=True)
    hidden_states[-1] = norm.weight.detach() * hidden_states[-1] * (mean_square + norm.eps).rsqrt()
    if model.bridge is not None:
        parts["bridge"] = naive_bridge_loss(model, queries, keys, images, kind, relative)
    for layer in range(len(layers)):
        for name, mine, target in (
            ("output", ours.projections[layer].output, outputs[layer]),
            ("hidden", ours.hidden_states[layer + 1], hidden_states[layer]),
        ):
            scale = target.square().mean() if relative else 1.0
            parts[name] = parts[name] + (mine - target).square().mean() / scale / len(layers)
        query, key = (x[layer].unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for x in (queries, keys))
        teacher_map = (query @ key.transpose(-1, -2) / HEAD_DIM**0.5).softmax(-1)
        distance = (ours.attentions[layer] - teacher_map).square().sum(-1).mean()
        parts["attention"] = parts["attention"] + distance / len(layers)
    return parts
