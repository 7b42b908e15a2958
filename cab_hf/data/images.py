"""Images in, uint8 tensors out: the data set, the order of its images, the processor.

Shapes: `n` images, `c` channels, `H` rows and `W` columns of pixels.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import datasets
import numpy as np
import torch
from datasets import Dataset
from transformers import BaseImageProcessor
from transformers.utils import logging

from cab_hf.data.image_sources import require_pillow


if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import ViTImageProcessorPil


logger = logging.get_logger(__name__)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
TRANSFORMS = ("resize", "center_crop", "random_resized_crop")

_SMALL_SIDE = 96


class ImageDataset(torch.utils.data.Dataset):
    """Labelled images as uint8 tensors of one size, for a `Trainer`.

    Small images are decoded and resized once and held as one tensor; large ones are read when asked for.

    Args:
        rows: Rows of `load_images`, or others with `image` and `label`.
        size: Height and width of what comes out.
        transform: "resize" to the size whatever the image's shape; "center_crop": resize the short side to
            size / crop_pct, then cut out the middle (evaluation); "random_resized_crop": resize a random part of
            8 to 100 % of the area with a shape between 3:4 and 4:3 (training), drawn from torch's generator.
        crop_pct: Share of the short side that "center_crop" keeps.
        num_channels: 3, where grey images become colour, or 1, where colour ones become grey.
        keep_in_memory: Hold all images, `n * c * size * size` bytes. By default where the first image has sides of
            at most 96 pixels and the transform is not random.
        skip_broken: Leave out images that can't be read, with a warning that names them; all are read once for it.

    Pixels of 16 bits, or floats of [0, 1], become 8 bits; what is transparent is laid on white. Each item is
    {"pixel_values": uint8 (c, size, size), "labels": int}. Pixels are resized by pillow (bicubic), as the processor of
    `make_image_processor` does it.

    Raises:
        ImportError: pillow is missing.
        ValueError: Rows without the two columns, an argument that is out of range, or an image that can't be read.

    Source: crops and their ranges are those of DeiT (arXiv 2012.12877), which arXiv 2510.19266 trains with.
    """

    def __init__(
        self,
        rows: Dataset,
        size: int,
        *,
        transform: str = "resize",
        crop_pct: float = 0.875,
        num_channels: int = 3,
        keep_in_memory: bool | None = None,
        skip_broken: bool = False,
    ) -> None:
        if transform not in TRANSFORMS:
            raise ValueError(f"transform is {transform!r}. Use one of {', '.join(TRANSFORMS)}.")
        if not 0.0 < crop_pct <= 1.0:
            raise ValueError(f"crop_pct is {crop_pct}, outside (0, 1]. Use 0.875, or 1.0 to keep the short side.")
        if num_channels not in (1, 3):
            raise ValueError(f"num_channels is {num_channels}. Use 3 for colour or 1 for grey.")
        if keep_in_memory and transform == "random_resized_crop":
            raise ValueError("keep_in_memory can't hold random crops. Leave it out, or use transform='resize'.")
        require_pillow()
        self.rows = rows.select_columns(["image", "label"]).cast_column("image", datasets.Image(decode=False))
        self.size, self.transform, self.crop_pct, self.num_channels = size, transform, crop_pct, num_channels
        if skip_broken:
            broken = {index: error for index in range(len(self.rows)) if (error := self._error(index))}
            for error in broken.values():
                logger.warning(f"{error} It is left out.")
            self.rows = self.rows.select([index for index in range(len(self.rows)) if index not in broken])
        self.labels: list[int] = self.rows["label"][:]
        if keep_in_memory is None:
            small = len(self.rows) > 0 and max(self._image(0).size) <= _SMALL_SIDE
            keep_in_memory = small and transform != "random_resized_crop"
        self.pixel_values = self._read_all() if keep_in_memory else None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        if self.pixel_values is not None:
            pixel_values = self.pixel_values[index]
        else:
            pixel_values = torch.from_numpy(self._transform(self._image(int(index))))
        return {"pixel_values": pixel_values, "labels": self.labels[index]}

    def _read_all(self) -> torch.Tensor:
        pixels = np.empty((len(self), self.num_channels, self.size, self.size), dtype=np.uint8)
        for index in range(len(self)):
            pixels[index] = self._transform(self._image(index))
        return torch.from_numpy(pixels)

    def _image(self, index: int) -> "Image":
        """An image of 8 bits a channel, none of them transparency."""
        from PIL.Image import DecompressionBombError

        row = self.rows[index]["image"]
        try:
            return _eight_bits(datasets.Image().decode_example(row)).convert("RGB" if self.num_channels == 3 else "L")
        except (OSError, ValueError, SyntaxError, DecompressionBombError) as error:
            raise ValueError(
                f"The image {row['path'] or f'number {index}'} can't be read ({error}). Replace it, or leave such "
                "images out by skip_broken."
            ) from error

    def _error(self, index: int) -> str | None:
        try:
            self._image(index)
        except ValueError as error:
            return str(error)
        return None

    def _transform(self, image: "Image") -> np.ndarray:
        """uint8 (c, size, size)."""
        from PIL.Image import Resampling

        size = (self.size, self.size)
        if self.transform == "center_crop":
            image = _resize_short_side(image, _short_side(self.size, self.crop_pct))
            left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
            image = image.crop((left, top, left + self.size, top + self.size))
        elif self.transform == "random_resized_crop":
            image = image.crop(_random_box(image.width, image.height))
        if image.size != size:
            image = image.resize(size, Resampling.BICUBIC)
        pixels = np.array(image)
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _eight_bits(image: "Image") -> "Image":
    """Wider pixels at 8 bits, transparent ones on white; other images as they are."""
    from PIL import Image

    if image.mode == "F" or image.mode.startswith("I"):
        pixels = np.asarray(image)
        low, high = float(pixels.min()), float(pixels.max())
        # The mode alone does not say the range: 8 bits are also kept in wider pixels.
        top = next((top for top in ((1.0, 255.0) if image.mode == "F" else (255.0, 65535.0)) if high <= top), None)
        if low < 0 or top is None:
            raise ValueError(f"its pixels reach from {low:g} to {high:g}, and neither mode nor values say the range")
        return Image.fromarray(np.round(pixels * (255.0 / top)).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image


class RepeatedSampler(torch.utils.data.Sampler[int]):
    """Repeated augmentation: an epoch shows `num_images // repeats` of the images, each `repeats` times in a row.

    Copies follow each other, so that they are augmented differently within one batch. Each epoch draws other images;
    `set_epoch`, which a `Trainer` calls, makes that the same after a resume.

    Args:
        num_images: Images of the training set, and items of an epoch.
        repeats: How often an image is shown.
        seed: Draws other images.

    Raises:
        ValueError: `repeats` is not between 1 and `num_images`.

    Source: Hoffer et al., "Augment your batch" (arXiv 1901.09335), with DeiT's three repeats (arXiv 2012.12877).
    """

    def __init__(self, num_images: int, repeats: int = 3, *, seed: int = 0) -> None:
        if not 1 <= repeats <= num_images:
            raise ValueError(f"repeats is {repeats} for {num_images} images. Use a number from 1 to {num_images}.")
        self.num_images, self.repeats, self.seed, self.epoch = num_images, repeats, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses what the next iteration draws."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_images

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        order = torch.randperm(self.num_images, generator=generator)
        return iter(order.repeat_interleave(self.repeats)[: self.num_images].tolist())


def collate_images(rows: Sequence[Mapping[str, torch.Tensor | int]]) -> dict[str, torch.Tensor]:
    """A batch of `ImageDataset` items: pixel_values uint8 (b, c, H, W) and labels int64 (b,)."""
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows], dtype=torch.long),
    }


def make_image_processor(
    teacher_processor: BaseImageProcessor | None = None,
    size: int = 224,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    *,
    crop_pct: float | None = None,
) -> "ViTImageProcessorPil":
    """The image processor to save beside a student, which then works in a pipeline and without torchvision.

    It resizes as `ImageDataset` does, so that a student is used on the pixels that it was trained on.

    Args:
        teacher_processor: The teacher's, whose mean and standard deviation are taken.
        size: Height and width of the student's images.
        mean: Mean of each channel of pixels in [0, 1]; by default the teacher's, without a teacher ImageNet's.
        std: Their standard deviation, likewise.
        crop_pct: As in `ImageDataset`'s "center_crop"; None resizes to the size whatever the image's shape.

    Returns:
        A processor that `AutoImageProcessor` loads, by pillow or, where it is installed, torchvision.

    Raises:
        ImportError: pillow is missing.
    """
    require_pillow()
    from PIL.Image import Resampling
    from transformers import ViTImageProcessorPil

    default = (IMAGENET_MEAN, IMAGENET_STD) if teacher_processor is None else normalisation(teacher_processor)
    mean = list(default[0] if mean is None else mean)
    std = list(default[1] if std is None else std)
    options: dict = {"size": {"height": size, "width": size}}
    if crop_pct is not None:
        options = {"size": {"shortest_edge": _short_side(size, crop_pct)}, "do_center_crop": True}
        options["crop_size"] = {"height": size, "width": size}
    return ViTImageProcessorPil(
        **options,
        resample=Resampling.BICUBIC,
        image_mean=mean,
        image_std=std,
        do_convert_rgb=len(mean) == 3,
    )


def normalisation(processor: BaseImageProcessor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of an image processor, for pixels in [0, 1] whatever its own range is.

    Args:
        processor: Any image processor of transformers.

    Returns:
        (mean, std), a number a channel.

    Raises:
        ValueError: The processor does more to a pixel than scale and shift it by channel.
    """
    options = processor.to_dict()
    if options.get("rescale_offset"):
        raise ValueError(
            f"{type(processor).__name__} has rescale_offset {options['rescale_offset']}, which mean and std can't say."
            " Pass mean and std that hold it: 0.5 and 0.5 bring pixels to [-1, 1]."
        )
    # Pixels are divided by 255 here; what the processor does otherwise moves into mean and std.
    scale = 255.0 * options["rescale_factor"] if options.get("do_rescale", True) else 255.0
    if not options.get("do_normalize", True):
        return (0.0, 0.0, 0.0), (1.0 / scale,) * 3
    mean = tuple(value / scale for value in _per_channel(options["image_mean"]))
    return mean, tuple(value / scale for value in _per_channel(options["image_std"]))


