"""The largest budget predicted from the others: against a fit of those alone, and against laws that bend."""

import numpy as np
import pandas as pd
import pytest

from peerscale.laws import fit_granular, fit_isoflop, fit_parametric, fit_routed
from peerscale.laws.fitting import largest
from peerscale.laws.parametric import Surface

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
        low, high = fit(runs(seed=seed), objective="mse-log", bootstrap=200, seed=seed).hold_out.interval
        covered += low <= truth <= high
    assert covered >= 33


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


def test_every_law_of_the_loss_has_one() -> None:
    n, d, g = (grid.ravel() for grid in np.meshgrid([1e8, 5e8, 3e9], [1e10, 6e10, 2e11], [1, 4, 16]))
    table = pd.DataFrame({"N": n, "D": d, "G": g, "loss": 0.47 + (2.1 / g**0.58 + 18.1) / n**0.115 + 30.8 / d**0.147})
    found = fit_granular(table, params="N", tokens="D", granularity="G", loss="loss").hold_out
    assert found.n == 3 and found.rmse < 1e-6
    table = table.assign(loss=10 ** (1.1 - 0.08 * np.log10(n) - 0.04 * np.log10(2 * g / (1 + g / 300))))
    found = fit_routed(table, dense_params="N", experts="G", loss="loss").hold_out
    assert found.budget == 3e9 and found.n == 9 and found.rmse < 1e-4
