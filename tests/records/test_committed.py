"""What is committed: its table is that of its records, its statistics those of an independent analysis."""

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import t as student

from own_variances import own_variances
from peerscale.config.study import load_sweep
from peerscale.files import ROOT
from peerscale.plan.cells import planned_cells
from peerscale.records.fingerprint import fingerprint, hashed_config
from peerscale.records.table import read_records, read_runs, runs_table
from peerscale.stats.comparison import compare

STUDIES = sorted(file.parent.name for file in (ROOT / "results").glob("*/records.jsonl"))


@cache
def published(sweep: str) -> dict[str, Any]:
    folder, study = ROOT / "results" / sweep, load_sweep(sweep)
    runs, records = read_runs(folder / "runs.csv"), read_records(folder)
    return compare(runs, records, claims=study.claims, rates_cost=study.rates_cost)


def differences_of(sweep: str, budget: float) -> dict[tuple[str, str, str], Any]:
    (entry,) = (entry for entry in published(sweep)["budgets"] if entry["budget"] == budget)
    return {(one["method"], one["reference"], one["size"]): one for one in entry["differences"]}


@pytest.mark.parametrize(
    ("budget", "pair", "value", "half"),
    [
        (3e13, ("peer", "dense"), -0.0571, 0.0208), (1e14, ("peer", "dense"), -0.0441, 0.0105),
        (3e13, ("peer", "moe_token_choice"), -0.0047, 0.0219), (1e14, ("peer", "moe_token_choice"), 0.0116, 0.0109),
        (3e13, ("peer", "pkm"), -0.0080, 0.0207), (1e14, ("peer", "pkm"), -0.0112, 0.0103),
    ],
)  # fmt: skip
def test_isoflop_cpu_against_another_analysis(budget: float, pair: tuple[str, str], value: float, half: float) -> None:
    """By ordinary least squares of cells' means, in another program; half-widths with 0.003 for learning rates."""
    there = differences_of("isoflop_cpu", budget)
    sign = 1 if (*pair, "") in there else -1
    found = there[(*pair, "") if sign > 0 else (*pair[::-1], "")]
    assert sign * found["value"] == pytest.approx(value, abs=5e-4)
    assert (found["high"] - found["low"]) / 2 == pytest.approx(half, rel=0.2)
    assert found["sequences_se"] < 0.003 < found["se"], "texts are the least of what is uncertain"


@pytest.mark.parametrize("sweep", STUDIES)
def test_the_committed_table_is_that_of_the_records(sweep: str, tmp_path: Path) -> None:
    folder = ROOT / "results" / sweep
    runs_table(read_records(folder)).to_csv(tmp_path / "runs.csv", index=False)
    assert (tmp_path / "runs.csv").read_text() == (folder / "runs.csv").read_text()


@pytest.mark.parametrize("sweep", STUDIES)
def test_committed_runs_have_the_fingerprints_that_are_planned_now(sweep: str) -> None:
    cells = {cell.name: cell for cell in planned_cells(sweep)}
    for record in read_records(ROOT / "results" / sweep):
        cell = cells[record.cell]
        hashed = hashed_config(cell.config, cell.plan, record.hashed_config["data_fingerprint"])
        assert fingerprint(hashed) == record.fingerprint, record.cell


def test_no_committed_file_is_large() -> None:
    assert all(path.stat().st_size < 2e6 for path in (ROOT / "results").rglob("*"))


def test_runs_of_studies_that_are_not_kept_are_in_the_archive() -> None:
    archive = read_runs(ROOT / "results" / "archive.csv")
    assert (archive.groupby("sweep").size() > 3).all() and len(archive) == 215
    assert not {*archive["sweep"]} & {*STUDIES}
    million = archive[archive["n_experts"] == 2**20]
    assert len(million) > 0 and (million["expert_usage"] < 0.01).all()


def test_controls_against_two_sample_statistics_by_hand() -> None:
    """32 cells, two seeds of 16 variants, each with its own variance."""
    (entry,) = published("controls")["budgets"]
    found = {d["method"]: d for d in entry["differences"] if d["reference"] == "dense"}
    runs = read_runs(ROOT / "results" / "controls" / "runs.csv")
    runs["layer"] = runs["method"] + runs["variant"].fillna("") + runs["settings"].fillna("")
    groups = runs.groupby("layer")["val_loss"]
    own = dict(zip(groups.groups, own_variances([group.to_numpy() for _, group in groups]), strict=True))
    seeds_se = math.sqrt((own["pkm"][0] + own["dense"][0]) / 2)
    assert len(groups) == 16 and found["pkm"]["seeds_se"] == pytest.approx(seeds_se, rel=1e-3)
    assert found["pkm"]["value"] == pytest.approx(groups.mean()["pkm"] - groups.mean()["dense"])
    assert published("controls")["claims"] == []


def test_experts_and_batchnorm_by_hand() -> None:
    (entry,) = published("experts")["budgets"]
    found = {(d["method"], d["reference"]): d for d in entry["differences"]}
    runs = read_runs(ROOT / "results" / "experts" / "runs.csv")
    groups = runs.groupby(runs["settings"].fillna(""))["val_loss"]
    assert len(groups) == 9 and (groups.size() == 2).all()
    own = dict(zip(groups.groups, own_variances([group.to_numpy() for _, group in groups]), strict=True))
    norm, none = (f'{{"ffn.n_experts": 65536, "ffn.query_norm": {flag}}}' for flag in ("true", "false"))
    with_norm, without = ("peer n_experts=65536-query_norm=true", "peer n_experts=65536-query_norm=false")
    for pair, settings in (((with_norm, without), (norm, none)), ((with_norm, "dense"), (norm, ""))):
        one, parts = found[pair], [(own[key][0] / 2, own[key][1]) for key in settings]
        variance = sum(part for part, _ in parts)
        df = variance**2 / sum(part**2 / df for part, df in parts)
        half = float(student.ppf(0.975, df)) * math.sqrt(variance)  # of seeds alone
        assert one["value"] == pytest.approx(groups.mean()[settings[0]] - groups.mean()[settings[1]])
        assert (one["high"] - one["low"]) / 2 == pytest.approx(half, rel=0.05)
