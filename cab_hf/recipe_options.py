"""The options of a recipe: what it may say of models, texts and images, beside augmentation and training."""

from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from cab_hf.data.augmentation import AugmentationArguments
from cab_hf.data.packing import LossOn
from cab_hf.distillation.training_args import DistillationTrainingArguments


@dataclass
class ModelArguments:
    """Teacher and student of a run."""

    task: Literal["text-generation", "image-classification"] = field(
        default="text-generation", metadata={"help": "What the models do: text-generation or image-classification."}
    )
    teacher: str = field(
        default="smollm2-demo",
        metadata={
            "help": "Hub id or folder of the teacher. 'smollm2-demo': SmolLM2-135M-Instruct, dequantised from 4 bit, "
            "out of a PyPI package. 'random-llama': a tiny random one, for tests."
        },
    )
    teacher_recipe: str | None = field(
        default=None, metadata={"help": "Recipe that makes the teacher where its folder is missing."}
    )
    finetune: bool = field(
        default=False, metadata={"help": "Train the teacher itself, on labels, and save it; no student."}
    )
    teacher_config: dict = field(
        default_factory=dict,
        metadata={
            "help": "With `finetune` of an image classifier: fields of a new model's config, `model_type` among them, "
            "or those to change in a loaded one."
        },
    )
    student: str | None = field(default=None, metadata={"help": "Hub id or folder of a student to go on with."})
    student_from: Literal["teacher", "config"] = field(
        default="teacher",
        metadata={
            "help": "Without `student`: build one of the teacher's shape and weights, or from the 'config' alone."
        },
    )
    student_config: dict = field(
        default_factory=dict,
        metadata={
            "help": "Fields of CABMambaConfig or CABVisionMambaConfig for a new student (on the command line: "
            "'{state_size: 32}')."
        },
    )
    num_hidden_layers: int | None = field(
        default=None, metadata={"help": "Layers of a new student; the teacher's if not given."}
    )
    mixer_type: str = field(default="mamba2", metadata={"help": "Mixer of a new student: mamba or mamba2."})
    start: Literal["linear", "served"] = field(
        default="linear",
        metadata={
            "help": "Start of a language student's mixers: 'linear', or 'served', which float16, 8-bit formats and "
            "llama.cpp hold (student_from: teacher)."
        },
    )
    keep_rotary: bool = field(
        default=False,
        metadata={
            "help": "States turn from token to token as the teacher's rotary positions turn queries and keys "
            "(student_from: teacher)."
        },
    )
    copy_weights: bool = field(
        default=True, metadata={"help": "Copy what does not depend on the mixer (student_from: teacher)."}
    )
    copy_attention: bool = field(
        default=True, metadata={"help": "Copy V, K, Q, O to x, B, C, out (student_from: teacher)."}
    )
    keep_attention: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Layers whose attention stays: one number 'n=4' (evenly spread), or indices among the layers that "
            "attend, or paths of their modules. 'auto:4' aligns mixers in all layers first, then measures which "
            "attention is missed most. The student is a hybrid then, with 'n=0' too."
        },
    )
    keep_attention_by: Literal["both", "kl", "copying", "evenly"] = field(
        default="both",
        metadata={
            "help": "What 'auto:N' keeps: layers whose mixers alone cost most in 'kl' to the teacher, 'copying', or "
            "'both' (a layer's share of all layers' KL and of all lost copying); or layers spread 'evenly'."
        },
    )
    attention_window: int = field(
        default=0,
        metadata={
            "help": "Tokens that attention beside each mixer sees; 0: none stays there. A state then holds what is "
            "farther away, and the student, a hybrid, starts as its teacher with a window."
        },
    )
    attention_sinks: int = field(
        default=4,
        metadata={
            "help": "First tokens of a row that it sees, too, with `attention_window`; none in layers that attend in "
            "a window of their own."
        },
    )
    accept_inexact: float = field(
        default=0.0,
        metadata={"help": "Largest relative error of what is read of the teacher's attention, where it is not exact."},
    )
    calibration: Literal["fit", "rms", "none"] = field(
        default="fit",
        metadata={
            "help": "Start of a student with copied weights: 'fit' its output projections to the teacher's attention "
            "(ridge regression), 'rms': only scale them, or 'none'."
        },
    )
    calibration_tokens: int = field(default=4096, metadata={"help": "Training tokens that the calibration reads."})
    license: str | None = field(
        default=None, metadata={"help": "Licence of the student, for its card; the teacher's if known."}
    )
    cpu_threads: int | None = field(
        default=None,
        metadata={"help": "Threads of torch on a CPU: `accelerate launch` gives one if not told otherwise."},
    )
    measured_width: int | None = field(
        default=None,
        metadata={"help": "Teacher's width that learning rates were measured at; `cab-hf distill` follows others."},
    )
    method: str = field(default="student", metadata={"help": "What the result table calls this run's student."})

    @property
    def reads_images(self) -> bool:
        return self.task == "image-classification"

    @property
    def num_chosen(self) -> int | None:
        """The layers of attention that are chosen by measuring: N of `keep_attention: auto:N`; None without it.

        Raises:
            ValueError: there is no number, or something beside it; or a way to choose and nothing to choose.
        """
        is_auto = any(str(one).startswith("auto") for one in self.keep_attention)
        count = str(self.keep_attention[0]).removeprefix("auto:") if is_auto else ""
        if is_auto and (len(self.keep_attention) > 1 or not count.isdigit() or int(count) < 1):
            raise ValueError(
                f"`keep_attention` is {self.keep_attention}. Write 'auto:4' alone, with a number from 1 on, or "
                "name the layers."
            )
        if not is_auto and self.keep_attention_by != default_of("keep_attention_by"):
            raise ValueError(
                f"`keep_attention_by` is {self.keep_attention_by!r}, but `keep_attention` is {self.keep_attention}: "
                "nothing is chosen. Set it to 'auto:N', or leave `keep_attention_by` out."
            )
        return int(count) if is_auto else None

    @property
    def calibrates(self) -> bool:
        """Whether a new student's start is calibrated on training data."""
        return (
            self.student is None
            and self.student_from == "teacher"
            and self.copy_weights
            and self.calibration != "none"
        )


