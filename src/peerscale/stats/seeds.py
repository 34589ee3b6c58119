"""Means over seeds at one size, where nothing is fitted."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student

from peerscale.laws.linear_fit import LEVEL


def pooled_scatter(values: pd.Series, groups: Any) -> tuple[float, int]:
    """Standard deviation of values around the means of their groups, pooled over all of them, and its degrees of
    freedom; NaN without any."""
    of_group = values.groupby(groups)
    df = len(values) - of_group.ngroups
    around = values - of_group.transform("mean")
    return math.sqrt((around**2).sum() / df) if df else math.nan, df


def over_seeds(runs: pd.DataFrame, by: Sequence[str], y: str = "val_loss") -> pd.DataFrame:
    """One row per combination of `by`, with the mean of `y` over seeds and an interval.

    Returns:
        `by`, mean, low, high, seeds. The interval is Student's of the mean over seeds, whose scatter is pooled over all
        rows. With one seed it is +-1 standard error over validation sequences if `y` is the loss, and otherwise empty
        (low = high = mean).
    """
    rows = runs.assign(**{y: runs[y].astype(float)})
    sd, df = pooled_scatter(rows[y], [rows[column] for column in by])
    groups = rows.groupby([*by], sort=False)
    found = groups.agg(mean=(y, "mean"), seeds=(y, "size"), alone=("val_loss_se", "first")).reset_index()
    several = found["seeds"] > 1
    half = np.where(several, student.ppf((1 + LEVEL) / 2, df) * sd / np.sqrt(found["seeds"]), 0.0) if df else 0.0
    half = half + (np.nan_to_num(found["alone"].astype(float)) * ~several if y == "val_loss" else 0.0)
    return found.assign(low=found["mean"] - half, high=found["mean"] + half).sort_values([*by], ignore_index=True)
