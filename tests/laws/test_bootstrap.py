"""Resampling: what is drawn, how often, and what an interval makes of it."""

from dataclasses import dataclass

import numpy as np
import pytest

from peerscale.laws.fitting import Bootstrap, percentile_interval, resample_counts
from peerscale.laws.isoflop import resample_residuals


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
    drawn = resample_residuals(residuals, 6000, seed=0)
    assert drawn.shape == (6000, 4)
    for value in (1, 2, 3):
        np.testing.assert_allclose(np.mean(drawn == value, axis=0), 1 / 3, atol=0.03)
    assert np.isnan(resample_residuals(np.full(3, np.nan), 5, seed=0)).all()


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


def test_stored_and_read_back() -> None:
    draws = np.random.default_rng(0).lognormal(10, 1, 3000)
    stored = Bootstrap(draws={"a": draws}, resamples=3010, failed=10, at_bound=2, seed=4).to_dict()
    again = Bootstrap.from_dict(stored)
    assert (again.resamples, again.failed, again.at_bound, again.seed) == (3010, 10, 2, 4) and stored["level"] == 0.95
    np.testing.assert_allclose(again.draws["a"], draws[: len(again.draws["a"])], rtol=1e-5)
