"""Which checkpoint a cell goes on from, when and where one is saved, and that none can run code."""

import os
import pickle
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from small_cells import budget

from peerscale.config.schema import composed, load
from peerscale.data.prepare import prepare
from peerscale.errors import UserError
from peerscale.model.trained import MADE_BY, checkpoints
from peerscale.plan.cells import single_cell
from peerscale.plan.plan import plan
from peerscale.records.record import Status, read_record
from peerscale.train.cell import fit, train_cell
from peerscale.train.checkpoint import (
    KEPT,
    MICRO_BATCHES,
    TRAINED_S,
    DurableCheckpointIO,
    Resumed,
    StepCheckpoint,
    newest_readable,
)
from peerscale.train.module import LanguageModel


def save(folder: Path, step: int, made_by: str = "a") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:09d}.ckpt"
    state = {"global_step": step, MADE_BY: made_by, MICRO_BATCHES: 1, TRAINED_S: 2.5}
    torch.save({**state, "weights": torch.arange(5000.0)}, path)
    return path


class Code:
    """Pickles as a call that leaves a sign."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.sign),)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no checkpoint"),
    "one bit": lambda path: path.write_bytes(flipped(path.read_bytes())),
    "other content": lambda path: torch.save({"weights": torch.zeros(3)}, path),
    "a list": lambda path: torch.save([1, 2], path),
    "code in an archive": lambda path: torch.save({"global_step": Code(path.parent / "sign")}, path),
    "code in a bare pickle": lambda path: path.write_bytes(pickle.dumps(Code(path.parent / "sign"))),
    "code in an old archive": lambda path: torch.save(
        {"global_step": Code(path.parent / "sign")}, path, _use_new_zipfile_serialization=False
    ),
}


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2  # among the weights
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


def test_the_newest_is_taken(tmp_path: Path) -> None:
    assert newest_readable(tmp_path / "nowhere", "a", 1) == Resumed(None, 0, 0.0)
    save(tmp_path, 5)
    newest = save(tmp_path, 12)
    assert newest_readable(tmp_path, "a", 1) == Resumed(newest, 12, 2.5)
    with pytest.raises(UserError, match=r"with trainer\.micro_batches=1 and continues only with that, not with 4"):
        newest_readable(tmp_path, "a", 4)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_gives_way_to_the_one_before(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    before, newest = save(tmp_path, 5), save(tmp_path, 6)
    DAMAGE[damage](newest)
    assert newest_readable(tmp_path, "a", 1).path == before
    notice = capsys.readouterr().err
    assert notice.startswith(f"notice: {newest} cannot be read (") and notice.endswith(
        f"continuing from {before.name}\n"
    )
    assert notice.count("\n") == 1
    assert not (tmp_path / "sign").exists(), "code in a checkpoint was executed"
    assert checkpoints(tmp_path) == [before], "set aside, so that it takes no place among those kept"


def test_without_a_whole_one_of_its_own_the_cell_begins_anew(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save(tmp_path, 5).write_bytes(b"torn")
    save(tmp_path, 6, made_by="another seed")
    assert newest_readable(tmp_path, "a", 1) == Resumed()
    first, second = capsys.readouterr().err.splitlines()
    assert "is of another configuration" in first and second.endswith("starting at the first step")


def test_one_whose_name_is_of_another_step_is_not_taken(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    before, newest = save(tmp_path, 5), save(tmp_path, 6)
    later = newest.rename(tmp_path / "step-000000120.ckpt")
    assert newest_readable(tmp_path, "a", 1).path == before
    assert f"{later} is of step 6, continuing from {before.name}" in capsys.readouterr().err


@pytest.fixture
def overrides(settings: list[str]) -> list[str]:
    """A cell of 8 steps."""
    prepare(load(settings).data)
    return [*settings, "tracking=disabled", "trainer.kernel=reference", budget(settings, 8)]


def steps_saved(overrides: list[str], folder: Path, *callbacks: lightning.Callback) -> list[int]:
    """The steps after which a run saves a checkpoint; `KEPT` of them stay."""
    config, saved = load(overrides), []

    class Noted(StepCheckpoint):
        def _save_checkpoint(self, trainer: lightning.Trainer, filepath: str) -> None:
            saved.append(trainer.global_step)
            super()._save_checkpoint(trainer, filepath)

    fit(LanguageModel(config, plan(config)), [*callbacks, Noted(folder, config.trainer, fingerprint="a")], None, None)
    names = [f"step-{step:09d}.ckpt" for step in saved]
    assert sorted(path.name for path in folder.glob("*")) == names[-KEPT:]
    return saved


def test_saves_by_steps_or_by_time_and_keeps_the_last_two(overrides: list[str], tmp_path: Path) -> None:
    assert steps_saved([*overrides, "trainer.checkpoint_every_steps=2"], tmp_path / "steps") == [2, 4, 6, 8]
    assert steps_saved([*overrides, "trainer.checkpoint_every_s=1e-9"], tmp_path / "time") == [*range(1, 9)]
    assert steps_saved([*overrides, "trainer.checkpoint_every_s=1e6"], tmp_path / "never") == []


def test_a_step_in_parts_is_saved_whole(overrides: list[str], tmp_path: Path) -> None:
    """A checkpoint between two micro-batches would lack the gradients of the first."""
    parts = [*overrides, "trainer.micro_batches=2"]
    assert steps_saved([*parts, "trainer.checkpoint_every_s=1e-9"], tmp_path / "all") == [*range(1, 9)]
    for path in checkpoints(tmp_path / "all"):
        state = torch.load(path, weights_only=True)
        progress = state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
        assert progress["processed"] == 2 * state["global_step"]


class Terminated(lightning.Callback):
    def on_before_optimizer_step(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_termination_saves_its_step(overrides: list[str], tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        steps_saved(overrides, tmp_path, Terminated())
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000000005.ckpt"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_nothing_is_staged_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "full"))
    path = tmp_path / "checkpoints" / "step-000000001.ckpt"
    DurableCheckpointIO().save_checkpoint({"weights": torch.ones(3)}, path)
    assert torch.equal(torch.load(path, weights_only=True)["weights"], torch.ones(3))
    assert [path.name for path in path.parent.iterdir()] == [path.name]


def test_a_save_that_fails_leaves_nothing_half_written(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    whole = path.read_bytes()
    with pytest.raises(Exception, match="pickle"):
        DurableCheckpointIO().save_checkpoint({"weights": torch.ones(3), "code": lambda: None}, path)
    assert path.read_bytes() == whole and [*tmp_path.iterdir()] == [path]


def test_a_checkpoint_of_another_seed_changes_no_result(overrides: list[str]) -> None:
    cells = [single_cell(composed([*overrides, f"seed={seed}", "trainer.keep_checkpoint=true"])) for seed in (0, 1)]
    assert train_cell(cells[0]) is Status.DONE
    (kept,) = checkpoints(cells[0].folder / "checkpoints")
    other = cells[1].folder / "checkpoints"
    other.mkdir(parents=True)
    (other / kept.name).write_bytes(kept.read_bytes())
    assert train_cell(cells[1]) is Status.DONE
    records = [read_record(cell.folder) for cell in cells]
    assert records[0] and records[1] and records[0].sequence_losses != records[1].sequence_losses
