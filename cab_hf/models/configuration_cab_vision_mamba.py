"""Configuration of the CAB vision students: bidirectional Mambas that read an image's patches.

Shape legend: `b` batch, `t` token, `d` width.
"""

from typing import Literal

from huggingface_hub.dataclasses import strict

from .configuration_cab_mamba import MixerConfig


Pooling = Literal["class_token", "mean", "class_token_and_mean", "class_token_and_registers"]


@strict
class CABVisionMambaConfig(MixerConfig):
    r"""
    Configuration of a [`CABVisionMambaModel`]: patches, learned positions and a stack of bidirectional mixers.

    The defaults are Vim-Tiny's (arXiv 2401.09417, released as "bimamba v2" with a middle class token), with the
    transition that arXiv 2510.19266 starts from. `hidden_size=384` is Vim-Small.

    It takes all arguments of [`MixerConfig`], too, with a `hidden_size` of 192.

    Args:
        image_size (`int` or `(height, width)`, defaults to 224): pixels of the images that positions are learned for.
        patch_size (`int`, defaults to 16): side of a square patch in pixels.
        num_channels (`int`, defaults to 3): channels of an image.
        class_token (`"middle"`, `"first"` or `"none"`, defaults to `"middle"`):
            Where the class token stands among the patches; the middle is behind patch `num_patches // 2`, as in Vim.
        num_register_tokens (`int`, defaults to 0):
            Learned tokens without a position right behind the class token: DINOv2's registers, DeiT's distillation
            token.
        pooling (`str`, *optional*):
            What the classifier reads: `"class_token"`; `"mean"` of the patches; `"class_token_and_mean"`, both side by
            side (DINOv2's head); or `"class_token_and_registers"`, all of them side by side (DeiT's two heads).
            `"class_token"` when not given, `"mean"` where there is no class token.
        bidirectional (`bool`, defaults to `True`): mixers that read the tokens in both directions.
        use_absolute_positions (`bool`, defaults to `True`): learned positions of the patches and the class token.
        layer_scale_init (`float`, *optional*):
            Start of a learned scale a channel behind every mixer and MLP (LayerScale); no scales when not given.
        drop_path_rate (`float`, defaults to 0.0):
            Stochastic depth of the last block; it grows linearly from 0.0 in the first.

    Raises:
        ValueError: for sizes that do not fit each other; the message holds both and a value that works.
    """

    model_type = "cab_vision_mamba"

    hidden_size: int = 192
    image_size: int | list[int] | tuple[int, ...] = 224
    patch_size: int = 16
    num_channels: int = 3
    class_token: Literal["middle", "first", "none"] = "middle"
    num_register_tokens: int = 0
    pooling: Pooling | None = None
    bidirectional: bool = True
    use_absolute_positions: bool = True
    layer_scale_init: float | None = None
    drop_path_rate: float = 0.0

    def __post_init__(self, **kwargs):
        if self.pooling is None:
            self.pooling = "mean" if self.class_token == "none" else "class_token"
        super().__post_init__(**kwargs)

    @property
    def image_height_and_width(self) -> tuple[int, int]:
        return (self.image_size,) * 2 if isinstance(self.image_size, int) else tuple(self.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches in an image of `image_size`."""
        height, width = self.image_height_and_width
        return height // self.patch_size, width // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of an image of `image_size`."""
        rows, columns = self.grid
        return rows * columns

    @property
    def has_class_token(self) -> bool:
        return self.class_token != "none"

    @property
    def pooled_size(self) -> int:
        """Width of what the classifier reads."""
        parts = {"class_token_and_mean": 2, "class_token_and_registers": 1 + self.num_register_tokens}
        return parts.get(self.pooling, 1) * self.hidden_size

    def class_token_index(self, num_patches: int) -> int | None:
        """The class token's place among the tokens of an image of `num_patches`; None without one."""
        if not self.has_class_token:
            return None
        return num_patches // 2 if self.class_token == "middle" else 0

    def drop_path_rate_of(self, layer_idx: int) -> float:
        """How often a block is left out of a sample in training: linear over depth, the full rate in the last one."""
        last = self.num_hidden_layers - 1
        return self.drop_path_rate * (layer_idx / last if last else 1.0)

    def validate_architecture(self):
        """Part of the `@strict` validation: sizes that must fit each other."""
        self._check_positive("patch_size", "num_channels")
        if not isinstance(self.image_size, int) and len(self.image_size) != 2:
            raise ValueError(f"`image_size` must be one number or (height, width), got {tuple(self.image_size)}.")
        height, width = self.image_height_and_width
        if min(height, width) < 1 or height % self.patch_size or width % self.patch_size:
            near = tuple(nearest_multiples(side, self.patch_size)[0] for side in (height, width))
            raise ValueError(
                f"`image_size` is {height} x {width} pixels and `patch_size` is {self.patch_size}: the patches must "
                f"fill the image. `image_size={near}` works."
            )
        if self.num_register_tokens < 0:
            raise ValueError(f"`num_register_tokens` must be at least 0, got {self.num_register_tokens}.")
        if self.num_register_tokens and not self.has_class_token:
            raise ValueError(
                f"`num_register_tokens` is {self.num_register_tokens} and `class_token` is {self.class_token!r}: "
                "registers stand behind the class token. Set `class_token='first'` or `num_register_tokens=0`."
            )
        if self.pooling.startswith("class_token") and not self.has_class_token:
            raise ValueError(
                f"`pooling` is {self.pooling!r} and `class_token` is {self.class_token!r}: there is no class token to "
                "pool. Set `class_token='middle'` or `pooling='mean'`."
            )
        if self.pooling == "class_token_and_registers" and not self.num_register_tokens:
            raise ValueError(
                f"`pooling` is {self.pooling!r} and `num_register_tokens` is {self.num_register_tokens}: there are no "
                "registers to pool. Set `num_register_tokens=1` or `pooling='class_token'`."
            )
        if not 0.0 <= self.drop_path_rate < 1.0:
            raise ValueError(f"`drop_path_rate` must be in [0, 1), got {self.drop_path_rate}.")
        super().validate_architecture()


def nearest_multiples(side: int, patch_size: int) -> list[int]:
    """The image sides around `side` that patches fill, the nearest first."""
    below = side // patch_size * patch_size
    around = sorted((below, below + patch_size), key=lambda multiple: abs(multiple - side))
    return [multiple for multiple in around if multiple > 0]


__all__ = ["CABVisionMambaConfig"]
