"""Scaling laws: pure functions from a table of runs to coefficients, optima and intervals."""

from peerscale.laws.data_constrained import fit_data_constrained
from peerscale.laws.envelope import fit_envelope
from peerscale.laws.granular import fit_granular
from peerscale.laws.isoflop import fit_isoflop
from peerscale.laws.multiplier import compute_multipliers
from peerscale.laws.parametric import fit_parametric
from peerscale.laws.peer import fit_peer
from peerscale.laws.prediction import predict
from peerscale.laws.routed import fit_routed

__all__ = [
    "compute_multipliers",
    "fit_data_constrained",
    "fit_envelope",
    "fit_granular",
    "fit_isoflop",
    "fit_parametric",
    "fit_peer",
    "fit_routed",
    "predict",
]
