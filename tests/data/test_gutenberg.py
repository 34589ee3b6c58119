import pickle
import random

import numpy as np
import pytest

from peerscale.config.schema import load
from peerscale.data.gutenberg import pickled_strings, verse_blocks
from peerscale.data.store import open_corpus, read_manifest


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_strings_are_read_from_a_pickle_without_running_it(tmp_path, protocol):
    traces = tmp_path / "executed"
    lines = ["Tyger Tyger, burning bright,", "é" * 300, "In the forests of the night;"]
    pickled = pickle.dumps({"first": Evil(str(traces)), "lines": lines}, protocol=protocol)
    found = list(pickled_strings(pickled))
    assert [string for string in found if string in lines] == lines
    assert not traces.exists()
    pickle.loads(pickled)["first"].close()
    assert traces.exists(), "the pickle was harmless, so that this test showed nothing"


def verse(n_lines, seed):
    rng = random.Random(seed)
    nouns = ["".join(rng.choices("aeiounrstlm", k=7)) for _ in range(500)]
    return [f"And the {rng.choice(nouns)} of the {rng.choice(nouns)}, that was {i}" for i in range(n_lines)]


def test_blocks_of_verse_join_to_the_lines():
    lines = verse(200, seed=0)
    blocks = list(verse_blocks(lines))
    assert "".join(block.text for block in blocks) == "\n".join(lines) + "\n"
    assert [block.starts_document for block in blocks] == [True, False, False, False]
    assert [block.text.count("\n") for block in blocks] == [64, 64, 64, 8]


def test_another_edition_of_a_block_is_dropped_and_breaks_the_run():
    first, second = verse(64, seed=0), verse(64, seed=1)
    edition = [line.upper().replace(",", ";") + "." for line in first]
    assert not set(edition) & set(first)
    blocks = list(verse_blocks([*first, *edition, *second]))
    assert [block.text.splitlines() for block in blocks] == [first, second]
    assert [block.starts_document for block in blocks] == [True, True]


@pytest.mark.parametrize(("n_repeated", "kept"), [(15, True), (16, False)])
def test_a_quarter_of_repeated_lines_is_too_much(n_repeated, kept):
    first, second = verse(64, seed=0), verse(64, seed=1)
    mixed = first[:n_repeated] + second[n_repeated:]
    assert (mixed in [block.text.splitlines() for block in verse_blocks([*first, *mixed])]) == kept


def test_short_lines_do_not_count_as_repeats():
    first, second = verse(64, seed=0), verse(64, seed=1)
    first[::2] = second[::2] = ["Amen, amen."] * 32
    assert len(list(verse_blocks([*first, *second]))) == 2


def test_verse_that_is_not_english_is_dropped():
    latin = [f"Arma virumque cano, Troiae qui primus ab oris {i}" for i in range(64)]
    english = verse(64, seed=0)
    assert [block.text.splitlines() for block in verse_blocks([*latin, *english])] == [english]


def test_the_prepared_corpus_is_the_configured_one():
    config = load().data
    if config.source != "gutenberg" or read_manifest(config) is None:
        pytest.skip("the default corpus is not prepared (make data)")
    corpus = open_corpus(config)
    assert corpus.manifest.splits["train"] == config.train_tokens
    assert all(corpus.manifest.splits[name] >= 300_000 for name in ("validation", "tuning", "speeches", "wikipedia"))
    # Published sizes of the two further sets: 249 speeches, 10,033 articles, one end of text between two.
    assert np.count_nonzero(corpus.tokens("speeches") == 0) == 248
    assert np.count_nonzero(corpus.tokens("wikipedia") == 0) == 10_032
    beginning = corpus.tokenizer.decode(corpus.tokens("speeches")[:60].tolist())
    assert beginning.startswith("Fellow-Citizens of the Senate and House of Representatives:\n\nI embrace")
    for name in corpus.manifest.splits:
        tokens = corpus.tokens(name)
        assert len(tokens) == corpus.manifest.splits[name] and tokens.max() < config.vocab_size
        assert not tokens.flags.writeable
