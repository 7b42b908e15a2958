"""How much of a teacher's keys and queries is one constant vector, layer by layer.

    python benchmarks/quality/bridge_start/constant_share.py --text TEACHER ... --images DATASET=TEACHER ... \\
        --output benchmarks/quality/bridge_start/constant_share_cpu.json

A constant added to all keys changes no softmax, so that training leaves it anywhere; a bridge that compares squared
errors learns it first. Text: 4,096 tokens of Python's language reference; images: 64 test images.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cab_hf import Teacher
from cab_hf.data.augmentation import normalise
from cab_hf.data.documents import load_documents
from cab_hf.data.image_sources import load_images
from cab_hf.data.images import ImageDataset, normalisation, processor_side
from cab_hf.data.packing import pack_documents
from cab_hf.distillation.bridge import ROLES, bridge_targets
from cab_hf.distillation.losses import mean_square, token_mean
from cab_hf.teachers.loading import load_image_teacher, load_teacher


ROWS, LENGTH, IMAGES = 8, 512, 64


def read_text(name: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    model, tokenizer = load_teacher(name)
    blocks = pack_documents(load_documents("builtin"), tokenizer, LENGTH, isolate_documents=False)
    return model, {"input_ids": torch.tensor(blocks[:ROWS]["input_ids"])}


def read_images(dataset: str, name: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    model, processor = load_image_teacher(name)
    rows = load_images(dataset)["test"].select(range(IMAGES))
    images = ImageDataset(rows, processor_side(processor), num_channels=getattr(model.config, "num_channels", 3))
    pixels = torch.stack([images[index]["pixel_values"] for index in range(IMAGES)])
    mean, std = (torch.as_tensor(values).view(-1, 1, 1) for values in normalisation(processor))
    return model, {"pixel_values": normalise(pixels, mean, std)}


@torch.no_grad()
def measure(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, dict[str, list[float]]]:
    """Role -> of each layer the mean square, and the share of it that the mean over tokens has."""
    found = {role: {"mean_square": [], "constant_share": []} for role in ROLES}
    for attention in Teacher(model.eval())(batch, attentions=True).attentions:
        for role, target in bridge_targets(attention).items():
            target = target.flatten(2)
            square = mean_square(target)
            found[role]["mean_square"].append(round(square.item(), 4))
            found[role]["constant_share"].append(round((token_mean(target).square().mean() / square).item(), 4))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", default=[], metavar="TEACHER")
    parser.add_argument("--images", nargs="+", default=[], metavar="DATASET=TEACHER")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    read = {name: read_text(name) for name in options.text}
    read |= {entry: read_images(*entry.split("=", 1)) for entry in options.images}
    results = {Path(name).name: measure(*inputs) for name, inputs in read.items()}
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    for name, roles in results.items():
        for role, numbers in roles.items():
            shares = sorted(numbers["constant_share"])
            print(f"{name}, {role}: {shares[0]:.2f} to {shares[-1]:.2f}, median {shares[len(shares) // 2]:.2f}")


if __name__ == "__main__":
    main()
