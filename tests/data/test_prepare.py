import errno
import json
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from made_up_text import prose

from peerscale.data import prepare as module
from peerscale.data import store, tokenizer
from peerscale.data.blocks import GAP_BYTES
from peerscale.data.prepare import prepare
from peerscale.data.store import open_corpus, read_manifest
from peerscale.errors import UserError, exit_code
from programs import call
from toy_study import write_study

N_BYTES = 400_000


@pytest.fixture
def config(tmp_path, text_config):
    path = tmp_path / "text.txt"
    path.write_text(prose(N_BYTES), encoding="utf-8")
    return text_config(path)


def pieces(corpus, split):
    """The texts between end-of-text tokens, and the tokens of each."""
    tokens = np.asarray(corpus.tokens(split))
    parts = np.split(tokens, np.flatnonzero(tokens == 0))
    parts = [parts[0], *(part[1:] for part in parts[1:])]
    return [(corpus.tokenizer.decode(part.tolist()), part.tolist()) for part in parts]


def refuse(*_, **__):
    raise AssertionError("prepared again")


def test_the_sets_are_stretches_of_the_text_far_from_each_other(config):
    text = prose(N_BYTES).encode()
    corpus = prepare(config)
    assert corpus.manifest.vocab_size == corpus.tokenizer.get_vocab_size() == 512
    stretches = []
    for split in ("train", "validation", "tuning"):
        found = pieces(corpus, split)
        for piece, tokens in found:
            assert tokens == corpus.tokenizer.encode(piece).ids
            begin = text.index(piece.encode())
            stretches.append((begin, begin + len(piece.encode()), split))
        assert corpus.manifest.splits[split] == sum(len(tokens) for _, tokens in found) + len(found) - 1
        assert corpus.manifest.utf8_bytes[split] == sum(len(piece.encode()) for piece, _ in found)
        assert not corpus.tokens(split).flags.writeable
    stretches.sort()
    assert [split for *_, split in stretches] == ["train", "tuning", "train", "validation", "train"]
    assert stretches[0][0] == 0 and stretches[-1][1] == len(text)
    block = 1500
    for (_, end, _), (begin, _, _) in pairwise(stretches):
        assert GAP_BYTES - block <= begin - end <= GAP_BYTES + block
    for name in ("validation", "tuning"):
        assert corpus.manifest.utf8_bytes[name] == pytest.approx(0.04 * len(text), abs=block)


def test_documents_are_joined_by_one_end_of_text(tmp_path, text_config):
    path = tmp_path / "text.jsonl"
    texts = [prose(700, seed=i) for i in range(300)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    corpus = prepare(text_config(path))
    found = [piece for piece, _ in pieces(corpus, "train")]
    assert len(found) > 200
    assert found == [text for text in texts if text in set(found)]


def test_the_tokenizer_never_sees_held_out_text(config, monkeypatch):
    seen = []

    def train(texts, vocab_size):
        seen.extend(texts)
        return tokenizer.train(seen, vocab_size)

    monkeypatch.setattr(module, "train", train)
    corpus = prepare(config)
    # So little text is trained on in full: all of train, and nothing else.
    assert "".join(seen) == "".join(piece for piece, _ in pieces(corpus, "train"))


def test_a_prepared_corpus_is_reused_and_read_back(config, monkeypatch):
    assert read_manifest(config) is None
    first = prepare(config)
    monkeypatch.setattr(module, "_build", refuse)
    again = prepare(config)
    assert again.manifest == first.manifest == read_manifest(config) == open_corpus(config).manifest
    assert np.array_equal(open_corpus(config).tokens("train"), first.tokens("train"))


def test_an_open_corpus_keeps_its_sets_when_another_replaces_it(config):
    opened = prepare(config)
    opened.tokens("train")
    held_out = np.fromfile(opened.folder / "validation.bin", dtype="uint16")
    path = Path(config.path)
    path.write_text(path.read_text().replace("e", "o"))
    prepare(config)
    assert not np.array_equal(np.fromfile(opened.folder / "validation.bin", dtype="uint16"), held_out)
    assert np.array_equal(opened.tokens("validation"), held_out)


def test_equal_text_gives_equal_tokens_and_other_text_another_fingerprint(tmp_path, config, text_config):
    first = prepare(config).manifest
    copy = tmp_path / "copy.txt"
    copy.write_text(prose(N_BYTES), encoding="utf-8")
    second = prepare(text_config(copy)).manifest
    assert second.fingerprint == first.fingerprint and second.sources != first.sources
    assert second.tokens_sha256 == first.tokens_sha256

    copy.write_text(prose(N_BYTES).replace("0", "1"), encoding="utf-8")  # of the same length
    assert prepare(text_config(copy)).manifest.fingerprint != first.fingerprint
    larger = prepare(text_config(copy, vocab_size=600)).manifest
    assert larger.fingerprint != first.fingerprint
    assert read_manifest(config) == first


def test_damage_is_found_and_mended(config, capsys):
    first = prepare(config)
    path = first.folder / "train.bin"
    whole = path.read_bytes()
    n_tokens = len(whole) // 2

    path.write_bytes(whole[:-2])
    with pytest.raises(UserError) as error:
        open_corpus(config)
    assert str(error.value).startswith(f"{path} is missing or damaged (not {n_tokens:,} tokens); make data")
    assert prepare(config).manifest == first.manifest
    assert f"{path} is missing or damaged (not {n_tokens:,} tokens): preparing it again\n" in capsys.readouterr().err
    assert path.read_bytes() == whole

    saved = first.folder / "tokenizer.json"
    saved.write_text(saved.read_text(encoding="utf-8") + " ", encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer\.json is missing or damaged; make data"):
        open_corpus(config)


@pytest.mark.parametrize("content", ["{}", "not json", ""])
def test_an_unreadable_manifest_counts_as_nothing(config, content):
    first = prepare(config)
    (first.folder / "manifest.json").write_text(content)
    assert read_manifest(config) is None
    assert prepare(config).manifest == first.manifest


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "object"}, {"dtype": "uint32"}, {"vocab_size": 600}, {"splits": None}, {"code": "x"},
    ],
    ids=str,
)  # fmt: skip
def test_a_manifest_that_does_not_describe_its_corpus_counts_as_nothing(config, change):
    folder = prepare(config).folder
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert read_manifest(config) is None
    with pytest.raises(UserError, match=r"^corpus text is not prepared; make data, "):
        open_corpus(config)


