"""Prepare a corpus once: fetch its text, set held-out spans aside, train a tokenizer, write tokens.

python -m peerscale.data.prepare data=gutenberg
"""

import json
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from peerscale.config.schema import HELD_OUT_SETS, TABLE_1_SETS, DataConfig, load
from peerscale.data import c4, gutenberg, store, table_1, text
from peerscale.data.blocks import MIN_BYTES, Block, HeldOut
from peerscale.data.store import Corpus, Manifest
from peerscale.data.streaming import PROGRESS, stream
from peerscale.data.tokenizer import train
from peerscale.errors import ArgumentParser, UserError, exit_code
from peerscale.files import replacing

SOURCES = {"gutenberg": gutenberg, "text": text, "c4": c4}
SETS = ("train", *HELD_OUT_SETS)
SAMPLE_BYTES = 10_000_000
"""The tokenizer is trained on a tenth of the text, but at least on this much, which is as good as all of it."""


def prepare(config: DataConfig) -> Corpus:
    """Prepare the corpus of `config` unless it is prepared already; if several processes call this, one does the work.

    Raises:
        UserError: the text cannot be downloaded or read, or is too short for its vocabulary or held-out sets.
    """
    folder = store.folder(config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f"{folder.name}.lock"):
        sources, of_table_1 = SOURCES[config.source].sources(config), table_1.sources(config)
        whole = store.read_whole_manifest(config)
        manifest = whole and whole.without(TABLE_1_SETS)
        corpus = Corpus(folder, whole) if whole and manifest and manifest.sources == sources else None
        damage = corpus and manifest and store.find_damage(Corpus(folder, manifest))
        if damage:
            print(f"{damage}: preparing it again", file=sys.stderr)
        if (corpus is None or damage) and config.source == "c4" and c4.has_held_out_pages(config):
            corpus = _stream(config, sources, folder)
        elif corpus is None or damage:
            for abandoned in folder.parent.glob(f".{folder.name}.*"):  # left by a process that was killed
                shutil.rmtree(abandoned)
            with replacing(folder) as temporary:
                temporary.mkdir()
                corpus = Corpus(folder, _build(config, sources, temporary))
        table_1.add(config, of_table_1, corpus)
        manifest = store.read_manifest(config)
    assert manifest is not None
    return Corpus(folder, manifest)


def _stream(config: DataConfig, sources: dict[str, str], folder: Path) -> Corpus:
    """Encode a text that is too large to keep; until it is complete, its tokens are in a folder beside `folder`."""
    partial = folder.with_name(f"{folder.name}.partial")
    utf8_bytes = stream(config, sources, partial)
    manifest = _write_manifest(config, sources, partial, utf8_bytes)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    (folder / PROGRESS).unlink()  # only now: after an interruption during hashing nothing is encoded again
    return Corpus(folder, manifest)


def _build(config: DataConfig, sources: dict[str, str], folder: Path) -> Manifest:
    # The text is first written to a file: its length determines the held-out spans, which must be known before the
    # tokenizer is trained on the rest.
    progress = partial(tqdm, unit=" blocks", leave=False, disable=None)  # None: shown only on a terminal
    spool = folder / "blocks.jsonl"
    n_blocks = n_bytes = 0
    with spool.open("w", encoding="utf-8") as file:
        for block in progress(SOURCES[config.source].blocks(config), desc=f"reading {config.source}"):
            file.write(json.dumps(block, ensure_ascii=False) + "\n")
            n_blocks += 1
            n_bytes += len(block.text.encode()) if block.split is None else 0
    if n_bytes < MIN_BYTES:
        raise UserError(
            f"{config.path or config.source}: {n_bytes:,} bytes of text are too few for held-out sets; "
            f"at least {MIN_BYTES:,} are needed"
        )
    held_out = HeldOut(total_bytes=n_bytes)

    training = (block.text for block in _placed(spool, held_out) if block.split == "train")
    sample = islice(training, 0, None, max(1, min(10, n_bytes // SAMPLE_BYTES)))
    tokenizer = train(progress(sample, desc=f"training a tokenizer of {config.vocab_size}"), config.vocab_size)
    store.tokenizer_file(folder).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")

    utf8_bytes = store.write_tokens(
        progress(_placed(spool, held_out), desc="encoding", total=n_blocks), tokenizer, folder
    )
    spool.unlink()
    return _write_manifest(config, sources, folder, utf8_bytes)


def _write_manifest(
    config: DataConfig, sources: dict[str, str], folder: Path, utf8_bytes: Mapping[str, int]
) -> Manifest:
    files = {name: store.tokens_file(folder, name) for name in SETS if name in utf8_bytes}
    manifest = Manifest(
        preparation_version=store.PREPARATION_VERSION,
        source=config.source,
        vocab_size=config.vocab_size,
        dtype=store.DTYPE,
        splits={name: file.stat().st_size // np.dtype(store.DTYPE).itemsize for name, file in files.items()},
        utf8_bytes={name: utf8_bytes[name] for name in files},
        tokens_sha256={name: store.file_sha256(file) for name, file in files.items()},
        tokenizer_sha256=store.file_sha256(store.tokenizer_file(folder)),
        sources=sources,
        versions={"python": platform.python_version()} | {name: version(name) for name in ("numpy", "tokenizers")},
    )
    store.write_manifest(folder, manifest)
    return manifest


def _placed(spool: Path, held_out: HeldOut) -> Iterator[Block]:
    """The blocks with their sets, without the blocks in gaps."""
    offset, previous = 0, None
    with spool.open(encoding="utf-8") as file:
        for line in file:
            block = Block(*json.loads(line))
            if block.split is None:
                split = held_out.split(offset)
                offset += len(block.text.encode())
                # A block after a gap does not continue the previous block of its set.
                block = Block(block.text, block.starts_document or split != previous, split)
                previous = split
            if block.split is not None:
                yield block


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: Hydra overrides, or a study whose data settings are used."""
    parser = ArgumentParser(prog="python -m peerscale.data.prepare", description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="such as data=text data.path=FILE_OR_FOLDER data.vocab_size=4096")
    parser.add_argument("--sweep", help="prepare what this study needs")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.sweep:
        from peerscale.plan.cells import planned_cells

        config = planned_cells(arguments.sweep, arguments.overrides)[0].config.data
    else:
        config = load(arguments.overrides).data
    was_there = store.read_manifest(config)
    corpus = prepare(config)
    manifest = corpus.manifest
    print(f"{'set':<16}{'tokens':>13}{'MB':>9}{'bytes/token':>13}")
    for name, n_tokens in manifest.splits.items():
        n_bytes = manifest.utf8_bytes[name]
        print(f"{name:<16}{n_tokens:>13,}{n_bytes / 1e6:>9.2f}{n_bytes / n_tokens:>13.2f}")
    state = "already prepared" if was_there == manifest else "prepared"
    print(f"{config.source}, vocabulary {manifest.vocab_size:,}, {state} in {corpus.folder}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
