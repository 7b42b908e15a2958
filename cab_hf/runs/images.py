"""The image run of a recipe: an image classifier becomes a bidirectional Mamba; or a teacher is finetuned.

Shape legend: `b` image, `c` channel, `V` label.
"""

import copy
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
    set_seed,
)

from cab_hf.data.augmentation import AugmentationArguments, ImageAugmentation, two_sizes
from cab_hf.data.image_sources import (
    align_labels,
    class_balanced_fraction,
    load_images,
    pick_test_split,
    split_validation,
)
from cab_hf.data.images import (
    ImageDataset,
    RepeatedSampler,
    collate_images,
    make_image_processor,
    normalisation,
    processor_side,
)
from cab_hf.distillation.checkpoints import load_student
from cab_hf.distillation.stage_trainer import StageTrainer
from cab_hf.distillation.trainer import make_teacher
from cab_hf.distillation.training_args import DistillationTrainingArguments
from cab_hf.evaluation.images import compare_images
from cab_hf.recipe_options import DataArguments, ImageArguments, ModelArguments
from cab_hf.recipes import Recipe, Stage
from cab_hf.runs.inputs import check_inputs, digest_of
from cab_hf.runs.stages import finetune_stage, run_facts, run_stage, tell
from cab_hf.runs.student import build_student
from cab_hf.teachers.loading import load_image_teacher


PIPELINE = """
from transformers import pipeline
classifier = pipeline("image-classification", model=sys.argv[1], trust_remote_code=True)
print(", ".join(f"{answer['label']} {answer['score']:.3f}" for answer in classifier(sys.argv[2], top_k=3)))
"""


class ImageSets(NamedTuple):
    """What a run reads.

    Attributes:
        train: the share that is trained on.
        validation: images kept out of it, or None.
        test: images of the report.
        num_available: training images before the share was taken.
        names: of the labels.
    """

    train: ImageDataset
    validation: ImageDataset | None
    test: ImageDataset
    num_available: int
    names: list[str]

    @property
    def digests(self) -> dict[str, str]:
        """Of the labels, and of the pixels where they are in memory: others are too many to read for it."""
        sets = {"training images": self.train, "validation images": self.validation, "test images": self.test}
        return {
            name: digest_of(np.array(one.labels), *([] if one.pixel_values is None else [one.pixel_values.numpy()]))
            for name, one in sets.items()
            if one is not None
        }


class BatchTransform:
    """Augments batches on their device and shows student and teacher the same images, each at its own size."""

    def __init__(self, augmentation: ImageAugmentation, student_size: int, teacher_size: int):
        self.augmentation = augmentation
        self.student_size, self.teacher_size = student_size, teacher_size

    def __call__(self, batch: Mapping[str, Tensor], training: bool) -> dict[str, Tensor]:
        images, labels = self.augmentation.to(batch["pixel_values"].device)(
            batch["pixel_values"], batch["labels"], training
        )
        student_images, teacher_images = two_sizes(images, self.student_size, self.teacher_size)
        shown = {"pixel_values": student_images, "labels": labels}
        return shown if self.student_size == self.teacher_size else shown | {"teacher_pixel_values": teacher_images}


def make_transform(
    augmentation: AugmentationArguments,
    processor: BaseImageProcessor,
    names: list[str],
    student_size: int,
    teacher_size: int,
) -> BatchTransform:
    """The recipe's augmentation, then the normalisation of a processor."""
    mean, std = normalisation(processor)
    augments = ImageAugmentation(augmentation, mean=mean, std=std, num_labels=len(names))
    return BatchTransform(augments, student_size, teacher_size)


class ImageTrainer(StageTrainer):
    """The Trainer of a teacher: batches are augmented on their device, labels may be probabilities."""

    def __init__(self, *args, batch_transform: BatchTransform, **kwargs):
        super().__init__(*args, compute_loss_func=soft_cross_entropy, **kwargs)
        self.batch_transform = batch_transform

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.batch_transform(super()._prepare_inputs(inputs), self.model.training)


