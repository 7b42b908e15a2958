"""State-space mixers, S6 (Mamba) and SSD (Mamba-2), causal or bidirectional.

Causal mixers have the parameters of transformers' MambaMixer and Mamba2Mixer, name for name; bidirectional ones have
these and, under `backward`, those of the scan from the last token to the first.
Shape legend: `b` batch, `t` token, `h` head, `p` head_dim, `n` state, `g` group, `d` width.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from .configuration_cab_mamba import MixerConfig
from .ssm_ops import (
    causal_conv1d,
    causal_conv1d_update,
    selective_scan,
    selective_scan_update,
    ssd_scan,
    ssd_scan_update,
)
from .state_rotation import places, rotate


IDENTITY_A_LOG = -20.0
"""A = -exp(-20), so that a step's decay is one within float32 (arXiv 2510.19266, released vision code)."""

UNIT_GATE = 1.278464542761074
"""silu(UNIT_GATE) = 1."""

SMALLEST_IN_PARTS = 2**16
"""Elements of the smallest matrix that `projected` divides among threads."""


class SSMProjections(NamedTuple):
    """What a mixer shows of one forward pass.

    Attributes:
        B: `(b, t, g, n)`, what a token writes with: the counterpart of attention's key.
        C: `(b, t, g, n)`, what a token reads with: the counterpart of attention's query.
        time_step: `(b, t, h)` for SSD, `(b, t, d)` for S6, float32; zero at padding.
        output: `(b, t, d)`, the mixer's output before its output projection.
    """

    B: torch.Tensor
    C: torch.Tensor
    time_step: torch.Tensor
    output: torch.Tensor


class BidirectionalProjections(NamedTuple):
    """What a bidirectional mixer shows of one forward pass.

    Attributes:
        B, C, time_step: of the forward scan, as in [`SSMProjections`].
        output: `(b, t, d)`, the mixer's output before its output projection, of both scans together.
        backward_B, backward_C, backward_time_step: of the backward scan, shaped alike, in the order in which it reads
            the tokens: the last token first.
    """

    B: torch.Tensor
    C: torch.Tensor
    time_step: torch.Tensor
    output: torch.Tensor
    backward_B: torch.Tensor
    backward_C: torch.Tensor
    backward_time_step: torch.Tensor


