"""What a table must not hold, and what is said of one that may mislead."""

import numpy as np
import pandas as pd
import pytest

from peerscale.errors import UserError
from peerscale.laws.fitting import positive_columns, row_labels, table_warnings


def columns(table: pd.DataFrame, *names: str, at_least: int = 1) -> list[np.ndarray]:
    return positive_columns(table, *names, law="parametric", at_least=at_least)


def test_numbers_come_as_floats_whatever_they_are_stored_as() -> None:
    table = pd.DataFrame({"int": [2**62, 3], "text": ["1e3", "2"], "big": [2**70, 5], "u": np.array([2**63, 1], "u8")})
    values = columns(table, "int", "text", "big", "u")
    assert all(column.dtype == np.float64 for column in values)
    assert [column[0] for column in values] == [2.0**62, 1000, 2.0**70, 2.0**63]
    assert 6 * values[0][0] * values[3][0] == pytest.approx(6 * 2.0**125)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0, 0.0, "1,000", None])
def test_a_bad_value_is_named_with_its_row(bad: object) -> None:
    table = pd.DataFrame({"N": [1.0, 2.0, 3.0]}, dtype=object)
    table.loc[1, "N"] = bad
    with pytest.raises(UserError, match=r"column 'N' must hold finite numbers above 0, not so in row 1: "):
        columns(table, "N")


def test_missing_columns_and_rows_are_named() -> None:
    table = pd.DataFrame({"N": [1.0], "loss": [2.0]})
    with pytest.raises(UserError, match="no column 'M' in the table; there are: N, loss"):
        columns(table, "M")
    with pytest.raises(UserError, match="1 rows are too few for the parametric law: it has 5 coefficients"):
        columns(table, "N", at_least=5)
    with pytest.raises(UserError, match="the table has no rows"):
        columns(table.head(0), "N")
    with pytest.raises(UserError, match="no column 'run'"):
        row_labels(table, "run")


def test_mixtures_and_duplicates_are_flagged() -> None:
    table = pd.DataFrame({"N": [1.0, 2.0, 1.0], "loss": [3.0, 2.0, 3.0], "Vocab Size": 1, "convention": "full"})
    (only,) = table_warnings(table, "N", "loss")
    assert only == "1 duplicated rows, kept and so counted again: row 2"
    mixed = table.assign(**{"Vocab Size": [1, 2, 2], "convention": ["full", "6ND", None], "data": ["a", None, "a"]})
    warnings = table_warnings(mixed, "N", "loss")
    assert len(warnings) == 3
    assert "column 'convention' mixes full, 6ND: FLOPs of different conventions are not comparable" in warnings
    assert any("'Vocab Size' mixes 1, 2: losses per token of different tokenizers" in warning for warning in warnings)
