"""Guests, methods that a study's file does not name: compared with the study's own methods, they change nothing there.

Each guest is fitted together with the study's own methods, of which it takes the curvature and the common variances;
of that fit only what tells of the guest is kept. So neither the study's numbers nor another guest's depend on it.
"""

from collections.abc import Collection, Sequence
from typing import Any

import pandas as pd

from peerscale.records.record import Record
from peerscale.stats.comparison import compare
from peerscale.stats.curve import NAMING, finished, methods_of


def without_guests(runs: pd.DataFrame, guests: Collection[str]) -> pd.DataFrame:
    """The rows of the study's own methods; all rows if none of these has finished, as guests then compare alone."""
    own = runs[~methods_of(runs).isin(guests)]
    return runs if finished(own).empty else own


def compare_with_guests(
    runs: pd.DataFrame, records: Sequence[Record], methods: Collection[str], *, baseline: str = "dense", **options: Any
) -> dict[str, Any]:
    """`comparison.compare` of the study's own `methods`, and of each guest with them.

    Returns:
        What `compare` does, and `guests`, the names of guests, if there are any.
    """
    of_row = methods_of(runs)
    if not (guests := [method for method in of_row.unique() if method not in methods]):
        return compare(runs, records, baseline=baseline, **options)
    own = without_guests(runs, guests)
    found = compare(own, records, baseline=baseline, **options)
    for guest in guests if len(own) < len(runs) else ():
        some = {guest, baseline} - {*methods}
        _add(
            guest,
            compare(runs[of_row.isin({*methods, *some})], records, baseline=baseline, guests=some, **options),
            found,
        )
    return {**found, "guests": guests}


def _add(guest: str, compared: dict[str, Any], found: dict[str, Any]) -> None:
    """Add to the results `found` those of `compared` that tell of a guest."""
    curves = compared["curves"]

    def of_guest(some: Collection[dict[str, Any]]) -> list[dict[str, Any]]:
        return [one for one in some if any(curves[one[key]]["method"] == guest for key in NAMING if key in one)]

    entries = {entry["budget"]: entry for entry in found["budgets"]}
    for entry in compared["budgets"]:
        mine = entries.setdefault(entry["budget"], {**entry, "methods": [], "differences": []})
        for key in ("methods", "differences"):
            mine[key] += of_guest(entry[key])
    found["budgets"] = [entries[budget] for budget in sorted(entries)]
    for key in ("multipliers", "growth"):
        found[key] += of_guest(compared[key])
    found["laws"] |= {name: law for name, law in compared["laws"].items() if of_guest([law])}
    found["curves"] |= {name: curve for name, curve in curves.items() if curve["method"] == guest}
    if "errors" in found.get("rates", {}):
        found["rates"]["errors"] += of_guest(compared["rates"]["errors"])
    if beyond := of_guest(compared.get("rates", {}).get("extrapolated", ())):
        found.setdefault("rates", {}).setdefault("extrapolated", []).extend(beyond)