class GatedRMSNorm(nn.Module):
    """RMS norm in groups of `x * silu(gate)`, in float32 (Mamba-2's output norm)."""

    def __init__(self, width: int, group_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.group_size = group_size
        self.eps = eps

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        gated = x.float() * F.silu(gate.float())
        groups = gated.unflatten(-1, (-1, self.group_size))  # (b, t, g, d / g)
        normalised = F.rms_norm(groups, (self.group_size,), eps=self.eps).flatten(-2)
        return self.weight * normalised.to(x.dtype)


class CausalConv1d(nn.Conv1d):
    """Depthwise causal convolution over tokens, which reads its weights where the hooks of offloading see it."""

    def __init__(self, width: int, kernel_size: int, bias: bool):
        super().__init__(width, width, kernel_size, groups=width, padding=kernel_size - 1, bias=bias)

    def forward(
        self,
        x: torch.Tensor,
        activation: str | None,
        initial_states: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        step_state: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`(b, t, d)` to `(b, t, d)`; with `step_state` `(b, d, k)` one token, which that state takes in."""
        weight = self.weight.squeeze(1)  # (d, k)
        if step_state is not None:
            return causal_conv1d_update(x[:, 0], step_state, weight, self.bias, activation)[:, None]
        return causal_conv1d(x, weight, self.bias, activation, initial_states=initial_states, seq_idx=seq_idx)


class StateSpaceBranch(nn.Module):
    """One direction of a mixer, as far as S6 and SSD share it: the convolution, its cache and its start.

    Args:
        config: sizes and starts.
        layer_idx: the layer whose states a cache holds.
        conv_width: channels of the convolution.
        in_width: rows of the input projection; without it the branch reads what another's projection made.
    """

    def __init__(self, config: MixerConfig, layer_idx: int, conv_width: int, in_width: int | None):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.conv1d = CausalConv1d(conv_width, config.conv_kernel, bias=config.use_conv_bias)
        self.in_proj = None if in_width is None else nn.Linear(config.hidden_size, in_width, bias=config.use_bias)

    def convolve(
        self,
        x: torch.Tensor,
        cache: Cache | None,
        attention_mask: torch.Tensor | None,
        seq_idx: torch.Tensor | None,
    ) -> torch.Tensor:
        """Causal convolution of `x` (b, t, d) that continues from, and updates, the cache's convolution state."""
        activation = self.config.conv_activation
        if cache is None:
            return self.conv1d(x, activation, seq_idx=seq_idx)
        state = cache.get_conv_state(self.layer_idx) if cache.has_previous_state(self.layer_idx) else None  # (b, d, k)
        if state is not None and x.shape[1] == 1:
            before = None if attention_mask is None else state.clone()
            output = self.conv1d(x, activation, step_state=state)
            if before is not None:
                state.copy_(torch.where((attention_mask == 0)[..., None], before, state))
            return output
        past = x.new_zeros(x.shape[0], x.shape[2], self.config.conv_kernel) if state is None else state.to(x.dtype)
        output = self.conv1d(x, activation, initial_states=past)
        cache.update_conv_state(self._last_inputs(past, x, attention_mask), self.layer_idx)
        return output

    def _last_inputs(self, past: torch.Tensor, x: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """The last `k` real inputs of each row `(b, d, k)`: right padding must not push them out of the state."""
        inputs = torch.cat([past, x.transpose(1, 2)], dim=-1)  # (b, d, k + t)
        kernel = self.config.conv_kernel
        if attention_mask is None:
            return inputs[..., -kernel:]
        positions = torch.arange(1, x.shape[1] + 1, device=x.device)
        ends = (positions * (attention_mask != 0)).amax(dim=1)  # (b,)
        index = ends[:, None] + torch.arange(kernel, device=x.device)  # (b, k)
        return inputs.gather(2, index[:, None].expand(-1, inputs.shape[1], -1))

    def init_convolution(self) -> None:
        if self.config.conv_init == "transparent":
            taps = torch.zeros_like(self.conv1d.weight)
            taps[..., -1] = 1.0
            init.copy_(self.conv1d.weight, taps)
        else:
            init.kaiming_uniform_(self.conv1d.weight, a=math.sqrt(5))
        if self.conv1d.bias is not None:
            init.zeros_(self.conv1d.bias)

    def init_skip(self) -> None:
        init.constant_(self.D, 0.0 if self.config.skip_init == "transparent" else 1.0)

    def random_time_steps(self, count: int) -> torch.Tensor:
        """Log-uniform initial time steps `(count,)` as in Mamba."""
        low, high = math.log(self.config.time_step_min), math.log(self.config.time_step_max)
        return torch.exp(torch.rand(count) * (high - low) + low).clamp(min=self.config.time_step_floor)

    def averaging_time_steps(self, count: int) -> torch.Tensor:
        """Time steps `(count,)` of moving averages whose memories are log-spaced: with A = -1, dt = 1 / memory."""
        shortest, longest = self.config.memory_range
        return 1.0 / torch.logspace(math.log10(shortest), math.log10(longest), count)


class SSDBranch(StateSpaceBranch):
    """One direction of Mamba-2's mixer (arXiv 2405.21060): one decay a head, B and C shared in groups."""

    def __init__(self, config: MixerConfig, layer_idx: int, in_width: int | None = None):
        self.state_width = config.n_groups * config.state_size
        super().__init__(config, layer_idx, config.mixer_width + 2 * self.state_width, in_width)
        self.dt_bias = nn.Parameter(torch.empty(config.num_heads, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.empty(config.num_heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(config.num_heads, dtype=torch.float32))
        self.pairs = len(config.frequencies_of(layer_idx))
        if self.pairs:
            self.register_buffer("rotary_frequencies", torch.empty(self.pairs, dtype=torch.float32))

    def scan(
        self,
        stream: torch.Tensor,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        output_projections: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Convolution and scan.

        Args:
            stream: `(b, t, d + 2 * g * n + h)`: x, B and C before the convolution, and the raw time step.
            cache, attention_mask, seq_idx, output_projections: as in [`GatedMixer.forward`].

        Returns:
            y `(b, t, d)`, then B, C and the time step as [`SSMProjections`] has them.
        """
        config = self.config
        heads, groups = (config.num_heads, config.head_dim), (config.n_groups, config.state_size)
        xBC, dt = stream.split([config.mixer_width + 2 * self.state_width, config.num_heads], dim=-1)
        dt = F.softplus(dt.float() + self.dt_bias.float()).clamp(*config.time_step_limit)  # (b, t, h)
        if attention_mask is not None:
            padding = (attention_mask == 0)[..., None]
            xBC, dt = xBC.masked_fill(padding, 0.0), dt.masked_fill(padding, 0.0)
        state = recurrent_state(cache, self.layer_idx)
        xBC = self.convolve(xBC, cache, attention_mask, seq_idx)
        x, B, C = xBC.split([config.mixer_width, self.state_width, self.state_width], dim=-1)
        x = x.unflatten(-1, heads)  # (b, t, h, p)
        B, C = B.unflatten(-1, groups), C.unflatten(-1, groups)  # (b, t, g, n)
        shown, steps = (B, C), state is not None and x.shape[1] == 1
        if output_projections and torch.compiler.is_compiling():
            # Slices of their own, so that the compiled backward pass adds up what they and the scan give.
            shown = (one.unflatten(-1, groups) for one in xBC[..., config.mixer_width :].chunk(2, dim=-1))
        A = -torch.exp(self.A_log.float())
        if self.pairs:
            place = places(x.shape[1], attention_mask, x.device)[..., None]
            if steps:
                state.copy_(self._turned(state, -place))
            else:
                BC = xBC[..., config.mixer_width :].unflatten(-1, (-1, config.state_size))
                B, C = self._turned(BC, place).chunk(2, dim=2)
        if steps:
            y = ssd_scan_update(state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], self.D)[:, None]
        else:
            y, state = ssd_scan(x, dt, A, B, C, self.D, config.chunk_size, initial_state=state, seq_idx=seq_idx)
            if cache is not None:
                if self.pairs:
                    state = self._turned(state, -place[..., -1:, :])  # as the last token sees it
                cache.update_recurrent_state(state, self.layer_idx)
        return y.flatten(-2), *shown, dt

    def _turned(self, x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """`x` `(b, t, g, n)`, turned by `place` `(b or nothing, t, 1)` tokens; a state by one such number."""
        return rotate(x, place[..., None] * self.rotary_frequencies, self.config.rotary_interleaved)

    def attention_map(
        self, B: torch.Tensor, C: torch.Tensor, time_step: torch.Tensor, seq_idx: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The map that the scan applies to its input: `C_i exp(sum A dt) B_j dt_j`, and D on the diagonal.

        Args: the fields of [`SSMProjections`].

        Returns:
            `(b, h, t, t)`, float32, lower triangular.
        """
        decay = decay_map(time_step.transpose(1, 2) * -torch.exp(self.A_log.float())[:, None], seq_idx)  # (b, h, t, t)
        if self.pairs:
            place = places(B.shape[1], None, B.device)[:, None]
            B, C = self._turned(B, place), self._turned(C, place)
        scores = torch.einsum("bign,bjgn->bgij", C.float(), B.float())
        scores = scores.repeat_interleave(self.config.num_heads // self.config.n_groups, dim=1)
        skip = torch.diag_embed(self.D.float()[:, None].expand(-1, B.shape[1]))  # (h, t, t)
        return scores * decay * time_step.transpose(1, 2)[:, :, None] + skip

    @torch.no_grad()
    def init_mixer_weights(self) -> None:
        """Fills the parameters that the config's starts decide; called by `_init_weights`."""
        config, heads = self.config, self.config.num_heads
        moving_average = config.transition_init == "moving_average"
        self.init_convolution()
        self.init_skip()
        if config.transition_init == "identity":
            init.constant_(self.A_log, IDENTITY_A_LOG)
        else:
            init.copy_(self.A_log, torch.zeros(heads) if moving_average else torch.arange(1, heads + 1).log())
        steps = self.averaging_time_steps(heads) if moving_average else self.random_time_steps(heads)
        init.copy_(self.dt_bias, inverse_softplus(steps))
        if self.pairs:
            init.copy_(self.rotary_frequencies, torch.tensor(config.frequencies_of(self.layer_idx)))


class GatedMixer:
    """Adds to a branch with projections of its own the forward pass of a whole mixer."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        output_projections: bool = False,
    ) -> tuple[torch.Tensor, SSMProjections]:
        """
        Args:
            hidden_states: `(b, t, hidden_size)`.
            cache: continued and updated when given.
            attention_mask: `(b, t)`, zero at padding, which then never reaches the state.
            seq_idx: `(b, t)`, int32 document index of packed sequences; the state resets where it changes.
            output_projections: whether the caller reads B and C; a compiler then adds up the gradients of SSD's.

        Returns:
            output `(b, t, hidden_size)` and the [`SSMProjections`], for S6 with one group.
        """
        stream, gate = self.stream_and_gate(hidden_states)
        y, B, C, dt = self.scan(stream, cache, attention_mask, seq_idx, output_projections)
        y = self.gated(y, gate)
        return projected(y, self.out_proj), SSMProjections(B, C, dt, y)


class SSDMixer(GatedMixer, SSDBranch):
    """The mixer of Mamba-2: the scan between a shared input projection, a gated norm per group and an output one."""

    branch_class = SSDBranch

    def __init__(self, config: MixerConfig, layer_idx: int):
        self.split_sizes = [
            config.mixer_width,
            config.mixer_width + 2 * config.n_groups * config.state_size,
            config.num_heads,
        ]
        super().__init__(config, layer_idx, in_width=sum(self.split_sizes))
        self.norm = GatedRMSNorm(config.mixer_width, config.group_size, config.layer_norm_epsilon)
        self.out_proj = nn.Linear(config.mixer_width, config.hidden_size, bias=config.use_bias)

    def stream_and_gate(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a branch scans and the gate `(b, t, d)`, of hidden states `(b, t, hidden_size)`."""
        gate_width, *stream_widths = self.split_sizes
        gate, stream = projected(hidden_states, self.in_proj).split([gate_width, sum(stream_widths)], dim=-1)
        return stream, gate

    def gated(self, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return self.norm(y, gate)  # (b, t, d)

    @torch.no_grad()
    def init_mixer_weights(self) -> None:
        """Fills the parameters that the config's starts decide; called by `_init_weights`."""
        super().init_mixer_weights()
        init.ones_(self.norm.weight)
        init_output_projection(self.out_proj, self.config)
        config = self.config
        gate, xBC, _ = self.split_sizes
        if not getattr(self.in_proj.weight, "_is_hf_initialized", False):
            weight = torch.empty_like(self.in_proj.weight).normal_(std=config.initializer_range)
            if config.gate_init == "transparent":
                weight[:gate] = 0.0
            if config.transition_init == "moving_average":
                weight[gate + xBC :] = 0.0
            init.copy_(self.in_proj.weight, weight)
        if self.in_proj.bias is not None:
            bias = torch.zeros_like(self.in_proj.bias)
            bias[:gate] = UNIT_GATE if config.gate_init == "transparent" else 0.0
            init.copy_(self.in_proj.bias, bias)


class S6Branch(StateSpaceBranch):
    """One direction of Mamba's mixer (arXiv 2312.00752): one decay a channel and state, B and C shared by channels."""

    def __init__(self, config: MixerConfig, layer_idx: int, in_width: int | None = None):
        super().__init__(config, layer_idx, config.mixer_width, in_width)
        width, rank, state_size = config.mixer_width, config.time_step_rank, config.state_size
        self.x_proj = nn.Linear(width, rank + 2 * state_size, bias=False)
        self.dt_proj = nn.Linear(rank, width, dtype=torch.float32)
        self.A_log = nn.Parameter(torch.empty(width, state_size, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(width, dtype=torch.float32))

    def scan(
        self,
        stream: torch.Tensor,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        output_projections: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """As [`SSDBranch.scan`], of a stream `(b, t, d)` that holds x alone, with one group."""
        config, x = self.config, stream
        padding = None if attention_mask is None else (attention_mask == 0)[..., None]
        if padding is not None:
            x = x.masked_fill(padding, 0.0)
        state = recurrent_state(cache, self.layer_idx)
        x = self.convolve(x, cache, attention_mask, seq_idx)
        sizes = [config.time_step_rank, config.state_size, config.state_size]
        steps, B, C = projected(x, self.x_proj).split(sizes, dim=-1)
        with torch.autocast(x.device.type, enabled=False):
            dt = F.softplus(self.dt_proj(fitted(steps, self.dt_proj)).float())  # (b, t, d)
        if padding is not None:
            dt = dt.masked_fill(padding, 0.0)
        A = -torch.exp(self.A_log.float())  # (d, n)
        if state is not None and x.shape[1] == 1:
            y = selective_scan_update(state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], self.D)[:, None]
        else:
            y, state = selective_scan(x, dt, A, B, C, self.D, initial_state=state, seq_idx=seq_idx)
            if cache is not None:
                cache.update_recurrent_state(state, self.layer_idx)
        return y, B[:, :, None], C[:, :, None], dt

    def attention_map(
        self, B: torch.Tensor, C: torch.Tensor, time_step: torch.Tensor, seq_idx: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The mean over each head's channels of the maps that the scan applies, one a channel.

        A head is `head_dim` neighbouring channels (all channels where `head_dim` does not divide the mixer's width).

        Returns:
            `(b, h, t, t)`, float32, lower triangular.
        """
        width = self.config.mixer_width
        head_dim = self.config.head_dim if width % self.config.head_dim == 0 else width
        A = -torch.exp(self.A_log.float())
        steps = time_step.transpose(1, 2)  # (b, d, t)
        heads = []
        for channels in torch.arange(width, device=B.device).split(head_dim):
            head_map = 0.0
            for n in range(self.config.state_size):
                decay = decay_map(steps[:, channels] * A[channels, n, None], seq_idx)  # (b, p, t, t)
                scores = C[:, :, 0, n, None].float() * B[:, None, :, 0, n].float()  # (b, t, t)
                head_map = head_map + scores * (decay * steps[:, channels, None]).mean(dim=1)
            heads.append(head_map + self.D[channels].float().mean() * torch.eye(B.shape[1], device=B.device))
        return torch.stack(heads, dim=1)

    @torch.no_grad()
    def init_mixer_weights(self) -> None:
        """Fills the parameters that the config's starts decide; called by `_init_weights`."""
        config, width = self.config, self.config.mixer_width
        moving_average = config.transition_init == "moving_average"
        self.init_convolution()
        self.init_skip()
        if config.transition_init == "identity":
            init.constant_(self.A_log, IDENTITY_A_LOG)
        else:
            states = torch.zeros(config.state_size) if moving_average else torch.arange(1, config.state_size + 1).log()
            init.copy_(self.A_log, states.expand(width, -1))
        if moving_average:
            # Neighbouring channels of a head share a memory, as in SSD.
            count = max(width // config.head_dim, 1)
            steps = self.averaging_time_steps(count)[torch.arange(width) * count // width]
            init.zeros_(self.dt_proj.weight)
        else:
            steps = self.random_time_steps(width)
            bound = config.time_step_rank**-0.5
            init.uniform_(self.dt_proj.weight, -bound, bound)
        init.copy_(self.dt_proj.bias, inverse_softplus(steps))


class S6Mixer(GatedMixer, S6Branch):
    """The mixer of Mamba: the scan between a shared input projection, a gate and an output projection."""

    branch_class = S6Branch

    def __init__(self, config: MixerConfig, layer_idx: int):
        super().__init__(config, layer_idx, in_width=2 * config.mixer_width)
        self.out_proj = nn.Linear(config.mixer_width, config.hidden_size, bias=config.use_bias)

    def stream_and_gate(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a branch scans and the gate, `(b, t, d)` each, of hidden states `(b, t, hidden_size)`."""
        return projected(hidden_states, self.in_proj).chunk(2, dim=-1)

    def gated(self, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return y * F.silu(gate)  # (b, t, d)

    @torch.no_grad()
    def init_mixer_weights(self) -> None:
        """Fills the parameters that the config's starts decide; called by `_init_weights`."""
        super().init_mixer_weights()
        init_output_projection(self.out_proj, self.config)
        config, width = self.config, self.config.mixer_width
        if config.gate_init == "transparent":
            weight = torch.empty_like(self.in_proj.weight).normal_(std=config.initializer_range)
            weight[width:] = 0.0
            init.copy_(self.in_proj.weight, weight)
            bias = torch.zeros_like(self.in_proj.bias)
            bias[width:] = UNIT_GATE
            init.copy_(self.in_proj.bias, bias)


class BidirectionalMixer:
    """Adds to a mixer a second branch, `backward`, that reads the tokens from the last to the first.

    Both branches share the projections, the gate and, for SSD, the norm. Their outputs are averaged before the gate,
    so that the output's size does not grow with the number of directions.
    Source: arXiv 2401.09417 (Vim), figure 2 and algorithm 1, with the division that its released models have.
    """

    def __init__(self, config: MixerConfig, layer_idx: int):
        if config.rotary_frequencies:
            raise ValueError("`rotary_frequencies` is for causal mixers, but these read both ways: leave it out.")
        super().__init__(config, layer_idx)
        self.backward = self.branch_class(config, layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        seq_idx: torch.Tensor | None = None,
        output_projections: bool = False,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, BidirectionalProjections]:
        """
        Args:
            hidden_states: `(b, t, hidden_size)`.
            seq_idx: `(b, t)`, index of packed sequences: no state crosses where it changes, in either direction.
            output_projections: as in [`GatedMixer.forward`].
            attention_mask: `(b, t)`, zero at padding, which then reaches neither state.

        Returns:
            output `(b, t, hidden_size)` and the [`BidirectionalProjections`].
        """
        stream, gate = self.stream_and_gate(hidden_states)
        rows = {"seq_idx": seq_idx, "attention_mask": attention_mask}
        reversed_rows = {name: None if value is None else value.flip(1) for name, value in rows.items()}
        y, *shown = self.scan(stream, output_projections=output_projections, **rows)
        backward_y, *backward_shown = self.backward.scan(
            stream.flip(1), output_projections=output_projections, **reversed_rows
        )
        y = self.gated((y + backward_y.flip(1)) / 2, gate)
        return self.out_proj(y), BidirectionalProjections(*shown, y, *backward_shown)

    def attention_map(
        self,
        B: torch.Tensor,
        C: torch.Tensor,
        time_step: torch.Tensor,
        backward_B: torch.Tensor,
        backward_C: torch.Tensor,
        backward_time_step: torch.Tensor,
        seq_idx: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The mean of both scans' maps, each in token order.

        Args: the fields of [`BidirectionalProjections`].

        Returns:
            `(b, h, t, t)`, float32, neither triangle empty.
        """
        reversed_idx = None if seq_idx is None else seq_idx.flip(1)
        forward_map = super().attention_map(B, C, time_step, seq_idx)
        backward_map = self.backward.attention_map(backward_B, backward_C, backward_time_step, reversed_idx)
        return (forward_map + backward_map.flip(-2, -1)) / 2


class BidirectionalS6Mixer(BidirectionalMixer, S6Mixer):
    """The mixer of Vim: two S6 branches."""


class BidirectionalSSDMixer(BidirectionalMixer, SSDMixer):
    """Two SSD branches."""


MIXERS = {"mamba": S6Mixer, "mamba2": SSDMixer}
BIDIRECTIONAL_MIXERS = {"mamba": BidirectionalS6Mixer, "mamba2": BidirectionalSSDMixer}


def init_output_projection(projection: nn.Linear, config: MixerConfig) -> None:
    if config.rescale_prenorm_residual:
        init.normal_(projection.weight, mean=0.0, std=config.initializer_range / math.sqrt(config.num_hidden_layers))


def fitted(x: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """`x` in the dtype of a module's weight, where one can compute in it: quantised modules hold codes, or none."""
    weight = getattr(module, "weight", x)
    if not isinstance(weight, torch.Tensor):
        return x
    return x.to(weight.dtype) if weight.is_floating_point() and weight.element_size() > 1 else x


def projected(x: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """`module(x)`. A single row, as a decoded token is, meets a large matrix on a CPU in parts, one a thread.

    MKL multiplies one row by a matrix with one thread, which reads at half the memory's speed or less.
    """
    if torch.compiler.is_compiling() or not x.is_cpu or x.numel() != x.shape[-1] or not _has_parts(module, x.dtype):
        return module(x)
    parts, weight = torch.get_num_threads(), module.weight
    even = module.out_features // parts * parts
    row, y = x.reshape(1, 1, -1), x.new_empty(module.out_features)
    matrices = weight[:even].view(parts, -1, module.in_features)
    torch.bmm(row.expand(parts, 1, -1), matrices.transpose(1, 2), out=y[:even].view(parts, 1, -1))
    if even < len(y):
        torch.mv(weight[even:], row[0, 0], out=y[even:])
    if module.bias is not None:
        y += module.bias
    return y.view(*x.shape[:-1], -1)


def _has_parts(module: nn.Module, dtype: torch.dtype) -> bool:
    if type(module) is not nn.Linear or torch.get_num_threads() == 1 or not torch.backends.mkl.is_available():
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return False
    weight = module.weight
    is_plain = type(weight) is nn.Parameter and weight.is_contiguous() and weight.dtype == dtype == torch.float32
    return is_plain and weight.numel() >= SMALLEST_IN_PARTS


def recurrent_state(cache: Cache | None, layer_idx: int) -> torch.Tensor | None:
    """The cached state of a layer, or None before the first forward pass."""
    if cache is None or not cache.has_previous_state(layer_idx):
        return None
    return cache.get_recurrent_state(layer_idx)


def inverse_softplus(x: torch.Tensor) -> torch.Tensor:
    return x + torch.log(-torch.expm1(-x))


def decay_map(log_decay: torch.Tensor, seq_idx: torch.Tensor | None) -> torch.Tensor:
    """`exp(sum of log_decay over (j, i])` for j <= i, else 0. Input `(b, h, t)`, output `(b, h, t, t)`, float32."""
    total = log_decay.float().cumsum(dim=-1)
    tokens = total.shape[-1]
    visible = torch.ones(tokens, tokens, dtype=torch.bool, device=total.device).tril()
    if seq_idx is not None:
        changes = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
        document = changes.cumsum(dim=-1)  # (b, t), so that an index that comes back is another document
        visible = visible & (document[:, None, :, None] == document[:, None, None, :])
    return (total[..., :, None] - total[..., None, :]).masked_fill(~visible, -torch.inf).exp()
