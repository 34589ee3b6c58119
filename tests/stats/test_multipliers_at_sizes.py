"""Multipliers of a method with two sizes, whose losses lie a tenth of a nat below the baseline's curve."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from peerscale.stats.curve import Curve
from peerscale.stats.multipliers_at_sizes import multipliers_at_single_sizes
from toy_study import fits_with_curves

LOWEST = {1e12: 5.0, 1e13: 4.5}
"""The baseline's losses at the optimum, at a million FLOPs per token."""
BELOW, HALF = 0.1, 0.02
SIZES = {"d48": 5e5, "d64": 1.1e6, "d512": 9e6}
"""The method's FLOPs per token; the baseline has a fifth less. Its curve ends at two million."""


def curve(budget: float, flops_per_token: float) -> float:
    return LOWEST[budget] + 0.9 * (math.log10(flops_per_token) - 6) ** 2


def study() -> tuple[pd.DataFrame, dict[str, Any]]:
    runs = pd.DataFrame([
        {"budget": budget, "size": size, "curve": Curve(method), "flops_per_token": at}
        for budget in LOWEST for size, own in SIZES.items() for method, at in (("moe", own), ("dense", 0.8 * own))
    ])  # fmt: skip
    entries = []
    for budget, lowest in LOWEST.items():
        dense = {"name": "dense", "status": "ok", "loss": lowest, "sizes": [3e5, 2e6],
                 "coefficients": [lowest + 0.9 * 36, -0.9 * 12, 0.9]}  # fmt: skip
        differences = []
        for size, own in SIZES.items():
            less = curve(budget, own) - BELOW - curve(budget, 0.8 * own)
            less += size == "d512"  # is outside the baseline's curve, and would count
            ends = {"value": less, "low": less - HALF, "high": less + HALF}
            differences.append({"method": "moe", "reference": "dense", "size": size, **ends})
        entries.append({"budget": budget, "methods": [dense], "differences": differences})
    return runs, fits_with_curves({"budgets": entries, "multipliers": []})


def between(loss: float, losses: list[float]) -> float:
    """The compute at which a line in the logarithms of compute and loss has this loss."""
    return math.exp(np.interp(-math.log(loss), -np.log(losses), np.log([*LOWEST])))


def test_they_are_those_of_a_frontier_so_far_below_the_baselines() -> None:
    first, second = multipliers_at_single_sizes(*study())
    dense = [*LOWEST.values()]
    for key, below in (("multiplier", BELOW), ("low", BELOW - HALF), ("high", BELOW + HALF)):
        assert first[key] == pytest.approx(between(5.0 - below, dense) / 1e12)
        assert second[key] == pytest.approx(1e13 / between(4.5, [5.0 - BELOW, 4.5 - below]))
    assert (first["method"], first["reference"], second["budget"]) == (Curve("moe"), Curve("dense"), 1e13)


def test_a_method_with_an_optimum_and_variants_are_left_out() -> None:
    runs, fits = study()
    fits["budgets"][0]["methods"].append({"name": Curve("moe")})
    assert multipliers_at_single_sizes(runs, fits) == []
    variant = runs.assign(curve=runs["curve"].replace(Curve("moe"), Curve.of("moe", {"ffn.n_experts": 8})))
    assert multipliers_at_single_sizes(variant, study()[1]) == []
