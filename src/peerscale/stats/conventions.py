"""Rankings under other FLOP conventions: the losses of the study, with their cost counted in other ways."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from peerscale.stats.curve import Curve, at_size
from peerscale.stats.multiplier import compute_multipliers

ROUTER = ("flops_router", "flops_query", "flops_sub_keys")
"""Components that choose experts."""


def flops_by_convention(runs: pd.DataFrame) -> dict[str, pd.Series]:
    """Training FLOPs per token of every row under several conventions, from the table's columns.

    `as counted` is the study's convention. 6N counts 6 per parameter and leaves out attention scores; the embedding,
    which is tied to the output head, is counted once. A causal kernel computes half of the attention scores and values.
    Without router leaves out the FLOPs that choose the experts.
    """
    counted = runs["flops_per_token"].astype(float)
    return {
        "as counted": counted,
        "6 x active parameters": 6.0 * runs["params_active"],
        "6 x total parameters": 6.0 * runs["params_total"],
        "causal attention": counted - (runs["flops_attention_scores"] + runs["flops_attention_values"]) / 2,
        "without router": counted - runs[[column for column in ROUTER if column in runs]].sum(axis=1),
    }


def multipliers_by_convention(
    runs: pd.DataFrame, budgets: Sequence[Mapping[str, Any]], baseline: str, trend_from: float = 0.0
) -> list[dict[str, Any]]:
    """The baseline's compute over each method's for the same loss, with compute counted under each convention.

    Losses and sizes at the optimum come from the study's budgets. Their cost is the budget times the ratio of the
    convention's FLOPs to the study's, at the optimal FLOPs per token (log-linear between the trained sizes).

    Args:
        runs: the finished runs of the study, with their `curve`.
        budgets: the entries of `comparison.compare`.
        baseline: the method whose compute is divided.
        trend_from: the budgets from this one on are compared without the smaller ones.

    Returns:
        budget, method and `multipliers` by convention, None if a multiplier would be an extrapolation.
    """
    optima = {(entry["budget"], m["name"]): m for entry in budgets for m in entry["methods"] if m["loss"] is not None}
    at = np.array(sorted({budget for budget, _ in optima}))
    curves = list(dict.fromkeys(curve for _, curve in optima))
    shares = {convention: flops / runs["flops_per_token"] for convention, flops in flops_by_convention(runs).items()}

    def frontier(curve: Curve, share: pd.Series) -> tuple[np.ndarray, np.ndarray]:
        spent, losses = np.full(len(at), math.nan), np.full(len(at), math.nan)
        for i, budget in enumerate(at):
            if m := optima.get((budget, curve)):
                here = (runs["curve"] == curve) & (runs["budget"] == budget)
                spent[i], losses[i] = budget * float(at_size(share[here], runs, m["x"])), m["loss"]
        return spent, losses

    rows = []
    for curve in curves:
        reference = curve.counterpart(baseline, curves)
        if reference is None or curve.method == baseline:
            continue
        found = {
            convention: compute_multipliers(frontier(reference, share), frontier(curve, share), at >= trend_from)
            for convention, share in shares.items()
        }
        for i, budget in enumerate(at):
            if (budget, curve) in optima:
                here = {convention: multipliers[i] for convention, multipliers in found.items()}
                rows.append({"budget": float(budget), "method": curve, "multipliers": here})
    return rows
