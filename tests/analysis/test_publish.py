"""What is committed of a study: all of it, small, and without a machine's folders."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_study import SWEEP, records, script

from peerscale.errors import exit_code
from peerscale.runs.study import collected, published
from peerscale.runs.table import read_records, read_runs

publish, table = script("publish"), script("table")


@pytest.fixture
def folders(collected_runs: Path, tmp_path: Path) -> list[str]:
    """A study with its table and a figure, ready to be published: the script's arguments."""
    runs = tmp_path / "runs"
    study = collected(SWEEP, runs)
    shutil.copytree(collected(SWEEP, collected_runs).folder, study.folder)
    arguments = ["--runs", str(runs), "--results", str(tmp_path / "results")]
    table.main([SWEEP, *arguments])
    study.figures.mkdir(exist_ok=True)
    (study.figures / "isoflop.png").write_bytes(b"a figure")
    return [SWEEP, *arguments]


def test_what_is_published(folders: list[str], tmp_path: Path) -> None:
    assert publish.main(folders) == 0
    source, target = collected(SWEEP, tmp_path / "runs"), published(SWEEP, tmp_path / "results")
    names = {"runs.csv", "records.jsonl", "curves.csv", "fits.json", "table.md", "figures"}
    assert {path.name for path in target.folder.iterdir()} == names
    for name in names - {"records.jsonl", "figures"}:
        assert (target.folder / name).read_bytes() == (source.folder / name).read_bytes()
    assert (target.figures / "isoflop.png").read_bytes() == b"a figure"
    assert len(read_runs(target.folder)) == 50


def test_records_are_rounded_and_without_tracebacks(folders: list[str], tmp_path: Path) -> None:
    publish.main(folders)
    target = published(SWEEP, tmp_path / "results")
    full = {record.cell: record for record in records()}
    kept = read_records(target.folder)
    assert len(kept) == 50
    for record in kept:
        assert record.traceback == ""
        if record.cell in full:
            original = full[record.cell]
            assert record.sequence_losses == pytest.approx(original.sequence_losses, abs=5.1e-5)
            assert all(len(str(loss).partition(".")[2]) <= 4 for loss in record.sequence_losses)
            assert record.evaluation == original.evaluation and record.reason == original.reason
    for line in target.records.read_text().splitlines():
        json.loads(line)


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


@pytest.mark.parametrize("missing", ["runs.csv", "table.md", "figures"])
def test_refuses_an_unfinished_study(
    folders: list[str], tmp_path: Path, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = collected(SWEEP, tmp_path / "runs").folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    capsys.readouterr()
    assert exit_code(lambda: publish.main(folders)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and missing in error
    assert not (tmp_path / "results").exists()


def test_an_interrupted_publication_leaves_the_old_one(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish.main(folders)
    target = published(SWEEP, tmp_path / "results")
    before = target.records.read_bytes()

    def full_disk(record: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publish, "public", full_disk)
    with pytest.raises(OSError):
        publish.main(folders)
    assert target.records.read_bytes() == before
    assert [path.name for path in (tmp_path / "results").iterdir()] == [SWEEP]


def test_doubts_about_the_code_that_ran() -> None:
    clean = records()[:2]
    assert publish.doubts(clean) == []
    dirty = replace(clean[0], environment={"git_commit": "0123456789ab+dirty"})
    unknown = replace(clean[0], environment={"git_commit": None, "kernel": "native"})
    assert "0123456789ab+dirty" in publish.doubts([clean[1], dirty])[0]
    assert any("2 different commits" in line for line in publish.doubts([clean[1], dirty]))
    assert any("do not say" in line for line in publish.doubts([unknown]))
