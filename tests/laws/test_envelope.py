"""Approach 1 on curves of a known surface: at compute C a run of size N has seen C / 6N tokens."""

import json

import numpy as np
import pandas as pd
import pytest

from peerscale.api import fit_envelope
from peerscale.errors import UserError
from peerscale.laws.envelope import EnvelopeFit, smooth_curves, winning_sizes
from peerscale.laws.parametric import Surface
from peerscale.laws.solver import FitStatus

TRUTH = Surface(E=1.8, A=400.0, B=2000.0, alpha=0.3, beta=0.36)


def curves(noise: float = 0.0, seed: int = 0, sizes: int = 25, steps: int = 300) -> pd.DataFrame:
    """Curves of equal steps up to 1e21 FLOPs."""
    rng = np.random.default_rng(seed)
    frames = []
    for n in np.geomspace(1e7, 3e10, sizes):
        c = np.linspace(1e21 / steps, 1e21, steps) * np.geomspace(1, 1e-3, 4)[:, None]
        c = np.sort(c.ravel())
        loss = TRUTH.predict(n, c / (6 * n)) + noise * rng.standard_normal(len(c))
        frames.append(pd.DataFrame({"run": f"{n:.3g}", "C": c, "N": n, "loss": loss}))
    return pd.concat(frames, ignore_index=True)


def fit(table: pd.DataFrame, **options) -> EnvelopeFit:
    return fit_envelope(table, run="run", flops="C", x="N", loss="loss", **options)


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_recovers_the_exponent(noise: float) -> None:
    result = fit(curves(noise), bootstrap=100)
    assert result.status is FitStatus.CONVERGED and result.n == 25
    assert result.exponent == pytest.approx(TRUTH.a, abs=0.02)
    assert result.optimum(1e20) == pytest.approx(TRUTH.optimum(1e20).params, rel=0.15)
    low, high = result.ci["exponent"]
    assert low < result.exponent < high and high - low < 0.2
    assert result.hold_out.predicted == pytest.approx(result.hold_out.observed, rel=0.25)
    inside = (result.budgets > 1e19) & (result.budgets < 1e21) & np.isfinite(result.losses)
    best = TRUTH.optimum(result.budgets[inside]).loss
    np.testing.assert_allclose(result.losses[inside], best, atol=0.003 + noise)


def test_the_winner_is_the_lowest_of_the_runs_that_got_so_far() -> None:
    nan = np.nan
    losses = np.array([[3.0, 2.9, nan, nan], [3.5, 2.8, 2.5, 2.4], [4.0, 3.0, 2.6, 2.1], [nan, 5.0, 4.0, nan]])
    optima, lowest, interior = winning_sizes(losses, np.array([1.0, 2.0, 3.0, 4.0]))
    assert optima.tolist() == [1, 2, 2, 3] and lowest.tolist() == [3, 2.8, 2.5, 2.1]
    assert interior.tolist() == [False, True, False, False]  # third: nothing smaller has got so far


def test_smoothing_averages_in_log_compute() -> None:
    c = np.geomspace(1e18, 1e20, 4001)
    noisy = 3 - 0.1 * np.log10(c) + 0.1 * np.random.default_rng(0).standard_normal(len(c))
    budgets, (smooth,) = smooth_curves(np.zeros(len(c), int), c, noisy)
    assert np.isfinite(smooth).sum() > 35
    assert np.nanstd(smooth - (3 - 0.1 * np.log10(budgets))) == pytest.approx(0.1 / np.sqrt(100), rel=0.4)


def test_optima_at_the_edge_of_the_sizes_are_no_optima() -> None:
    small = curves().query("N < 1e8 and C > 1e19")
    assert TRUTH.optimum(1e19).params > 1e8
    result = fit(small)
    assert result.exponent is None and result.status is FitStatus.TOO_FEW_POINTS
    assert any("no exponent" in warning for warning in result.warnings) and np.isnan(result.optimum(1e20))


def test_bad_input_is_named_and_json_is_plain() -> None:
    table = curves(sizes=5, steps=20)
    with pytest.raises(UserError, match="no column 'run'"):
        fit(table.drop(columns="run"))
    with pytest.raises(UserError, match=r"run one has 5 values of 'N': a run has one size"):
        fit(table.assign(run="one"))
    with pytest.raises(UserError, match="'loss' must hold finite numbers above 0, not so in row 3: nan"):
        fit(table.assign(loss=table["loss"].where(table.index != 3)))
    stored = json.loads(json.dumps(fit(curves(), bootstrap=20).to_dict(), allow_nan=False))
    assert stored["law"] == "envelope" and len(stored["interior"]) == len(stored["budgets"]) == len(stored["losses"])
