"""An entrant of the standing table, and the cells of each stage of its protocol (docs/standing-table.md).

The protocol is a generator: it yields the cells of a stage and is sent their losses, by cell name, which decide the
next stage. Whoever drives it runs the cells, or looks up their records: both ways give the same cells.
"""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass as checked_dataclass
from scipy.stats import qmc

from peerscale.config.compose import composed, value_at
from peerscale.config.errors import ConfigError, hydra_errors, parse
from peerscale.config.study_file import StudyFile
from peerscale.files import OURS, ROOT
from peerscale.layers.registry import parse_layer
from peerscale.plan.cell import Cell
from peerscale.plan.cells import planned_cells
from peerscale.plan.cost import cost
from peerscale.types import STRICT

Losses = Mapping[str, float]
"""`val_loss` of finished cells by name; a cell that is not there was dropped or diverged."""
Settings = dict[str, Any]
"""Values of an entrant's space by key of the configuration."""
Stages = Generator[list[Cell], Losses, Settings]
"""Cells of each stage out, their losses in, and what was chosen at the end."""

LayerKey = Annotated[str, Field(pattern=r"^ffn\.")]
"""A key of the layer: all others, but for rates, are the same for all entrants."""
Choice = Annotated[list[dict[LayerKey, Any]], Field(min_length=1, max_length=4)]

PREFIX = "standing_"
"""What the names of entrants' studies, and so of their folders in runs/, begin with."""

TUNING_BUDGET, TUNING_SIZE = 1e13, 64
N_TRIALS, N_MORE = 12, 4
FINALISTS = 3
TRIAL_SEED, FINAL_SEEDS = 200, [201, 202]
SEEDS = [0, 1, 2]
LR_RANGE, TABLE_LR_RANGE = 16.0, 30.0
"""Largest rate tried over the smallest; the usual rate of the layer's file is in the middle of both."""
EDGE = 1 / 6
"""Share of a range, in its logarithm, that counts as its end."""
EXTENSION = 4.0
"""By how much a range is extended beyond an end at which the choice lies."""

STEPS = {"optim.lr_factor": 2.0, "optim.table_lr": 3.0}
"""Above the budget of tuning each rate is divided and multiplied by this."""

SIZES = {1e13: [48, 64, 80], 3e13: [80, 96, 112], 1e14: [112, 128]}
"""Widths (d_model) of an entrant by budget."""
REFERENCE_SIZES = {
    5e12: [32, 48, 64, 80], 1e13: [32, 48, 64, 80, 96], 3e13: [64, 80, 96, 112, 128], 1e14: [96, 112, 128, 144],
    2e14: [128, 160, 192, 224],
}  # fmt: skip
"""Those of the reference."""

MOST_PARAMETERS = 10
"""How many times the parameters of dense a model may have."""

RATE, TABLE_RATE = "optim.lr_factor", "optim.table_lr"
SETTINGS: dict[str, Any] = {
    "batch_sequences": 32, "context": 64, "n_layers": 4, "head_dim": 16, "data": {"vocab_size": 2048},
}  # fmt: skip
"""Keys of the configuration that are the same for all entrants."""
OF_TUNING: dict[str, Any] = {
    "val_set": "tuning", "evaluation": {"tuning": 131072, "validation": 0, "speeches": 0, "wikipedia": 0}
}  # fmt: skip


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class Entrant:
    """A layer, where it sits, and the space in which it is tuned: `sweeps/standing/<name>.yaml`."""

    layer: str
    """Name of the layer's file in conf/ffn."""
    replaced: str | list[int] = field(default_factory=lambda: [2, 4])
    """Blocks that the layer takes; as the configuration's `replaced`."""
    choice: Choice = field(default_factory=lambda: [{}])
    """The further choice: settings of the layer, such as `{ffn.n_heads: 1, ffn.top_k: 64}`; `{}`: the usual ones."""
    reference: bool = False
    """Whether all rows are compared with this one."""
    mark: str = ""
    """What a reader of its row must know, such as `control`."""
    first_seed: int = 0
    """Added to all seeds, of a control that trains the whole row of another entrant again."""


