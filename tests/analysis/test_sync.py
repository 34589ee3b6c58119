"""Uploading a study to a stand-in for the W&B server: all of it, once, whatever happened before."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import wandb
from filelock import FileLock
from synthetic_study import script

from peerscale.errors import exit_code
from peerscale.records.record import LOCK, Status
from peerscale.train.upload import study_cells, upload_cell
from tracked_cell import TrackedCell
from wandb_server import Run, WandbServer, serving

sync = script("sync")
SYNC = Callable[..., int]


@pytest.fixture
def upload(tmp_path: Path) -> SYNC:
    return lambda *options: exit_code(lambda: sync.main(["single", "--runs", str(tmp_path), *options]))


def run_of(server: WandbServer, cell: TrackedCell) -> Run:
    (run,) = [run for run in server.runs.values() if run.meta["displayName"] == cell.record.cell]
    return run


def make_study(tmp_path: Path) -> Path:
    study = tmp_path / "single" / "study"
    (study / "figures").mkdir(parents=True)
    for name in ("runs.csv", "records.jsonl", "table.md", "fits.json", "figures/isoflop.pdf"):
        (study / name).write_text(f"content of {name}")
    source = Path(__file__).parents[2] / "results" / "reproduce" / "figures" / "isoflop.png"
    shutil.copy(source, study / "figures" / "isoflop.png")
    return study


def test_a_study_arrives_once_with_its_lineage(
    wandb_server: WandbServer, tmp_path: Path, upload: SYNC, capsys: pytest.CaptureFixture
) -> None:
    cells = [
        TrackedCell(tmp_path, mode, seed) for seed, mode in enumerate(("offline", "online", "disabled", "offline"))
    ]
    for cell in cells:
        cell.log(1, 30)
        cell.finish(Status.DIVERGED if cell is cells[3] else Status.DONE)
    make_study(tmp_path)
    assert upload() == 0
    for cell in cells:
        cell.assert_arrived(run_of(wandb_server, cell))
    names = [f"single-{cell.record.cell}" for cell in cells]
    for cell, name in zip(cells, names, strict=True):
        files = wandb_server.artifact(name)["files"]
        assert {"record.json", "config.yaml", "metrics.jsonl"} == set(files)
        for file, stored in files.items():
            assert wandb_server.files[stored] == (cell.folder / file).read_bytes()
    assert wandb_server.uses == {("single-study", name) for name in names}
    for kind, files in {
        "table": {"runs.csv", "records.jsonl", "table.md"},
        "fits": {"fits.json"},
        "figures": {"isoflop.pdf", "isoflop.png"},
    }.items():
        artifact = wandb_server.artifact(f"single-{kind}")
        assert (artifact["run"], artifact["state"], set(artifact["files"])) == ("single-study", "COMMITTED", files)
    (images,) = wandb_server.runs["single-study"].history
    assert images["figures/isoflop"]["_type"] == "image-file"
    assert wandb_server.unknown == []

    sent = wandb_server.operations.total()
    assert upload() == 0
    assert wandb_server.operations.total() == sent, "a second call asks the server nothing"
    assert "0 cells uploaded" in capsys.readouterr().out


def test_cells_still_logging_online_are_skipped(
    wandb_server: WandbServer, tmp_path: Path, upload: SYNC, capsys: pytest.CaptureFixture
) -> None:
    live, done = TrackedCell(tmp_path, "online", seed=0), TrackedCell(tmp_path, "offline", seed=1)
    live.log(1, 3)
    done.log(1, 3)
    done.finish()
    with FileLock(live.folder / LOCK):
        assert upload() == 0
    assert f"1 cells uploaded to {wandb_server.url}, 0 were there already, 1 still logging online, skipped\n" in (
        capsys.readouterr().out
    )
    live.log(4, 6)
    live.finish()
    assert upload() == 0
    assert "1 cells uploaded" in (printed := capsys.readouterr().out) and "skipped" not in printed
    for cell in (live, done):
        cell.assert_arrived(run_of(wandb_server, cell))


def test_a_cell_uploaded_in_the_middle_goes_on(wandb_server: WandbServer, tmp_path: Path, upload: SYNC) -> None:
    cell = TrackedCell(tmp_path)
    cell.log(1, 40)
    cell.kill()
    assert upload() == 0
    assert [row["_step"] for row in run_of(wandb_server, cell).history] == list(range(1, 41))
    cell.log(21, 35)  # from a checkpoint before the last rows
    cell.kill()
    assert upload() == 0, "with fewer rows than before"
    cell.log(36, 60)
    cell.finish()
    assert upload() == 0
    cell.assert_arrived(run_of(wandb_server, cell))
    assert len(run_of(wandb_server, cell).history) == 60


def test_a_killed_cell_that_logged_online_is_uploaded(wandb_server: WandbServer, tmp_path: Path, upload: SYNC) -> None:
    cell = TrackedCell(tmp_path, "online")
    cell.log(1, 8)
    cell.kill()
    assert upload() == 0
    assert [row["_step"] for row in run_of(wandb_server, cell).history] == list(range(1, 9))


def test_a_cell_whose_files_cannot_be_read_does_not_keep_the_others(
    wandb_server: WandbServer, tmp_path: Path, upload: SYNC, capsys: pytest.CaptureFixture
) -> None:
    cells = [TrackedCell(tmp_path, "offline", seed) for seed in range(3)]
    for cell in cells:
        cell.log(1, 3)
        cell.finish()
    settings = cells[0].folder / "config.yaml"
    whole = settings.read_text()
    settings.write_text(whole.replace("method: dense", "method: dents"))
    assert upload("--jobs", "1") == 3
    told = f"all others are uploaded, but the files of 1 cannot be read: {cells[0].record.cell}: method 'dents' is not"
    assert told in capsys.readouterr().err
    for cell in cells[1:]:
        cell.assert_arrived(run_of(wandb_server, cell))
    settings.write_text(whole)
    assert upload() == 0
    cells[0].assert_arrived(run_of(wandb_server, cells[0]))


def test_every_third_request_fails_and_all_arrives(wandb_server: WandbServer, tmp_path: Path, upload: SYNC) -> None:
    cell = TrackedCell(tmp_path)
    cell.log(1, 30)
    cell.finish()
    wandb_server.fail_every = 3
    assert upload() == 0
    assert wandb_server.failed >= 5
    cell.assert_arrived(run_of(wandb_server, cell))
    assert wandb_server.artifact(f"single-{cell.record.cell}")["state"] == "COMMITTED"


def test_a_server_that_was_down_during_training_gets_everything_later(
    wandb_server: WandbServer, tmp_path: Path, upload: SYNC, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peerscale.train import tracking

    monkeypatch.setattr(tracking, "TIMEOUT_S", 2.0)
    cell = TrackedCell(tmp_path, "online")
    cell.log(1, 20)
    wandb_server.down = True
    cell.log(21, 50)
    cell.finish()
    wandb_server.down = False
    assert upload() == 0
    cell.assert_arrived(run_of(wandb_server, cell))


def test_a_dead_server_is_one_line_and_the_same_command_goes_on(
    wandb_server: WandbServer, tmp_path: Path, upload: SYNC, capsys: pytest.CaptureFixture
) -> None:
    cells = [TrackedCell(tmp_path, seed=seed) for seed in range(3)]
    for cell in cells:
        cell.log(1, 5)
        cell.finish()
    wandb_server.down = True
    capsys.readouterr()
    assert upload("--timeout", "1", "--jobs", "1") == 3
    errors = capsys.readouterr().err
    assert errors.startswith("error: 3 cells are not uploaded, ") and errors.count("\n") == 1, errors
    assert errors.endswith("the same command goes on from here\n")
    wandb_server.down = False
    wandb.teardown()  # a new process
    assert upload() == 0
    for cell in cells:
        cell.assert_arrived(run_of(wandb_server, cell))


def test_another_server_gets_it_too(
    wandb_server: WandbServer, tmp_path: Path, upload: SYNC, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = TrackedCell(tmp_path)
    cell.log(1, 5)
    cell.finish()
    assert upload() == 0
    with serving() as other:
        monkeypatch.setenv("WANDB_BASE_URL", other.url)
        wandb.teardown()
        assert upload() == 0
        cell.assert_arrived(run_of(other, cell))
        wandb.teardown()


def test_wrong_input_is_one_line(upload: SYNC, capsys: pytest.CaptureFixture) -> None:
    assert upload() == 2
    assert capsys.readouterr().err.endswith("make sweep SWEEP=single\n")
    assert upload("--jobs", "0") == 2


def test_what_ends_between_the_list_and_its_upload_arrives_as_it_ended(
    wandb_server: WandbServer, tmp_path: Path
) -> None:
    cell = TrackedCell(tmp_path, "offline")
    cell.log(1, 3)
    (listed,) = study_cells(tmp_path / "single")
    cell.log(4, 6)
    cell.finish()
    upload_cell(listed, wandb_server.url, 30)
    cell.assert_arrived(run_of(wandb_server, cell))
    assert wandb_server.artifact(listed.artifact)["state"] == "COMMITTED"
