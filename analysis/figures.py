"""Draw a study's figures from its runs.csv, curves.csv, fits.json and differences.csv alone.

    python analysis/figures.py SWEEP [--x COLUMN]

Works on runs/SWEEP/study, else on results/SWEEP; writes figures/*.png and *.pdf there.
"""

import sys
from collections.abc import Sequence

import pandas as pd

from peerscale.errors import UserError, exit_code
from peerscale.runs.study import find_study, read_json, study_parser, usable
from peerscale.runs.table import read_runs
from peerscale.viz import style
from peerscale.viz.curves import curves_figure
from peerscale.viz.differences import differences_figure
from peerscale.viz.isoflop import X_LABELS, isoflop_figure

DEFAULT_X = "params_total"


def main(argv: Sequence[str] | None = None) -> int:
    parser = study_parser(__doc__)
    parser.add_argument(
        "--x",
        choices=list(X_LABELS),
        default=DEFAULT_X,
        help=f"model size of the isoFLOP figure (default: {DEFAULT_X})",
    )
    arguments = parser.parse_args(argv)
    study = find_study(arguments.sweep, arguments.runs, arguments.results)
    runs, fits = read_runs(study.runs), read_json(study.fits)
    if not usable(runs).any():
        raise UserError(f"study {arguments.sweep!r} has no finished cell to draw")
    note = conventions(runs)
    suffix = "" if arguments.x == DEFAULT_X else f"_{arguments.x}"
    drawn = {f"isoflop{suffix}": isoflop_figure(runs, fits, x=arguments.x, note=note)}
    if study.curves.is_file():
        drawn["curves"] = curves_figure(pd.read_csv(study.curves), runs, note=note)
    if study.differences.is_file():
        differences = pd.read_csv(study.differences)
        if (differences["reference"] == "dense").any():
            drawn["differences"] = differences_figure(differences, note=note)
    for name, figure in drawn.items():
        for path in style.save(figure, study.figures / name):
            print(path)
    return 0


def conventions(runs: pd.DataFrame) -> str:
    """Data set and FLOP convention, as the small print of every figure."""
    parts = []
    if {"data", "val_set"} <= set(runs.columns):
        parts.append(f"data: {_all(runs['data'])}, set: {_all(runs['val_set'])}")
    return "; ".join([*parts, f"FLOPs: {_all(runs['convention'])}"])


def _all(column: pd.Series) -> str:
    return " and ".join(map(str, column.dropna().unique()))


if __name__ == "__main__":
    sys.exit(exit_code(main))
