"""Configuration of the CAB-Mamba language models, and what the configurations of all students share.

Shape legend: `b` batch, `t` token, `h` head, `p` head_dim, `n` state, `g` group, `d` width.
"""

import math
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig


DEFAULT_STATE_SIZE = {"mamba": 16, "mamba2": 128}
_POSITIVE_SIZES = (
    *("hidden_size", "num_hidden_layers", "state_size", "num_heads", "head_dim", "n_groups"),
    *("conv_kernel", "time_step_rank", "chunk_size"),
)


@strict
class MixerConfig(PreTrainedConfig):
    r"""
    The fields and checks of every student's configuration: its mixers and what is around them in a block.

    Args:
        hidden_size (`int`, defaults to 768): width of the residual stream.
        num_hidden_layers (`int`, defaults to 24): blocks.
        mixer_type (`"mamba"` or `"mamba2"`, defaults to `"mamba"`):
            The mixer of every layer: S6 of Mamba (arXiv 2312.00752) or SSD of Mamba-2 (arXiv 2405.21060).
        mixer_types (`list[str]`, *optional*):
            One mixer type a layer; overrides `mixer_type`.
        state_size (`int`, *optional*): `n`, the width of B and C. 16 for S6 and 128 for SSD when not given.
        expand (`float`, defaults to 2): mixer width over `hidden_size`.
        num_heads (`int`, *optional*): SSD heads; `expand * hidden_size / head_dim` when not given.
        head_dim (`int`, defaults to 64): `p`, the width of an SSD head.
        n_groups (`int`, defaults to 1): groups of SSD heads that share B and C, and the groups of the output norm.
        conv_kernel (`int`, defaults to 4): taps of the causal convolution.
        conv_activation (`"silu"` or `None`, defaults to `"silu"`): activation after the convolution.
        rotary_frequencies (`list[float]`, *optional*): radians a token by which pairs of an SSD state turn, as rotary
            positions turn queries and keys; of all layers, or a list of lists, one a layer. States do not turn if not
            given.
        rotary_interleaved (`bool`, defaults to `False`): pairs are features 2 i and 2 i + 1 of the state, in place of
            i and i + the number of pairs.
        use_bias (`bool`, defaults to `False`): biases of the mixer's input and output projection.
        use_conv_bias (`bool`, defaults to `True`): bias of the convolution.
        time_step_rank (`int`, *optional*): rank of S6's time-step projection; `ceil(hidden_size / 16)` when not given.
        time_step_min, time_step_max, time_step_floor (`float`): range of the initial time step.
        time_step_limit (`tuple[float, float]`): SSD's time step is clamped to it.
        chunk_size (`int`, defaults to 256): chunk of the SSD scan; results do not depend on it.
        transition_init (`"identity"`, `"s4d"` or `"moving_average"`, defaults to `"identity"`):
            How the transition starts: A ~ I, every token remembered (the paper's choice, table 3); S4D-real as in
            Mamba; or normalised moving averages whose memory is log-spaced over `memory_range` across heads.
        memory_range (`tuple[float, float]`, defaults to (8, 512)): shortest and longest memory, in tokens, of
            `transition_init="moving_average"`.
        conv_init, gate_init, skip_init (`"usual"` or `"transparent"`, default `"usual"`):
            Whether convolution, gate and skip (D) start as in Mamba, or as if absent: taps (0, .., 0, 1), a gate of
            constant one, D = 0. The constant gate is a bias; with `gate_init="fitted"` a student of a language teacher
            has a nearly constant one without, by weights that `student_from_teacher` fits to the teacher's states.
        intermediate_size (`int`, *optional*): width of the MLP after each mixer; no MLP when not given.
        gated_mlp (`bool`, defaults to `True`): `down(act(gate(x)) * up(x))` instead of `down(act(up(x)))`.
        mlp_bias (`bool`, defaults to `False`): biases of the MLP.
        hidden_act (`str`, defaults to `"silu"`): activation of the MLP.
        norm_type (`"rms_norm"` or `"layer_norm"`, defaults to `"rms_norm"`):
            Norm before each mixer and MLP and at the end.
        layer_norm_epsilon (`float`, defaults to 1e-5): epsilon of every norm.
        residual_in_fp32 (`bool`, defaults to `True`): keep the residual stream in float32.
        rescale_prenorm_residual (`bool`, defaults to `False`): divide initial output projections by `sqrt(layers)`.
        initializer_range (`float`, defaults to 0.02): standard deviation of initial weights.

    Raises:
        ValueError: for sizes that do not fit each other; the message holds both and a value that works.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 24

    mixer_type: Literal["mamba", "mamba2"] = "mamba"
    mixer_types: list[str] | None = None
    state_size: int | None = None
    expand: int | float = 2
    num_heads: int | None = None
    head_dim: int = 64
    n_groups: int = 1
    conv_kernel: int = 4
    conv_activation: Literal["silu"] | None = "silu"
    rotary_frequencies: list | None = None
    rotary_interleaved: bool = False
    use_bias: bool = False
    use_conv_bias: bool = True
    time_step_rank: int | None = None
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_limit: list[int | float] | tuple[int | float, ...] = (0.0, float("inf"))
    chunk_size: int = 256

    transition_init: Literal["identity", "s4d", "moving_average"] = "identity"
    memory_range: list[int | float] | tuple[int | float, ...] = (8.0, 512.0)
    conv_init: Literal["usual", "transparent"] = "usual"
    gate_init: Literal["usual", "transparent", "fitted"] = "usual"
    skip_init: Literal["usual", "transparent"] = "usual"

    intermediate_size: int | None = None
    gated_mlp: bool = True
    mlp_bias: bool = False
    hidden_act: str = "silu"
    norm_type: Literal["rms_norm", "layer_norm"] = "rms_norm"
    layer_norm_epsilon: float = 1e-5
    residual_in_fp32: bool = True
    rescale_prenorm_residual: bool = False
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if self.state_size is None:
            self.state_size = max((DEFAULT_STATE_SIZE.get(kind, 1) for kind in self.layer_mixer_types), default=1)
        if self.num_heads is None:
            self.num_heads = max(self.mixer_width // max(self.head_dim, 1), 1)
        if self.time_step_rank is None:
            self.time_step_rank = math.ceil(self.hidden_size / 16)
        super().__post_init__(**kwargs)

    def frequencies_of(self, layer: int) -> list[float]:
        """Radians a token by which a layer's state turns, one a pair of features."""
        shared = self.rotary_frequencies or []
        return shared[layer] if shared and isinstance(shared[0], list) else shared

    @property
    def layer_mixer_types(self) -> list[str]:
        """The mixer type of each layer."""
        return self.mixer_types if self.mixer_types is not None else [self.mixer_type] * self.num_hidden_layers

    @property
    def mixer_width(self) -> int:
        """Channels inside a mixer (`d_inner` of Mamba)."""
        return round(self.expand * self.hidden_size)

    @property
    def mixer_widths(self) -> list[int]:
        """Channels inside each mixer."""
        return [self.mixer_width] * self.num_hidden_layers

    @property
    def projection_sizes(self) -> list[int]:
        """Width of each mixer's B, and of its C."""
        return [self.state_size * (self.n_groups if kind == "mamba2" else 1) for kind in self.layer_mixer_types]

    @property
    def group_size(self) -> int:
        """Channels that share B, C and one normalisation in an SSD mixer."""
        return self.mixer_width // self.n_groups

    def validate_architecture(self):
        """Part of the `@strict` validation: sizes that must fit each other."""
        if self.mixer_types is not None:
            unknown = sorted(set(self.mixer_types) - set(DEFAULT_STATE_SIZE))
            if unknown:
                raise ValueError(f"`mixer_types` holds {unknown}; known are {sorted(DEFAULT_STATE_SIZE)}.")
            if len(self.mixer_types) != self.num_hidden_layers:
                raise ValueError(
                    f"`mixer_types` names {len(self.mixer_types)} layers, `num_hidden_layers` is "
                    f"{self.num_hidden_layers}. Give one mixer type a layer, or `mixer_type` for all."
                )
        self._check_positive(*_POSITIVE_SIZES)
        if self.mixer_width < 1:
            raise ValueError(
                f"`expand` * `hidden_size` is {self.expand} * {self.hidden_size} = {self.mixer_width}, it must be at "
                f"least 1: `expand=2` works."
            )
        if "mamba2" in self.layer_mixer_types:
            width = self.num_heads * self.head_dim
            if width != self.mixer_width:
                head_dim = _largest_divisor(self.mixer_width, self.head_dim)
                raise ValueError(
                    f"`num_heads` * `head_dim` is {self.num_heads} * {self.head_dim} = {width}, `expand` * "
                    f"`hidden_size` is {self.expand} * {self.hidden_size} = {self.mixer_width}. They must be equal: "
                    f"set `expand={width / self.hidden_size:g}`, or a `head_dim` that divides {self.mixer_width}, "
                    f"such as `head_dim={head_dim}` with `num_heads={self.mixer_width // head_dim}`."
                )
            if self.num_heads % self.n_groups:
                raise ValueError(
                    f"`num_heads` ({self.num_heads}) must be a multiple of `n_groups` ({self.n_groups}); "
                    f"`n_groups={_largest_divisor(self.num_heads, self.n_groups)}` works."
                )
        self._check_rotation()
        if self.gate_init == "transparent" and not self.use_bias:
            raise ValueError(
                "`gate_init='transparent'` needs `use_bias=True`: the constant gate is the gate's bias "
                f"(silu of zero is zero). Got `use_bias={self.use_bias}`. Without, `gate_init='fitted'` is the choice."
            )
        for name in ("time_step_limit", "memory_range"):
            limits = getattr(self, name)
            if len(limits) != 2 or not 0 <= limits[0] <= limits[1]:
                raise ValueError(f"`{name}` must be (low, high) with 0 <= low <= high, got {tuple(limits)}.")
        if self.memory_range[0] == 0 or math.isinf(self.memory_range[1]):
            raise ValueError(
                f"`memory_range` must be positive and finite, got {tuple(self.memory_range)} tokens. For a memory "
                "without end use `transition_init='identity'`."
            )
        if not 0 < self.time_step_min <= self.time_step_max:
            raise ValueError(
                "`time_step_min` and `time_step_max` must be 0 < min <= max, got "
                f"({self.time_step_min}, {self.time_step_max}); Mamba's are (0.001, 0.1)."
            )

    def _check_rotation(self) -> None:
        given = self.rotary_frequencies
        if not given:
            return
        if "mamba" in self.layer_mixer_types:
            raise ValueError(
                "`rotary_frequencies` (of `keep_rotary`) is given, but S6's states do not turn: leave it out, or set "
                "`mixer_type='mamba2'`."
            )
        one_each = isinstance(given[0], list)
        if one_each and len(given) != self.num_hidden_layers:
            raise ValueError(
                f"`rotary_frequencies` has lists for {len(given)} layers, `num_hidden_layers` is "
                f"{self.num_hidden_layers}. Give one a layer, or one list of numbers for all."
            )
        pairs = max(map(len, given)) if one_each else len(given)
        if 2 * pairs > self.state_size:
            raise ValueError(
                f"`rotary_frequencies` turns {pairs} pairs, but `state_size` is {self.state_size}: give at most "
                f"{self.state_size // 2} numbers, or set `state_size={2 * pairs}`."
            )

    def _check_positive(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")


@strict
class CABMambaConfig(MixerConfig):
    r"""
    Configuration of a [`CABMambaModel`]: a stack of state-space mixers, with or without MLPs between them.

    With the defaults (no MLP, RMS norm, sequential residual) the model has the parameters of transformers'
    `MambaForCausalLM` (`mixer_type="mamba"`) or `Mamba2ForCausalLM` (`mixer_type="mamba2"`) under the same names.

    It takes all arguments of [`MixerConfig`], too.

    Args:
        parallel_residual (`bool`, defaults to `False`): mixer and MLP read the same residual stream side by side.
        shared_norm (`bool`, defaults to `False`): with `parallel_residual`, one norm feeds both.
        post_norms (`bool`, defaults to `False`): norms behind mixer and MLP, too, as Gemma 3 has.
        embedding_multiplier (`float`, defaults to 1.0): factor of the embeddings that are looked up, as Gemma has;
            `inputs_embeds` are taken as they are.
        max_position_embeddings (`int`, *optional*): learned absolute positions of that many tokens; none if not given.
        lm_head_bias (`bool`, defaults to `False`): bias of the language-modelling head.

    Raises:
        ValueError: for sizes that do not fit each other; the message holds both and a value that works.
    """

    model_type = "cab_mamba"
    keys_to_ignore_at_inference = ["cache"]

    vocab_size: int = 50280
    parallel_residual: bool = False
    shared_norm: bool = False
    post_norms: bool = False
    embedding_multiplier: int | float = 1.0
    max_position_embeddings: int | None = None

    lm_head_bias: bool = False
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @property
    def layer_types(self) -> list[str]:
        """What transformers' cache keeps for each layer: a convolution state and a recurrent state."""
        return ["linear_attention"] * self.num_hidden_layers

    def validate_architecture(self):
        """Part of the `@strict` validation: sizes that must fit each other."""
        self._check_positive("vocab_size")
        super().validate_architecture()
        if self.shared_norm and not (self.parallel_residual and self.intermediate_size):
            raise ValueError(
                f"`shared_norm=True` is for `parallel_residual=True` with an MLP; got `parallel_residual="
                f"{self.parallel_residual}`, `intermediate_size={self.intermediate_size}`."
            )


def _largest_divisor(number: int, at_most: int) -> int:
    return next(k for k in range(min(number, at_most), 0, -1) if number % k == 0)


__all__ = ["CABMambaConfig", "MixerConfig"]
