"""A window of attention beside a mixer: attention reads the last tokens and the first ones, the state reads them all.

No family is known here. The teacher's own module attends, under a mask of its own, to keys and values that never grow
in number. So a token costs the same behind any length, as a mixer's does.

Shape legend: `b` batch, `h` head, `q` new token, `k` place of a key, `p` head_dim, `d` width, `w` window, `s` sinks.
"""

import copy
import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from .mixer_cache import MixerCacheLayer


class Sight(NamedTuple):
    """What new tokens see of a window's keys, and where their own keys go.

    Attributes:
        sees: `(b, 1, q, k)`, or of `seen_in_blocks`.
        place: `(b, q)`.
        read: `(b,)`, real tokens of each row, the new ones among them.
    """

    sees: Tensor
    place: Tensor
    read: Tensor


class WindowCacheLayer(MixerCacheLayer):
    """A mixer's states, and the keys and values of the window beside it.

    There are `s + w + 1` places. A row's first `s` tokens stay in theirs, later ones take turns in the next `w`, and
    padding falls into the last one. The order of keys says nothing: their positions are in them already.

    Attributes:
        window, sinks: `w`, `s`.
        keys, values: `(b, h, s + w + 1, p)`.
        num_real: `(b,)`, tokens of each row that were read, without padding.
        sight: of the tokens that are read now.
    """

    def __init__(self, window: int, sinks: int):
        super().__init__()
        self.window, self.sinks = self.beside = window, sinks
        self.num_real: Tensor | None = None
        self.sight: Sight | None = None

    def look(self, hidden_states: Tensor, mask: Tensor | None, in_blocks: bool = False) -> Sight:
        """The sight of new tokens, by their hidden states `(b, q, d)` and mask `(b, q)`; in blocks, of a whole row."""
        rows, length, device = *hidden_states.shape[:2], hidden_states.device
        real = torch.ones(rows, length, dtype=torch.bool, device=device) if mask is None else mask != 0
        before = torch.zeros(rows, dtype=torch.long, device=device) if self.num_real is None else self.num_real
        rank, read = _ranks(real, before), before + real.sum(-1)
        if in_blocks:
            sees = seen_in_blocks(length, self.window, self.sinks, device)
        else:
            if length == 1:  # its key is at its place when it is read
                ranks = self._held(read)
            else:
                ranks = rank if self.keys is None else torch.cat((self._held(before), rank), dim=-1)
            sees = _sees(rank, ranks, self.window, self.sinks, real)
        place = torch.where(rank < self.sinks, rank, self.sinks + (rank - self.sinks) % self.window)
        stays = real & ((rank < self.sinks) | (rank >= read[:, None] - self.window))
        place = torch.where(stays, place, self.sinks + self.window)
        return Sight(sees, place, read)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes new keys and values `(b, h, q, p)` in; gives those that `sight` tells of."""
        rows, heads, length, _ = key_states.shape
        new = shown = key_states, value_states
        if self.keys is None:
            places = self.sinks + self.window + 1
            self.keys, self.values = (x.new_zeros(rows, heads, places, x.shape[-1]) for x in new)
            self.num_real = torch.zeros_like(self.sight.read)
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        elif length > 1:
            shown = tuple(torch.cat(pair, dim=2) for pair in zip((self.keys, self.values), new))
        place = self.sight.place[:, None, :, None]
        for held, tensor in zip((self.keys, self.values), new):
            held.scatter_(2, place.expand_as(tensor), tensor)
        self.num_real.copy_(self.sight.read)
        return (self.keys, self.values) if length == 1 else shown

    def _held(self, read: Tensor) -> Tensor:
        """`(b, k)`: the rank of what is at each place once `read` `(b,)` tokens were; negative where nothing is."""
        place = torch.arange(self.sinks + self.window, device=read.device)
        last = read[:, None] - 1
        turns = last - (last - place) % self.window
        rank = torch.where(place < self.sinks, torch.where(place <= last, place, -1), turns)
        rank = torch.where((place >= self.sinks) & (rank < self.sinks), -1, rank)
        return nn.functional.pad(rank, (0, 1), value=-1)

    def tensors(self) -> tuple[Tensor, ...]:
        """As [`MixerCacheLayer`], and `keys`, `values` and `num_real`."""
        return *super().tensors(), self.keys, self.values, self.num_real

    def hold(self, tensors: tuple[Tensor, ...]) -> None:
        super().hold(tensors[:2])
        self.keys, self.values, self.num_real = tensors[2:]

    def reset(self) -> None:
        super().reset()
        self.keys = self.values = self.num_real = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        if self.keys is not None:
            rows = beam_idx.to(self.keys.device)
            window = self.keys, self.values, self.num_real
            self.keys, self.values, self.num_real = (tensor.index_select(0, rows) for tensor in window)


def _ranks(real: Tensor, before: Tensor) -> Tensor:
    """`(b, q)`: the place of each token in its row, padding not counted; -1 of padding."""
    return torch.where(real, before[:, None] + real.cumsum(-1) - 1, -1)


def _sees(rank: Tensor, ranks: Tensor, window: int, sinks: int, real: Tensor) -> Tensor:
    """`(b, 1, q, k)`: whether tokens of rank `(b, q)` see keys of `ranks` `(b, k)`. Padding sees the last key."""
    own, other = rank[:, :, None], ranks[:, None, :]
    sees = (other >= 0) & (other <= own) & ((other > own - window) | (other < sinks))
    sees[..., -1] |= ~real
    return sees[:, None]


def _hides_nothing(mask: Tensor) -> bool:
    """Whether a mask is all ones, as generation's mostly is. A compiler can't look."""
    return not torch.compiler.is_compiling() and bool((mask != 0).all())


def seen_in_rows(
    hidden_states: Tensor, window: int, sinks: int, mask: Tensor | None, seq_idx: Tensor | None
) -> Tensor:
    """What tokens of whole rows see of each other.

    Args:
        hidden_states: `(b, q, d)`.
        window, sinks: of a document's tokens, padding not counted.
        mask: `(b, q)`, zero at padding.
        seq_idx: `(b, q)`, each token's document.

    Returns:
        `(b or 1, 1, q, q)`, true where a token sees another.
    """
    length, device = hidden_states.shape[1], hidden_states.device
    if mask is not None:
        real = mask != 0
        rank = _ranks(real, real.new_zeros(len(real), dtype=torch.long))
        return _sees(rank, rank, window, sinks, real)
    at = torch.arange(length, device=device)[None]  # (1, q)
    if seq_idx is None:
        first = torch.zeros_like(at)
    else:
        begins = nn.functional.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0), value=True)
        first = torch.where(begins, at, 0).cummax(-1).values  # (b, q)
    own, other, start = at[..., :, None], at[..., None, :], first[..., :, None]
    return ((other <= own) & (other >= start) & ((other > own - window) | (other < start + sinks)))[:, None]


def seen_in_blocks(length: int, window: int, sinks: int, device: torch.device) -> Tensor:
    """What tokens of a whole row see, in blocks of `w` tokens: of the block before, of their own, and of the sinks.

    Returns:
        `(1, blocks, w, 2 w + s)`.
    """
    starts = torch.arange(0, length, window, device=device)
    at = starts[:, None] + torch.arange(window, device=device)  # (blocks, w)
    near = starts[:, None] + torch.arange(-window, window, device=device)
    first = torch.arange(sinks, device=device).expand(len(starts), -1)
    own, other = at[..., None], torch.cat((near, first), dim=-1)[:, None]
    is_near = torch.arange(2 * window + sinks, device=device) < 2 * window
    sees = torch.where(is_near, (other > own - window) & (other >= 0), other <= own - window)
    return (sees & (other <= own))[None]


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **kwargs: Any
) -> tuple[Tensor, None]:
    """Scaled dot products, under a mask of `seen_in_blocks` a block at a time."""
    attend = AttentionInterface()["sdpa"]
    if any(kwargs.get(name) is not None for name in ("softcap", "s_aux")):  # which PyTorch's kernel lacks
        attend, attention_mask = own_eager_function(module), _additive(attention_mask, query.dtype)
    if attention_mask.shape[1] == 1:
        return attend(module, query, key, value, attention_mask, **kwargs)
    rows, _, length, _ = query.shape
    blocks, window, seen = attention_mask.shape[1:]
    sinks = seen - 2 * window

    def in_blocks(x: Tensor) -> Tensor:
        """`(b, h, q, p)` as `(b, blocks, h, w, p)`, with zeros behind the last token."""
        x = nn.functional.pad(x, (0, 0, 0, blocks * window - length))
        return x.unflatten(2, (blocks, window)).transpose(1, 2)

    def seen_by_blocks(x: Tensor) -> Tensor:
        own = in_blocks(x)
        before = nn.functional.pad(own[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
        first = x[:, None, :, :sinks].expand(-1, blocks, -1, -1, -1)
        return torch.cat((before, own, first), dim=3).flatten(0, 1)

    mask = attention_mask.expand(rows, -1, -1, -1).flatten(0, 1)[:, None]
    read = (in_blocks(query).flatten(0, 1), seen_by_blocks(key), seen_by_blocks(value))
    output, _ = attend(module, *read, mask, **kwargs)
    return output.unflatten(0, (rows, blocks)).flatten(1, 2)[:, :length], None


def own_eager_function(module: nn.Module) -> Callable:
    """The eager attention of the file that defines an attention module: it differs between families.

    Raises:
        ValueError: that file has none.
    """
    for owner in type(module).__mro__:
        function = vars(sys.modules[owner.__module__]).get("eager_attention_forward")
        if function is not None:
            return function
    raise ValueError(
        f"The eager attention of {type(module).__name__} can't be found in {type(module).__module__}. Load the "
        "teacher with attn_implementation='sdpa'."
    )


def _additive(sees: Tensor, dtype: torch.dtype) -> Tensor:
    """Zero where something is seen, as eager attention takes it."""
    return torch.zeros_like(sees, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)


_NAME = "cab_window"
AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, AttentionMaskInterface()["sdpa"])


class WindowAttention(nn.Module):
    """A teacher's attention module, which reads a window and its sinks.

    Args:
        attention: the module. It stays what it is; a copy of its config says that it reads masks as they are.
        window: tokens that a token sees, itself among them.
        sinks: first tokens of its row that it sees, too.
    """

    def __init__(self, attention: nn.Module, window: int, sinks: int):
        super().__init__()
        self.window, self.sinks = window, sinks
        attention.config = copy.deepcopy(attention.config)
        if attention.config._attn_implementation != "eager":
            attention.config._attn_implementation = _NAME
        self.attention = attention
        self._place = list(inspect.signature(attention.forward).parameters).index("attention_mask")

    def reads_blocks(
        self,
        hidden_states: Tensor,
        cache_layer: WindowCacheLayer | None,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> bool:
        """Whether a row is whole, and long enough that blocks of it are read sooner than all of it under a mask."""
        begins = cache_layer is None or cache_layer.keys is None
        is_long = hidden_states.shape[1] > 2 * self.window + self.sinks
        if not (begins and is_long and seq_idx is None) or self.attention.config._attn_implementation == "eager":
            return False
        return mask is None or _hides_nothing(mask)

    def forward(
        self,
        hidden_states: Tensor,
        args: tuple,
        kwargs: dict[str, Any],
        cache_layer: WindowCacheLayer | None = None,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        sight: Sight | None = None,
    ) -> Tensor:
        """The module's output `(b, q, d)`.

        Args:
            hidden_states: `(b, q, d)`, as `args` or `kwargs` have them.
            args, kwargs: of the module; their mask is replaced.
            cache_layer: where its keys and values are kept, of the cache that is among them.
            mask: `(b, q)`, zero at padding.
            seq_idx: `(b, q)`, each token's document.
            sight: of the tokens, of `cache_layer.look`; with a cache alone.
        """
        if cache_layer is not None:
            cache_layer.sight, sees = sight, sight.sees
        elif self.reads_blocks(hidden_states, None, mask, seq_idx):
            sees = seen_in_blocks(hidden_states.shape[1], self.window, self.sinks, hidden_states.device)
        else:
            sees = seen_in_rows(hidden_states, self.window, self.sinks, mask, seq_idx)
        if self.attention.config._attn_implementation == "eager":
            sees = _additive(sees, hidden_states.dtype)
        if self._place < len(args):
            args = (*args[: self._place], sees, *args[self._place + 1 :])
        else:
            kwargs = kwargs | {"attention_mask": sees}
        output = self.attention(*args, **kwargs)
        if cache_layer is not None:
            cache_layer.sight = None  # of a long row it is large
        return output if isinstance(output, Tensor) else output[0]
