"""Image augmentation of whole batches, on the device that holds them: crop, flip, RandAugment, mixing, erasing.

Every choice is drawn on the host from torch's generator and sent along, so that nothing waits for the device, and a
seed makes the same choices on any device. Only the noise of random erasing is drawn on the device itself.

Shapes: `b` images, `c` channels, `H` rows and `W` columns of pixels.
"""

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F


# Geometric operations first: they are one warp. The last one leaves an image as it is.
_GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
_COLOUR = ("auto_contrast", "equalize", "invert", "posterize", "solarize", "solarize_add")
_ENHANCE = ("color", "contrast", "brightness", "sharpness")
OPERATIONS = (*_GEOMETRIC, *_COLOUR, *_ENHANCE)
"""What RandAugment draws from."""

_APPLY = 0.5
_ERASED_AREA = (0.02, 1 / 3)
_ERASED_ASPECT = (0.3, 1 / 0.3)
_ERASE_ATTEMPTS = 10


@dataclass
class AugmentationArguments:
    """What happens to training images. Every default is the paper's; 0 turns a part off.

    Source: arXiv 2510.19266, whose vision training is DeiT's (arXiv 2012.12877).

    Raises:
        ValueError: for a probability outside [0, 1] or a negative number.
    """

    random_crop_padding: int = field(
        default=0, metadata={"help": "Shift images by up to this many pixels, black beyond the edge (CIFAR: 4)."}
    )
    horizontal_flip: float = field(default=0.5, metadata={"help": "Probability of a left-right flip."})
    rand_augment_num: int = field(
        default=2, metadata={"help": "RandAugment operations an image, each applied half the time."}
    )
    rand_augment_magnitude: float = field(default=9.0, metadata={"help": "RandAugment's magnitude, from 0 to 10."})
    rand_augment_std: float = field(default=0.5, metadata={"help": "Standard deviation of that magnitude."})
    random_erasing: float = field(default=0.25, metadata={"help": "Probability of erasing a rectangle by noise."})
    mixup: float = field(default=0.8, metadata={"help": "Alpha of mixup."})
    cutmix: float = field(default=1.0, metadata={"help": "Alpha of cutmix."})
    mixup_switch: float = field(default=0.5, metadata={"help": "Probability of cutmix where both are on."})
    mixup_probability: float = field(default=1.0, metadata={"help": "Probability that a batch is mixed at all."})

    def __post_init__(self) -> None:
        for name in ("horizontal_flip", "random_erasing", "mixup_switch", "mixup_probability"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} is {value}, outside [0, 1]. Give a probability; 0 turns it off.")
        for name in ("random_crop_padding", "rand_augment_num", "rand_augment_std", "mixup", "cutmix"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"{name} is {value}. Give a number from 0 on; 0 turns it off.")
        if not 0.0 <= self.rand_augment_magnitude <= 10.0:
            raise ValueError(f"rand_augment_magnitude is {self.rand_augment_magnitude}. Give a number from 0 to 10.")