def read_entrant(name: str) -> Entrant:
    """The entrant of a name: that of `sweeps/standing/<name>.yaml`, or else a layer of conf/ffn with the usual space.

    Raises:
        ConfigError: the file describes no entrant, or there is no such layer.
    """
    from omegaconf import OmegaConf

    file = entrant_files().get(name)
    if file is None:
        return Entrant(layer=name)
    with hydra_errors(file.name):
        tree: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    return parse_entrant(tree, f"{file.name}: ")


def parse_entrant(tree: Any, where: str) -> Entrant:
    """An entrant from its declaration; raises `ConfigError` with `where` before the key."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}input should be a mapping")
    return parse(TypeAdapter(Entrant), tree, where)


def entrant_files() -> dict[str, Path]:
    """The files of entrants by name: ours, those of the checkout, and those of the current folder."""
    folders = (OURS, ROOT, Path.cwd())
    return {path.stem: path for folder in folders for path in sorted((folder / "sweeps" / "standing").glob("*.yaml"))}


def reference_name() -> str | None:
    """The entrant that all rows are compared with; None while there is none."""
    return next((name for name in entrant_files() if read_entrant(name).reference), None)


def dense_layer() -> str:
    """The dense layer in the blocks that an entrant leaves: that of the reference, or `dense` while there is none."""
    name = reference_name()
    return read_entrant(name).layer if name else "dense"


@dataclass(frozen=True)
class Space:
    """The space of an entrant's trials."""

    ranges: Mapping[str, tuple[float, float]]
    """Lowest and highest value of each rate."""
    choice: Sequence[Settings]

    @classmethod
    def of(cls, entrant: Entrant) -> "Space":
        """The space around the usual rates of the entrant's layer."""
        table_lr = value_at(composed([f"ffn={entrant.layer}"], resolve=False).tree, TABLE_RATE)
        ranges = {RATE: _around(1.0, LR_RANGE)}
        return cls(ranges | ({TABLE_RATE: _around(table_lr, TABLE_LR_RANGE)} if table_lr else {}), entrant.choice)

    def points(self, first: int, n: int) -> list[Settings]:
        """`n` points of the Halton sequence, from the `first`; rates to three digits."""
        sequence = qmc.Halton(d=len(self.ranges) + 1, scramble=False).fast_forward(1 + first)  # it begins with zeros
        found = []
        for *rates, which in sequence.random(n):
            ends = zip(self.ranges.items(), rates, strict=True)
            point = {key: _rounded(low * (high / low) ** u) for (key, (low, high)), u in ends}
            found.append(point | self.choice[int(which * len(self.choice))])
        return found

    def beyond(self, point: Settings) -> "Space | None":
        """The space beyond the ends of the ranges at which a point lies; None if it lies at none."""
        ranges = dict(self.ranges)
        for key, (low, high) in self.ranges.items():
            place = math.log(point[key] / low) / math.log(high / low)
            if not EDGE <= place <= 1 - EDGE:
                ranges[key] = (low / EXTENSION, low) if place < EDGE else (high, high * EXTENSION)
        return None if ranges == self.ranges else Space(ranges, self.choice)


def _dense_params(cell: Cell) -> int:
    """Parameters of the model with the same d_model that has GELU in all blocks."""
    return cost(replace(cell.config, ffn=parse_layer({"method": "dense"}), replaced="all")).params_total


def _around(usual: float, width: float) -> tuple[float, float]:
    return usual / math.sqrt(width), usual * math.sqrt(width)


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


