"""`DistillationTrainer`: the HF Trainer with a teacher beside the model."""

import copy
import functools
import inspect
import os
import re
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from datasets import Dataset as HFDataset
from huggingface_hub import CommitInfo
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import unset_hf_deepspeed_config
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length
from transformers.utils import logging

from cab_hf.data.documents import as_documents
from cab_hf.data.packing import IGNORE_INDEX, Documents, LanguageCollator, pack_documents
from cab_hf.distillation.checkpoints import (
    check_written_by,
    fill_everywhere,
    load_student,
    student_weights,
)
from cab_hf.distillation.checks import check_run, check_sharding, check_student
from cab_hf.distillation.cuda_graph import GraphedStep
from cab_hf.distillation.ema import MovingAverage
from cab_hf.distillation.evaluated_trainer import BatchTransform, EvaluatedTrainer
from cab_hf.distillation.losses import loss_weight
from cab_hf.distillation.modeling_distillation import (
    DistillationOutput,
)
from cab_hf.distillation.pushing import push_trainer
from cab_hf.distillation.training_args import LOSSES, DistillationTrainingArguments, rate_at_width
from cab_hf.export.loading import read_student
from cab_hf.lora import core_of
from cab_hf.teachers.examination import check_whole
from cab_hf.teachers.loading import load_any_teacher
from cab_hf.teachers.recorded_teacher import RecordedTeacher
from cab_hf.teachers.teacher import Teacher


logger = logging.get_logger(__name__)

BRIDGE_NAME = "bridge.safetensors"
EMA_NAME = "ema.safetensors"
BLOCK_SIZE = 512
NO_WEIGHT_DECAY = re.compile(
    r"(^|\.)(A_log|D|dt_bias|norm_f\.weight|class_token|register_tokens|position_embeddings|\w+_scale)$"
)


