"""Figure 1 for a browser, in Vega-Lite: the isoFLOP curves with a choice of axis, methods and budgets.

`isoflop.vl.json` defines its appearance; this module adds the data. The page contains the whole library, so that it
works without a network.
"""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import vl_convert

from peerscale.figures import style
from peerscale.figures.isoflop import X_LABELS, by_budget, fitted_curve, in_fit
from peerscale.plan.cell_names import budget_name
from peerscale.stats.curves_of_runs import at_size, method_names, usable
from peerscale.stats.optima import OptimumStatus

SIZES = ("params_total", "flops_per_token", "params_active")
"""Columns that the x axis can show and to which the x of a curve, FLOPs per token, can be converted."""

AXES = {**{column: X_LABELS[column] for column in SIZES}, "wall_s": "training time (s)"}
"""All columns that the x axis can show, with their titles."""


def isoflop_html(runs: pd.DataFrame, fits: Mapping[str, Any]) -> str:
    """The figure as a part of a page: the library, the figure's data, and the element in which it appears."""
    spec = json.dumps(isoflop_spec(runs, fits), allow_nan=False).replace("</", "<\\/")
    options = '{renderer: "svg", actions: false, ast: true}'  # without eval, which the page forbids
    return f'<div id="figure-1"></div>\n<script>{_library()}vegaEmbed("#figure-1", {spec}, {options});</script>'


def isoflop_spec(runs: pd.DataFrame, fits: Mapping[str, Any]) -> dict[str, Any]:
    """The figure in Vega-Lite: one panel per budget.

    Args:
        runs: the study's table; unfinished runs are not drawn.
        fits: the study's `fits.json`.
    """
    runs = runs.assign(name=method_names(runs))[usable(runs)]
    names, budgets = style.ordered(runs["name"]), sorted(runs["budget"].unique())
    spec = json.loads(Path(__file__).with_name("isoflop.vl.json").read_text(encoding="utf-8"))
    axes = {"input": "select", "options": [*AXES], "labels": [*AXES.values()], "name": "x axis: "}
    spec["params"] = [
        {"name": "axis_labels", "value": AXES},
        {"name": "size_axis", "value": "params_total", "bind": axes},
    ]
    spec["params"] += _switches("methods_on", [style.label(name) for name in names])
    spec["params"] += _switches("budgets_on", [f"{budget_name(budget)} FLOPs" for budget in budgets])
    colours = style.colours(names)
    scale = {"domain": [style.label(name) for name in names], "range": [colours[name] for name in names]}
    spec["spec"]["encoding"]["color"]["scale"] = spec["spec"]["layer"][1]["encoding"]["fill"]["scale"] = scale
    fitted = by_budget(fits)
    spec["data"] = {"values": [row for b in budgets for row in _marks(runs[runs["budget"] == b], fitted.get(b, {}))]}
    return spec


def _switches(name: str, labels: Sequence[str]) -> list[dict[str, Any]]:
    """A check box per label, and the parameter `name`, which says for each label whether its box is ticked."""
    boxes = [
        {"name": f"{name}_{i}", "value": True, "bind": {"input": "checkbox", "name": label}}
        for i, label in enumerate(labels)
    ]
    ticked = ", ".join(f"{json.dumps(label)}: {box['name']}" for label, box in zip(labels, boxes, strict=True))
    return [*boxes, {"name": name, "expr": f"{{{ticked}}}"}]


def _marks(runs: pd.DataFrame, fitted: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Points, curves and optima of one budget; sizes that are left out of the fit and far above it are at the edge."""
    kept = pd.concat([in_fit(rows, fitted.get(str(name))) for name, rows in runs.groupby("name")])[runs.index]
    top = 1.02 * float(np.exp((runs[kept] if kept.any() else runs)["val_loss"].max()))
    runs = runs.assign(kept=kept, perplexity=np.exp(runs["val_loss"]))
    for name, rows in runs.groupby("name"):
        common = {"budget": f"{budget_name(rows['budget'].iloc[0])} FLOPs", "method": style.label(str(name))}
        for row in rows.rename(columns={"val_loss": "loss"}).to_dict("records"):
            kind = "fitted" if row["kept"] else "left out" if row["perplexity"] <= top else "above the axis"
            numbers = {key: float(row[key]) for key in ("loss", "perplexity", "flops", *AXES) if pd.notna(row.get(key))}
            yield common | numbers | {"kind": kind, "cell": row["cell"], "drawn": min(row["perplexity"], top)}
        if (found := fitted.get(str(name))) is None:
            continue
        if None not in found["coefficients"]:
            places = _places(rows, *fitted_curve(found, 60))
            yield from ({**common, "kind": "curve", **place} for place in places)
        if found["loss"] is not None:
            kind = "optimum" if found["status"] == OptimumStatus.OK else "flagged optimum"
            (place,) = _places(rows, np.array([found["x"]]), np.array([found["loss"]]))
            yield common | place | {"kind": kind, "cell": f"{kind} of {common['method']}", "loss": found["loss"]}


def _places(rows: pd.DataFrame, flops_per_token: np.ndarray, losses: np.ndarray) -> list[dict[str, float]]:
    """Positions of points of a method's curve, for each size that the x axis can show."""
    places = pd.DataFrame({column: at_size(rows[column], rows, flops_per_token) for column in SIZES})
    return places.assign(drawn=np.exp(losses)).to_dict("records")  # pyrefly: ignore


@functools.cache
def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed in one script."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")
