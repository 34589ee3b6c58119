"""Verdicts: what a method gains or loses against another one, budget by budget, and how far that can be trusted."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from peerscale.figures.differences import to_baseline
from peerscale.figures.markdown import Rows, number, probability, signed_interval, with_interval
from peerscale.figures.style import label, size_label
from peerscale.laws.linear_fit import DETECTABLE
from peerscale.plan.cell_names import budget_name
from peerscale.stats.brackets import NOT_TUNED
from peerscale.stats.curve import Curve


def verdict_rows(fits: Mapping[str, Any], methods: Collection[str] | None = None) -> Rows:
    """One row for each method, or some, against the baseline of the fits, at each budget or size; nothing is corrected
    for their number."""
    worth = {(one["budget"], one["method"]): one for one in fits["multipliers"]}
    rows = []
    for (budget, size, curve), one in to_baseline(fits).items():
        if methods is not None and curve.method not in methods:
            continue
        pair = (curve, one["reference"])
        times = worth.get((budget, curve)) if not size else None
        compared = (f"{label(curve)} minus {label(one['reference'])}", size_label(size))
        rows.append({
            "budget": budget_name(budget), "comparison": ", ".join(filter(None, compared)),
            "difference [95 %]": signed_interval(one), "p": probability(one.get("p")),
            "compute multiplier [95 %]":
                with_interval(times["multiplier"], (times["low"], times["high"]), "{:.2f}") if times else "—",
            "smallest effect told": number(DETECTABLE * one["se"] if one.get("se") else None, "{:.3f}"),
            "caveats": no_minimum(one.get("note", "")) or "; ".join(caveats(fits, budget, pair, one)) or "—",
        })  # fmt: skip
    return rows


def no_minimum(note: str) -> str:
    """`peer (no minimum: curvature)` for the note `peer: curvature` of a difference that has no number."""
    return re.sub(r": (\w+)", lambda status: f" (no minimum: {status[1].replace('_', ' ')})", note)


def caveats(fits: Mapping[str, Any], budget: float, pair: Collection[Curve], one: Mapping[str, Any]) -> list[str]:
    """What the interval of a difference of two curves leaves out, or knows little about."""
    rates = fits.get("rates", {})
    beyond = {(found["budget"], found["method"]) for found in rates.get("extrapolated", ())}
    known = {(found["budget"], found["method"]) for found in rates.get("errors", ()) if found["se"] is not None}
    untuned = [curve for curve in pair if not_tuned(fits, budget, curve)]
    found = ["one seed"] if one["seeds_se"] is None else []
    found += [f"{label(curve)} {NOT_TUNED}" for curve in untuned]
    if one["rate_se"] is None and not untuned:
        found.append("error of learning rates unknown")
    elif unknown := [label(curve) for curve in pair if curve not in untuned and (budget, curve) not in known]:
        found.append(f"error of the rates of {' and '.join(unknown)} unknown")
    if some := [label(curve) for curve in pair if (budget, curve) in beyond]:
        found.append(f"rates of {' and '.join(some)} extrapolated")
    return found


def not_tuned(fits: Mapping[str, Any], budget: float, curve: Curve) -> bool:
    """Whether the error of learning rates that others have at this budget does not speak for a curve."""
    errors = fits.get("rates", {}).get("errors", ())
    return any((one["budget"], one["method"], one["source"]) == (budget, curve, NOT_TUNED) for one in errors)