class ImageAugmentation(nn.Module):
    """Augments and normalises a batch of images on its own device.

    In this order: shift and flip; RandAugment on pixels in [0, 1]; mixup or cutmix of the batch with itself in
    reverse; normalisation; random erasing by standard normal noise. Erasing comes last, so that noise has the scale
    of normalised pixels; unlike in DeiT's loader it follows the mixing, whose labels it leaves as they are.

    Args:
        arguments: What to do; by default the paper's.
        mean: Mean of each channel of pixels in [0, 1]; also the colour that RandAugment's warps uncover.
        std: Standard deviation of each channel.
        num_labels: Classes of the labels; needed to mix them.

    Raises:
        ImportError: RandAugment is on and kornia is missing.
        ValueError: Mixing is on without `num_labels`.

    Source: RandAugment (arXiv 1909.13719) in the form "rand-m9-mstd0.5-inc1" of DeiT: two of 15 operations an image,
        drawn with replacement, each applied with probability 0.5, with bilinear warps; random erasing (arXiv
        1708.04896); mixup (arXiv 1710.09412) and cutmix (arXiv 1905.04899) with one ratio a batch.
    """

    def __init__(
        self,
        arguments: AugmentationArguments | None = None,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        num_labels: int | None = None,
    ) -> None:
        super().__init__()
        self.arguments = arguments or AugmentationArguments()
        self.num_labels = num_labels
        if self.mixes and num_labels is None:
            raise ValueError(
                f"mixup is {self.arguments.mixup} and cutmix {self.arguments.cutmix}, but num_labels is None. Give "
                "the number of classes, or set both to 0."
            )
        if self.arguments.rand_augment_num and importlib.util.find_spec("kornia") is None:
            raise ImportError(
                'RandAugment needs kornia. Run `pip install "cab-hf[vision]"`, or set rand_augment_num to 0.'
            )
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    @property
    def mixes(self) -> bool:
        """Whether training labels come out as probabilities."""
        arguments = self.arguments
        return (arguments.mixup > 0 or arguments.cutmix > 0) and arguments.mixup_probability > 0

    @torch.no_grad()
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor, training: bool | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Augments in training, and only normalises otherwise.

        Args:
            pixel_values: uint8 (b, c, H, W).
            labels: int64 (b,).
            training: Whether to augment; by default whether the module is in training mode.

        Returns:
            float32 (b, c, H, W), normalised, and labels: probabilities float32 (b, num_labels) in training where
            mixup or cutmix is on, otherwise `labels` as they are.

        Raises:
            ValueError: Pixels are not uint8, or of another number of channels.
        """
        if pixel_values.dtype != torch.uint8 or pixel_values.ndim != 4:
            raise ValueError(
                f"pixel_values are {pixel_values.dtype} {tuple(pixel_values.shape)}. Give uint8 (b, c, H, W) from 0 "
                "to 255, not normalised."
            )
        if pixel_values.shape[1] != len(self.mean):
            raise ValueError(
                f"pixel_values have {pixel_values.shape[1]} channels, mean and std {len(self.mean)}. Set num_channels "
                "of the ImageDataset, or give other mean and std."
            )
        if not (self.training if training is None else training):
            return normalise(pixel_values, self.mean, self.std), labels
        arguments = self.arguments
        pixel_values = shift_and_flip(pixel_values, arguments.random_crop_padding, arguments.horizontal_flip)
        if not arguments.rand_augment_num and not self.mixes:
            pixel_values = normalise(pixel_values, self.mean, self.std)
        else:
            images = pixel_values.float() / 255
            for _ in range(arguments.rand_augment_num):
                images = self._rand_augment(images)
            if self.mixes:
                images, labels = self._mix(images, labels)
            pixel_values = (images - self.mean) / self.std
        return erase(pixel_values, arguments.random_erasing), labels

    def _rand_augment(self, images: torch.Tensor) -> torch.Tensor:
        """One operation an image: images are sorted by operation, so that each operation runs once on its own."""
        b = len(images)
        operation = torch.randint(len(OPERATIONS), (b,))
        operation = torch.where(torch.rand(b) < _APPLY, operation, len(OPERATIONS))
        level = self.arguments.rand_augment_magnitude + self.arguments.rand_augment_std * torch.randn(b)
        level = level.clamp(0.0, 10.0) / 10.0
        sign = torch.where(torch.rand(b) < 0.5, -1.0, 1.0)

        order = operation.argsort(stable=True)
        counts = torch.bincount(operation, minlength=len(OPERATIONS) + 1).tolist()
        warped, unchanged = sum(counts[: len(_GEOMETRIC)]), counts[-1]
        coloured = counts[len(_GEOMETRIC) : -1]
        sizes = [warped, *coloured, unchanged]
        levels, signs = level[order], sign[order]
        sorted_images = images[_send(order, images)].split(sizes)
        colour_levels = _send(levels, images).split(sizes)
        colour_signs = _send(signs, images).split(sizes)

        parts = [sorted_images[0], *sorted_images[1:]]
        if warped:
            chosen = operation[order][:warped]
            maps = warp_maps(chosen, levels[:warped], signs[:warped], images.shape[-2:])
            parts[0] = warp(parts[0], _send(maps, images), self.mean)
        for index, name in enumerate((*_COLOUR, *_ENHANCE), start=1):
            if sizes[index]:
                parts[index] = change_colour(name, parts[index], colour_levels[index], colour_signs[index])
        return torch.cat(parts)[_send(order.argsort(), images)]

    def _mix(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        arguments = self.arguments
        targets = torch.zeros(len(labels), self.num_labels, device=labels.device)
        targets.scatter_(1, labels[:, None], 1.0)
        if float(torch.rand(())) >= arguments.mixup_probability:
            return images, targets
        cut = arguments.mixup == 0 or (arguments.cutmix > 0 and float(torch.rand(())) < arguments.mixup_switch)
        alpha = arguments.cutmix if cut else arguments.mixup
        kept = float(torch.distributions.Beta(alpha, alpha).sample())
        if cut:
            images, kept = cutmix(images, kept)
        else:
            images = kept * images + (1 - kept) * images.flip(0)
        return images, kept * targets + (1 - kept) * targets.flip(0)


def normalise(pixel_values: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """uint8 pixels (b, c, H, W) as float32 (pixel / 255 - mean) / std; `mean` and `std` are (c, 1, 1)."""
    return (pixel_values.float() / 255 - mean) / std


def two_sizes(pixel_values: torch.Tensor, student_size: int, teacher_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same augmented images for a student and a teacher of different sizes.

    Args:
        pixel_values: Normalised float (b, c, H, W).
        student_size: Height and width of the student's images.
        teacher_size: Those of the teacher's.

    Returns:
        (the student's, the teacher's); the same tensor twice where the sizes are equal. Bicubic with antialiasing.
    """
    student = _resize(pixel_values, student_size)
    return student, student if teacher_size == student_size else _resize(pixel_values, teacher_size)


