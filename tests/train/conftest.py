"""A small corpus, prepared once in a process, and the settings of cells that train on it in a second."""

from pathlib import Path

import pytest

from peerscale.config.schema import load
from peerscale.data.prepare import prepare
from wandb_server import wandb_server  # noqa: F401


@pytest.fixture(scope="session")
def corpus_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text with some structure, 400 kB."""
    words = [f"{a}{b}" for a in ("ba", "ke", "li", "mo", "nu", "ra") for b in ("", "n", "st", "lly", "rk")]
    state, lines = 1, []
    for _ in range(12_000):
        line = []
        for _ in range(6):
            state = (state * 1103515245 + 12345) % 2**31
            line.append(words[(state >> 16) % len(words)])
        lines.append(" ".join(line))
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    prepare(load(overrides(path, path.parent)).data)
    return path


@pytest.fixture
def settings(corpus_path: Path, tmp_path: Path) -> list[str]:
    """Overrides that train in a second and write under tmp_path."""
    return overrides(corpus_path, tmp_path)


def overrides(corpus_path: Path, folder: Path) -> list[str]:
    return [
        "data=text", f"data.path={corpus_path}", "data.vocab_size=300", f"data.directory={corpus_path.parent / 'data'}",
        "data.evaluation.validation=512", "data.max_epochs=100", "d_model=8", "n_layers=2",
        "batch_sequences=16", "context=8", "min_steps=4", f"trainer.runs_directory={folder / 'runs'}",
        "trainer.log_every_steps=2", "trainer.kernel=torch",
    ]  # fmt: skip