def _per_channel(values: float | Sequence[float]) -> Sequence[float]:
    return (values,) * 3 if isinstance(values, int | float) else values


def _short_side(size: int, crop_pct: float) -> int:
    return math.floor(size / crop_pct + 1e-9)


def _resize_short_side(image: "Image", short: int) -> "Image":
    from PIL.Image import Resampling

    width, height = image.size
    long = int(short * max(width, height) / min(width, height))
    return image.resize((short, long) if width <= height else (long, short), Resampling.BICUBIC)


def _random_box(width: int, height: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random part, or the middle where ten draws do not fit."""
    for _ in range(10):
        area = width * height * _uniform(0.08, 1.0)
        aspect = math.exp(_uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = int(torch.randint(width - w + 1, ()))
            top = int(torch.randint(height - h + 1, ()))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * 4 / 3)))
    h = min(height, max(1, round(width * 4 / 3)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def processor_side(processor: BaseImageProcessor) -> int:
    """The side, in pixels, of the images that a processor makes.

    Raises:
        ValueError: it makes images that are not square.
    """
    options = processor.to_dict()
    size = dict(options["crop_size"] if options.get("do_center_crop") else options["size"])
    sides = {size[name] for name in ("height", "width", "shortest_edge") if name in size}
    if len(sides) != 1:
        raise ValueError(
            f"The teacher's processor makes images of {size}; recipes are for square ones. Save the teacher with a "
            "processor of one size: cab_hf.data.images.make_image_processor."
        )
    return sides.pop()
