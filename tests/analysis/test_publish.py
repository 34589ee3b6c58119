"""What is committed of a study: all of it, small, and without a machine's folders."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_study import SWEEP, cells, records

from peerscale.errors import exit_code
from peerscale.records.record import Record, Status, read_record, write_record
from peerscale.records.study import collected, published
from peerscale.records.table import read_records, write_records
from peerscale.stats import collection
from programs import program as script

publish, restore, collect = script("publish"), script("restore"), script("collect")


@pytest.fixture
def folders(collected_runs: Path, tmp_path: Path) -> list[str]:
    """A study with its table and a figure, ready to be published: the script's arguments."""
    runs = tmp_path / "runs"
    study = collected(SWEEP, runs)
    shutil.copytree(collected(SWEEP, collected_runs).folder, study.folder)
    arguments = ["--runs", str(runs), "--results", str(tmp_path / "results")]
    study.table.write_text(f"# {SWEEP}: losses")
    study.figures.mkdir()
    (study.figures / "isoflop.png").write_bytes(b"a figure")
    study.csv.write_text("budget,method\n")
    return [SWEEP, *arguments]


def test_what_is_published(folders: list[str], tmp_path: Path) -> None:
    assert publish.main(folders) == 0
    source, target = collected(SWEEP, tmp_path / "runs"), published(SWEEP, tmp_path / "results")
    (source.folder / "report.html").write_text("of this machine alone")
    files = contents(target.folder)
    names = {
        "runs.csv",
        "records.jsonl",
        "sequence_losses.npz",
        "curves.csv",
        "fits.json",
        "table.md",
        "table.csv",
        "figures",
    }
    assert {path.parts[0] for path in files} == names
    assert all((source.folder / path).read_bytes() == content for path, content in files.items())


def test_publishing_again_replaces_and_keeps_what_is_not_its_own(folders: list[str], tmp_path: Path) -> None:
    target = published(SWEEP, tmp_path / "results")
    target.figures.mkdir(parents=True)
    (target.figures / "stale.png").write_bytes(b"old")
    (target.folder / "NOTES.md").write_text("by hand")
    target.table.write_text("old")
    publish.main(folders)
    assert not (target.figures / "stale.png").exists()
    assert (target.folder / "NOTES.md").read_text() == "by hand"
    assert target.table.read_text().startswith("# synthetic")


def collect_again(folders: list[str], tmp_path: Path, change: Callable[[Record], Record | None]) -> None:
    """Publish the study, and change its collected records as if they had been collected anew."""
    assert publish.main(folders) == 0
    study = collected(SWEEP, tmp_path / "runs")
    changed = [after for record in read_records(study.folder) if (after := change(record))]
    write_records(study.folder, changed)
    study.table.touch()


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def never_run(record: Record) -> Record:
    return replace(record, status=Status.PENDING, evaluation={}, fingerprint="", environment={})


def another(record: Record) -> Record:
    return replace(record, hashed_config={**record.hashed_config, "context": 32}, fingerprint="f" * 16)


