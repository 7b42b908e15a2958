"""Augmentation against pillow, against hand-made examples, and against doing nothing."""

import builtins
import importlib.util
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from cab_hf.data import augmentation
from cab_hf.data.augmentation import (
    OPERATIONS,
    AugmentationArguments,
    ImageAugmentation,
    change_colour,
    cutmix,
    erase,
    normalise,
    shift_and_flip,
    two_sizes,
    warp,
    warp_maps,
)


MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
OFF = {
    "horizontal_flip": 0.0,
    "rand_augment_num": 0,
    "random_erasing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
}


def make(num_labels=5, **arguments):
    return ImageAugmentation(AugmentationArguments(**(OFF | arguments)), mean=MEAN, std=STD, num_labels=num_labels)


def noise(b=7, height=9, width=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (b, 3, height, width), dtype=torch.uint8, generator=generator)
    return pixels, torch.randint(0, 5, (b,), generator=generator)


def photo(size=40):
    """A smooth colour picture without symmetries."""
    y, x = np.mgrid[:size, :size] / size
    channels = [np.sin(5 * x + 2 * y), np.cos(4 * y - x), x * y]
    return np.stack([(60 + 90 * (1 + c) * 0.9).astype(np.uint8) for c in channels], axis=-1)


def as_batch(*pictures):
    return torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures]).float() / 255


def levels(images):
    return (images[0] * 255).round().permute(1, 2, 0).numpy()


def test_nothing_on_is_plain_normalisation_and_labels_stay():
    pixels, labels = noise()
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    expected = (pixels.float() / 255 - mean) / std
    images, same = make()(pixels, labels, training=True)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, expected, rtol=0, atol=0)
    torch.testing.assert_close(normalise(pixels, mean, std), expected, rtol=0, atol=0)
    assert same is labels


def test_evaluation_normalises_only_and_is_the_default_of_eval_mode():
    pixels, labels = noise()
    module = ImageAugmentation(mean=MEAN, std=STD, num_labels=5)
    expected = make()(pixels, labels, training=True)[0]
    state = torch.get_rng_state()
    for images, same in (module(pixels, labels, training=False), module.eval()(pixels, labels)):
        torch.testing.assert_close(images, expected, rtol=0, atol=0)
        assert same is labels
    assert torch.equal(torch.get_rng_state(), state)


def test_a_seed_repeats_everything_and_another_seed_does_not():
    pixels, labels = noise(16, 16, 16)
    module = ImageAugmentation(AugmentationArguments(random_crop_padding=2), mean=MEAN, std=STD, num_labels=5)
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append(module(pixels, labels))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[2][0])
    assert results[0][0].isfinite().all() and results[0][1].shape == (16, 5)


def test_shift_and_flip_moves_whole_images_within_the_padding():
    pixels, _ = noise(64, 6, 5)
    torch.manual_seed(0)
    moved = shift_and_flip(pixels, 2, 0.5)
    seen = set()
    for old, new in zip(pixels, moved):
        padded = torch.nn.functional.pad(old, (2, 2, 2, 2))
        found = [
            (top, left, flipped)
            for top in range(5)
            for left in range(5)
            for flipped in (False, True)
            if torch.equal(
                padded[:, top : top + 6, left : left + 5].flip(2)
                if flipped
                else padded[:, top : top + 6, left : left + 5],
                new,
            )
        ]
        assert len(found) == 1
        seen |= set(found)
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(5))
    assert {flipped for _, _, flipped in seen} == {False, True}
    torch.testing.assert_close(shift_and_flip(pixels, 0, 1.0), pixels.flip(3), rtol=0, atol=0)


