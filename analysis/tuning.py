"""Which learning rates each method trains best with, from a study that varies them.

    python analysis/tuning.py lr

For each method and setting, the mean over the sizes of the loss on the tuning split, best first; an edge of the grid
that wins is named, since the grid should then be extended for all methods.
"""

import sys
from collections.abc import Sequence

import pandas as pd

from peerscale.errors import UserError, exit_code
from peerscale.runs import read_runs
from peerscale.runs.study import study_parser, usable

RATES = ["lr_setting", "table_lr"]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = study_parser(__doc__.splitlines()[0]).parse_args(argv)
    cells = arguments.runs / arguments.sweep
    table = settings_table(read_runs(cells if cells.is_dir() else arguments.results / arguments.sweep))
    for method, rows in table.groupby("name", sort=False):
        print(f"\n{method}\n{rows.drop(columns='name').to_string(index=False, float_format='{:.4g}'.format)}")
        for edge in edges(rows):
            print(f"  {edge}")
    return 0


def settings_table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a method and setting: the losses by size and their mean, best first within each method.

    Raises:
        UserError: a method has no setting that was trained at every size.
    """
    runs = runs[usable(runs)].copy()
    variant = runs["variant"].fillna("")
    runs["name"] = runs["method"] + variant.where(variant == "", "_" + variant)
    runs["lr_setting"] = runs["cell"].str.extract(r"-lr=([\d.]+(?:e-?\d+)?)", expand=False).astype(float)
    runs["table_lr"] = runs["table_lr"].fillna(0.0)
    losses = runs.pivot_table(index=["name", *RATES], columns="size", values="val_loss", aggfunc="mean").dropna()
    if losses.empty:
        raise UserError("no setting was trained at every size yet: run the rest of the study first")
    losses["mean"] = losses.mean(axis=1)
    return losses.reset_index().sort_values(["name", "mean"]).rename(columns={"lr_setting": "lr"})


def edges(rows: pd.DataFrame) -> list[str]:
    """For one method, the rates whose winner is the smallest or largest that was tried."""
    best = rows.iloc[0]
    return [
        f"the best {rate}, {best[rate]:g}, is at the edge of its grid: extend it"
        for rate in ("lr", "table_lr")
        if rows[rate].nunique() > 1 and best[rate] in (rows[rate].min(), rows[rate].max())
    ]


if __name__ == "__main__":
    sys.exit(exit_code(main))
