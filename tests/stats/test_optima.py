"""One fit of a budget against scipy's regressions, textbook formulas worked by hand, and cases that have no number."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import curve_fit

from peerscale.stats.optima import OptimaFit, OptimumStatus, holm

Z = np.array([5.5, 5.7, 5.9, 6.15, 6.4])
"""log10 of the sizes."""
NAMES = ("dense", "moe", "peer")


def parabola(z: np.ndarray, method: int) -> np.ndarray:
    """Minima of 4.5 less .03 a method, at 5.95 less .05 a method; a curvature of .9 for all."""
    return 4.5 - 0.03 * method + 0.9 * (z - 5.95 + 0.05 * method) ** 2


def runs(
    n_methods: int = 3, *, z: np.ndarray = Z, seeds: Sequence[int] | int = 1, misfit: float = 0.005,
    seed_sd: float = 0.0, rng: int = 0,
) -> tuple[list[str], np.ndarray, np.ndarray]:  # fmt: skip
    """Names, sizes and losses of runs; `seeds` is how many each size has."""
    noise = np.random.default_rng(rng)
    names, sizes, losses = [], [], []
    counts = np.broadcast_to(seeds, len(z))
    for method in range(n_methods):
        for at, n in zip(z, counts, strict=True):
            mean = parabola(at, method) + misfit * noise.normal()
            for _ in range(n):
                names.append(NAMES[method])
                sizes.append(10**at)
                losses.append(mean + seed_sd * noise.normal())
    return names, np.array(sizes), np.array(losses)


def scipys(
    names: Sequence[str], x: np.ndarray, losses: np.ndarray
) -> tuple[np.ndarray, np.ndarray, Callable[[str, np.ndarray], float]]:
    """Coefficients (a and b of each method, then c), their covariance, and a method's minimum as a function of them."""
    methods = list(dict.fromkeys(names))
    index = np.array([methods.index(name) for name in names])

    def model(z: np.ndarray, *theta: float) -> np.ndarray:
        a, b = np.array(theta[:-1]).reshape(2, -1)
        return a[index] + b[index] * z + theta[-1] * z**2

    z = np.log10(x) - 6
    found, covariance = curve_fit(model, z, losses, p0=np.ones(2 * len(methods) + 1))

    def minimum(name: str, theta: np.ndarray) -> float:
        a, b = theta[:-1].reshape(2, -1)[:, methods.index(name)]
        return float(a - b**2 / (4 * theta[-1]))

    return found, covariance, minimum


def delta(function: Callable[[np.ndarray], float], theta: np.ndarray, covariance: np.ndarray) -> float:
    """Standard error of a function of fitted coefficients, by differences."""
    steps = 1e-5 * np.eye(len(theta))
    gradient = np.array([(function(theta + step) - function(theta - step)) / 2e-5 for step in steps])
    return float(np.sqrt(gradient @ covariance @ gradient))


def hat(fit: OptimaFit, n_methods: int) -> np.ndarray:
    """The projection of the shared-curvature model, by the normal equations."""
    z = np.log10(fit.x) - 6
    one = (fit.method[:, None] == np.arange(n_methods)).astype(float)
    design = np.column_stack([one, one * z[:, None], z**2])
    return design @ np.linalg.inv(design.T @ design) @ design.T


