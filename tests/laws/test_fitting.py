"""What a table must not hold, what resampling draws, and the largest budget predicted from the others."""

import json
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest

from peerscale.api import fit_granular, fit_isoflop, fit_parametric, fit_routed
from peerscale.errors import UserError
from peerscale.laws.bootstrap import Bootstrap, percentile_interval, resample_counts, resample_residuals
from peerscale.laws.fitting import largest, to_plain
from peerscale.laws.parametric import Surface
from peerscale.laws.table import cluster_labels, positive_columns, table_warnings


def columns(table: pd.DataFrame, *names: str, at_least: int = 1) -> list[np.ndarray]:
    return positive_columns(table, *names, law="parametric", at_least=at_least)


def test_numbers_come_as_floats_whatever_they_are_stored_as() -> None:
    table = pd.DataFrame({"int": [2**62, 3], "text": ["1e3", "2"], "big": [2**70, 5], "u": np.array([2**63, 1], "u8")})
    values = columns(table, "int", "text", "big", "u")
    assert all(column.dtype == np.float64 for column in values)
    assert [column[0] for column in values] == [2.0**62, 1000, 2.0**70, 2.0**63]
    assert 6 * values[0][0] * values[3][0] == pytest.approx(6 * 2.0**125)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0, 0.0, "1,000", None])
def test_a_bad_value_is_named_with_its_row(bad: object) -> None:
    table = pd.DataFrame({"N": [1.0, 2.0, 3.0]}, dtype=object)
    table.loc[1, "N"] = bad
    with pytest.raises(UserError, match=r"column 'N' must hold finite numbers above 0, not so in row 1: "):
        columns(table, "N")


def test_missing_columns_and_rows_are_named() -> None:
    table = pd.DataFrame({"N": [1.0], "loss": [2.0]})
    with pytest.raises(UserError, match="no column 'M' in the table; there are: N, loss"):
        columns(table, "M")
    with pytest.raises(UserError, match="1 rows are too few for the parametric law: it has 5 coefficients"):
        columns(table, "N", at_least=5)
    with pytest.raises(UserError, match="the table has no rows"):
        columns(table.head(0), "N")
    with pytest.raises(UserError, match="in row 0, 1, 2, 3, 4 and 43 more: 0, 0"):
        columns(pd.DataFrame({"N": [0] * 48}), "N")
    with pytest.raises(UserError, match="no column 'run'"):
        cluster_labels(table, "run")


def test_mixtures_and_duplicates_are_flagged() -> None:
    table = pd.DataFrame(
        {"N": [1.0, 2.0, 1.0], "loss": [3.0, 2.0, 3.0], "Vocab Size": 1, "convention": "full", "method": "peer"}
    )
    (only,) = table_warnings(table, "N", "loss")
    assert only == "1 duplicated rows, kept and so counted again: row 2"
    mixed = table.assign(**{"Vocab Size": [1, 2, 2], "convention": ["full", "6ND", None], "data": ["a", None, "a"]})
    warnings = table_warnings(mixed.assign(method=["peer", "dense", "peer"]), "N", "loss")
    assert len(warnings) == 4
    assert "column 'method' mixes peer, dense: runs of different methods are not comparable" in warnings
    assert "column 'convention' mixes full, 6ND: FLOPs of different conventions are not comparable" in warnings
    assert any("'Vocab Size' mixes 1, 2: losses per token of different tokenizers" in warning for warning in warnings)


@dataclass
class Slope:
    a: np.ndarray


def test_counts_are_draws_with_replacement() -> None:
    counts = resample_counts(50, 4000, seed=0)
    assert counts.shape == (4000, 50) and (counts.sum(axis=1) == 50).all()
    assert np.mean(counts == 0) == pytest.approx((1 - 1 / 50) ** 50, abs=0.005)
    np.testing.assert_array_equal(counts, resample_counts(50, 4000, seed=0))
    assert (counts != resample_counts(50, 4000, seed=1)).any()


