"""Columns of a table of runs, checked before they are fitted."""

import numpy as np
import pandas as pd

from peerscale.errors import UserError
from peerscale.laws.results import Array

SHOWN = 5
"""Rows named in a message."""


def positive_columns(table: pd.DataFrame, *names: str, law: str, at_least: int) -> list[Array]:
    """The named columns as float64, for integer products such as 6 N D overflow int64.

    Raises:
        UserError: a column is missing, a value is not a finite number above zero (with the rows' labels), or there
            are fewer than `at_least` rows.
    """
    values = []
    for name in names:
        require_column(table, name)
        column = pd.to_numeric(table[name], errors="coerce").to_numpy(np.float64, na_value=np.nan)
        bad = table.index[~(np.isfinite(column) & (column > 0))]
        if len(bad):
            raise UserError(f"column {name!r} must hold finite numbers above 0, not so in {_name_rows(bad)}")
        values.append(np.asarray(column))
    if len(table) < at_least:
        raise UserError(f"{len(table)} rows are too few for the {law} law: it has {at_least} coefficients")
    return values


def require_column(table: pd.DataFrame, name: str) -> None:
    """Raises UserError if the table has no column `name`."""
    if name not in table.columns:
        raise UserError(f"no column {name!r} in the table; there are: {', '.join(map(str, table.columns))}")


def cluster_labels(table: pd.DataFrame, cluster: str | None) -> Array | None:
    """The values of column `cluster` as integer labels, or None. Raises UserError if there is no such column."""
    if cluster is None:
        return None
    require_column(table, cluster)
    return np.asarray(pd.factorize(table[cluster], use_na_sentinel=False)[0])


def duplicate_warnings(table: pd.DataFrame, *names: str) -> tuple[str, ...]:
    """A warning that names the rows equal to an earlier one in all `names`; they stay in the fit."""
    rows = table.index[table.duplicated(list(names))]
    if not len(rows):
        return ()
    return (f"{len(rows)} duplicated rows, kept and so counted again: {_name_rows(rows)}",)


def _name_rows(rows: pd.Index) -> str:
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return f"{rows.name or 'row'} {', '.join(map(str, rows[:SHOWN]))}{more}"
