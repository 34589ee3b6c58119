"""Rankings under other FLOP conventions: the losses of the study, with their cost counted in other ways."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from peerscale.stats.curves_of_runs import at_size, is_dense, method_names, same_variant, usable
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
    runs: pd.DataFrame, budgets: Sequence[Mapping[str, Any]], trend_from: float = 0.0
) -> list[dict[str, Any]]:
    """Dense's compute over each method's for the same loss, with compute counted under each convention.

    Losses and sizes at the optimum come from the study's budgets. Their cost is the budget times the ratio of the
    convention's FLOPs to the study's, at the optimal FLOPs per token (log-linear between the trained sizes).

    Args:
        runs: the study's table.
        budgets: the entries of `fits.json`.
        trend_from: the budgets from this one on are compared without the smaller ones.

    Returns:
        budget, method and `multipliers` by convention, None if a multiplier would be an extrapolation.
    """
    done = runs.assign(name=method_names(runs))[usable(runs)]
    optima = {(entry["budget"], m["name"]): m for entry in budgets for m in entry["methods"] if m["loss"] is not None}
    at = np.array(sorted({budget for budget, _ in optima}))
    names = list(dict.fromkeys(name for _, name in optima))
    shares = {convention: flops / done["flops_per_token"] for convention, flops in flops_by_convention(done).items()}

    def frontier(name: str, share: pd.Series) -> tuple[np.ndarray, np.ndarray]:
        found = [optima.get((budget, name)) for budget in at]
        spent = [
            budget * float(at_size(share[(done["name"] == name) & (done["budget"] == budget)], done, m["x"]))
            if m
            else math.nan
            for budget, m in zip(at, found, strict=True)
        ]
        return np.array(spent), np.array([m["loss"] if m else math.nan for m in found])

    rows = []
    for name in names:
        reference = same_variant("dense", name, names)
        if reference is None or is_dense(name):
            continue
        found = {
            convention: compute_multipliers(frontier(reference, share), frontier(name, share), at >= trend_from)
            for convention, share in shares.items()
        }
        for i, budget in enumerate(at):
            if (budget, name) in optima:
                here = {convention: multipliers[i] for convention, multipliers in found.items()}
                rows.append({"budget": float(budget), "method": name, "multipliers": here})
    return rows
