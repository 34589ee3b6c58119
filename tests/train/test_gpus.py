"""Workers of one machine take different GPUs, and share them evenly where there are more workers."""

import os
import tempfile
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from peerscale.train import gpus


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv(gpus.VISIBLE, raising=False)


def as_another_worker(n: int, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """What a further process would see, while the locks of the earlier ones stay held."""
    monkeypatch.setattr(gpus, "_held", [])
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    gpus.take_gpus(n)
    workers.append(gpus._held)
    return os.environ.get(gpus.VISIBLE)


workers: list[list] = []


@pytest.mark.usefixtures("four_gpus")
def test_each_worker_has_a_gpu_of_its_own_until_they_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [as_another_worker(1, monkeypatch) for _ in range(6)] == ["0", "1", "2", "3", "0", "1"]


@pytest.mark.usefixtures("four_gpus")
def test_cells_on_several_gpus_have_theirs_together(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [as_another_worker(2, monkeypatch) for _ in range(3)] == ["0,1", "2,3", "0,1"]
    assert as_another_worker(4, monkeypatch) is None, "all are seen anyway"


@pytest.mark.usefixtures("four_gpus")
def test_what_the_user_allows_bounds_it_and_a_second_call_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "_held", [])
    monkeypatch.setenv(gpus.VISIBLE, "2,3")
    gpus.take_gpus(1)
    assert os.environ[gpus.VISIBLE] == "2"
    gpus.take_gpus(1)
    assert os.environ[gpus.VISIBLE] == "2"
    workers.append(gpus._held)


@pytest.mark.usefixtures("four_gpus")
def test_the_locks_of_another_user_are_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [as_another_worker(1, monkeypatch) for _ in range(2)] == ["0", "1"]
    acquire, theirs = FileLock.acquire, set(Path(tempfile.gettempdir()).iterdir())

    def refused(lock: FileLock, **settings: float) -> object:
        if Path(lock.lock_file) in theirs:
            raise PermissionError(lock.lock_file)
        return acquire(lock, **settings)

    monkeypatch.setattr(FileLock, "acquire", refused)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert [as_another_worker(1, monkeypatch) for _ in range(4)] == ["0", "1", "2", "3"]
