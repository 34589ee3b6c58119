"""A study of three budgets whose losses lie on a known surface, and training curves that end on it."""

import numpy as np
import pandas as pd

from peerscale.laws.parametric import Surface

SURFACE = Surface(E=3.0, A=60.0, B=900.0, alpha=0.45, beta=0.5)
"""In N = FLOPs per token / 6 and D = tokens."""
BUDGETS = (1e12, 3e12, 9e12)
GRID = (0.15, 0.3, 0.55, 1.0, 1.8, 3.3, 6.5)
"""Sizes over the optimum."""


def surface_runs(noise: float = 0.0, seed: int = 0) -> pd.DataFrame:
    """Dense models, and PEER ones that lose 2 % of what the surface adds to E."""
    rng = np.random.default_rng(seed)
    rows = []
    for name, share in (("dense", 1.0), ("peer", 0.98)):
        for budget in BUDGETS:
            for i, factor in enumerate(GRID):
                params = float(SURFACE.optimum(budget).params) * factor
                tokens = budget / (6 * params)
                loss = SURFACE.E + share * (float(SURFACE.predict(params, tokens)) - SURFACE.E)
                rows.append({
                    "sweep": "surface", "cell": f"{name}-d{i}-{budget:g}-s0", "settings": "", "rate_factor": 1.0,
                    "method": name, "variant": "",
                    "seed": 0, "size": f"d{i}", "budget": budget, "status": "done", "tokens": tokens,
                    "flops_per_token": 6 * params, "flops_attention_scores": 0.6 * params,
                    "flops_attention_values": 0.6 * params, "params_total": 7 * params, "params_active": params,
                    "params_non_embedding": params, "val_loss": loss + noise * rng.normal(), "val_loss_se": 0.001,
                    "lr": 0.01, "table_lr": np.nan,
                })  # fmt: skip
    return pd.DataFrame(rows)