class DistillationTrainer(EvaluatedTrainer):
    """Trains a student, and the bridge that goes with it, under a frozen teacher.

    Everything else is the [`~transformers.Trainer`]'s: datasets, collators, callbacks, resume, distribution, logging.
    The student is saved by its own `save_pretrained`, without bridge and teacher; checkpoints also hold
    `bridge.safetensors`, so that a resumed run continues bit for bit.

    Args:
        student: a [`CABMambaForCausalLM`], or a PEFT model around one, or the Hub id or folder of one.
        teacher: a pretrained model, a [`Teacher`] made of one, the [`RecordedTeacher`] of one, or a Hub id or folder,
            whose tokenizer is then the default `processing_class`.
        args: weights, layer map and the rest of a run; by default those of [`DistillationTrainingArguments`], in the
            folder "trainer_output".
        trainer_kwargs: of [`~transformers.Trainer`], such as `train_dataset`, `eval_dataset`, `data_collator`,
            `processing_class`, `callbacks`. A data set may also be a list, of texts or dicts. Texts and conversations
            are packed into blocks of 512 tokens ([`~cab_hf.data.pack_documents`]: other lengths, documents kept
            apart).
        batch_transform: takes each batch, on its device, and whether it is trained on: augmentation, for instance
            [`~cab_hf.data.augmentation.ImageAugmentation`]. `teacher_pixel_values` beside `pixel_values` show the
            teacher the same images at its own size.
        train_sampler: order of the training examples, instead of the Trainer's.

    Raises:
        ValueError: a teacher whose attention can't be read, or that does not fit the student or the losses; an option
            of the Trainer that a distillation can't honour.

    Source: arXiv 2510.19266.

    Example:
        >>> from cab_hf import DistillationTrainer, DistillationTrainingArguments, student_from_teacher
        >>> texts = [{"text": f"{number} and {number} is {2 * number}. " * 60} for number in range(32)]
        >>> student = student_from_teacher("random-llama", data=texts)
        >>> args = DistillationTrainingArguments(max_steps=2, use_cpu=True, disable_tqdm=True, save_strategy="no")
        >>> trainer = DistillationTrainer(student, "random-llama", args, train_dataset=texts)
        >>> trainer.train().global_step  # doctest: +ELLIPSIS
        {...}
        2
    """

    # The loss is divided by the tokens of the whole optimizer step.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        student: nn.Module | str | os.PathLike,
        teacher: PreTrainedModel | Teacher | RecordedTeacher | str | os.PathLike,
        args: DistillationTrainingArguments | None = None,
        batch_transform: BatchTransform | None = None,
        train_sampler: Sampler | None = None,
        **trainer_kwargs,
    ):
        args = DistillationTrainingArguments() if args is None else args
        if isinstance(teacher, str | os.PathLike):
            teacher, tokenizer = load_any_teacher(os.fspath(teacher))
            trainer_kwargs.setdefault("processing_class", tokenizer)
        if isinstance(student, str | os.PathLike):
            student = read_student(os.fspath(student)).float()
        for name in ("train_dataset", "eval_dataset"):
            if name in trainer_kwargs:
                trainer_kwargs[name] = _rows(trainer_kwargs[name], trainer_kwargs)
        if args.n_gpu > 1:
            logger.warning(
                f"{args.n_gpu} GPUs are visible to one process, which uses the first. Start one process a GPU with "
                "`accelerate launch` to use them all."
            )
            args._n_gpu = 1
        check_student(student)
        if args.learning_rate is None:
            args.learning_rate = default_learning_rate(core_of(student).config)
        if not isinstance(teacher, Teacher | RecordedTeacher):
            teacher = make_teacher(teacher, args)
        check_run(core_of(student), teacher, args, trainer_kwargs)
        if args.trainable is not None:
            freeze_others(student, args.trainable)
        if args.torch_compile:
            teacher.compile(args.torch_compile_backend)
        self._part_sums = None
        self._parts_logged_at = 0
        self._constant_weights = {}
        self._graphed_step = None
        self._looks_at_labels = True
        self.train_sampler = train_sampler
        super().__init__(student, teacher, args, batch_transform, **trainer_kwargs)
        if args.ema_decay is not None:
            self._ema = MovingAverage(student, args.ema_decay)
            self.add_callback(self._ema)
        is_zero3 = self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3
        self._is_sharded = self.is_fsdp_enabled or is_zero3
        if self._is_sharded:
            check_sharding(args, self.accelerator.state, is_zero3)
            # Sharding takes a module's weights in place. The given one stays whole, and learns when training ends.
            self.model.student, self.model.touches_unused = copy.deepcopy(student), not is_zero3
            student.to("cpu")
            if self.is_fsdp_enabled:
                # Autocast, as without FSDP, whose own mixed precision would round A_log and the loss, too.
                self.accelerator.state.fsdp_plugin.mixed_precision_policy = None
            # Set again by the accelerator; with it every process waits for the others in `generate`.
            unset_hf_deepspeed_config()

    def __repr__(self) -> str:
        losses = ", ".join(f"{name}={self.args.courses[name].weight:g}" for name in self.args.used_losses)
        student, teacher = core_of(self.student), self.teacher.model if isinstance(self.teacher, Teacher) else None
        shown = "a record" if teacher is None else f"{type(teacher).__name__} ({teacher.num_parameters():,})"
        return (
            f"{type(self).__name__}(student={type(student).__name__} ({student.num_parameters():,}), teacher={shown}, "
            f"losses: {losses}, layer_map={self.args.layer_map!r})"
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As [`~cab_hf.distillation.stage_trainer.StageTrainer.train`]."""
        if resume_from_checkpoint:
            self._is_calibrated = True  # the scales are loaded
        else:
            self._calibrate_targets()
        self._part_sums = None
        output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if self._is_sharded:
            state_dict = self.accelerator.get_state_dict(self.model_wrapped)  # of the first process alone
            self.student.to(self.args.device)
            fill_everywhere(self.student, student_weights(self.student, state_dict or {}))
        return output

    def get_train_dataloader(self) -> DataLoader:
        """As [`~transformers.Trainer.get_train_dataloader`].

        Raises:
            ValueError: it has no batch: a run of no step would end as if it had trained. Or it is not tokenised.
        """
        self._check_columns()
        rows = len(self.train_dataset) if has_length(self.train_dataset) else None
        loader = None if rows == 0 else super().get_train_dataloader()
        if loader is None or (rows is not None and len(loader) == 0):
            args = self.args
            raise ValueError(
                f"`train_dataset` has {rows} rows, which make no batch: "
                f"`per_device_train_batch_size` is {args.per_device_train_batch_size} on {args.world_size} processes, "
                f"`dataloader_drop_last` {args.dataloader_drop_last}. Give more rows, smaller batches, or "
                "`dataloader_drop_last=False`."
            )
        return loader

    def _check_columns(self) -> None:
        dataset = self.train_dataset
        columns = dataset.column_names if isinstance(dataset, Documents) else None
        # A collator that tokenises gets the text only where no column is removed.
        if self._reads_images or columns is None or "input_ids" in columns or not self.args.remove_unused_columns:
            return
        raise ValueError(
            f"`train_dataset` has the columns {columns}, but no `input_ids`: it is not tokenised. Pass "
            "`cab_hf.data.packing.pack_documents(dataset, tokenizer, block_size)`, which reads a column `text` "
            "(`pad_documents` gives each document its own rows), or set `remove_unused_columns=False` for a "
            "`data_collator` that tokenises."
        )

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        return super()._get_train_sampler(train_dataset) if self.train_sampler is None else self.train_sampler

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = [*inspect.signature(self.model.core.forward).parameters, "labels", "label_ids"]
            if self._reads_images:
                # The Trainer's collator makes labels of a column `label`, as most image datasets name it.
                self._signature_columns += ["label", "teacher_pixel_values"]

    # The loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Real tokens and labels `(2,)` of an optimizer step, over all its batches and processes."""
        counts = sum(map(self._local_counts, batch_samples), start=torch.zeros(2, dtype=torch.long, device=device))
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, "sum")
        if self._looks_at_labels and batch_samples:
            self._looks_at_labels = False  # at the first step alone: the host waits for the device here
            of_labels = {"ce"} if self._reads_images else {"ce", "kl"}
            used = {name: self.args.courses[name].weight for name in self.args.used_losses}
            if used.keys() <= of_labels and "labels" in batch_samples[0] and int(counts[1]) == 0:
                given = " and ".join(f"`{name}_weight` is {weight}" for name, weight in used.items())
                logger.warning(
                    f"{given} and every other loss 0.0, but the first step's labels are all {IGNORE_INDEX}: nothing "
                    "is learnt from them. Check the dataset's `labels`, or leave them out and learn by `kl_weight`."
                )
        return counts

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, DistillationOutput]:
        """The weighted loss of one batch as its share of the optimizer step's mean over tokens."""
        if num_items_in_batch is None:
            num_items_in_batch = self._get_num_items_in_batch([inputs], self.args.device)
        weights, active = self._weights()
        outputs = self._distil(model, inputs, weights, active, num_items_in_batch)
        self._accumulate_parts(outputs.parts)
        # DDP and its kin average gradients over processes; the divisor already counts all of them.
        loss = outputs.loss * self.args.world_size
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        if not self.args.cuda_graph:
            return super().training_step(model, inputs, num_items_in_batch)
        if self._graphed_step is None:
            self._graphed_step = self._make_graphed_step(model)
        model.train()
        weights, active = self._weights()
        processes = self.args.world_size
        reduces = processes > 1 and self.accelerator.sync_gradients
        inputs = self._prepare_inputs(inputs)
        loss, parts = self._graphed_step(inputs, weights, active, num_items_in_batch, reduces)
        self._accumulate_parts(parts)
        return loss * processes  # the log has the processes' mean

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.cuda_graph:
            # DDP sends gradients in the middle of the backward pass, and holds nodes of it that a capture can't use.
            # So a graphed student is left as it is: the step adds gradients up behind the graph.
            prepare = self.accelerator.prepare_model
            self.accelerator.prepare_model = functools.partial(prepare, evaluation_mode=True)

    def _make_graphed_step(self, model: nn.Module) -> GraphedStep:
        self._check_graph()
        if self.args.world_size > 1:
            broadcast([one.detach() for one in (*model.parameters(), *model.buffers())])
        return GraphedStep(model, self._distil, accumulates=self.args.gradient_accumulation_steps > 1)

    def _check_graph(self) -> None:
        args, is_ddp = self.args, not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if args.device.type != "cuda" or not is_ddp:
            sharded = "" if is_ddp else " under FSDP or DeepSpeed"
            raise ValueError(
                f"`cuda_graph=True` is for students on GPUs that are not sharded; this one is on "
                f"{args.device.type}{sharded}. Set `cuda_graph=False`."
            )
        if args.fp16:
            raise ValueError(
                f"`cuda_graph=True` can't scale losses as `fp16={args.fp16}` needs. Use `bf16=True`, or set "
                "`cuda_graph=False`."
            )

    def _weights(self) -> tuple[Tensor, frozenset[str]]:
        """The loss weights `(6,)` at this moment of training, and the names of those that are not zero."""
        args = self.args
        progress = self.state.global_step / self.state.max_steps if self.state.max_steps > 0 else 0.0
        values = tuple(
            loss_weight(course.weight, progress, end=course.end, decay=course.decay)
            for course in args.courses.values()
        )
        if values not in self._constant_weights:
            # Filled on the device: copying them there would wait for it at every step of a decay.
            filled = [torch.full((), value, device=args.device) for value in values]
            self._constant_weights = {values: torch.stack(filled)}
        # Sharded weights that a step leaves out would have no gradient, or with ZeRO-3 the one of an earlier step.
        now = [name for name, value in zip(LOSSES, values) if value > 0]
        return self._constant_weights[values], frozenset(args.used_losses if self._is_sharded else now)

    # Logging

    def _accumulate_parts(self, parts: Tensor) -> None:
        if self._part_sums is None:
            self._part_sums, self._parts_logged_at = torch.zeros_like(parts), self.state.global_step
        self._part_sums = self._part_sums + parts

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._part_sums is not None:
            steps = max(self.state.global_step - self._parts_logged_at, 1)
            means = (self.accelerator.reduce(self._part_sums, "sum") / steps).tolist()
            logs.update({name: mean for name, mean in zip(LOSSES, means) if name in self.args.used_losses})
            self._part_sums = None
        super().log(logs, start_time)

    # The optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name in super().get_decay_parameter_names(model) if not NO_WEIGHT_DECAY.search(name)]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new:
            if self.args.mixer_learning_rate is not None:
                _set_rate(optimizer, core_of(self.model.student).mixer_list, self.args.mixer_learning_rate)
            if self.args.bridge_learning_rate is not None and self.model.bridge is not None:
                _set_rate(optimizer, [self.model.bridge], self.args.bridge_learning_rate)
        return optimizer

    # Checkpoints and the Hub

    def push_to_hub(self, *args: Any, teacher: str | None = None, **kwargs: Any) -> CommitInfo | Future | None:
        """Publishes the student with its card: see [`~cab_hf.distillation.pushing.push_trainer`] for the arguments."""
        teacher = teacher or self.teacher.model.name_or_path
        student = self.accelerator.unwrap_model(self.student)
        return push_trainer(self, student, teacher, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "`create_model_card` would write transformers' card of what is trained, which is no model of the Hub. Use "
            f"`push_to_hub`, or `cab-hf card {self.args.output_dir}`, whose card names teacher, data and metrics."
        )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        of_student = None if state_dict is None else student_weights(self.student, state_dict)
        self.student.save_pretrained(folder, state_dict=of_student)
        # A finished student ships without what only its training needed.
        if folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
            rest = {
                name: tensor.detach().cpu().contiguous()
                for name, tensor in (model.state_dict() if state_dict is None else state_dict).items()
                if not name.startswith("student.")
            }
            save_file(rest, folder / BRIDGE_NAME)
            if self._ema is not None:
                save_file(self._ema.state_dict(), folder / EMA_NAME)
        elif self._ema is not None and self._ema.has_started:
            with self._ema.in_place_of(model.student):
                model.student.save_pretrained(folder / "ema")
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        saved_args = copy.copy(self.args)
        saved_args.hub_token = None
        torch.save(saved_args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        model = self.accelerator.unwrap_model(self.model if model is None else model, keep_torch_compile=False)
        folder = Path(resume_from_checkpoint)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"`resume_from_checkpoint` is {str(folder)!r}, which is no folder (seen from {Path.cwd()}). True "
                "takes the newest whole checkpoint of `output_dir`."
            )
        if not (folder / BRIDGE_NAME).is_file():
            raise ValueError(
                f"{folder} has no {BRIDGE_NAME}: it is a student, not a checkpoint of a distillation. Pass it as the "
                "student instead of resuming from it."
            )
        if self._ema is not None and not (folder / EMA_NAME).is_file():
            raise ValueError(
                f"`ema_decay` is {self.args.ema_decay}, but {folder} has no {EMA_NAME}: its run kept no average. "
                "Leave `ema_decay` out, or train from the start."
            )
        rest = load_file(folder / BRIDGE_NAME)
        check_written_by(model, folder, rest)
        load_student(model.student, folder)
        model.load_state_dict(rest, strict=False)
        if self._ema is not None:
            self._ema.load_state_dict(load_file(folder / EMA_NAME))

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
            return
        logger.info(f"Loading the best student, of {self.state.best_model_checkpoint} ({self.state.best_metric}).")
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def _set_rate(optimizer: torch.optim.Optimizer, modules: Iterable[nn.Module], learning_rate: float) -> None:
    """Moves the modules' parameters to groups of their own, with a learning rate of their own."""
    chosen = {id(parameter) for module in modules for parameter in module.parameters()}
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in chosen]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
            optimizer.add_param_group({**group, "params": moved, "lr": learning_rate})


