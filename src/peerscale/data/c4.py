"""C4 (Raffel et al. 2020), the paper's corpus: streamed from the Hugging Face hub, or read from shards in a folder.

Only its preparation needs the package `datasets` (extra `hub`).
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from peerscale.config import DataConfig
from peerscale.data.blocks import Block, document
from peerscale.errors import UserError

HUB_NAME, HUB_SUBSET = "allenai/c4", "en"
HELD_OUT_PAGES = 4_000
"""Pages read of C4's own validation set: the even ones become `validation`, the odd ones `tuning`."""


def sources(config: DataConfig) -> dict[str, str]:
    """Shard -> its size, or the hub's name -> how much of it is read."""
    if config.path is None:
        if config.max_documents is None:
            raise UserError("data=c4 is 800 GB of text: set data.max_documents")
        return {f"{HUB_NAME}/{HUB_SUBSET}": f"{config.max_documents} pages"}
    return {path.name: f"{path.stat().st_size} bytes" for paths in _shards(config.path).values() for path in paths}


def blocks(config: DataConfig) -> Iterator[Block]:
    """The held-out pages, then the training pages; without held-out pages, spans of the training pages are held out."""
    shards = {} if config.path is None else _shards(config.path)
    has_validation = not shards or "validation" in shards
    if has_validation:
        for i, page in enumerate(_pages(shards, "validation", HELD_OUT_PAGES)):
            yield from document(page, "tuning" if i % 2 else "validation")
    for page in _pages(shards, "train", config.max_documents):
        yield from document(page, "train" if has_validation else None)


def _shards(path: str) -> dict[str, list[Path]]:
    folder = Path(path).expanduser()
    shards = {split: sorted(folder.glob(f"en/c4-{split}.*.json.gz")) for split in ("train", "validation")}
    if not shards["train"]:
        raise UserError(f"data.path: {folder} holds no en/c4-train.*.json.gz")
    return {split: found for split, found in shards.items() if found}


def _pages(shards: dict[str, list[Path]], split: str, limit: int | None) -> Iterator[str]:
    """Page texts of one split of the shards, or of the hub if there are none."""
    try:
        import datasets  # pyrefly: ignore[missing-import]
    except ImportError:
        raise UserError(
            "data=c4 needs the package datasets: .venv/bin/python -m pip install --editable '.[hub]'"
        ) from None
    where: dict[str, Any]
    if shards:
        where = {"path": "json", "data_files": {name: [str(path) for path in paths] for name, paths in shards.items()}}
    else:
        where = {"path": HUB_NAME, "name": HUB_SUBSET}
    n_read = 0
    try:
        for row in islice(datasets.load_dataset(**where, split=split, streaming=True), limit):
            n_read += 1
            yield row["text"]
    except Exception as error:  # of the several HTTP, archive and JSON libraries beneath
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(f"C4 {split} cannot be read after {n_read:,} pages: {reason}") from None
