import gzip
import json
import sys

import pytest
from made_up_text import prose

from peerscale.config import DataConfig
from peerscale.data.c4 import blocks, sources
from peerscale.data.prepare import prepare
from peerscale.errors import UserError


def shard(path, pages):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": page, "timestamp": "2019-04-25T12:57:54Z", "url": "https://example.org/"} for page in pages]
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def pages(n, seed):
    return [prose(600, seed=1000 * seed + i) for i in range(n)]


def config(tmp_path, **settings):
    settings = {"vocab_size": 512, "evaluation": {"validation": 1024}, "path": str(tmp_path), **settings}
    return DataConfig(source="c4", directory=str(tmp_path / "data"), **settings)


def whole(found, split):
    documents = []
    for block in found:
        if block.split == split:
            documents.append(block.text) if block.starts_document else documents.append(documents.pop() + block.text)
    return documents


def test_local_shards_are_read_as_the_hub_s(tmp_path):
    pytest.importorskip("datasets", reason="needs the extra `hub`")
    first, second, held_out = pages(60, 1), pages(60, 2), pages(40, 3)
    shard(tmp_path / "en" / "c4-train.00000-of-00002.json.gz", first)
    shard(tmp_path / "en" / "c4-train.00001-of-00002.json.gz", second)
    assert whole(blocks(config(tmp_path)), None) == first + second  # spans of them are held out later
    shard(tmp_path / "en" / "c4-validation.00000-of-00001.json.gz", held_out)
    found = list(blocks(config(tmp_path, max_documents=70)))
    assert whole(found, "train") == first + second[:10]
    assert whole(found, "validation") == held_out[::2]
    assert whole(found, "tuning") == held_out[1::2]


def test_prepare_from_local_shards(tmp_path):
    pytest.importorskip("datasets", reason="needs the extra `hub`")
    shard(tmp_path / "en" / "c4-train.00000-of-00001.json.gz", pages(300, 1))
    shard(tmp_path / "en" / "c4-validation.00000-of-00001.json.gz", held_out := pages(40, 2))
    corpus = prepare(config(tmp_path))
    assert list(corpus.manifest.splits) == ["train", "validation", "tuning"]
    text = corpus.tokenizer.decode(corpus.tokens("validation").tolist(), skip_special_tokens=False)
    assert text.split("<|endoftext|>") == held_out[::2]


def test_shards_that_cannot_be_read_are_one_line(tmp_path):
    pytest.importorskip("datasets", reason="needs the extra `hub`")
    path = tmp_path / "en" / "c4-train.00000-of-00001.json.gz"
    path.parent.mkdir()
    path.write_bytes(b"not gzip")
    with pytest.raises(UserError, match=r"^C4 train cannot be read after 0 pages: [^\n]+$"):
        list(blocks(config(tmp_path)))


def test_a_folder_without_shards_is_refused(tmp_path):
    with pytest.raises(UserError, match=rf"^data\.path: {tmp_path} holds no en/c4-train\.\*\.json\.gz$"):
        sources(config(tmp_path))


def test_all_of_the_hub_is_not_asked_for_by_mistake(tmp_path):
    with pytest.raises(UserError, match=r"^data=c4 is 800 GB of text: set data\.max_documents$"):
        sources(config(tmp_path, path=None))


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError) as error:
        list(blocks(config(tmp_path, path=None, max_documents=10)))
    assert str(error.value) == (
        "data=c4 needs the package datasets: .venv/bin/python -m pip install --editable '.[hub]'"
    )
