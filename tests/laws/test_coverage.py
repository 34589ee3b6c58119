"""How often 95 % intervals of a difference at the optimum hold the true one, in simulated budgets."""

import numpy as np
import pytest

from peerscale.laws.optima import OptimaFit

REPEATS = 300
SEED_SD = 0.007
Z = np.linspace(5.58, 6.2, 501)
"""log10 of the sizes that are sampled, and of the grid on which the true minimum is sought."""


def loss(surface: str, z: np.ndarray, method: int) -> np.ndarray:
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
    truth = loss(surface, Z, 1).min() - loss(surface, Z, 0).min()
    counts = np.full(n_sizes, {"one": 1, "two": 2, "three": 3}.get(seeds, 1))
    if seeds == "three at one size":
        counts[n_sizes // 2] = 3
    z = np.linspace(Z[0], Z[-1], n_sizes)
    means = np.concatenate([loss(surface, z, method) for method in range(n_methods)])
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
