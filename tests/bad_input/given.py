"""What lies in the folder before a command meets it."""

import gzip
import json
from pathlib import Path

import numpy as np

from peerscale.config.schema import composed, load
from peerscale.data.prepare import prepare
from peerscale.data.store import folder as corpus_folder
from peerscale.plan.cells import planned_cells, single_cell
from peerscale.records.record import Status, write_record
from programs import call
from toy_study import record_of, write_study

WORDS = [f"{a}{b}" for a in ("ba", "ke", "li", "mo", "nu", "ra") for b in ("", "n", "st", "lly", "rk")]


def text(folder: Path) -> None:
    """text.txt: 250 kB of words, enough for held-out sets."""
    chosen = np.random.default_rng(0).integers(len(WORDS), size=(9000, 6))
    (folder / "text.txt").write_text("\n".join(" ".join(WORDS[i] for i in line) for line in chosen))


def gzips(folder: Path) -> None:
    """A gzip file cut off, and one that is none."""
    text(folder)
    (folder / "cut.txt.gz").write_bytes(gzip.compress((folder / "text.txt").read_bytes())[:5000])
    (folder / "none.txt.gz").write_text("plain")
    (folder / "latin.txt").write_bytes("fine\nna\xefve\n".encode("latin-1"))


TEXT = ["data=text", "data.vocab_size=300", "data.evaluation.validation=512", "data.max_epochs=100"]
TINY = [*TEXT, "d_model=8", "n_layers=2", "context=8", "min_steps=4", "budget=2e7", "tracking=disabled"]
"""A single cell that trains in a second."""


def places(folder: Path) -> list[str]:
    return [
        f"data.path={folder / 'text.txt'}",
        f"data.directory={folder / 'data'}",
        f"trainer.runs_directory={folder / 'runs'}",
    ]


def corpus(folder: Path) -> None:
    """text.txt, prepared in data/, and a link `corpus` to it."""
    text(folder)
    config = load([*TINY, *places(folder)]).data
    prepare(config)
    (folder / "corpus").symlink_to(corpus_folder(config))


def record(folder: Path) -> None:
    """The record of a finished single cell, with its corpus, and a link `cell` to it."""
    corpus(folder)
    overrides = [*TINY, *places(folder)]
    cell = single_cell(composed(overrides))
    from peerscale.data.store import open_corpus

    finished = record_of(cell, Status.DONE, corpus=open_corpus(cell.config.data).manifest.fingerprint)
    write_record(cell.folder, finished)
    (folder / "cell").symlink_to(cell.folder)


def cells(folder: Path) -> None:
    """A study of one finished cell a size, with metrics."""
    write_study(folder, "{methods: [dense], grid: [{budget: 1e10, d_model: [8, 12, 16, 20, 24]}]}", "min_steps: 1")
    for cell in planned_cells(folder / "toy.yaml"):
        loss = 5 + (cell.config.d_model - 16) ** 2 / 100
        sets = {"validation": {"loss": loss, "se": 0.1, "tokens": 131072.0, "bits_per_byte": 2.5, "ppl": 190.5}}
        write_record(cell.folder, record_of(cell, Status.DONE, evaluation=sets, sequence_losses=[loss, loss + 0.1]))
        rows = [{"step": s, "tokens": s * 1024, "flops": s * 10**6, "loss": 6.0, "tokens_per_s": 1e4} for s in (1, 2)]
        (cell.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "cell").symlink_to(folder / "runs/toy/dense-d8-1e10-s0")


def latin_study(folder: Path) -> None:
    """toy.yaml, a study whose comment is not UTF-8."""
    file = write_study(folder, "{methods: [dense], grid: [{budget: 1e10, d_model: [8]}]}")
    file.write_bytes("# Größe\n".encode("latin-1") + file.read_bytes())


def study(folder: Path) -> None:
    """The same, collected; a link `study` to its tables."""
    cells(folder)
    assert call(f"collect toy --runs {folder / 'runs'} --results {folder / 'results'}").code == 0
    (folder / "study").symlink_to(folder / "runs/toy/study")


def table(folder: Path) -> None:
    """fit.csv, 20 runs of a parametric law, and fit.json."""
    n, d = (grid.ravel() for grid in np.meshgrid([1e7, 3e7, 1e8, 3e8], [1e9, 3e9, 1e10, 3e10, 1e11]))
    loss = 1.8 + 480 / n**0.34 + 2100 / d**0.37
    lines = ["N,D,loss,method", *(f"{a},{b},{c},dense" for a, b, c in zip(n, d, loss, strict=True))]
    (folder / "fit.csv").write_text("\n".join(lines) + "\n")


def published(folder: Path) -> None:
    """results/toy of two records."""
    cells(folder)
    from peerscale.records.table import read_records, write_records

    write_records(folder / "results/toy", read_records(folder / "runs" / "toy")[:2])
