"""The batched Newton method against numpy's and scipy's solvers of problems with known minima."""

import numpy as np
import pytest
from scipy.optimize import lsq_linear

from peerscale.laws.solver import CHUNK, Array, Coordinates, FitStatus, Objective, Problem, diagnose, minimise, solve


class Line:
    """x . theta."""

    def __init__(self, x: Array) -> None:
        self.x = x

    def predict(self, points: Array) -> Array:
        return points @ self.x.T

    def derivatives(self, points: Array) -> tuple[Array, Array, None]:
        return self.predict(points), np.tile(self.x.T, (len(points), 1, 1)), None


class Rosenbrock:
    """1 - x, 10 (y - x^2): with losses of zero a bent valley down to (1, 1)."""

    def predict(self, points: Array) -> Array:
        x, y = points.T
        return np.stack([1 - x, 10 * (y - x**2)], axis=1)

    def derivatives(self, points: Array) -> tuple[Array, Array, None]:
        x, _ = points.T
        one, zero = np.ones_like(x), np.zeros_like(x)
        return self.predict(points), np.stack([[-one, zero], [-20 * x, 10 * one]]).transpose(2, 1, 0), None


def box(p: int, low: float = -np.inf, high: float = np.inf) -> Coordinates:
    return Coordinates(
        names=tuple("abcdef"[:p]),
        is_log=np.zeros(p, bool),
        to_raw=np.eye(p),
        lower=np.full(p, low),
        upper=np.full(p, high),
    )


def least_squares(law: Line | Rosenbrock, loss: Array, coordinates: Coordinates, starts: Array) -> Problem:
    return Problem(law=law, loss=loss, coordinates=coordinates, starts=starts, objective=Objective.MSE)


@pytest.fixture
def line() -> tuple[Line, Array]:
    rng = np.random.default_rng(0)
    return Line(rng.standard_normal((30, 3))), rng.standard_normal(30)


def test_weighted_least_squares_in_more_members_than_a_chunk(line: tuple[Line, Array]) -> None:
    law, y = line
    weights = np.random.default_rng(1).exponential(size=(2 * CHUNK + 3, 30))
    solution = minimise(least_squares(law, y, box(3), np.zeros((1, 3))), np.zeros(3), weights)
    for weight, point in zip(weights, solution.points, strict=True):
        root = np.sqrt(weight)
        expected = np.linalg.lstsq(law.x * root[:, None], y * root, rcond=None)[0]
        np.testing.assert_allclose(point, expected, atol=1e-6)
    assert not solution.failed.any() and not solution.at_bound.any()


def test_bounds_hold_and_are_reported(line: tuple[Line, Array]) -> None:
    law, y = line
    expected = lsq_linear(law.x, y, bounds=(0, 0.05))
    problem = least_squares(law, y, box(3, 0, 0.05), np.array([[0.03] * 3, [9.0] * 3]))
    solution = minimise(problem, problem.starts)
    np.testing.assert_allclose(solution.points, [expected.x] * 2, atol=1e-6)
    assert solution.at_bound.all() and solve(problem)[2] is FitStatus.AT_BOUND


def test_bent_valley_from_many_starts() -> None:
    starts = np.random.default_rng(0).uniform(-3, 3, (50, 2))
    solution = minimise(least_squares(Rosenbrock(), np.zeros(2), box(2), starts), starts)
    np.testing.assert_allclose(solution.points, np.ones((50, 2)), atol=1e-6)


def test_best_is_by_objective_and_a_bad_start_is_only_failed(line: tuple[Line, Array]) -> None:
    law, y = line
    problem = least_squares(law, y, box(3), np.array([[np.nan] * 3, [0.0] * 3]))
    solution = minimise(problem, problem.starts)
    assert solution.failed.tolist() == [True, False] and np.isinf(solution.values[0])
    point, value, status = solve(problem)
    np.testing.assert_allclose(point, np.linalg.lstsq(law.x, y, rcond=None)[0], atol=1e-6)
    assert value == pytest.approx(np.sum((law.x @ point - y) ** 2)) and status is not FitStatus.AT_BOUND


def test_status_from_the_geometry() -> None:
    rng = np.random.default_rng(0)
    jacobian, residuals = rng.standard_normal((40, 2)), 0.1 * rng.standard_normal(40)
    assert diagnose(box(2), np.array([1.0, 1.0]), residuals, jacobian) is FitStatus.CONVERGED
    # Standard errors are about .1 / sqrt(40) = .016: a coefficient of .005 is not determined.
    assert diagnose(box(2), np.array([1.0, 0.005]), residuals, jacobian) is FitStatus.NOT_IDENTIFIABLE
    doubled = np.stack([jacobian[:, 0], 2 * jacobian[:, 0]], axis=1)
    assert diagnose(box(2), np.array([1.0, 1.0]), residuals, doubled) is FitStatus.NOT_IDENTIFIABLE
    assert diagnose(box(2), np.array([1.0, 1.0]), residuals[:2], jacobian[:2]) is FitStatus.TOO_FEW_POINTS
