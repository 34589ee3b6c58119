"""The law of the best learning rate: loss against rate at every size and budget, and tables of the law and batches."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from peerscale.figures import style
from peerscale.figures.markdown import number, probability, section, with_interval
from peerscale.plan.cell_names import budget_name
from peerscale.stats.curve import Curve
from peerscale.stats.rate_parabolas import within_reach
from peerscale.stats.rates import as_configuration, curves_of_law
from peerscale.stats.seeds import pooled_scatter

Law = Mapping[str, Any]
"""`rates.law` of a study's `fits.json`."""

EXPONENTS = {"a": "width", "b": "tokens", "c": "batch"}

USED = {"own": "each method's own", "shared": "those of all methods"}

CURVE = ["name", "budget", "d_model", "table_lr", "seed"]
"""Columns that distinguish the curves of one batch size."""

LEFT_OUT = "#c8c8c8"
"""Inside of the points to which the law is not fitted."""


def optima(law: Law) -> pd.DataFrame:
    """The curves of the study that have an optimum, one per row; `held_out`: the law was not fitted to the curve."""
    rows = [
        {**{"batch_sequences": math.nan}, **curve["at"], **curve, "held_out": held}
        for held in (False, True) if not held or law["hold_out_given"]
        for curve in law["held_out" if held else "curves"]
    ]  # fmt: skip
    return pd.DataFrame(rows)


@style.applied()
def rate_law_figure(done: pd.DataFrame, law: Law | None) -> Figure:
    """One panel per budget and width: loss against rate, with the fitted parabolas and, as ticks, the law's rates.

    `done` are the finished runs of the study.

    Only the losses as long as the finished cells do not determine a law, joined by dotted lines. Points of curves that
    are held out are hollow, and points to which the law is not fitted are grey.
    """
    tried = done.assign(name=curves_of_law(done), table_lr=done["table_lr"].fillna(0.0))
    usual = tried["batch_sequences"].mode().iloc[0]
    tried = tried[tried["batch_sequences"] == usual]
    fitted = optima(law) if law else pd.DataFrame(columns=["batch_sequences", *CURVE])
    fitted = fitted[fitted["batch_sequences"].isna() | (fitted["batch_sequences"] == usual)]
    colours, corners = style.colours(tried["name"]), sorted({*zip(tried["budget"], tried["d_model"], strict=True)})
    figure, panels = style.panels(len(corners))
    for axes, (budget, width) in zip(panels, corners, strict=True):
        here = tried[(tried["budget"] == budget) & (tried["d_model"] == width)]
        title = f"{style.budget_title(budget)}, d_model {width:g}"
        for method in style.ordered(here["name"]):
            curves = here[here["name"] == method].groupby(["table_lr", "seed"])
            points = max((rows for _, rows in curves), key=lambda rows: rows["lr"].nunique()).sort_values("lr")
            found = fitted[(fitted[CURVE] == points.iloc[0][CURVE]).all(axis=1)].to_dict("records")
            curve = found[0] if found and law else None
            if curve and curve["held_out"] and "held" not in title:
                title += " (held out)"
            draw_curve(axes, points, curve, law["curvature"] if law else 0.0, str(method), colours[method])
        axes.set(title=title, xlabel="peak learning rate", xscale="log")
        style.log_axis(axes.xaxis, *axes.get_xlim())
    style.label_left(panels, "loss (nats per token)")
    style.method_legend(figure, style.ordered(tried["name"]))
    return figure


def draw_curve(axes: Axes, points: pd.DataFrame, curve: Mapping[str, Any] | None, k: float, name: str, colour: str):
    """Draw the losses of one model by rate and, if the law has its curve, the parabola of curvature `k`."""
    rates = np.log(points["lr"])
    within = within_reach(rates, rates[points["val_loss"].idxmin()]) | (curve is None)
    look = {"color": colour, "markersize": 3.5, "linewidth": 0.7}
    face = "white" if curve and curve["held_out"] else colour
    kept, left_out = points[within], points[~within]
    axes.plot(kept["lr"], kept["val_loss"], "o" if curve else "o:", markerfacecolor=face, label=name, **look)
    if curve is None:
        return
    if len(left_out):
        marked = {"markerfacecolor": LEFT_OUT, "label": f"_left out {name}"}
        axes.plot(left_out["lr"], left_out["val_loss"], "o", **marked, **look)
    x = np.geomspace(kept["lr"].min(), kept["lr"].max(), 100)
    at = [*x, curve["predicted"]]
    *y, chosen = curve["lowest"] + k * np.log(np.array(at) / curve["best"]) ** 2
    axes.plot(x, y, color=colour, linewidth=0.9, label=f"_parabola {name}")
    tick = {"color": colour, "markersize": 11, "markeredgewidth": 1.6, "label": f"_law {name}"}
    axes.plot([curve["predicted"]], [chosen], "|", **tick)


