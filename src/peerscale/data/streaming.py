"""A corpus that is too large to keep as text: it is encoded while it is read.

The tokenizer is trained on the beginning of the training text. After every `PAGES_AT_ONCE` pages the progress is saved
in the folder, so that an interrupted preparation continues from there.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer
from tqdm import tqdm

from peerscale.config.schema import DataConfig
from peerscale.data import c4, store
from peerscale.data.blocks import MIN_BYTES, document
from peerscale.data.store import write_tokens
from peerscale.data.tokenizer import train
from peerscale.errors import UserError
from peerscale.files import write_text

SAMPLE_BYTES = 100_000_000
"""Bytes of text that the tokenizer is trained on."""
PAGES_AT_ONCE = 20_000
PROGRESS = "progress.json"


def stream(config: DataConfig, sources: dict[str, str], folder: Path) -> dict[str, int]:
    """Write the tokenizer and the tokens of all sets into `folder`, which may already hold a part of them.

    Returns:
        The bytes of text by set.

    Raises:
        UserError: the text cannot be read, or is too short; the tokens encoded so far are kept.
    """
    done = _progress(folder, sources, config.vocab_size)
    tokenizer = _tokenizer(config, folder)
    if not done["pages"]:
        done["utf8_bytes"] = write_tokens(c4.held_out_blocks(config), tokenizer, folder)
    tokens = store.tokens_file(folder, "train")
    tokens.touch()
    os.truncate(tokens, done["train_bytes"])  # cuts off what was written after the last saved progress
    pages = c4.training_pages(config, done["pages"])
    with tqdm(unit=" pages", initial=done["pages"], leave=False, disable=None) as bar:
        while some := list(islice(pages, PAGES_AT_ONCE)):
            written = write_tokens((block for page in some for block in document(page, "train")), tokenizer, folder)
            done["pages"] += len(some)
            done["train_bytes"] = tokens.stat().st_size
            done["utf8_bytes"] = Counter(done["utf8_bytes"]) + written
            write_text(folder / PROGRESS, json.dumps(done))
            bar.update(len(some))
    if done["utf8_bytes"].get("train", 0) < MIN_BYTES:
        raise UserError(f"C4: fewer than {MIN_BYTES:,} bytes of training text in {done['pages']:,} pages")
    return done["utf8_bytes"]


def _progress(folder: Path, sources: dict[str, str], vocab_size: int) -> dict:
    """The saved progress with the same text; the folder is emptied if it holds another text."""
    start = {"sources": sources, "vocab_size": vocab_size, "pages": 0, "train_bytes": 0, "utf8_bytes": {}}
    try:
        done = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        done = {}
    if {key: done.get(key) for key in ("sources", "vocab_size")} == {"sources": sources, "vocab_size": vocab_size}:
        return done
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return start


def _tokenizer(config: DataConfig, folder: Path) -> Tokenizer:
    path = store.tokenizer_file(folder)
    if path.is_file():
        return Tokenizer.from_file(str(path))
    tokenizer = train(_sample(c4.training_pages(config)), config.vocab_size)
    write_text(path, tokenizer.to_str(pretty=True))
    return tokenizer


def _sample(pages: Iterable[str]) -> Iterator[str]:
    left = SAMPLE_BYTES
    for page in pages:
        if left <= 0:
            return
        left -= len(page.encode())
        yield page
