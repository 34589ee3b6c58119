"""Scaling laws: pure functions from a table of runs to coefficients, optima and intervals."""

from peerscale.laws.envelope import fit_envelope
from peerscale.laws.isoflop import fit_isoflop
from peerscale.laws.moe import fit_granular, fit_routed
from peerscale.laws.multiplier import compute_multipliers
from peerscale.laws.parametric import fit_parametric
from peerscale.laws.prediction import predict
from peerscale.laws.rates import fit_rates

__all__ = [
    "compute_multipliers",
    "fit_envelope",
    "fit_granular",
    "fit_isoflop",
    "fit_parametric",
    "fit_rates",
    "fit_routed",
    "predict",
]
