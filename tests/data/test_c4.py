"""C4 from shards of its form and from a stand-in for the hub: whole, broken off and gone on with."""

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made_up_text import prose

from peerscale.config.schema import DataConfig
from peerscale.data import c4, streaming
from peerscale.data.c4 import blocks, held_out_blocks, sources, training_pages
from peerscale.data.prepare import prepare
from peerscale.data.store import Corpus
from peerscale.errors import UserError


def shard(path: Path, pages: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": page, "timestamp": "2019-04-25T12:57:54Z", "url": "https://example.org/"} for page in pages]
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def pages(n: int, seed: int) -> list[str]:
    return [prose(600, seed=1000 * seed + i) for i in range(n)]


def config(tmp_path: Path, **settings: Any) -> DataConfig:
    settings = {"vocab_size": 512, "evaluation": {"validation": 1024}, "path": str(tmp_path), **settings}
    return DataConfig(source="c4", directory=str(tmp_path / "data"), **settings)


def documents(corpus: Corpus, split: str) -> list[str]:
    text = corpus.tokenizer.decode(corpus.tokens(split).tolist(), skip_special_tokens=False)
    return text.split("<|endoftext|>")


TRAIN, HELD_OUT = pages(300, 1), pages(40, 2)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    shard(tmp_path / "en" / "c4-train.00000-of-00002.json.gz", TRAIN[:200])
    shard(tmp_path / "en" / "c4-train.00001-of-00002.json.gz", TRAIN[200:])
    shard(tmp_path / "en" / "c4-validation.00000-of-00001.json.gz", HELD_OUT)
    return tmp_path


def test_shards_are_encoded_whole_with_the_held_out_pages_of_c4(shards: Path) -> None:
    corpus = prepare(config(shards))
    assert documents(corpus, "train") == TRAIN
    assert (documents(corpus, "validation"), documents(corpus, "tuning")) == (HELD_OUT[::2], HELD_OUT[1::2])
    assert corpus.manifest.utf8_bytes["train"] == sum(len(page.encode()) for page in TRAIN)
    assert [path.name for path in corpus.folder.parent.iterdir() if path.is_dir()] == [corpus.folder.name]
    few = prepare(config(shards, max_documents=250))
    assert documents(few, "train") == TRAIN[:250]


def test_without_a_validation_set_spans_of_the_text_are_held_out(tmp_path: Path) -> None:
    shard(tmp_path / "en" / "c4-train.00000-of-00001.json.gz", TRAIN)
    starts = [block for block in blocks(config(tmp_path)) if block.starts_document]
    assert len(starts) == 300 and all(block.split is None for block in starts)
    assert set(prepare(config(tmp_path)).manifest.splits) == {"train", "validation", "tuning"}


class Hub:
    """Stands for the package `datasets`: breaks off after so many pages, counted over all calls."""

    def __init__(self, breaks_after: int | None = None) -> None:
        self.left, self.read = breaks_after, []

    def load_dataset(self, path: str, *, name: str, split: str, streaming: bool) -> Any:
        assert (path, name, streaming) == ("allenai/c4", "en", True)
        return SimpleNamespace(skip=lambda n: self.rows(split, n))

    def rows(self, split: str, skip: int) -> Iterator[dict[str, str]]:
        for i, page in enumerate((TRAIN if split == "train" else HELD_OUT)[skip:], skip):
            if self.left == 0:
                raise ConnectionError("the line went dead")
            self.left = self.left if self.left is None else self.left - 1
            self.read.append((split, i))
            yield {"text": page}


def hub(monkeypatch: pytest.MonkeyPatch, breaks_after: int | None = None) -> Hub:
    stand_in = Hub(breaks_after)
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    return stand_in


def test_a_broken_stream_goes_on_where_it_broke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "PAGES_AT_ONCE", 50)
    monkeypatch.setattr(streaming, "SAMPLE_BYTES", 50_000)
    asked = {"path": None, "max_documents": 300}
    hub(monkeypatch)
    whole = prepare(config(tmp_path / "whole", **asked))
    broken = config(tmp_path / "broken", **asked)
    for breaks_after in (20, 280, 120):  # in the tokenizer's sample, and in the text
        hub(monkeypatch, breaks_after)
        with pytest.raises(UserError, match=r"^allenai/c4 train cannot be read after \d+ rows: the line went dead$"):
            prepare(broken)
    last = hub(monkeypatch)
    again = prepare(broken)
    assert again.manifest.fingerprint == whole.manifest.fingerprint and documents(again, "train") == TRAIN
    assert min(i for split, i in last.read if split == "train") >= 100, "what was encoded is not read again"
    assert not list(again.folder.parent.glob("*.partial"))


def test_to_be_stopped_after_the_last_page_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = config(tmp_path, path=None, max_documents=300)
    hub(monkeypatch)
    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr("peerscale.data.prepare._write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        prepare(asked)
    last = hub(monkeypatch)
    corpus = prepare(asked)
    assert documents(corpus, "train") == TRAIN and last.read == []
    assert not (corpus.folder / streaming.PROGRESS).exists()


def test_a_part_of_another_text_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "PAGES_AT_ONCE", 50)
    shard(tmp_path / "en" / "c4-validation.00000-of-00001.json.gz", HELD_OUT)
    path = tmp_path / "en" / "c4-train.00000-of-00001.json.gz"
    shard(path, TRAIN)
    cut = path.read_bytes()
    path.write_bytes(cut[: len(cut) // 2])
    with pytest.raises(UserError, match=r"not a whole gzip file"):
        prepare(config(tmp_path))
    shard(path, TRAIN[::-1])
    assert documents(prepare(config(tmp_path)), "train") == TRAIN[::-1]


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^data\.path: {tmp_path} holds no en/c4-train\.\*\.json\.gz$"):
        sources(config(tmp_path))


def test_all_of_the_hub_is_not_asked_for_by_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data=c4 is 800 GB of text: set data\.max_documents$"):
        sources(config(tmp_path, path=None))


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    for read in (held_out_blocks, training_pages):
        with pytest.raises(UserError) as error:
            list(read(config(tmp_path, path=None, max_documents=10)))
        assert str(error.value) == (
            "allenai/c4 needs the package datasets: .venv/bin/python -m pip install --editable '.[hub]'"
        )


def test_held_out_pages_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c4, "HELD_OUT_PAGES", 7)
    stand_in = hub(monkeypatch)
    assert len(list(held_out_blocks(config(tmp_path, path=None, max_documents=10)))) >= 7
    assert len(stand_in.read) <= 8