@pytest.mark.parametrize("n", [1, 3])
def test_coefficients_optima_and_errors_are_those_of_curve_fit(n: int) -> None:
    """The errors too for one method; with several each has its own (`test_noise`)."""
    names, x, losses = runs(n)
    fit, (theta, covariance, minimum) = OptimaFit.of(names, x, losses), scipys(names, x, losses)
    assert fit.linear.df == 5 * n - 2 * n - 1
    for i, name in enumerate(NAMES[:n]):
        found = fit.optimum(name)
        a, b = theta[i], theta[n + i]
        c = theta[-1]
        assert found.coefficients == pytest.approx((a - 6 * b + 36 * c, b - 12 * c, c), rel=1e-5)
        assert found.loss == pytest.approx(minimum(name, theta), abs=1e-7)
        estimate = fit.estimate(found.weights)
        assert estimate.value == pytest.approx(found.loss, abs=1e-12)

        def place(t: np.ndarray, i: int = i) -> float:
            return float(-t[n + i] / (2 * t[-1]))

        assert math.log10(found.x) - 6 == pytest.approx(place(theta), abs=1e-6)
        if n > 1:
            continue
        se = delta(lambda t, name=name: minimum(name, t), theta, covariance)
        assert estimate.se == pytest.approx(se, rel=1e-4) and estimate.df == pytest.approx(2)
        half = stats.t.ppf(0.975, 2) * delta(place, theta, covariance)
        assert np.log10(found.x_interval) - 6 == pytest.approx([place(theta) - half, place(theta) + half], rel=1e-3)


def test_the_error_of_a_difference_counts_the_curvature_that_both_share() -> None:
    """To first order a difference is a weighted sum of size means, whose variances are those of their methods."""
    names, x, losses = runs()
    fit, (theta, _, minimum) = OptimaFit.of(names, x, losses), scipys(names, x, losses)

    def difference(values: np.ndarray) -> float:
        theta, _, minimum = scipys(names, x, values)
        return minimum("peer", theta) - minimum("dense", theta)

    found = fit.estimate(fit.optimum("peer").weights - fit.optimum("dense").weights)
    assert found.value == pytest.approx(minimum("peer", theta) - minimum("dense", theta), abs=1e-7)
    gradient = [(difference(losses + step) - difference(losses - step)) / 2e-5 for step in 1e-5 * np.eye(15)]
    assert found.se == found.fit_se == pytest.approx(math.sqrt(np.square(gradient) @ fit.variances), rel=1e-3)
    assert found.seeds_se is None and found.sequences_se is None
    assert 2 < found.df <= 8, "more than one method tells, and no more than all"
    assert found.interval == pytest.approx(stats.t.interval(0.95, found.df, loc=found.value, scale=found.se))
    assert found.p == pytest.approx(2 * stats.t.sf(abs(found.value) / found.se, found.df))


def test_own_curvatures_are_polynomials_of_each_method() -> None:
    names, x, losses = runs()
    fit, rss = OptimaFit.of(names, x, losses, shared=False), 0.0
    for i, name in enumerate(NAMES):
        (c, b, a), squares, *_ = np.polyfit(Z, losses[5 * i : 5 * i + 5], 2, full=True)
        rss += float(squares[0])
        assert fit.optimum(name).coefficients == pytest.approx((a, b, c), rel=1e-6)
        assert fit.optimum(name).loss == pytest.approx(a - b**2 / (4 * c), abs=1e-8)
    assert fit.linear.df == 15 - 9
    shared = OptimaFit.of(names, x, losses).linear
    equality = fit.linear.f_test(shared)
    assert equality is not None and equality["df"] == (2, 6)
    assert equality["f"] == pytest.approx((shared.rss - rss) / 2 / (rss / 6))
    one, alone = (OptimaFit.of(*runs(1), shared=s).linear for s in (True, False))
    assert alone.f_test(one) is None, "one method has no curvature to compare"


def test_equal_seeds_split_the_residuals_into_misfit_and_seeds() -> None:
    """Balanced, the total error is that of a regression of the size means, whatever the split."""
    names, x, losses = runs(1, seeds=3, misfit=0.01, seed_sd=0.004, rng=1)
    fit = OptimaFit.of(names, x, losses)
    groups = losses.reshape(5, 3)
    within = float(groups.var(axis=1, ddof=1).mean())  # mean square within groups of a one-way analysis of variance
    assert fit.seed_df == [10] and fit.noise.seeds == pytest.approx([within])
    assert fit.seeds_sd == pytest.approx(math.sqrt(within))
    means = groups.mean(axis=1)
    theta, covariance, minimum = scipys(names[::3], x[::3], means)
    rss = float(means @ (np.eye(5) - hat(fit, 1)) @ means)
    weights = fit.optimum("dense").weights
    found = fit.estimate(weights)
    assert found.se == pytest.approx(delta(lambda t: minimum("dense", t), theta, covariance), rel=1e-4)
    assert found.df == pytest.approx(2) and fit.linear.df == 2
    assert found.fit_se == pytest.approx(math.sqrt(weights @ weights * (rss / 2 - within / 3)))
    assert found.seeds_se == pytest.approx(math.sqrt(weights @ weights * within / 3))
    assert found.se == pytest.approx(math.hypot(found.fit_se, found.seeds_se))


