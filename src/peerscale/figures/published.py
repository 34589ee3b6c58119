"""The numbers that the PEER paper prints, `he2024.csv`."""

from pathlib import Path

import pandas as pd

DENSE, LAYER, WITHOUT_NORM = "dense", "peer", "peer query_norm=false"
"""The table's names for the dense model, for the paper's layer, and for that layer without BatchNorm on its queries."""


def read_published() -> pd.DataFrame:
    """The numbers in long form: item (figure or table), method, x_name, x, metric, value, source."""
    return pd.read_csv(Path(__file__).with_name("he2024.csv"))


def paper_values(published: pd.DataFrame, item: str, method: str, metric: str) -> dict[float, float]:
    """Values by x, in ascending order; empty if the paper prints none."""
    chosen = (published["item"] == item) & (published["method"] == method) & (published["metric"] == metric)
    return published[chosen].set_index("x")["value"].sort_index().to_dict()
