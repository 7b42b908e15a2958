"""A mixer's layer of a model's own cache."""

import torch
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer, LinearAttentionLayer


_NO_WAY_BACK = (
    "The cache is to be cropped (assisted decoding), but a mixer's state can't be rolled back. Generate without an "
    "assistant; a hybrid can't draft for a model either."
)


class MixerCacheLayer(LinearAttentionAndFullAttentionLayer):
    """A mixer's states in a model's own cache. It counts tokens: models ask it for positions and sizes of masks.

    Attributes:
        beside: tokens and sinks of the window beside the mixer; None without one.
    """

    beside: tuple[int, int] | None = None

    def __init__(self):
        super().__init__()
        self.seen_tokens = 0

    def get_seq_length(self) -> int:
        return self.seen_tokens

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What it holds: the convolution's state and the recurrent one."""
        return self.conv_states[0], self.recurrent_states[0]

    def hold(self, tensors: tuple[torch.Tensor, ...]) -> None:
        """Takes others in the place of its `tensors`."""
        self.conv_states, self.recurrent_states = ({0: tensor} for tensor in tensors)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen_tokens + query_length, 0

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        self.seen_tokens = 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.seen_tokens:
            self.hold(tuple(tensor.repeat_interleave(repeats, dim=0) for tensor in self.tensors()))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.seen_tokens:
            self.hold(tuple(tensor[indices] for tensor in self.tensors()))

    def activate_past_recording(self) -> None:
        raise ValueError(_NO_WAY_BACK)

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(_NO_WAY_BACK)
