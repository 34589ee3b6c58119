"""Variances of methods, each shrunk towards the others (`stats.noise`), by bisection and in plain Python."""

from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

from peerscale.stats.noise import PRIOR_DF


def bisected(excess: Callable[[float], float], low: float, high: float) -> float:
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return low


def own_variances(groups: Sequence[np.ndarray]) -> list[tuple[float, float]]:
    """Variance and degrees of freedom of each group of values, as the docstring of `stats.noise` has them."""
    df = [len(group) - 1 for group in groups]
    own = [float(((group - group.mean()) ** 2).sum()) for group in groups]
    prior = [1 / (1 / PRIOR_DF + 1 / (sum(df) - mine)) for mine in df]

    def told(mean_square: float, common: float, mine: float, prior: float) -> float:
        """A mean square over the common variance, divided by the multiple that shrinkage gives the method."""
        return mean_square / common / ((prior + mine * mean_square / common) / (prior + mine))

    usual = [
        stats.chi2(mine).expect(lambda square, mine=mine, prior=p: told(square / mine, 1, mine, prior))
        for mine, p in zip(df, prior, strict=True)
    ]
    common = bisected(
        lambda v: sum(m * (told(s / m, v, m, p) - u) for s, m, p, u in zip(own, df, prior, usual, strict=True)),
        1e-9,
        10,
    )
    return [((p * common + s) / (p + m), p + m) for s, m, p in zip(own, df, prior, strict=True)]