@dataclass
class DataArguments:
    """Text of a run, and what is evaluated on it."""

    dataset: list[str] = field(
        default_factory=lambda: ["builtin"],
        metadata={
            "help": "Hub ids, files, folders or globs of text; 'builtin': Python's language reference. Of images one: "
            "digits, cifar10, imagefolder (with data_dir), a saved data set or a Hub id."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub dataset, such as wikitext-2-raw-v1."}
    )
    dataset_split: str | None = field(default=None, metadata={"help": "Split of a dataset; 'train' if not given."})
    text_column: str | None = field(
        default=None,
        metadata={
            "help": "Column that holds the text, or lists of messages; if not given 'text', or else 'messages', or "
            "'prompt' and 'completion'."
        },
    )
    loss_on: LossOn = field(
        default="all",
        metadata={"help": "Tokens of conversations to learn: 'all', or those of the 'assistant' alone."},
    )
    encoding: str = field(
        default="utf-8", metadata={"help": "Encoding of text files without a byte order mark, such as latin-1."}
    )
    holdout: str = field(
        default="0.1",
        metadata={
            "help": "Documents to evaluate on: a fraction, a number, a file, a glob such as 'doc0*', or a regular "
            "expression over their names."
        },
    )
    eval_dataset: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Texts to evaluate on, 'name=source' each; all of `dataset` is trained on then, none held out."
        },
    )
    block_size: int = field(default=512, metadata={"help": "Tokens a training example."})
    isolate_documents: bool = field(default=True, metadata={"help": "Keep documents apart that share a block."})
    num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenise."})
    eval_max_tokens: int | None = field(
        default=65536, metadata={"help": "Tokens of the evaluation of each text, at most."}
    )
    eval_batch_size: int = field(default=8, metadata={"help": "Rows of a batch of the evaluation."})
    teacher_tokens: int = field(
        default=0,
        metadata={"help": "Tokens that the teacher writes first, from nothing, trained on beside the data."},
    )
    teacher_continuation_tokens: int = field(
        default=0,
        metadata={"help": "Tokens that the teacher writes first, on from pieces of the training text; likewise."},
    )
    teacher_prompt_length: int | None = field(
        default=None, metadata={"help": "Tokens of such a piece, at least 2; 16 if not given."}
    )
    teacher_batch_size: int = field(default=64, metadata={"help": "Documents that the teacher writes side by side."})
    repeat_fraction: float = field(
        default=0.0,
        metadata={"help": "Share of the training rows in which spans come again after a gap, to learn copying from."},
    )
    fact_fraction: float = field(
        default=0.0,
        metadata={"help": "Share of the training rows in which facts are told and later asked for, to learn finding."},
    )
    recall_gaps: list[int] = field(
        default_factory=list,
        metadata={"help": "Also test copying over these gaps, in tokens: perplexity does not show it."},
    )
    sample_prompt: str = field(
        default="The",
        metadata={
            "help": "Prompt of the printed sample; where conversations are learnt, the user's turn (a question if not "
            "given); empty: no sample."
        },
    )
    sample_tokens: int = field(default=48, metadata={"help": "Tokens of the sample."})
    verify_reload: bool = field(
        default=False,
        metadata={"help": "Load the saved student in a fresh process without cab_hf and generate there."},
    )


