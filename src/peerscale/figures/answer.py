"""The answer of a study: its claims in sentences."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from peerscale.figures.markdown import plus_minus
from peerscale.figures.style import in_words, label, ordered, size_label
from peerscale.plan.cell_names import budget_name
from peerscale.stats.claims import FAMILY_LEVEL

Claim = Mapping[str, Any]
Place = tuple[float, str, str]
"""Budget, size (only for a comparison at one size) and settings of the method's variant."""
Outcomes = dict[str, list[Claim]]
"""The claims by outcome, `leads`, `trails`, `EQUALS` or `UNDECIDED`; outcomes without claims are left out."""

LEADS = "leads"
TRAILS = "trails"
EQUALS = "equals"
UNDECIDED = "cannot be told apart from"


def answer(fits: Mapping[str, Any]) -> str:
    """The study's answer in one line, with the largest budget first; or the reason why there is none."""
    if fits.get("rates", {}).get("law"):
        return "No claim: the study tunes learning rates; its table.md has their law."
    places = _places(fits["claims"])
    if not places:
        return _no_answer(fits["budgets"])
    largest = max(budget for budget, *_ in places)
    if any(size or settings for _, size, settings in places):
        return " ".join(_sentence(place, found) for place, found in places.items() if place[0] == largest)
    method = label(fits["claims"][0]["method"])
    descending = sorted(places.items(), reverse=True)
    parts = []
    for short, group in groupby(descending, key=lambda pair: _short(pair[1])):
        at = _listed(budget_name(place[0]) for place, _ in group)
        parts.append(f"At {at} FLOPs {method} {short}" if not parts else f"at {at} it {short}")
    dense = next((c for c in fits["claims"] if c["budget"] == largest and c["rival"] == "dense"), None)
    text = f"{'; '.join(parts)}."
    return text if dense is None else f"{text} Against dense at {budget_name(largest)}: {plus_minus(dense)} nats."


def _no_answer(budgets: Sequence[Mapping[str, Any]]) -> str:
    """Why a study has no claim."""
    if not any(entry["differences"] for entry in budgets):
        return "No answer yet: no comparison of sweep.claims (by default PEER or dense with another) can be made."
    without = [entry["budget"] for entry in budgets if any(m["loss"] is None for m in entry["methods"])]
    if without and not any(found.get("value") for entry in budgets for found in entry["differences"]):
        at = _listed(map(budget_name, without))
        return f"No answer: too few methods have a minimum at {at} FLOPs (see their flags)."
    if any(found.get("fit_se") is not None for entry in budgets for found in entry["differences"]):
        return "No claim yet: no comparison of sweep.claims (by default PEER with every other method) has finished."
    return "No claim: at single sizes only what sweep.claims names is claimed, and only where errors include seeds."


def verdicts(claims: Sequence[Claim]) -> list[str]:
    """One sentence per budget and variant: which rivals the method leads, trails, or cannot be distinguished from.

    A method leads or trails if the p-value of the difference, corrected for the whole family (Holm), is below 5 %.
    Otherwise it equals a rival if the interval of the difference is within the margin that the study states.
    """
    return [_sentence(place, found) for place, found in _places(claims).items()]


def _places(claims: Sequence[Claim]) -> dict[Place, Outcomes]:
    places: dict[Place, dict[str, Claim]] = {}
    for claim in claims:
        place = (claim["budget"], claim["size"], claim["method"].partition(" ")[2])
        places.setdefault(place, {})[claim["rival"]] = claim
    return {place: _outcomes([by_rival[r] for r in ordered(by_rival)]) for place, by_rival in places.items()}


def outcome(claim: Claim) -> str:
    """`LEADS`, `TRAILS`, `EQUALS` or `UNDECIDED`: what the method of a claim does to its rival."""
    if claim["p_holm"] is not None and claim["p_holm"] < FAMILY_LEVEL:
        return LEADS if claim["value"] < 0 else TRAILS
    return EQUALS if claim.get("equal") else UNDECIDED


def _outcomes(claims: Sequence[Claim]) -> Outcomes:
    found: Outcomes = {verb: [] for verb in (LEADS, TRAILS, EQUALS, UNDECIDED)}
    for claim in claims:
        found[outcome(claim)].append(claim)
    return {verb: members for verb, members in found.items() if members}


def _sentence(place: Place, found: Outcomes) -> str:
    """`At 3e12 FLOPs PEER leads dense (−0.034 ± 0.015) and cannot be told apart from PKM (...).`"""
    budget, size, settings = place
    method = label(next(iter(found.values()))[0]["method"].partition(" ")[0])
    parts = [f"{verb} {_listed(_rival(c) + f' ({plus_minus(c)})' for c in some)}" for verb, some in found.items()]
    where = ", ".join(filter(None, (f"At {budget_name(budget)} FLOPs", size_label(size), in_words(settings))))
    return f"{where}{',' * bool(size or settings)} {method} {', and '.join(parts)}."


def _short(found: Outcomes) -> str:
    """`leads dense and PKM, and cannot be told apart from MoE (token choice)`."""
    return ", and ".join(f"{verb} {_listed(map(_rival, some))}" for verb, some in found.items())


def _rival(claim: Claim) -> str:
    """Name of the rival, with its settings if they are not those of the method."""
    rival, _, settings = claim["rival"].partition(" ")
    return label(rival if settings == claim["method"].partition(" ")[2] else claim["rival"])


def _listed(texts: Iterable[str]) -> str:
    *first, last = texts
    return f"{', '.join(first)} and {last}" if first else last