@pytest.mark.parametrize("level", [0.0, 0.37, 0.9, 1.0])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("name", OPERATIONS[5:])
def test_colour_operations_are_pillows(name, level, sign):
    picture = Image.fromarray(photo())
    factor = max(0.1, 1 + sign * 0.9 * level)
    expected = {
        "auto_contrast": lambda: ImageOps.autocontrast(picture),
        "equalize": lambda: ImageOps.equalize(picture),
        "invert": lambda: ImageOps.invert(picture),
        "posterize": lambda: ImageOps.posterize(picture, max(1, 4 - int(level * 4))),
        "solarize": lambda: ImageOps.solarize(picture, 256 - min(256, int(level * 256))),
        "solarize_add": lambda: picture.point(lambda p: min(255, p + min(128, int(level * 110))) if p < 128 else p),
        "color": lambda: ImageEnhance.Color(picture).enhance(factor),
        "contrast": lambda: ImageEnhance.Contrast(picture).enhance(factor),
        "brightness": lambda: ImageEnhance.Brightness(picture).enhance(factor),
        "sharpness": lambda: ImageEnhance.Sharpness(picture).enhance(factor),
    }[name]()
    # Two images with different magnitudes: each must get its own.
    images = as_batch(picture, Image.fromarray(photo()[::-1].copy()))
    result = change_colour(name, images, torch.tensor([level, 0.5]), torch.tensor([sign, -sign]))
    assert result.min() >= 0 and result.max() <= 1
    exact = name in ("equalize", "invert", "posterize", "solarize", "solarize_add")
    difference = np.abs(levels(result) - np.asarray(expected, dtype=float))
    # Pillow rounds the grey image before it blends, and truncates afterwards.
    assert difference.max() <= (0 if exact else 2)


def test_auto_contrast_leaves_a_constant_image():
    images = torch.full((1, 3, 4, 4), 0.3)
    torch.testing.assert_close(change_colour("auto_contrast", images, torch.ones(1), torch.ones(1)), images)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("name", OPERATIONS[:5])
@pytest.mark.parametrize("size", [(40, 40), (24, 40), (40, 24)])
def test_warps_are_pillows(name, sign, size):
    height, width = size
    picture = Image.fromarray(photo()[:height, :width].copy())
    amount, level = 0.63 * sign, 0.63
    maps = warp_maps(torch.tensor([OPERATIONS.index(name)]), torch.tensor([level]), torch.tensor([sign]), size)
    fill = (0, 0, 0)
    if name == "rotate":
        expected = picture.rotate(30 * amount, Image.Resampling.BILINEAR, fillcolor=fill)
    else:
        matrix = {
            "shear_x": (1, 0.3 * amount, 0, 0, 1, 0),
            "shear_y": (1, 0, 0, 0.3 * amount, 1, 0),
            "translate_x": (1, 0, 0.45 * amount * width, 0, 1, 0),
            "translate_y": (1, 0, 0, 0, 1, 0.45 * amount * height),
        }[name]
        expected = picture.transform(
            picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=fill
        )
    images = as_batch(picture)
    result = levels(warp(images, maps, torch.zeros(3, 1, 1)))
    # Pillow does not blend the edge with the fill.
    inside = levels(warp(torch.ones_like(images), maps, torch.zeros(3, 1, 1)))[..., 0] == 255
    assert inside.mean() > 0.5
    assert np.abs(result - np.asarray(expected, dtype=float))[inside].max() <= 1
    assert np.abs(result - np.asarray(picture, dtype=float)).max() > 5


def test_a_warp_of_level_zero_changes_nothing_and_uncovers_the_fill():
    images = as_batch(photo())
    zero, one = torch.zeros(1), torch.ones(1)
    for index in range(5):
        maps = warp_maps(torch.tensor([index]), zero, one, (40, 40))
        torch.testing.assert_close(warp(images, maps, torch.ones(3, 1, 1)), images, atol=1e-5, rtol=0)
    shifted = warp(images, warp_maps(torch.tensor([3]), one, one, (40, 40)), torch.tensor(MEAN).view(3, 1, 1))
    torch.testing.assert_close(shifted[..., :22], images[..., 18:], atol=1e-5, rtol=0)
    torch.testing.assert_close(shifted[..., 23:], torch.tensor(MEAN).view(1, 3, 1, 1).expand(1, 3, 40, 17))


