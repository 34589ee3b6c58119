"""A curve, which is a method with its settings, as a value; and the rows of a table of runs that make up curves.

What a row is depends on that row alone: its `method` and `variant` name the layer, `settings` has what else the study
varies, and `rate_factor` tells a rate bracket. Names are made from curves, for people; no name is taken apart.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pandas as pd

from peerscale.config.errors import nearest
from peerscale.errors import UserError
from peerscale.plan.cell_names import axes_label
from peerscale.records.record import Status

NAMING = ("name", "method", "reference", "rival")
"""Keys of `fits.json` whose values are names of curves; those of `groups` are names too."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A method with the settings in which it differs from its usual ones."""

    method: str
    """Name of the layer's file in conf/ffn."""
    settings: tuple[tuple[str, Any], ...] = ()
    """Keys of the configuration and their values, in the order in which the study varies them."""

    @classmethod
    def of(cls, method: str, settings: Mapping[str, Any]) -> "Curve":
        """The curve of these settings; values that are not single ones are kept as JSON."""
        plain = {k: json.dumps(v, separators=(",", ":")) if isinstance(v, list | dict) else v
                 for k, v in settings.items()}  # fmt: skip
        return cls(method, tuple(plain.items()))

    def __str__(self) -> str:
        """`peer n_experts=16384`."""
        return " ".join(filter(None, (self.method, axes_label(dict(self.settings)))))

    def __lt__(self, other: "Curve") -> bool:
        return self._place < other._place

    @property
    def _place(self) -> tuple[str, list[tuple[str, bool, float, str]]]:
        """Methods are in the order of the alphabet, and each one's settings in that of their numbers."""
        numbers = [(key, value, isinstance(value, int | float)) for key, value in self.settings]
        return self.method, [(key, not known, value if known else 0.0, str(value)) for key, value, known in numbers]

    @property
    def plain(self) -> "Curve":
        """The method with its usual settings."""
        return Curve(self.method)

    def with_method(self, method: str) -> "Curve":
        """Another method with the same settings."""
        return Curve(method, self.settings)

    def without(self, *keys: str) -> "Curve":
        """The method with the usual values of these keys."""
        return Curve(self.method, tuple(pair for pair in self.settings if pair[0] not in keys))

    def switched_off(self) -> list["Curve"]:
        """For every setting that is true, the curve that differs in having it false."""
        on = [key for key, value in self.settings if value is True]
        return [Curve(self.method, tuple((k, False if k == key else v) for k, v in self.settings)) for key in on]

    def counterpart(self, reference: "Curve | str", among: Collection["Curve"]) -> "Curve | None":
        """The curve to compare this one with: of a method with the same settings, or else `reference` as it is.

        None if neither is among the curves, or only this curve itself.
        """
        reference = Curve(reference) if isinstance(reference, str) else reference
        same = reference if reference.settings else self.with_method(reference.method)
        return next((found for found in (same, reference) if found in among and found != self), None)


def described_curves(curves: Iterable[Curve]) -> dict[str, Any]:
    """Method and settings of each curve by its name, for `fits.json`."""
    return {str(one): {"method": one.method, "settings": dict(one.settings)} for one in curves}


@cache
def _curve(method: str, variant: str, settings: str) -> Curve:
    return Curve.of("_".join(filter(None, (method, variant))), json.loads(settings or "{}"))


def curves_of(runs: pd.DataFrame) -> pd.Series:
    """The curve of each row of a table of runs."""
    columns = (runs[column].astype(object).fillna("").astype(str) for column in ("method", "variant", "settings"))
    return pd.Series([_curve(*row) for row in zip(*columns, strict=True)], index=runs.index, dtype=object)


def methods_of(runs: pd.DataFrame) -> pd.Series:
    """The method of each row, the name of the layer's file."""
    return curves_of(runs).map(lambda curve: curve.method)


def require_methods(names: Iterable[str], runs: pd.DataFrame, sweep: str) -> list[str]:
    """The methods with finished runs; raises `UserError` if one of `names` is none of them."""
    known = [*methods_of(finished(runs)).unique()]
    for name in names:
        if name not in known:
            there = f"{sweep}, which has {', '.join(known)}{nearest(name, known)}"
            raise UserError(f"{name}: no method with finished runs in {there}")
    return known


def finished(runs: pd.DataFrame) -> pd.DataFrame:
    """The rows of curves that can be fitted, with their `curve`."""
    rows = without_brackets(runs)
    rows = rows[usable(rows)]
    return rows.assign(curve=curves_of(rows))


def by_curve(rows: pd.DataFrame) -> dict[Curve, pd.DataFrame]:
    """The rows of each `curve`."""
    return {curve: rows[rows["curve"] == curve] for curve in rows["curve"].unique()}


def by_budget(rows: pd.DataFrame) -> dict[float, pd.DataFrame]:
    """The rows of each budget, in ascending order."""
    return {float(budget): rows[rows["budget"] == budget] for budget in sorted(rows["budget"].unique())}


def without_brackets(runs: pd.DataFrame) -> pd.DataFrame:
    """The rows without those that bracket the learning rate of another row, which are no points of curves."""
    return runs[runs["rate_factor"] == 1]


def usable(runs: pd.DataFrame) -> pd.Series:
    """Which rows can be fitted: finished cells with a finite loss."""
    loss = pd.to_numeric(runs["val_loss"], errors="coerce")
    return (runs["status"] == str(Status.DONE)) & np.isfinite(loss)


def at_size(values: pd.Series, table: pd.DataFrame, flops_per_token: Any) -> np.ndarray:
    """The values of some rows of a table at other FLOPs per token, log-linear between the sizes of these rows."""
    known = values.groupby(table["flops_per_token"]).mean().sort_index()
    sizes, there = np.log(known.index.to_numpy(float)), np.log(known.to_numpy(float))
    return np.exp(np.interp(np.log(flops_per_token), sizes, there))


def to_names(value: Any) -> Any:
    """Results for `fits.json`: every curve is replaced by its name."""
    match value:
        case Curve():
            return str(value)
        case Mapping():
            return {str(key): to_names(item) for key, item in value.items()}
        case list() | tuple():
            return [to_names(item) for item in value]
    return value


def from_names(fits: Mapping[str, Any]) -> dict[str, Any]:
    """What `fits.json` holds, with curves for their names, which its `curves` describes."""
    curves = {name: Curve.of(one["method"], dict(one["settings"])) for name, one in fits["curves"].items()}

    def named(value: Any, key: str = "") -> Any:
        if isinstance(value, Mapping):
            return {curves.get(k, k) if key == "groups" else k: named(item, k) for k, item in value.items()}
        if isinstance(value, list):
            return [named(item) for item in value]
        return curves.get(value, value) if key in NAMING and isinstance(value, str) else value

    return {key: curves if key == "curves" else named(value, key) for key, value in fits.items()}
