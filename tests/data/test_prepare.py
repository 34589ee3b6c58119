import errno
import json
import shutil
import threading
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import pytest
from made_up_text import prose

from peerscale.data import prepare as module
from peerscale.data import store
from peerscale.data.prepare import END_OF_TEXT, END_OF_TEXT_ID, GAP_BYTES, held_out_split, prepare, train_tokenizer
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


@pytest.mark.parametrize("total", [100_000, 249_999, 1_000_000, 12_345_678, 101_000_000, 400_000_000])
def test_held_out_spans_lie_apart_and_in_full(total):
    step = max(50, total // 200_000)
    names = [held_out_split(offset, total) for offset in range(0, total, step)]
    runs = [(name, len(list(run))) for name, run in groupby(names)]
    period = ["train", None, "tuning", None, "train", None, "validation", None]
    n_spans = max(1, min(40, total // 250_000))
    assert [name for name, _ in runs] == [*(period * n_spans), "train"]
    assert all(length * step >= GAP_BYTES - step for name, length in runs if name is None)
    for name in ("validation", "tuning"):
        held = sum(length for run, length in runs if run == name) * step
        assert held == pytest.approx(min(0.04 * total, 1_250_000), rel=0.2, abs=2 * step * n_spans)
    assert sum(length for run, length in runs if run == "train") * step >= 0.66 * total


def test_the_tokenizer_never_sees_held_out_text(config, monkeypatch):
    seen = []

    def train(texts, vocab_size):
        seen.extend(texts)
        return train_tokenizer(seen, vocab_size)

    monkeypatch.setattr(module, "train_tokenizer", train)
    corpus = prepare(config)
    # So little text is trained on in full: all of train, and nothing else.
    assert "".join(seen) == "".join(piece for piece, _ in pieces(corpus, "train"))


def test_the_tokenizer_has_the_size_asked_and_loses_nothing():
    tokenizer = train_tokenizer([prose(100_000)], 400)
    assert tokenizer.get_vocab_size() == 400
    assert tokenizer.token_to_id(END_OF_TEXT) == END_OF_TEXT_ID
    strange = "Ünseen \u4e2d\u6587 \U0001f600\r\n\tend"
    assert tokenizer.decode(tokenizer.encode(strange).ids) == strange


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
    greedy = text_config(Path(config.path), evaluation={"validation": 10**9, "speeches": 64}, name="mine")
    assert open_corpus(greedy).folder == prepare(greedy).folder == store.folder(config)


@pytest.mark.parametrize("name", ["train.bin", "tuning.bin", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["other content", "cut off", "gone"])
def test_a_damaged_file_is_named_with_what_to_do(config, name, damage):
    first = prepare(config)
    path = first.folder / name
    whole = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(whole[::-1] if damage == "other content" else whole[:-2])
    with pytest.raises(UserError) as error:
        prepare(config)
    assert str(error.value) == (
        f"{path} is missing or damaged: its sha256 is not that of manifest.json; remove {first.folder}, and the same "
        "command prepares it again"
    )
    shutil.rmtree(first.folder)
    assert prepare(config).manifest == first.manifest


def test_a_sweep_looks_at_the_tokens_once_and_refuses_damaged_ones(tmp_path, monkeypatch):
    """Tokens of the same number as before, but others: nothing else in a run would notice."""
    (tmp_path / "text.txt").write_text(prose(N_BYTES), encoding="utf-8")
    study = write_study(tmp_path, "{methods: [dense], grid: [{budget: 1e7, d_model: [8, 12]}], min_sizes: 1}")
    settings = (
        f"data=text data.path={tmp_path / 'text.txt'} data.vocab_size=512 data.evaluation.validation=1024 context=8 "
        "n_layers=1 min_steps=1 tracking=disabled trainer.accelerator=cpu"
    )
    prepared = call(f"prepare --sweep {study} {settings}")
    (folder,) = (tmp_path / "data").glob("text-512-????????")
    assert (prepared.code, prepared.err) == (0, "")
    assert prepared.out.splitlines()[-1] == f"text, vocabulary 512, prepared in {folder}"

    hashed, file_sha256 = [], store.file_sha256
    monkeypatch.setattr(store, "file_sha256", lambda path: hashed.append(path.name) or file_sha256(path))
    launched = call(f"launch {study} {settings}")
    assert launched.code == 0 and "2 to run" in launched.err
    assert sorted(hashed) == ["text.txt", "tokenizer.json", "train.bin", "tuning.bin", "validation.bin"]

    path = folder / "train.bin"
    path.write_bytes(np.full(path.stat().st_size // 2, 300, dtype="uint16").tobytes())
    for command in (f"launch {study} sweep.seeds=[1]", f"train d_model=8 budget=1e7 data.directory={folder.parent}"):
        damaged = call(f"{command} {settings}")
        assert damaged.code == 2
        assert damaged.err.startswith(f"error: {path} is missing or damaged: ") and damaged.err.count("\n") == 1


def test_a_worker_does_not_train_on_tokens_that_were_cut_off(config):
    path = prepare(config).folder / "train.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match="mmap length is greater than file size"):
        open_corpus(config).tokens("train")


@pytest.mark.parametrize(
    "change", ["not json", "", "{}", {"vocab_size": 600}, {"splits": None}, {"utf8_bytes": {}}], ids=str
)
def test_a_manifest_that_does_not_describe_its_corpus_counts_as_nothing(config, change):
    first = prepare(config)
    path = first.folder / "manifest.json"
    path.write_text(change if isinstance(change, str) else json.dumps({**json.loads(path.read_text()), **change}))
    assert read_manifest(config) is None
    with pytest.raises(UserError, match=r"^corpus text is not prepared; make data, "):
        open_corpus(config)
    assert prepare(config).manifest == first.manifest


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
        patch.setattr(module, "write_tokens", full)
        assert exit_code(lambda: prepare(config) and None) == 2
    assert capsys.readouterr().err == "error: no space left on device; no half-written file is left\n"
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
    n_bytes = len(content.encode()) if content.strip() else 0
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


def test_evaluation_sets_are_encoded_whole_beside_a_corpus_that_stays_as_it_was(tmp_path, config, text_config):
    texts = {"news": ["one page", "another"], "a.b-c": ["one", "two", "three"]}
    files = {}
    for name, pages in texts.items():
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps({"text": page}) + "\n" for page in pages))
    settings = {
        "evaluation_files": {name: str(path) for name, path in files.items()},
        "evaluation": {"validation": 64, **dict.fromkeys(files, 1)},
    }
    alone, asked = prepare(config), text_config(Path(config.path), **settings)
    both = prepare(asked)
    assert both.folder != alone.folder and both.manifest.fingerprint != alone.manifest.fingerprint
    assert {name: [text for text, _ in pieces(both, name)] for name in texts} == texts
    assert both.manifest.utf8_bytes["news"] == 15
    for name, sha256 in alone.manifest.tokens_sha256.items():
        assert both.manifest.tokens_sha256[name] == sha256
    files["news"].write_text(json.dumps({"text": "later news"}))
    later = prepare(asked)
    assert later.manifest.fingerprint != both.manifest.fingerprint
    assert [text for text, _ in pieces(later, "news")] == ["later news"]


def test_the_command_prepares_and_says_where(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(prose(N_BYTES), encoding="utf-8")
    data = f"data=text data.path={path} data.directory={tmp_path / 'data'} data.vocab_size=512"
    done = call(f"prepare {data} data.evaluation.validation=1024")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["set", "train", "tuning", "validation"]
    (folder,) = (tmp_path / "data").glob("text-512-????????")
    assert lines[-1] == f"text, vocabulary 512, prepared in {folder}"
    assert call(f"prepare {data} data.evaluation.validation=1024") == done
    study = f"--sweep {write_study(tmp_path)} sweep.methods=[peer] ffn.n_experts=1024"
    assert call(f"prepare {study} {data} data.evaluation.validation=1024") == done
