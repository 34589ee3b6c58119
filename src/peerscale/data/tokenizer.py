"""Byte-level BPE (Sennrich et al. 2016), trained on the corpus: a standard 50k vocabulary would dwarf small models."""

from collections.abc import Iterable, Iterator
from itertools import islice

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from peerscale.data.blocks import Block
from peerscale.errors import UserError

END_OF_TEXT = "<|endoftext|>"
"""Separates documents."""
END_OF_TEXT_ID = 0
ENCODED_AT_ONCE = 512
"""Blocks that are encoded at once, on all cores. An encoding takes about a hundred times the memory of its text."""


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of exactly `vocab_size` tokens: end of text, the 256 bytes, and merges. It can encode any text.

    Raises:
        UserError: the texts have too few different words for so many merges.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (reached := tokenizer.get_vocab_size()) < vocab_size:
        raise UserError(
            f"too little text for data.vocab_size {vocab_size}: it yields {reached} tokens; "
            f"set data.vocab_size={reached} or less, or give more text"
        )
    return tokenizer


def encode(blocks: Iterable[Block], tokenizer: Tokenizer) -> Iterator[tuple[Block, list[int]]]:
    """The blocks with their tokens."""
    blocks = iter(blocks)
    while some := list(islice(blocks, ENCODED_AT_ONCE)):
        encodings = tokenizer.encode_batch_fast([block.text for block in some])
        yield from ((block, encoding.ids) for block, encoding in zip(some, encodings, strict=True))
