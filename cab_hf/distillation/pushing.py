"""Pushes what a trainer has made."""

import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard
from transformers import PreTrainedModel, Trainer

from cab_hf.hub.adapters import adapter_card, write_adapter_card
from cab_hf.hub.card import build_card, write_card
from cab_hf.hub.publish import ADAPTER_CONFIG_NAME, CARD_NAME, publish_folder


def push_trainer(
    trainer: Trainer,
    student: PreTrainedModel,
    teacher: str | None,
    commit_message: str = "End of training",
    blocking: bool = True,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    **card: Any,
) -> CommitInfo | Future[CommitInfo] | None:
    """Saves a trainer's student and publishes it as `hub_model_id`; the arguments' `hub_...` options are the defaults.

    A card in the output folder stays as it is. Where there is none, one is written out of what the trainer knows.

    Args:
        trainer: any Trainer; all processes call this.
        student: what the trainer saves, perhaps with an adapter on it.
        teacher: Hub id or folder of its teacher, for a new card; None or empty where it is unknown.
        commit_message, token, revision, private: as in [`publish_folder`].
        blocking: wait for the upload.
        card: keywords of [`~cab_hf.hub.card.build_card`] for a new card, such as `license` or `datasets`.

    Returns:
        The commit, or its future without `blocking`; None on processes other than the first.

    Raises:
        ValueError, ConnectionError: as [`publish_folder`]; also a new card without a licence or a teacher.
    """
    args = trainer.args
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    trainer.save_model(_internal_call=True)
    if not trainer.is_world_process_zero():
        return None
    folder = Path(args.output_dir)
    repo_id = args.hub_model_id or folder.absolute().name
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        _write_adapter_card(student, folder, repo_id, card)
    elif not (folder / CARD_NAME).exists():
        if not teacher:
            raise ValueError(
                f"{folder} has no {CARD_NAME}, and the teacher does not say where it comes from. Pass teacher=..., "
                "its Hub id or folder, or write the card by `cab_hf.hub.build_card` first."
            )
        training = {"Steps": f"{trainer.state.global_step:,}", "Epochs": trainer.state.epoch}
        write_card(folder, build_card(folder, {}, training, teacher=teacher, repo_id=repo_id, **card))
    options = {
        "token": args.hub_token if token is None else token,
        "private": args.hub_private_repo if private is None else private,
        "revision": args.hub_revision if revision is None else revision,
        "commit_message": commit_message,
    }
    if blocking:
        return publish_folder(folder, repo_id, **options)
    return HfApi().run_as_future(publish_folder, folder, repo_id, **options)


def _write_adapter_card(student: PreTrainedModel, folder: Path, repo_id: str, card: dict[str, Any]) -> None:
    """Replaces the card of placeholders that PEFT writes whenever it saves an adapter."""
    path = folder / CARD_NAME
    found = ModelCard.load(path).data.to_dict() if path.is_file() else {}
    base_model = json.loads((folder / ADAPTER_CONFIG_NAME).read_text())["base_model_name_or_path"]
    options = {"base_model": base_model, "license": found.get("license")} | card
    write_adapter_card(folder, adapter_card(folder, repo_id=repo_id, **options))
    for config in student.peft_config.values():
        config.base_model_name_or_path = options["base_model"]  # of later saves
