"""The `sweep` section of a study file: the cells of a study, and the questions that its statistics answer."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from peerscale.config.compose import overridden
from peerscale.config.errors import ConfigError, parse
from peerscale.config.study_file import StudyFile, read_study
from peerscale.types import STRICT, Positive, Rate, Seed

RATE_FACTOR = "optim.lr_factor"
"""The axis of cells that bracket a learning rate: the same cell at a multiple of its rate."""

MIN_SIZES = 4
"""Sizes for a method's curve at a budget if a study asks for no other number: one more than a parabola has
coefficients."""


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, int | str) else value


Methods = Annotated[list[str], Field(min_length=1)]
Budgets = Annotated[list[Rate], Field(min_length=1)]
Seeds = Annotated[list[Seed], Field(min_length=1)]
Sizes = Annotated[list[Positive], BeforeValidator(_as_list), Field(min_length=1)]
Axes = dict[str, Annotated[list[Any], Field(min_length=1)]]
"""Dotted keys of the configuration and the values that each takes."""


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
    seeds: Seeds | None = None
    """Replace the study's seeds in this row, such as further seeds of one size."""
    methods: Methods | None = None
    """Only these of the study's methods."""
    axes: Axes = Field(default_factory=dict)
    """Keys that vary in this row only, such as rates around the usual one; they replace the study's values."""
    batch_sequences: Positive | None = None
    """Sequences of a batch in this row, where the best batch depends on the budget; null: those of the configuration.
    Names of cells and methods do not tell it."""

    def __post_init__(self) -> None:
        for key, values in (("head_dim", self.head_dim), ("n_layers", self.n_layers)):
            if values is not None and len(values) not in (1, len(self.d_model)):
                raise ValueError(
                    f"{key} has {len(values)} values for {len(self.d_model)} of d_model; give one, or as many"
                )

    @property
    def sizes(self) -> list[dict[str, int]]:
        """For each size the keys that this row gives: `d_model` and, where it has them, the others."""
        columns = {"d_model": self.d_model, "head_dim": self.head_dim, "n_layers": self.n_layers}
        columns["batch_sequences"] = [self.batch_sequences] if self.batch_sequences else None
        given = {key: values * (len(self.d_model) // len(values)) for key, values in columns.items() if values}
        return [dict(zip(given, size, strict=True)) for size in zip(*given.values(), strict=True)]


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class ClaimsConfig:
    """The comparisons that a study was made for: one family of tests under Holm's correction."""

    method: str
    """The method that is compared."""
    rivals: Methods
    """The methods that it is compared with."""
    budgets: Budgets | None = None
    """The budgets of the comparisons; null: all budgets of the grid."""
    equal_within: Rate | None = None
    """Nats per token: two methods are called equal if the interval of their difference lies within ± this value; null:
    no methods are called equal."""


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class Part:
    """What overrides such as `sweep.budgets=[1e12]` choose of a study; null: all of it."""

    methods: Methods | None = None
    """In place of the study's methods; a row with methods of its own keeps those of them that are named here."""
    budgets: Budgets | None = None
    seeds: Seeds | None = None
    """In place of the study's seeds, with rows as for methods."""


class Point(NamedTuple):
    """A cell of a study before it is planned."""

    method: str
    keys: dict[str, Any]
    """Dotted keys of the configuration that this cell has from the study: its size, budget, seed and axes."""
    axes: dict[str, Any]
    """Those that are axes of all rows."""
    row_axes: dict[str, Any]
    """Those that are axes of its row."""


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class SweepConfig:
    """A study: the product of methods, (budget, size) pairs, axes and seeds."""

    methods: Methods
    """Names of files in conf/ffn."""
    grid: list[GridRow] = Field(min_length=1)
    seeds: Seeds = Field(default_factory=lambda: [0])
    axes: Axes = Field(default_factory=dict)
    """Any further config keys and the values that each takes."""
    method_axes: dict[str, Axes] = Field(default_factory=dict)
    """Axes of one method only, by method."""
    method_settings: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """By method: keys of the configuration with the values that they have in this study, in place of those of the
    method's file. Names of cells do not tell them."""
    baseline: str = "dense"
    """The method that all others are compared with."""
    min_sizes: Positive = MIN_SIZES
    """Fewest sizes for a method's curve at a budget; with fewer it is compared at each size that it shares."""
    claims: ClaimsConfig | None = None
    """What the study claims; null: nothing."""
    trend_from: Rate | None = None
    """Smallest budget that the growth of multipliers uses; null: the smallest of the grid."""
    held_out: list[Positive] = Field(default_factory=list)
    """Widths (d_model) that test a law of learning rates, and that it is not fitted to."""
    rates_cost: Rate | None = None
    """Nats per token that a method may lose through its learning rates: what the law of rates lost on runs that it was
    not fitted to, in a study named by a comment beside this key. It is added to the errors of a method at a budget
    where the grid has no bracket (`axes: {optim.lr_factor: [0.5, 2.0]}`); null: it is left out."""

    def __post_init__(self) -> None:
        claims, methods, budgets = self.claims, {*self.methods}, {row.budget for row in self.grid}
        named: list[tuple[str, Sequence[Any] | Mapping[str, Any], set[Any]]] = [
            ("method_axes", self.method_axes, methods),
            ("method_settings", self.method_settings, methods),
            ("baseline", [self.baseline], {"dense", *methods}),
            ("claims.method", [claims.method] if claims else [], methods),
            ("claims.rivals", claims.rivals if claims else [], methods - {claims.method if claims else ""}),
            ("claims.budgets", (claims and claims.budgets) or [], budgets),
            ("trend_from", [self.trend_from] if self.trend_from else [], budgets),
            ("held_out", self.held_out, {width for row in self.grid for width in row.d_model}),
            *((f"grid.{n}.methods", row.methods or [], methods) for n, row in enumerate(self.grid)),
        ]
        given = {"d_model", "budget", "seed"}.union(*(row.sizes[0] for row in self.grid))
        settings: list[tuple[str, Mapping[str, Any]]] = [
            ("axes", self.axes),
            *((f"method_axes.{method}", axes) for method, axes in self.method_axes.items()),
            *((f"method_settings.{method}", values) for method, values in self.method_settings.items()),
            *((f"grid.{n}.axes", row.axes) for n, row in enumerate(self.grid)),
        ]
        for where, keys in settings:
            if both := given & keys.keys():
                raise ValueError(f"{where} gives {min(both)}, which rows of the grid give")
        for where, names, allowed in named:
            if wrong := [name for name in names if name not in allowed]:
                raise ValueError(f"{where} names {wrong[0]}, but there are {', '.join(map(str, sorted(allowed)))}")

    def points(self, part: Part) -> Iterator[Point]:
        """The cells of a part of the study, by method and row. Two rows may give the same cell."""
        for method, row in itertools.product(part.methods or self.methods, self.grid):
            if method not in (row.methods or [method]) or row.budget not in (part.budgets or [row.budget]):
                continue
            seeds = part.seeds or self.seeds
            if row.seeds:
                seeds = [seed for seed in row.seeds if seed in (part.seeds or row.seeds)]
            axes = {**self.axes, **self.method_axes.get(method, {}), **row.axes}
            for size, values, seed in itertools.product(row.sizes, itertools.product(*axes.values()), seeds):
                own = dict(zip(axes, values, strict=True))
                keys = {**size, "budget": row.budget, "seed": seed, **own}
                row_axes = {key: own[key] for key in row.axes}
                yield Point(method, keys, {key: own[key] for key in own if key not in row_axes}, row_axes)


_SWEEP, _PART = TypeAdapter(SweepConfig), TypeAdapter(Part)
_KEYS = [field.name for kind in (SweepConfig, GridRow, ClaimsConfig) for field in fields(kind)]


def load_sweep(sweep: str | Path | StudyFile) -> SweepConfig:
    """The `sweep` section of a study; raises `ConfigError` if the file describes none."""
    file = sweep if isinstance(sweep, StudyFile) else read_study(sweep)
    return parse(_SWEEP, file.sweep, f"{file.path.name}: sweep.", _KEYS)


def part_of(overrides: Sequence[str]) -> Part:
    """The part of a study that overrides such as `sweep.budgets=[1e12]` choose; other overrides are ignored."""
    given = overridden([override for override in overrides if override.lstrip("+~").startswith("sweep.")])
    choices = [f"sweep.{field.name}" for field in fields(Part)]
    if wrong := [key for key in given if key not in choices]:
        raise ConfigError(f"{wrong[0]} cannot be overridden, only {', '.join(choices)}; edit the study's file")
    return parse(_PART, {key.removeprefix("sweep."): value for key, value in given.items()}, "sweep.")