def soft_cross_entropy(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    """Cross-entropy of labels `(b,)` or probabilities `(b, V)`, the mean over the images of a batch.

    Gradient accumulation averages it over batches, which is right for batches of one size.
    """
    return F.cross_entropy(outputs.logits.float(), labels)


class Prepared(NamedTuple):
    """What a run of images reads before its student is made.

    Attributes:
        teacher_model, teacher_processor: the teacher.
        sets: the images.
        transform: what happens to a batch of them.
        size: side of the student's images, in pixels.
    """

    teacher_model: PreTrainedModel
    teacher_processor: BaseImageProcessor
    sets: ImageSets
    transform: BatchTransform
    size: int

    unit, units = 1, "images"

    @property
    def train(self) -> ImageDataset:
        return self.sets.train

    def rows_of(self, stage: Stage) -> ImageDataset:
        return self.train

    @property
    def facts(self) -> str:
        sets = self.sets
        return f"{len(sets.train):,} images to train on, {len(sets.test):,} to measure, {len(sets.names)} classes"

    @property
    def student_options(self) -> dict[str, Any]:
        return {"image_size": self.size, "labels": _label_fields(self.sets.names)}

    @property
    def trainer_options(self) -> dict[str, Any]:
        return {"data_collator": collate_images, "batch_transform": self.transform}


def prepare(recipe: Recipe, *, writes: bool = True) -> Prepared:
    """Reads teacher and images. A teacher writes none, whatever `writes` says."""
    args = recipe.args
    set_seed(args.seed)
    teacher_model, teacher_processor = load_image_teacher(recipe.model.teacher)
    tell(recipe, f"teacher: {type(teacher_model).__name__}, {teacher_model.num_parameters():,} parameters")
    teacher_size = processor_side(teacher_processor)
    size = recipe.images.image_size or teacher_size
    with args.main_process_first(desc="data"):
        sets = load_sets(
            recipe.data,
            recipe.images,
            recipe.images.load_size or max(size, teacher_size),
            args.seed,
            num_channels=teacher_model.config.num_channels,
            labels=None if teacher_model.base_model is teacher_model else teacher_model.config.id2label,
        )
    transform = make_transform(recipe.augmentation, teacher_processor, sets.names, size, teacher_size)
    prepared = Prepared(teacher_model, teacher_processor, sets, transform, size)
    tell(recipe, f"images: {prepared.facts}")
    return prepared


def distil_images(recipe: Recipe) -> dict[str, Any]:
    """Distils, compares and saves an image student; returns the report."""
    started = time.time()
    args = recipe.args
    prepared = prepare(recipe)
    teacher_model, teacher_processor, sets, transform, size = prepared
    teacher = make_teacher(teacher_model, args)
    set_seed(args.seed)  # the start does not depend on what was read before it
    batches = []
    if recipe.model.calibrates:
        batches = _calibration_batches(recipe.model.calibration_tokens, sets.train, transform, teacher_model)
    tell(recipe, "student: being made, and its start fitted to the teacher ...")
    start = build_student(recipe.model, teacher_model, args.layer_map, batches, **prepared.student_options)
    start.to(args.device)
    tell(recipe, f"student: {type(start).__name__}, {start.num_parameters():,} parameters; measuring it untrained")
    test_name = _test_name(recipe.data)

    def evaluate(student: nn.Module) -> dict[str, dict[str, Any]] | None:
        if not recipe.is_main_process:
            return None
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
            return {test_name: compare_images(student, teacher, _batches(sets.test, transform, args))}

    check_inputs(recipe.output_dir / "stages", sets.digests, recipe.is_main_process)
    before = evaluate(start)
    crop_pct = recipe.images.crop_pct if recipe.images.test_crop == "center_crop" else None
    processor = make_image_processor(teacher_processor, size, crop_pct=crop_pct)

    def train(stages: list[Stage]) -> tuple[PreTrainedModel, dict[str, Any]]:
        student = copy.deepcopy(start)
        histories = [
            run_stage(
                stage,
                student,
                teacher,
                (number, len(stages)),
                train_dataset=sets.train,
                eval_dataset=sets.validation,
                processing_class=processor,
                **prepared.trainer_options,
                train_sampler=_sampler(recipe.images.repeats, sets.train, stage.args.seed),
            )
            for number, stage in enumerate(stages, start=1)
        ]
        return student, {"before": before, "after": evaluate(student), "stages": histories}

    baselines = {baseline.name: train([baseline])[1] for baseline in recipe.baselines}
    student, result = train(recipe.stages)
    report = {
        "task": recipe.model.task,
        "method": recipe.model.method,
        "teacher": recipe.model.teacher,
        "dataset": recipe.data.dataset,
        "student_parameters": student.num_parameters(),
        "teacher_parameters": teacher_model.num_parameters(),
        "train_images": len(sets.train),
        "available_images": sets.num_available,
        "images_seen": sum(history["examples"] for history in result["stages"]),
        **result,
        "baselines": baselines,
        **run_facts(args),
        "folder": str(recipe.output_dir),
    }
    if args.ema_decay is not None:
        averaged = copy.deepcopy(student)
        load_student(averaged, Path(recipe.stages[-1].args.output_dir) / "ema")
        report["after_ema"] = evaluate(averaged)
        if recipe.is_main_process:
            averaged.save_pretrained(recipe.output_dir / "ema")
            processor.save_pretrained(recipe.output_dir / "ema")
    if recipe.is_main_process:
        student.save_pretrained(recipe.output_dir)
        processor.save_pretrained(recipe.output_dir)
    return report | {"seconds": round(time.time() - started, 1)}


def finetune(recipe: Recipe) -> dict[str, Any]:
    """Trains a teacher on labels and saves it with its processor; returns the report."""
    started = time.time()
    stage = recipe.only_stage
    args = stage.args
    set_seed(args.seed)
    size = recipe.images.image_size or _side(recipe.model.teacher_config.get("image_size", 224))
    with args.main_process_first(desc="data"):
        channels = recipe.model.teacher_config.get("num_channels", 3)
        sets = load_sets(recipe.data, recipe.images, recipe.images.load_size or size, args.seed, num_channels=channels)
    model, processor = new_image_teacher(recipe.model, size, sets.names)
    transform = make_transform(recipe.augmentation, processor, sets.names, size, size)
    check_inputs(recipe.output_dir / "stages", sets.digests, recipe.is_main_process)
    model, history = finetune_stage(
        stage,
        model,
        ImageTrainer,
        train_dataset=sets.train,
        eval_dataset=sets.validation,
        data_collator=collate_images,
        processing_class=processor,
        batch_transform=transform,
    )
    model.to(args.device)
    report = {
        "task": recipe.model.task,
        "teacher": recipe.model.teacher,
        "dataset": recipe.data.dataset,
        "teacher_parameters": model.num_parameters(),
        "train_images": len(sets.train),
        "available_images": sets.num_available,
        "after": {_test_name(recipe.data): compare_images(model, None, _batches(sets.test, transform, args))},
        "stages": [history],
        **run_facts(args),
        "folder": str(recipe.output_dir),
        "seconds": round(time.time() - started, 1),
    }
    if recipe.is_main_process:
        model.save_pretrained(recipe.output_dir)
        processor.save_pretrained(recipe.output_dir)
    return report


def new_image_teacher(
    arguments: ModelArguments, size: int, names: list[str]
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """The model that `finetune` starts from: new from `teacher_config`, or pretrained with a new classifier."""
    settings = dict(arguments.teacher_config)
    labels = _label_fields(names)
    if "model_type" in settings:
        config = AutoConfig.for_model(settings.pop("model_type"), **settings, **labels)
        channels = config.num_channels
        scale = {} if channels == 3 else {"mean": [0.5] * channels, "std": [0.5] * channels}
        return AutoModelForImageClassification.from_config(config), make_image_processor(size=size, **scale)
    model = AutoModelForImageClassification.from_pretrained(
        arguments.teacher, **settings, **labels, dtype=torch.float32, ignore_mismatched_sizes=True
    )
    return model, make_image_processor(AutoImageProcessor.from_pretrained(arguments.teacher), size)


def load_rows(data: DataArguments, images: ImageArguments) -> tuple[Dataset, Dataset]:
    """All training images and the test images of a run, not decoded yet."""
    if len(data.dataset) != 1:
        raise ValueError(f"`dataset` names {len(data.dataset)} sets of images, {data.dataset}; name one.")
    loaded = load_images(
        data.dataset[0],
        config_name=data.dataset_config,
        data_dir=images.data_dir,
        image_column=images.image_column,
        label_column=images.label_column,
    )
    train, test, _ = pick_test_split(loaded, data.dataset_split, images.test_split, data.dataset[0])
    if train is None:
        raise ValueError(
            f"`dataset_split` is {data.dataset_split!r} ('train' if not given), but {data.dataset[0]} has the splits "
            f"{list(loaded)}. Name one."
        )
    return train, test


def load_sets(
    data: DataArguments,
    images: ImageArguments,
    size: int,
    seed: int,
    *,
    num_channels: int = 3,
    labels: Mapping[int, str] | None = None,
) -> ImageSets:
    """The images of a run at one size, labelled in the order of a teacher's `labels`; shares are drawn by the seed."""
    rows, test_rows = load_rows(data, images)
    available, validation = rows, None
    if images.validation_fraction > 0:
        kept, held = split_validation(rows["label"], images.validation_fraction, seed=seed)
        available, validation = rows.select(kept), rows.select(held)
    chosen = class_balanced_fraction(available["label"], images.train_fraction, seed=seed)
    train = available if len(chosen) == len(available) else available.select(chosen)

    names = list(rows.features["label"].names)
    places = list(range(len(names)))
    if labels is not None:
        names, places = align_labels(names, [labels[index] for index in range(len(labels))], data.dataset[0])

    def read(rows: Dataset, **options: Any) -> ImageDataset:
        dataset = ImageDataset(rows, size, num_channels=num_channels, skip_broken=images.skip_broken, **options)
        dataset.labels = [places[label] for label in dataset.labels]
        return dataset

    at_rest = {"transform": images.test_crop, "crop_pct": images.crop_pct}
    return ImageSets(
        train=read(train, transform=images.train_crop),
        validation=None if validation is None else read(validation, **at_rest),
        test=read(test_rows, **at_rest),
        num_available=len(rows),
        names=names,
    )


def _label_fields(names: list[str]) -> dict[str, dict]:
    """The fields of a config that name its labels."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def _calibration_batches(
    num_tokens: int, images: ImageDataset, transform: BatchTransform, teacher: PreTrainedModel
) -> list[dict[str, Tensor]]:
    """Training images, not augmented, of about `num_tokens` patches."""
    if transform.student_size != transform.teacher_size:
        raise ValueError(
            f"`calibration` compares both models on the same images, but `image_size` is {transform.student_size} and "
            f"the teacher's {transform.teacher_size}. Set `calibration: none`, or use the teacher's size."
        )
    patches = (transform.teacher_size // _side(teacher.config.patch_size)) ** 2
    count = min(max(num_tokens // patches, 1), len(images))
    batches = DataLoader(torch.utils.data.Subset(images, range(count)), batch_size=64, collate_fn=collate_images)
    device = teacher.device
    return [
        {"pixel_values": transform({name: x.to(device) for name, x in batch.items()}, False)["pixel_values"]}
        for batch in batches
    ]


def _batches(
    dataset: ImageDataset, transform: BatchTransform, args: DistillationTrainingArguments
) -> Iterable[dict[str, Tensor]]:
    loader = DataLoader(
        dataset, args.eval_batch_size, collate_fn=collate_images, num_workers=args.dataloader_num_workers
    )
    for batch in tqdm(loader, desc="Evaluating", disable=args.disable_tqdm):
        yield transform({name: x.to(args.device) for name, x in batch.items()}, False)


def _test_name(data: DataArguments) -> str:
    return f"{Path(data.dataset[0]).name} test images"


def _sampler(repeats: int, dataset: ImageDataset, seed: int) -> RepeatedSampler | None:
    return RepeatedSampler(len(dataset), repeats, seed=seed) if repeats > 1 else None


def _side(size: int | list[int] | tuple[int, ...]) -> int:
    if isinstance(size, int):
        return size
    if len(set(size)) != 1:
        raise ValueError(f"Images or patches of {tuple(size)} pixels are not square; recipes are for square ones.")
    return size[0]


def write_test_image(recipe: Recipe, folder: Path) -> str:
    """Saves the first test image as a file and returns its path."""
    path = folder / "image.png"
    load_rows(recipe.data, recipe.images)[1][0]["image"].save(path)
    return str(path)


def image_summary(report: dict[str, Any]) -> str:
    """A short table of a report, for the terminal."""
    if report["after"] is None:
        return ""
    lines = []
    for name, after in report["after"].items():
        lines += ["", f"{name} (n = {after['n_images']:,}); trained on {report['train_images']:,} of "
                  f"{report['available_images']:,} images"]  # fmt: skip
        lines.append(f"  {'':<24}{'top-1':>8}{'95 % interval':>18}{'KL to teacher':>16}{'agreement':>12}")
        rows = []
        if "teacher_top1" in after:
            rows.append(("teacher", "teacher", after))
        rows += [(method, "student", result["after"][name]) for method, result in report.get("baselines", {}).items()]
        rows.append((report.get("method", "teacher"), "student", after))
        if "after_ema" in report:
            rows.append((f"{report['method']}, averaged", "student", report["after_ema"][name]))
        for title, who, numbers in rows:
            low, high = numbers[f"{who}_top1_ci95"]
            line = f"  {title:<24}{numbers[f'{who}_top1']:>8.3f}{f'{low:.3f} to {high:.3f}':>18}"
            if who == "student" and "kl" in numbers:
                line += f"{numbers['kl']:>16.3f}{numbers['agreement']:>12.3f}"
            lines.append(line)
    kind = "student" if "method" in report else "model"
    lines += [
        "",
        f"{report['seconds']:,.0f} s on {report['hardware']}",
        "",
        f"The {kind} is in {report['folder']}",
        "",
    ]
    return "\n".join(lines)
