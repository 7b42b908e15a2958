"""Publishing a finished student: one commit on the Hub that holds all of it, or none."""

import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

from cab_hf.files import open_weights, read_json, weight_files


logger = logging.get_logger(__name__)

T = TypeVar("T")

ADAPTER_CONFIG_NAME = "adapter_config.json"
CARD_NAME = "README.md"
SUFFIXES = {".safetensors", ".json", ".py", ".model", ".jinja", ".png", ".svg"}
NAMES = {CARD_NAME, "recipe.yaml", "vocab.txt", "merges.txt", "LICENSE"}
FOLDERS = {"additional_chat_templates", "ema", "plots", "stock"}
"""Sub-folders that belong to a student; all others (stages, checkpoints, logs) are its training's."""
OF_TRAINING = {"bridge.safetensors", "ema.safetensors", "trainer_state.json", "history.json"}
SHARED_DATA = {
    "recipe.yaml": yaml.safe_load,
    "report.json": json.loads,
    "evaluation.json": json.loads,
    "inspection.json": json.loads,
}
LOCAL_OPTIONS = {"output_dir", "logging_dir", "folder", "hub_token"}
# Weights that transformers would load instead of, or beside, the new ones.
WEIGHTS = re.compile(
    r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?|adapter_(config\.json|model\.\w+)"
)
WAITS = (1.0, 4.0)
"""Seconds before the second and the third attempt of a commit whose connection broke."""


def publish_folder(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = False,
    revision: str | None = None,
    commit_message: str = "Upload student",
    overwrite_card: bool = False,
) -> CommitInfo:
    """Uploads a saved student and what belongs to it as one commit.

    That is: weights, config, modelling files, tokenizer or image processor, generation config, card, pictures, and
    `recipe.yaml` and `report.json` without the paths of this machine. Stages, checkpoints and optimizer states stay.
    Weights of an earlier commit that the new ones do not replace are deleted in the same commit, so that nobody loads
    them. A connection that breaks is tried again, which never makes a second commit.

    Args:
        folder: the student, as a recipe or `save_pretrained` leaves it, with its card.
        repo_id: "owner/name", or a name under the token's owner. Made if it does not exist.
        token: with the right to write; by default the one of `hf auth login` or `HF_TOKEN`.
        private: of a repository that is made now; None: as its owner's settings say.
        revision: branch, made if it does not exist; by default main.
        commit_message: first line of the commit.
        overwrite_card: replace a card that the repository already has.

    Returns:
        The commit: its `oid`, `commit_url` and `repo_url`.

    Raises:
        ValueError: the folder holds no whole student, or no card with a licence; a file holds the token, or there is
            none.
        HfHubHTTPError: the Hub refuses, for instance because the token may not write to `repo_id`.
        ConnectionError: the Hub can't be reached. The same call can be made again.
    """
    folder = Path(folder)
    names = student_files(folder)
    check_card(folder / CARD_NAME)
    token = _find_token(token)
    contents = {name: _content(folder, name) for name in names}
    _refuse_secrets(contents, token)
    repo_id = check_access(repo_id, token=token, private=private)
    api = HfApi(token=token)

    def commit() -> CommitInfo:
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        head = api.model_info(repo_id, revision=revision)
        remote = {file.rfilename for file in head.siblings or ()}
        kept = {CARD_NAME} & remote if not overwrite_card else set()
        if kept:
            logger.warning(
                f"{repo_id} keeps its own {CARD_NAME}. Pass overwrite_card=True to replace it by the student's."
            )
        stale = [] if "config.json" not in names else sorted(filter(WEIGHTS.fullmatch, remote - set(names)))
        if stale:
            logger.warning(f"{', '.join(stale)} of {repo_id} would be loaded beside the new weights: deleted.")
        additions = [CommitOperationAdd(name, content) for name, content in contents.items() if name not in kept]
        return api.create_commit(
            repo_id,
            [*additions, *map(CommitOperationDelete, stale)],
            commit_message=commit_message,
            revision=revision,
            parent_commit=head.sha,
        )

    info = _repeated(commit)
    logger.info(f"Published {len(names)} files of {folder}: {info.commit_url}")
    return info


def check_access(repo_id: str, *, token: str | None = None, private: bool | None = False) -> str:
    """Makes the repository if it does not exist, and checks that the token may write to it: before a long training.

    Args:
        repo_id, token, private: as in [`publish_folder`].

    Returns:
        The repository's whole id, "owner/name".

    Raises:
        ValueError: no token.
        HfHubHTTPError: one that may not write there.
        ConnectionError: no network.
    """
    api = HfApi(token=_find_token(token))
    repo_id = _repeated(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
    _repeated(lambda: api.auth_check(repo_id, write=True))
    return repo_id


def student_files(folder: str | Path) -> list[str]:
    """The files of a saved student that are published, relative to its folder, checked to be whole.

    Raises:
        ValueError: it is no student, or one that nobody could load: without config, weights or modelling files, or
            with weights that were cut off.
    """
    folder = Path(folder)
    paths = [path for path in folder.iterdir() if path.is_file()]
    for sub in sorted(FOLDERS):
        paths += [path for path in (folder / sub).rglob("*") if path.is_file()]
    names = sorted(path.relative_to(folder).as_posix() for path in paths if _is_published(path))
    if ADAPTER_CONFIG_NAME in names:
        _check_base(folder / ADAPTER_CONFIG_NAME)
    else:
        _check_config(folder)
    weights = {"model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"}
    if not weights & set(names):
        raise ValueError(
            f"{folder} has no model.safetensors, so it is no saved student. Save it there by `save_pretrained` first."
        )
    for name in names:
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"{path} is a link out of {folder}, to {path.resolve()}, which is not published. Put a copy of that "
                "file in its place, or remove the link."
            )
        if name.endswith(".safetensors"):
            open_weights(path)
        elif name.endswith(".safetensors.index.json"):
            weight_files(path.parent)
    return names


