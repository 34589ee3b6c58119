"""Scaling laws of anyone's table of runs: coefficients, optima and intervals. `peerscale.api` has the functions."""
