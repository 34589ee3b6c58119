"""What the rows of a cell say of each step, interrupted or not."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from small_cells import break_off, budget, train

from peerscale.config.schema import load
from peerscale.files import ROOT
from peerscale.plan.plan import plan, schedule
from peerscale.records.curves import read_metrics
from peerscale.records.record import Record, Status
from peerscale.train.module import LanguageModel

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


def rows_of(overrides: list[str]) -> tuple[Record, list[dict[str, Any]]]:
    """A cell's record and its rows, less times."""
    status, record = train(overrides)
    assert status is Status.DONE
    rows = read_metrics(ROOT / load(overrides).trainer.runs_directory / "single" / record.cell)
    return record, [{key: value for key, value in row.items() if key != "tokens_per_s"} for row in rows]


def test_losses_in_training_change_nothing_and_end_with_the_records(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as few tokens as a batch has, the small part is the whole set."""
    cell = [*settings, "ffn=peer", "tracking=disabled", "data.evaluation.validation=128"]
    cell += ["trainer.checkpoint_every_steps=1", budget(cell, 12)]
    never, usual, resumed = ([*cell, f"trainer.runs_directory={tmp_path / at}"] for at in ("never", "usual", "resumed"))
    record, rows = rows_of([*usual, "trainer.validations=3"])
    assert [row["step"] for row in rows if "val_loss" in row] == [4, 8, 12]
    assert rows[-1]["val_loss"] == pytest.approx(record.evaluation["validation"]["loss"], abs=1e-9)
    without, plain = rows_of([*never, "trainer.validations=0"])
    assert without.sequence_losses == record.sequence_losses
    assert plain == [{key: value for key, value in row.items() if key != "val_loss"} for row in rows]
    break_off(monkeypatch, 7, RuntimeError("broken off"))
    assert train([*resumed, "trainer.validations=3"])[0] is Status.FAILED
    assert rows_of([*resumed, "trainer.validations=3"])[1] == rows


def test_a_row_has_the_norm_before_clipping_and_the_rate_of_tables(
    settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    norms, clip = [], LanguageModel.configure_gradient_clipping

    def noted(self: LanguageModel, *args: Any, **kwargs: Any) -> None:
        gradients = [p.grad for name, p in self.named_parameters() if not name.endswith(("w_down", "w_up"))]
        norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in gradients if g is not None)))
        clip(self, *args, **kwargs)

    monkeypatch.setattr(LanguageModel, "configure_gradient_clipping", noted)
    overrides = [*settings, "ffn=peer", "tracking=disabled", "optim.table_lr=0.003", "optim.table_lr_law=null"]
    overrides += ["optim.grad_clip=0.01", budget(overrides, 6)]
    _, rows = rows_of(overrides)
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms[1::2], rel=1e-5)
    assert min(norms) > 0.01
    config = load(overrides)
    factors = [schedule(config, plan(config), step) for step in (1, 3, 5)]
    assert [row["table_lr"] for row in rows] == pytest.approx([0.003 * factor for factor in factors])


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
