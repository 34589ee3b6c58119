"""Tables of forecasts: as they were made, and beside the values observed later."""

from collections.abc import Iterable, Mapping
from typing import Any

from peerscale.figures.markdown import section, table, with_interval
from peerscale.figures.style import label
from peerscale.plan.cell_names import budget_name
from peerscale.records.study import is_dense
from peerscale.stats.forecasts import inside, observed

TITLES = {
    "loss": ("loss at the compute optimum", "{:.3f}"),
    "difference": ("difference to dense", "{:+.3f}"),
    "multiplier": ("compute multiplier", "{:.2f}"),
}
"""Title of each quantity, and the format of its numbers."""


def forecast_table(made: Mapping[str, Any]) -> list[str]:
    """A forecast as it was made: one row per method; below, what it was made from and what its intervals include."""
    none = {True: "reference", False: "—"}
    rows = {
        name: {"method": label(name), **{f"{title} [95 %]": none[is_dense(name)] for title, _ in TITLES.values()}}
        for name in dict.fromkeys(one["method"] for one in made["forecasts"])
    }
    for one in made["forecasts"]:
        rows[one["method"]][f"{TITLES[one['quantity']][0]} [95 %]"] = _number(one, one["quantity"])
    return [f"Forecast for {budget_name(made['budget'])} FLOPs", "", *table(rows.values()), "", _about(made)]


def forecast_sections(forecasts: Iterable[Mapping[str, Any]], fits: Mapping[str, Any]) -> list[str]:
    """Each forecast beside the observed values, in one section; nothing for a budget that has no optimum yet."""
    rows, about = [], []
    for made in forecasts:
        pairs = observed(made, fits)
        if all(seen is None for _, seen in pairs):
            continue
        about.append(_about(made))
        for one, seen in pairs:
            rows.append({
                "budget": budget_name(made["budget"]), "method": label(one["method"]),
                "quantity": TITLES[one["quantity"]][0], "forecast [95 %]": _number(one, one["quantity"]),
                "observed [95 %]": _number(seen._asdict(), one["quantity"]) if seen else "—",
                "observed value inside the forecast's interval": inside(one, seen) if seen else "—",
            })  # fmt: skip
    errors = "Within both errors: forecast and observation are no further apart than their intervals together allow."
    return section("Forecast", rows, *about, errors)


def _number(found: Mapping[str, Any], quantity: str) -> str:
    return with_interval(found["value"], (found["low"], found["high"]), TITLES[quantity][1])


def _about(made: Mapping[str, Any]) -> str:
    """When and from what a forecast was made, by which rule, and what its intervals include and leave out."""
    cells = ", ".join(f"{one['cells']} of {budget_name(one['budget'])}" for one in made["from"])
    *first, last = made["leaves_out"]
    return (
        f"Made {made['made']} at commit {made['commit'] or 'unknown'}, before any cell of "
        f"{budget_name(made['budget'])} FLOPs had finished, from {sum(one['cells'] for one in made['from'])} cells "
        f"({cells} FLOPs). Each quantity is carried along its own straight line in the logarithm of the budget: the "
        "logarithms of loss and multiplier, and the difference as it is. Intervals are Student's and hold the errors "
        "of the smaller budgets' optima, the scatter of these about the line where it is larger, and for a loss that "
        "up to half of the lowest one observed may be irreducible. They leave out "
        f"{', '.join(first)} and {last}."
    )
