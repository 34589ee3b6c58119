"""The evaluation sets of Table 1: from a stand-in for the hub and from files, beside a corpus that stays as it was."""

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from made_up_text import prose

from peerscale.config.schema import DataConfig
from peerscale.data.batches import LastWordBatches
from peerscale.data.prepare import prepare
from peerscale.data.store import Corpus, open_corpus, read_manifest
from peerscale.errors import UserError

PASSAGES = [f"{prose(200 + 9 * i, seed=i).strip()}\nmet Mød{i}" for i in range(30)]
WIKITEXT = ["", " = Title = \n", "\n", f" {prose(3000, seed=99)}\n"]
HUB = {
    ("EleutherAI/lambada_openai", "default"): PASSAGES,
    ("Salesforce/wikitext", "wikitext-103-raw-v1"): WIKITEXT,
}


def hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands for the package `datasets`; returns the names of what is read of it."""
    read = []

    def load_dataset(path: str, *, name: str, split: str, streaming: bool) -> SimpleNamespace:
        assert (split, streaming) == ("test", True)
        read.append(path)
        return SimpleNamespace(skip=lambda n: ({"text": row} for row in HUB[path, name][n:]))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return read


@pytest.fixture
def configured(tmp_path: Path, text_config: Callable[..., DataConfig]) -> Callable[..., DataConfig]:
    """A corpus that is evaluated on further sets, with files for them."""
    (tmp_path / "text.txt").write_text(prose(150_000), encoding="utf-8")

    def make(*sets: str, **files: Path) -> DataConfig:
        evaluation = dict.fromkeys(("validation", *sets), 1024)
        held_out = {name: str(path) for name, path in files.items()}
        return text_config(tmp_path / "text.txt", evaluation=evaluation, held_out=held_out)

    return make


def documents(corpus: Corpus, name: str) -> list[str]:
    text = corpus.tokenizer.decode(corpus.tokens(name).tolist(), skip_special_tokens=False)
    return text.split("<|endoftext|>")


def test_sets_of_the_hub_are_added_to_a_corpus_that_stays_as_it_was(
    configured: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = hub(monkeypatch)
    before = prepare(configured())
    files = {path: path.stat().st_mtime_ns for path in before.folder.glob("*.bin")}
    assert read == []
    both = prepare(configured("lambada", "wikitext"))
    assert read == [name for name, _ in HUB]
    assert both.folder == before.folder and {path: path.stat().st_mtime_ns for path in files} == files
    assert documents(both, "lambada") == [" ".join(passage.rsplit(maxsplit=1)) for passage in PASSAGES]
    assert documents(both, "wikitext") == ["".join(WIKITEXT)]
    assert both.manifest.passages == 30 and both.manifest.utf8_bytes["wikitext"] == len("".join(WIKITEXT).encode())

    again = prepare(configured("wikitext"))
    assert read == [name for name, _ in HUB], "nothing is read twice"
    assert set(again.manifest.splits) == {"train", "validation", "tuning", "wikitext"}
    assert open_corpus(configured("lambada", "wikitext")).manifest == both.manifest
    assert read_manifest(configured()) == before.manifest == prepare(configured()).manifest
    prints = {prepare(configured(*sets)).manifest.fingerprint for sets in ((), ("lambada",), ("lambada", "wikitext"))}
    assert len(prints) == 3 and before.manifest.fingerprint in prints

    (both.folder / "lambada.bin").unlink()
    assert prepare(configured()).manifest == before.manifest
    assert prepare(configured("lambada", "wikitext")).manifest == both.manifest
    assert len(read) == 3 and {path: path.stat().st_mtime_ns for path in files} == files


def test_sets_come_from_files_and_another_file_is_another_set(
    tmp_path: Path, configured: Callable[..., DataConfig]
) -> None:
    lines, rows = tmp_path / "lambada.txt", tmp_path / "pile"
    lines.write_text("He went to see Anna \n\nword\n and then Bob\n", encoding="utf-8")
    rows.mkdir()
    for name, texts in (("a.jsonl", ["one page", "another"]), ("b.jsonl.gz", ["the last"])):
        content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        (rows / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    asked = configured("lambada", "pile", "curation_corpus", lambada=lines, pile=rows)
    corpus = prepare(asked)
    assert documents(corpus, "lambada") == ["He went to see Anna", " and then Bob"]
    assert documents(corpus, "pile") == ["one page", "another", "the last"]
    assert set(corpus.manifest.splits) == {"train", "validation", "tuning", "lambada", "pile"}
    lines.write_text("He went to see Carl\n", encoding="utf-8")
    other = prepare(asked)
    assert documents(other, "lambada") == ["He went to see Carl"] and other.manifest.passages == 1
    assert other.manifest.fingerprint != corpus.manifest.fingerprint


def test_a_hub_that_breaks_off_leaves_the_corpus(
    configured: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    expected = r"^EleutherAI/lambada_openai test cannot be read after 0 rows: no route$"
    with pytest.raises(UserError, match=expected):
        prepare(configured("lambada"))
    assert {path.name for path in open_corpus(configured()).folder.iterdir()} == {
        *("train.bin", "validation.bin", "tuning.bin", "tokenizer.json", "manifest.json")
    }


@pytest.mark.parametrize("context", [40, 512])
def test_a_row_holds_a_passage_from_its_start_and_counts_its_last_word(
    context: int, configured: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(monkeypatch)
    corpus = prepare(configured("lambada"))
    shape = {"batch_sequences": 7, "context": context}
    tokens, n_tokens = corpus.tokens("lambada"), 4 * 7 * context
    batches = LastWordBatches(tokens, n_tokens, corpus.begins_word(), **shape)
    assert len(batches) == 4
    found = []
    for index in range(4):
        rows, counted = batches[index], batches.counted(index)
        assert rows.shape == (7, context + 1) and counted.shape == (7, context)
        for row, counts in zip(rows, counted, strict=True):
            end = np.flatnonzero(counts)[-1] + 2
            passage = corpus.tokenizer.decode(row[:end].tolist())
            word = corpus.tokenizer.decode(row[1:][counts].tolist())
            (whole,) = (p for p in documents(corpus, "lambada") if p.endswith(word))
            ids = corpus.tokenizer.encode(whole).ids
            assert row[:end].tolist() == ids[-context - 1 :] and whole.endswith(passage)
            assert word == " " + whole.rpartition(" ")[2]
            # After it the set goes on, from its beginning where it ends.
            begin = documents(corpus, "lambada").index(whole)
            place = np.flatnonzero(np.append(0, tokens) == 0)[begin] + max(0, len(ids) - context - 1)
            assert np.array_equal(row, np.resize(np.roll(tokens, -place), context + 1))
            found.append(whole)
    assert len({*found}) == 28
