"""The `sweep` section of a study file: the cells of a study, and the questions that its statistics answer."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from peerscale.config.compose import StudyFile, overridden, read_study
from peerscale.config.errors import ConfigError, parse
from peerscale.types import STRICT, Positive, Rate, Seed

RATE_FACTOR = "optim.lr_factor"
"""The axis of cells that bracket a learning rate: the same cell at a multiple of its rate."""

MIN_SIZES = 4
"""Sizes for a method's curve at a budget if a study asks for no other number: one more than a parabola has
coefficients."""

OF_GRID = ("ffn", "d_model", "budget", "seed")
"""Keys that the methods, the grid and the seeds of every study give its cells."""

OF_ROWS = ("head_dim", "n_layers", "batch_sequences")
"""Further keys that a row of the grid may give its cells; with none, they are those of the configuration."""


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, int | str) else value


Values = Annotated[list[Any], Field(min_length=1)]
Sizes = Annotated[list[Positive], BeforeValidator(_as_list), Field(min_length=1)]


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class GridRow:
    """One budget of a study and the sizes to train there."""

    budget: Rate
    d_model: Sizes
    """Width of each size."""
    head_dim: Sizes | None = None
    """Width of an attention head: one for all sizes of the row, or one for each; null: that of the configuration."""
    n_layers: Sizes | None = None
    """Number of blocks, in the same form."""
    seeds: Annotated[list[Seed], Field(min_length=1)] | None = None
    """Replace the study's seeds in this row, such as further seeds of one size."""
    methods: Annotated[list[str], Field(min_length=1)] | None = None
    """Only these of the study's methods."""
    axes: dict[str, Values] = Field(default_factory=dict)
    """Further keys that vary in this row only, such as rates around the usual one."""
    batch_sequences: Positive | None = None
    """Sequences of a batch in this row, where the best batch depends on the budget; null: those of the configuration.
    Names of cells and methods do not tell it."""
    window: tuple[Rate, Rate] | None = None
    """[low, high]: FLOPs per token of the sizes that the fit of this budget takes, the same for all methods; null: all
    sizes. All sizes are trained either way."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window[0] >= self.window[1]:
            raise ValueError(f"window {[*self.window]} must be [low, high] with low < high, in FLOPs per token")
        for key, values in (("head_dim", self.head_dim), ("n_layers", self.n_layers)):
            if values is not None and len(values) not in (1, len(self.d_model)):
                raise ValueError(
                    f"{key} has {len(values)} values for {len(self.d_model)} of d_model; give one, or as many"
                )

    @property
    def sizes(self) -> list[dict[str, int]]:
        """For each size its `d_model` and, where the row has them, `head_dim` and `n_layers`."""
        columns = {"d_model": self.d_model, "head_dim": self.head_dim, "n_layers": self.n_layers}
        given = {key: values * (len(self.d_model) // len(values)) for key, values in columns.items() if values}
        return [dict(zip(given, size, strict=True)) for size in zip(*given.values(), strict=True)]

    @property
    def settings(self) -> set[str]:
        """Those of the `OF_ROWS` that this row gives its cells."""
        return {key for key in OF_ROWS if getattr(self, key) is not None}


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class ClaimsConfig:
    """The comparisons that a study was made for: one family of tests under Holm's correction."""

    method: str
    """The method that is compared."""
    rivals: list[str] = Field(min_length=1)
    """The methods that it is compared with."""
    budgets: Annotated[list[Rate], Field(min_length=1)] | None = None
    """The budgets of the comparisons; null: all budgets of the grid."""
    equal_within: Rate | None = None
    """Nats per token: two methods are called equal if the interval of their difference lies within ± this value; null:
    no methods are called equal."""


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class SweepConfig:
    """A study: the product of methods, (budget, size) pairs, axes and seeds."""

    methods: list[str] = Field(min_length=1)
    """Names of files in conf/ffn."""
    grid: list[GridRow] = Field(min_length=1)
    budgets: Annotated[list[Rate], Field(min_length=1)] | None = None
    """Only these budgets of the grid: for running a study in parts."""
    seeds: list[Seed] = Field(default_factory=lambda: [0], min_length=1)
    axes: dict[str, Values] = Field(default_factory=dict)
    """Any further config keys and the values that each takes."""
    method_axes: dict[str, dict[str, Values]] = Field(default_factory=dict)
    """Axes of one method only, by method."""
    method_settings: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """By method: keys of the configuration with the values that they have in this study, in place of those of the
    method's file. Names of cells do not tell them."""
    baseline: str = "dense"
    """The method that all others are compared with."""
    min_sizes: Positive = MIN_SIZES
    """Fewest sizes for a method's curve at a budget; with fewer it is compared at each size that it shares."""
    claims: ClaimsConfig | None = None
    """What the study claims; null: every method against the baseline where there are curves."""
    trend_from: Rate | None = None
    """Smallest budget that the growth of multipliers uses; null: the smallest of the grid."""
    held_out: list[Positive] = Field(default_factory=list)
    """Widths (d_model) that test a law of learning rates, and that it is not fitted to."""
    rates_cost: Rate | None = None
    """Nats per token that a method may lose through its learning rates: what the law of rates lost on runs that it was
    not fitted to, in a study named by a comment beside this key. It is added to the errors of a method at a budget
    where the grid has no bracket (`axes: {optim.lr_factor: [0.5, 2.0]}`); null: it is left out."""

    def __post_init__(self) -> None:
        claims, budgets = self.claims, {row.budget for row in self.grid}
        widths = {width for row in self.grid for width in row.d_model}
        named: list[tuple[str, Sequence[Any] | Mapping[str, Any], set[Any]]] = [
            ("method_axes", self.method_axes, {*self.methods}),
            ("method_settings", self.method_settings, {*self.methods}),
            ("baseline", [self.baseline], {"dense", *self.methods}),
            ("claims.method", [claims.method] if claims else [], {*self.methods}),
            ("claims.rivals", claims.rivals if claims else [], {*self.methods} - {claims.method if claims else ""}),
            ("claims.budgets", (claims and claims.budgets) or [], budgets),
            ("budgets", self.budgets or [], budgets),
            ("trend_from", [self.trend_from] if self.trend_from else [], budgets),
            ("held_out", self.held_out, widths),
            *((f"grid.{n}.methods", row.methods or [], {*self.methods}) for n, row in enumerate(self.grid)),
        ]
        for where, names, allowed in named:
            if wrong := [name for name in names if name not in allowed]:
                raise ValueError(f"{where} names {wrong[0]}, but there are {', '.join(map(str, sorted(allowed)))}")
            if len({*names}) < len(names):
                raise ValueError(f"{where} has a value twice: {', '.join(map(str, names))}")
        for where, keys in self._keys():
            if both := [key for key in keys if key in OF_GRID]:
                raise ValueError(f"{where} has {both[0]}, which methods, grid and seeds vary")
        for row in self.grid:
            of_study = {key for method in row.methods or self.methods for key in self.axes_of(method)}
            if both := {*row.axes, *row.settings} & of_study or row.axes.keys() & row.settings:
                raise ValueError(f"{min(both)} is varied by axes and has another value in a row of the grid")
        for budget in sorted(budgets):
            if len({row.window for row in self.grid if row.budget == budget and row.window}) > 1:
                raise ValueError(f"grid has several windows at {budget:g}: a budget has one")
        self._check_brackets()

    def _keys(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Every section of axes or settings, with its name."""
        yield "axes", self.axes
        yield from ((f"method_axes.{method}", axes) for method, axes in self.method_axes.items())
        yield from ((f"method_settings.{method}", keys) for method, keys in self.method_settings.items())
        yield from ((f"grid.{n}.axes", row.axes) for n, row in enumerate(self.grid))

    def _check_brackets(self) -> None:
        """Refuse rows that bracket the rate of a cell if no row trains that cell at its usual rate."""
        usual, brackets = set(), set()
        for row in self.grid:
            sizes = (tuple(size.items()) for size in row.sizes)
            cells = itertools.product(
                [row.budget], sizes, row.methods or self.methods, row.seeds or self.seeds, [row.batch_sequences]
            )
            (usual if 1 in row.axes.get(RATE_FACTOR, [1]) else brackets).update(cells)
        if alone := brackets - usual:
            budget, size, method, seed, _ = min(alone, key=str)
            cell = f"{method}, d_model {dict(size)['d_model']}, seed {seed} at {budget:g}"
            raise ValueError(f"grid has {RATE_FACTOR} for {cell}, but no row trains that cell at its usual rate")

    @property
    def rows(self) -> list[GridRow]:
        """The rows of the grid that are to be planned."""
        return [row for row in self.grid if self.budgets is None or row.budget in self.budgets]

    @property
    def varied(self) -> set[str]:
        """The keys of the configuration that some cells have from this section."""
        return {
            *OF_GRID,
            *(key for row in self.grid for key in row.settings),
            *(k for _, keys in self._keys() for k in keys),
        }

    def axes_of(self, method: str, row: GridRow | None = None) -> dict[str, list[Any]]:
        """The axes of a method's cells, in a row or in all."""
        return {**self.axes, **self.method_axes.get(method, {}), **(row.axes if row else {})}

    def given_to_all(self, method: str) -> set[str]:
        """The keys of the configuration that every cell of a method has from the axes and the grid."""
        rows = [row for row in self.grid if method in (row.methods or self.methods)]
        return (
            {*OF_GRID, *set.intersection(*({*self.axes_of(method, row), *row.settings} for row in rows))}
            if rows
            else set()
        )

    def window(self, budget: float) -> tuple[float, float] | None:
        """Lowest and highest FLOPs per token of the sizes that the fit of `budget` uses; None: all sizes."""
        return next((row.window for row in self.grid if row.budget == budget and row.window is not None), None)


_SWEEP: TypeAdapter[SweepConfig] = TypeAdapter(SweepConfig)

OF_RESULTS = ("baseline", "claims", "trend_from", "held_out", "rates_cost")
"""Keys that say what is computed from the results of a study's cells; they hold as the study's file has them."""


def load_sweep(sweep: str | Path | StudyFile, overrides: Sequence[str] = ()) -> SweepConfig:
    """The `sweep` section of a study; with overrides such as `sweep.budgets=[1e12]` the cells of this part of it.

    Other overrides are ignored. A part has no `OF_RESULTS`.

    Raises:
        ConfigError: the file or the overrides describe no study.
    """
    file = sweep if isinstance(sweep, StudyFile) else read_study(sweep)
    where = f"{file.path.name}: sweep."
    names = [field.name for kind in (SweepConfig, GridRow, ClaimsConfig) for field in fields(kind)]
    study = parse(_SWEEP, file.sweep, where, names)
    chosen = overridden(overrides, "sweep")
    if of_results := [key for key in chosen if key in OF_RESULTS]:
        raise ConfigError(f"{where}{of_results[0]} is about results and cannot be overridden: change the file")
    if not chosen:
        return study
    tree = {key: value for key, value in file.sweep.items() if key not in OF_RESULTS} | chosen
    if isinstance(methods := chosen.get("methods"), list):
        others = {*study.methods} - {*methods}
        for key in {"method_axes", "method_settings"} & tree.keys():
            tree[key] = {method: keys for method, keys in tree[key].items() if method not in others}
        rows = [
            {**row, "methods": [method for method in row["methods"] if method not in others]}
            if "methods" in row
            else row
            for row in tree["grid"]
        ]
        tree["grid"] = [row for row in rows if row.get("methods", True)]
    return parse(_SWEEP, tree, where, names)
