"""A closed-form start: output projections fitted to the teacher's attention by ridge regression, without training.

Shapes: `b` batch, `t` token, `h` head, `p` head_dim, `d` width.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cab_hf.inference import evaluating
from cab_hf.models.modeling_cab_vision_mamba import CABVisionMambaPreTrainedModel
from cab_hf.models.students import MixerPreTrainedModel
from cab_hf.teachers.examination import check_whole
from cab_hf.teachers.teacher import borrowed_teacher
from cab_hf.transfer.reading import read_layers
from cab_hf.transfer.slots import slots


@torch.no_grad()
def fit_output_projection(
    student: MixerPreTrainedModel,
    teacher: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    layer_map: str | Sequence[int] = "floor",
    ridge: float = 0.3,
) -> None:
    """Fits every mixer's output projection to what the teacher's attention adds to the residual stream, in place.

    Each mixer reads the teacher's own hidden states of its layer (through the student's norm). The projection then
    becomes the least-squares map from the mixer's output `(b, t, d)` to the attention's, pulled towards the projection
    that it had. Memory: one square matrix of the mixer's width for each layer, in float64. For a vision student the
    teacher's tokens come at the student's places, as a mixer reads them in order.

    Args:
        student: a student with the teacher's norms and, best, its attention's projections (`student_from_teacher`,
            `student_from_teacher`).
        teacher: a model of a known family, left as it was.
        batches: `input_ids` `(b, t)` and, if padded, `attention_mask` `(b, t)` each; or `pixel_values`
            `(b, c, height, width)`. Some thousand tokens will do; the fewer, the larger `ridge` should be.
        layer_map: the teacher layer of each student layer, as in `student_from_teacher`.
        ridge: strength of the pull, relative to the mean energy of an output feature.

    Raises:
        ValueError: no batches, a negative ridge, an unknown family, or an image student with tokens that the teacher
            lacks.
    """
    if not ridge >= 0:
        raise ValueError(f"ridge is {ridge}, but a pull can't be negative: use 0 for none, 0.3 to start with.")
    check_whole("teacher", teacher)
    readings = read_layers(teacher) if isinstance(student, CABVisionMambaPreTrainedModel) else None
    mixers = student.mixer_list
    grams: list[Tensor | float] = [0.0] * len(mixers)
    products: list[Tensor | float] = [0.0] * len(mixers)
    with borrowed_teacher(teacher) as borrowed, evaluating(student):
        for inputs in batches:
            mask = inputs.get("attention_mask")
            mask = None if mask is None else mask.to(student.device)
            padding = {} if mask is None else {"attention_mask": mask}
            for index, slot in enumerate(slots(student, borrowed, inputs, layer_map, readings)):
                features = slot.mixer(slot.hidden_states, **padding)[1].output.double()  # (b, t, d)
                target = slot.output.double()
                if getattr(slot.mixer.out_proj, "bias", None) is not None:
                    features = torch.cat((features, torch.ones_like(features[..., :1])), dim=-1)
                real = slice(None) if mask is None else mask.bool()
                features, target = features[real].flatten(0, -2), target[real].flatten(0, -2)
                grams[index] = grams[index] + features.T @ features
                products[index] = products[index] + features.T @ target
    if not isinstance(grams[0], Tensor):
        raise ValueError(
            "batches is empty, but a fit needs data: pass at least one batch of input_ids or pixel_values."
        )
    for mixer, gram, product in zip(mixers, grams, products, strict=True):
        if isinstance(mixer.out_proj, torch.nn.Linear):  # a hybrid's may stand outside, and is the teacher's
            _solve(mixer.out_proj, gram, product, ridge)


def _solve(projection: torch.nn.Linear, gram: Tensor, product: Tensor, ridge: float) -> None:
    """Minimises `|features W - target|^2 + pull |W - W0|^2`; the bias, the last row of W, is pulled nowhere."""
    width = projection.in_features
    start = projection.weight.double().T
    if projection.bias is not None:
        start = torch.cat((start, projection.bias.double()[None]))
    pull = torch.zeros_like(gram[0])
    pull[:width] = ridge * gram.diagonal()[:width].mean()
    # Features that never move, and a ridge of zero, must not make the system singular.
    pull += 1e-9 * gram.diagonal().mean()
    solution = start + torch.linalg.solve(gram + pull.diag(), product - gram @ start)
    projection.weight.copy_(solution[:width].T)
    if projection.bias is not None:
        projection.bias.copy_(solution[width])
