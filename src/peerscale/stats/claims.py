"""The claims of a study: a family of comparisons under Holm's correction."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from peerscale.config.study import ClaimsConfig
from peerscale.stats.curves_of_runs import same_variant
from peerscale.stats.optima import holm

FAMILY_LEVEL = 0.05
"""Probability that any claim in the family is wrong."""


def claims_of(
    budgets: Sequence[Mapping[str, Any]], claims: ClaimsConfig | None, curves: Collection[float]
) -> list[dict[str, Any]]:
    """The comparisons of the family, each as method minus rival, with Holm's correction.

    If a study names no family, it is PEER against every other method where there are curves. If it names one, variants
    along an axis belong to it only if the method has no other curve. The
    correction, for `family` comparisons, then also counts those that have no result yet. At the budgets `curves` the
    methods are compared at their optima, so that no single size decides while the others are still to run.
    """
    method = claims.method if claims else "peer"
    compared = {found[key] for entry in budgets for found in entry["differences"] for key in ("method", "reference")}
    as_configured = claims is not None and method in compared
    family: dict[tuple[Any, ...], dict[str, Any]] = {}
    for entry in budgets:
        if claims is None and entry["budget"] not in curves:
            continue
        if claims and claims.budgets and entry["budget"] not in claims.budgets:
            continue
        for found in entry["differences"]:
            # No claim from an error without misfit and seeds, or from a single size where there are curves.
            if found.get("fit_se") is None and (found.get("seeds_se") is None or entry["budget"] in curves):
                continue
            for one in (found, turned(found)):
                name, rival = (one[key].partition(" ")[0] for key in ("method", "reference"))
                if as_configured and one["method"] != method:
                    continue
                if same_variant(rival, one["method"], compared) not in (None, one["reference"]):
                    continue
                if name == method != rival and (not claims or rival in claims.rivals):
                    place = {"budget": entry["budget"], "size": one["size"], "method": one["method"],
                             "rival": one["reference"]}  # fmt: skip
                    family[tuple(place.values())] = place | {
                        k: one[k] for k in ("value", "se", "df", "low", "high", "p")
                    }
    told = {(claim["budget"], claim["rival"].partition(" ")[0]) for claim in family.values()}
    named = len(claims.rivals) * len(claims.budgets or budgets) if claims else 0
    size = len(family) + max(0, named - len(told))
    corrected = holm(np.array([claim["p"] for claim in family.values()], float), size)
    found = [
        {**claim, "p_holm": p, "leads": bool(p < FAMILY_LEVEL and claim["value"] < 0), "family": size}
        for claim, p in zip(family.values(), corrected, strict=True)
    ]
    if claims and (margin := claims.equal_within) is not None:
        for claim in found:
            claim |= {"equal_within": margin, "equal": bool(-margin < claim["low"] and claim["high"] < margin)}
    return found


def turned(found: Mapping[str, Any]) -> dict[str, Any]:
    """The negative of a difference, for a claim whose method is the reference of that difference."""
    ends = {"value": -found["value"], "low": -found["high"], "high": -found["low"]}
    return {**found, "method": found["reference"], "reference": found["method"], **ends}