def shift_and_flip(pixel_values: torch.Tensor, padding: int, flip: float) -> torch.Tensor:
    """Moves each image by up to `padding` pixels each way, black beyond the edge, and flips some of them.

    Args:
        pixel_values: (b, c, H, W) of any dtype.
        padding: Pixels of black on each side, of which a window of the old size is cut.
        flip: Probability of a left-right flip.

    Returns:
        (b, c, H, W): each pixel is one of the old ones, or 0.
    """
    if padding == 0 and flip == 0:
        return pixel_values
    b, c, height, width = pixel_values.shape
    rows = torch.randint(2 * padding + 1, (b, 1)) + torch.arange(height)
    columns = torch.randint(2 * padding + 1, (b, 1)) + torch.arange(width)
    columns = torch.where(torch.rand(b, 1) < flip, columns.flip(1), columns)
    padded = F.pad(pixel_values, (padding,) * 4)
    image = torch.arange(b, device=pixel_values.device)[:, None, None, None]
    channel = torch.arange(c, device=pixel_values.device)[:, None, None]
    return padded[image, channel, _send(rows, padded)[:, None, :, None], _send(columns, padded)[:, None, None, :]]


def warp_maps(operation: torch.Tensor, level: torch.Tensor, sign: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Where each pixel of a warped image is read in the old one.

    Args:
        operation: Indices into the geometric operations, which come first in `OPERATIONS` (b,).
        level: Magnitude in [0, 1] (b,): of 30 degrees, of a shear by 0.3, or of a shift by 0.45 of the side.
        sign: -1.0 or 1.0 (b,).
        size: Height and width in pixels.

    Returns:
        float32 (b, 2, 3), from (x, y, 1) of the new image to (x, y) of the old one, with both running from -1 to 1
        between the outer edges. Rotation is about the middle, shear leaves the upper or left edge in place.
    """
    height, width = size
    amount = level * sign
    angle = amount * math.radians(30.0)
    shear, shift = amount * 0.3, amount * 0.9
    rotate, shear_x, shear_y, translate_x, translate_y = (operation == index for index in range(len(_GEOMETRIC)))
    zero, one = torch.zeros_like(amount), torch.ones_like(amount)
    diagonal = torch.where(rotate, angle.cos(), one)
    # Shears and turns are of pixels, which these coordinates squeeze by different factors where a side is longer.
    x_of_y = (torch.where(rotate, -angle.sin(), zero) + torch.where(shear_x, shear, zero)) * (height / width)
    y_of_x = (torch.where(rotate, angle.sin(), zero) + torch.where(shear_y, shear, zero)) * (width / height)
    x_shift = torch.where(translate_x, shift, zero) + torch.where(shear_x, x_of_y, zero)
    y_shift = torch.where(translate_y, shift, zero) + torch.where(shear_y, y_of_x, zero)
    entries = (diagonal, x_of_y, x_shift, y_of_x, diagonal, y_shift)
    return torch.stack(entries, dim=1).view(-1, 2, 3)


def warp(images: torch.Tensor, maps: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    """Reads images (b, c, H, W) where `warp_maps` (b, 2, 3) says, bilinearly; outside they are `fill` (c, 1, 1)."""
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images - fill, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + fill


def change_colour(name: str, images: torch.Tensor, level: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
    """One of RandAugment's operations on colour, each image with its own magnitude.

    Args:
        name: One of `OPERATIONS` that is not geometric.
        images: float in [0, 1] (b, c, H, W).
        level: Magnitude in [0, 1] (b,); more changes more.
        sign: -1.0 or 1.0 (b,), for the operations that can go two ways.

    Returns:
        float in [0, 1] (b, c, H, W).
    """
    from kornia import enhance

    per_image = level.view(-1, 1, 1, 1)
    if name == "auto_contrast":
        low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
        return torch.where(high > low, (images - low) / (high - low), images)
    if name == "equalize":
        # kornia truncates to levels: a little more keeps 253.9999 from becoming 253.
        return enhance.equalize((((images * 255).round() + 1e-3) / 255).clamp(max=1.0))
    if name == "invert":
        return 1 - images
    if name == "posterize":
        # From 4 bits down to 1: none at all would be a black image.
        step = 2.0 ** (4 + (per_image * 4).floor().clamp(max=3))
        return ((images * 255).round() / step).floor() * step / 255
    if name == "solarize":
        return enhance.solarize(images, (256 - (level * 256).floor() - 0.5) / 255)
    if name == "solarize_add":
        return torch.where(images * 255 < 127.5, images + (per_image * 110).floor() / 255, images).clamp(max=1.0)
    factor = (1 + sign * 0.9 * level).clamp(min=0.1)
    if name == "color":
        return enhance.adjust_saturation_with_gray_subtraction(images, factor)
    if name == "contrast":
        return enhance.adjust_contrast_with_mean_subtraction(images, factor)
    if name == "brightness":
        return enhance.adjust_brightness_accumulative(images, factor)
    return enhance.sharpness(images, factor)


def cutmix(images: torch.Tensor, kept: float) -> tuple[torch.Tensor, float]:
    """Pastes a rectangle of each image's partner, the batch in reverse, into it.

    Args:
        images: (b, c, H, W).
        kept: Share of the area that should stay.

    Returns:
        The images, and the share that did stay: a rectangle is cut off at the edges.
    """
    height, width = images.shape[-2:]
    half_height, half_width = (int(side * math.sqrt(1 - kept)) // 2 for side in (height, width))
    y, x = int(torch.randint(height, ())), int(torch.randint(width, ()))
    top, bottom = max(0, y - half_height), min(height, y + half_height)
    left, right = max(0, x - half_width), min(width, x + half_width)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def erase(pixel_values: torch.Tensor, probability: float) -> torch.Tensor:
    """Replaces a rectangle of an image, with the probability, by standard normal noise.

    Args:
        pixel_values: Normalised float (b, c, H, W).
        probability: Of erasing an image's rectangle, of 2 to 33 % of the area with a shape between 3:10 and 10:3.

    Returns:
        (b, c, H, W).
    """
    if probability == 0:
        return pixel_values
    b, _, height, width = pixel_values.shape
    # Of several draws the first that fits is taken, as many shapes do not.
    area = height * width * torch.empty(b, _ERASE_ATTEMPTS).uniform_(*_ERASED_AREA)
    aspect = torch.empty(b, _ERASE_ATTEMPTS).uniform_(*map(math.log, _ERASED_ASPECT)).exp()
    heights, widths = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (heights < height) & (widths < width)
    first = fits.int().argmax(1, keepdim=True)
    heights, widths = heights.gather(1, first), widths.gather(1, first)
    top = (torch.rand(b, 1) * (height - heights + 1)).floor()
    left = (torch.rand(b, 1) * (width - widths + 1)).floor()
    chosen = (torch.rand(b, 1) < probability) & fits.any(1, keepdim=True)
    rows, columns = torch.arange(height), torch.arange(width)
    rows = chosen & (rows >= top) & (rows < top + heights)
    columns = (columns >= left) & (columns < left + widths)
    rows, columns = _send(rows, pixel_values), _send(columns, pixel_values)
    inside = rows[:, None, :, None] & columns[:, None, None, :]
    return torch.where(inside, torch.randn_like(pixel_values), pixel_values)


def _resize(pixel_values: torch.Tensor, size: int) -> torch.Tensor:
    if pixel_values.shape[-2:] == (size, size):
        return pixel_values
    return F.interpolate(pixel_values, (size, size), mode="bicubic", antialias=True)


def _send(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return tensor.to(like.device, non_blocking=True)
