"""The columns of a table of runs, checked, and what in it makes a fit doubtful."""

import numpy as np
import pandas as pd

from peerscale.errors import UserError
from peerscale.laws.linear_fit import Array

SHOWN = 5
"""Number of rows named in a message."""
INCOMPARABLE = {
    "runs of different methods": ("method",),
    "FLOPs of different conventions": ("convention", "flop_convention", "flops_convention"),
    "losses per token of different tokenizers": ("tokenizer", "tokeniser", "vocab", "vocab_size", "vocabulary"),
    "losses on different data": ("data", "dataset", "corpus", "val_set"),
}
"""What must not be mixed within one fit, and names of columns (in any case) that would show it."""


def positive_columns(table: pd.DataFrame, *names: str, law: str, at_least: int) -> list[Array]:
    """The named columns as float64, since integer products such as 6 N D overflow int64.

    Raises:
        UserError: a column is missing, a value is not a finite number above zero (the message names the rows), or there
            are fewer than `at_least` rows.
    """
    if table.empty:
        raise UserError(f"the table has no rows for the {law} law")
    values = []
    for name in names:
        require_column(table, name)
        column = pd.to_numeric(table[name], errors="coerce").to_numpy(np.float64, na_value=np.nan)
        bad = ~(np.isfinite(column) & (column > 0))
        if bad.any():
            found = ", ".join(map(str, table.loc[bad, name].iloc[:SHOWN]))
            where = name_rows(table.index[bad])
            raise UserError(f"column {name!r} must hold finite numbers above 0, not so in {where}: {found}")
        values.append(np.asarray(column))
    if len(table) < at_least:
        raise UserError(f"{len(table)} rows are too few for the {law} law: it has {at_least} coefficients")
    return values


def require_column(table: pd.DataFrame, name: str) -> None:
    """Raise `UserError` if the table has no column `name`."""
    if name not in table.columns:
        raise UserError(f"no column {name!r} in the table; there are: {', '.join(map(str, table.columns))}")


def cluster_labels(table: pd.DataFrame, column: str | None) -> Array:
    """Integers (rows,), equal for rows that are resampled together: equal values in `column`; None: every row alone.

    Raises:
        UserError: there is no such column, or it holds only one value.
    """
    if column is None:
        return np.arange(len(table))
    require_column(table, column)
    labels = np.asarray(pd.factorize(table[column], use_na_sentinel=False)[0])
    if labels.max(initial=0) == 0:
        raise UserError(f"column {column!r} holds one value: there must be several clusters to resample")
    return labels


def table_warnings(table: pd.DataFrame, *names: str) -> tuple[str, ...]:
    """Warnings about these rows: rows equal to an earlier one in all `names`, and mixed measures (`INCOMPARABLE`).

    Duplicates stay in the fit; the reader has to judge whether they are repeats or mistakes.
    """
    found = []
    rows = table.index[table.duplicated(list(names))]
    if len(rows):
        found.append(f"{len(rows)} duplicated rows, kept and so counted again: {name_rows(rows)}")
    for what, columns in INCOMPARABLE.items():
        for column in table.columns:
            kinds = table[column].dropna().unique() if str(column).lower().replace(" ", "_") in columns else ()
            if len(kinds) > 1:
                shown = ", ".join(map(str, kinds[:SHOWN]))
                found.append(f"column {column!r} mixes {shown}: {what} are not comparable")
    return tuple(found)


def name_rows(rows: pd.Index) -> str:
    """The first labels, and how many more there are."""
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return f"{rows.name or 'row'} {', '.join(map(str, rows[:SHOWN]))}{more}"
