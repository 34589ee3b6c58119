"""A planned run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peerscale.config.schema import Config
from peerscale.files import ROOT
from peerscale.plan.plan import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One planned run: all that a worker needs, on any machine."""

    sweep: str
    name: str
    axes: dict[str, Any]
    """Dotted keys and values that, besides method, size, budget and seed, distinguish this cell from others."""
    config: Config
    plan: Plan

    @property
    def folder(self) -> Path:
        """`runs/<sweep>/<cell>`."""
        return ROOT / Path(self.config.trainer.runs_directory).expanduser() / self.sweep / self.name