def test_seeds_at_one_size_only() -> None:
    """tau^2 from the expectation of the residuals' sum of squares; degrees of freedom by Satterthwaite's formula."""
    names, x, losses = runs(1, seeds=(1, 1, 3, 1, 1), misfit=0.008, seed_sd=0.003, rng=2)
    fit, n = OptimaFit.of(names, x, losses), np.array([1, 1, 3, 1, 1])
    sigma2 = float(losses[2:5].var(ddof=1))
    means = np.array([*losses[:2], losses[2:5].mean(), *losses[5:]])
    rest = np.eye(5) - hat(fit, 1)
    ms = float(means @ rest @ means) / 2
    share = float(np.trace(rest @ np.diag(1 / n))) / 2
    tau2 = ms - sigma2 * share
    assert tau2 > 0
    weights = fit.optimum("dense").weights
    square, by_seed = float(weights @ weights), float(weights**2 @ (1 / n))
    found = fit.estimate(weights)
    assert found.fit_se == pytest.approx(math.sqrt(square * tau2))
    assert found.seeds_se == pytest.approx(math.sqrt(by_seed * sigma2))
    parts = square * ms, (by_seed - square * share) * sigma2  # of the two independent mean squares
    assert found.se**2 == pytest.approx(sum(parts))
    assert found.df == pytest.approx(sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 2))


def test_without_misfit_all_runs_tell_of_the_seeds() -> None:
    """Then the fit is an ordinary regression of the runs, as if each were a size of its own."""
    names, x, losses = runs(1, seeds=3, misfit=0.0, seed_sd=0.006, rng=1)
    fit = OptimaFit.of(names, x, losses)
    theta, covariance, minimum = scipys(names, x, losses)
    found = fit.estimate(fit.optimum("dense").weights)
    assert found.fit_se == 0
    assert found.df == pytest.approx(15 - 3)
    assert found.se == pytest.approx(delta(lambda t: minimum("dense", t), theta, covariance), rel=1e-4)


def test_sequences_add_what_their_weighted_sum_scatters() -> None:
    names, x, losses = runs(2)
    fit, rng = OptimaFit.of(names, x, losses), np.random.default_rng(0)
    difficulty, own = rng.normal(0, 0.5, 400), rng.normal(0, 0.05, (10, 400))
    weights = fit.optimum("moe").weights - fit.optimum("dense").weights
    alone = fit.estimate(weights)
    found = fit.estimate(weights, fit.losses[:, None] + difficulty + own)
    assert found.sequences_se == pytest.approx(np.std(weights @ own, ddof=1) / 20, rel=1e-9)  # difficulty cancels
    assert found.se == pytest.approx(math.hypot(alone.se, found.sequences_se))
    expected = found.se**4 / (alone.se**4 / 5 + found.sequences_se**4 / 399)
    assert found.df == pytest.approx(expected)
    one = fit.estimate(fit.optimum("moe").weights, fit.losses[:, None] + difficulty + own)
    assert one.sequences_se == pytest.approx(0.5 / 20, rel=0.1)  # of a loss by itself it is the largest part


def test_optima_of_other_losses_equal_fits_of_them() -> None:
    names, x, losses = runs()
    fit = OptimaFit.of(names, x, losses)
    others = losses + np.random.default_rng(1).normal(0, 0.01, (20, 15))
    at, lowest = fit.optima_of(others)
    for row, places, values in zip(others, at, lowest, strict=True):
        again = OptimaFit.of(names, x, row)
        assert places == pytest.approx([again.optimum(name).x for name in NAMES], rel=1e-8)
        assert values == pytest.approx([again.optimum(name).loss for name in NAMES], abs=1e-10)
    assert np.isnan(np.stack(fit.optima_of(-others))).all()


