"""Approach 2 against parabolas and surfaces whose minima are known, and its flags against tables made to raise them."""

import numpy as np
import pandas as pd
import pytest

from peerscale.api import fit_isoflop
from peerscale.laws.isoflop import IsoflopFit
from peerscale.laws.least_squares import FitStatus
from peerscale.laws.parabola import OptimumStatus
from peerscale.laws.parametric import Surface

TRUTH = Surface(E=1.82, A=480.0, B=2100.0, alpha=0.347, beta=0.367)
BUDGETS = np.array([1e15, 3e15, 1e16, 3e16, 1e17])


def runs(
    exponent: float = 0.48,
    *,
    budgets: np.ndarray = BUDGETS,
    grid: tuple[float, ...] = (0.25, 0.5, 1, 2, 4),
    curvature: float = 0.2,
    noise: float = 0.0,
    seed: int = 0,
) -> pd.DataFrame:
    """Exact parabolas in log10 x around x* = 0.1 C^exponent, of minimum 30 C^-0.06."""
    rng = np.random.default_rng(seed)
    rows = [
        (c, 0.1 * c**exponent * factor, 30 * c**-0.06 + curvature * np.log10(factor) ** 2 + noise * rng.normal())
        for c in budgets
        for factor in grid
    ]
    return pd.DataFrame(rows, columns=["C", "x", "loss"])


def fit(table: pd.DataFrame, **options) -> IsoflopFit:
    return fit_isoflop(table, budget="C", x="x", loss="loss", **options)


def statuses(result: IsoflopFit) -> list[OptimumStatus]:
    return [optimum.status for optimum in result.vertices]


def test_recovers_exact_parabolas() -> None:
    result = fit(runs())
    assert result.status is FitStatus.CONVERGED
    assert result.exponent == pytest.approx(0.48, abs=1e-9)
    assert result.coefficient == pytest.approx(0.1, rel=1e-7)
    assert result.optimum(1e20) == pytest.approx(0.1 * 1e20**0.48, rel=1e-7)
    for optimum, c in zip(result.vertices, BUDGETS, strict=True):
        assert (optimum.budget, optimum.n, optimum.status) == (c, 5, OptimumStatus.OK)
        assert optimum.x == pytest.approx(0.1 * c**0.48, rel=1e-7)
        assert optimum.loss == pytest.approx(30 * c**-0.06)
        assert optimum.curvature == pytest.approx(0.2)
    assert not result.warnings


def test_agrees_with_polyfit_under_noise() -> None:
    table = runs(noise=0.003, grid=(0.3, 0.5, 0.8, 1.3, 2, 3.5))
    result = fit(table)
    optima = []
    for c, optimum in zip(BUDGETS, result.vertices, strict=True):
        rows = table[table["C"] == c]
        parabola = np.polyfit(np.log10(rows["x"]), rows["loss"], 2)
        optima.append(-parabola[1] / (2 * parabola[0]))
        assert optimum.x == pytest.approx(10 ** optima[-1], rel=1e-6)
        np.testing.assert_allclose(optimum.coefficients[::-1], parabola, rtol=1e-8)
    assert result.exponent == pytest.approx(np.polyfit(np.log10(BUDGETS), optima, 1)[0], abs=1e-7)


def test_units_of_x_move_only_the_coefficient() -> None:
    table = runs(noise=0.003)
    small, large = fit(table), fit(table.assign(x=table["x"] * 1e9))
    assert large.exponent == pytest.approx(small.exponent, abs=1e-8)
    assert large.coefficient == pytest.approx(small.coefficient * 1e9, rel=1e-6)


def changed(table: pd.DataFrame, budget: float, **columns) -> pd.DataFrame:
    rows = table["C"] == budget
    for name, change in columns.items():
        table.loc[rows, name] = change(table.loc[rows, name])
    return table


def test_concave_parabola_is_flagged_and_never_used() -> None:
    table = changed(runs(), 1e16, loss=lambda loss: 8 - loss)
    for include_flagged in (False, True):
        result = fit(table, include_flagged=include_flagged)
        assert statuses(result)[2] is OptimumStatus.CURVATURE
        assert result.vertices[2].curvature < 0 and np.isnan(result.vertices[2].x)
        assert result.exponent == pytest.approx(0.48, abs=1e-9)
    assert any("curvature" in warning and "1e+16" in warning for warning in result.warnings)


@pytest.mark.parametrize("level", [1.0, 2.7, 3.0, 4.123, 11.3])  # the signs of their rounding differ
def test_flat_losses_are_flagged(level: float) -> None:
    flat = changed(runs(), 1e16, loss=lambda loss: 0 * loss + level)
    assert statuses(fit(flat))[2] is OptimumStatus.CURVATURE


