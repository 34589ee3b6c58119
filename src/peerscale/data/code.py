"""A second corpus, which shares nothing with verse: Python code written by people, from pinned wheels of PyPI.

Whole packages are held out. Licences: BSD (sympy, scipy, numpy, networkx, django, statsmodels; ipython; dask, sphinx,
celery), MIT (sqlalchemy, twisted; sqlglot), Apache 2.0 (xarray). A file is one document. Left out are files that

- say in their first lines that a program wrote them,
- are mostly data: of their characters less than 55 % are letters, or a line is longer than 1,000,
- are copies: at least a third of their lines occurred in files before them. The held-out packages come last, so what
  they share with the training set is left out of them.
"""

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from peerscale.data.text import Block, document
from peerscale.data.wheels import fetch

SETS = {
    "train": {
        "sympy-1.14.0-py3-none-any.whl": "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
        "scipy-1.18.1-cp312-cp312-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl": "f55fa87b6c612ecd6b058f167c53231b1d14e412efe361d3d6e38b3631c73218",  # noqa: E501
        "numpy-2.5.5-cp312-cp312-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl": "704d819265e5d1064d932968e9ee85fff2103ccc78c05b878c06943ba27b8507",  # noqa: E501
        "networkx-3.7-py3-none-any.whl": "e3fd2c13a7814cee3746340d8d7f8598a67f16a58bf47fb7f8793fab6efca1b0",
        "statsmodels-0.15.0-cp312-cp312-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl": "c6f2bd48915cc9b3b95c3c7f6ac363b6f8aaa38172962ba5f7f6885f0dfe57f2",  # noqa: E501
        "django-6.1.3-py3-none-any.whl": "a0530e3fdac55d34ccc5893c36f6c57d7a7083064f3d414537e51473648b3290",
        "sqlalchemy-2.1.9-py3-none-any.whl": "449fed5c2caa3b278cc57499d09db001fb3f28dc7f18affc48142aee4dcc0cdf",
        "twisted-26.10.0-py3-none-any.whl": "3732f42af218925a0fe78d6668db55853f7fb532245a89a2669babe7d3000fa8",
    },
    "validation": {
        "xarray-2026.9.0-py3-none-any.whl": "fe349fa871628b1a0a5217af3fe1283a2862d5485156e6eda354fffb81c3bb7c",
        "ipython-9.18.1-py3-none-any.whl": "997ce9140d374531a61069c70c0f9ef299d6dd3559ea0f94b8af589726e3c1d5",
        "sqlglot-30.31.0-py3-none-any.whl": "51a876a43edecf8ee6fd4c872cf6713d899c4234256bba0be96a8c7c8d8781e8",
    },
    "tuning": {
        "dask-2026.8.0-py3-none-any.whl": "ccc0c83a189b0398602435189771d28dad7b5773b6089bb8dce14ae732dd782c",
        "sphinx-9.1.1-py3-none-any.whl": "f8b60013ce25017be41a509e5c2d265bc1918410061315c36b809c7f335646c0",
        "celery-5.7.0-py3-none-any.whl": "18310a9c919f9029e4735367484d93e6a25cdfd30afdc474622cc263d9b35f6e",
    },
}
"""Set -> file -> sha256; read in this order. The bytes are the same on every machine."""
WHEELS = {file: sha256 for files in SETS.values() for file, sha256 in files.items()}

FIRST_LINES = 15
WRITTEN_BY_A_PROGRAM = re.compile(
    r"auto(matically)?[ -]?generated|do not (edit|modify)|^\s*#.*\bgenerated (by|from|with)\b",
    flags=re.IGNORECASE | re.MULTILINE,
)
MIN_LETTERS = 0.55
"""Of the characters that are not white space; the underscore counts as a letter."""
MAX_LINE = 1000
SIGNIFICANT = 20
"""Lines with at most this many characters ("return self") are ignored in the search for copies."""
MAX_REPEATED = 1 / 3


def blocks(wheels: Path) -> Iterator[Block]:
    """The files of all sets, from the wheels, which are kept in a folder."""
    paths = {path.name: path for path in fetch(WHEELS, wheels)}
    seen: set[str] = set()
    for split, files in SETS.items():
        for file in files:
            for text in modules(paths[file]):
                if written_by_people(text) and not is_copy(text, seen):
                    yield from document(text, split)


def modules(wheel: Path) -> Iterator[str]:
    """The texts of the Python files in a wheel, in the order of their names."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".py"):
                yield archive.read(name).decode("utf-8", errors="replace")


def written_by_people(text: str) -> bool:
    """Whether a file is neither the output of a program nor mostly data."""
    lines = text.split("\n")
    if WRITTEN_BY_A_PROGRAM.search("\n".join(lines[:FIRST_LINES])) or max(map(len, lines)) > MAX_LINE:
        return False
    letters = sum(map(len, re.findall(r"[A-Za-z_]+", text)))
    return letters >= MIN_LETTERS * sum(map(len, text.split()))


def is_copy(text: str, seen: set[str]) -> bool:
    """Whether a file mostly repeats lines of earlier ones, which are `seen`, or has no line to tell; adds its own."""
    significant = [line for line in map(str.strip, text.split("\n")) if len(line) > SIGNIFICANT]
    n_repeated = sum(line in seen for line in significant)
    seen.update(significant)
    return n_repeated >= MAX_REPEATED * len(significant)
