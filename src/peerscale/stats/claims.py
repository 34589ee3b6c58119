"""The claims of a study: a family of comparisons under Holm's correction."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from peerscale.config.study import ClaimsConfig
from peerscale.stats.optima import holm

FAMILY_LEVEL = 0.05
"""Probability that any claim in the family is wrong."""


def claims_of(
    budgets: Sequence[Mapping[str, Any]], claims: ClaimsConfig | None, curves: Collection[float]
) -> list[dict[str, Any]]:
    """The comparisons of the family, each as method minus rival, with Holm's correction.

    A study that names no family claims nothing. The method's other settings belong to the family only if it has no
    curve with the usual ones. The correction, for `family` comparisons, also counts those that have no result yet. At
    the budgets `curves` the methods are compared at their optima, so that no single size decides while the others are
    still to run.
    """
    if claims is None:
        return []
    compared = {found[key] for entry in budgets for found in entry["differences"] for key in ("method", "reference")}
    usual_only = any(curve.method == claims.method and not curve.settings for curve in compared)
    family: dict[tuple[Any, ...], dict[str, Any]] = {}
    for budget, one in _differences(budgets, curves):
        method, rival = one["method"], one["reference"]
        belongs = method.method == claims.method and rival.method in claims.rivals
        belongs = belongs and budget in (claims.budgets or [budget]) and not (usual_only and method.settings)
        if belongs and method.counterpart(rival.method, compared) in (None, rival):
            place = {"budget": budget, "size": one["size"], "method": method, "rival": rival}
            family[tuple(place.values())] = place | {k: one[k] for k in ("value", "se", "df", "low", "high", "p")}
    told = {(claim["budget"], claim["rival"].method) for claim in family.values()}
    named = len(claims.rivals) * len(claims.budgets or budgets)
    size = len(family) + max(0, named - len(told))
    corrected = holm(np.array([claim["p"] for claim in family.values()], float), size)
    found = [
        {**claim, "p_holm": p, "leads": bool(p < FAMILY_LEVEL and claim["value"] < 0), "family": size}
        for claim, p in zip(family.values(), corrected, strict=True)
    ]
    if (margin := claims.equal_within) is not None:
        for claim in found:
            claim |= {"equal_within": margin, "equal": bool(-margin < claim["low"] and claim["high"] < margin)}
    return found


def _differences(
    budgets: Sequence[Mapping[str, Any]], curves: Collection[float]
) -> Iterator[tuple[float, dict[str, Any]]]:
    """The budget of each difference that could be claimed, and the difference, once in each direction.

    Nothing is claimed from an error without misfit and seeds, or from a single size where there are curves.
    """
    for entry in budgets:
        for one in entry["differences"]:
            known = one.get("fit_se") is not None
            if known or (one.get("seeds_se") is not None and entry["budget"] not in curves):
                ends = {"value": -one["value"], "low": -one["high"], "high": -one["low"]}
                yield entry["budget"], dict(one)
                yield entry["budget"], {**one, "method": one["reference"], "reference": one["method"], **ends}
