"""The figures of a study; its axes besides method, size and budget decide which ones it has."""

from collections.abc import Iterator

import pandas as pd
from matplotlib.figure import Figure

from peerscale.figures import style
from peerscale.figures.ablations import active_figure, experts_figure, query_norm_figure, varied, with_norm
from peerscale.figures.brackets import brackets_figure
from peerscale.figures.curves import curves_figure
from peerscale.figures.differences import differences_figure
from peerscale.figures.frontier import frontier_figure
from peerscale.figures.isoflop import isoflop_figure
from peerscale.figures.multipliers import multipliers_figure
from peerscale.figures.published import read_published
from peerscale.figures.rate_law import rate_law_figure
from peerscale.figures.study_table import compares_curves
from peerscale.records.curves import CURVES
from peerscale.records.study import Study, read_fits
from peerscale.records.table import read_table
from peerscale.stats.curves_of_runs import method_names, usable, without_brackets
from peerscale.stats.rates import tries_rates

DEFAULT_X = "params_total"
"""Model size of the isoFLOP figure, as in the paper."""

PICTURED = {"n_experts", "ffn_heads", "top_k", "query_norm"}
"""Settings with a figure in the paper."""

MANY = 2
"""Most settings that a study of one size may vary to get figures over settings; with more, variants are compared with
dense."""


def study_figures(study: Study, runs: pd.DataFrame, x: str = DEFAULT_X) -> Iterator[tuple[str, Figure]]:
    """The figures that can be drawn from a study's tables, by name; `x` is the size of the isoFLOP figure."""
    for name, figure in _figures(study, without_brackets(runs), x):
        if figure is not None:
            style.caption(figure, small_print(runs))
            yield name, figure


def _figures(study: Study, runs: pd.DataFrame, x: str) -> Iterator[tuple[str, Figure | None]]:
    fits, published, settings = read_fits(study.fits), read_published(), varied(runs)
    yield "brackets", brackets_figure(fits)
    if compares_curves(runs):
        yield "isoflop" if x == DEFAULT_X else f"isoflop_{x}", isoflop_figure(runs, fits, x=x)
        if study.curves.is_file():
            yield "curves", curves_figure(read_table(study.curves, CURVES), runs)
        yield "differences", differences_figure(fits, method_names(runs[usable(runs)]))
        yield "frontier", frontier_figure(fits)
        yield "multipliers", multipliers_figure(fits, published)
    if tries_rates(runs):
        yield "rates", rate_law_figure(runs, fits["rates"].get("law"))
    elif not compares_curves(runs):
        peer = runs[runs["method"] == "peer"]
        of_paper = {
            "experts": "n_experts" in varied(peer[with_norm(peer)]),
            "active": bool(varied(peer) & {"ffn_heads", "top_k"}),
            "query_norm": "query_norm" in varied(peer),
        }
        if len(settings) > MANY or not settings <= PICTURED or not any(of_paper.values()):
            yield "differences", differences_figure(fits)
            return
        if of_paper["experts"]:
            yield "experts", experts_figure(runs, published)
        if of_paper["active"]:
            yield "active", active_figure(runs)
        if of_paper["query_norm"]:
            yield "query_norm", query_norm_figure(runs, published)


def small_print(runs: pd.DataFrame) -> str:
    """Data, evaluation set and FLOP convention, for the caption of every figure."""
    named = {"data": "data", "val_set": "set", "convention": "FLOPs"}
    return "; ".join(f"{word}: {style.listed(runs[column])}" for column, word in named.items() if column in runs)
