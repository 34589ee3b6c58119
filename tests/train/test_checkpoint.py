"""Which checkpoint a cell goes on from, when one is saved, and that none can run code."""

import os
import pickle
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peerscale.train.checkpoint import COST, KEPT, TimedCheckpoint, checkpoints, newest_readable


def save(folder: Path, step: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:09d}.ckpt"
    torch.save({"global_step": step, "weights": torch.arange(5000.0)}, path)
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
    assert newest_readable(tmp_path, "", 1) is None
    assert newest_readable(tmp_path / "nowhere", "", 1) is None
    save(tmp_path, 5)
    newest = save(tmp_path, 12)
    assert newest_readable(tmp_path, "", 1) == (newest, 12)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_gives_way_to_the_one_before(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    before, newest = save(tmp_path, 5), save(tmp_path, 6)
    DAMAGE[damage](newest)
    assert newest_readable(tmp_path, "", 1) == (before, 5)
    notice = capsys.readouterr().err
    assert notice.startswith(f"notice: {newest} cannot be read (") and notice.endswith(
        f"continuing from {before.name}\n"
    )
    assert notice.count("\n") == 1
    assert not (tmp_path / "sign").exists(), "code in a checkpoint was executed"
    assert checkpoints(tmp_path) == [before], "set aside, so that it takes no place among those kept"


def test_without_a_whole_one_the_cell_begins_anew(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for step in (5, 6):
        save(tmp_path, step).write_bytes(b"torn")
    assert newest_readable(tmp_path, "", 1) is None
    assert capsys.readouterr().err.splitlines()[1].endswith("starting at the first step")


def trainer(save_s: float = 0.0) -> Any:
    def save_checkpoint(path: Path) -> None:
        time.sleep(save_s)
        path.write_bytes(b"state")

    connector = SimpleNamespace(received_sigterm=False)
    return SimpleNamespace(
        accumulate_grad_batches=1, global_step=0, _signal_connector=connector, save_checkpoint=save_checkpoint
    )


def steps_saved(callback: TimedCheckpoint, training: Any, n_steps: int, step_s: float = 0.0) -> list[int]:
    saved = []
    for step in range(1, n_steps + 1):
        time.sleep(step_s)
        training.global_step, before = step, callback.saved_at
        callback.on_train_batch_end(training, None, None, None, step - 1)  # type: ignore[arg-type]
        if callback.saved_at > before:
            saved.append(step)
    return saved


def test_saves_by_steps_and_keeps_the_last_two(tmp_path: Path) -> None:
    assert steps_saved(TimedCheckpoint(tmp_path, 1e9, 3), trainer(), 10) == [3, 6, 9]
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000000009.ckpt", "step-000000006.ckpt"]
    assert len(list(tmp_path.iterdir())) == KEPT


def test_saves_by_time(tmp_path: Path) -> None:
    saved = steps_saved(TimedCheckpoint(tmp_path, 0.2), trainer(), 30, step_s=0.02)
    assert 1 <= len(saved) <= 4
    assert steps_saved(TimedCheckpoint(tmp_path, 1e9), trainer(), 30) == []


def test_a_termination_is_told_to_lightning_only_when_its_step_is_saved(tmp_path: Path) -> None:
    callback, training = TimedCheckpoint(tmp_path, 1e9), trainer()
    before = signal.getsignal(signal.SIGTERM)
    try:
        callback.on_train_start(training, None)  # type: ignore[arg-type]
        assert steps_saved(callback, training, 3) == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert not training._signal_connector.received_sigterm
        assert steps_saved(callback, training, 1) == [1]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert training._signal_connector.received_sigterm


def test_a_slow_save_is_followed_by_a_longer_interval(tmp_path: Path) -> None:
    callback = TimedCheckpoint(tmp_path, 0.01)
    saved = steps_saved(callback, trainer(save_s=0.05), 20, step_s=0.01)
    assert len(saved) == 1, f"the next is due {0.05 / COST} s later"


def test_the_time_trained_goes_on_after_a_resume(tmp_path: Path) -> None:
    first, second = TimedCheckpoint(tmp_path, 1e9), TimedCheckpoint(tmp_path, 1e9)
    time.sleep(0.1)
    second.load_state_dict(first.state_dict())
    assert second.trained_s >= 0.1
