import json
import os
import re
import time
from pathlib import Path

import pytest

from peerscale.launch.progress import Progress, duration
from peerscale.plan.cells import Cell, planned_cells
from peerscale.records.record import Status, write_record
from toy_study import record_of, write_study


@pytest.fixture
def cells(tmp_path: Path) -> list[Cell]:
    """Four cells of a second each by estimate, give or take."""
    return planned_cells(write_study(tmp_path), ["min_steps=1"])[:4]


def log(cell: Cell, *steps: int, torn: str = "") -> None:
    rows = [{"step": s, "tokens": s * 1024, "flops": s, "loss": 5.4321, "tokens_per_s": 21_000.0} for s in steps]
    (cell.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)


def test_counts_what_has_ended_of_all(cells: list[Cell]) -> None:
    progress = Progress("toy", cells, already_done=7)
    assert progress.line() == "toy 7/11 | time left unknown yet"
    for cell, status in zip(cells, (Status.DONE, Status.FAILED, Status.DIVERGED), strict=False):
        write_record(cell.folder, record_of(cell, status))
    assert progress.line().startswith("toy 10/11 | ")


def test_shows_what_runs_and_how_far_it_is(cells: list[Cell]) -> None:
    progress = Progress("toy", cells)
    write_record(cells[1].folder, record_of(cells[1], Status.RUNNING))
    log(cells[1], 10, 20)
    count, running, _ = progress.line().split(" | ")
    assert count == "toy 0/4"
    assert re.fullmatch(rf"{re.escape(cells[1].name)} 20/{cells[1].plan.steps} loss 5\.43\d* 21(\.0)?k tok/s", running)


def test_time_left_goes_by_the_work_done(cells: list[Cell]) -> None:
    progress = Progress("toy", cells)
    write_record(cells[0].folder, record_of(cells[0], Status.DONE))
    half = cells[1].plan.steps // 2
    write_record(cells[1].folder, record_of(cells[1], Status.RUNNING))
    log(cells[1], half)
    work = [cell.estimate_s for cell in cells]
    done = work[0] + work[1] * half / cells[1].plan.steps
    progress.started = time.monotonic() - 1000
    left = progress.line().split(" | ")[-1]
    assert left == f"{duration(1000 * (sum(work) - done) / done)} left"


def test_time_left_does_not_count_steps_that_were_done_before(cells: list[Cell]) -> None:
    resumed, steps = cells[1], cells[1].plan.steps
    write_record(resumed.folder, record_of(resumed, Status.RUNNING))
    log(resumed, steps // 2 + 3)  # later than the checkpoint, from which it goes on
    (resumed.folder / "checkpoints").mkdir()
    for step in (10, steps // 2):
        (resumed.folder / "checkpoints" / f"step-{step:09d}.ckpt").touch()
    os.utime(resumed.folder / "record.json", (1, 1))
    progress = Progress("toy", [resumed])
    write_record(resumed.folder, record_of(resumed, Status.RUNNING))
    log(resumed, steps // 2 + 10)
    progress.started = time.monotonic() - 1000
    # Ten steps in 1,000 s.
    assert progress.line().split(" | ")[-1] == f"{duration(100 * (steps - steps // 2 - 10))} left"


def test_a_cell_that_has_just_begun_is_starting(cells: list[Cell]) -> None:
    progress = Progress("toy", cells)
    write_record(cells[1].folder, record_of(cells[1], Status.RUNNING))
    assert f"{cells[1].name} starting" in progress.line()


def test_records_from_before_are_not_of_this_sweep(cells: list[Cell]) -> None:
    write_record(cells[0].folder, record_of(cells[0], Status.FAILED))
    os.utime(cells[0].folder / "record.json", (1, 1))
    assert Progress("toy", cells).line().startswith("toy 0/4 | ")


@pytest.mark.parametrize("torn", ['{"step": 40, "tok', "\n"])
def test_a_row_that_is_just_being_written_does_no_harm(cells: list[Cell], torn: str) -> None:
    progress = Progress("toy", cells)
    write_record(cells[1].folder, record_of(cells[1], Status.RUNNING))
    log(cells[1], 10, 20, torn=torn)
    assert progress.line().startswith("toy 0/4 | ")


def test_a_long_log_is_read_from_its_end(cells: list[Cell]) -> None:
    progress = Progress("toy", cells)
    write_record(cells[1].folder, record_of(cells[1], Status.RUNNING))
    log(cells[1], *range(500))
    assert f"{cells[1].name} 499/" in progress.line()


def test_prints_a_last_line_and_leaves_no_thread(cells: list[Cell], capsys: pytest.CaptureFixture) -> None:
    with Progress("toy", cells) as progress:
        assert progress.thread.is_alive()
    assert not progress.thread.is_alive()
    assert capsys.readouterr().err == "toy 0/4 | time left unknown yet\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (45.4, "45 s"), (89, "89 s"), (90, "2 min"), (360, "6 min"), (5399, "90 min"), (5400, "1.5 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
