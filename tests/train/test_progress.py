import json
import os
from pathlib import Path

import pytest

from peerscale.plan.cell import Cell
from peerscale.plan.cells import planned_cells
from peerscale.records.record import Status, write_record
from peerscale.train.progress import Progress
from toy_study import record_of, write_study


@pytest.fixture
def cells(tmp_path: Path) -> list[Cell]:
    return planned_cells(write_study(tmp_path), ["min_steps=1"])[:4]


def log(cell: Cell, *steps: int, torn: str = "") -> None:
    rows = [{"step": s, "tokens": s * 1024, "flops": s, "loss": 5.4321, "tokens_per_s": 21_000.0} for s in steps]
    (cell.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)


def line(progress: Progress) -> str:
    progress.look()
    return str(progress.bar)


def test_counts_what_has_ended_of_all(cells: list[Cell]) -> None:
    progress = Progress("toy", cells, already_done=7)
    assert line(progress).startswith("toy 7/11   0%|") and line(progress).endswith("<?")
    for cell, status in zip(cells, (Status.DONE, Status.FAILED, Status.DIVERGED), strict=False):
        write_record(cell.folder, record_of(cell, status))
    assert line(progress).startswith("toy 10/11 ")


def test_shows_what_runs_and_how_far_it_is(cells: list[Cell]) -> None:
    progress = Progress("toy", cells)
    write_record(cells[1].folder, record_of(cells[1], Status.RUNNING))
    assert line(progress).endswith(f", {cells[1].name} starting")
    log(cells[1], *range(500))
    assert line(progress).startswith("toy 0/4 ")
    assert line(progress).endswith(f", {cells[1].name} 499/{cells[1].plan.steps} loss 5.432 21.0k tok/s")


def test_the_bar_goes_by_the_work_done_now(cells: list[Cell]) -> None:
    done, resumed, *_ = cells
    half = resumed.plan.steps // 2
    write_record(resumed.folder, record_of(resumed, Status.RUNNING))
    log(resumed, half + 3)  # later than the checkpoint, from which it goes on
    (resumed.folder / "checkpoints").mkdir()
    for step in (10, half):
        (resumed.folder / "checkpoints" / f"step-{step:09d}.ckpt").touch()
    os.utime(resumed.folder / "record.json", (1, 1))
    progress = Progress("toy", cells)
    a_step = resumed.plan.flops / resumed.plan.steps
    assert progress.bar.total == pytest.approx(sum(cell.plan.flops for cell in cells))
    assert progress.bar.initial == pytest.approx(half * a_step)
    progress.look()
    assert progress.bar.n == progress.bar.initial, "what it did before is not this sweep's"
    write_record(resumed.folder, record_of(resumed, Status.RUNNING))
    log(resumed, half + 10)
    write_record(done.folder, record_of(done, Status.DONE))
    progress.look()
    assert progress.bar.n - progress.bar.initial == pytest.approx(done.plan.flops + 10 * a_step)


def test_records_from_before_are_not_of_this_sweep(cells: list[Cell]) -> None:
    write_record(cells[0].folder, record_of(cells[0], Status.FAILED))
    os.utime(cells[0].folder / "record.json", (1, 1))
    assert line(Progress("toy", cells)).startswith("toy 0/4 ")


@pytest.mark.parametrize("torn", ['{"step": 40, "tok', "\n"])
def test_a_row_that_is_just_being_written_does_no_harm(cells: list[Cell], torn: str) -> None:
    progress = Progress("toy", cells)
    write_record(cells[1].folder, record_of(cells[1], Status.RUNNING))
    log(cells[1], 10, 20, torn=torn)
    assert line(progress).startswith("toy 0/4 ")


def test_prints_a_last_line_and_leaves_no_thread(cells: list[Cell], capsys: pytest.CaptureFixture) -> None:
    with Progress("toy", cells) as progress:
        assert progress.thread.is_alive()
    assert not progress.thread.is_alive()
    (last,) = capsys.readouterr().err.splitlines()
    assert last.startswith("toy 0/4   0%|")
