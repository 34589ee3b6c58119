"""Linear regression, the one that all statistics and laws here are made of.

Optima, learning rates, trends and power laws are all linear in their coefficients; each of them only adds its design
matrix and what it knows of the errors of its points.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from scipy.linalg import pinv
from scipy.stats import f as fisher
from scipy.stats import t as student

Array = np.ndarray

LEVEL = 0.95
"""Confidence level of all intervals."""
DETECTABLE = 2.8
"""A true difference of so many standard errors is significant at 5 % in four of five studies."""
CUTOFF = 1e-10
"""Share of a design's largest singular value below which a direction counts as not determined."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentValue:
    """A number whose standard error is an estimate."""

    value: float
    se: float
    """Standard error from all known sources."""
    df: float
    """Degrees of freedom of `se`."""

    @property
    def interval(self) -> tuple[float, float]:
        """Student's 95 % interval."""
        half = float(student.ppf((1 + LEVEL) / 2, self.df)) * self.se
        return self.value - half, self.value + half

    @property
    def p(self) -> float:
        """Two-sided p-value: the probability of a value at least this far from zero if the true value is zero."""
        return float(2 * student.sf(abs(self.value) / self.se, self.df)) if self.se > 0 else math.nan


@dataclass(frozen=True, kw_only=True)
class LinearFit:
    """values = design @ coefficients, by least squares; coefficients that are not determined are as small as possible.

    All results but `coefficients_of` belong to `values`; errors come from the scatter about the fit.
    """

    design: Array
    """(points, coefficients)."""
    values: Array
    """(points,)."""
    weights: Array | None = None
    """(points,), such as 1 / variance; None: all points have the same variance."""
    groups: Array | None = None
    """(points,), labels; the points of a group share a level of their own, beside the coefficients. None: no levels."""
    instruments: Array | None = None
    """(points, coefficients), to which the residuals are orthogonal, without weights and groups; None: `design`. A zero
    in the place of a number of `design` keeps a point from moving a coefficient that it is explained with."""

    @cached_property
    def solution(self) -> Array:
        """Matrix (coefficients, points) from values to coefficients."""
        if self.instruments is not None:
            return pinv(self.instruments.T @ self.design, rtol=CUTOFF) @ self.instruments.T
        return self._pseudo_inverse[0] * self._root

    @cached_property
    def coefficients(self) -> Array:
        """(coefficients,)."""
        return self.solution @ self.values

    def coefficients_of(self, draws: Array) -> Array:
        """Coefficients (..., coefficients) of other values (..., points) at the same points."""
        return draws @ self.solution.T

    @cached_property
    def determined(self) -> bool:
        """Whether the points determine every coefficient."""
        return self._pseudo_inverse[1] == self.design.shape[1]

    @cached_property
    def residuals(self) -> Array:
        """(points,)."""
        return self._without_levels(self.values - self.design @ self.coefficients)

    @cached_property
    def leverage(self) -> Array:
        """How far each point's value moves its own fitted value (points,), without the levels of groups."""
        return np.einsum("pc,cp->p", self._without_levels(self.design), self.solution)

    @cached_property
    def rss(self) -> float:
        """Weighted sum of the squared residuals."""
        return float(np.sum((self._root * self.residuals) ** 2))

    @cached_property
    def df(self) -> int:
        """Degrees of freedom of the residuals."""
        return len(self.values) - self._pseudo_inverse[1] - (0 if self.groups is None else len(np.unique(self.groups)))

    @property
    def scatter(self) -> float:
        """Standard deviation of a point of weight 1 about the fit; NaN without degrees of freedom."""
        return math.sqrt(self.rss / self.df) if self.df > 0 else math.nan

    @cached_property
    def inverse(self) -> Array:
        """Covariance of the coefficients if the variances are 1 / `weights`; without weights, if they are 1."""
        return self._pseudo_inverse[0] @ self._pseudo_inverse[0].T

    @property
    def covariance(self) -> Array:
        """Covariance of the coefficients from the scatter; NaN without degrees of freedom."""
        return self.inverse * self.scatter**2

    def estimate(self, combination: Array) -> StudentValue:
        """The linear combination (coefficients,) of the coefficients, with its error from the scatter."""
        variance = float(combination @ self.covariance @ combination)
        return StudentValue(value=float(combination @ self.coefficients), se=math.sqrt(variance), df=self.df)

    def ratio(self, above: Array, below: Array) -> tuple[float, tuple[float, float]]:
        """The ratio of two combinations (coefficients,), with Fieller's 95 % interval (1954).

        The minimum of a + b z + c z^2, say, is that of (0, -1, 0) and (0, 0, 2). The interval is infinite if `below`
        cannot be told from zero.
        """
        u, v = float(above @ self.coefficients), float(below @ self.coefficients)
        both = np.stack([above, below])
        (uu, uv), (_, vv) = (both @ self.covariance @ both.T).tolist()
        t = float(student.ppf((1 + LEVEL) / 2, self.df)) ** 2 if self.df > 0 else math.nan
        quadratic, linear, constant = v * v - t * vv, u * v - t * uv, u * u - t * uu
        if not quadratic > 0:
            return u / v, (-math.inf, math.inf)
        half = math.sqrt(max(linear * linear - quadratic * constant, 0.0))  # negative only through rounding
        return u / v, ((linear - half) / quadratic, (linear + half) / quadratic)

    def f_test(self, restricted: Self) -> dict[str, Any] | None:
        """F test of a restricted model of the same values: `f`, its degrees of freedom `df`, and `p`.

        None if the models are the same, or if this one leaves no degrees of freedom.
        """
        constraints = restricted.df - self.df
        if not (constraints and self.df):
            return None
        f = (restricted.rss - self.rss) / constraints / (self.rss / self.df)
        return {"f": f, "df": (constraints, self.df), "p": float(fisher.sf(f, constraints, self.df))}

    @cached_property
    def _root(self) -> Array:
        """Square roots of the weights (points,)."""
        return np.ones(len(self.design)) if self.weights is None else np.sqrt(self.weights)

    @cached_property
    def _pseudo_inverse(self) -> tuple[Array, int]:
        """That of the weighted design without levels, (coefficients, points), and its rank."""
        weighted = self._root[:, None] * self._without_levels(self.design)
        found: Any = pinv(weighted, rtol=CUTOFF, return_rank=True)
        return found

    def _without_levels(self, columns: Array) -> Array:
        """Columns (points, ...) minus their weighted mean over each group, which leaves out the groups' levels."""
        if self.groups is None:
            return columns
        names, of_point = np.unique(self.groups, return_inverse=True)
        shares = (np.arange(len(names))[:, None] == of_point) * self._root**2
        return columns - (shares / shares.sum(axis=1, keepdims=True) @ columns)[of_point]
