"""The viewer's folder: every W&B run listed by its cell's name, and found again by the viewer's own rule."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic_study import script

from peerscale.errors import exit_code
from peerscale.files import ROOT

browse = script("browse")

CELLS = {
    "dense-d12-5e11-s0": "offline-run-20260102_030405-abc0",
    "peer-d12-5e11-ffn.n_experts=1024-s0": "run-20260102_030406-4f-e1",
    "moe-d12-5e11-data=my text-s0": "offline-run-20260102_030407-77",
    f"dense-{'x' * 220}-s0": "offline-run-20260102_030408-78",
}


def call(runs: Path) -> int:
    return exit_code(lambda: browse.main(["mine", "--runs", str(runs)]))


def lay_out(runs: Path) -> None:
    for cell, run in CELLS.items():
        folder = runs / "mine" / cell / "wandb"
        (folder / run).mkdir(parents=True)
        (folder / run / f"run-{run.split('-', 2 + run.startswith('offline'))[-1]}.wandb").write_text(cell)
        (folder / "latest-run").symlink_to(run)
    (runs / "mine" / "dense-d16-5e11-s0").mkdir()  # without a W&B run


@pytest.fixture
def viewers(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The viewer's command lines, in place of itself, on what seems a terminal."""
    calls: list[list[str]] = []
    monkeypatch.setattr(browse.os, "execv", lambda _, words: calls.append(words))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    return calls


def test_runs_are_listed_by_cell_and_found(tmp_path: Path, viewers: list[list[str]]) -> None:
    lay_out(tmp_path)
    for _ in range(2):  # the links of the first call are none of the second's cells
        assert call(tmp_path) == 0
    folder = tmp_path / "mine" / "study" / "wandb"
    assert viewers == [[sys.executable, "-m", "wandb", "leet", str(folder)]] * 2
    seen = {}
    for link in folder.iterdir():
        assert link.name.startswith(("run-", "offline-run-"))  # all others are not listed
        dated = re.search(r"run-\d{8}_\d{6}-", link.name)
        assert dated is not None
        file = link / f"run-{link.name[dated.end() :]}.wandb"
        seen[file.read_text()] = link.name
    assert seen.keys() == CELLS.keys()
    for cell, name in seen.items():
        assert name.removeprefix("run-").startswith(f"{cell[:200]} ")
    assert len(list(folder.parent.iterdir())) == 1, "nothing else is left there"


def test_nothing_to_show_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine" / "dense-d12-5e11-s0").mkdir(parents=True)
    assert call(tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: no W&B runs in {tmp_path / 'mine'}; ") and error.count("\n") == 1
    assert not (tmp_path / "mine" / "study").exists()


def test_without_a_terminal_it_says_what_to_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lay_out(tmp_path)
    assert call(tmp_path) == 2
    assert capsys.readouterr().err.endswith(f": .venv/bin/wandb leet {tmp_path / 'mine' / 'study' / 'wandb'}\n")


def test_make_dashboard_calls_it() -> None:
    done = subprocess.run(
        ["make", "-n", "dashboard", "SWEEP=mine"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "analysis/browse.py mine" in done.stdout