@dataclass
class ImageArguments:
    """Images of a run."""

    data_dir: str | None = field(default=None, metadata={"help": "Folder of the images, where `dataset` needs one."})
    image_column: str | None = field(default=None, metadata={"help": "Column that holds the images."})
    label_column: str | None = field(default=None, metadata={"help": "Column that holds the labels."})
    test_split: str | None = field(
        default=None,
        metadata={
            "help": "Split to report on; if not given a labelled 'test' or 'validation', or a fifth of the rest."
        },
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the student's images in pixels; the teacher's if not given."}
    )
    load_size: int | None = field(
        default=None,
        metadata={
            "help": "Side at which images are read and augmented, before each model's resize; the larger model's if "
            "not given. Small images need no enlarging before they are on the device."
        },
    )
    train_fraction: float = field(
        default=1.0, metadata={"help": "Class-balanced share of the training images, drawn by the seed."}
    )
    validation_fraction: float = field(
        default=0.0,
        metadata={"help": "Share of the training images kept apart to evaluate on while training, off the test set."},
    )
    train_crop: Literal["resize", "random_resized_crop"] = field(
        default="resize", metadata={"help": "Training images: 'resize' (and shift) or 'random_resized_crop'."}
    )
    test_crop: Literal["resize", "center_crop"] = field(
        default="resize", metadata={"help": "Test images: 'resize' or 'center_crop'."}
    )
    crop_pct: float = field(default=0.875, metadata={"help": "Share of the short side that 'center_crop' keeps."})
    skip_broken: bool = field(
        default=False, metadata={"help": "Leave out images that can't be read, with a warning that names them."}
    )
    repeats: int = field(default=1, metadata={"help": "Repeated augmentation: times an image comes in a row."})


ARGUMENT_CLASSES = (
    ModelArguments,
    DataArguments,
    ImageArguments,
    AugmentationArguments,
    DistillationTrainingArguments,
)
STAGE_FIELDS = {field.name for field in fields(DistillationTrainingArguments) if field.init} - {"output_dir"}


def known_options() -> set[str]:
    return {field.name for kind in ARGUMENT_CLASSES for field in fields(kind) if field.init}


def default_of(name: str) -> Any:
    """What an option is where a recipe does not give it; None for one without a default, and for a list of runs."""
    option = next((one for kind in ARGUMENT_CLASSES for one in fields(kind) if one.name == name), None)
    if option is None or option.default is not MISSING:
        return None if option is None else option.default
    return None if option.default_factory is MISSING else option.default_factory()
