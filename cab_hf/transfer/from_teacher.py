"""Makes a student out of a Transformer: its shape, its weights, and its attention as the start of a mixer.

Linear attention `h_t = h_{t-1} + k_t v_t, y_t = q_t h_t` is a state-space recurrence with A = I, so a mixer can start
from the teacher's projections: x <- V, B <- K, C <- Q, output projection <- O. Positions by rotation are left behind:
a mixer knows order by its recurrence.

Shapes: `b` batch, `t` token, `h` head, `p` head_dim, `n` state, `g` group, `d` width.

Source: arXiv 2510.19266, section "Method" (the correspondence); arXiv 2408.15237 and 2604.14191 (the initialisation).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from cab_hf.models.configuration_cab_mamba import CABMambaConfig
from cab_hf.models.modeling_cab_mamba import (
    CABMambaForSequenceClassification,
    CABMambaPreTrainedModel,
)
from cab_hf.transfer.copying import (
    OWN_GROUPS,
    check_fields,
    copy_bias,
    copy_block,
    copy_norm,
    copy_reading,
    copy_tensor,
    mixer_fields,
)
from cab_hf.transfer.families import family_of, read_weight
from cab_hf.transfer.reading import Reading, read_layers


def with_labels(teacher: PreTrainedModel, overrides: dict[str, Any]) -> dict[str, Any]:
    """Overrides of a classifier's config: with the teacher's labels, where it has as many and none are named."""
    config = teacher.config
    if "id2label" in overrides:
        return overrides
    if _score(teacher) is None:
        if "num_labels" not in overrides:
            raise ValueError(
                f"The teacher {type(teacher).__name__} has no classifier (`score`) to take labels from, and no "
                "num_labels is given. Say how many there are: student_from_teacher(..., num_labels=2)."
            )
        return overrides
    if overrides.get("num_labels", config.num_labels) != config.num_labels:
        return overrides
    others = {name: value for name, value in overrides.items() if name != "num_labels"}
    labels = {"id2label": dict(config.id2label), "label2id": dict(config.label2id)}
    return {**labels, "problem_type": config.problem_type, **others}


def _score(teacher: PreTrainedModel) -> nn.Linear | None:
    """The head of a decoder that classifies texts, under the name of every family; one for tokens has a bias."""
    head = dict(teacher.named_children()).get("score")
    return head if isinstance(head, nn.Linear) and head.bias is None else None


def student_config(
    teacher_config: PreTrainedConfig,
    *,
    num_hidden_layers: int | None = None,
    mixer_type: str = "mamba2",
    start: str = "linear",
    readings: Iterable[Reading] = (),
    **overrides: Any,
) -> CABMambaConfig:
    """The config of a student of a teacher's shape.

    One mixer head for each attention head, with its own B and C as wide as a key, and the teacher's norms, MLPs,
    residuals and vocabulary. The mixers start transparent: a moving average of the values, as if without convolution,
    gate or skip. With `mixer_type="mamba"` the state size is S6's usual one.

    Args:
        teacher_config: config of a teacher of a known family; of a composite one its `text_config` counts.
        num_hidden_layers: depth; the teacher's when not given.
        mixer_type: "mamba2" or "mamba".
        start: "linear": the convolution has no activation, the gate is a bias. "served" (mamba2): no biases around the
            mixer (but an attention's output bias), and the usual SiLU after the convolution, so that float16, 8-bit
            formats and llama.cpp hold the student as it is. It trains as well in large batches, and less steadily in
            small ones (benchmarks/quality/served_start).
        readings: of the teacher's attention, which tell of that output bias.
        **overrides: any field of `CABMambaConfig`.

    Raises:
        ValueError: an unknown family or field, or a feature that a student can't express.
    """
    check_fields(CABMambaConfig, overrides)
    text = teacher_config.get_text_config()
    family, values = family_of(text), {**teacher_config.to_dict(), **text.to_dict()}
    fields = {
        **mixer_fields(text, num_hidden_layers, mixer_type, start, readings),
        **(OWN_GROUPS if mixer_type == "mamba2" else {}),
        "vocab_size": text.vocab_size,
        "tie_word_embeddings": teacher_config.tie_word_embeddings,
        **{name: values.get(name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
        **family.student_fields(text),
    }
    return CABMambaConfig(**(fields | overrides))


@torch.no_grad()
def copy_teacher_weights(
    student: CABMambaPreTrainedModel,
    teacher: PreTrainedModel,
    layer_map: Sequence[int],
    copy_attention: bool = True,
) -> None:
    """Copies a teacher's weights into a student, in place.

    In an SSD mixer with one group a head, x <- V, B <- K, C <- Q times the attention's scaling (grouped keys and
    values are repeated), and the output projection <- O, biases included: without `use_bias` those of Q, K and V stand
    in the convolution. States wider than a key keep their random C and get B = 0, silent until they learn. With a SiLU
    after the convolution keys and queries share the scaling, and values are made small (`VALUE_TAPS`), for the time
    step to undo.

    An S6 mixer computes B and C from x, so there is no slot for K and Q: x <- V and the output projection <- O are
    copied, and the bridge is what teaches B and C.

    Of Qwen3 and Gemma 3, the weights of the query and key norms are copied into the projections; their normalisation
    can't be.

    Args:
        student: a model whose shape follows the teacher (`student_config`).
        teacher: a model of a known family.
        layer_map: the teacher layer of each student layer.
        copy_attention: copy attention's projections too.

    Raises:
        ValueError: an unknown family or sizes that don't fit; the message holds both.
    """
    family, source, target = family_of(teacher.config), teacher.get_decoder(), student.base_model
    copy_tensor("embeddings.weight", target.embeddings.weight, read_weight(teacher.get_input_embeddings()))
    if family.positions is not None and target.position_embeddings is not None:
        positions = read_weight(source.get_submodule(family.positions))
        copy_tensor("position_embeddings.weight", target.position_embeddings.weight, positions)
    copy_norm("norm_f", target.norm_f, family.read_norm(source.get_submodule(family.final_norm)))
    _copy_head(student, teacher)

    blocks, readings = source.get_submodule(family.layers), read_layers(teacher) if copy_attention else None
    for index, (block, teacher_index) in enumerate(zip(target.layers, layer_map, strict=True)):
        copy_block(f"layers.{index}", block, family.read_layer(blocks[teacher_index]))
        if readings is not None:
            copy_reading(f"layers.{index}.mixer", block.mixer, readings[teacher_index])


def _copy_head(student: CABMambaPreTrainedModel, teacher: PreTrainedModel) -> None:
    if isinstance(student, CABMambaForSequenceClassification):
        score = _score(teacher)
        if score is not None and score.out_features == student.score.out_features:
            copy_tensor("score.weight", student.score.weight, read_weight(score))
        return
    target, source = student.get_output_embeddings(), teacher.get_output_embeddings()
    if target is None or source is None:
        return
    weight, bias = read_weight(source), source.bias
    tied = target.weight is student.get_input_embeddings().weight
    if tied and not torch.equal(weight, read_weight(teacher.get_input_embeddings())):
        raise ValueError(
            "The student's tie_word_embeddings is True, but the teacher's head and embeddings differ. Set "
            "tie_word_embeddings=False."
        )
    copy_tensor("lm_head.weight", target.weight, weight)
    copy_bias("lm_head.bias", target.bias, bias)