@pytest.mark.parametrize("change", [never_run, another])
def test_finished_cells_do_not_vanish_unasked(
    change: Callable[[Record], Record], folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = sum(record.status is Status.DONE for record in records())
    collect_again(folders, tmp_path, lambda record: change(record) if record.cell == "peer-d16-1e11-s0" else record)
    assert f"{done} finished cells, {done} of them new" in capsys.readouterr().out
    before = contents(tmp_path / "results")
    assert exit_code(lambda: publish.main(folders)) == 2
    assert contents(tmp_path / "results") == before
    line = capsys.readouterr().err
    assert line.startswith(f"error: this would remove finished cells of {tmp_path / 'results' / SWEEP}, or put")
    assert ": peer-d16-1e11-s0; " in line and f"make publish SWEEP={SWEEP} REPLACE=1" in line and line.count("\n") == 1
    assert publish.main([*folders, "--replace"]) == 0
    assert f"{done - (change is never_run)} finished cells, 0 of them new" in capsys.readouterr().out


def test_the_same_cell_trained_again_is_replaced(folders: list[str], tmp_path: Path) -> None:
    collect_again(folders, tmp_path, lambda r: replace(r, timing={}) if r.cell == "peer-d16-1e11-s0" else r)
    assert publish.main(folders) == 0
    found = {record.cell: record for record in read_records(tmp_path / "results" / SWEEP)}
    assert found["peer-d16-1e11-s0"].timing == {} != found["peer-d12-1e11-s0"].timing


@pytest.mark.parametrize("missing", ["runs.csv", "table.md"])
def test_refuses_an_unfinished_study(
    folders: list[str], tmp_path: Path, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (collected(SWEEP, tmp_path / "runs").folder / missing).unlink()
    capsys.readouterr()
    assert exit_code(lambda: publish.main(folders)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and missing in error
    assert not (tmp_path / "results").exists()


def test_guests_are_not_published(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = collected(SWEEP, tmp_path / "runs")
    study.fits.write_text('{"guests": ["gated"]}')
    study.table.touch()
    capsys.readouterr()
    assert exit_code(lambda: publish.main(folders)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: gated is no method of {SWEEP}, ") and error.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_a_study_of_settings_without_a_figure_can_be_published(folders: list[str], tmp_path: Path) -> None:
    shutil.rmtree(collected(SWEEP, tmp_path / "runs").figures)
    assert publish.main(folders) == 0
    assert {path.name for path in (tmp_path / "results" / SWEEP).iterdir()} >= {"runs.csv", "table.md", "fits.json"}
    assert not (tmp_path / "results" / SWEEP / "figures").exists()


def test_a_publication_that_cannot_be_put_in_its_place_leaves_the_former_one(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish.main(folders)
    before = contents(tmp_path / "results")
    collected(SWEEP, tmp_path / "runs").table.write_text("# another")
    target, move = published(SWEEP, tmp_path / "results").folder, Path.replace

    def refuse(self: Path, to: Path) -> Path:
        if Path(to) == target:
            raise PermissionError(13, "Permission denied")
        return move(self, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        with pytest.raises(PermissionError):
            publish.main(folders)
    assert contents(tmp_path / "results") == before
    assert [path.name for path in (tmp_path / "results").iterdir()] == [SWEEP]
    assert publish.main(folders) == 0
    assert published(SWEEP, tmp_path / "results").table.read_text() == "# another"


def test_a_publication_that_was_killed_between_its_renames_is_finished_by_the_next(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish.main(folders)
    target = published(SWEEP, tmp_path / "results").folder
    scratch = tmp_path / "results" / f".{SWEEP}.abcd1234"
    shutil.copytree(target, scratch / SWEEP)
    target.rename(scratch / ".before")
    unfinished = [record for record in read_records(scratch / SWEEP) if record.status is not Status.DONE]
    assert len(unfinished) < len(records())
    write_records((study := collected(SWEEP, tmp_path / "runs")).folder, unfinished)
    study.table.touch()
    capsys.readouterr()
    assert exit_code(lambda: publish.main(folders)) == 2, "finished cells would vanish"
    assert "would remove finished cells" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "results").iterdir()] == [SWEEP]


@pytest.mark.parametrize("newer", ["records.jsonl", "sequence_losses.npz", "curves.csv", "runs.csv", "fits.json"])
def test_a_table_from_before_what_it_shows_is_not_published(
    newer: str, folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = collected(SWEEP, tmp_path / "runs")
    fitted = study.table.stat().st_mtime_ns
    os.utime(study.folder / newer, ns=(fitted + 1, fitted + 1))
    capsys.readouterr()
    assert exit_code(lambda: publish.main(folders)) == 2
    said = f"{study.table} is older than {newer}; first: make figures SWEEP={SWEEP}"
    assert capsys.readouterr().err == f"error: {said}\n"
    assert not (tmp_path / "results").exists()
    os.utime(study.folder / newer, ns=(fitted, fitted))
    assert publish.main(folders) == 0


def test_a_restored_study_is_collected_as_it_was(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish.main(folders)
    monkeypatch.setattr(collection, "planned_cells", lambda sweep, overrides: cells())
    again = [SWEEP, "--runs", str(tmp_path / "again"), *folders[-2:]]
    capsys.readouterr()
    assert restore.main(again) == 0
    ended = len(records())
    assert capsys.readouterr().out.startswith(f"{ended} cells restored from {tmp_path / 'results' / SWEEP}; 0 were in")
    assert collect.main([SWEEP, "--runs", str(tmp_path / "again")]) == 0
    source, target = (collected(SWEEP, tmp_path / name) for name in ("runs", "again"))
    for name in ("records.jsonl", "runs.csv", "curves.csv", "sequence_losses.npz", "fits.json"):
        assert (target.folder / name).read_bytes() == (source.folder / name).read_bytes(), name


def test_own_records_are_never_overwritten(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish.main(folders)
    mine = tmp_path / "runs" / SWEEP / "peer-d16-1e11-s0"
    own = next(replace(r, status=Status.FAILED, evaluation={}) for r in records() if r.cell == mine.name)
    write_record(mine, own)
    (mine / "metrics.jsonl").write_text("")
    before = contents(mine)
    (broken := tmp_path / "runs" / SWEEP / "dense-d16-1e11-s0" / "record.json").parent.mkdir()
    broken.write_text("{")
    capsys.readouterr()
    assert restore.main(folders) == 0
    assert contents(mine) == before and broken.read_text() == "{"
    assert f"{len(records()) - 2} cells restored" in capsys.readouterr().out
    assert (found := read_record(mine.parent / "dense-d8-1e11-s0")) and found.status is Status.DONE
