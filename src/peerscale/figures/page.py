"""One HTML page: the standing table, then each study's question, answer, isoFLOP curves to look into and first table.

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
from peerscale.figures.isoflop import X_LABELS, fitted_curve, optima
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
th { cursor: pointer; }
section { overflow-x: auto; }
</style>
<script>$library</script>
<h1>peerscale</h1>
<p>Layers of transformers compared at equal training compute; the <a href="$readme">README</a> says how.
Losses are in nats per token of the validation set, and perplexity is their exponential. Budgets are training FLOPs.
In charts a star is a fitted minimum, and what is hollow is flagged or in no fit. A click in a legend picks methods, and
a click on the head of a column sorts its table.</p>
$sections
<script>
document.querySelectorAll("th").forEach(head => head.onclick = () => {
  const body = head.closest("table").tBodies[0], text = row => row.cells[head.cellIndex].textContent.replace("−", "-");
  const compare = (a, b) => parseFloat(text(a)) - parseFloat(text(b)) || text(a).localeCompare(text(b));
  const rows = [...body.rows], sorted = [...rows].sort(compare);
  body.append(...(rows.every((row, i) => row === sorted[i]) ? sorted.reverse() : sorted));
});
</script>
</html>
""")

SHAPES = {
    "o": "circle", "s": "square", "D": "diamond", "v": "triangle-down", "^": "triangle-up", "<": "triangle-left",
    ">": "triangle-right", "P": "cross", "d": "M0,-1L.55,0L0,1L-.55,0Z",
    "p": "M0,-1L.95,-.31L.59,.81L-.59,.81L-.95,-.31Z", "h": "M0,-1L.87,-.5L.87,.5L0,1L-.87,.5L-.87,-.5Z",
    "X": "M-1,-.5L-.5,-1L0,-.5L.5,-1L1,-.5L.5,0L1,.5L.5,1L0,.5L-.5,1L-1,.5L-.5,0Z",
}  # fmt: skip
"""The markers of the figures as Vega names or draws them."""

STAR = "M0,-1L.22,-.31L.95,-.31L.36,.12L.59,.81L0,.38L-.59,.81L-.36,.12L-.95,-.31L-.22,-.31Z"


TICKS = [digit * 10.0**power for power in range(2, 13) for digit in (1, 2, 5)]
"""Places of numbers at a logarithmic axis of sizes."""


def page(studies: Iterable[StudyFolder], standing: pd.DataFrame | None = None, *, readme: str) -> str:
    """The page; all text of the studies' files is shown as it is, so that it names nothing to load or to run.

    Args:
        studies: committed studies, in the order in which they are shown.
        standing: the standing table, if there is one.
        readme: address of the README.
    """
    library = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")
    table = "" if standing is None else standing.to_html(index=False, border=0, float_format="{:.4g}".format, na_rep="")
    first = [f"<section><h2>The standing table</h2>{table}</section>"] * bool(table)
    sections = "\n".join([*first, *map(_section, studies)])
    return PAGE.substitute(library=library, readme=html.escape(readme), sections=sections)


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
    looks = style.looks(done["curve"])
    labels = [style.label(curve) for curve in looks]
    colour = alt.Scale(domain=labels, range=[look["color"] for look in looks.values()])
    shape = alt.Scale(domain=labels, range=[SHAPES[look["marker"]] for look in looks.values()])
    options = alt.binding_select(options=[*X_LABELS], labels=[*X_LABELS.values()], name="x axis ")
    axis = alt.param("x_axis", "params_total", bind=options)
    picked = alt.selection_point("picked", fields=["method"], bind="legend")
    marks = alt.Chart(alt.Data(values=list(chart_rows(done, fits)))).transform_calculate(x="datum[x_axis]")
    base = marks.encode(
        alt.X("x:Q", title=None).scale(type="log", nice=False, padding=8).axis(format="~s", values=TICKS),
        alt.Y("perplexity:Q").scale(zero=False, nice=False, padding=8).axis(tickCount=6),
        alt.Color("method:N", title=None).scale(colour),
        opacity=alt.condition(picked, alt.value(1), alt.value(0.1)),
    )
    shown = ["cell:N", "perplexity:Q", *(f"{column}:Q" for column in X_LABELS)]
    filled = alt.condition("datum.kind == 'fitted' || datum.kind == 'optimum'", alt.value(1), alt.value(0))
    fill = alt.Fill("method:N", title=None).scale(colour)
    points = base.mark_point(size=40).transform_filter("datum.kind == 'fitted' || datum.kind == 'not fitted'")
    points = points.encode(alt.Shape("method:N", title=None).scale(shape), fill, fillOpacity=filled, tooltip=shown)
    stars = base.mark_point(size=220, shape=STAR, strokeWidth=1.2).transform_filter(
        "indexof(datum.kind, 'optimum') >= 0"
    )
    stars = stars.encode(fill, fillOpacity=filled, tooltip=shown)
    lines = base.mark_line(strokeWidth=1.2).transform_filter("datum.kind == 'curve'")
    panels = alt.layer(lines, points, stars).properties(width=270, height=220).add_params(axis, picked)
    titles = [_title(budget) for budget in sorted(done["budget"].unique())]
    figure = panels.facet(alt.Facet("budget:N", title=None, sort=titles), columns=3)
    figure = figure.resolve_scale(x="independent", y="independent")
    return figure.configure_legend(orient="bottom", columns=4, labelLimit=0, symbolLimit=0)


def chart_rows(done: pd.DataFrame, fits: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Points, curves and optima as rows: budget, method, kind, perplexity and every size of `X_LABELS`."""
    sizes = [*X_LABELS]
    places = [(budget, *each) for budget, rows in by_budget(done).items() for each in by_curve(rows).items()]
    for budget, curve, rows in places:
        fitted = optima(fits).get(budget, {}).get(curve)
        common = {"budget": _title(budget), "method": style.label(curve)}
        kind = "fitted" if fitted else "not fitted"
        points = rows[["cell", *sizes]].assign(kind=kind, perplexity=np.exp(rows["val_loss"]))
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
