"""The `sweep` section of a study file: the cells of a study, and the questions that its statistics answer."""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from peerscale.config.compose import compose, of_section, read_study, sweep_file
from peerscale.config.errors import ConfigError, parse
from peerscale.config.schema import hydra_errors
from peerscale.records.cell_names import RATE_FACTOR
from peerscale.types import STRICT, Positive, Rate, Seed

Values = Annotated[list[Any], Field(min_length=1)]


def _pair(value: Any) -> Any:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"[low, high] in FLOPs per token, not {value!r}")
    return value


Window = Annotated[tuple[Rate, Rate], BeforeValidator(_pair)]


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class GridRow:
    """One budget of a study and the sizes to train there."""

    budget: Rate
    sizes: list[str] = Field(min_length=1)
    seeds: Annotated[list[Seed], Field(min_length=1)] | None = None
    """Replace the study's seeds in this row, such as further seeds of one size."""
    methods: Annotated[list[str], Field(min_length=1)] | None = None
    """Only these of the study's methods."""
    axes: dict[str, Values] = Field(default_factory=dict)
    """Further keys that vary in this row only, such as rates around the usual one."""
    batch_sequences: Positive | None = None
    """Sequences of a batch in this row, where the best batch depends on the budget; null: those of the configuration.
    Names of cells and methods do not tell it."""
    window: Window | None = None
    """[low, high]: FLOPs per token of the sizes that the fit of this budget takes, the same for all methods; null: all
    sizes. All sizes are trained either way."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window[0] >= self.window[1]:
            low, high = self.window
            raise ValueError(f"window [{low:g}, {high:g}] must be [low, high] with low < high, in FLOPs per token")
        if self.batch_sequences and "batch_sequences" in self.axes:
            raise ValueError("a row has either one value of batch_sequences or an axis of it, not both")


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
    min_sizes: Positive = 5
    """Sizes that every method needs at every budget: five points for a parabola."""
    claims: ClaimsConfig | None = None
    """What the study claims; null: PEER against every other method where there are curves."""
    branches: bool = False
    """Whether the runs of one model at several budgets share their common steps (needs `optim.schedule: wsd`): the
    longest run is trained first and leaves checkpoints, from which the others start their decay."""
    trend_from: Rate | None = None
    """Smallest budget that the growth of multipliers and the forecasts use; null: the smallest of the grid."""
    held_out: list[str] = Field(default_factory=list)
    """Sizes that test a law of learning rates, and that it is not fitted to."""
    rates_cost: Rate | None = None
    """Nats per token that a method may lose through its learning rates: what the law of rates lost on runs that it was
    not fitted to, in a study named by a comment beside this key. It is added to the errors of a method at a budget
    where the grid has no bracket (`axes: {optim.lr_factor: [0.5, 2.0]}`); null: it is left out."""

    def __post_init__(self) -> None:
        methods, grid = set(self.methods), {row.budget for row in self.grid}
        if unknown := sorted(self.method_axes.keys() - methods):
            raise ValueError(f"method_axes names {', '.join(unknown)}, but the methods are {', '.join(self.methods)}")
        for row in self.grid:
            if unknown := [name for name in row.methods or () if name not in methods]:
                raise ValueError(
                    f"grid names {unknown[0]} at {row.budget:g}, but the methods are {', '.join(self.methods)}"
                )
        if unknown := sorted({*self.held_out} - {size for row in self.grid for size in row.sizes}):
            raise ValueError(f"held_out names {unknown[0]}, a size that the grid does not have")
        axes = {key for each in (self.axes, *self.method_axes.values()) for key in each}
        if "batch_sequences" in axes and any(row.batch_sequences for row in self.grid):
            raise ValueError("batch_sequences is an axis, so no row of the grid may have a value of it")
        self._check_brackets()
        claims = self.claims
        for where, named in (
            ("budgets", self.budgets),
            ("claims.budgets", claims.budgets if claims else None),
            ("trend_from", [self.trend_from] if self.trend_from else None),
        ):
            if absent := sorted(set(named or ()) - grid):
                there = ", ".join(f"{budget:g}" for budget in sorted(grid))
                raise ValueError(f"{where} names {absent[0]:g}, but the grid has {there}")
        if claims is not None:
            if unknown := [name for name in (claims.method, *claims.rivals) if name not in methods]:
                raise ValueError(f"claims names {unknown[0]}, but the methods are {', '.join(self.methods)}")
            if claims.method in claims.rivals:
                raise ValueError(f"claims names {claims.method} as its own rival")
            for key, values in (("rivals", claims.rivals), ("budgets", claims.budgets or [])):
                if len(set(values)) < len(values):
                    raise ValueError(f"claims.{key} has a value twice: {', '.join(map(str, values))}")
        for budget in sorted(grid):
            windows = {row.window for row in self.grid if row.budget == budget and row.window is not None}
            if len(windows) > 1:
                first, second, *_ = (f"[{low:g}, {high:g}]" for low, high in sorted(windows))
                raise ValueError(f"grid has the windows {first} and {second} at {budget:g}: a budget has one")

    def _check_brackets(self) -> None:
        """Refuse rows that bracket the rate of a cell if no row trains that cell at its usual rate."""
        usual: set[tuple[float, str, str, int, int | None]] = set()
        brackets: dict[tuple[float, str, str, int, int | None], None] = {}
        for row in self.grid:
            methods, seeds = row.methods or self.methods, row.seeds or self.seeds
            cells = itertools.product([row.budget], row.sizes, methods, seeds, [row.batch_sequences])
            if 1 in row.axes.get(RATE_FACTOR, [1]):
                usual.update(cells)
            else:
                brackets.update(dict.fromkeys(cells))
        if usual and (alone := next((cell for cell in brackets if cell not in usual), None)):
            budget, size, method, seed, batch = alone
            cell = f"{method}, {size}, seed {seed}" + f", batch_sequences {batch}" * bool(batch)
            raise ValueError(
                f"grid has {RATE_FACTOR} for {cell} at {budget:g}, but no row trains that cell at its usual rate: "
                "add one, or take it out"
            )

    @property
    def rows(self) -> list[GridRow]:
        """The rows of the grid that are to be planned."""
        return [row for row in self.grid if self.budgets is None or row.budget in self.budgets]

    def window(self, budget: float) -> tuple[float, float] | None:
        """Lowest and highest FLOPs per token of the sizes that the fit of `budget` uses; None: all sizes."""
        return next((row.window for row in self.grid if row.budget == budget and row.window is not None), None)


_SWEEP: TypeAdapter[SweepConfig] = TypeAdapter(SweepConfig)


def parse_sweep(tree: Mapping[str, Any]) -> SweepConfig:
    """The `sweep` section of a sweep file; raises `ConfigError`."""
    return parse(_SWEEP, SweepConfig, tree, "sweep")


OF_RESULTS = ("claims", "trend_from", "held_out", "rates_cost")
"""Keys that say what is computed from the results of a study's cells; they hold as the study's file has them."""


def load_sweep(sweep: str | Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """The `sweep` section of a study; with overrides such as `sweep.budgets=[1e12]` the cells of this part of it.

    Other overrides are ignored. A part has no `OF_RESULTS`.

    Raises:
        ConfigError: the file or the overrides describe no study.
    """
    study = parse_sweep(_section(sweep_file(sweep)))
    chosen = [f"++{o.lstrip('+')}" for o in overrides if of_section(o, "sweep")]  # without ++ Hydra adds no key
    if not chosen:
        return study
    _refuse_repeated(chosen)
    for override in chosen:
        if (key := re.split("[.=]", override)[1]) in OF_RESULTS:
            raise ConfigError(f"sweep.{key} is about results and cannot be overridden: change {sweep_file(sweep)}")
    with hydra_errors(chosen, sweep):
        tree = compose(chosen, sweep=sweep).tree["sweep"]
    if isinstance(chosen_methods := tree.get("methods"), list):
        _leave_out(tree, {method for method in study.methods if method not in chosen_methods})
        if not tree["grid"]:
            names = ", ".join(map(str, tree["methods"]))
            raise ConfigError(f"every row of the grid names its methods, and none has {names}: add rows to {sweep}")
    return parse_sweep({key: value for key, value in tree.items() if key not in OF_RESULTS})


def _leave_out(tree: dict[str, Any], methods: set[str]) -> None:
    """Remove from a `sweep` section everything that concerns only these methods."""
    if isinstance(tree.get("method_axes"), dict):
        tree["method_axes"] = {name: axes for name, axes in tree["method_axes"].items() if name not in methods}
    rows = []
    for row in tree.get("grid") or ():
        if isinstance(row, dict) and isinstance(row.get("methods"), list):
            row = {**row, "methods": [name for name in row["methods"] if name not in methods]}
            if not row["methods"]:
                continue
        rows.append(row)
    tree["grid"] = rows


def _section(file: Path) -> Any:
    """The `sweep` section of a file; Hydra, which is slow, composes it only if the file does not hold all of it."""
    with hydra_errors(sweep=file):
        study = read_study(file)
        if "defaults" in study or "${" in str(study.get("sweep")):
            study = compose(sweep=file).tree
            if "budget" not in study:
                raise ConfigError(
                    f"{file.name}: its defaults leave out conf/config.yaml: write config first in that list"
                )
    if "sweep" not in study:
        raise ConfigError(f"{file}: no `sweep:` section")
    return study["sweep"]


def _refuse_repeated(overrides: Sequence[str]) -> None:
    """Refuse a key that is given twice: a shell splits an override with braces and a comma inside into two."""
    values: dict[str, str] = {}
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key in values:
            raise ConfigError(
                f"{key} is given twice, as {values[key]} and {value}; if the shell split one value in braces, quote "
                f"it once more: OVERRIDES=\"'{key}=...'\""
            )
        values[key] = value