def rate_law_sections(done: pd.DataFrame, law: Law) -> list[str]:
    """Sections on the law's coefficients, the optimum of every curve, batches and table rates."""
    shared = next(iter(law["groups"].values()))["shared"]
    at = ", ".join(f"{name} {shared[f'{name}_0']:g}" for name in law["fitted"])
    head = f"m, the best rate at {at} [95 %]" if at else "best rate [95 %]"
    ms = [
        {"method": style.label(name), head: with_interval(one["m"], one["ci"]["m"], "{:.3g}")}
        for name, one in law["groups"].items()
    ]
    exponents = [
        {"exponent": f"{key} ({EXPONENTS[key]})", "of all methods [95 %]": with_interval(shared[key], ci, "{:.2f}"),
         **{style.label(name): with_interval(one["own"][key], one["own"]["ci"][key], "{:.2f}")
            for name, one in law["groups"].items() if "own" in one}}
        for key, ci in shared["ci"].items() if key != "m"
    ]  # fmt: skip
    fit = [{
        "runs": f"{law['n']}", "curves": f"{law['n_curves']}",
        **{name: f"{low:.3g} to {high:.3g}" for name, (low, high) in law["fitted"].items()},
        "nats per (ln rate)²": number(law["curvature"], "{:.3f}"), "scatter, nats": number(law["scatter"], "{:.4f}"),
        "p of equal exponents": probability((law["equal_exponents"] or {}).get("p")),
        "curves held out": f"{len(law['held_out'])}", "their rates off by a factor of": _factor(law["held_out_error"]),
        "which costs, nats": number(law["held_out_cost"], "{:.4f}"),
    }]  # fmt: skip
    found = optima(law)
    curves = [
        {**place(one["budget"], one["d_model"], one["name"]), "batch": number(one["batch_sequences"], "{:g}"),
         "seed": f"{one['seed']}", "runs": f"{one['n']}",
         "best rate": f"{one['best']:.3g}", "loss there": f"{one['lowest']:.4f}",
         "the law's": f"{one['predicted']:.3g}", "which costs": f"{one['cost']:.4f}" + " (held out)" * one["held_out"]}
        for one in found.to_dict("records")
    ]  # fmt: skip
    rule = "Best rate = m (width / width₀)^−a (tokens / tokens₀)^−b (batch / batch₀)^c."
    lines = [
        *section("The law", ms, rule * bool(at)),
        *section("Its exponents", exponents, f"The law has {USED[law['exponents']]}."),
        *section("Its fit", fit),
        *section("Batches", batches(found), "Loss at the best rate of each (seeds); differences ± s.e. by seeds."),
        *section("Rates of the tables", table_rates(done), "Losses at one and the same rate of all other weights."),
        *section("Every curve", curves, *(f"- {warning}" for warning in law["warnings"])),
    ]
    if not {"width", "tokens"} <= law["fitted"].keys():
        return lines
    settings = yaml.safe_dump(as_configuration(law, done), sort_keys=False, default_flow_style=None, width=120)
    return [*lines, "## As configuration", "", "```yaml", *settings.splitlines(), "```", ""]


def _factor(error: float | None) -> str:
    return number(None if error is None else math.exp(error))


def place(budget: float, width: float, curve: Curve) -> dict[str, str]:
    """The first columns of a table of models."""
    return {"budget": budget_name(budget), "width": f"{width:g}", "method": style.label(curve)}


