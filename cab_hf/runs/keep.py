"""`keep_attention: auto:N` in a run: attention is kept aside, chosen once the mixers are aligned, and put back."""

import importlib.util
import json
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel

from cab_hf.evaluation.kept_attention import GAPS, check_count, choice_table, choose_attention
from cab_hf.evaluation.plots import kept_attention
from cab_hf.files import read_json, write_whole
from cab_hf.models import CABHybridForCausalLM
from cab_hf.recipes import Recipe
from cab_hf.runs.stages import tell
from cab_hf.teachers.alignment import parse_layer_map
from cab_hf.transfer import attention_for, put_back
from cab_hf.transfer.hybrid import evenly_spread


CHOICE_NAME, PICTURE_NAME = "keep_attention.json", "keep_attention.png"
TEXT_TOKENS = 8192


def num_alignments(recipe: Recipe) -> int:
    """The stages before the choice: those at the start that learn neither from logits nor from labels."""
    for number, stage in enumerate(recipe.stages):
        if {"kl", "ce"} & set(stage.args.used_losses):
            return number
    return len(recipe.stages)


def attention_to_choose_from(
    recipe: Recipe, student: PreTrainedModel, teacher: PreTrainedModel
) -> dict[str, nn.Module]:
    """Copies of all attention that mixers stand for, where the recipe is to choose of it; else nothing.

    Args:
        recipe: of the run.
        student: before its first stage.
        teacher: with the weights that it was loaded with.

    Raises:
        ValueError: the student is no hybrid, has too few layers, or a stage says which layer teaches which, by number.
    """
    check_choice(recipe, student)
    return {} if recipe.model.num_chosen is None else attention_for(student, teacher)


def check_choice(recipe: Recipe, student: PreTrainedModel) -> None:
    """That a recipe's layers can be chosen in a student, if any are to be.

    Raises:
        ValueError: as `attention_to_choose_from`.
    """
    count = recipe.model.num_chosen
    if count is None:
        return
    if not isinstance(student, CABHybridForCausalLM):
        raise ValueError(
            f"`keep_attention` is 'auto:{count}', but the student is a {type(student).__name__}, which has no place "
            "for attention. Leave `student` and `student_from` out, or name a hybrid made with `keep_attention: n=0`."
        )
    check_count(count, len(student.mixers))
    for stage in recipe.stages:
        if not isinstance(parse_layer_map(stage.args.layer_map), str):
            raise ValueError(
                f"`layer_map` is {stage.args.layer_map!r}, but with `keep_attention: auto:{count}` the student's "
                "layers become fewer, and each is taught by the one in whose place it stands. Leave `layer_map` out."
            )


def keep_attention(
    recipe: Recipe,
    student: CABHybridForCausalLM,
    teacher: PreTrainedModel,
    attention: dict[str, nn.Module],
    train_blocks: Dataset,
    vocabulary: Sequence[int],
) -> dict[str, Any]:
    """Chooses layers of attention, on the first process, and puts them back on all; a choice in the folder is kept.

    Args:
        recipe: of the run, whose folder then holds the choice as JSON and picture.
        student: aligned; from here on it keeps the chosen layers.
        teacher: of all stages.
        attention: of `attention_to_choose_from`.
        train_blocks: rows that the run trains on.
        vocabulary: tokens to test copying with.

    Returns:
        What [`~cab_hf.evaluation.choose_attention`] does.
    """
    args, path, choices = recipe.args, recipe.output_dir / CHOICE_NAME, [None]
    if recipe.is_main_process:
        if not path.is_file():
            tell(recipe, f"choosing {recipe.model.num_chosen} of {len(attention)} layers whose attention is kept ...")
            rows = min(-(-TEXT_TOKENS // recipe.data.block_size), len(train_blocks))
            with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
                choice = choose_attention(
                    student,
                    teacher,
                    attention,
                    recipe.model.num_chosen,
                    train_blocks.select(evenly_spread(rows, len(train_blocks))),
                    vocabulary,
                    by=recipe.model.keep_attention_by,
                    gaps=recipe.data.recall_gaps or GAPS,
                    batch_size=recipe.data.eval_batch_size,
                )
            write_whole(path, json.dumps(choice, indent=1))
            if importlib.util.find_spec("matplotlib") is not None:
                kept_attention(choice, path.with_name(PICTURE_NAME))
        choices = [read_json(path)]
        tell(recipe, choice_table(choices[0]))
    (choice,) = broadcast_object_list(choices)
    put_back(student, {path: attention[path] for path in choice["kept"]})
    return choice
