"""What is inside a student: its layers, its parameters, and how much its mixers attend like the teacher.

Shape legend: `b` batch, `t` token, `h` head.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from cab_hf.data.documents import load_documents
from cab_hf.data.image_sources import load_images, pick_test_split
from cab_hf.data.images import ImageDataset, normalisation
from cab_hf.data.packing import tokens_of
from cab_hf.export.loading import load_image_processor, load_tokenizer, read_student
from cab_hf.models.mixers import StateSpaceBranch
from cab_hf.models.modeling_cab_vision_mamba import CABVisionMambaPreTrainedModel
from cab_hf.models.students import MixerPreTrainedModel
from cab_hf.teachers.alignment import align_with_student, taught_layers
from cab_hf.teachers.loading import load_image_teacher, load_teacher
from cab_hf.teachers.teacher import borrowed_teacher, check_vocabularies


_TRANSITION = ("A_log", "D", "dt_bias", "dt_proj", "x_proj")
_MIXER_PARTS = {
    "in_proj": "mixers: input projection",
    "conv1d": "mixers: convolution",
    **dict.fromkeys(_TRANSITION, "mixers: transition"),
    "norm": "mixers: output norm",
    "out_proj": "mixers: output projection",
}


@dataclass
class Layer:
    """One row of a layer map.

    Attributes:
        layer: index of the student's layer.
        mixer: "mamba" (S6) or "mamba2" (SSD).
        directions: 1, or 2 for a bidirectional mixer.
        heads, head_dim: of SSD; for S6 one "head" of all channels.
        state_size: width of B and C.
        groups: heads that share B and C form a group.
        mlp: width of the MLP, 0 without one.
        teacher_layer: the teacher's layer that it is compared with; None without a teacher.
    """

    layer: int
    mixer: str
    directions: int
    heads: int
    head_dim: int
    state_size: int
    groups: int
    mlp: int
    teacher_layer: int | None = None


@dataclass
class AttentionSimilarity:
    """Attention maps of both models, averaged over heads.

    Attributes:
        cosine: one value a layer, the mean over examples.
        teacher_layers: the teacher's layer of each.
        student_maps, teacher_maps: `(t, t)` of the first example, one a layer, float32.
    """

    cosine: list[float]
    teacher_layers: list[int]
    student_maps: list[Tensor]
    teacher_maps: list[Tensor]


def layer_table(student: MixerPreTrainedModel, teacher_layers: Sequence[int] | None = None) -> list[Layer]:
    """What each layer of a student is.

    Args:
        student: any student.
        teacher_layers: the teacher's layer of each, if there is a teacher.
    """
    config, rows = student.config, []
    directions = 1
    if isinstance(student, CABVisionMambaPreTrainedModel) and config.bidirectional:
        directions = 2
    hybrid = config.model_type == "cab_hybrid"
    width = getattr(config.get_text_config() if hybrid else config, "intermediate_size", None) or 0
    numbers = config.layer_numbers if hybrid else range(config.num_hidden_layers)
    for index, (number, kind) in enumerate(zip(numbers, config.layer_mixer_types, strict=True)):
        ssd, mixer = kind == "mamba2", student.mixer_list[index].config
        rows.append(
            Layer(
                layer=number,
                mixer=kind,
                directions=directions,
                heads=mixer.num_heads if ssd else 1,
                head_dim=mixer.head_dim if ssd else mixer.mixer_width,
                state_size=mixer.state_size,
                groups=mixer.n_groups if ssd else 1,
                mlp=width,
                teacher_layer=None if teacher_layers is None else teacher_layers[index],
            )
        )
    return rows


def parameter_table(student: MixerPreTrainedModel) -> list[tuple[str, int, float]]:
    """Where a student's parameters are.

    Args:
        student: any student.

    Returns:
        Rows of part, number of parameters and share of all, the largest first. A head that shares the embeddings'
        weight is counted with them.
    """
    inside = {name for name, module in student.named_modules() if isinstance(module, StateSpaceBranch)}
    counts: dict[str, int] = {}
    for name, parameter in student.named_parameters():
        part = _part(name, inside)
        counts[part] = counts.get(part, 0) + parameter.numel()
    total = sum(counts.values())
    return [(part, n, n / total) for part, n in sorted(counts.items(), key=lambda row: -row[1])]


@torch.no_grad()
def attention_similarity(
    student: MixerPreTrainedModel,
    teacher: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    layer_map: str | Sequence[int] = "floor",
) -> AttentionSimilarity:
    """How much the maps that a student's mixers imply are like the teacher's attention maps.

    The student's map of a head is what its scan applies to its input, `C_i prod(A) B_j dt_j`; the teacher's is the one
    that it applies, with its window, cap, sinks or bias. Both are averaged over heads, which may differ in number, and
    compared by the cosine of all their entries, so that scales do not matter. Both maps are quadratic in length: some
    hundred tokens will do.

    Args:
        student: any student; run in eval mode.
        teacher: a Transformer, left as it was.
        inputs: `input_ids` `(b, t)` without padding, or `pixel_values` `(b, c, height, width)`. An image teacher's
            tokens are compared at the places of the student's.
        layer_map: the teacher layer of each student layer.

    Raises:
        ValueError: a teacher without readable attention, or tokens that one of both does not have.

    Source: arXiv 2510.19266, figure 3 (the maps side by side).
    """
    images = isinstance(student, CABVisionMambaPreTrainedModel)
    with borrowed_teacher(teacher) as borrowed:
        layers = taught_layers(student.config, borrowed, layer_map)
        seen = borrowed(inputs, attentions=True, maps=True)
        if images:
            size = inputs["pixel_values"].shape[-2:]
            seen = align_with_student(seen, teacher.config.patch_size, size, student.config, size, layers)
        applied = {layer: seen.maps[layer]().float().mean(dim=1).cpu() for layer in set(layers)}
    training = student.training
    try:
        own = {name: tensor.to(student.device) for name, tensor in inputs.items()}
        if student.config.model_type == "cab_hybrid":  # whose `attentions` are those of kept layers
            shown = student.eval()(**own, output_projections=True).projections
            maps = [mixer.attention_map(*one[:3]) for mixer, one in zip(student.mixer_list, shown, strict=True)]
        else:
            maps = student.eval().base_model(**own, output_attentions=True).attentions
    finally:
        student.train(training)

    result = AttentionSimilarity([], layers, [], [])
    for student_map, layer in zip(maps, layers, strict=True):
        implied = student_map.float().mean(dim=1).cpu()  # (b, t, t)
        attended = applied[layer]  # (b, t, t)
        result.cosine.append(float(F.cosine_similarity(implied.flatten(1), attended.flatten(1)).mean()))
        result.student_maps.append(implied[0])
        result.teacher_maps.append(attended[0])
    return result


def plot_attention(similarity: AttentionSimilarity, path: str | Path, *, layers: Sequence[int] | None = None) -> Path:
    """Draws teacher and student maps side by side for a few layers, and the cosine over all of them.

    A row of a map is scaled to its largest entry, as a row of the student's has no fixed sum: white is nothing, blue
    positive, red negative.

    Args:
        similarity: of `attention_similarity`.
        path: picture to write, 1600 pixels wide; its suffix picks the format.
        layers: student layers to draw; by default up to four, spread over the depth.

    Returns:
        `path`.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Attention maps need matplotlib. Run `pip install matplotlib`.") from error

    depth = len(similarity.cosine)
    if layers is None:
        shown = min(4, depth)
        layers = sorted({round(index * (depth - 1) / max(shown - 1, 1)) for index in range(shown)})
    figure = Figure(figsize=(8, 6.4), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(3, len(layers), height_ratios=(1, 1, 0.8))
    panels = []
    for column, layer in enumerate(layers):
        teachers = ("teacher", similarity.teacher_maps, similarity.teacher_layers[layer])
        pair = (teachers, ("student", similarity.student_maps, layer))
        for row, (name, maps, index) in enumerate(pair):
            panel = figure.add_subplot(grid[row, column])
            scaled = maps[layer] / maps[layer].abs().amax(dim=-1, keepdim=True).clamp_min(1e-30)
            image = panel.imshow(scaled.numpy(), cmap="RdBu", vmin=-1, vmax=1, interpolation="nearest")
            panel.set_title(f"{name}, layer {index}", fontsize=12)
            panel.set_xticks([])
            panel.set_yticks([])
            if column == 0:
                panel.set_ylabel("query token", fontsize=12)
            if row == 1:
                panel.set_xlabel("key token", fontsize=12)
            panels.append(panel)
    bar = figure.colorbar(image, ax=panels, shrink=0.8, ticks=(-1, 0, 1))
    bar.set_label("of the row's largest entry", fontsize=12)
    bar.ax.tick_params(labelsize=12)
    curve = figure.add_subplot(grid[2, :])
    curve.bar(range(depth), similarity.cosine, color="C0")
    curve.axhline(0, color="black", linewidth=0.8)
    curve.set_ylim(min(0.0, *similarity.cosine) * 1.1, 1)
    curve.set_xlabel("student layer", fontsize=12)
    curve.set_ylabel("cosine", fontsize=12)
    curve.tick_params(labelsize=12)
    curve.xaxis.get_major_locator().set_params(integer=True)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def inspect(
    folder: str | Path,
    teacher: str | None = None,
    *,
    data: str | None = None,
    output: str | Path | None = None,
    tokens: int = 128,
    examples: int = 4,
    layer_map: str = "floor",
) -> dict[str, Any]:
    """Reads a saved student and, with a teacher, compares their attention on data.

    Args:
        folder: a saved student, or its Hub id.
        teacher: Hub id or folder of its teacher, or "smollm2-demo".
        data: a source of `load_documents`, by default "builtin", or for image students of `load_images`, by default
            "digits"; of an image set with several splits the last is read.
        output: folder for `inspection.json` and, with a teacher, `attention.png`; nothing is written when None.
        tokens: tokens of a text.
        examples: texts or images.
        layer_map: the teacher layer of each student layer.

    Returns:
        What is written as JSON: `model`, `parameters`, `layers`, `parameter_table` and, with a teacher, `teacher`,
        `data` and `attention_cosine`.

    Raises:
        ValueError: a folder without a student, a teacher of other tokens, or data that is too short.
    """
    if tokens < 1 or examples < 1:
        raise ValueError(f"tokens is {tokens} and examples is {examples}; both must be at least 1.")
    student = read_student(folder)
    similarity = None
    report: dict[str, Any] = {"model": type(student).__name__, "parameters": student.num_parameters()}
    if teacher is not None:
        images = isinstance(student, CABVisionMambaPreTrainedModel)
        data = data or ("digits" if images else "builtin")
        make = _image_batch if images else _text_batch
        model, inputs = make(student, folder, teacher, data, tokens, examples)
        similarity = attention_similarity(student, model, inputs, layer_map)
        report |= {"teacher": str(teacher), "data": data, "attention_cosine": similarity.cosine}
    report["layers"] = [asdict(row) for row in layer_table(student, similarity and similarity.teacher_layers)]
    report["parameter_table"] = [
        {"part": part, "parameters": count, "share": share} for part, count, share in parameter_table(student)
    ]
    if output is not None:
        output = Path(output)
        output.mkdir(parents=True, exist_ok=True)
        (output / "inspection.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        if similarity is not None:
            plot_attention(similarity, output / "attention.png")
    return report


def describe(report: Mapping[str, Any]) -> str:
    """The report of `inspect` as text: the parts, then one line a layer."""
    lines = [f"{report['model']}, {report['parameters']:,} parameters", ""]
    lines += [f"  {row['part']:28} {row['parameters']:>14,} {row['share']:>7.1%}" for row in report["parameter_table"]]
    header = f"  {'layer':>5}  {'mixer':8} {'heads x width':>13} {'groups':>6} {'state':>5} {'MLP':>6}"
    cosines = report.get("attention_cosine")
    lines += ["", header + ("  teacher layer  cosine" if cosines else "")]
    for index, row in enumerate(report["layers"]):
        mixer = row["mixer"] + (" x2" if row["directions"] == 2 else "")
        size = f"{row['heads']} x {row['head_dim']}"
        line = f"  {row['layer']:>5}  {mixer:8} {size:>13} {row['groups']:>6} {row['state_size']:>5} {row['mlp']:>6}"
        if cosines:
            line += f"  {row['teacher_layer']:>13}  {cosines[index]:>6.3f}"
        lines.append(line)
    if cosines:
        lines += ["", f"  mean cosine of attention maps: {sum(cosines) / len(cosines):.3f} ({report['data']})"]
    return "\n".join(lines)


def _part(name: str, mixers: set[str]) -> str:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in mixers:
            return _MIXER_PARTS[parts[end]]
    if "window" in parts:
        return "attention beside mixers"
    if "mlp" in parts:
        return "MLPs"
    if parts[0] in ("lm_head", "classifier"):
        return "head"
    if "layers" in parts or "norm_f" in parts:
        return "norms and scales"
    return "embeddings"


def _text_batch(
    student: MixerPreTrainedModel, folder: str | Path, teacher: str, data: str, tokens: int, examples: int
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    model, tokenizer = load_teacher(teacher)
    own = load_tokenizer(folder)
    size = model.config.get_text_config().vocab_size
    check_vocabularies(student.config.vocab_size, size, own, tokenizer if own else None)
    rows: list[list[int]] = []
    for document in load_documents(data):
        ids = tokens_of(document, tokenizer)
        if len(ids) >= tokens:
            rows.append(ids[:tokens])
        if len(rows) == examples:
            break
    if not rows:
        raise ValueError(f"No text in {data!r} has {tokens} tokens; give longer texts, or fewer tokens.")
    return model, {"input_ids": torch.tensor(rows)}


def _image_batch(
    student: MixerPreTrainedModel, folder: str | Path, teacher: str, data: str, tokens: int, examples: int
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    model, teachers_processor = load_image_teacher(teacher)
    height, width = student.config.image_height_and_width
    if height != width:
        raise ValueError(f"The student's images are {height} x {width}; images of a data set are made square.")
    _, rows, _ = pick_test_split(load_images(data), None, None, data)
    rows = rows.select(range(min(examples, len(rows))))
    images = ImageDataset(rows, height, num_channels=student.config.num_channels)
    pixels = torch.stack([images[index]["pixel_values"] for index in range(len(images))]).float() / 255
    processor = load_image_processor(folder) or teachers_processor
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in normalisation(processor))
    return model.float(), {"pixel_values": (pixels - mean) / std}
