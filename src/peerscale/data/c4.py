"""C4 (Raffel et al. 2020), the paper's corpus: streamed from the Hugging Face hub, or read from shards in a folder."""

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from peerscale.config.schema import DataConfig
from peerscale.data import hub
from peerscale.data.blocks import Block, document
from peerscale.data.text import read_jsonl
from peerscale.errors import UserError

HUB_NAME, HUB_SUBSET = "allenai/c4", "en"
HELD_OUT_PAGES = 4_000
"""Pages that are read from C4's own validation set; even ones become `validation`, odd ones `tuning`."""


def sources(config: DataConfig) -> dict[str, str]:
    """Shard -> its size, or name on the hub -> how much of it is read."""
    if config.path is None:
        if config.max_documents is None:
            raise UserError("data=c4 is 800 GB of text: set data.max_documents")
        return {f"{HUB_NAME}/{HUB_SUBSET}": f"{config.max_documents} pages, streamed"}
    found = _shards(config.path)
    limit = {"max_documents": str(config.max_documents)} if config.max_documents else {}
    return limit | {path.name: f"{path.stat().st_size} bytes" for paths in found.values() for path in paths}


def has_held_out_pages(config: DataConfig) -> bool:
    """Whether C4's own validation set is available; if not, spans of the training pages are held out."""
    return config.path is None or "validation" in _shards(config.path)


def blocks(config: DataConfig) -> Iterator[Block]:
    """The training pages, for a corpus without C4's validation set."""
    return chain.from_iterable(document(page) for page in training_pages(config))


def held_out_blocks(config: DataConfig) -> Iterator[Block]:
    for i, page in enumerate(islice(_pages(config, "validation"), HELD_OUT_PAGES)):
        yield from document(page, "tuning" if i % 2 else "validation")


def training_pages(config: DataConfig, skip: int = 0) -> Iterator[str]:
    """Texts of the training pages, from page `skip` on; raises `UserError` if they cannot be read."""
    return islice(_pages(config, "train", skip), None if config.max_documents is None else config.max_documents - skip)


def _shards(path: str) -> dict[str, list[Path]]:
    folder = Path(path).expanduser()
    shards = {split: sorted(folder.glob(f"en/c4-{split}.*.json.gz")) for split in ("train", "validation")}
    if not shards["train"]:
        raise UserError(f"data.path: {folder} holds no en/c4-train.*.json.gz")
    return {split: found for split, found in shards.items() if found}


def _pages(config: DataConfig, split: str, skip: int = 0) -> Iterator[str]:
    if config.path is not None:
        shards = _shards(config.path)[split]
        return islice(chain.from_iterable(map(read_jsonl, shards)), skip, None)
    return hub.texts(HUB_NAME, HUB_SUBSET, split, skip)
