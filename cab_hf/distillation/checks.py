"""What a distillation can't do is said before it starts.

Each check raises a ValueError that names the argument, what stands against it, and the way out.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import validate_quantization_for_training
from transformers.utils import logging

from cab_hf.distillation.training_args import DistillationTrainingArguments
from cab_hf.lora import core_of
from cab_hf.teachers.alignment import parse_layer_map, taught_layers
from cab_hf.teachers.examination import check_whole
from cab_hf.teachers.recorded_teacher import RecordedTeacher
from cab_hf.teachers.teacher import Teacher, check_vocabularies


logger = logging.get_logger(__name__)


def check_student(student: nn.Module) -> None:
    """That the student is whole, and that its layers show what a distillation compares."""
    check_whole("student", student)
    validate_quantization_for_training(student)
    if hasattr(student, "_orig_mod"):
        raise ValueError(
            "The student is a torch.compile of a model, which hides the weights' own names. Pass the model itself and "
            "`torch_compile=True`."
        )
    core = core_of(student)
    shows = (inspect.signature(part.forward).parameters for part in (core, core.base_model))
    if not any("projections_callback" in parameters for parameters in shows):
        raise ValueError(
            f"The student is a {type(core).__name__}, whose layers show no B and C. Pass a CABMambaForCausalLM, a "
            "CABHybridForCausalLM or a CABVisionMambaForImageClassification, and the teacher after it: "
            "DistillationTrainer(student, teacher, args)."
        )


def check_run(
    student: PreTrainedModel,
    teacher: Teacher | RecordedTeacher,
    args: DistillationTrainingArguments,
    trainer_kwargs: Mapping[str, Any],
) -> None:
    """That student, teacher and arguments fit each other; what the teacher shows at all, its examination has said."""
    _check_causality(teacher, args)
    if args.bridge_weight > 0 or args.output_weight > 0 or args.attention_weight > 0:
        teacher.check_shows_attention(maps=args.attention_weight > 0)
    tokenizer = trainer_kwargs.get("processing_class")
    tokenizer = tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None
    _check_outputs(student, teacher, args.kl_weight, tokenizer)
    _check_widths(student.config, teacher, args)
    if args.cuda_graph and isinstance(teacher, RecordedTeacher):
        raise ValueError(
            f"`cuda_graph` is {args.cuda_graph}, but a recorded teacher is read from disk at every step, which no "
            "graph can do. Set `cuda_graph=False`, or pass the teacher itself."
        )
    if args.attention_weight > 0 and isinstance(teacher, RecordedTeacher):
        raise ValueError(
            f"`attention_weight` is {args.attention_weight}, but a record holds no attention maps, and none can be "
            "made of queries and keys alone. Pass the teacher itself, or set `attention_weight=0.0`."
        )
    if teacher.removes_rotary != args.remove_rotary:
        raise ValueError(
            f"`remove_rotary` is {args.remove_rotary} in the arguments, but the given Teacher was made with "
            f"{teacher.removes_rotary}. Use the same value for both, or pass the model instead of a Teacher."
        )
    turns = any(getattr(mixer, "pairs", 0) for mixer in core_of(student).mixer_list)
    if args.bridge_weight > 0 and turns and not args.remove_rotary:
        logger.warning(
            "The student's states turn, so its B and C stand for keys and queries before their rotary positions, and "
            "the bridge compares them with those behind. Set `remove_rotary=True`."
        )
    if args.neftune_noise_alpha is not None and teacher.reads_images:
        raise ValueError(
            f"`neftune_noise_alpha` is {args.neftune_noise_alpha}, but its noise is for the embeddings of tokens. "
            "Leave it out for images."
        )
    for name in ("compute_metrics", "compute_loss_func", "model_init", "preprocess_logits_for_metrics"):
        if trainer_kwargs.get(name) is not None:
            raise ValueError(
                f"`{name}` is not used here: evaluation keeps no logits, the losses are the arguments' weights, and "
                "the student is given. Leave it out; `cab_hf.evaluation` measures a finished student."
            )


def _check_widths(
    config: PreTrainedConfig, teacher: Teacher | RecordedTeacher, args: DistillationTrainingArguments
) -> None:
    if args.output_weight > 0:
        taught = taught_layers(config, teacher, parse_layer_map(args.layer_map))
        widths = [teacher.query_sizes[index] for index in taught]
        if widths != config.mixer_widths:
            ours, widths = sorted(set(config.mixer_widths)), sorted(set(widths))
            raise ValueError(
                f"`output_weight` compares the student's mixers, {str(ours).strip('[]')} wide, with the teacher's "
                f"attention, {widths} wide. Use a student of the teacher's shape (student_from_teacher), or "
                "`bridge_weight`, whose MLPs map between widths."
            )
    if args.hidden_weight > 0 and config.hidden_size != teacher.hidden_size:
        raise ValueError(
            f"`hidden_weight` compares hidden states, but the student's `hidden_size` is {config.hidden_size} and "
            f"the teacher's {teacher.hidden_size}. Use equal sizes, or `bridge_weight`."
        )


def _check_outputs(
    student: PreTrainedModel,
    teacher: Teacher | RecordedTeacher,
    kl_weight: float,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """That student and teacher read the same kind of input and predict the same things."""
    reads_images = student.main_input_name == "pixel_values"
    if reads_images != teacher.reads_images:
        student_input, teacher_input = (
            "pixel_values" if reads else "input_ids" for reads in (reads_images, teacher.reads_images)
        )
        raise ValueError(
            f"The student reads {student_input!r} and the teacher {teacher_input!r}. Use a CABMambaForCausalLM "
            "for a language model, a CABVisionMambaForImageClassification for an image model."
        )
    if not reads_images:
        if student.get_output_embeddings() is None:
            raise ValueError(
                f"The student {type(student).__name__} predicts no tokens, which every language distillation "
                "compares. Distil a CABMambaForCausalLM; a CABMambaForSequenceClassification then starts from its "
                "folder (from_pretrained), for a plain Trainer."
            )
        if kl_weight > 0 and teacher.is_causal and not teacher.predicts_tokens:
            raise ValueError(
                f"`kl_weight` is {kl_weight}, but the teacher {type(teacher.model).__name__} predicts no tokens. "
                "Load it with AutoModelForCausalLM, or set `kl_weight=0.0`."
            )
        if teacher.vocab_size is not None:
            check_vocabularies(student.config.vocab_size, teacher.vocab_size, tokenizer, tokenizer)
    elif kl_weight > 0:
        if not teacher.has_logits:
            raise ValueError(
                f"`kl_weight` is {kl_weight}, but the teacher {type(teacher.model).__name__} has no classifier. "
                "Set `kl_weight=0.0` and a `ce_weight`, and learn from the bridge and labels, or give the teacher "
                "a classifier first (finetune)."
            )
        ours, theirs = student.config.num_labels, teacher.num_labels
        if ours != theirs:
            raise ValueError(
                f"The student has num_labels={ours} and the teacher num_labels={theirs}, which the KL compares. "
                "Give the student the teacher's labels, or set `kl_weight=0.0`."
            )


def _check_causality(teacher: Teacher | RecordedTeacher, args: DistillationTrainingArguments) -> None:
    """What a language student sees, its teacher must not see more of: it can't learn to know the future."""
    if teacher.reads_images or teacher.is_causal:
        return
    name = type(teacher.model).__name__
    for option in ("kl_weight", "ce_weight"):
        if getattr(args, option) > 0:
            raise ValueError(
                f"`{option}` is {getattr(args, option)}, but the teacher {name} is bidirectional: its outputs have "
                "seen the tokens that a causal student should predict. Use a causal language model (BERT and its kin: "
                f"with is_decoder=True), or set `{option}=0.0` and train the mixers alone."
            )
    logger.warning(
        f"The teacher {name} is bidirectional: beyond its first layer, what {args.used_losses} compare has seen "
        "tokens that a causal student has not, and can't be learnt wholly."
    )


