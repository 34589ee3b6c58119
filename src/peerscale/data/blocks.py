"""Text in blocks of at most 1,500 characters, and the held-out spans of a corpus."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

HELD_OUT_SHARE = 0.04
HELD_OUT_BYTES = 1_250_000
"""A held-out set has 4 % of the corpus, but at most this many bytes: 450,000 tokens with a vocabulary of 2,048."""
MAX_SPANS = 40
BYTES_PER_SPAN = 250_000
GAP_BYTES = 6_000
"""Bytes on both sides of a held-out span that no set uses, so that no poem or page is both held out and trained on. No
block is longer than this."""
MIN_BYTES = 100_000
"""Smallest corpus; spans and gaps then leave two thirds of it for training."""


class Block(NamedTuple):
    """A piece of a document."""

    text: str
    starts_document: bool
    split: str | None = None
    """The set that the block belongs to; None: `HeldOut` decides by its position (train, validation or tuning)."""


# Blocks end before a space, where the tokenizer ends a word anyway, so that the tokens of the blocks together are the
# tokens of the text. Text without spaces is cut anywhere.
_BLOCK = re.compile(r"(?s).{1,1500}\Z|.{0,1499}\S(?=\s)|.{1,1500}")


def cut(text: str) -> list[str]:
    """Blocks whose concatenation is `text`."""
    return _BLOCK.findall(text)


def document(text: str, split: str | None = None) -> Iterator[Block]:
    """A whole document as blocks; no blocks if it is only white space."""
    if text.strip():
        yield from (Block(piece, i == 0, split) for i, piece in enumerate(cut(text)))


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """The positions of train, validation and tuning in a corpus: contiguous spans, since random lines would leak.

    The corpus is divided into equal periods. In each period a span at one quarter is `tuning` and a span at three
    quarters is `validation`, both between two gaps; the rest is `train`.
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
