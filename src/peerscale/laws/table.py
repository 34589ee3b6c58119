"""Columns of a table of runs, checked before they are fitted."""

import numpy as np
import pandas as pd

from peerscale.errors import UserError
from peerscale.laws.results import Array

SHOWN = 5
"""Rows named in a message."""
INCOMPARABLE = {
    "FLOPs of different conventions": ("convention", "flop_convention", "flops_convention"),
    "losses per token of different tokenizers": ("tokenizer", "tokeniser", "vocab", "vocab_size", "vocabulary"),
    "losses on different data": ("data", "dataset", "corpus", "val_set"),
}
"""What a column of such a name, in whatever case, must not mix within one fit."""


def positive_columns(table: pd.DataFrame, *names: str, law: str, at_least: int) -> list[Array]:
    """The named columns as float64, for integer products such as 6 N D overflow int64.

    Raises:
        UserError: a column is missing, a value is not a finite number above zero (with the rows' labels), or there
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
    """Raises UserError if the table has no column `name`."""
    if name not in table.columns:
        raise UserError(f"no column {name!r} in the table; there are: {', '.join(map(str, table.columns))}")


def row_labels(table: pd.DataFrame, column: str) -> Array:
    """The values of a column as integers from 0, equal ones alike. Raises UserError if there is no such column."""
    require_column(table, column)
    return np.asarray(pd.factorize(table[column], use_na_sentinel=False)[0])


def table_warnings(table: pd.DataFrame, *names: str) -> tuple[str, ...]:
    """What makes a fit of these rows doubtful: rows equal to an earlier one in all `names`, and mixed measures.

    Duplicates stay in the fit: whether they are repeats or a mistake is the reader's to judge.
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
    """The first labels, and how many more."""
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return f"{rows.name or 'row'} {', '.join(map(str, rows[:SHOWN]))}{more}"