def default_learning_rate(config: PreTrainedConfig) -> float:
    """What a student with its teacher's weights is trained at: a language student of width 576 at 6e-4, an image
    student of width 384 at 5e-5, others at these times their width over the student's, at most doubled.

    Source: training_args/quickstart_lm.yaml and vision_default.yaml; arXiv 2203.03466, table 3.
    """
    rate, width = (5e-5, 384) if hasattr(config, "patch_size") else (6e-4, 576)
    return rate_at_width(rate, width, config.hidden_size)


def _rows(data: Any, given: dict[str, Any]) -> Any:
    """A data set as it is; of texts or conversations, in a list or a data set, their blocks."""
    if isinstance(data, dict):
        return {key: _rows(one, given) for key, one in data.items()}
    tokenizer = given.get("processing_class")
    is_list = isinstance(data, list) and data and isinstance(data[0], str | dict) and "input_ids" not in data[0]
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not (is_list or isinstance(data, HFDataset)):
        return data
    documents = as_documents(data)
    if not {"text", "conversation"} & set(documents.column_names) or "input_ids" in documents.column_names:
        return data
    if given.get("data_collator") is None:
        given["data_collator"] = LanguageCollator.of(tokenizer)
    return pack_documents(documents, tokenizer, BLOCK_SIZE, isolate_documents=False)


def make_teacher(model: PreTrainedModel, args: DistillationTrainingArguments) -> Teacher:
    """A [`Teacher`] on the device, in the dtype and with the rotary positions that the arguments ask for."""
    check_whole("teacher", model)
    return Teacher(
        model,
        device=torch.device(args.teacher_device or args.device),
        dtype=None if args.teacher_dtype is None else getattr(torch, args.teacher_dtype),
        remove_rotary=args.remove_rotary,
    )


def freeze_others(student: nn.Module, pattern: str) -> None:
    """Leaves only the student's parameters trainable whose names match `pattern` (searched anywhere).

    Raises:
        ValueError: if no name matches.
    """
    matches = re.compile(pattern)
    names = [name for name, _ in student.named_parameters()]
    if not any(matches.search(name) for name in names):
        raise ValueError(f"`trainable={pattern!r}` matches none of the student's parameters, such as {names[:3]}.")
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(bool(matches.search(name)))