@pytest.mark.parametrize(
    ("grid", "status"),
    [
        ((1.2, 2, 4, 8, 16), OptimumStatus.OUTSIDE_RANGE),
        ((0.01, 0.02, 0.1, 0.5, 0.8), OptimumStatus.OUTSIDE_RANGE),
        ((0.8, 2, 4, 8, 16), OptimumStatus.OFF_CENTRE),
        ((0.25, 1, 2, 4), OptimumStatus.TOO_FEW),
        ((0.25, 1), OptimumStatus.TOO_FEW),
        ((0.25, 0.25, 1, 1, 4), OptimumStatus.TOO_FEW),
    ],
)
def test_flagged_minimum_is_kept_but_left_out_of_the_power_law(grid: tuple[float, ...], status: OptimumStatus) -> None:
    # A minimum four times too large at the last budget: an honest exponent does not know of it.
    off = runs(budgets=BUDGETS[4:], grid=grid).assign(x=lambda rows: 4 * rows["x"])
    result = fit(pd.concat([runs(budgets=BUDGETS[:4]), off]))
    assert statuses(result) == [OptimumStatus.OK] * 4 + [status]
    assert result.exponent == pytest.approx(0.48, abs=1e-9)
    with_flagged = fit(pd.concat([runs(budgets=BUDGETS[:4]), off]), include_flagged=True)
    has_parabola = len(set(grid)) >= 3
    assert (with_flagged.exponent > 0.5) == has_parabola
    if has_parabola:
        assert with_flagged.vertices[-1].x == pytest.approx(0.4 * 1e17**0.48, rel=1e-6)


def test_sizes_far_above_the_lowest_loss_are_left_out_on_demand() -> None:
    # One size on either side lies on no parabola with the others, as models do that have hardly begun to learn.
    table = runs(grid=(0.1, 0.25, 0.5, 1, 2, 4, 8))
    far = table["x"].isin(table.groupby("C")["x"].agg(["min", "max"]).to_numpy().ravel())
    table.loc[far, "loss"] += 0.5
    fitted, subset = fit(table, within=0.08), fit(table[~far])
    for optimum, other in zip(fitted.vertices, subset.vertices, strict=True):
        assert (optimum.x, optimum.loss, optimum.n) == pytest.approx((other.x, other.loss, 5))
        assert optimum.sizes == other.sizes == tuple(table.loc[(table["C"] == optimum.budget) & ~far, "x"])
    assert fitted.exponent == pytest.approx(0.48, abs=1e-9) and (fitted.n, subset.n) == (25, 25)
    assert any("left out" in warning and "1e+16 (2)" in warning for warning in fitted.warnings)
    assert fit(table).vertices[0].n == 7 and not any("left out" in warning for warning in fit(table).warnings)


def test_the_five_sizes_of_lowest_loss_stay_and_all_between_them() -> None:
    table = runs(grid=(0.1, 0.25, 0.5, 1, 2, 4, 8))
    assert fit(table, within=1e-6).vertices[0].n == 5
    spiked = changed(table, 1e16, loss=lambda loss: loss + 0.4 * (np.arange(7) == 2))
    assert fit(spiked, within=1e-6).vertices[2].n == 6  # a bad run between good ones is not picked out
    seeds = pd.concat([table, table.assign(loss=table["loss"] + 1e-3)])
    assert fit(seeds, within=1e-6).vertices[0].n == 10


def test_two_budgets_give_no_exponent() -> None:
    result = fit(runs(budgets=BUDGETS[:2]))
    assert (result.exponent, result.coefficient, result.status) == (None, None, FitStatus.TOO_FEW_POINTS)
    assert any("no exponent" in warning for warning in result.warnings)
    assert np.isnan(result.optimum(1e20))


def test_duplicated_rows_are_kept_and_named() -> None:
    table = runs()
    table = pd.concat([table, table.iloc[[3]]], ignore_index=True)
    result = fit(table)
    assert result.n == 26 and result.vertices[0].n == 6
    assert any("duplicated" in warning and "25" in warning for warning in result.warnings)


def isoflop_runs(law: Surface, span: float) -> pd.DataFrame:
    """Seven sizes per budget on a surface, centred on its optimum, from 1 / span to span."""
    rows = []
    for c in BUDGETS:
        for n in law.optimum(c).params * np.geomspace(1 / span, span, 7):
            rows.append((c, n, law.predict(n, c / (6 * n))))
    return pd.DataFrame(rows, columns=["C", "x", "loss"])


