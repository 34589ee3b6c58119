"""Text in blocks of at most 1,500 characters, and the held-out spans that are cut from a corpus of them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

HELD_OUT_SHARE = 0.04
HELD_OUT_BYTES = 1_250_000
"""A held-out set is 4 % of the corpus, but no more than this: 450,000 tokens at a vocabulary of 2,048."""
MAX_SPANS = 40
BYTES_PER_SPAN = 250_000
GAP_BYTES = 6_000
"""Left out of every set on both sides of a held-out span, so that no poem or page is both held out and trained on. No
block is longer."""
MIN_BYTES = 100_000
"""A corpus needs as many: spans and gaps then leave two thirds of it to train on."""


class Block(NamedTuple):
    """A piece of a document."""

    text: str
    starts_document: bool
    split: str | None = None
    """The set that it belongs to; None: train, validation or tuning, decided by its place (`HeldOut`)."""


# Blocks end between a character and a following space, where the tokenizer ends a word anyway: the tokens of the
# blocks, joined, are those of the text. Text without spaces is cut anywhere.
_BLOCK = re.compile(r"(?s).{1,1500}\Z|.{0,1499}\S(?=\s)|.{1,1500}")


def cut(text: str) -> list[str]:
    """Blocks whose concatenation is `text`."""
    return _BLOCK.findall(text)


def document(text: str, split: str | None = None) -> Iterator[Block]:
    """One whole document as blocks; none if it holds only white space."""
    if text.strip():
        yield from (Block(piece, i == 0, split) for i, piece in enumerate(cut(text)))


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """Where train, validation and tuning lie in a corpus: by place, never by random lines, which would leak.

    The corpus is divided into equal periods; in each, one span at a quarter is `tuning`, one at three quarters
    `validation`, each between two gaps, and the rest is `train`.
    """

    total_bytes: int

    @property
    def n_spans(self) -> int:
        return max(1, min(MAX_SPANS, self.total_bytes // BYTES_PER_SPAN))

    @property
    def span_bytes(self) -> int:
        return int(min(HELD_OUT_SHARE * self.total_bytes, HELD_OUT_BYTES)) // self.n_spans

    def split(self, offset: int) -> str | None:
        """The set of the block that begins `offset` bytes into the corpus; None in a gap."""
        period = self.total_bytes / self.n_spans
        place = offset % period
        for name, begin in (("tuning", period / 4), ("validation", period * 3 / 4)):
            if begin <= place < begin + self.span_bytes:
                return name
            if begin - GAP_BYTES <= place < begin + self.span_bytes + GAP_BYTES:
                return None
        return "train"