def check_card(path: Path) -> ModelCard:
    """A card that may be published: it names a licence, and nothing in it is left to be filled in.

    Raises:
        ValueError: it is missing, can't be read, names no licence, or holds placeholders.
    """
    if not path.is_file():
        raise ValueError(
            f"{path.parent} has no {CARD_NAME}. A recipe writes one once its `license` is known; "
            "`cab_hf.hub.card.build_card` makes one by hand."
        )
    try:
        card = ModelCard.load(path)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} has metadata that can't be read: {_one_line(error)}") from error
    if not card.data.license:
        raise ValueError(
            f"{path} names no licence. Add `license:` to its metadata, for instance the teacher's (apache-2.0, mit, "
            "...), or set `license` in the recipe and remove the card to have it written again."
        )
    if "[More Information Needed]" in card.text:
        raise ValueError(f'{path} still says "[More Information Needed]". Fill it in, or remove these lines.')
    return card


def shareable(value: Any) -> Any:
    """A recipe or report without tokens and without the folders of the machine it ran on."""
    if isinstance(value, Mapping):
        return {key: shareable(one) for key, one in value.items() if key not in LOCAL_OPTIONS}
    if isinstance(value, list | tuple):
        return [shareable(one) for one in value]
    if isinstance(value, str) and (Path(value).is_absolute() or value.startswith("~")):
        return Path(value).name
    return value


def _is_published(path: Path) -> bool:
    name = path.name
    if name.startswith((".", "_")) or name in OF_TRAINING:
        return False
    return name in NAMES or path.suffix in SUFFIXES


def _check_config(folder: Path) -> None:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no config.json, so it is no saved student. Save it by `save_pretrained` first."
        )
    config = read_json(path)
    model_type, auto_map = config["model_type"], config.get("auto_map", {})
    if model_type.startswith("cab_") and not auto_map:
        raise ValueError(
            f"{path} has no auto_map, so nobody could load this {model_type!r} student without cab_hf. Load it with "
            "cab_hf and save it again."
        )
    for module in sorted({reference.partition(".")[0] for reference in auto_map.values() if "--" not in reference}):
        try:
            get_relative_import_files(folder / f"{module}.py")
        except FileNotFoundError as error:
            raise ValueError(
                f"{path} needs the modelling file {Path(error.filename).name}, which is not in {folder}. Load the "
                "student with cab_hf and save it again."
            ) from error


def _check_base(path: Path) -> None:
    base = read_json(path).get("base_model_name_or_path") or ""
    if base and (Path(base).is_absolute() or Path(base).is_dir()):
        raise ValueError(
            f"{path} names the folder {base!r} as its base model, where nobody else finds it. Publish the base, and "
            "write its Hub id there (cab_hf.hub.write_adapter_card does)."
        )


def _content(folder: Path, name: str) -> Path | bytes:
    """What is uploaded: the file itself, or a version without local paths."""
    if name not in SHARED_DATA:
        return folder / name
    value = shareable(SHARED_DATA[name]((folder / name).read_text(encoding="utf-8")))
    text = yaml.safe_dump(value, sort_keys=False) if name.endswith(".yaml") else json.dumps(value, indent=1)
    return text.encode()


def _refuse_secrets(contents: Mapping[str, Path | bytes], token: str) -> None:
    for name, content in contents.items():
        if name.endswith((".safetensors", ".png", ".model")):
            continue
        text = content if isinstance(content, bytes) else content.read_bytes()
        if token.encode() in text:
            raise ValueError(
                f"{name} contains the Hub token that is in use, and would publish it. Remove it there, and give the "
                "token by `hf auth login` or HF_TOKEN."
            )


def _find_token(token: str | None) -> str:
    token = token or get_token()
    if not token:
        raise ValueError(
            "There is no Hub token. Run `hf auth login`, set HF_TOKEN, or pass token=...; it needs the right to write."
        )
    return token


def _repeated(act: Callable[[], T]) -> T:
    """Acts again after a broken connection, a failing Hub, or a commit of somebody else in between.

    huggingface_hub itself repeats uploads of files, but neither the making of a repository nor the commit. What it
    raises where the Hub refuses goes on as it is. A broken connection is no OSError there; here it becomes one.
    """
    try:
        for wait in WAITS:
            try:
                return act()
            except HTTPError as error:
                if isinstance(error, HfHubHTTPError) and not _may_pass(error.response.status_code):
                    raise
                logger.warning(f"The Hub: {_one_line(error)}. Trying again in {wait:.0f} s.")
                time.sleep(wait)
        return act()
    except HfHubHTTPError:
        raise
    except (RuntimeError, ConnectionError, HTTPError) as error:
        # Failed uploads: Git LFS's are RuntimeErrors with the reason as their cause.
        raise ConnectionError(
            f"No connection to {HfApi().endpoint} ({_one_line(error.__cause__ or error) or 'no answer'}). Check the "
            "network and HF_ENDPOINT and run it again; what has arrived is not sent twice. A Hub without Xet storage "
            "needs HF_HUB_DISABLE_XET=1."
        ) from error


def _may_pass(status: int) -> bool:
    return status in (408, 412, 429) or status >= 500


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
