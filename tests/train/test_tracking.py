"""W&B runs, with the real client and a stand-in for the server."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from peerscale.train import tracking
from tracked_cell import TrackedCell
from wandb_server import WandbServer

# The client's own thread may still ask its service when a test has ended both.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


def only(server: WandbServer):
    (run,) = server.runs.values()
    return run


def logs(cell: TrackedCell) -> list[Path]:
    return sorted((cell.folder / "wandb").glob("*run-*/*.wandb"))


def test_an_offline_cell_that_was_killed_and_resumed_is_one_run(wandb_server: WandbServer, tmp_path: Path) -> None:
    cell = TrackedCell(tmp_path)
    cell.log(1, 40)
    cell.kill()
    cell.log(21, 30)  # from a checkpoint before the last rows
    cell.kill()
    cell.log(26, 60)
    cell.finish()
    (log,) = logs(cell)
    assert log.parent.name.startswith("offline-run-")
    assert not wandb_server.runs
    command = [Path(sys.executable).parent / "wandb", "sync", log.parent]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    cell.assert_arrived(only(wandb_server))
    assert [r["_step"] for r in only(wandb_server).history] == list(range(1, 61))
    assert wandb_server.unknown == []


def test_an_online_cell_goes_on_where_the_server_is(wandb_server: WandbServer, tmp_path: Path) -> None:
    cell = TrackedCell(tmp_path, "online")
    cell.log(1, 40)
    cell.kill()
    tracking_before = only(wandb_server)
    cell.log(21, 60)
    cell.finish()
    assert only(wandb_server) is tracking_before
    cell.assert_arrived(only(wandb_server))


@pytest.mark.parametrize("fault", ["down", "slow", "failing", "no key"])
def test_no_server_holds_up_the_start(
    fault: str,
    wandb_server: WandbServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(tracking, "TIMEOUT_S", 1.0)
    match fault:
        case "down":
            wandb_server.down = True
        case "slow":
            wandb_server.delay_s = 2.0
        case "failing":
            wandb_server.fail_every = 1
        case "no key":
            monkeypatch.delenv("WANDB_API_KEY")
    cell, other = TrackedCell(tmp_path, "online"), TrackedCell(tmp_path, "online", seed=1)
    cell.log(1, 2)
    cell.finish()
    started = time.monotonic()
    monkeypatch.setattr(tracking, "TIMEOUT_S", 60.0)
    other.log(1, 2)
    other.finish()
    assert time.monotonic() - started < 10, "the second cell does not try again"
    errors = capsys.readouterr().err
    assert errors.startswith("notice: W&B: ") and "make sync SWEEP=single uploads it later" in errors
    assert errors.count("\n") == 1, "told once"
    for each in (cell, other):
        (log,) = logs(each)
        assert log.parent.name.startswith("offline-run-"), "to be looked at meanwhile"


def test_a_server_that_goes_down_holds_up_neither_rows_nor_the_end(
    wandb_server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "TIMEOUT_S", 3.0)
    cell = TrackedCell(tmp_path, "online")
    cell.log(1, 5)
    wandb_server.down = True
    started = time.monotonic()
    cell.log(6, 500)
    assert time.monotonic() - started < 5
    started = time.monotonic()
    cell.finish()
    assert time.monotonic() - started < 12
    assert "notice: W&B: TimeoutError" in capsys.readouterr().err
    assert len((cell.folder / "metrics.jsonl").read_text().splitlines()) == 500


def test_a_client_that_breaks_costs_no_row(
    wandb_server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    cell = TrackedCell(tmp_path)
    cell.log(1, 2)
    assert cell.tracker is not None and cell.tracker.run is not None

    def dead(*_: object, **__: object) -> None:
        raise ConnectionResetError("Connection lost")  # what it raises when its service was killed

    monkeypatch.setattr(cell.tracker.run.run, "log", dead)
    cell.log(3, 9)
    cell.finish()
    rows = (cell.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in rows] == list(range(1, 10))
    assert "ConnectionResetError: Connection lost" in capsys.readouterr().err


def test_signals_are_alerts(wandb_server: WandbServer, tmp_path: Path) -> None:
    cell = TrackedCell(tmp_path, "online")
    cell.log(1, 12)
    cell.log(13, 15, loss=9.5)
    cell.finish()
    (alert,) = wandb_server.alerts
    assert (alert["title"], alert["severity"]) == ("loss spike", "WARN")
    assert alert["text"].startswith("step 13: loss spike, 9.500 nats per token after ")


def test_disabled_tracking_starts_nothing(wandb_server: WandbServer, tmp_path: Path) -> None:
    cell = TrackedCell(tmp_path, "disabled")
    cell.log(1, 3)
    cell.finish()
    assert not (cell.folder / "wandb").exists()
    assert not wandb_server.operations
