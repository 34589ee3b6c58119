"""One HTML page of studies: each one's question and answer, its isoFLOP curves to look into, and its first table.

The page contains the libraries that draw the curves, so that it needs no network.
"""

import html
from collections.abc import Iterable, Iterator, Mapping
from string import Template
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import vl_convert

from peerscale.config.study_file import header, sweep_text
from peerscale.figures import style
from peerscale.figures.answer import answer
from peerscale.figures.isoflop import X_LABELS, fitted_curve, in_fit, optima
from peerscale.figures.study_table import compares_curves, main_rows
from peerscale.plan.cell_names import budget_name
from peerscale.records.study import StudyFolder
from peerscale.records.table import read_runs
from peerscale.stats.curve import at_size, by_budget, by_curve, finished
from peerscale.stats.fits import read_fits
from peerscale.stats.optima import OptimumStatus

PAGE = Template("""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none';
  style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>peerscale</title>
<style>
body { margin: 2rem auto; max-width: 76rem; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; }
table { border-collapse: collapse; font-size: .85rem; } th, td { padding: .2rem .7rem; text-align: left; }
td { white-space: nowrap; }
section { overflow-x: auto; }
</style>
<script>$library</script>
$sections
</html>
""")


def page(studies: Iterable[StudyFolder]) -> str:
    """The page; all text of the studies' files is shown as it is, so that it names nothing to load or to run."""
    library = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")
    return PAGE.substitute(library=library, sections="\n".join(map(_section, studies)))


def _section(study: StudyFolder) -> str:
    runs, fits = read_runs(study.runs), read_fits(study.fits)
    said = header(sweep_text(study.sweep))
    lines = [*(f"{word}: {said[word]}" for word in ("Question", "Withdrawn") if word in said), answer(fits)]
    parts = [f"<h2>{html.escape(study.sweep)}</h2>", *(f"<p>{html.escape(line)}</p>" for line in lines)]
    charted = compares_curves(fits)
    if charted:
        element = html.escape(f"figure-{study.sweep}")
        spec = isoflop_chart(finished(runs), fits).to_json(indent=None).replace("<", "\\u003c")
        options = "{renderer: 'svg', actions: false, ast: true}"  # without eval, which the page forbids
        parts += [f'<div id="{element}"></div>', f'<script>vegaEmbed("#{element}", {spec}, {options});</script>']
    table = pd.DataFrame(main_rows(runs, fits)).to_html(index=False, border=0)
    parts.append(f"<details{' open' * charted}><summary>Table</summary>{table}</details>")
    return "\n".join(["<section>", *parts, "</section>"])


def isoflop_chart(done: pd.DataFrame, fits: Mapping[str, Any]) -> alt.FacetChart:
    """Figure 1, a panel a budget, with a choice of the x axis; a click in the legend picks methods.

    Args:
        done: the study's finished runs, with their `curve`.
        fits: the study's fits, from `read_fits`.
    """
    curves, colours = style.ordered(done["curve"]), style.colours(done["curve"])
    scale = alt.Scale(domain=[style.label(curve) for curve in curves], range=[colours[curve] for curve in curves])
    options = alt.binding_select(options=[*X_LABELS], labels=[*X_LABELS.values()], name="x axis ")
    axis = alt.param("x_axis", "params_total", bind=options)
    picked = alt.selection_point("picked", fields=["method"], bind="legend")
    marks = alt.Chart(alt.Data(values=list(chart_rows(done, fits)))).transform_calculate(x="datum[x_axis]")
    logarithmic: dict[str, Any] = {"type": "log", "nice": False, "padding": 8}
    base = marks.encode(
        alt.X("x:Q", title=None).scale(**logarithmic).axis(format="~s", tickCount=5, labelSeparation=8),
        alt.Y("perplexity:Q").scale(**logarithmic).axis(tickCount=6),
        alt.Color("method:N", title=None).scale(scale),
        opacity=alt.condition(picked, alt.value(1), alt.value(0.1)),
    )
    shown = ["cell:N", "perplexity:Q", *(f"{column}:Q" for column in X_LABELS)]
    points = base.mark_point(size=40).transform_filter("datum.kind != 'curve'")
    points = points.encode(
        alt.Shape("kind:N", title=None).scale(
            domain=["fitted", "left out", "optimum", "flagged optimum"], range=["circle", "square", "triangle", "cross"]
        ),
        tooltip=shown,
    )
    lines = base.mark_line().transform_filter("datum.kind == 'curve'")
    panels = alt.layer(lines, points).properties(width=280, height=220).add_params(axis, picked)
    titles = [_title(budget) for budget in sorted(done["budget"].unique())]
    figure = panels.facet(alt.Facet("budget:N", title=None, sort=titles), columns=3)
    return figure.resolve_scale(x="independent", y="independent")


def chart_rows(done: pd.DataFrame, fits: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Points, curves and optima as rows: budget, method, kind, perplexity and every size of `X_LABELS`."""
    sizes = [*X_LABELS]
    places = [(budget, *each) for budget, rows in by_budget(done).items() for each in by_curve(rows).items()]
    for budget, curve, rows in places:
        fitted = optima(fits).get(budget, {}).get(curve)
        common = {"budget": _title(budget), "method": style.label(curve)}
        kinds = np.where(in_fit(rows, fitted), "fitted", "left out")
        points = rows[["cell", *sizes]].assign(kind=kinds, perplexity=np.exp(rows["val_loss"]))
        drawn = [points]
        if fitted and None not in fitted["coefficients"]:
            x, losses = fitted_curve(fitted, 40)
            drawn.append(_along(rows, x).assign(kind="curve", perplexity=np.exp(losses)))
        if fitted and fitted["loss"] is not None:
            kind = "optimum" if fitted["status"] == OptimumStatus.OK else "flagged optimum"
            optimum = _along(rows, np.array([fitted["x"]]))
            drawn.append(optimum.assign(kind=kind, perplexity=np.exp(fitted["loss"])))
        for part in drawn:
            yield from part.assign(**common).to_dict("records")  # pyrefly: ignore


def _title(budget: float) -> str:
    return f"{budget_name(budget)} FLOPs"


def _along(rows: pd.DataFrame, flops_per_token: np.ndarray) -> pd.DataFrame:
    """Every size at these FLOPs per token, between those of the trained models."""
    return pd.DataFrame({column: at_size(rows[column], rows, flops_per_token) for column in X_LABELS})
