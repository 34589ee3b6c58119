"""The one regression against numpy's solvers, against simulations, and against the formulas that it stands for."""

import ast
import dataclasses
import math

import numpy as np
import pytest
from scipy.stats import ttest_ind

from peerscale.files import ROOT
from peerscale.laws.linear_fit import Array, LinearFit

SOLVERS = {"lstsq", "pinv", "inv", "solve", "polyfit"}


def test_nothing_else_solves_linear_equations() -> None:
    found = set()
    for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "analysis").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            name = getattr(called, "attr", getattr(called, "id", ""))
            if name in SOLVERS:
                found.add(str(path.relative_to(ROOT)))
    assert found == {"src/peerscale/laws/linear_fit.py"}


@pytest.fixture
def line() -> LinearFit:
    rng = np.random.default_rng(0)
    design = np.column_stack([np.ones(20), rng.normal(size=20), rng.normal(size=20)])
    return LinearFit(design=design, values=design @ [3.0, -0.5, 0.2] + 0.1 * rng.normal(size=20))


def test_equals_least_squares(line: LinearFit) -> None:
    expected, rss, rank, _ = np.linalg.lstsq(line.design, line.values, rcond=None)
    np.testing.assert_allclose(line.coefficients, expected, rtol=1e-12)
    assert line.rss == pytest.approx(rss[0]) and line.df == 20 - rank and line.determined
    np.testing.assert_allclose(line.residuals, line.values - line.design @ expected, atol=1e-12)
    covariance = np.linalg.inv(line.design.T @ line.design) * rss[0] / 17
    np.testing.assert_allclose(line.covariance, covariance, rtol=1e-9)
    hat = line.design @ np.linalg.inv(line.design.T @ line.design) @ line.design.T
    np.testing.assert_allclose(line.leverage, np.diag(hat), rtol=1e-9)


def test_coefficients_of_many_draws(line: LinearFit) -> None:
    draws = np.random.default_rng(1).normal(size=(2, 5, 20))
    found = line.coefficients_of(draws)
    assert found.shape == (2, 5, 3)
    expected = np.linalg.lstsq(line.design, draws[1, 3], rcond=None)[0]
    np.testing.assert_allclose(found[1, 3], expected, rtol=1e-9)


def test_weights_are_inverse_variances() -> None:
    """numpy takes their roots; with known variances its covariance is not scaled by the scatter."""
    x, se = np.array([12.0, 12.5, 13.0, 13.5]), np.array([0.004, 0.006, 0.008, 0.01])
    y = 1.5 - 0.09 * x + se * np.array([1, -1, 1, -1])
    found = LinearFit(design=np.vander(x - 13, 2), values=y, weights=1 / se**2)
    expected, unscaled = np.polyfit(x - 13, y, 1, w=1 / se, cov="unscaled")
    np.testing.assert_allclose(found.coefficients, expected, rtol=1e-10)
    np.testing.assert_allclose(found.inverse, unscaled, rtol=1e-9)
    np.testing.assert_allclose(found.covariance, np.polyfit(x - 13, y, 1, w=1 / se, cov=True)[1], rtol=1e-9)
    assert found.rss == pytest.approx(np.sum(((y - np.polyval(expected, x - 13)) / se) ** 2))


@pytest.mark.parametrize("weighted", [False, True])
def test_levels_of_groups_are_those_of_a_column_each(line: LinearFit, weighted: bool) -> None:
    groups = np.array(["a", "b", "c", "b"] * 5)
    weights = np.random.default_rng(2).uniform(0.5, 2, 20) if weighted else None
    slopes = line.design[:, 1:]
    columns = np.hstack([slopes, groups[:, None] == np.array(["a", "b", "c"])])
    found = LinearFit(design=slopes, values=line.values, weights=weights, groups=groups)
    expected = LinearFit(design=columns, values=line.values, weights=weights)
    np.testing.assert_allclose(found.coefficients, expected.coefficients[:2], rtol=1e-10)
    np.testing.assert_allclose(found.covariance, expected.covariance[:2, :2], rtol=1e-9)
    np.testing.assert_allclose(found.residuals, expected.residuals, atol=1e-12)
    assert (found.df, found.rss) == (expected.df, pytest.approx(expected.rss))
    np.testing.assert_allclose(found.coefficients_of(line.values[None])[0], found.coefficients, rtol=1e-10)


