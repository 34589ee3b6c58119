import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import least_squares

from peerscale.stats.curve import Curve
from peerscale.stats.table_rates import fit_table_law, table_law_of

USUAL = {"peer": 0.02, "pkm": 0.2}
BEST = {"peer": 0.01, "pkm": 0.06}
CURVATURE = 0.008


def runs(exponents: dict[str, float], noise: float = 0.0) -> pd.DataFrame:
    """Three budgets, three rates, two seeds of two methods whose best rate falls as tokens^-e."""
    rng, rows = np.random.default_rng(3), []
    places = itertools.product(USUAL, [(1e13, 6e6, "d64"), (3e13, 1.2e7, "d96"), (1e14, 2e7, "d112")], [0, 1])
    for method, (budget, tokens, size), seed in places:
        level = 4.0 + rng.normal(0, 0.1)
        best = BEST[method] * (tokens / 1e7) ** -exponents[method]
        for rate in (USUAL[method], USUAL[method] / 3, USUAL[method] / 10):
            loss = level + CURVATURE * math.log(rate / best) ** 2 + rng.normal(0, noise)
            rows.append({
                "method": method, "budget": budget, "size": size, "seed": seed, "tokens": tokens, "table_lr": rate,
                "val_loss": loss, "usual": USUAL[method],
            })  # fmt: skip
    return pd.DataFrame(rows)


def at_1e7(law: dict[str, float]) -> float:
    """The best rate of a law at ten million tokens."""
    return law["m"] * (1e7 / law["tokens_0"]) ** -law["b"]


def test_the_law_of_losses_with_hardly_any_noise_is_found() -> None:
    """Without any, rounding alone would decide whether the exponents differ."""
    found = fit_table_law(runs({"peer": 0.9, "pkm": 0.9}, noise=1e-9))
    assert found is not None
    law = found["law"]
    assert (law["exponents"], law["df"]) == ("shared", 36 - 12 - 4)
    assert law["groups"]["pkm"]["b"] == pytest.approx(0.9)
    assert law["curvature"] == pytest.approx(CURVATURE)
    for method, best in BEST.items():
        assert at_1e7(law["groups"][method]) == pytest.approx(best)
    largest = {one["method"]: one for one in found["budgets"] if one["budget"] == 1e14}
    gain = CURVATURE * math.log(0.02 / (0.01 * 2**-0.9)) ** 2
    assert largest["peer"]["gain"] == pytest.approx(gain)
    assert largest["peer"]["best"] == pytest.approx(0.01 * 2**-0.9)
    assert (largest["peer"]["tried"], largest["peer"]["edge"]) == (0.02 / 3, False)
    assert (largest["pkm"]["tried"], largest["pkm"]["edge"]) == (0.02, True), "the best rate is .032"


def test_each_method_has_its_own_exponent_where_they_differ() -> None:
    found = fit_table_law(runs({"peer": 1.5, "pkm": 0.0}, noise=1e-4))
    assert found is not None and found["law"]["exponents"] == "own" and found["law"]["equal_exponents"]["p"] < 1e-6
    peer, pkm = (found["law"]["groups"][method] for method in ("peer", "pkm"))
    assert peer["b"] == pytest.approx(1.5, abs=0.05)
    assert pkm["ci"]["b"][0] < 0 < pkm["ci"]["b"][1]


def test_the_fit_is_that_of_a_nonlinear_solver() -> None:
    table = runs({"peer": 0.8, "pkm": 0.8}, noise=0.004)
    found = fit_table_law(table)
    assert found is not None
    law = found["law"]
    curves = table.groupby(["method", "size", "seed"]).ngroup().to_numpy()
    of = (table["method"] == "pkm").to_numpy(int)
    x, t = np.log(table["table_lr"]).to_numpy(), np.log(table["tokens"] / 1e7).to_numpy()

    def residuals(values: np.ndarray) -> np.ndarray:
        c, e, *rest = values
        best, levels = np.array(rest[:2]), np.array(rest[2:])
        return levels[curves] + c * (x - best[of] + e * t) ** 2 - table["val_loss"].to_numpy()

    start = np.r_[0.01, 0.5, -4.0, -3.0, np.full(curves.max() + 1, 4.0)]
    solved = least_squares(residuals, start, xtol=1e-14, ftol=1e-14, gtol=1e-14)
    assert law["curvature"] == pytest.approx(solved.x[0], rel=1e-4)
    assert law["groups"]["peer"]["b"] == pytest.approx(solved.x[1], rel=1e-4)
    assert at_1e7(law["groups"]["peer"]) == pytest.approx(math.exp(solved.x[2]), rel=1e-4)
    assert law["scatter"] == pytest.approx(math.sqrt(2 * solved.cost / law["df"]), rel=1e-6)


def test_nothing_is_said_without_a_minimum_or_without_several_rates() -> None:
    table = runs({"peer": 0.5, "pkm": 0.5})
    assert fit_table_law(table[table["table_lr"] == table["usual"]]) is None
    assert fit_table_law(table.assign(val_loss=-table["val_loss"])) is None


def test_the_methods_of_a_study_are_told_by_their_curves() -> None:
    plain = runs({"peer": 0.9, "pkm": 0.9})
    settings = [{} if rate == USUAL[method] else {"optim.table_lr": rate}
                for method, rate in zip(plain["method"], plain["table_lr"], strict=True)]  # fmt: skip
    done = plain.assign(curve=[*map(Curve.of, plain["method"], settings)]).drop(columns="usual")
    more = done[done["method"] == "peer"].assign(curve=Curve.of("peer", {"ffn.n_experts": 16384}), val_loss=9.0)
    found, expected = table_law_of(pd.concat([done, more])), fit_table_law(plain)
    assert found is not None and expected is not None
    assert found["law"]["curvature"] == pytest.approx(expected["law"]["curvature"])
    assert [row["gain"] for row in found["budgets"]] == pytest.approx([row["gain"] for row in expected["budgets"]])
    assert table_law_of(done[done["table_lr"] == 0.02]) is None