def test_clusters_are_drawn_together() -> None:
    labels = np.array([5, 5, 7, 5, 9, 7])
    counts = resample_counts(6, 500, seed=0, clusters=labels)
    for label in (5, 7):
        members = counts[:, labels == label]
        assert (members == members[:, :1]).all()
    assert (counts[:, 0] + counts[:, 2] + counts[:, 4] == 3).all()


def test_residuals_are_drawn_evenly_and_never_nan() -> None:
    residuals = np.array([1.0, 2.0, np.nan, 3.0])
    drawn = resample_residuals(residuals, 6000, 0, np.arange(4))
    assert drawn.shape == (6000, 4)
    for value in (1, 2, 3):
        np.testing.assert_allclose(np.mean(drawn == value, axis=0), 1 / 3, atol=0.03)
    assert np.isnan(resample_residuals(np.full(3, np.nan), 5, 0, np.arange(3))).all()


def test_a_cluster_draws_its_residuals_from_one_other() -> None:
    residuals = np.array([10.0, 11.0, 12.0, 20.0, 21.0])
    labels = np.array([0, 0, 0, 1, 1])
    drawn = resample_residuals(residuals, 1000, seed=0, clusters=labels)
    tens = drawn // 10
    assert (tens[:, :3] == tens[:, :1]).all() and (tens[:, 3:] == tens[:, 3:4]).all()
    assert {*np.unique(drawn)} == {*residuals} and (tens[:, 0] != tens[:, 3]).any()


def test_interval_is_the_percentiles_of_what_is_finite() -> None:
    draws = np.random.default_rng(0).standard_normal(20000)
    bootstrap = Bootstrap(draws={"a": draws, "per_budget": np.zeros((20000, 2))}, resamples=20000, failed=0, seed=0)
    assert bootstrap.intervals() == {"a": pytest.approx((-1.96, 1.96), abs=0.05)}
    assert percentile_interval(np.append(draws, [np.nan, np.inf])) == pytest.approx(bootstrap.intervals()["a"])
    assert percentile_interval(3 * bootstrap.law(Slope).a + 1) == pytest.approx((1 - 5.88, 1 + 5.88), abs=0.15)
    assert np.isnan(percentile_interval(np.full(4, np.nan))).all()


def test_draws_are_stored_to_six_digits_and_without_nan() -> None:
    draws = np.random.default_rng(0).lognormal(10, 1, 3000)
    loss = np.array([[3.0, np.nan]] * 3000)
    stored = to_plain(Bootstrap(draws={"a": draws, "loss": loss}, resamples=3010, failed=10, at_bound=2, seed=4))
    assert [stored[key] for key in ("resamples", "failed", "at_bound", "seed", "level")] == [3010, 10, 2, 4, 0.95]
    np.testing.assert_allclose(stored["draws"]["a"], draws[:500], rtol=1e-5)
    assert stored["draws"]["loss"][0] == [3.0, None]


TRUTH = Surface(E=1.82, A=480.0, B=2100.0, alpha=0.347, beta=0.367)


def runs(noise: float = 0.003, seed: int = 0) -> pd.DataFrame:
    """Seven sizes for each of six budgets."""
    rows = [(c, n) for c in np.geomspace(1e18, 1e21, 6) for n in TRUTH.optimum(c).params * np.geomspace(0.25, 4, 7)]
    table = pd.DataFrame(rows, columns=["C", "N"]).assign(D=lambda rows: rows["C"] / 6 / rows["N"])
    scatter = np.exp(noise * np.random.default_rng(seed).standard_normal(len(table)))
    return table.assign(loss=TRUTH.predict(table["N"], table["D"]) * scatter)


def fit(table: pd.DataFrame, **options):
    return fit_parametric(table, params="N", tokens="D", loss="loss", **options)


