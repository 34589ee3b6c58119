import gzip
import json

import pytest
from made_up_text import prose

from peerscale.data.text import blocks, sources
from peerscale.errors import UserError


def documents(config):
    """The text of each document, from the blocks."""
    found = []
    for block in blocks(config):
        if block.starts_document:
            found.append("")
        found[-1] += block.text
    return found


def test_a_folder_is_read_in_the_order_of_names(tmp_path, text_config):
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    long = prose(2_500_000)  # more than is read at once
    (folder / "a.txt").write_text(long, encoding="utf-8")
    (folder / "b" / "c.txt.gz").write_bytes(gzip.compress("\ufeffwith a byte order mark".encode()))
    rows = [{"text": "first"}, {"text": " "}, {"id": 3, "text": "third \u2028 \U0001f600"}]
    lines = "\n\n".join(json.dumps(row) for row in rows)
    (folder / "b" / "d.jsonl").write_text(lines, encoding="utf-8")
    (folder / "b" / "e.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "picture.png").write_bytes(b"\xff\xfe")
    config = text_config(folder)
    held = ["first", "third \u2028 \U0001f600"]
    assert documents(config) == [long, "with a byte order mark", *held, *held]
    assert list(sources(config)) == ["a.txt", "b/c.txt.gz", "b/d.jsonl", "b/e.jsonl.gz"]
    assert max(len(block.text.encode()) for block in blocks(config)) < 6000


def test_hidden_files_and_folders_are_not_read(tmp_path, text_config):
    """Such as an editor's copies, whose lines would come twice, in training and in validation."""
    for name in ("a.txt", ".a.txt", ".ipynb_checkpoints/a-checkpoint.txt"):
        path = tmp_path / ".kept" / "texts" / name  # where the folder itself lies does not matter
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text", encoding="utf-8")
    assert list(sources(text_config(tmp_path / ".kept" / "texts"))) == ["a.txt"]


def test_archives_and_shards_of_other_formats_are_not_read_as_text(tmp_path, text_config):
    """The lines of a C4 shard are JSON, and a tar archive is no text."""
    shard = tmp_path / "en" / "c4-train.00000-of-00001.json.gz"
    shard.parent.mkdir()
    shard.write_bytes(gzip.compress(b'{"text": "a page"}\n'))
    (tmp_path / "en" / "more.tar.gz").write_bytes(gzip.compress(b"a.txt"))
    for path in (shard, shard.parent):
        with pytest.raises(UserError, match=r"is or holds no \.txt, \.jsonl, \.txt\.gz, \.jsonl\.gz file"):
            sources(text_config(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\nfine\nnot \xff fine\n", ": not UTF-8 ("),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "\xe9"}\n', ": not UTF-8 ("),
        ("a.jsonl", b'{"text": "fine"}\n\n{"txt": "no"}\n', ':3: not a JSON object with a string under "text"'),
        ("a.jsonl", b'{"text": "fine"}\n["text"]\n', ':2: not a JSON object with a string under "text"'),
        ("a.jsonl", b'{"text": 5}\n', ':1: not a JSON object with a string under "text"'),
        ("a.jsonl", b'{"text": "cut off', ':1: not a JSON object with a string under "text"'),
        ("a.jsonl", b'{"text": "\\ud800"}\n', ':1: not a JSON object with a string under "text"'),
        ("a.txt.gz", b"plain text", ": not a whole gzip file (Not a gzipped file (b'pl'))"),
        (
            "a.txt.gz",
            gzip.compress(b"text" * 9, mtime=0)[:-4],
            ": not a whole gzip file (Compressed file ended before the end-of-stream marker was reached)",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line(tmp_path, text_config, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        list(blocks(text_config(path)))
    assert str(error.value).startswith(f"{path}{message}")


def test_a_path_without_text_is_refused(tmp_path, text_config):
    with pytest.raises(UserError, match=rf"^data\.path: {tmp_path}/absent does not exist$"):
        sources(text_config(tmp_path / "absent"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "table.csv").write_text("a,b")
    for path in ("folder", "table.csv"):
        with pytest.raises(
            UserError,
            match=rf"^data\.path: {tmp_path}/{path} is or holds no \.txt, \.jsonl, .*\.jsonl\.gz file$",
        ):
            sources(text_config(tmp_path / path))