@pytest.mark.parametrize(
    ("centre", "status"),
    [(5.95, "ok"), (5.55, "off_centre"), (6.35, "off_centre"), (5.4, "outside_range"), (6.6, "outside_range")],
)
def test_where_the_minimum_lies(centre: float, status: str) -> None:
    losses = 4.5 + 0.9 * (Z - centre) ** 2
    found = OptimaFit.of(["dense"] * 5, 10**Z, losses + 1e-4 * np.array([1, -1, 0, 1, -1])).optimum("dense")
    assert found.status == status
    assert found.status.has_number == math.isfinite(found.loss) == math.isfinite(found.x) == (status != "outside_range")
    assert np.isfinite(found.weights).all() == found.status.has_number
    assert found.sizes == pytest.approx(10**Z)


def test_no_number_without_an_upward_curve_or_with_three_sizes() -> None:
    names, x, losses = runs()
    downwards = OptimaFit.of(names, x, -losses)
    assert {downwards.optimum(name).status for name in NAMES} == {OptimumStatus.CURVATURE}
    keep = np.array([name != "peer" for name in names]) | (x > 10**5.8)
    fit = OptimaFit.of([n for n, k in zip(names, keep, strict=True) if k], x[keep], losses[keep])
    few = fit.optimum("peer")
    assert few.status is OptimumStatus.TOO_FEW and len(few.sizes) == 3
    for value in (few.x, few.loss, *few.x_interval, *few.weights):
        assert math.isnan(value)
    assert fit.optimum("dense").status is OptimumStatus.OK


def test_a_lone_size_of_a_method_changes_nothing_for_the_others() -> None:
    names, x, losses = runs(2)
    alone = OptimaFit.of(names, x, losses)
    fit = OptimaFit.of([*names, "peer"], np.append(x, 10**5.9), np.append(losses, 4.4))
    assert fit.linear.df == alone.linear.df and fit.optimum("peer").status is OptimumStatus.TOO_FEW
    for name in ("dense", "moe"):
        assert fit.optimum(name).loss == pytest.approx(alone.optimum(name).loss, abs=1e-10)
        found = fit.estimate(fit.optimum(name).weights)
        assert found.se == pytest.approx(alone.estimate(alone.optimum(name).weights).se, rel=1e-8)


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_fit_through_all_points_has_no_error(seeds: int) -> None:
    names, x, losses = runs(1, z=Z[1:4], seeds=seeds, seed_sd=0.004)
    fit = OptimaFit.of(names, x, losses, at_least=3)
    found = fit.optimum("dense")
    c, b, a = np.polyfit(Z[1:4], losses.reshape(3, seeds).mean(axis=1), 2)
    assert found.loss == pytest.approx(a - b**2 / (4 * c), abs=1e-8)
    assert fit.linear.df == 0 and math.isnan(fit.linear.scatter)
    estimate = fit.estimate(found.weights)
    assert math.isnan(estimate.se) and np.isnan([*estimate.interval, estimate.p, *found.x_interval]).all()
    assert np.isnan(fit.variances[0]).all()


def test_neither_the_order_of_runs_nor_what_methods_are_called_matters() -> None:
    names, x, losses = runs(3, seeds=2, seed_sd=0.004)
    order = np.random.default_rng(5).permutation(len(x))
    called = {name: (3 - i, name[::-1]) for i, name in enumerate(NAMES)}
    fit, again = (
        OptimaFit.of(names, x, losses),
        OptimaFit.of([called[names[i]] for i in order], x[order], losses[order]),
    )
    for name in NAMES:
        one, other = fit.optimum(name), again.optimum(called[name])
        assert one.loss == pytest.approx(other.loss, abs=1e-12) and one.x == pytest.approx(other.x)


