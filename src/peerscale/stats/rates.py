"""Studies of learning rates: the law of each method's best rate, and that law as configuration."""

from collections.abc import Collection, Mapping
from typing import Any

import pandas as pd

from peerscale.errors import UserError
from peerscale.stats.curve import curves_of, usable
from peerscale.stats.rate_law import fit_rates

OF_LAW = ("optim.lr", "optim.table_lr", "batch_sequences")
"""Settings that are variables of the law, or separate its curves."""


def tries_rates(runs: pd.DataFrame) -> bool:
    """Whether a study varies the peak learning rate, so that its models differ in their rates and not only in seeds."""
    return curves_of(runs).map(lambda curve: dict(curve.settings).get("optim.lr")).nunique() > 1


def curves_of_law(runs: pd.DataFrame) -> pd.Series:
    """The curve of each row without the settings `OF_LAW`."""
    return curves_of(runs).map(lambda curve: curve.without(*OF_LAW))


def fit_law(runs: pd.DataFrame, held_out: Collection[int] = ()) -> dict[str, Any] | None:
    """The law of each method's best rate in those of width, tokens and batch that the study varies.

    Args:
        runs: the study's table.
        held_out: widths (d_model) that test the law and that it is not fitted to.

    Returns:
        `rate_law.RateFit.to_dict()`; None if the study does not vary the rate, or the finished runs do not determine
        a law.
    """
    if not tries_rates(runs):
        return None
    cells = runs.assign(name=curves_of_law(runs).map(str), table_lr=runs["table_lr"].fillna(0.0))[usable(runs)]
    if cells.empty:
        return None
    planned = runs[~runs["d_model"].isin(held_out)]
    width, budget, batch = (
        column if planned[column].nunique() > 1 else None for column in ("d_model", "budget", "batch_sequences")
    )
    curve = ("budget", "table_lr", "seed", *(() if width else ("d_model",)))
    out = cells["d_model"].isin(held_out) if held_out else None
    try:
        return fit_rates(
            cells, loss="val_loss", width=width, tokens=budget and "tokens", batch=batch, by="name", curve=curve,
            hold_out=out,
        ).to_dict()  # fmt: skip
    except UserError:
        return None


ASSUMED_BATCH_EXPONENT = 0.5
"""For a law from runs with one batch size: Adam's best rate grows roughly as the square root of the batch size (Malladi
et al. 2022)."""

VARIABLES = {"width": ("d_model", "a"), "tokens": ("tokens", "b"), "batch": ("batch_sequences", "c")}
"""Variables of the law: their names in `optim.lr_law`, and their exponents."""


def as_configuration(law: Mapping[str, Any], runs: pd.DataFrame) -> dict[str, Any]:
    """A law as settings for conf/: coefficients to three digits, and the range of the runs.

    Args:
        law: `RateFit.to_dict()` of a study's runs, in width and tokens at least; `groups` by curve or name.
        runs: the study's table, which has the batch and the largest rate that were tried.

    Returns:
        `optim`: lr_rule and lr_law for all layers, with the shared exponents; `methods`: for the file of each method in
        conf/ffn its `optim`: the lr, and the exponents if they are not shared.
    """
    shared, done = next(iter(law["groups"].values()))["shared"], runs[usable(runs)]
    usual = float(done["batch_sequences"].mode().iloc[0])
    lr_law: dict[str, Any] = {}
    for name, (key, exponent) in VARIABLES.items():
        is_fitted = name in law["fitted"]
        lr_law[f"reference_{key}"] = shared[f"{name}_0"] if is_fitted else usual
        lr_law[f"{name}_exponent"] = shared[exponent] if is_fitted else ASSUMED_BATCH_EXPONENT
        lr_law[f"fitted_{key}"] = [*law["fitted"][name]] if is_fitted else [usual, usual]
    lr_law["fewest_steps"] = int(done["steps"].min())
    lr_law["largest_lr"] = float(done["lr"].max())
    methods: dict[str, dict[str, Any]] = {}
    for curve, found in law["groups"].items():
        method = str(curve)
        methods[method] = {"optim": {"lr": _rounded(found["m"])}}
        if law["exponents"] == "own":
            exponents = {f"{name}_exponent": _rounded(found[VARIABLES[name][1]]) for name in law["fitted"]}
            methods[method]["optim"]["lr_law"] = exponents
    exact = ("fitted", "fewest")
    rounded = {key: value if key.startswith(exact) else _rounded(value) for key, value in lr_law.items()}
    return {"optim": {"lr_rule": "law", "lr_law": rounded}, "methods": methods}


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
