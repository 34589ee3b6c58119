import gzip
import json
import re

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_text import prose

from peerscale.data.prepare import train_tokenizer
from peerscale.data.text import document, texts
from peerscale.errors import UserError

SUFFIXES = r"\.txt, \.txt\.gz, \.jsonl, \.jsonl\.gz, \.parquet"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([prose(100_000)], 400)


@given(
    st.lists(st.sampled_from(["word", "it's", " ", "  ", "\n", "\n\n", "\t", "é", "12", "!?", "x" * 700])).map("".join)
)
def test_tokens_of_the_blocks_are_those_of_the_text(tokenizer, text):
    text *= 5
    blocks = [block.text for block in document(text)]
    assert "".join(blocks) == (text if text.strip() else "")
    assert all(0 < len(block) <= 1500 for block in blocks)
    if blocks and "x" * 1400 not in text:
        assert [i for block in blocks for i in tokenizer.encode(block).ids] == tokenizer.encode(text).ids


def test_only_the_first_block_starts_a_document():
    blocks = list(document(prose(10_000), "speeches"))
    assert [block.starts_document for block in blocks] == [True] + [False] * (len(blocks) - 1)
    assert {block.split for block in blocks} == {"speeches"}
    assert len(blocks) >= 7
    assert list(document(" \n\n")) == []


def documents(config):
    """The text of each document of each set, from the blocks."""
    found = {}
    for each in texts(config):
        for _ in range(2):  # as often as one likes
            found[each.split] = []
            for block in each:
                assert block.split == each.split
                found[each.split] += [""] if block.starts_document else []
                found[each.split][-1] += block.text
    return found


def test_a_folder_is_read_in_the_order_of_names(tmp_path, text_config):
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    long = prose(500_000)
    (folder / "a.txt").write_text(long, encoding="utf-8")
    (folder / "b" / "c.txt.gz").write_bytes(gzip.compress("\ufeffwith a byte order mark".encode()))
    rows = [{"text": "first"}, {"text": " "}, {"id": 3, "text": "third \u2028 \U0001f600"}]
    lines = "\n\n".join(json.dumps(row) for row in rows)
    (folder / "b" / "d.jsonl").write_text(lines, encoding="utf-8")
    (folder / "b" / "e.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pd.DataFrame(rows).to_parquet(folder / "b" / "f.parquet")
    (folder / "picture.png").write_bytes(b"\xff\xfe")
    config = text_config(folder)
    (read,) = texts(config)
    assert list(read.files) == ["a.txt", "b/c.txt.gz", "b/d.jsonl", "b/e.jsonl.gz", "b/f.parquet"]
    held = ["first", "third \u2028 \U0001f600"]
    assert documents(config) == {None: [long, "with a byte order mark", *held, *held, *held]}


def test_evaluation_sets_are_read_beside_the_text(tmp_path, text_config):
    for name in ("a.txt", "news.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    sets = {name: str(tmp_path / "news.jsonl") for name in ("news", "again")}
    config = text_config(
        tmp_path / "a.txt", evaluation_files=sets, evaluation={"validation": 64, "news": 9, "again": 0}
    )
    assert documents(config) == {None: ['{"text": "a.txt"}'], "news": ["news.jsonl"], "again": ["news.jsonl"]}


def test_hidden_files_and_folders_are_not_read(tmp_path, text_config):
    """Such as an editor's copies, whose lines would come twice, in training and in validation."""
    for name in ("a.txt", ".a.txt", ".ipynb_checkpoints/a-checkpoint.txt"):
        path = tmp_path / ".kept" / "texts" / name  # where the folder itself lies does not matter
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text", encoding="utf-8")
    (read,) = texts(text_config(tmp_path / ".kept" / "texts"))
    assert list(read.files) == ["a.txt"]


NO_ROW = ': row {}: no string under "text" ('


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\nfine\nnot \xff fine\n", " cannot be read: 'utf-8' codec can't decode byte 0xff"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "\xe9"}\n', " cannot be read: 'utf-8' codec can't decode byte 0xe9"),
        ("a.jsonl", b'{"text": "fine"}\n\n{"txt": "no"}\n', NO_ROW.format(2)),
        ("a.jsonl", b'{"text": "fine"}\n["text"]\n', NO_ROW.format(2)),
        ("a.jsonl", b'{"text": 5}\n', NO_ROW.format(1)),
        ("a.jsonl", b'{"text": "cut off', NO_ROW.format(1)),
        ("a.jsonl", b'{"text": "\\ud800"}\n', NO_ROW.format(1)),
        ("a.txt.gz", b"plain text", " cannot be read: Not a gzipped file (b'pl')"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "a"}', mtime=0)[:-4],
            " cannot be read: Compressed file ended before the end-of",
        ),
        ("a.parquet", b"PAR1, but no table", NO_ROW.format(1) + "Parquet"),
        ("a.parquet", pd.DataFrame({"txt": ["no"]}), NO_ROW.format(1)),
        ("a.parquet", pd.DataFrame({"text": ["fine", None]}), NO_ROW.format(2)),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_row(tmp_path, text_config, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.to_parquet())
    with pytest.raises(UserError) as error:
        documents(text_config(path))
    assert str(error.value).startswith(f"{path}{message}") and "\n" not in str(error.value)


def test_a_path_without_text_is_refused(tmp_path, text_config):
    with pytest.raises(UserError, match=rf"^data\.path: {tmp_path}/absent does not exist$"):
        texts(text_config(tmp_path / "absent"))
    (tmp_path / "folder").mkdir()
    for name in ("table.csv", "folder/c4-train.json.gz", "folder/more.tar.gz"):  # no text, whatever is in them
        (tmp_path / name).write_bytes(gzip.compress(b'{"text": "a page"}\n'))
    (tmp_path / "a.txt").write_text("fine")
    for path in ("folder", "table.csv"):
        refused = f"{re.escape(str(tmp_path))}/{path} is or holds no {SUFFIXES} file$"
        with pytest.raises(UserError, match=rf"^data\.path: {refused}"):
            texts(text_config(tmp_path / path))
        news = {"evaluation": {"validation": 64, "news": 64}, "evaluation_files": {"news": str(tmp_path / path)}}
        with pytest.raises(UserError, match=rf"^data\.evaluation_files\.news: {refused}"):
            texts(text_config(tmp_path / "a.txt", **news))
