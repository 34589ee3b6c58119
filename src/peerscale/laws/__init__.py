"""Scaling laws: pure functions from a table of runs to coefficients, optima and intervals."""

from peerscale.laws.granular import fit_granular
from peerscale.laws.isoflop import fit_isoflop
from peerscale.laws.parametric import fit_parametric
from peerscale.laws.routed import fit_routed

__all__ = ["fit_granular", "fit_isoflop", "fit_parametric", "fit_routed"]
