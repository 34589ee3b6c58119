"""Text as blocks of at most 1,500 characters, and the user's text, which is files.

A .txt file is one document; a .jsonl or .parquet file has one document a row, under `text`. The first two may be
compressed with gzip. A folder stands for all such files in it.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from peerscale.config.schema import DataConfig
from peerscale.errors import UserError

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")


class Block(NamedTuple):
    """A piece of a document."""

    text: str
    starts_document: bool
    split: str | None = None
    """The set that the block belongs to; None: its position in the corpus decides (`prepare.held_out_split`)."""


# Blocks end before a space, where the tokenizer ends a word anyway, so that the tokens of the blocks together are the
# tokens of the text. Text without spaces is cut anywhere.
_BLOCK = re.compile(r"(?s).{1,1500}\Z|.{0,1499}\S(?=\s)|.{1,1500}")


def document(text: str, split: str | None = None) -> Iterator[Block]:
    """A document as blocks, whose concatenation is `text`; no blocks if it is only white space."""
    if text.strip():
        yield from (Block(found[0], found.start() == 0, split) for found in _BLOCK.finditer(text))


@dataclass(frozen=True)
class Texts:
    """The documents of some files, read again at each iteration, since all of them may not fit into memory."""

    files: dict[str, Path]
    """Name, relative to the folder -> file; read in this order."""
    split: str | None
    """The set that they are; None: the text of which spans are held out."""

    def __iter__(self) -> Iterator[Block]:
        """The blocks of all documents; raises `UserError` for a file that cannot be read."""
        for path in self.files.values():
            n_rows = 0
            try:
                for text in _rows(path):
                    text.encode()
                    n_rows += 1
                    yield from document(text, self.split)
            except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
                raise UserError(f"{path} cannot be read: {error}".partition("\n")[0]) from None
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                what = f'{path}: row {n_rows + 1}: no string under "text" ({error})'
                raise UserError(what.partition("\n")[0]) from None


def texts(config: DataConfig) -> list[Texts]:
    """The files that a configuration names; raises `UserError` for a key whose path has no text."""
    sets = [Texts(_files(config.path, "path"), None)] if config.source == "text" and config.path else []
    return sets + [Texts(_files(path, f"evaluation_files.{n}"), n) for n, path in config.evaluation_files.items()]


def _files(where: str, key: str) -> dict[str, Path]:
    path = Path(where).expanduser()
    if not path.exists():
        raise UserError(f"data.{key}: {path} does not exist")
    inside = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    names = [file.name if file == path else file.relative_to(path).as_posix() for file in inside]
    hidden = re.compile(r"(^|/)\.")  # such as an editor's copies
    found = {n: p for n, p in zip(names, inside, strict=True) if n.endswith(SUFFIXES) and not hidden.search(n)}
    if not found:
        raise UserError(f"data.{key}: {path} is or holds no {', '.join(SUFFIXES)} file")
    return found


def _rows(path: Path) -> Iterator[Any]:
    """The texts of a file's documents; anything else than a string where a row has none."""
    if path.suffix == ".parquet":
        import pyarrow.parquet  # 0.2 s that planning need not take

        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(columns=["text"]):
                yield from batch["text"].to_pylist()
        return
    # utf-8-sig: UTF-8 without the byte-order mark that some editors write
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
        if path.name.endswith((".jsonl", ".jsonl.gz")):
            yield from (json.loads(line)["text"] for line in file if line.strip())
        else:
            yield file.read()