def check_sharding(args: DistillationTrainingArguments, state: Any, is_zero3: bool) -> None:
    """That the arguments ask for nothing that needs the whole student, and that its weights can be gathered.

    Args:
        args: of the run.
        state: accelerate's.
        is_zero3: whether DeepSpeed shards, and not FSDP.
    """
    kind = "ZeRO-3" if is_zero3 else "FSDP"
    if args.ema_decay is not None:
        raise ValueError(
            f"`ema_decay` is {args.ema_decay}, but {kind} keeps no process with the whole student to average. Use "
            "DDP, or leave `ema_decay` out."
        )
    if args.attention_weight > 0:
        raise ValueError(
            f"`attention_weight` is {args.attention_weight}, but maps are made outside the student's blocks, and "
            f"{kind} has their weights whole only inside. Use DDP, or set `attention_weight=0.0`."
        )
    if is_zero3:
        zero = state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        if not zero.get("stage3_gather_16bit_weights_on_model_save", False):
            raise ValueError(
                "ZeRO-3 does not gather the student's weights, so that none could be saved. Set "
                "`zero3_save_16bit_model: true` in accelerate's config, or "
                "`stage3_gather_16bit_weights_on_model_save` in DeepSpeed's."
            )
    elif state.fsdp_plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "`fsdp_cpu_ram_efficient_loading` is true, which loads models on the first process only, but each "
            "process asks its own teacher. Set it to false in accelerate's config."
        )
    elif "FULL_STATE_DICT" not in str(state.fsdp_plugin.state_dict_type):
        raise ValueError(
            f"`fsdp_state_dict_type` is {state.fsdp_plugin.state_dict_type}, which saves no whole student. Set "
            "`fsdp_state_dict_type: FULL_STATE_DICT` in accelerate's config."
        )
