"""How the best learning rate of expert tables depends on the length of the run.

    loss = curve + c (ln table_lr - ln m + e ln tokens)^2

Every model and seed has a curve of its own, every method its m; c and e are shared. This is a law of rates in tokens
alone (`rate_law`), of all rates that were tried; `sweeps/table_rates.yaml` states how it decides.
"""

import math
from typing import Any

import numpy as np
import pandas as pd

from peerscale.errors import UserError
from peerscale.laws.fitting import to_plain
from peerscale.stats.rate_law import fit_rates

TABLE_RATE = "optim.table_lr"

EQUAL_UNLESS = 0.05
"""Methods share the exponent unless the F test against separate ones has a p-value below this."""


def table_law_of(done: pd.DataFrame) -> dict[str, Any] | None:
    """`fit_table_law` of the finished runs of a study, among methods that differ in nothing but the table rate."""
    rows = done[done["curve"].map(lambda curve: curve.without(TABLE_RATE) == curve.plain)]
    rows = rows.assign(method=rows["curve"].map(lambda curve: curve.method))
    usual = rows[rows["curve"].map(lambda curve: not curve.settings)].groupby("method")["table_lr"].first()
    law = fit_table_law(rows.assign(usual=rows["method"].map(usual)).dropna(subset="usual"))
    return law and to_plain(law)


def fit_table_law(runs: pd.DataFrame) -> dict[str, Any] | None:
    """The law of the best table rate; None if the runs do not determine it.

    Args:
        runs: finished runs, with `method` (a name), `budget`, `size`, `seed`, `tokens`, `table_lr`, `val_loss`, and
            `usual`, the table rate of the method's configuration. Models tried at one table rate only are left out.

    Returns:
        `law`: `rate_law.RateFit.to_dict()`, whose `b` is e; `budgets`: for each method and budget the rate tried with
        the lowest mean loss, the best rate by the law, its `gain` over the usual one in nats per token, and `edge`,
        whether the lowest mean loss is at the lowest or highest rate tried.
    """
    curve = ["method", "budget", "size", "seed"]
    rows = runs[runs.groupby(curve)["table_lr"].transform("nunique") > 1]
    try:
        fit = fit_rates(
            rows, lr="table_lr", loss="val_loss", tokens="tokens", by="method", curve=curve[1:], reach=math.inf,
            equal_unless=EQUAL_UNLESS,
        )  # fmt: skip
    except UserError:
        return None
    budgets = []
    for (method, budget), here in rows.groupby(["method", "budget"], sort=False):
        best = fit.laws[method].predict(tokens=float(np.exp(np.log(here["tokens"]).mean())))
        losses = here.groupby("table_lr")["val_loss"].mean()
        tried = float(losses.idxmin())
        budgets.append({
            "method": method, "budget": float(budget), "tried": tried, "best": best,
            "gain": fit.curvature * math.log(here["usual"].iloc[0] / best) ** 2,
            "edge": tried in (losses.index.min(), losses.index.max()),
        })  # fmt: skip
    return {"law": fit.to_dict(), "budgets": budgets}
