"""The law of the best learning rate: loss against rate at every size and budget, the batches, and the law's tables."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from peerscale.cell_names import budget_name
from peerscale.runs.study import method_names, usable
from peerscale.viz import style
from peerscale.viz.isoflop import missing_note
from peerscale.viz.markdown import number, probability, section, with_interval

Law = Mapping[str, Any]
"""`rates.law` of a study's `fits.json`."""

EXPONENTS = {"a": "width", "b": "tokens", "c": "batch"}


def optima(law: Law) -> pd.DataFrame:
    """The curves of the study that have an optimum, one a row; `held_out`: the law was not fitted to it."""
    rows = [
        {**{"batch_sequences": math.nan}, **curve["at"], **curve, "held_out": held}
        for held in (False, True) if not held or law["hold_out_given"]
        for curve in law["held_out" if held else "curves"]
    ]  # fmt: skip
    return pd.DataFrame(rows)


def rate_law_figure(runs: pd.DataFrame, law: Law, *, note: str = "") -> Figure:
    """A panel a budget and width: loss against rate, with the parabolas of the fit and, as ticks, the law's rates."""
    curves = optima(law)
    usual = curves["batch_sequences"].mode().iloc[0] if curves["batch_sequences"].notna().any() else None
    curves = curves[(curves["batch_sequences"] == usual) | (usual is None)].sort_values("n")
    curves = curves.drop_duplicates(["name", "budget", "d_model"], keep="last")  # of several seeds that with most rates
    tried = runs.assign(name=names(runs), table_lr=runs["table_lr"].fillna(0.0))[usable(runs)]
    colours, corners = style.colours(curves["name"]), sorted({*zip(curves["budget"], curves["d_model"], strict=True)})
    with style.applied():
        figure, panels = style.panels(len(corners))
        for axes, (budget, width) in zip(panels, corners, strict=True):
            here = curves[(curves["budget"] == budget) & (curves["d_model"] == width)]
            for curve in here.to_dict("records"):
                keys = ["name", "budget", "d_model", "table_lr", "seed", *(["batch_sequences"] if usual else [])]
                points = tried[(tried[keys] == pd.Series(curve)[keys]).all(axis=1)].sort_values("lr")
                colour, held = colours[curve["name"]], curve["held_out"]
                look = {"color": colour, "markersize": 3.5, "markerfacecolor": "white" if held else colour}
                axes.plot(points["lr"], points["val_loss"], "o", label=curve["name"], **look)
                x = np.geomspace(points["lr"].min(), points["lr"].max(), 100)
                y = curve["lowest"] + law["curvature"] * np.log(x / curve["best"]) ** 2
                axes.plot(x, y, color=colour, linewidth=0.9, label=f"_parabola {curve['name']}")
                chosen = curve["lowest"] + law["curvature"] * math.log(curve["predicted"] / curve["best"]) ** 2
                axes.plot([curve["predicted"]], [chosen], "|", color=colour, markersize=11, markeredgewidth=1.6,
                          label=f"_law {curve['name']}")  # fmt: skip
            held = " (held out)" if here["held_out"].any() else ""
            axes.set(title=f"{style.budget_title(budget)}, d_model {width:g}{held}", xlabel="peak learning rate")
            axes.set_xscale("log")
            style.log_axis(axes.xaxis, *axes.get_xlim())
        panels[0].set_ylabel("loss (nats per token)")
        style.method_legend(figure, style.ordered(curves["name"]))
        batch = f"{usual:g} sequences a batch" if usual else ""
        what = "lines: parabolas in ln rate with one curvature; ticks: the rates of the law; hollow: held out"
        style.caption(figure, note, batch, what, missing_note(runs))
    return figure


def names(runs: pd.DataFrame) -> pd.Series:
    """The names under which the law knows the methods."""
    return method_names(runs, without=("optim.lr", "optim.table_lr", "batch_sequences"))