def test_largest_tenth_with_its_ties_or_from_a_start() -> None:
    scale = np.repeat([1.0, 2.0, 3.0, 4.0], 5)
    assert largest(scale).tolist() == (scale == 4).tolist()
    assert largest(np.arange(1.0, 31)).sum() == 3
    assert largest(scale * (1 + 1e-3 * np.arange(20) / 20)).sum() == 5  # measured FLOPs of one budget
    assert largest(scale, 3).sum() == 10 and not largest(scale, 9).any()


@pytest.mark.parametrize("objective", ["huber-log", "mse"])
def test_equals_a_fit_of_the_other_runs(objective: str) -> None:
    table = runs()
    found = fit(table, objective=objective, bootstrap=200).hold_out
    held = table["C"] == table["C"].max()
    alone = fit(table[~held], objective=objective, bootstrap=200)
    predicted = alone.predict(table["N"][held], table["D"][held])
    off = predicted - table["loss"][held]
    assert (found.quantity, found.n, found.budget) == ("loss", 7, pytest.approx(1e21))
    assert found.rmse == pytest.approx(np.sqrt(np.mean(off**2)), rel=1e-3)
    assert found.mape == pytest.approx(100 * np.mean(np.abs(off) / table["loss"][held]), rel=1e-3)
    assert (found.predicted, found.observed) == pytest.approx((predicted.mean(), table["loss"][held].mean()), rel=1e-5)
    n, d = (table[name][held].to_numpy() for name in ("N", "D"))
    interval = alone.interval(lambda law: np.mean([law.predict(*run) for run in zip(n, d, strict=True)], axis=0))
    assert found.interval == pytest.approx(interval, rel=1e-3)


def test_intervals_cover_the_true_loss_about_as_often_as_they_say() -> None:
    held = runs()["C"] == runs()["C"].max()
    truth = TRUTH.predict(runs()["N"][held], runs()["D"][held]).mean()
    covered = 0
    for seed in range(40):
        low, high = fit(runs(seed=seed), objective="mse-log", bootstrap=80, seed=seed).hold_out.interval
        covered += low <= truth <= high
    assert covered >= 33


def test_one_run_that_scatters_about_the_law_as_the_others_is_not_said_to_miss() -> None:
    """The interval of a prediction holds the scatter of what is predicted."""
    missed = 0
    for seed in range(40):
        table, rng = runs(seed=seed), np.random.default_rng(100 + seed)
        last = table[table["C"] == table["C"].max()].iloc[[3]]
        table = pd.concat([table[table["C"] < table["C"].max()], last])
        table["loss"] = TRUTH.predict(table["N"], table["D"]) * np.exp(rng.normal(0, 0.005, len(table)))
        missed += fit(table, objective="mse-log", bootstrap=80, seed=seed, hold_out=9e20).hold_out.missed
    assert missed <= 6


def test_clusters_must_be_several() -> None:
    with pytest.raises(UserError, match="column 'run' holds one value: there must be several clusters to resample"):
        fit(runs().assign(run="only"), bootstrap=20, cluster="run")


def test_a_law_that_bends_is_said_to_miss() -> None:
    table = runs()
    assert not fit(table, bootstrap=200).hold_out.missed
    bent = table.assign(loss=table["loss"].where(table["C"] < 5e20, table["loss"] + 0.05))
    result = fit(bent, bootstrap=200, budget="C")
    assert result.hold_out.missed
    assert any("do not predict loss at 1e+21" in warning for warning in result.warnings)
    assert result.to_dict()["hold_out"]["missed"] is True


def test_what_is_held_out_can_be_chosen_and_too_few_runs_are_said() -> None:
    table = runs()
    assert fit(table, hold_out=2e20).hold_out.n == 14
    assert fit(table.assign(order=1 + np.arange(42) % 7), budget="order").hold_out.n == 6
    for start in (1e17, 1e30):
        result = fit(table, hold_out=start)
        assert result.hold_out is None and any("no held-out error" in warning for warning in result.warnings)


