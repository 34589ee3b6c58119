"""The law of the best learning rate, against the truth of made-up runs and against SciPy's nonlinear least squares."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import least_squares

from peerscale.api import fit_rates
from peerscale.errors import UserError
from peerscale.stats.rate_law import RateFit, RateLaw

TRUTH = {"dense": RateLaw(m=0.005, a=0.4, b=0.3, c=0.5), "peer": RateLaw(m=0.007, a=0.4, b=0.3, c=0.5)}
CORNERS = [(32, 2e6, 16), (32, 1e7, 16), (64, 2e6, 16), (64, 1e7, 16), (32, 2e6, 8), (64, 1e7, 32), (80, 1e7, 16)]
COLUMNS = {"width": "d", "tokens": "T", "batch": "B", "by": "method"}


def best(law: RateLaw, d: float, tokens: float, batch: float) -> float:
    return law.m * (d / 64) ** -law.a * (tokens / 1e7) ** -law.b * (batch / 16) ** law.c


def runs(noise: float, seed: int = 0, laws: dict[str, RateLaw] = TRUTH) -> pd.DataFrame:
    rng, rows = np.random.default_rng(seed), []
    for method, law in laws.items():
        for d, tokens, batch in CORNERS:
            off, level = rng.normal(0, 0.2), rng.normal(4.3, 0.2)
            for lr in best(law, d, tokens, batch) * np.exp(off) * 1.7 ** np.arange(-2.0, 3):
                loss = level + 0.06 * math.log(lr / best(law, d, tokens, batch)) ** 2 + rng.normal(0, noise)
                rows.append({"method": method, "d": d, "T": tokens, "B": batch, "lr": lr, "loss": loss})
    return pd.DataFrame(rows)


def at_reference(fit: RateFit, method: str) -> float:
    found = fit.laws[method]
    return best(TRUTH[method], found.width_0, found.tokens_0, found.batch_0)


def test_runs_without_noise_give_the_law_back() -> None:
    fit = fit_rates(runs(0), **COLUMNS, reach=100)
    assert fit.curvature == pytest.approx(0.06) and fit.n == 70 and fit.n_curves == 14 and fit.scatter < 1e-9
    for method, law in TRUTH.items():
        found = fit.laws[method]
        assert (found.a, found.b, found.c) == pytest.approx((0.4, 0.3, 0.5))
        assert found.m == pytest.approx(at_reference(fit, method))
        assert found.predict(96, 3e7, 24) == pytest.approx(best(law, 96, 3e7, 24))
        assert found.predict() == found.m, "what is left out is at the reference"
    assert fit.held_out_error == pytest.approx(0, abs=1e-7) and len(fit.held_out) == 14
    assert fit.fitted == {"width": (32, 80), "tokens": (2e6, 1e7), "batch": (8, 32)}


def test_agrees_with_nonlinear_least_squares() -> None:
    table = runs(0.004)
    fit = fit_rates(table, **COLUMNS, reach=100)
    curve, method = table.groupby(["method", "d", "T", "B"]).ngroup(), (table["method"] == "peer").to_numpy(int)
    d, tokens, batch = (table[column].to_numpy(float) for column in ("d", "T", "B"))
    law = fit.laws["dense"]

    def residuals(p: np.ndarray) -> np.ndarray:
        lowest, k, log_m, (a, b, c) = p[:14][curve], p[14], p[15:17][method], p[17:]
        centre = (
            log_m - a * np.log(d / law.width_0) - b * np.log(tokens / law.tokens_0) + c * np.log(batch / law.batch_0)
        )
        return lowest + k * (np.log(table["lr"]) - centre) ** 2 - table["loss"]

    start = np.r_[np.full(14, 4.3), 0.05, np.log([0.006, 0.006]), 0, 0, 0]
    found = least_squares(residuals, start, xtol=1e-15, ftol=1e-15, gtol=1e-15)
    assert fit.curvature == pytest.approx(found.x[14], rel=1e-6)
    assert [law.m, fit.laws["peer"].m, law.a, law.b, law.c] == pytest.approx(
        [*np.exp(found.x[15:17]), *found.x[17:]], rel=1e-5
    )
    assert fit.scatter == pytest.approx(math.sqrt(2 * found.cost / (70 - 20)), rel=1e-6) and fit.df == 50


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    covered = []
    for seed in range(80):
        fit = fit_rates(runs(0.01, seed), **COLUMNS, reach=100)
        for method in TRUTH:
            ci, truth = fit.laws[method].ci, {"m": at_reference(fit, method), "a": 0.4, "b": 0.3, "c": 0.5}
            covered.append([ci[name][0] <= value <= ci[name][1] for name, value in truth.items()])
    assert np.mean(covered, axis=0) == pytest.approx(np.full(4, 0.95), abs=0.045)


def test_unequal_exponents_are_told_and_equal_ones_are_not() -> None:
    equal = [fit_rates(runs(0.004, seed), **COLUMNS) for seed in range(40)]
    assert 0 <= np.mean([fit.equal_exponents["p"] < 0.05 for fit in equal]) <= 0.15
    assert sum(fit.exponents == "shared" for fit in equal) >= 38, "unless p < 0.01"
    other = {**TRUTH, "peer": RateLaw(m=0.007, a=0.0, b=0.6, c=0.5)}
    table = runs(0.004, laws=other)
    fit = fit_rates(table, **COLUMNS, hold_out=table["d"] == 80)
    assert fit.equal_exponents["p"] < 1e-4 and fit.exponents == "own"
    for one in fit.held_out:
        assert one.predicted == pytest.approx(best(other[one.at["method"]], 80, 1e7, 16), rel=0.15)
    plain = fit.to_dict()["groups"]["peer"]
    assert plain["b"] == plain["own"]["b"] == fit.own["peer"].b and plain["shared"]["b"] == fit.shared["peer"].b
    low, high = plain["ci"]["b"]
    assert low < 0.6 < high
    assert fit.own["peer"].b == pytest.approx(0.6, abs=0.1) and fit.own["dense"].b == pytest.approx(0.3, abs=0.1)


def test_exponents_of_what_one_method_alone_varies_are_shared() -> None:
    other = {**TRUTH, "peer": RateLaw(m=0.007, a=0.0, b=0.6, c=0.5)}
    table = runs(0.0, laws=other)
    fit = fit_rates(table[(table["method"] == "dense") | (table["B"] == 16)], **COLUMNS, reach=100)
    assert fit.exponents == "own"
    for method, law in other.items():
        found = fit.own[method]
        assert (found.a, found.b, found.c) == pytest.approx((law.a, law.b, 0.5), abs=1e-6)


def test_the_held_out_size_is_judged_by_what_its_rate_costs() -> None:
    table = runs(0.0)
    table.loc[table["d"] == 80, "lr"] *= 2  # whose best rate then is twice the law's
    fit = fit_rates(table, **COLUMNS, hold_out=table["d"] == 80, reach=100)
    assert fit.laws["dense"].a == pytest.approx(0.4), "not fitted to them"
    assert {one.name for one in fit.held_out} == {"dense 80 1e+07 16", "peer 80 1e+07 16"}
    assert fit.held_out_error == pytest.approx(math.log(2))
    assert fit.held_out_cost == pytest.approx(0.06 * math.log(2) ** 2)


def test_far_rates_are_left_out_and_edges_named() -> None:
    table = runs(0.001)
    far = fit_rates(table, **COLUMNS, reach=1.8)
    assert far.n < 70 and far.warnings[0].endswith("runs beyond 1.8 times a curve's best rate left out")
    curves = table.groupby(["method", "d", "T", "B"])
    with pytest.raises(UserError, match="no curve has 3 rates"):
        fit_rates(curves.head(2), **COLUMNS)
    falling = curves.head(3).copy()
    falling["loss"] -= 0.2 * np.log(falling["lr"])
    assert "at the edge of the rates tried: dense 32 2e+06 16, dense" in fit_rates(falling, **COLUMNS).warnings[-1]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"T": 1e7}, "do not determine the exponents of d, T, B"),
        ({"loss": 4.0}, "do not rise on both sides"),
        ({"lr": 0.0}, "column 'lr' must hold finite numbers above 0"),
    ],
)
def test_what_cannot_be_fitted_is_one_line(change: dict[str, float], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        fit_rates(runs(0.001).assign(**change), **COLUMNS)
    with pytest.raises(UserError, match="no column 'seed'"):
        fit_rates(runs(0.001), **COLUMNS, curve=["seed"])


def test_a_law_without_another_model_to_test_it_says_so() -> None:
    one = runs(0.004).query("method == 'dense' and d == 64 and T == 1e7 and B == 16")
    fit = fit_rates(one)
    assert fit.held_out == () and "no held-out error: the other curves do not determine the law" in fit.warnings
    stored = json.loads(json.dumps(fit.to_dict(), allow_nan=False))
    assert stored["held_out_error"] is None and stored["groups"]["all"]["status"] == "converged"


def test_a_method_without_a_name_is_one_of_its_own() -> None:
    laws = {**TRUTH, "none": RateLaw(m=0.02, a=0.4, b=0.3, c=0.5)}
    table = runs(0, laws=laws)
    unnamed = table.assign(method=table["method"].where(table["method"] != "none", None))
    fit = fit_rates(unnamed, **COLUMNS, reach=100)
    assert len(fit.laws) == 3
    assert fit.laws["peer"].m == pytest.approx(at_reference(fit, "peer")) and fit.laws["peer"].a == pytest.approx(0.4)


def test_what_the_runs_do_not_bound_is_said() -> None:
    rng = np.random.default_rng(0)
    rows = [(d, lr, 4 + rng.normal(0, 0.1)) for d in (32, 64) for lr in (1e-3, 2e-3, 4e-3)]
    table = pd.DataFrame(rows, columns=["d", "lr", "loss"])
    table["loss"] += 0.01 * np.log(table["lr"] / 2e-3) ** 2
    fit = fit_rates(table, width="d")
    assert fit.laws["all"].ci["m"] == (0, math.inf) and fit.laws["all"].ci["a"] == (-math.inf, math.inf)
    assert "the runs do not bound m of all, a of all: their intervals are infinite" in fit.warnings
    assert fit.to_dict()["groups"]["all"]["status"] == "not_identifiable"