def rate_law_sections(runs: pd.DataFrame, law: Law) -> list[str]:
    """The law's coefficients, the optimum of every curve, batches and table rates."""
    first = next(iter(law["groups"].values()))
    at = ", ".join(f"{name} {first[f'{name}_0']:g}" for name in law["fitted"])
    head, methods = f"m, the best rate at {at} [95 %]", law["groups"].items()
    ms = [
        {"method": style.label(name), head: with_interval(one["m"], one["ci"]["m"], "{:.3g}")} for name, one in methods
    ]
    shared = [
        {"exponent": f"{key} ({EXPONENTS[key]})", "of all methods [95 %]": with_interval(first[key], ci, "{:.2f}"),
         **{style.label(name): number(one["own"][key], "{:.2f}") for name, one in methods if "own" in one}}
        for key, ci in first["ci"].items() if key != "m"
    ]  # fmt: skip
    test = law["equal_exponents"]
    equal = f" Equal exponents: p = {probability(test['p'])}." if test else ""
    fitted = ", ".join(f"{name} {low:.3g} to {high:.3g}" for name, (low, high) in law["fitted"].items())
    judged = ""
    if law["held_out_cost"] is not None:
        off = number(math.exp(law["held_out_error"]))
        judged = f" On {len(law['held_out'])} curves that it was not fitted to its rates are off by a factor of {off} "
        judged += f"(root mean square), which costs {law['held_out_cost']:.4f} nats on average."
    lines = section(
        "The law",
        ms,
        "best rate = m (width / width₀)^−a (tokens / tokens₀)^−b (batch / batch₀)^c, where the loss of a curve is its "
        f"lowest + {law['curvature']:.3f} (ln rate − ln best rate)². {law['n']} runs on {law['n_curves']} curves "
        f"scatter by {law['scatter']:.4f} nats about it. Fitted over {fitted}.{judged}",
    )
    lines += section("Its exponents", shared, f"On the right each method's own.{equal}" if equal else "")
    found = optima(law)
    lines += section(
        "Batches", batches(found), "Loss at the best rate of each batch, the mean of as many seeds as in brackets."
    )
    lines += section("Rates of the tables", table_rates(runs), "Losses at one and the same rate of all other weights.")
    curves = [
        {**place(one["budget"], one["d_model"], one["name"]), "batch": number(one["batch_sequences"], "{:g}"),
         "seed": f"{one['seed']}", "runs": f"{one['n']}",
         "best rate": f"{one['best']:.3g}", "loss there": f"{one['lowest']:.4f}",
         "the law's": f"{one['predicted']:.3g}", "which costs": f"{one['cost']:.4f}" + " (held out)" * one["held_out"]}
        for one in found.to_dict("records")
    ]  # fmt: skip
    return lines + section("Every curve", curves, *(f"- {warning}" for warning in law["warnings"]))


def place(budget: float, width: float, name: str) -> dict[str, str]:
    """The first columns of a table of models."""
    return {"budget": budget_name(budget), "width": f"{width:g}", "method": style.label(name)}


def batches(curves: pd.DataFrame) -> list[dict[str, str]]:
    """A row a model that was trained with several batches: the lowest loss of each, the mean over seeds."""
    model = ["budget", "d_model", "name"]
    several = curves[curves.groupby(model)["batch_sequences"].transform("nunique") > 1]
    lowest = several.groupby([*model, "batch_sequences"], sort=False)["lowest"].agg(["mean", "size"])
    sizes = sorted(several["batch_sequences"].unique())
    shown = {key: f"{mean:.4f} ({n})" for key, mean, n in lowest.itertuples()}
    return [
        {**place(*key), **{f"batch {batch:g}": shown.get((*key, batch), "—") for batch in sizes}}
        for key in dict.fromkeys(key[:3] for key in shown)
    ]


def table_rates(runs: pd.DataFrame) -> list[dict[str, str]]:
    """A row a model and rate of which several table rates were tried."""
    tried = runs.assign(name=names(runs))[usable(runs) & (runs["table_lr"].fillna(0) > 0)]
    same = ["budget", "d_model", "name", "lr", "batch_sequences"]
    tried = tried[tried.groupby(same)["table_lr"].transform("nunique") > 1]
    losses = tried.pivot_table(index=same, columns="table_lr", values="val_loss", sort=False).sort_index(axis=1)
    return [
        {**place(*model[:3]), **{f"{rate:g}": number(loss, "{:.4f}") for rate, loss in zip(losses, row, strict=True)}}
        for model, *row in losses.itertuples()
    ]
