"""Run records and the table of runs."""

from peerscale.runs.table import read_runs

__all__ = ["read_runs"]
