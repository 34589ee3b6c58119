"""What a study says of its claims, in sentences."""

from collections.abc import Mapping, Sequence
from typing import Any

from peerscale.runs.comparison import FAMILY_LEVEL
from peerscale.sweeper import budget_name
from peerscale.viz.style import label, ordered
from peerscale.viz.tables import number


def answer(fits: Mapping[str, Any]) -> str:
    """The study's answer in one line, the largest budget first; what is missing if there is none."""
    sentences = verdicts(fits["claims"])
    if sentences:
        return " ".join(reversed(sentences))
    if any(entry["differences"] for entry in fits["budgets"]):
        return "No claim: no difference here has an error that holds seeds or the misfit of sizes."
    return "No answer yet: no two methods have finished cells to compare."


def verdicts(claims: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence a budget and arm: which rivals the method leads, trails, or is not told apart from.

    A lead or trail is a difference whose probability, corrected for the whole family (Holm), is below 5 %.
    """
    groups: dict[tuple[float, str, str], list[Mapping[str, Any]]] = {}
    for claim in claims:
        arm = claim["method"].partition(" ")[2]
        groups.setdefault((claim["budget"], claim["size"], arm), []).append(claim)
    lines = []
    for (budget, size, arm), found in groups.items():
        by_rival = {claim["rival"]: claim for claim in found}
        told = [by_rival[rival] for rival in ordered(by_rival)]
        leads = [c for c in told if c["p_holm"] < FAMILY_LEVEL and c["value"] < 0]
        trails = [c for c in told if c["p_holm"] < FAMILY_LEVEL and c["value"] > 0]
        open_ = [c for c in told if c not in leads and c not in trails]
        parts = [f"leads {_rivals(leads)}"] * bool(leads) + [f"trails {_rivals(trails)}"] * bool(trails)
        parts += [f"is not told apart from {_rivals(open_)}"] * bool(open_)
        where = ", ".join(filter(None, (f"At {budget_name(budget)} FLOPs", size, arm.replace("_", " "))))
        lines.append(f"{where} {label(found[0]['method'].partition(' ')[0])} {' and '.join(parts)}.")
    return lines


def _rivals(claims: Sequence[Mapping[str, Any]]) -> str:
    """`dense (by 0.030 ± 0.016 nats) and PKM (by ...)`."""
    texts = []
    for claim in claims:
        half = number((claim["high"] - claim["low"]) / 2, "{:.3f}")
        texts.append(f"{label(claim['rival'].partition(' ')[0])} ({number(claim['value'], '{:+.3f}')} ± {half})")
    return ", ".join(texts[:-1]) + (" and " if len(texts) > 1 else "") + texts[-1]
