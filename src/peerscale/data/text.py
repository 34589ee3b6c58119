"""The user's own text: a .txt file (one document), a .jsonl file (one document per line, under the key `text`), or a
folder of such files; each file may be compressed with gzip.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TextIO

from peerscale.config.schema import DataConfig
from peerscale.data.blocks import Block, cut, document
from peerscale.data.store import file_sha256
from peerscale.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
READ_AT_ONCE = 1 << 20


def sources(config: DataConfig) -> dict[str, str]:
    """File -> sha256."""
    return {name: file_sha256(path) for name, path in files(str(config.path)).items()}


def blocks(config: DataConfig) -> Iterator[Block]:
    """All documents, files in the order of their names."""
    return chain.from_iterable(map(read_blocks, files(str(config.path)).values()))


def read_blocks(path: Path) -> Iterator[Block]:
    """The documents of a file."""
    if _is_jsonl(path):
        yield from chain.from_iterable(map(document, read_jsonl(path)))
    else:
        with _open(path) as file:
            yield from _plain(file)


def read_rows(path: Path) -> Iterator[str]:
    """The texts of a .jsonl file, or the lines of another file."""
    if _is_jsonl(path):
        yield from read_jsonl(path)
    else:
        with _open(path) as file:
            yield from file


def read_jsonl(path: Path) -> Iterator[str]:
    """The texts of a file with one JSON object per line; raises `UserError` for other lines or a damaged file."""
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
                text.encode()
            except (ValueError, TypeError, KeyError, AttributeError):
                raise UserError(f'{path}:{number}: not a JSON object with a string under "text"') from None
            yield text


def files(where: str, key: str = "data.path") -> dict[str, Path]:
    """The files of a path by name; raises `UserError`, which names its `key`, if none of them is a text file."""
    path = Path(where).expanduser()
    if path.is_file() and path.name.endswith(SUFFIXES):
        return {path.name: path}
    if not path.exists():
        raise UserError(f"{key}: {path} does not exist")
    inside = {p.relative_to(path): p for p in sorted(path.rglob("*")) if p.name.endswith(SUFFIXES) and p.is_file()}
    hidden = {name for name in inside if any(part.startswith(".") for part in name.parts)}  # such as an editor's copies
    found = {name.as_posix(): p for name, p in inside.items() if name not in hidden}
    if not found:
        raise UserError(f"{key}: {path} is or holds no {', '.join(SUFFIXES)} file")
    return found


def _is_jsonl(path: Path) -> bool:
    return path.name.endswith((".jsonl", ".jsonl.gz"))


@contextmanager
def _open(path: Path) -> Iterator[TextIO]:
    try:
        # utf-8-sig: UTF-8 without the byte-order mark that some editors write
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error})") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file ({error})") from None


def _plain(file: TextIO) -> Iterator[Block]:
    rest, starts_document = "", True
    while part := file.read(READ_AT_ONCE):
        *whole, rest = cut(rest + part)
        for piece in whole:
            yield Block(piece, starts_document)
            starts_document = False
    if rest:
        yield Block(rest, starts_document)