def test_rand_augment_gives_each_image_its_own_operation_and_keeps_the_order():
    pixels = torch.from_numpy(photo()).permute(2, 0, 1).expand(400, 3, 40, 40).contiguous()

    module = make(rand_augment_num=1)
    torch.manual_seed(0)
    images, _ = module(pixels, torch.zeros(400, dtype=torch.long), training=True)
    plain, _ = module(pixels, torch.zeros(400, dtype=torch.long), training=False)
    unchanged = (images - plain).abs().amax((1, 2, 3)) < 1e-4
    assert 0.4 < unchanged.float().mean() < 0.62
    kinds = {tuple((image[:, ::7, ::7] * 100).round().flatten().tolist()) for image in images}
    assert len(kinds) > 50

    colours = torch.arange(0, 200, 2, dtype=torch.uint8).view(-1, 1, 1, 1).expand(100, 3, 8, 8).contiguous()
    torch.manual_seed(0)
    images, _ = module(colours, torch.zeros(100, dtype=torch.long), training=True)
    plain, _ = module(colours, torch.zeros(100, dtype=torch.long), training=False)
    kept = (images - plain).abs().amax((1, 2, 3)) < 1e-4
    # A mixed-up order would leave almost no image where it was.
    assert kept.float().mean() > 0.4


def test_more_operations_change_more_images():
    pixels = torch.from_numpy(photo()).permute(2, 0, 1).expand(200, 3, 40, 40).contiguous()
    labels = torch.zeros(200, dtype=torch.long)
    shares = []
    for number in (1, 3):
        torch.manual_seed(1)
        module = make(rand_augment_num=number)
        difference = module(pixels, labels, training=True)[0] - module(pixels, labels, training=False)[0]
        shares.append((difference.abs().amax((1, 2, 3)) > 1e-4).float().mean())
    assert shares[1] > shares[0] + 0.2


def test_mixup_mixes_each_image_with_its_mirror_in_the_batch_by_the_labels_shares():
    pixels, labels = noise()
    plain = make()(pixels, labels, training=True)[0]
    module = make(mixup=0.8)
    torch.manual_seed(0)
    ratios = []
    for _ in range(20):
        images, targets = module(pixels, labels, training=True)
        torch.testing.assert_close(targets.sum(1), torch.ones(7))
        row = next(i for i in range(7) if labels[i] != labels[6 - i])
        share = float(targets[row, labels[row]])
        ratios.append(share)
        torch.testing.assert_close(images, share * plain + (1 - share) * plain.flip(0), atol=1e-5, rtol=0)
        one_hot = torch.nn.functional.one_hot(labels, 5).float()
        torch.testing.assert_close(targets, share * one_hot + (1 - share) * one_hot.flip(0))
    assert len(set(ratios)) == 20 and min(ratios) < 0.3 and max(ratios) > 0.7


def test_cutmix_area_equals_the_label_share():
    pixels = torch.zeros(4, 3, 13, 10, dtype=torch.uint8)
    pixels[:2] = 255
    labels = torch.tensor([0, 0, 1, 1])
    module = make(cutmix=1.0, num_labels=3)
    torch.manual_seed(0)
    areas = set()
    for _ in range(30):
        images, targets = module(pixels, labels, training=True)
        white = images[:, 0] > 0
        for image in range(4):
            assert float(targets[image, 0]) == pytest.approx(float(white[image].float().mean()), abs=1e-6)
        assert torch.equal(targets.sum(1), torch.ones(4)) and (targets[:, 2] == 0).all()
        areas.add(int(white[0].sum()))
    assert len(areas) > 10


@pytest.mark.parametrize("kept", [0.0, 0.3, 1.0])
def test_cutmix_pastes_one_rectangle_of_the_partner(kept):
    torch.manual_seed(0)
    images = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 3, 8, 12)
    mixed, share = cutmix(images, kept)
    pasted = mixed[0, 0] == 1
    assert float(pasted.float().mean()) == pytest.approx(1 - share)
    rows, columns = pasted.any(1), pasted.any(0)
    assert torch.equal(pasted, rows[:, None] & columns[None, :])
    assert torch.equal(mixed[1], 1 - mixed[0])
    if kept == 1.0:
        assert share == 1.0


