"""The figures of a study; its settings decide which ones it has."""

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from peerscale.figures import style
from peerscale.figures.ablations import active_figure, experts_figure, query_norm_figure, varied, with_norm
from peerscale.figures.brackets import brackets_figure
from peerscale.figures.curves import curves_figure
from peerscale.figures.differences import differences_figure
from peerscale.figures.isoflop import isoflop_figure
from peerscale.figures.multipliers import multipliers_figure
from peerscale.figures.published import LAYER, read_published
from peerscale.figures.rate_law import rate_law_figure
from peerscale.figures.study_table import compares_curves
from peerscale.records.curves import CURVES
from peerscale.records.study import StudyFolder
from peerscale.records.table import read_table
from peerscale.stats.curve import finished
from peerscale.stats.fits import read_fits
from peerscale.stats.rates import tries_rates

DEFAULT_X = "params_total"
"""Model size of the isoFLOP figure, as in the paper."""

PICTURED = {"ffn.n_experts", "ffn.n_heads", "ffn.top_k", "ffn.query_norm"}
"""Settings with a figure in the paper."""

MANY = 2
"""Most settings that a study of one size may vary to get figures over settings; with more, variants are compared with
the baseline."""


def study_figures(study: StudyFolder, runs: pd.DataFrame, x: str = DEFAULT_X) -> Iterator[tuple[str, Figure]]:
    """The figures that can be drawn from a study's tables, by name; `x` is the size of the isoFLOP figure."""
    for name, figure in _figures(study, runs, x):
        if figure is not None:
            style.caption(figure, small_print(runs))
            yield name, figure


def _figures(study: StudyFolder, runs: pd.DataFrame, x: str) -> Iterator[tuple[str, Figure | None]]:
    fits, published, done = read_fits(study.fits), read_published(), finished(runs)
    yield "brackets", brackets_figure(fits, done["curve"])
    if compares_curves(fits):
        yield "isoflop" if x == DEFAULT_X else f"isoflop_{x}", isoflop_figure(runs, fits, x=x)
        if study.curves.is_file():
            yield "curves", curves_figure(read_table(study.curves, CURVES), runs, fits)
        yield "differences", differences_figure(fits, done["curve"])
        yield "multipliers", multipliers_figure(fits, published, done)
    if tries_rates(runs):
        yield "rates", rate_law_figure(done, fits["rates"].get("law"))
    elif not compares_curves(fits):
        yield from _settings_figures(done, fits, published)


def _settings_figures(
    done: pd.DataFrame, fits: Mapping[str, Any], published: pd.DataFrame
) -> Iterator[tuple[str, Figure | None]]:
    """The paper's figures of the settings of its layer, or else the differences of all variants to the baseline.

    A figure is drawn if the layer varies nothing that it does not show, which would be taken for seeds.
    """
    layer, settings = done[done["curve"].map(lambda curve: curve.method == LAYER)], varied(done["curve"])
    of_layer = varied(layer["curve"])
    experts = varied(layer.loc[with_norm(layer), "curve"]) == {"ffn.n_experts"}
    active = bool(of_layer) and of_layer <= {"ffn.n_heads", "ffn.top_k"}
    query_norm = "ffn.query_norm" in of_layer and of_layer <= {"ffn.query_norm", "ffn.n_experts"}
    if len(settings) > MANY or not settings <= PICTURED or not (experts or active or query_norm):
        yield "differences", differences_figure(fits)
        return
    if experts:
        yield "experts", experts_figure(done, published, fits["baseline"])
    if active:
        shown = done["curve"].map(lambda curve: curve.method in (LAYER, fits["baseline"]))
        yield "active", active_figure(done[shown], fits["baseline"])
    if query_norm:
        yield "query_norm", query_norm_figure(layer, published, fits["baseline"])


def small_print(runs: pd.DataFrame) -> str:
    """Data and evaluation set, for the caption of every figure."""
    named = {"data": "", "val_set": " set"}
    return ", ".join(f"{style.listed(runs[column])}{word}" for column, word in named.items() if column in runs)