@pytest.mark.parametrize(
    ("p", "corrected"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.01, 0.02, 0.03, 0.04, 0.05], [0.05, 0.08, 0.09, 0.09, 0.09]),  # as R's p.adjust(p, "holm")
        ([0.6, 0.7], [1.0, 1.0]),
        ([0.03], [0.03]),
        ([math.nan, 0.01, 0.04], [math.nan, 0.02, 0.04]),
        ([], []),
    ],
)
def test_holm_by_hand(p: list[float], corrected: list[float]) -> None:
    np.testing.assert_allclose(holm(np.array(p)), corrected)


def test_tests_without_a_result_yet_count() -> None:
    """As if each had a probability of one."""
    p = np.array([0.012, 0.5, 0.001])
    np.testing.assert_allclose(holm(p, 6), holm(np.append(p, [1.0, 1.0, 1.0]))[:3])
    np.testing.assert_allclose(holm(p, 6), [0.06, 1.0, 0.006])
    np.testing.assert_allclose(holm(np.append(p, math.nan), 2), [0.024, 0.5, 0.003, math.nan])  # fewer than there are


REPEATS = 300
SEED_SD = 0.007
FINE_Z = np.linspace(5.58, 6.2, 501)
"""log10 of the sizes that are sampled, and of the grid on which the true minimum is sought."""


def true_loss(surface: str, z: np.ndarray, method: int) -> np.ndarray:
    """All methods but the first are .03 nats better, at a smaller size."""
    shift = min(method, 1)
    best = 5.95 - 0.06 * shift
    if surface == "parabola":
        return 4.5 - 0.03 * shift + 0.9 * (z - best) ** 2
    alpha, beta = 0.3, 0.9  # L = E + A / N^alpha + B / D^beta around its minimum, much steeper to one side
    return 3 - 0.03 * shift + 0.25 * (10 ** (alpha * (best - z)) + alpha / beta * 10 ** (beta * (z - best)))


@pytest.mark.parametrize(
    ("surface", "n_methods", "n_sizes", "seeds", "misfit"),
    [
        ("parabola", 2, 4, "one", 0.005),
        ("parabola", 2, 5, "two", 0.005),
        ("parabola", 2, 4, "three", 0.0),
        ("parabola", 5, 5, "three at one size", 0.004),
        ("parabola", 5, 4, "one", 0.005),
        ("asymmetric", 2, 5, "one", 0.003),
        ("asymmetric", 2, 4, "three", 0.003),
        ("asymmetric", 2, 5, "three at one size", 0.003),
        ("asymmetric", 5, 5, "two", 0.003),
        ("asymmetric", 5, 4, "three at one size", 0.003),
    ],
)
def test_intervals_hold_the_true_difference(
    surface: str, n_methods: int, n_sizes: int, seeds: str, misfit: float
) -> None:
    rng = np.random.default_rng(11)
    truth = true_loss(surface, FINE_Z, 1).min() - true_loss(surface, FINE_Z, 0).min()
    counts = np.full(n_sizes, {"one": 1, "two": 2, "three": 3}.get(seeds, 1))
    if seeds == "three at one size":
        counts[n_sizes // 2] = 3
    z = np.linspace(FINE_Z[0], FINE_Z[-1], n_sizes)
    means = np.concatenate([true_loss(surface, z, method) for method in range(n_methods)])
    names = np.repeat([str(method) for method in range(n_methods)], counts.sum()).tolist()
    counts = np.tile(counts, n_methods)
    x = np.repeat(np.tile(10**z, n_methods), counts)
    held = []
    for _ in range(REPEATS):
        sizes = means + misfit * rng.normal(size=len(means))  # a size's misfit is common to its seeds
        losses = np.repeat(sizes, counts) + SEED_SD * rng.normal(size=len(x))
        fit = OptimaFit.of(names, x, losses)
        dense, other = fit.optimum("0"), fit.optimum("1")
        if dense.status.has_number and other.status.has_number:
            low, high = fit.estimate(other.weights - dense.weights).interval
            held.append(low <= truth <= high)
    assert len(held) > 0.95 * REPEATS
    assert 0.90 <= np.mean(held) <= 0.98
