"""What others use of peerscale, imported on first use: `load` and `plan` start no torch, laws no configuration."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peerscale.config.schema import load
    from peerscale.laws.isoflop import fit_isoflop
    from peerscale.laws.moe import fit_granular, fit_routed
    from peerscale.laws.parametric import fit_parametric
    from peerscale.model.build import build_model
    from peerscale.model.trained import load_model
    from peerscale.plan.cost import cost
    from peerscale.plan.plan import plan
    from peerscale.records.table import read_runs
    from peerscale.stats.multiplier import compute_multipliers
    from peerscale.stats.rate_law import fit_rates

__all__ = [
    "build_model", "compute_multipliers", "cost", "fit_granular", "fit_isoflop", "fit_parametric", "fit_rates",
    "fit_routed", "load", "load_model", "plan", "read_runs",
]  # fmt: skip

_MODULES = {
    "build_model": "model.build", "compute_multipliers": "stats.multiplier", "cost": "plan.cost",
    "fit_granular": "laws.moe", "fit_isoflop": "laws.isoflop", "fit_parametric": "laws.parametric",
    "fit_rates": "stats.rate_law", "fit_routed": "laws.moe", "load": "config.schema", "load_model": "model.trained",
    "plan": "plan.plan", "read_runs": "records.table",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(f"peerscale.{_MODULES[name]}"), name)