class Placing(NamedTuple):
    """The runs of one entrant."""

    name: str
    entrant: Entrant
    overrides: Sequence[str] = ()
    """Of every cell, such as where runs are kept."""

    def cells(
        self, points: Sequence[Settings], budget: float, sizes: Sequence[int], seeds: Sequence[int]
    ) -> list[Cell]:
        """The cells of some points of the space at every size and seed, point by point."""
        grid = [
            {"budget": budget, "d_model": [*sizes], "axes": {key: [value] for key, value in point.items()}}
            for point in points
        ]
        data = SETTINGS["data"] | (OF_TUNING if seeds[0] >= TRIAL_SEED else {})
        study = StudyFile(
            path=Path(f"{PREFIX}{self.name}.yaml"),
            defaults=[],
            settings=SETTINGS | {"dense": dense_layer(), "replaced": self.entrant.replaced, "data": data},
            sweep={
                "methods": [self.entrant.layer],
                "min_sizes": 1,
                "grid": grid,
                "seeds": [self.entrant.first_seed + seed for seed in seeds],
            },
        )
        cells = planned_cells(study, self.overrides)
        if large := [cell for cell in cells if cell.plan.cost.params_total > MOST_PARAMETERS * _dense_params(cell)]:
            has = f"{large[0].name} has {large[0].plan.cost.params_total:,} parameters"
            raise ConfigError(f"{has}, more than {MOST_PARAMETERS} times those of dense, {_dense_params(large[0]):,}")
        return cells

    def tuning(self) -> Stages:
        """Trials, then new seeds of the best, which choose; once more in a wider space if the choice lies at an end.

        Raises:
            ConfigError: no trial has finished with a loss.
        """
        space = Space.of(self.entrant)
        trials = yield from self._losses(space.points(0, N_TRIALS), [TRIAL_SEED])
        chosen = yield from self._best(trials)
        if wider := space.beyond(chosen):
            trials += yield from self._losses(wider.points(N_TRIALS, N_MORE), [TRIAL_SEED])
            chosen = yield from self._best(trials)
        return chosen

    @property
    def sizes(self) -> dict[float, list[int]]:
        """Widths (d_model) by budget."""
        return REFERENCE_SIZES if self.entrant.reference else SIZES

    def row(self, budget: float, chosen: Settings) -> Stages:
        """Above the budget of tuning, the rates around the chosen ones, of which the best is taken; then all runs."""
        sizes = self.sizes[budget]
        if budget > TUNING_BUDGET:
            around = [
                chosen | {key: _rounded(chosen[key] * factor)}
                for key, step in STEPS.items()
                if key in chosen
                for factor in (1 / step, step)
            ]
            losses = yield from self._losses([chosen, *around], [TRIAL_SEED], budget, sizes[len(sizes) // 2])
            chosen = min(losses, key=lambda trial: trial[1])[0]
        yield self.cells([chosen], budget, sizes, SEEDS)
        return chosen

    def _best(self, trials: Sequence[tuple[Settings, float]]) -> Generator[list[Cell], Losses, Settings]:
        """The best of the finalists by the mean over new seeds, which do not know the losses of the trials."""
        best = sorted((trial for trial in trials if math.isfinite(trial[1])), key=lambda trial: trial[1])[:FINALISTS]
        if not best:
            raise ConfigError(f"no trial of {self.name} has a loss: all were dropped or diverged")
        finals = yield from self._losses([point for point, _ in best], FINAL_SEEDS)
        return min(finals, key=lambda final: final[1])[0]

    def _losses(
        self, points: Sequence[Settings], seeds: Sequence[int], budget: float = TUNING_BUDGET, size: int = TUNING_SIZE
    ) -> Generator[list[Cell], Losses, list[tuple[Settings, float]]]:
        """Each point with its mean loss over seeds; infinite if a seed has none."""
        cells = self.cells(points, budget, [size], seeds)
        losses = yield cells
        each = [losses.get(cell.name, math.inf) for cell in cells]
        return [
            (point, math.fsum(each[n * len(seeds) : (n + 1) * len(seeds)]) / len(seeds))
            for n, point in enumerate(points)
        ]


def drive(stages: Stages, run: Callable[[Sequence[Cell]], Losses]) -> Settings:
    """Go through the stages of a protocol with the losses that `run` finds for their cells; returns what it chose."""
    try:
        cells = next(stages)
        while True:
            cells = stages.send(run(cells))
    except StopIteration as end:
        return end.value
