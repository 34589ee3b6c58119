"""Estimates of how long cells will take, from earlier runs."""

import contextlib
import csv
import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from peerscale.config.schema import Config
from peerscale.plan.cell import Cell
from peerscale.plan.memory import recomputed_share
from peerscale.plan.plan import Plan
from peerscale.records.machine import cpu_name
from peerscale.records.outcome import Outcome
from peerscale.records.record import RECORD, Record, Status, read_record
from peerscale.records.study import RESULTS

GUESS_FLOPS_PER_S = 1.5e10
"""One core of a 2023 server, d_model about 32; used if there are no records at all."""

OVERHEAD_S = 1.0
"""Time to start and close a cell."""


class Measured(NamedTuple):
    """The speed of one finished cell."""

    name: str
    """Of its layer."""
    flops_per_token: float
    flops_per_s: float
    on: tuple[str, int, int] | None = None
    """Device, number of devices, and threads of each, as far as they matter; None: another machine."""


class Estimate(NamedTuple):
    """How long a cell takes."""

    s: float
    """Seconds of training and evaluation."""
    is_guess: bool
    """Whether no cell of its method has run on this machine as it will."""


def estimates(cells: Sequence[Cell], found: Iterable[Outcome] = (), results: Path = RESULTS) -> dict[str, Estimate]:
    """By cell: the time that it takes on this machine, estimated from all runs beside the study's and in `results`.

    Records that were `found` are not read again.
    """
    known = {outcome.cell.folder: outcome.record for outcome in found if outcome.record}
    speeds = [*measured_speeds(cells[0].folder.parents[1], known), *published_speeds(results)]
    return {cell.name: estimate(cell.config, cell.plan, speeds) for cell in cells}


def estimate(config: Config, plan: Plan, speeds: Iterable[Measured]) -> Estimate:
    """The time that a cell takes by the speeds of cells of its method on the same devices and threads: of those nearest
    in cost, the fastest, since the others shared their cores with other programs.

    Without such cells it is a guess: on GPUs from `share_of_peak`, on a CPU from cells that ran elsewhere, of the same
    method if possible.
    """
    per_token, trainer = plan.cost.flops_per_token, config.trainer
    on_gpu = trainer.accelerator == "gpu"
    here = ("cuda", trainer.devices, 0) if on_gpu else ("cpu", trainer.devices, trainer.threads)
    speeds = [speed for speed in speeds if speed.on in (None, here)]
    known = [speed for speed in speeds if speed.on and speed.name == config.ffn.name]
    guess = not known
    if guess and not on_gpu:
        elsewhere = [speed for speed in speeds if speed.on is None]
        known = [speed for speed in elsewhere if speed.name == config.ffn.name] or elsewhere
    rate = trainer.device_flops_per_s * share_of_peak(config) * trainer.devices if on_gpu else GUESS_FLOPS_PER_S
    if known:
        away = {speed: round(abs(math.log(speed.flops_per_token / per_token)), 1) for speed in known}
        rate = max(speed.flops_per_s for speed in known if away[speed] == min(away.values()))
    evaluation_flops = plan.evaluation_tokens * per_token / 3  # a forward pass is a third of a training step
    training_flops = plan.flops * (1 + recomputed_share(config, plan.cost))
    return Estimate(OVERHEAD_S + (training_flops + evaluation_flops) / rate, guess)


def share_of_peak(config: Config) -> float:
    """`trainer.device_utilisation`, or the guess for the layer."""
    return config.trainer.device_utilisation or config.ffn.SHARES_OF_PEAK[config.trainer.devices > 1]


def measured_speeds(runs: Path, known: Mapping[Path, Record]) -> list[Measured]:
    """Speeds of the finished cells of all studies under `runs`, run on this machine or on its cluster's GPUs.

    `known` are records that were read already, by folder.
    """
    speeds, hardware = [], cpu_name()
    for path in runs.glob(f"*/*/{RECORD}"):
        # Skip records whose speed cannot be read, such as those of another version: planning must not fail.
        with contextlib.suppress(KeyError, ValueError, OSError):
            record = known.get(path.parent) or read_record(path.parent)
            environment = record.environment if record else {}
            on_gpu = environment.get("device") == "cuda"
            if record and record.status is Status.DONE and (on_gpu or environment["hardware"] == hardware):
                per_token, n_devices = sum(record.flops_per_token.values()), environment.get("n_devices", 1)
                on = ("cuda", n_devices, 0) if on_gpu else ("cpu", n_devices, environment["n_threads"])
                name = _name(record.method, record.variant)
                speeds.append(Measured(name, per_token, record.timing["flops_per_s"], on))
    return speeds


def published_speeds(results: Path) -> list[Measured]:
    """Speeds of the published cells under `results`, which another machine may have run."""
    speeds = []
    for path in results.glob("*/runs.csv"):
        with path.open(encoding="utf-8", newline="") as file, contextlib.suppress(KeyError, ValueError, csv.Error):
            speeds += [
                Measured(_name(row["method"], row["variant"]), float(row["flops_per_token"]), float(row["flops_per_s"]))
                for row in csv.DictReader(file)
                if row["status"] == Status.DONE
            ]
    return speeds


def _name(method: str, variant: str) -> str:
    return f"{method}_{variant}" if variant else method


def makespan_s(seconds: Iterable[float], workers: int) -> float:
    """Time until the last worker ends, if each worker always takes the longest remaining cell."""
    ends = [0.0] * workers
    for cell_s in sorted(seconds, reverse=True):
        heapq.heapreplace(ends, ends[0] + cell_s)
    return max(ends)
