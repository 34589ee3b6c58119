"""Draw a study's figures from its runs.csv, curves.csv and fits.json alone.

    .venv/bin/python analysis/figures.py SWEEP [--x COLUMN]

Works on runs/SWEEP/study, else on results/SWEEP; writes figures/*.png and *.pdf there.
"""

import sys
from collections.abc import Iterator, Sequence

import pandas as pd
from matplotlib.figure import Figure

from peerscale.errors import UserError, exit_code
from peerscale.runs.rates import RATES
from peerscale.runs.study import Study, find_study, method_names, read_fits, study_parser, usable
from peerscale.runs.table import CURVES, read_runs, read_table
from peerscale.viz import style
from peerscale.viz.ablations import active_figure, experts_figure, has_curves, query_norm_figure, varied
from peerscale.viz.curves import curves_figure
from peerscale.viz.differences import differences_figure
from peerscale.viz.frontier import frontier_figure, time_figure
from peerscale.viz.isoflop import X_LABELS, isoflop_figure
from peerscale.viz.published import read_published
from peerscale.viz.rates import rates_figure

DEFAULT_X = "params_total"


def main(argv: Sequence[str] | None = None) -> int:
    parser = study_parser(__doc__)
    size = f"model size of the isoFLOP figure (default: {DEFAULT_X})"
    parser.add_argument("--x", choices=list(X_LABELS), default=DEFAULT_X, help=size)
    arguments = parser.parse_args(argv)
    study = find_study(arguments.sweep, arguments.runs, arguments.results)
    runs = read_runs(study.runs)
    if not usable(runs).any():
        raise UserError(f"study {arguments.sweep!r} has no finished cell to draw")
    for name, figure in study_figures(study, runs, arguments.x):
        for path in style.save(figure, study.figures / name):
            print(path)
    return 0


def study_figures(study: Study, runs: pd.DataFrame, x: str) -> Iterator[tuple[str, Figure]]:
    """The figures that a study's tables can feed, by name: what it varies besides method, size and budget decides."""
    note, settings, published = conventions(runs), varied(runs), read_published()
    if has_curves(runs) or not settings:
        name, fits = "isoflop" if x == DEFAULT_X else f"isoflop_{x}", read_fits(study.fits)
        yield name, isoflop_figure(runs, fits, x=x, note=note)
        if study.curves.is_file():
            yield "curves", curves_figure(read_table(study.curves, CURVES), runs, note=note)
        if drawn := differences_figure(fits, methods=method_names(runs[usable(runs)]), note=note):
            yield "differences", drawn
        if drawn := frontier_figure(fits, note=note):
            yield "frontier", drawn
        yield "time", time_figure(runs, note=note)
    if settings & set(RATES):  # the cells at one setting are then no seeds of each other
        yield "rates", rates_figure(runs, note=note)
        return
    if "n_experts" in settings:
        yield "experts", experts_figure(runs, published, note=note)
    if settings & {"ffn_heads", "top_k"}:
        yield "active", active_figure(runs, note=note)
    if "query_norm" in settings:
        yield "query_norm", query_norm_figure(runs, published, note=note)


def conventions(runs: pd.DataFrame) -> str:
    """Data set and FLOP convention, as the small print of every figure."""
    named = {"data": "data: ", "val_set": "set: ", "convention": "FLOPs: "}
    data, val_set, flops = (
        word + style.listed(runs[column]) if column in runs else "" for column, word in named.items()
    )
    return "; ".join(filter(None, (", ".join(filter(None, (data, val_set))), flops)))


if __name__ == "__main__":
    sys.exit(exit_code(main))
