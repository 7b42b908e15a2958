"""What a student must beat: itself without its recurrent part, and its teacher with a window and no training.

A hybrid may ignore its mixers (arXiv 2510.05901), and a training-free window with sinks equals many trained linear
layers (arXiv 2608.28444).
"""

import copy
import functools

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from cab_hf.models.mixers import GatedMixer
from cab_hf.transfer.hybrid import nothing


def without_mixers(student: PreTrainedModel) -> PreTrainedModel:
    """A copy of a student whose mixers all give zero; of a hybrid, attention stays.

    Raises:
        ValueError: the model has no mixers.
    """
    zeroed = copy.deepcopy(student)
    mixers = [module for module in zeroed.modules() if isinstance(module, GatedMixer)]
    if not mixers:
        raise ValueError(f"{type(student).__name__} has no mixers to leave out. Give a student of this package.")
    for mixer in mixers:  # not by its weights: a hybrid's output projection may stand outside of it
        mixer.out_proj.register_forward_hook(nothing)
    return zeroed


def with_window(teacher: PreTrainedModel, window: int = 64, sinks: int = 4) -> PreTrainedModel:
    """A copy of a Transformer each of whose tokens attends to the last `window` tokens, itself among them, and to the
    first `sinks` of its row, or of its document where rows are packed.

    Only the mask changes, so memory and time do not fall as they would with a window.

    Args:
        teacher: a language model whose attention goes through transformers' attention interface.
        window: tokens, at least 1.
        sinks: tokens.

    Raises:
        ValueError: a window of no token, or a model whose attention can't be replaced.
    """
    if window < 1 or sinks < 0:
        raise ValueError(f"window is {window} and sinks {sinks}. Give a window of at least 1 and 0 sinks or more.")
    name = f"cab_window_{window}_{sinks}"
    AttentionInterface.register(name, functools.partial(_attend, window=window, sinks=sinks))
    AttentionMaskInterface.register(name, AttentionMaskInterface()["sdpa"])
    limited = copy.deepcopy(teacher)
    try:
        limited.set_attn_implementation(name)
    except ValueError as error:
        raise ValueError(f"{type(teacher).__name__} takes no window: {error}") from error
    config = limited.config.get_text_config()
    unread = [field for field in ("attn_logit_softcapping", "sinks") if getattr(config, field, None)]
    if config._attn_implementation != name or unread or config.model_type == "gpt_oss":
        raise ValueError(
            f"{type(teacher).__name__} takes no window: its attention can't be replaced by plain scaled dot products. "
            "Leave this control out."
        )
    return limited


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    window: int,
    sinks: int,
    **kwargs,
) -> tuple[Tensor, None]:
    """Scaled dot products over the first and the last places that the mask lets a token see.

    query `(b, h, q, p)`, key and value `(b, h_kv, k, p)`, mask None or `(b, 1, q, k)`, true or zero where seen.
    """
    if kwargs.get("s_aux") is not None:
        raise ValueError(
            f"{type(module).__name__} takes no window: its softmax has a term of no token. Leave this control out."
        )
    rows, columns = query.shape[2], key.shape[2]
    if attention_mask is None:
        seen = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)[None, None]
    else:
        seen = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
    place = seen.cumsum(-1, dtype=torch.int32)  # of what is seen, counted from the first
    seen = seen & ((place <= sinks) | (place > place[..., -1:] - window))
    return AttentionInterface()["sdpa"](module, query, key, value, seen, **kwargs)
