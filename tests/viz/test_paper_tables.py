"""Tables 1 and 2 and rankings by convention, against numbers worked out otherwise."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from synthetic_ablations import ablation_runs
from synthetic_study import GRID, SWEEP
from synthetic_surface import surface_curves, surface_runs

from peerscale.accounting import cost
from peerscale.config import load
from peerscale.runs.fits import fit_study
from peerscale.runs.study import collected, read_json
from peerscale.runs.table import read_runs
from peerscale.viz import tables
from peerscale.viz.frontier import frontier_table
from peerscale.viz.published import paper_values, read_published

NAMES = ("dense", "moe", "moe_token_choice", "pkm", "peer")


@pytest.fixture(scope="module")
def study(collected_runs: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    files = collected(SWEEP, collected_runs)
    return read_runs(files.runs), read_json(files.fits)


def test_published_numbers_are_the_papers() -> None:
    """Anchors and derived values: gaps of table 1 and the worth of a larger pool, as others have computed them."""
    published = read_published()
    assert set(published.columns) == {"item", "method", "x_name", "x", "metric", "value", "source"}
    assert not published.duplicated(["item", "method", "x", "metric", "value"]).any()
    assert published["source"].str.startswith("arXiv 2407.04153").all()
    ours = tables.paper_perplexities(published).set_index(["budget", "name"])
    gaps = {(6e18, "moe"): -0.108, (6e18, "pkm"): -0.084, (6e18, "peer"): -0.145}
    gaps |= {(2e19, "moe"): -0.067, (2e19, "pkm"): -0.053, (2e19, "peer"): -0.107}
    for key, gap in gaps.items():
        assert ours.loc[key, "gap"] == pytest.approx(gap, abs=5.1e-4)
    with_norm = list(paper_values(published, "table 2", "peer", "ppl_c4").values())
    assert np.diff(np.log(with_norm)) == pytest.approx([-0.040, -0.049, -0.039], abs=6e-4)
    uneven = paper_values(published, "table 2", "peer query_norm=false", "unevenness")
    assert math.exp(-uneven[1024**2]) == pytest.approx(0.22, abs=5e-3)
    assert paper_values(published, "table 2", "peer query_norm=false", "expert_usage")[1024**2] == 0.998
    assert paper_values(published, "table 3", "peer", "ppl_c4") == {}
    (top_k,) = published.loc[(published["metric"] == "top_k") & (published["method"] == "pkm"), "value"]
    assert top_k == 32


def test_table_1_is_the_parabola_of_each_set_at_the_validation_optimum(study: tuple[pd.DataFrame, Any]) -> None:
    runs, fits = study
    found = tables.perplexities(runs, fits)
    assert list(found["name"]) == [*NAMES, *NAMES]
    for row in found.to_dict("records"):
        mine = runs["cell"].str.startswith(f"{row['name']}-") & (runs["budget"] == row["budget"])
        cells = runs[mine & (runs["status"] == "done")]
        z = np.log10(cells["flops_per_token"])
        c2, c1, c0 = np.polyfit(z, cells["val_loss"], 2)
        assert row["validation"] == pytest.approx(math.exp(c0 - c1**2 / (4 * c2)), rel=1e-6)
        speeches = np.polyval(np.polyfit(z, np.log(cells["ppl_speeches"]), 2), -c1 / (2 * c2))
        assert row["speeches"] == pytest.approx(math.exp(speeches), rel=1e-6)
        dense = found[(found["name"] == "dense") & (found["budget"] == row["budget"])].iloc[0]
        assert row["gap"] == pytest.approx(math.log(row["validation"] / dense["validation"]))
        assert row["flagged"] == (len(cells) < 5)


def test_table_2_holds_ours_and_the_papers() -> None:
    runs = ablation_runs("query_bn")
    table = tables.experts_by_norm(runs, read_published()).set_index(["source", "n_experts", "norm"])
    for (n, norm), cells in runs.groupby(["n_experts", runs["query_norm"].astype(str) == "True"]):
        row = table.loc[("ours", n, norm)]
        assert row["ppl"] == pytest.approx(np.prod(cells["ppl_validation"]) ** (1 / 3))
        assert row["expert_usage"] == pytest.approx(0.9)
        assert row["unevenness"] == pytest.approx(cells["unevenness"].mean())
    assert table.loc[("paper", 1024**2, False), "unevenness"] == 1.52


def test_table_2_of_a_study_with_batchnorm_alone() -> None:
    lines = tables.norm_lines(tables.experts_by_norm(ablation_runs("experts"), read_published()))
    first = next(line for line in lines if line.startswith("| 256 |"))
    assert first.startswith("| 256 | — / ") and first.endswith("| — | — | — |")
    last = lines[-1]
    assert last == (
        "| 1,048,576 | — | — | — | 20.73 / 20.64 | 99.8% / 100.0% | 1.52 / 1.06 |"
    )  # ours does not go so far


@pytest.mark.parametrize("method", ["dense", "moe", "pkm", "peer"])
def test_conventions_from_columns_are_those_from_the_configuration(method: str) -> None:
    config = load([f"ffn={method}", "size=d64"])
    model = cost(config)
    row = {f"flops_{name}": n for name, n in model.flops.items()}
    row |= {"flops_per_token": model.flops_per_token, "params_active": model.params_active}
    row |= {"params_total": model.params_total}
    found = {name: float(column.iloc[0]) for name, column in tables.conventions(pd.DataFrame([row])).items()}
    layers, context, d, forward_and_backward = 4, 64, 64, 3
    scores_and_values = forward_and_backward * layers * 2 * (2 * context * d)
    router = {"dense": 0, "moe": 2 * d * 16}.get(method, 2 * d * 4 * 32 + 2 * 4 * 64 * 32) * forward_and_backward
    assert found["as counted"] == model.flops_per_token
    assert found["causal attention"] == model.flops_per_token - scores_and_values / 2
    assert found["without router"] == model.flops_per_token - router
    assert found["6 x active parameters"] == 6 * model.params_active
    assert found["6 x total parameters"] == 6 * model.params_total


def test_multipliers_by_convention(study: tuple[pd.DataFrame, Any]) -> None:
    runs, fits = study
    found = tables.multipliers_by_convention(runs, fits).set_index(["name", "budget"])
    known = frontier_table(runs).set_index(["name", "budget"])["multiplier"].dropna()
    np.testing.assert_allclose(found.loc[known.index, "as counted"], known, rtol=1e-6)
    for column in found.columns.drop("flagged"):
        np.testing.assert_allclose(found.loc["dense", column], 1, rtol=1e-9)
    # A parameter that is counted and not used makes a sparse layer look worse, a free router a routed one better.
    for name in ("moe", "pkm", "peer"):
        for budget in GRID:
            row = found.loc[(name, budget)]
            assert row["6 x total parameters"] < row["6 x active parameters"]
            assert row["without router"] > row["as counted"]


def test_a_convention_that_doubles_a_methods_cost_halves_its_multiplier(study: tuple[pd.DataFrame, Any]) -> None:
    runs, fits = study
    before = tables.multipliers_by_convention(runs, fits).set_index(["name", "budget"])
    doubled = runs.assign(params_active=runs["params_active"] * np.where(runs["method"] == "peer", 2, 1))
    after = tables.multipliers_by_convention(doubled, fits).set_index(["name", "budget"])
    ratio = after["6 x active parameters"] / before["6 x active parameters"]
    np.testing.assert_allclose(ratio["peer"], 0.5)
    np.testing.assert_allclose(ratio.sort_index().drop("peer", level=0), 1)


def test_ranks_stand_beside_multipliers(study: tuple[pd.DataFrame, Any]) -> None:
    lines = tables.convention_lines(tables.multipliers_by_convention(*study))
    at_first = [line for line in lines if line.startswith("| 1e11 ")]
    assert len(at_first) == 5
    assert sorted(line.split("|")[3].split("(")[1].strip(" )") for line in at_first) == ["1", "2", "3", "4", "5"]
    assert any(line.startswith("| 1e11 | PEER |") and "(1)" in line.split("|")[3] for line in at_first)
    assert any(line.startswith("| 1e11 | PKM † |") for line in at_first)


def test_one_budget_of_dense_ranks_nothing(study: tuple[pd.DataFrame, Any]) -> None:
    runs, fits = study
    assert tables.multipliers_by_convention(runs[runs["budget"] == 1e11], fits)["as counted"].isna().all()
    nothing = runs[runs["status"] != "done"]
    assert tables.multipliers_by_convention(nothing, fits).empty and tables.perplexities(nothing, fits).empty


def test_exponents_of_three_approaches_stand_side_by_side(study: tuple[pd.DataFrame, Any]) -> None:
    runs = surface_runs(noise=1e-4)
    fits = fit_study(runs, surface_curves(runs))
    header, _, dense, peer = tables.exponent_lines(fits)
    assert header == "| method | 1: curves | 2: parabolas | 3: surface | largest budget: predicted | observed |"
    assert peer.startswith("| PEER |")
    cells = dense.strip("| ").split(" | ")
    shown = [float(cell.split(" ")[0]) for cell in cells[1:]]
    surface = fits["dense/parametric"]
    wanted = [fits["dense/envelope"]["exponent"], fits["dense"]["exponent"], surface["a"]]
    wanted += [surface["hold_out"]["predicted"], surface["hold_out"]["observed"]]
    assert shown == pytest.approx(wanted, abs=5.1e-4)
    low, high = surface["ci"]["a"]
    assert cells[3].endswith(f"[{low:.3f}, {high:.3f}]")
    assert tables.exponent_lines(study[1]) == []  # two budgets have no exponent