def test_isoflop_predicts_the_largest_optimum() -> None:
    table = runs()
    found = fit_isoflop(table, budget="C", x="N", loss="loss", bootstrap=300).hold_out
    below = fit_isoflop(table[table["C"] < 9e20], budget="C", x="N", loss="loss")
    assert found.predicted == pytest.approx(below.optimum(1e21), rel=1e-6)
    assert found.interval[0] < TRUTH.optimum(1e21).params < found.interval[1] and not found.missed
    shifted = table.assign(N=table["N"].where(table["C"] < 5e20, 2 * table["N"]))
    result = fit_isoflop(shifted, budget="C", x="N", loss="loss", bootstrap=300)
    assert result.hold_out.missed and result.hold_out.mape == pytest.approx(50, abs=5)
    assert any("do not predict x" in warning for warning in result.warnings)
    assert fit_isoflop(table[table["C"] < 2e19], budget="C", x="N", loss="loss").hold_out.n == 1  # two below
    assert fit_isoflop(table[table["C"] < 5e18], budget="C", x="N", loss="loss").hold_out is None


def test_every_law_of_the_loss_holds_out_its_largest_runs_and_names_its_results_in_json() -> None:
    n, d, g = (grid.ravel() for grid in np.meshgrid([1e8, 5e8, 3e9], [1e10, 6e10, 2e11], [1, 4, 16]))
    table = pd.DataFrame({"N": n, "D": d, "G": g, "loss": 0.47 + (2.1 / g**0.58 + 18.1) / n**0.115 + 30.8 / d**0.147})
    of_experts = table.assign(loss=10 ** (1.1 - 0.08 * np.log10(n) - 0.04 * np.log10(2 * g / (1 + g / 300))))
    of_experts["loss"] *= np.exp(np.random.default_rng(0).normal(0, 1e-5, len(n)))  # an exact fit's search may not end
    granular = fit_granular(table, params="N", tokens="D", granularity="G", loss="loss", bootstrap=20)
    assert granular.hold_out.n == 3 and granular.hold_out.rmse < 1e-6
    routed = fit_routed(of_experts, dense_params="N", experts="G", loss="loss", bootstrap=20)
    assert routed.hold_out.budget == 3e9 and routed.hold_out.n == 9 and routed.hold_out.rmse < 1e-4
    surface = fit(runs(), bootstrap=20)
    assert surface.to_dict()["objective_name"] == "huber-log"
    for found, named, derived in (
        (granular, ("a", "alpha", "b", "beta", "g", "gamma", "c"), ()),
        (routed, ("a", "b", "c", "d", "E_start", "E_max"), ("rms_log10",)),
        (surface, ("E", "A", "B", "alpha", "beta", "a", "b"), ()),
    ):
        stored = json.loads(json.dumps(found.to_dict(), allow_nan=False))
        common = {"law", "n", "status", "objective_name", "objective_value", "ci", "hold_out", "warnings"}
        assert {*common, *named, *derived} <= stored.keys() and stored["ci"].keys() == {*named}
        assert stored["law"] == found.law and len(stored["bootstrap"]["draws"][named[0]]) == 20


def test_isoflop_names_its_results_in_json_without_nan() -> None:
    table = pd.concat([runs(), pd.DataFrame({"C": 1e23, "N": [1e9, 2e9], "loss": [2.0, 2.1]})])
    result = fit_isoflop(table, budget="C", x="N", loss="loss", bootstrap=50)
    stored = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    common = {"law", "n", "status", "objective_name", "objective_value", "ci", "hold_out", "surface_exponent"}
    assert {*common, "vertices", "exponent", "coefficient"} <= stored.keys()
    assert {"budget", "x", "loss", "curvature", "n", "status", "coefficients"} <= stored["vertices"][0].keys()
    assert stored["law"] == "isoflop" and stored["ci"].keys() == {"exponent", "coefficient"}
    assert stored["vertices"][-1]["x"] is None and stored["vertices"][-1]["status"] == "too_few"
