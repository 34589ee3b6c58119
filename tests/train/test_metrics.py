"""What the rows of a cell say of each step, interrupted or not."""

import json
import os
from pathlib import Path

import pytest
from small_cells import break_off, budget, train

from peerscale.config.schema import load
from peerscale.files import ROOT
from peerscale.plan.plan import plan, schedule
from peerscale.records.curves import read_metrics
from peerscale.records.record import Status

STEP_S = 0.05


@pytest.fixture
def interrupted(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A cell of 12 steps, each of at least `STEP_S`, with a row every fifth, that fails in its ninth step."""
    break_off(monkeypatch, 9, RuntimeError("broken off"), STEP_S)
    overrides = [*settings, "tracking=disabled", "trainer.checkpoint_every_steps=1", "trainer.log_every_steps=5"]
    overrides.append(budget(overrides, 12))
    status, record = train(overrides)
    assert (status, record.reason) == (Status.FAILED, "RuntimeError: broken off")
    return overrides


def test_a_row_has_the_rate_of_its_own_step(interrupted: list[str]) -> None:
    status, record = train(interrupted)
    assert status is Status.DONE
    config = load(interrupted)
    planned = plan(config)
    rows = list(read_metrics(ROOT / config.trainer.runs_directory / "single" / record.cell))
    assert [row["step"] for row in rows] == [5, 10, 12]
    # The schedule counts from 0: the first step takes its factor 0.
    assert [row["lr"] for row in rows] == pytest.approx([planned.lr * schedule(config, planned, s) for s in (4, 9, 11)])


def test_the_first_row_after_a_resume_counts_only_steps_since(interrupted: list[str]) -> None:
    _, record = train(interrupted)
    config = load(interrupted)
    speeds = {
        row["step"]: row["tokens_per_s"]
        for row in read_metrics(ROOT / config.trainer.runs_directory / "single" / record.cell)
    }
    fastest = config.tokens_per_step / STEP_S
    assert all(0 < speed <= fastest for speed in speeds.values()), (speeds, fastest)


def test_rows_that_are_lost_or_damaged_cost_only_themselves(
    interrupted: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the run that failed in step 9 with a checkpoint after step 8, only the row of step 5 is there."""
    config = load(interrupted)
    (path,) = (ROOT / config.trainer.runs_directory).glob("single/*/metrics.jsonl")
    (row,) = path.read_text().splitlines()
    assert json.loads(row)["step"] == 5
    path.write_text(row[:-9] + "\nno row\n" + row.replace('"step": 5', '"step": 9'))
    status, _ = train(interrupted)
    assert status is Status.DONE
    assert [row["step"] for row in read_metrics(path.parent)] == [10, 12]
    assert f"notice: {path}: 1 rows between steps 5 and 5 are damaged or missing" in capsys.readouterr().err


def test_rows_are_on_disk_before_a_checkpoint_and_the_final_record_are(
    settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        done.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    overrides = [*settings, "tracking=disabled", "trainer.checkpoint_every_steps=4"]
    train([*overrides, budget(overrides, 8)])
    written = [name for name in done if name.endswith(("jsonl", "ckpt", "record.json"))]
    rows, record = "metrics.jsonl", "record.json"
    assert written == [record, rows, "step-000000004.ckpt", rows, "step-000000008.ckpt", rows, record]
