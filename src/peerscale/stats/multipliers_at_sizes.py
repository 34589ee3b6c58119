"""Compute multipliers of methods that have too few sizes for an optimum, at equal FLOPs per token."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from peerscale.stats.curve import Curve
from peerscale.stats.multiplier import compute_multipliers


def multipliers_at_single_sizes(done: pd.DataFrame, fits: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Multipliers over the baseline of every method, with its usual settings, that has an optimum at no budget.

    Its loss is taken to lie above the baseline's optimum by as much as, on average over its sizes, it lies above the
    baseline's curve at the same FLOPs per token. The intervals are those of the differences at equal size in
    `fits.json`, moved along the baseline's curve to equal FLOPs per token. Sizes outside that curve are left out.

    Args:
        done: the study's finished runs, with their `curve`.
        fits: the study's fits, from `read_fits`.

    Returns:
        method, reference, budget, multiplier, low, high as `multipliers` of `fits.json`.
    """
    baseline, budgets = Curve(fits["baseline"]), np.array([entry["budget"] for entry in fits["budgets"]])
    optima = [{m["name"]: m for m in entry["methods"]} for entry in fits["budgets"]]
    of_baseline = np.array([at.get(baseline, {}).get("loss") or math.nan for at in optima])
    without = {*done["curve"]} - {curve for at in optima for curve in at} - {baseline}
    found = []
    for curve in sorted(curve for curve in without if not curve.settings):
        values, *ends = of_baseline + np.transpose([
            _differences(curve, done[done["budget"] == entry["budget"]], entry, at.get(baseline))
            for entry, at in zip(fits["budgets"], optima, strict=True)
        ])  # fmt: skip
        # Each end of an interval is put in the place of its value, one budget at a time.
        replaced = [np.where(np.eye(len(budgets), dtype=bool), end, values) for end in ends]
        trend = budgets >= fits.get("trend_from", 0.0)
        reference = np.broadcast_to(of_baseline, replaced[0].shape)
        multipliers = compute_multipliers((budgets, of_baseline), (budgets, values), trend)
        high, low = (np.diag(compute_multipliers((budgets, reference), (budgets, one), trend)) for one in replaced)
        found += [
            {"method": curve, "reference": baseline, "budget": budget, "multiplier": multiplier, "low": a, "high": b}
            for budget, multiplier, a, b in zip(budgets, multipliers, low, high, strict=True)
            if math.isfinite(multiplier)
        ]
    return found


def _differences(
    curve: Curve, done: pd.DataFrame, entry: Mapping[str, Any], reference: Mapping[str, Any] | None
) -> tuple[float, ...]:
    """Mean over sizes of a curve's differences to the baseline at one budget, moved to equal FLOPs per token: value,
    low, high."""
    if reference is None or None in reference["coefficients"]:
        return (math.nan,) * 3
    found, sizes = [], done.groupby(["curve", "size"])["flops_per_token"].mean().to_dict()
    for one in entry["differences"]:
        if (one["method"], one["reference"]) != (curve, reference["name"]) or one.get("low") is None:
            continue
        own, others = (sizes[name, one["size"]] for name in (curve, reference["name"]))
        if reference["sizes"][0] <= own <= reference["sizes"][-1]:
            less, more = np.polynomial.polynomial.polyval(np.log10([others, own]), reference["coefficients"])
            found.append([one[key] - (more - less) for key in ("value", "low", "high")])
    return tuple(np.mean(found, axis=0)) if found else (math.nan,) * 3
