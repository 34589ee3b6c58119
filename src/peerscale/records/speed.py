"""Estimates of how long a cell will take, from earlier records of this machine, or else from published records."""

import contextlib
import csv
import functools
import heapq
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from peerscale.config.schema import Config
from peerscale.plan.memory import recomputed_share
from peerscale.plan.plan import Plan
from peerscale.records.machine import cpu_name
from peerscale.records.record import RECORD, Status
from peerscale.records.study import RESULTS

GUESS_FLOPS_PER_S = 1.5e10
"""One core of a 2023 server, d_model about 32; used if there are no records at all."""

OVERHEAD_S = 1.0
"""Time to start and close a cell."""


class Measured(NamedTuple):
    """The speed of one finished cell."""

    name: str
    flops_per_token: float
    flops_per_s: float
    threads: int = 1
    devices: int = 1
    """Number of devices; ignored in estimates from published cells."""
    device: str = "cpu"
    """Type of the device."""


def measured_speeds(runs: Path) -> list[Measured]:
    """Speeds of the finished cells of all studies under `runs`, run on this machine or on its cluster's GPUs."""
    speeds, hardware = [], cpu_name()
    for path in runs.glob(f"*/*/{RECORD}"):
        # Skip records whose speed cannot be read, such as those of another version: planning must not fail.
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError, OSError):
            record = json.loads(path.read_text(encoding="utf-8"))
            environment = record["environment"]
            device = environment.get("device", "cpu")
            if record["status"] == Status.DONE and (device == "cuda" or environment["hardware"] == hardware):
                flops_per_token, flops_per_s = sum(record["flops_per_token"].values()), record["timing"]["flops_per_s"]
                on = (environment["n_threads"], environment.get("n_devices", 1), device)
                speeds.append(Measured(_name(record), flops_per_token, flops_per_s, *on))
    return speeds


@functools.cache
def published_speeds(results: Path) -> list[Measured]:
    """Speeds of the published cells under `results`, which another machine may have run."""
    speeds = []
    for path in results.glob("*/runs.csv"):
        with path.open(encoding="utf-8", newline="") as file, contextlib.suppress(KeyError, ValueError, csv.Error):
            speeds += [
                Measured(_name(row), float(row["flops_per_token"]), float(row["flops_per_s"]))
                for row in csv.DictReader(file)
                if row["status"] == Status.DONE
            ]
    return speeds


def _name(row: Mapping[str, str]) -> str:
    return f"{row['method']}_{row['variant']}" if row["variant"] else row["method"]


def estimate_s(config: Config, plan: Plan, speeds: list[Measured], results: Path = RESULTS) -> tuple[float, bool]:
    """Seconds for training and evaluation, and whether that is a guess.

    The estimate uses the cells in `speeds` with the same method, threads and devices: of those nearest in cost, the
    fastest, since the others shared their cores with other programs. Without such cells it is a guess: on GPUs from
    `trainer.device_utilisation`, on a CPU from the cells published in `results`, of the same method if possible.
    """
    per_token = plan.cost.flops_per_token
    trainer = config.trainer
    device = "cuda" if trainer.accelerator == "gpu" else "cpu"
    like = (config.ffn.name, trainer.devices, device, 0 if device == "cuda" else trainer.threads)
    known = [s for s in speeds if (s.name, s.devices, s.device, 0 if device == "cuda" else s.threads) == like]
    guess = not known
    if guess and device == "cpu":
        published = published_speeds(results)
        known = [s for s in published if s.name == config.ffn.name] or published
    rate = GUESS_FLOPS_PER_S
    if device == "cuda":
        rate = trainer.device_flops_per_s * trainer.device_utilisation * trainer.devices
    if known:
        away = {s: round(abs(math.log(s.flops_per_token / per_token)), 1) for s in known}
        rate = max(s.flops_per_s for s in known if away[s] == min(away.values()))
    evaluation_flops = plan.evaluation_tokens * per_token / 3  # a forward pass is a third of a training step
    training_flops = plan.flops * (1 + recomputed_share(config, plan.cost))
    return OVERHEAD_S + (training_flops + evaluation_flops) / rate, guess


def makespan_s(seconds: Iterable[float], workers: int) -> float:
    """Time until the last worker ends, if each worker always takes the longest remaining cell."""
    ends = [0.0] * workers
    for cell_s in sorted(seconds, reverse=True):
        heapq.heapreplace(ends, ends[0] + cell_s)
    return max(ends)
