"""What is committed: its runs still count as done, and its statistics are those of an independent analysis."""

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import t as student

from peerscale.config.study import load_sweep
from peerscale.files import ROOT
from peerscale.plan.cells import planned_cells
from peerscale.records.fingerprint import fingerprint
from peerscale.records.record import differences
from peerscale.records.table import read_records, read_runs, runs_table
from peerscale.stats.comparison import compare

STUDIES = sorted(file.parent.name for file in (ROOT / "results").glob("*/records.jsonl"))


@cache
def published(sweep: str) -> dict[str, Any]:
    folder, study = ROOT / "results" / sweep, load_sweep(sweep)
    windows = {row.budget: study.window(row.budget) for row in study.grid}
    return compare(read_runs(folder / "runs.csv"), read_records(folder), windows=windows, claims=study.claims)


@pytest.mark.parametrize("sweep", STUDIES)
def test_committed_runs_count_as_done(sweep: str) -> None:
    """Every cell is in the plan of the study's file, with the fingerprint of its record."""
    cells = {cell.name: cell for cell in planned_cells(sweep)}
    for record in read_records(ROOT / "results" / sweep):
        assert record.fingerprint == fingerprint(record.hashed_config)
        assert differences(cells[record.cell], record, None) == []


@pytest.mark.parametrize("sweep", STUDIES)
def test_the_committed_table_is_that_of_the_records(sweep: str, tmp_path: Path) -> None:
    folder = ROOT / "results" / sweep
    runs_table(read_records(folder)).to_csv(tmp_path / "runs.csv", index=False)
    assert (tmp_path / "runs.csv").read_text() == (folder / "runs.csv").read_text()


def test_no_committed_file_is_large() -> None:
    assert all(path.stat().st_size < 2e6 for path in (ROOT / "results").rglob("*"))


def test_runs_of_studies_that_are_not_kept_are_in_the_archive() -> None:
    archive = read_runs(ROOT / "results" / "archive.csv")
    assert (archive.groupby("sweep").size() > 3).all() and len(archive) == 215
    assert not {*archive["sweep"]} & {*STUDIES}
    million = archive[archive["n_experts"] == 2**20]
    assert len(million) > 0 and (million["expert_usage"] < 0.01).all()


def test_the_optima_of_a_law_have_the_status_that_the_budgets_give_them() -> None:
    fits = published("isoflop_cpu")
    status = {(entry["budget"], m["name"]): m["status"] for entry in fits["budgets"] for m in entry["methods"]}
    laws = [law for law in fits["laws"].values() if law["law"] == "isoflop"]
    vertices = {(v["budget"], law["method"]): v["status"] for law in laws for v in law["vertices"]}
    assert vertices.items() <= status.items() and {*vertices.values()} == {"ok", "off_centre"}
    assert all(law["include_flagged"] for law in laws)


def test_controls_against_two_sample_statistics_by_hand() -> None:
    """32 cells, two seeds of 16 variants: 16 degrees of freedom, one variance."""
    (entry,) = published("controls")["budgets"]
    found = {d["method"]: d for d in entry["differences"] if d["reference"] == "dense"}
    runs = read_runs(ROOT / "results" / "controls" / "runs.csv")
    runs["layer"] = runs["method"] + runs["variant"].fillna("") + runs["axes"].fillna("")
    groups = runs.groupby("layer")["val_loss"]
    seeds_se = math.sqrt(groups.var(ddof=1).mean())  # of a difference of two means of two
    assert len(groups) == 16 and found["pkm"]["seeds_se"] == pytest.approx(seeds_se)
    assert found["pkm"]["value"] == pytest.approx(groups.mean()["pkm"] - groups.mean()["dense"])
    assert published("controls")["claims"] == []


def test_experts_and_batchnorm_by_hand() -> None:
    (entry,) = published("experts")["budgets"]
    found = {(d["method"], d["reference"]): d for d in entry["differences"]}
    runs = read_runs(ROOT / "results" / "experts" / "runs.csv")
    groups = runs.groupby(runs["axes"].fillna(""))["val_loss"]
    assert len(groups) == 9 and (groups.size() == 2).all()
    half = float(student.ppf(0.975, 9)) * math.sqrt(groups.var(ddof=1).mean())  # of seeds alone
    with_norm, without = ("peer n_experts=65536-query_norm=true", "peer n_experts=65536-query_norm=false")
    for pair, text in (((with_norm, without), "0.065 ± 0.054"), ((with_norm, "dense"), "0.060 ± 0.054")):
        one = found[pair]
        assert f"{-one['value']:.3f} ± {(one['high'] - one['low']) / 2:.3f}" == text
        assert text in (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
        assert (one["high"] - one["low"]) / 2 == pytest.approx(half, rel=0.02)
