"""Where a study's files are found, and which fits are read."""

import json
from pathlib import Path

import pytest

from peerscale.errors import UserError
from peerscale.records.study import collected, find_study, published, read_fits, read_json


def test_collected_study_comes_before_the_published_one(tmp_path: Path) -> None:
    runs, results = tmp_path / "runs", tmp_path / "results"
    with pytest.raises(UserError, match=r"first: make figures SWEEP=abc$"):
        find_study("abc", runs, results)
    for study in (published("abc", results), collected("abc", runs)):
        study.folder.mkdir(parents=True)
        study.runs.write_text("cell\n")
        assert find_study("abc", runs, results) == study
    assert find_study("abc", runs, results).folder == runs / "abc" / "study"


def test_broken_json_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "fits.json"
    with pytest.raises(UserError, match="not there"):
        read_json(path)
    path.write_text("{")
    with pytest.raises(UserError, match=r"fits\.json: not JSON"):
        read_json(path)


def test_fits_of_another_version_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "fits.json"

    def fits(*optima: object) -> dict[str, object]:
        keys = ("answer", "claims", "multipliers", "laws", "rates", "growth")
        return {**dict.fromkeys(keys, ""), "budgets": [{"methods": [*optima]}]}

    for whole in (fits(), fits({"loss": 3.0, "low": 2.9, "high": 3.1}), fits({"loss": None})):
        path.write_text(json.dumps(whole))
        assert read_fits(path) == whole
    without_rates = {key: value for key, value in fits().items() if key != "rates"}
    for other in (without_rates, fits({"loss": 3.0}), {"dense": {"law": "isoflop"}}, [], 3):
        path.write_text(json.dumps(other))
        with pytest.raises(UserError, match=r"fits\.json: not the fits of a study .* make figures"):
            read_fits(path)
