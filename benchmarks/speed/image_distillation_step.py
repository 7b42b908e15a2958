"""Images a second and peak memory of an image distillation step under the Trainer, with and without the bridge.

    python benchmarks/speed/image_distillation_step.py --output benchmarks/speed/results/image_step_h200.json

Models, batch and augmentation are the recipe's (by default DINOv2-S into a Vim-Tiny-shaped student on CIFAR-10); the
teacher's weights are random where its folder is missing, which speed does not depend on. The images are random.
"""

import argparse
import tempfile
from dataclasses import replace

import torch
from distillation_step import StepTimer, fresh_memory, row, save_report, step_parser, step_report
from torch.utils.data import Dataset
from transformers import AutoModelForImageClassification, Dinov2Config

from cab_hf.data.images import collate_images, make_image_processor
from cab_hf.distillation.trainer import DistillationTrainer, make_teacher
from cab_hf.models import CABVisionMambaConfig, CABVisionMambaForImageClassification
from cab_hf.recipes import parse_recipe
from cab_hf.runs.images import make_transform


RECIPE = "training_args/cifar10_vim_tiny.yaml"
TEACHER_SIZE, NUM_LABELS = 112, 10
DINOV2_SMALL = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "image_size": TEACHER_SIZE,
    "patch_size": 14,
}
KD = ["--bridge_weight", "0"]
VARIANTS = {
    f"{mixer} {name}{', torch.compile' * compiles}": [
        *options,
        *("--mixer_type", mixer, "--torch_compile", str(compiles).lower()),
    ]
    for mixer in ("mamba", "mamba2")
    for compiles in (False, True)
    for name, options in (("kd", KD), ("kd + bridge", []))
}


class RandomImages(Dataset):
    """Random pixels, made once."""

    def __init__(self, size: int, count: int = 512):
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        return {"pixel_values": self.pixels[index % len(self.pixels)], "labels": index % NUM_LABELS}


def measure(variant: list[str], options: argparse.Namespace) -> dict[str, float | None]:
    on_gpu = torch.cuda.is_available()
    here = [] if on_gpu else ["--use_cpu", "true", "--bf16", "false", "--cuda_graph", "false"]
    here += [] if on_gpu else ["--teacher_dtype", "float32", "--per_device_train_batch_size", "2"]
    steps = options.warm_up + options.spans * options.span
    recipe = parse_recipe([options.recipe, *variant, *here, "--max_steps", str(steps), "--disable_tqdm", "true"])
    args = replace(recipe.stages[0].args, output_dir=tempfile.mkdtemp(), logging_strategy="no")
    size = recipe.images.image_size
    torch.manual_seed(0)
    teacher = AutoModelForImageClassification.from_config(Dinov2Config(**DINOV2_SMALL, num_labels=NUM_LABELS))
    config = {"image_size": size, "num_labels": NUM_LABELS, "mixer_type": recipe.model.mixer_type}
    student = CABVisionMambaForImageClassification(CABVisionMambaConfig(**config | recipe.model.student_config))
    names = [str(label) for label in range(NUM_LABELS)]
    timer = StepTimer(options.warm_up, options.span)
    trainer = DistillationTrainer(
        student,
        make_teacher(teacher.to(args.device), args),
        args,
        train_dataset=RandomImages(recipe.images.load_size),
        data_collator=collate_images,
        batch_transform=make_transform(
            recipe.augmentation, make_image_processor(size=TEACHER_SIZE), names, size, TEACHER_SIZE
        ),
        callbacks=[timer],
    )
    fresh_memory()
    trainer.train()
    result = row(timer.seconds(), args.per_device_train_batch_size)
    return {name.replace("tokens", "images"): value for name, value in result.items()}


def main() -> None:
    parser = step_parser(__doc__, VARIANTS)
    parser.add_argument("--recipe", default=RECIPE)
    options = parser.parse_args()
    report = step_report(options, recipe=options.recipe)
    for name in options.variants:
        try:
            report["results"][name] = measure(VARIANTS[name], options)
        except Exception as error:  # a variant that does not run is a result, too
            report["results"][name] = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        print(f"{name}: {report['results'][name]}", flush=True)
        save_report(options, report)


if __name__ == "__main__":
    main()
