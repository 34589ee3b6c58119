"""How the best learning rate of expert tables depends on the length of the run.

    loss = curve + c (ln table_lr - ln m + e ln(tokens / 1e7))^2

Every model and seed has a curve of its own, every method its m; c and e are shared. `sweeps/table_rates.yaml` states
how the fit decides.
"""

from typing import Any

import numpy as np
import pandas as pd

from peerscale.laws.linear_fit import Array, LinearFit
from peerscale.stats.rate_parabolas import opens_upwards, parabolas, row_groups

REFERENCE_TOKENS = 1e7
EQUAL_UNLESS = 0.05
"""Methods share the exponent unless the F test against separate ones has a p-value below this."""


def fit_table_law(runs: pd.DataFrame) -> dict[str, Any] | None:
    """The law of the best table rate; None if the runs do not determine it.

    Args:
        runs: finished runs, with `method` (a name), `budget`, `size`, `seed`, `tokens`, `table_lr`, `val_loss`, and
            `usual`, the table rate of the method's configuration. Models tried at one table rate only are left out.

    Returns:
        `exponents`: "shared" or "own"; `equal_exponents`: F test of shared ones against each method's own; `exponent`
        (e), with its 95 % interval (Fieller), one for all or one for each method; `best`: m by method, the best rate at
        1e7 tokens, with its interval; `curvature`: c; `scatter`, `df`: of the losses around the parabolas; `budgets`:
        for each method and budget the best rate tried, the best rate of the law, the gain of that over the usual one,
        and `edge`, whether the lowest mean loss is at the lowest or highest rate tried.
    """
    curve = ["method", "budget", "size", "seed"]
    rows = runs[runs.groupby(curve)["table_lr"].transform("nunique") > 1]
    if rows.empty:
        return None
    of, methods = pd.factorize(rows["method"])
    one, t = np.eye(len(methods))[of], np.log(rows["tokens"].to_numpy(float) / REFERENCE_TOKENS)[:, None]
    shared, own = (_fit(rows, np.hstack([one, lengths]), curve) for lengths in (-t, -t * one))
    if not opens_upwards(shared):
        return None
    test = own.f_test(shared) if own.determined else None
    chosen = own if test and test["p"] < EQUAL_UNLESS else shared
    unit, n = np.eye(chosen.design.shape[1]), len(methods)
    ratios = [chosen.ratio(each, unit[0]) for each in unit[1:]]
    exponents = [{"value": value, "low": low, "high": high} for value, (low, high) in ratios[n:]]
    fitted = chosen.coefficients[1:] / chosen.coefficients[0]
    budgets = []
    for (method, budget), here in rows.groupby(["method", "budget"], sort=False):
        i = list(methods).index(method)
        exponent = exponents[i if chosen is own else 0]["value"]
        ln_best = fitted[i] - exponent * np.log(here["tokens"] / REFERENCE_TOKENS).mean()
        losses = here.groupby("table_lr")["val_loss"].mean()
        tried = float(losses.idxmin())
        gain = chosen.coefficients[0] * (np.log(here["usual"].iloc[0]) - ln_best) ** 2
        budgets.append({
            "method": method, "budget": float(budget), "tried": tried, "best": float(np.exp(ln_best)),
            "gain": float(gain), "edge": tried in (losses.index.min(), losses.index.max()),
        })  # fmt: skip
    return {
        "exponents": "own" if chosen is own else "shared", "equal_exponents": test,
        "exponent": dict(zip(methods, exponents, strict=True)) if chosen is own else exponents[0],
        "best": {
            method: dict(zip(("value", "low", "high"), np.exp([value, *ends]).tolist(), strict=True))
            for method, (value, ends) in zip(methods, ratios[:n], strict=True)
        },
        "curvature": float(chosen.coefficients[0]), "scatter": chosen.scatter, "df": chosen.df, "budgets": budgets,
    }  # fmt: skip


def _fit(rows: pd.DataFrame, places: Array, curve: list[str]) -> LinearFit:
    x, loss = np.log(rows["table_lr"].to_numpy(float)), rows["val_loss"].to_numpy(float)
    return parabolas(x, loss, row_groups(rows, curve), places)
