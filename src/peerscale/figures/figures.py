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
from peerscale.records.study import Study, method_names, read_fits, usable, without_brackets
from peerscale.records.table import read_table
from peerscale.stats.rates import tries_rates

DEFAULT_X = "params_total"
"""Model size of the isoFLOP figure, as in the paper."""

PICTURED = {"n_experts", "ffn_heads", "top_k", "query_norm"}
"""Settings with a figure in the paper."""

MANY = 2
"""Most settings that a study of one size may vary to get figures over settings; with more, variants are compared with
dense."""

TITLES = {
    "isoflop": "Perplexity against model size at equal training compute (the paper's Figure 1)",
    "experts": "Number of experts (the paper's Figure 3a)",
    "active": "Active experts and heads (the paper's Figure 3b)",
    "query_norm": "BatchNorm on the queries (the paper's Figure 4)",
    "differences": "Difference to dense",
    "frontier": "Compute-optimal loss, and the compute multiplier over dense",
    "multipliers": "Compute multipliers over dense, beside the paper's",
    "curves": "Training curves",
    "rates": "Learning rates",
    "brackets": "Rate brackets: the same models at other learning rates",
}
"""Titles of the figures by name, in the order of a report."""


def study_figures(study: Study, runs: pd.DataFrame, x: str = DEFAULT_X) -> Iterator[tuple[str, Figure]]:
    """The figures that can be drawn from a study's tables, by name; `x` is the size of the isoFLOP figure."""
    runs, fits = without_brackets(runs), read_fits(study.fits)
    note, settings, published = small_print(runs), varied(runs), read_published()
    if compares_curves(runs):
        name = "isoflop" if x == DEFAULT_X else f"isoflop_{x}"
        yield name, isoflop_figure(runs, fits, x=x, note=note)
        if study.curves.is_file():
            yield "curves", curves_figure(read_table(study.curves, CURVES), runs, note=note)
        if drawn := differences_figure(fits, methods=method_names(runs[usable(runs)]), note=note):
            yield "differences", drawn
        if drawn := frontier_figure(fits, note=note):
            yield "frontier", drawn
        if drawn := multipliers_figure(fits, published, note=note):
            yield "multipliers", drawn
    if drawn := brackets_figure(fits, note=note):
        yield "brackets", drawn
    if tries_rates(runs):
        yield "rates", rate_law_figure(runs, fits["rates"].get("law"), note=note)
    elif not compares_curves(runs):
        of_paper = [*of_the_paper(runs, published, note)] if len(settings) <= MANY and settings <= PICTURED else []
        yield from of_paper
        if not of_paper and (drawn := differences_figure(fits, note=note)):
            yield "differences", drawn


def of_the_paper(runs: pd.DataFrame, published: pd.DataFrame, note: str) -> Iterator[tuple[str, Figure]]:
    """The paper's figures over settings of PEER, for those that a study of one size varies."""
    peer = runs[runs["method"] == "peer"]
    if "n_experts" in varied(peer[with_norm(peer)]):
        yield "experts", experts_figure(runs, published, note=note)
    if varied(peer) & {"ffn_heads", "top_k"}:
        yield "active", active_figure(runs, note=note)
    if "query_norm" in varied(peer):
        yield "query_norm", query_norm_figure(runs, published, note=note)


def small_print(runs: pd.DataFrame) -> str:
    """Data set and FLOP convention, for the caption of every figure."""
    named = {"data": "data: ", "val_set": "set: ", "convention": "FLOPs: "}
    data, val_set, flops = (
        word + style.listed(runs[column]) if column in runs else "" for column, word in named.items()
    )
    return "; ".join(filter(None, (", ".join(filter(None, (data, val_set))), flops)))
