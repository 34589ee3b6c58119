"""The evaluation sets of the paper's Table 1, except C4, as token files beside those of a corpus."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np

from peerscale.config.schema import TABLE_1_SETS, DataConfig
from peerscale.data import hub, store, text
from peerscale.data.blocks import Block, document
from peerscale.data.store import Corpus
from peerscale.data.tokenizer import END_OF_TEXT_ID
from peerscale.errors import UserError
from peerscale.files import replacing

ON_HUB = {
    "lambada": ("EleutherAI/lambada_openai", "default", "test"),
    "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1", "test"),
}


def sources(config: DataConfig) -> dict[str, str]:
    """Set -> its source, for the available sets among those that `config` evaluates on."""
    found = {}
    for name in (name for name in TABLE_1_SETS if config.evaluation.get(name)):
        if files := _files(config, name):
            found[name] = ", ".join(f"{file} {store.file_sha256(path)}" for file, path in files.items())
        elif name in ON_HUB:
            found[name] = f"{' '.join(ON_HUB[name])}, streamed"
    return found


def blocks(config: DataConfig, name: str) -> Iterator[Block]:
    """The documents of a set.

    In `lambada` each passage is a document: a `text` of a .jsonl file, or a line of a .txt file. Passages of a single
    word are left out, and the last word is separated by one space. Wikitext from the hub, which comes in lines, is one
    document.
    """
    files = _files(config, name).values()
    if name == "lambada":
        passages = chain.from_iterable(map(text.read_rows, files)) if files else hub.texts(*ON_HUB[name])
        words = (passage.rsplit(maxsplit=1) for passage in passages)
        yield from chain.from_iterable(document(" ".join(parts), name) for parts in words if len(parts) == 2)
    elif files:
        yield from (block._replace(split=name) for path in files for block in text.read_blocks(path))
    else:
        yield from document("".join(hub.texts(*ON_HUB[name])), name)


def add(config: DataConfig, wanted: Mapping[str, str], corpus: Corpus) -> None:
    """Write the `wanted` sets into a corpus, except those that it already has from the same source; other sets stay.

    Raises:
        UserError: a set cannot be read, or has no text.
    """
    folder, manifest = corpus.folder, corpus.manifest
    for name, source in wanted.items():
        alone = manifest.without([other for other in manifest.splits if other != name])
        if manifest.sources.get(name) == source and not store.find_damage(Corpus(folder, alone)):
            continue
        with replacing(store.tokens_file(folder, name)) as file:
            n_bytes = store.write_tokens(blocks(config, name), corpus.tokenizer, file.parent)[name]
            if not n_bytes:
                raise UserError(f"{name}: no text in {config.held_out.get(name) or source}")
        tokens = np.memmap(store.tokens_file(folder, name), dtype=store.DTYPE, mode="r")
        manifest = replace(
            manifest,
            splits=manifest.splits | {name: len(tokens)},
            utf8_bytes=manifest.utf8_bytes | {name: n_bytes},
            tokens_sha256=manifest.tokens_sha256 | {name: store.file_sha256(store.tokens_file(folder, name))},
            sources=manifest.sources | {name: source},
            passages=1 + np.count_nonzero(tokens == END_OF_TEXT_ID) if name == "lambada" else manifest.passages,
        )
        store.write_manifest(folder, manifest)


def _files(config: DataConfig, name: str) -> dict[str, Path]:
    path = config.held_out.get(name)
    return text.files(path, f"data.held_out.{name}") if path else {}
