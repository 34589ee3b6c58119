"""Which rows of a table of runs form a curve and can be fitted, and the names of curves."""

import json
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pandas as pd

from peerscale.plan.cell_names import are_brackets as cells_are_brackets
from peerscale.plan.cell_names import axes_label
from peerscale.records.record import Status

CURVE_SIZES = 3
"""Fewest sizes for a curve of a method at a budget. With fewer, methods are compared at each size that they share."""


def method_names(table: pd.DataFrame, without: Sequence[str] = ()) -> pd.Series:
    """For each row the name of the curve to which it belongs.

    The name is `<method>[_<variant>]`, as the layer's file, followed by the values of the study's further axes (except
    those in `without`), so that variants are never mixed in one fit.
    """
    variant = table["variant"].fillna("").astype(str)
    names = table["method"].astype(str) + variant.where(variant == "", "_" + variant)
    axes = axes_of(table)
    if axes.map(axes_label).nunique() < 2:
        return names
    labels = axes.map(lambda each: axes_label({key: value for key, value in each.items() if key not in without}))
    return names + labels.where(labels == "", " " + labels)


def axes_of(table: pd.DataFrame) -> pd.Series:
    """For each row the axes of its cell (dotted keys and values), which the table has as JSON."""
    texts = table["axes"] if "axes" in table else [""] * len(table)
    parsed = [json.loads(text) if isinstance(text, str) and text else {} for text in texts]
    return pd.Series(parsed, index=table.index, dtype=object)


def are_brackets(table: pd.DataFrame) -> pd.Series:
    """Which rows bracket the learning rate of another row; they are neither points of a curve nor variants."""
    methods = table["method"].astype(str) + "_" + table["variant"].fillna("").astype(str)
    return pd.Series(cells_are_brackets(list(methods), list(axes_of(table))), index=table.index, dtype=bool)


def without_brackets(table: pd.DataFrame) -> pd.DataFrame:
    """The rows without rate brackets, which curves, laws and counts use."""
    return table[~are_brackets(table)]


def is_dense(name: str) -> bool:
    """Whether a curve is of the dense model, with any settings."""
    return name.partition(" ")[0] == "dense"


def same_variant(reference: str, name: str, names: Collection[str]) -> str | None:
    """The curve of `reference` with the same settings as `name`, or else without settings; None if there is none."""
    variant = reference + name.removeprefix(name.partition(" ")[0])
    return next((found for found in (variant, reference) if found in names and found != name), None)


def usable(table: pd.DataFrame) -> pd.Series:
    """Which rows can be fitted: finished cells with a finite loss."""
    loss = pd.to_numeric(table["val_loss"], errors="coerce")
    return (table["status"] == str(Status.DONE)) & np.isfinite(loss)


def at_size(values: pd.Series, table: pd.DataFrame, flops_per_token: Any) -> np.ndarray:
    """The values of some rows of a table at other FLOPs per token, log-linear between the sizes of these rows."""
    known = values.groupby(table["flops_per_token"]).mean().sort_index()
    sizes, there = np.log(known.index.to_numpy(float)), np.log(known.to_numpy(float))
    return np.exp(np.interp(np.log(flops_per_token), sizes, there))


def budgets_with_curves(table: pd.DataFrame) -> set[float]:
    """Budgets at which a method has enough sizes for a curve, `CURVE_SIZES` of them."""
    sizes = table.assign(name=method_names(table)).groupby(["budget", "name"])["size"].nunique()
    return {float(budget) for budget, _ in sizes[sizes >= CURVE_SIZES].index}
