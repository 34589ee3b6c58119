"""Where a study's files are found, and which fits are read."""

from pathlib import Path

import pytest

from peerscale.errors import UserError
from peerscale.records.study import collected, find_study, published, read_json


def test_collected_study_comes_before_the_published_one(tmp_path: Path) -> None:
    runs, results = tmp_path / "runs", tmp_path / "results"
    with pytest.raises(UserError, match=r"first: make figures SWEEP=abc$"):
        find_study("abc", runs, results)
    for study in (published("abc", results), collected("abc", runs)):
        study.folder.mkdir(parents=True)
        study.runs.write_text("cell\n")
        assert find_study("abc", runs, results).folder == study.folder
    assert find_study("abc", runs, results).folder == runs / "abc" / "study"


def test_broken_json_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "fits.json"
    with pytest.raises(UserError, match="not there"):
        read_json(path)
    path.write_text("{")
    with pytest.raises(UserError, match=r"fits\.json: not JSON"):
        read_json(path)