def test_what_the_points_do_not_determine() -> None:
    design = np.column_stack([np.ones(6), np.arange(6.0), 2 * np.arange(6.0)])
    found = LinearFit(design=design, values=np.arange(6.0) + 1)
    assert not found.determined and found.df == 4 and found.rss == pytest.approx(0, abs=1e-20)
    np.testing.assert_allclose(found.coefficients, [1, 0.2, 0.4], atol=1e-12)  # the shortest solution


def test_without_degrees_of_freedom_there_is_no_error() -> None:
    found = LinearFit(design=np.vander(np.arange(3.0), 3), values=np.array([1.0, 0.0, 2.0]))
    assert found.df == 0 and math.isnan(found.scatter) and np.isnan(found.covariance).all()
    assert math.isnan(found.estimate(np.array([1.0, 0, 0])).se)


def test_the_difference_of_two_means_is_students() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(1, 1, 6), rng.normal(0, 1, 8)
    design = np.column_stack([np.r_[np.ones(6), np.zeros(8)], np.r_[np.zeros(6), np.ones(8)]])
    found = LinearFit(design=design, values=np.r_[a, b]).estimate(np.array([1.0, -1.0]))
    expected = ttest_ind(a, b)
    assert (found.value, found.df, found.p) == pytest.approx((a.mean() - b.mean(), 12, expected.pvalue))
    assert found.interval == pytest.approx((expected.confidence_interval().low, expected.confidence_interval().high))


def test_a_restricted_model_is_tested_as_two_means_are() -> None:
    """The F test of one constraint is the square of Student's test."""
    rng = np.random.default_rng(4)
    values, second = rng.normal(size=14), (np.arange(14) >= 6).astype(float)
    full = LinearFit(design=np.column_stack([np.ones(14), second]), values=values)
    restricted = LinearFit(design=np.ones((14, 1)), values=values)
    found, expected = full.f_test(restricted), ttest_ind(values[:6], values[6:])
    assert found == {"f": pytest.approx(expected.statistic**2), "df": (1, 12), "p": pytest.approx(expected.pvalue)}
    assert full.f_test(full) is None


def parabola(rng: np.random.Generator, noise: float = 0.02) -> LinearFit:
    """Its minimum is at 0.3."""
    z = np.linspace(-1, 1, 9)
    values = 2 + 0.5 * (z - 0.3) ** 2 + noise * rng.normal(size=9)
    return LinearFit(design=np.vander(z, 3, increasing=True), values=values)


SLOPE, BEND = np.array([0.0, -1.0, 0.0]), np.array([0.0, 0.0, 2.0])


def test_the_interval_of_a_minimum_covers_it_as_often_as_it_says() -> None:
    rng, covered = np.random.default_rng(5), 0
    for _ in range(1000):
        _, (low, high) = parabola(rng, 0.05).ratio(SLOPE, BEND)
        covered += low <= 0.3 <= high
    assert 0.93 < covered / 1000 < 0.97


def test_the_ends_of_the_interval_are_the_values_that_a_test_just_rejects() -> None:
    fit = parabola(np.random.default_rng(6))
    minimum, ends = fit.ratio(SLOPE, BEND)
    assert minimum == pytest.approx(SLOPE @ fit.coefficients / (BEND @ fit.coefficients))
    for end in ends:
        assert fit.estimate(SLOPE - end * BEND).p == pytest.approx(0.05)


def test_a_flat_curve_bounds_no_minimum() -> None:
    flat: Array = np.random.default_rng(7).normal(size=9)
    fit = dataclasses.replace(parabola(np.random.default_rng(7)), values=flat)
    assert fit.ratio(SLOPE, BEND)[1] == (-math.inf, math.inf)
