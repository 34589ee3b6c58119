"""How long a cell will take, from the past records of this machine."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from peerscale.config import Config
from peerscale.plan import Plan
from peerscale.runs.machine import cpu_name
from peerscale.runs.record import RECORD, Status

GUESS_FLOPS_PER_S = 1.5e10
"""One core of a 2023 server, d_model about 32, where there is no record yet."""

OVERHEAD_S = 1.0
"""Starting a cell and closing it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """The speed of one finished cell."""

    name: str
    threads: int
    devices: int
    flops_per_token: int
    flops_per_s: float


def measured_speeds(runs: Path) -> list[Measured]:
    """Speeds of the finished cells of this machine under `runs`, by any study."""
    speeds, hardware = [], cpu_name()
    for path in runs.glob(f"*/*/{RECORD}"):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["status"] == Status.DONE and record["environment"]["hardware"] == hardware:
                name = f"{record['method']}_{record['variant']}" if record["variant"] else record["method"]
                speeds.append(
                    Measured(
                        name=name,
                        threads=record["environment"]["n_threads"],
                        devices=record["environment"].get("n_devices", 1),
                        flops_per_token=sum(record["flops_per_token"].values()),
                        flops_per_s=record["timing"]["flops_per_s"],
                    )
                )
        except (KeyError, TypeError, ValueError, AttributeError, OSError):
            continue  # a record of another version has no speed that we can read, and planning must not fail on it
    return speeds


def estimate_s(config: Config, plan: Plan, speeds: list[Measured]) -> tuple[float, bool]:
    """Seconds for training and evaluation, and whether that is a guess (no record of this method yet)."""
    per_token = plan.cost.flops_per_token
    like = (config.ffn.name, config.trainer.threads, config.trainer.devices)
    known = [s for s in speeds if (s.name, s.threads, s.devices) == like]
    rate = GUESS_FLOPS_PER_S
    if known:
        rate = min(known, key=lambda s: abs(math.log(s.flops_per_token / per_token))).flops_per_s
    evaluation_flops = plan.evaluation_tokens * per_token / 3  # a forward pass is a third of a training step
    return OVERHEAD_S + (plan.flops + evaluation_flops) / rate, not known