def test_switch_and_probability_choose_between_mixup_cutmix_and_neither():
    pixels = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    pixels[0] = 255
    labels = torch.tensor([0, 1])
    module = make(mixup=0.8, cutmix=1.0, mixup_switch=0.25, mixup_probability=0.6)
    low, high = float(module(pixels[[1]], labels[[1]], training=False)[0].min()), None
    torch.manual_seed(0)
    counts = {"neither": 0, "mixup": 0, "cutmix": 0}
    for _ in range(600):
        images, targets = module(pixels, labels, training=True)
        assert targets.shape == (2, 5)
        values = images[0, 0].unique()
        if len(values) == 2:
            counts["cutmix"] += 1
        else:
            high = float(values[0])
            counts["neither" if targets[0, 0] == 1 else "mixup"] += 1
    assert low != high
    # A cut of no area looks like neither.
    assert counts["neither"] == pytest.approx(240, abs=50)
    assert counts["mixup"] == pytest.approx(270, abs=45)
    assert counts["cutmix"] == pytest.approx(90, abs=35)


def test_erasing_puts_noise_into_a_rectangle_of_some_images():
    torch.manual_seed(0)
    images = torch.full((400, 3, 32, 24), 9.0)
    erased = erase(images, 0.25)
    changed = erased != 9.0
    hit = changed.flatten(1).any(1)
    assert 0.18 < hit.float().mean() < 0.32
    for image in changed[hit]:
        mask = image[0]
        assert torch.equal(image, mask.expand(3, -1, -1))
        assert torch.equal(mask, mask.any(1)[:, None] & mask.any(0)[None, :])
        height, width = int(mask.any(1).sum()), int(mask.any(0).sum())
        assert 0.01 < height * width / (32 * 24) < 0.36
        assert 0.2 < height / width < 5
    values = erased[changed]
    assert abs(float(values.mean())) < 0.05 and float(values.std()) == pytest.approx(1, abs=0.05)
    assert erase(images, 0.0) is images
    assert (erase(images, 1.0) != 9.0).flatten(1).any(1).all()


def test_two_sizes_share_one_augmentation():
    images = torch.randn(2, 3, 12, 12)
    student, teacher = two_sizes(images, 12, 12)
    assert student is images and teacher is images
    student, teacher = two_sizes(images, 12, 24)
    assert student is images and teacher.shape == (2, 3, 24, 24)
    expected = torch.nn.functional.interpolate(images, (24, 24), mode="bicubic", antialias=True)
    torch.testing.assert_close(teacher, expected, rtol=0, atol=0)
    student, teacher = two_sizes(images, 6, 6)
    assert student is teacher and student.shape == (2, 3, 6, 6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"horizontal_flip": 1.5}, "horizontal_flip is 1.5"),
        ({"mixup": -0.1}, "mixup is -0.1"),
        ({"rand_augment_magnitude": 11.0}, "rand_augment_magnitude is 11.0"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        AugmentationArguments(**arguments)


def test_inputs_are_checked():
    pixels, labels = noise()
    with pytest.raises(ValueError, match="num_labels is None"):
        make(num_labels=None, mixup=0.8)
    with pytest.raises(ValueError, match="torch.float32"):
        make()(pixels.float(), labels)
    with pytest.raises(ValueError, match="1 channels, mean and std 3"):
        make()(pixels[:, :1], labels)


def test_kornia_is_asked_for_only_by_rand_augment(monkeypatch):
    def find(name):
        return None if name == "kornia" else importlib.machinery.ModuleSpec(name, None)

    monkeypatch.setattr(augmentation.importlib.util, "find_spec", find)
    with pytest.raises(ImportError, match=r'pip install "cab-hf\[vision\]"'):
        make(rand_augment_num=2)
    real = builtins.__import__

    def no_kornia(name, *rest):
        assert not name.startswith("kornia")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", no_kornia)
    pixels, labels = noise()
    images, _ = make(random_crop_padding=2, horizontal_flip=0.5, random_erasing=0.5, mixup=0.8)(pixels, labels)
    assert images.isfinite().all()


def test_defaults_are_the_papers():
    arguments = AugmentationArguments()
    assert (arguments.mixup, arguments.cutmix, arguments.mixup_probability) == (0.8, 1.0, 1.0)
    assert (arguments.rand_augment_num, arguments.rand_augment_magnitude, arguments.rand_augment_std) == (2, 9.0, 0.5)
    assert arguments.random_erasing == 0.25 and math.isclose(arguments.mixup_switch, 0.5)