def batches(curves: pd.DataFrame) -> list[dict[str, str]]:
    """A row a model that was trained with several batches: the lowest loss of each, the mean over seeds.

    Beside it the difference to the usual batch and its standard error: the seeds' differences scatter with a variance
    that is pooled over the methods and batches of one budget and width.
    """
    model = ["budget", "d_model", "name"]
    several = curves[curves.groupby(model)["batch_sequences"].transform("nunique") > 1]
    if several.empty:
        return []
    compared = curves["batch_sequences"].isin(several["batch_sequences"])
    usual = curves.loc[compared, "batch_sequences"].mode().iloc[0]
    losses = several.pivot_table(
        index=[*model, "seed"], columns="batch_sequences", values="lowest", aggfunc="min", sort=False
    )
    losses = losses.sort_index(axis=1)
    less = losses.drop(columns=usual).sub(losses[usual], axis=0)
    each = less.stack().dropna()
    scatter = {corner: pooled_scatter(these, [*model, "batch_sequences"])[0]
               for corner, these in each.groupby(["budget", "d_model"])}  # fmt: skip
    rows = []
    for key, seeds in losses.groupby(model, sort=False):
        row = place(*key)
        for batch, each in seeds.items():
            row[f"batch {batch:g}"] = f"{each.mean():.4f} ({n})" if (n := each.count()) else "—"
        for batch, each in less.loc[key].items():
            error = scatter[key[:2]] / math.sqrt(n) if (n := each.count()) else math.nan
            difference = f"{number(each.mean(), '{:+.4f}')} ± {number(error, '{:.4f}')}"
            row[f"{batch:g} less {usual:g}"] = difference if n else "—"
        rows.append(row)
    return rows


def table_rates(done: pd.DataFrame) -> list[dict[str, str]]:
    """One row per model and rate with which several table rates were tried."""
    tried = done.assign(name=curves_of_law(done))[done["table_lr"].fillna(0) > 0]
    same = ["budget", "d_model", "name", "lr", "batch_sequences"]
    tried = tried[tried.groupby(same)["table_lr"].transform("nunique") > 1]
    losses = tried.pivot_table(index=same, columns="table_lr", values="val_loss", sort=False).sort_index(axis=1)
    return [
        {**place(*model[:3]), **{f"{rate:g}": number(loss, "{:.4f}") for rate, loss in zip(losses, row, strict=True)}}
        for model, *row in losses.itertuples()
    ]


def table_law_section(fits: Mapping[str, Any]) -> list[str]:
    """The best table rates by their law in tokens; empty for a study that determines none."""
    found = fits["rates"].get("tables")
    if not found:
        return []
    law = found["law"]
    rows = [
        {"budget": budget_name(one["budget"]), "method": style.label(one["method"]),
         "lowest mean loss at": f"{one['tried']:g}" + " (edge)" * one["edge"],
         "best by the law": f"{one['best']:.2g}", "gain over the usual rate": number(one["gain"], "{:.4f}")}
        for one in found["budgets"]
    ]  # fmt: skip
    one = next(iter(law["groups"].values()))["shared"]
    return section(
        "The best table rate", rows,
        f"It falls as tokens^−e, e = {with_interval(one['b'], one['ci']['b'], '{:.2f}')} of all methods; p of equal "
        f"exponents {probability((law['equal_exponents'] or {}).get('p'))}; {number(law['curvature'], '{:.4f}')} ± "
        f"{number(law['curvature_se'], '{:.4f}')} nats per (ln rate)²; scatter {number(law['scatter'], '{:.4f}')} nats "
        f"({law['df']} degrees of freedom).",
    )  # fmt: skip


def finished_cells(done: pd.DataFrame, n_cells: int) -> list[str]:
    """The losses so far, of a study of `n_cells` whose law is not determined yet."""
    done = done.assign(name=curves_of_law(done)).sort_values(["budget", "d_model", "name", "lr"])
    rows = [
        {**place(one["budget"], one["d_model"], one["name"]), "batch": f"{one['batch_sequences']:g}",
         "seed": f"{one['seed']}", "learning rate": f"{one['lr']:.3g}",
         "rate of the tables": number(one["table_lr"], "{:g}"), "loss": f"{one['val_loss']:.4f}"}
        for one in done.to_dict("records")
    ]  # fmt: skip
    finished = f"{len(done)} of {n_cells} cells, which do not determine a law of the best rate."
    return section("Finished cells", rows, finished)
