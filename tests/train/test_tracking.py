"""W&B runs, with the real client and a stand-in for the server."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_cells import budget

from peerscale.files import ROOT
from peerscale.records.record import Status, read_record
from peerscale.train import tracking
from tracked_cell import TrackedCell
from wandb_server import Run, WandbServer

# The client's own thread may still ask its service when a test has ended both.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


def only(server: WandbServer) -> Run:
    (run,) = server.runs.values()
    return run


def logs(cell: TrackedCell) -> list[Path]:
    return sorted((cell.folder / "wandb").glob("*run-*/*.wandb"))


def sync(cell: TrackedCell) -> None:
    (log,) = logs(cell)
    assert log.parent.name.startswith("offline-run-")
    command = [Path(sys.executable).parent / "wandb", "sync", log.parent]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def test_an_offline_cell_that_was_killed_and_resumed_is_one_run(wandb_server: WandbServer, tmp_path: Path) -> None:
    cell = TrackedCell(tmp_path)
    cell.log(1, 40)
    cell.kill()
    cell.log(21, 30)  # from a checkpoint before the last rows
    cell.kill()
    cell.log(26, 60)
    cell.finish()
    assert not wandb_server.runs
    sync(cell)
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
    assert time.monotonic() - started < 20, "the second cell does not try again"
    errors = capsys.readouterr().err
    assert errors.startswith("notice: W&B: ") and "make sync SWEEP=single uploads it later" in errors
    assert errors.count("\n") == 1, "told once"
    wandb_server.down, wandb_server.delay_s, wandb_server.fail_every = False, 0.0, 0
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    sync(cell)
    cell.assert_arrived(only(wandb_server))


def test_a_server_that_goes_down_holds_up_neither_rows_nor_the_end(
    wandb_server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "TIMEOUT_S", 3.0)
    cell = TrackedCell(tmp_path, "online")
    cell.log(1, 5)
    wandb_server.down = True
    started = time.monotonic()
    cell.log(6, 500)
    cell.finish()
    assert time.monotonic() - started < 20
    assert "notice: W&B: TimeoutError" in capsys.readouterr().err


KILLS_THE_SERVICE = """
import os, signal, sys
from pathlib import Path
from peerscale.train.module import LanguageModel
from peerscale.train.__main__ import main
step = LanguageModel.training_step
def kill_service(self, tokens, batch_idx):
    if batch_idx == 4:
        for path in Path("/proc").glob("[0-9]*/stat"):
            number, name, _, parent, *_ = path.read_text().split()
            if "wandb" in name and int(parent) == os.getpid():
                os.kill(int(number), signal.SIGKILL)
                print("ended the service", flush=True)
    return step(self, tokens, batch_idx)
LanguageModel.training_step = kill_service
sys.exit(main())
"""


def test_a_killed_service_costs_nothing(settings: list[str], tmp_path: Path) -> None:
    """Neither the cell nor a row of it, and the program ends as always."""
    overrides = [*settings, budget(settings, 12)]
    # By WANDB_SERVICE a program shares the service of the one that started it, here of the tests before.
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    environment["WANDB_ERROR_REPORTING"] = "false"
    ran = subprocess.run(
        [sys.executable, "-c", KILLS_THE_SERVICE, *overrides],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert ran.stdout.count("ended the service") == 1 and ran.returncode == 0, ran
    assert ran.stderr.count("notice: W&B: ") == 1 and "Traceback" not in ran.stderr, ran.stderr
    (folder,) = (tmp_path / "runs" / "single").iterdir()
    record = read_record(folder)
    assert record is not None and record.status is Status.DONE
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 6
