"""Cells in processes of their own, some of which are killed."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import peerscale.launch.run as launch
from peerscale.errors import Aborted, UserError
from peerscale.files import ROOT
from peerscale.launch.processes import TRIES, run_at_once, worker_environments
from peerscale.plan.cell import Cell
from peerscale.plan.cells import planned_cells
from peerscale.records.record import Status, read_record
from slurm_cluster import trainable_study
from toy_study import write_study


@pytest.fixture
def cells(tmp_path: Path) -> list[Cell]:
    return planned_cells(write_study(tmp_path))[:4]


def begun(cell: Cell) -> int:
    """Note that a cell is begun; returns how often it was."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    with (cell.folder / "begun").open("a") as file:
        file.write("x")
    return (cell.folder / "begun").stat().st_size


def times_begun(cells: list[Cell]) -> list[int]:
    return [(cell.folder / "begun").stat().st_size for cell in cells]


def killed_until(nth: int, kill: str):
    """A run of a cell that kills its own process, if it is the cell `kill`, until it is begun the `nth` time."""

    def run(cell: Cell) -> Status:
        if begun(cell) < nth and cell.name == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.3)
        return Status.DONE

    return run


def test_a_killed_cell_is_tried_again_and_the_others_go_on(cells: list[Cell]) -> None:
    statuses = run_at_once(cells, 2, killed_until(TRIES, cells[1].name))
    assert statuses == {cell.name: Status.DONE for cell in cells}
    assert times_begun(cells) == [1, TRIES, 1, 1]


def test_a_cell_killed_each_time_is_given_up_and_the_others_are_run(cells: list[Cell]) -> None:
    with pytest.raises(Aborted, match=f"the process of {cells[0].name} was killed {TRIES} times"):
        run_at_once(cells, 2, killed_until(1000, cells[0].name))
    assert times_begun(cells) == [TRIES, 1, 1, 1]


def test_an_error_ends_the_other_processes(cells: list[Cell]) -> None:
    def refuse(cell: Cell) -> Status:
        begun(cell)
        if cell.name == cells[0].name:
            raise UserError("not as it is")
        time.sleep(60)
        return Status.DONE

    started = time.monotonic()
    with pytest.raises(UserError, match="not as it is"):
        run_at_once(cells, 2, refuse)
    assert time.monotonic() - started < 50


def test_each_worker_sees_gpus_of_its_own(cells: list[Cell], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)

    def seen(n: int, **trainer: object) -> list[str | None]:
        of = [replace(c, config=replace(c.config, trainer=replace(c.config.trainer, **trainer))) for c in cells]
        return [environment.get("CUDA_VISIBLE_DEVICES") for environment in worker_environments(of, n)]

    assert seen(2, accelerator="gpu") == ["0", "1"]
    assert seen(9, accelerator="auto") == ["0", "1", "2", "0"], "no more workers than cells"
    assert seen(2, accelerator="gpu", devices=2) == ["0,1", "2,0"]
    assert seen(2, accelerator="cpu") == [None, None]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert seen(3, accelerator="gpu") == ["5", "7", "5"]


def test_jobs_without_a_launcher_are_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(launch, "prepare", lambda config: SimpleNamespace(manifest=None))
    monkeypatch.setattr(launch, "run_at_once", lambda cells, n, run: asked.append(n) or {})
    assert launch.main([str(write_study(tmp_path, settings="min_steps: 1")), "--jobs", "3"]) == 0
    assert asked == [3]


def workers(parent: int) -> list[int]:
    """The processes of a sweep that run cells."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            of, command = (path / "stat").read_text().rpartition(")")[2].split()[1], (path / "cmdline").read_text()
        except OSError:  # it has ended
            continue
        if int(of) == parent and "popen_loky" in command:
            found.append(int(path.name))
    return found


def test_the_workers_of_a_killed_sweep_end_soon(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "peerscale.launch", str(trainable_study(tmp_path, steps=5000))]
    sweep = subprocess.Popen([*command, "--launcher", "joblib", "--jobs", "2"], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not any(path.stat().st_size for path in tmp_path.rglob("metrics.jsonl")):
        assert sweep.poll() is None
        time.sleep(0.05)
    left = workers(sweep.pid)
    assert left
    sweep.kill()
    sweep.wait()
    until = time.monotonic() + 8  # before a process without work would end by itself
    while (left := [pid for pid in left if is_alive(pid)]) and time.monotonic() < until:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def is_alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(("kills", "code"), [(1, 0), (1000, 4)])
def test_a_sweep_outlives_the_death_of_a_worker(kills: int, code: int, tmp_path: Path) -> None:
    study = trainable_study(tmp_path, steps=600)
    part = ["sweep.methods=[dense]", f"sweep.budgets=[{planned_cells(study)[1].config.budget}]"]
    command = [sys.executable, "-m", "peerscale.launch", str(study), "--launcher", "joblib", "--jobs", "2", *part]
    sweep = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while kills and sweep.poll() is None:
        # With one kill, of a worker in training; with many, of every worker as soon as it is there.
        if kills > 1 or any(path.stat().st_size for path in tmp_path.rglob("metrics.jsonl")):
            for process in workers(sweep.pid)[:1]:
                os.kill(process, signal.SIGKILL)
                kills -= 1
        time.sleep(0.05)
    _, errors = sweep.communicate(timeout=240)
    assert sweep.returncode == code, errors
    assert "Traceback" not in errors and "is tried again: its process was killed" in errors
    (cell,) = planned_cells(study, part)
    if code == 0:
        assert (record := read_record(cell.folder)) and record.status is Status.DONE
    else:
        assert f"was killed {TRIES} times" in errors