def test_what_an_older_preparation_made_is_made_again(config, monkeypatch):
    prepare(config)
    monkeypatch.setattr(store, "PREPARATION_VERSION", store.PREPARATION_VERSION + 1)
    assert read_manifest(config) is None
    assert prepare(config).manifest.preparation_version == store.PREPARATION_VERSION


def test_two_at_once_prepare_it_once(config, monkeypatch):
    builds = []
    build = module._build
    monkeypatch.setattr(module, "_build", lambda *args, **kwargs: builds.append(1) or build(*args, **kwargs))
    made = []
    threads = [threading.Thread(target=lambda: made.append(prepare(config))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(made) == 2 and len(builds) == 1


def test_a_full_disk_leaves_nothing_half_written(config, monkeypatch, capsys):
    def full(blocks, *_):
        next(iter(blocks))
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.store, "write_tokens", full)
        assert exit_code(lambda: prepare(config) and None) == 2
    assert capsys.readouterr().err == "error: no space left on disk; no half-written file is left\n"
    folder = store.folder(config)
    assert [path.name for path in folder.parent.iterdir()] == [f"{folder.name}.lock"]
    (folder.parent / f".{folder.name}.killed").mkdir()
    prepare(config)
    assert {path.name for path in folder.parent.iterdir()} == {f"{folder.name}.lock", folder.name}
    assert {path.name for path in folder.iterdir()} == {
        *("train.bin", "validation.bin", "tuning.bin", "tokenizer.json", "manifest.json")
    }


@pytest.mark.parametrize("content", ["", "\n \n", prose(50_000)])
def test_too_short_a_corpus_for_held_out_sets(tmp_path, text_config, content):
    path = tmp_path / "short.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as error:
        prepare(text_config(path))
    n_bytes = len(content.encode())
    expected = f"{path}: {n_bytes:,} bytes of text are too few for held-out sets; at least 100,000 are needed"
    assert str(error.value) == expected


def test_too_short_a_corpus_for_its_vocabulary(tmp_path, config, text_config):
    path = tmp_path / "text.txt"
    with pytest.raises(
        UserError, match=r"^too little text for data\.vocab_size 60000: it yields (\d+) tokens; "
    ) as error:
        prepare(text_config(path, vocab_size=60_000))
    reached = int(str(error.value).split("it yields ")[1].split()[0])
    assert f"set data.vocab_size={reached} or less, or give more text" in str(error.value)
    prepare(text_config(path, vocab_size=reached))


def test_a_corpus_is_prepared_whatever_is_to_be_evaluated_on_it(tmp_path, config, text_config):
    first = prepare(config)
    greedy = text_config(tmp_path / "text.txt", evaluation={"validation": 10**9, "speeches": 64}, name="mine")
    assert open_corpus(greedy).folder == prepare(greedy).folder == first.folder


def test_the_command_prepares_and_says_where(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(prose(N_BYTES), encoding="utf-8")
    data = f"data=text data.path={path} data.directory={tmp_path / 'data'} data.vocab_size=512"
    done = call(f"prepare {data} data.evaluation.validation=1024")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["set", "train", "validation", "tuning"]
    (folder,) = (tmp_path / "data").glob("text-512-????????")
    assert lines[-1] == f"text, vocabulary 512, prepared in {folder}"
    again = call(f"prepare {data} data.evaluation.validation=1024")
    assert (again.code, again.err) == (0, "")
    assert again.out.splitlines()[:-1] == lines[:-1]
    assert again.out.splitlines()[-1] == f"text, vocabulary 512, already prepared in {folder}"


def test_the_command_prepares_for_a_part_of_a_study_with_overrides_of_its_layers(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(prose(N_BYTES), encoding="utf-8")
    study = write_study(tmp_path)
    data = f"data=text data.path={path} data.vocab_size=512 data.evaluation.validation=1024"
    done = call(f"prepare --sweep {study} sweep.methods=[peer] ffn.n_experts=1024 {data}")
    assert (done.code, done.err) == (0, "")
    (folder,) = (tmp_path / "data").glob("text-512-????????")
    assert done.out.splitlines()[-1] == f"text, vocabulary 512, prepared in {folder}"