def test_bias_grows_with_the_grid_and_with_asymmetry() -> None:
    def bias(alpha: float, beta: float, span: float) -> float:
        law = Surface(E=1.8, A=400.0, B=2000.0, alpha=alpha, beta=beta)
        result = fit(isoflop_runs(law, span))
        return abs(np.log(result.vertices[2].x / law.optimum(BUDGETS[2]).params))

    assert bias(0.35, 0.35, 16) == pytest.approx(0, abs=1e-6)
    assert 1e-3 < bias(0.3, 0.4, 4) < bias(0.3, 0.4, 16) < bias(0.2, 0.5, 16)
    symmetric = Surface(E=1.8, A=400.0, B=2000.0, alpha=0.35, beta=0.35)
    assert not fit(isoflop_runs(symmetric, 4)).warnings
    assert any("wide grid" in warning for warning in fit(isoflop_runs(symmetric, 16)).warnings)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    trials, covered = 60, np.zeros(3)
    for seed in range(trials):
        result = fit(runs(noise=0.002, seed=seed), bootstrap=300, seed=seed)
        optimum = result.vertices[2]
        truths = (0.48, 0.1 * 1e16**0.48, 30 * 1e16**-0.06)
        intervals = (result.ci["exponent"], optimum.x_interval, optimum.loss_interval)
        covered += [low <= truth <= high for (low, high), truth in zip(intervals, truths, strict=True)]
    assert (covered >= 0.82 * trials).all(), covered / trials
    width = np.subtract(*fit(runs(noise=0.002), bootstrap=300).ci["exponent"])
    wider = np.subtract(*fit(runs(noise=0.006), bootstrap=300).ci["exponent"])
    assert wider / width == pytest.approx(3, rel=0.5)


def test_bootstrap_is_seeded_and_needs_a_spare_run() -> None:
    table = runs(noise=0.003)
    assert fit(table, bootstrap=100, seed=1).ci == fit(table, bootstrap=100, seed=1).ci
    assert fit(table, bootstrap=100, seed=1).ci != fit(table, bootstrap=100, seed=2).ci
    three = fit(runs(grid=(0.5, 1, 2)), bootstrap=10, include_flagged=True)
    assert three.bootstrap.failed == 10 and np.isnan(three.ci["exponent"]).all()


def test_approach_3_stands_beside_approach_2() -> None:
    """On a wide grid with alpha far from beta the parabola's exponent is biased, the surface's is not."""
    law = Surface(E=1.8, A=100.0, B=9000.0, alpha=0.25, beta=0.45)
    rows = [(c, n) for c in np.geomspace(1e18, 1e21, 5) for n in law.optimum(c).params * np.geomspace(1 / 16, 16, 9)]
    table = pd.DataFrame(rows, columns=["C", "N"])
    table["N"] *= np.geomspace(0.5, 2, 5).repeat(9)  # a grid that drifts off its centre
    table["loss"] = law.predict(table["N"], table["C"] / (6 * table["N"]))
    result = fit_isoflop(table, budget="C", x="N", loss="loss")
    assert abs(result.exponent - law.a) > 1e-3
    assert result.surface_exponent == pytest.approx(law.a, abs=1e-5)
    in_tokens = fit_isoflop(table.assign(D=table["C"] / (6 * table["N"])), budget="C", x="D", loss="loss")
    assert in_tokens.surface_exponent == pytest.approx(law.b, abs=1e-5)
    noise = np.random.default_rng(0).normal(0, 0.2, 15)
    two_sizes = table[table["N"].groupby(table["C"]).rank().isin([4, 5, 6])]
    assert fit_isoflop(two_sizes.assign(loss=3 + noise), budget="C", x="N", loss="loss").surface_exponent is None


def test_minima_that_scatter_more_than_their_runs_widen_the_interval() -> None:
    """Budgets trained differently, say: each parabola is exact, but the power law is not."""
    rng = np.random.default_rng(0)
    rows = []
    for c in np.geomspace(1e18, 1e21, 6):
        best = 0.1 * c**0.5 * 10 ** rng.normal(0, 0.08)
        rows += [(c, best * f, 3 + 0.2 * np.log10(f) ** 2 + 1e-4 * rng.normal()) for f in np.geomspace(0.25, 4, 7)]
    table = pd.DataFrame(rows, columns=["C", "x", "loss"])
    result = fit_isoflop(table, budget="C", x="x", loss="loss", bootstrap=500)
    log_c, log_x = np.log10(table["C"].unique()), np.log10([optimum.x for optimum in result.vertices])
    off = log_x - np.polyval(np.polyfit(log_c, log_x, 1), log_c)
    error = np.sqrt(off @ off / 4 / np.sum((log_c - log_c.mean()) ** 2))  # of the slope, by least squares
    assert np.diff(result.ci["exponent"])[0] == pytest.approx(2 * 1.96 * error, rel=0.25)
