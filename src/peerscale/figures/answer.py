"""The answer of a study: what its claims came to, in one line."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peerscale.figures.markdown import plus_minus
from peerscale.figures.style import in_words, label, ordered, size_label
from peerscale.plan.cell_names import budget_name
from peerscale.stats.claims import FAMILY_LEVEL
from peerscale.stats.curve import Curve

Claim = Mapping[str, Any]

LEADS = "leads"
TRAILS = "trails"
EQUALS = "equals"
UNDECIDED = "cannot be told apart from"


def answer(fits: Mapping[str, Any]) -> str:
    """A sentence for each size and curve that a claim at the largest budget is about; `No claim.` without claims."""
    claims = fits["claims"]
    largest = max((claim["budget"] for claim in claims), default=None)
    places: dict[tuple[str, Curve], list[Claim]] = {}
    for claim in claims:
        if claim["budget"] == largest:
            places.setdefault((claim["size"], claim["method"]), []).append(claim)
    return " ".join(_sentence(found, size, curve) for (size, curve), found in places.items()) or "No claim."


def outcome(claim: Claim) -> str:
    """What the method of a claim does to its rival: `LEADS`, `TRAILS`, `EQUALS` or `UNDECIDED`.

    It leads or trails if the p-value, corrected for the whole family (Holm), is below 5 %. Otherwise it equals a rival
    if the interval of the difference is within the margin that the study states.
    """
    if claim["p_holm"] is not None and claim["p_holm"] < FAMILY_LEVEL:
        return LEADS if claim["value"] < 0 else TRAILS
    return EQUALS if claim.get("equal") else UNDECIDED


def _sentence(claims: Sequence[Claim], size: str, curve: Curve) -> str:
    """`At 3e12 FLOPs PEER leads dense (−0.034 ± 0.015) and cannot be told apart from PKM (...).`"""
    by_rival = {claim["rival"]: claim for claim in claims}
    ranked = [by_rival[rival] for rival in ordered(by_rival)]
    parts = []
    for verb in (LEADS, TRAILS, EQUALS, UNDECIDED):
        if some := [f"{_rival(claim)} ({plus_minus(claim)})" for claim in ranked if outcome(claim) == verb]:
            parts.append(f"{verb} {_listed(some)}")
    where = [f"At {budget_name(claims[0]['budget'])} FLOPs", size_label(size), in_words(curve)]
    comma = "," if size or curve.settings else ""
    return f"{', '.join(filter(None, where))}{comma} {label(curve.plain)} {', and '.join(parts)}."


def _rival(claim: Claim) -> str:
    """Name of the rival, with its settings if they are not those of the method."""
    rival: Curve = claim["rival"]
    return label(rival.plain if rival.settings == claim["method"].settings else rival)


def _listed(texts: Iterable[str]) -> str:
    *first, last = texts
    return f"{', '.join(first)} and {last}" if first else last
