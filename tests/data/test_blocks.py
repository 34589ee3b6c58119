from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_text import prose

from peerscale.data.blocks import GAP_BYTES, MIN_BYTES, HeldOut, cut, document
from peerscale.data.tokenizer import END_OF_TEXT, END_OF_TEXT_ID, train


@pytest.fixture(scope="module")
def tokenizer():
    return train([prose(100_000)], 400)


@given(
    st.lists(st.sampled_from(["word", "it's", " ", "  ", "\n", "\n\n", "\t", "é", "12", "!?", "x" * 700])).map("".join)
)
def test_tokens_of_the_blocks_are_those_of_the_text(tokenizer, text):
    text *= 5
    blocks = cut(text)
    assert "".join(blocks) == text
    assert all(0 < len(block) <= 1500 for block in blocks)
    if "x" * 1400 not in text:
        assert [i for block in blocks for i in tokenizer.encode(block).ids] == tokenizer.encode(text).ids


def test_only_the_first_block_starts_a_document():
    blocks = list(document(prose(10_000), "speeches"))
    assert [block.starts_document for block in blocks] == [True] + [False] * (len(blocks) - 1)
    assert {block.split for block in blocks} == {"speeches"}
    assert len(blocks) >= 7
    assert list(document(" \n\n")) == []


@pytest.mark.parametrize("total", [MIN_BYTES, 249_999, 1_000_000, 12_345_678, 101_000_000, 400_000_000])
def test_held_out_spans_lie_apart_and_in_full(total):
    held_out = HeldOut(total_bytes=total)
    step = max(50, total // 200_000)
    names = [held_out.split(offset) for offset in range(0, total, step)]
    runs = [(name, len(list(run))) for name, run in groupby(names)]
    period = ["train", None, "tuning", None, "train", None, "validation", None]
    assert [name for name, _ in runs] == [*(period * held_out.n_spans), "train"]
    assert all(length * step >= GAP_BYTES - step for name, length in runs if name is None)
    for name in ("validation", "tuning"):
        held = sum(length for run, length in runs if run == name) * step
        assert held == pytest.approx(min(0.04 * total, 1_250_000), rel=0.2, abs=2 * step * held_out.n_spans)
    assert sum(length for run, length in runs if run == "train") * step >= 0.66 * total


def test_the_tokenizer_has_the_size_asked_and_loses_nothing(tokenizer):
    assert tokenizer.get_vocab_size() == 400
    assert tokenizer.token_to_id(END_OF_TEXT) == END_OF_TEXT_ID
    strange = "Ünseen \u4e2d\u6587 \U0001f600\r\n\tend"
    assert tokenizer.decode(tokenizer.encode(strange).ids) == strange


def test_training_the_tokenizer_twice_gives_the_same():
    texts = prose(60_000, seed=1).splitlines()
    assert train(texts, 600).to_str() == train(texts, 600).to_str()
