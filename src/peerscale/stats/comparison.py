"""The statistics of a study, computed once: losses at the compute optimum, their differences, compute multipliers.

The results are written to `fits.json`, which figures, tables and the report read. The errors include the misfit of
sizes, seeds and the sampling of validation sequences (`laws.optima`). They include the choice of learning rates if a
study brackets the rates (`runs.brackets`) or states what they cost.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from peerscale.config.study import ClaimsConfig
from peerscale.laws.fitting import to_plain
from peerscale.laws.linear_fit import Array
from peerscale.records.record import Record, Status
from peerscale.stats.brackets import RateError, RateErrors, fit_rate_brackets, rate_errors
from peerscale.stats.claims import claims_of
from peerscale.stats.curves_of_runs import (
    CURVE_SIZES,
    budgets_with_curves,
    method_names,
    same_variant,
    usable,
    without_brackets,
)
from peerscale.stats.frontiers import Budget, X, frontiers_of, multipliers_of, power_laws
from peerscale.stats.noise import shrunk_variances
from peerscale.stats.optima import Estimate, OptimaFit, Optimum, satterthwaite

Sequences = Mapping[str, Array]
"""Losses of all validation sequences (sequences,), by cell."""


def compare(
    runs: pd.DataFrame,
    records: Sequence[Record],
    *,
    windows: Mapping[float, tuple[float, float] | None] | None = None,
    claims: ClaimsConfig | None = None,
    rates_cost: float | None = None,
    trend_from: float | None = None,
) -> dict[str, Any]:
    """The statistics of a study as plain values for JSON.

    Args:
        runs: the study's table.
        records: the records of its cells, which have the losses of validation sequences.
        windows: by budget, (low, high) FLOPs per token of the sizes to fit; None: all sizes.
        claims: the family of claims; None: PEER against every other method where there are curves.
        rates_cost: nats per token that a method may lose through rates that are not bracketed; None: not known.
        trend_from: smallest budget of the growth of multipliers; None: the smallest budget.

    Returns:
        `x`, `loss`: the fitted columns.
        `budgets`: for each budget `window`, `scatter`, `curvature`, `equality` (F test of a shared curvature),
        `methods` (optima) and `differences` between methods; all losses in nats per token with `se` and its parts.
        `claims`: each comparison of the family with its probability, uncorrected and with Holm's correction.
        `multipliers`, `growth`: dense's compute over a method's, and the slope of its logarithm. A multiplier or method
        has `by_seed`, the same value for each seed, if at least two seeds trained every size.
        `laws`: the power law of each method's optimal size.
        `trend_from`: as given; absent if it was None.
        `rates`: `brackets`, `cost` and `errors` of learning rates by budget and method; absent if nothing is known.
    """
    brackets, main = fit_rate_brackets(runs), without_brackets(runs)
    done = main.assign(name=method_names(main))[usable(main)]
    places = sorted(set(zip(done["budget"].astype(float), done["name"], strict=True)))
    rates = rate_errors(brackets, places, rates_cost)
    sequences = sequence_losses(records, set(done["cell"]))
    entries: list[dict[str, Any]] = []
    fitted: list[Budget] = []
    references = tuple(
        dict.fromkeys(("dense", "peer", *(_with_settings(done["name"], claims.method) if claims else ())))
    )
    for budget in sorted(done["budget"].unique()):
        rows = done[done["budget"] == budget]
        n_sizes = rows.groupby("name")["size"].transform("nunique")
        if n_sizes.max() >= CURVE_SIZES:
            one, entry = _by_curves(rows, references, (windows or {}).get(budget), sequences, rates)
            fitted += [one] if one else []
            few = {*rows.loc[n_sizes < CURVE_SIZES, "name"]}
            alike = _at_each_size(rows, references, sequences, rates)["differences"] if few else []
            entry["differences"] += [one for one in alike if few & {one["method"], one["reference"]}]
        else:
            entry = _at_each_size(rows, references, sequences, rates)
        entries.append({"budget": float(budget), **entry})
    frontiers = frontiers_of(fitted, rates)
    multipliers, slopes = multipliers_of(fitted, frontiers, trend_from or 0.0)
    planned = main[main["status"] != str(Status.DROPPED)]
    found: dict[str, Any] = {
        "x": X, "loss": "val_loss", **({"trend_from": trend_from} if trend_from else {}),
        "budgets": entries, "claims": claims_of(entries, claims, budgets_with_curves(planned)),
        "multipliers": multipliers, "growth": slopes, "laws": power_laws(fitted, frontiers),
    }  # fmt: skip
    if brackets or rates_cost is not None:
        unknown = RateError(math.nan, math.nan, "")
        errors = [{"budget": at, "method": name, **rates.get((at, name), unknown)._asdict()} for at, name in places]
        found["rates"] = {"brackets": brackets, "cost": rates_cost, "errors": errors}
    return to_plain(found)


def sequence_losses(records: Sequence[Record], cells: set[str]) -> Sequences:
    """Losses of all validation sequences by cell; only cells evaluated on their budget's most common number of them.

    They are in the order of the text, whereas a record has them in the order of its batches, each of which takes
    sequences from the whole text (`data.batches.EvaluationBatches`).
    """
    losses = {
        r.cell: np.reshape(r.sequence_losses, (-1, r.batch_sequences)).T.ravel()
        for r in records
        if r.cell in cells and r.sequence_losses and np.isfinite(r.sequence_losses).all()
        if not len(r.sequence_losses) % r.batch_sequences
    }
    budget = {r.cell: r.budget for r in records}
    lengths: dict[float, list[int]] = {}
    for cell, values in losses.items():
        lengths.setdefault(budget[cell], []).append(len(values))
    usual = {at: max(each, key=each.count) for at, each in lengths.items()}
    return {cell: values for cell, values in losses.items() if len(values) == usual[budget[cell]]}


def _by_curves(
    rows: pd.DataFrame, references: Sequence[str], window: tuple[float, float] | None, sequences: Sequences,
    rates: RateErrors,
) -> tuple[Budget | None, dict[str, Any]]:  # fmt: skip
    """Fit all methods that have a curve together, over one window of sizes."""
    (low, high), budget = window or (0.0, math.inf), float(rows["budget"].iloc[0])
    inside = rows[rows[X].between(low, high)]
    inside = inside[inside.groupby("name")[X].transform("nunique") >= CURVE_SIZES]
    if inside.empty:
        return None, {"window": window, "methods": [], "differences": []}
    names, x = inside["name"].tolist(), inside[X].to_numpy(float)
    shared, own = (OptimaFit.of(names, x, inside["val_loss"].to_numpy(float), shared=s) for s in (True, False))
    others = {
        column.removeprefix("ppl_"): OptimaFit.of(names, x, np.log(inside[column].to_numpy(float)))
        for column in inside.columns
        if column.startswith("ppl_") and inside[column].notna().all()
    }
    optima, alone = ({name: fit.optimum(name) for name in fit.names} for fit in (shared, own))
    behind = [
        _mean_losses(inside.loc[(inside["name"] == shared.names[method]) & (inside[X] == size), "cell"], sequences)
        for method, size in zip(shared.method, shared.x, strict=True)
    ]
    known = [losses for losses in behind if losses is not None]
    drawn = np.array(known) if len(known) == len(behind) else None
    by_seed = {name: _by_seed(inside, shared, optimum) for name, optimum in optima.items()}
    methods = []
    for name, optimum in optima.items():
        has_number, one = optimum.status.has_number, alone[name]
        known = shared.estimate(optimum.weights, drawn).with_rates(rates.of(budget, name)) if has_number else None
        error = _described(known, "value", "p") if known else {}
        methods.append({
            "name": name, "status": optimum.status, "x": optimum.x, "x_interval": optimum.x_interval,
            "loss": optimum.loss, **error, "sizes": optimum.sizes,
            "seeds_sd": math.sqrt(shared.noise.seeds[shared.names.index(name)]) if shared.seed_df.any() else None,
            "left_out": sorted({*rows.loc[rows["name"] == name, X]} - {*optimum.sizes}),
            "coefficients": optimum.coefficients,
            "own": {"status": one.status, "x": one.x, "loss": one.loss, "curvature": one.coefficients[2]},
            "sets": {s: float(optimum.weights @ fit.losses) for s, fit in others.items()} if has_number else {},
            **({"by_seed": by_seed[name]} if by_seed[name] else {}),
        })  # fmt: skip
    differences = []
    for name, reference in _pairs(list(optima), references):
        entry: dict[str, Any] = {"method": name, "reference": reference, "size": ""}
        without = [f"{one}: {optima[one].status}" for one in (name, reference) if not optima[one].status.has_number]
        if without:
            entry["note"] = "; ".join(without)
        else:
            weights, of_rates = optima[name].weights - optima[reference].weights, rates.of(budget, name, reference)
            apart = own.estimate(alone[name].weights - alone[reference].weights, drawn).with_rates(of_rates)
            entry |= _described(shared.estimate(weights, drawn).with_rates(of_rates))
            entry["own"] = {"value": apart.value, "se": apart.se} if math.isfinite(apart.value) else None
            entry["sets"] = {s: _described(fit.estimate(weights).with_rates(of_rates)) for s, fit in others.items()}
        differences.append(entry)
    return Budget(budget, shared, optima, by_seed, drawn), {
        "window": window, "scatter": shared.linear.scatter, "df": shared.linear.df, "seeds_sd": shared.seeds_sd,
        "seeds_df": int(shared.seed_df.sum()), "curvature": float(shared.curve(shared.names[0])[2]),
        "equality": own.linear.f_test(shared.linear), "methods": methods, "differences": differences,
    }  # fmt: skip


def _by_seed(rows: pd.DataFrame, fit: OptimaFit, optimum: Optimum) -> dict[str, float]:
    """The loss at an optimum, by seed, if the losses of that seed replace the method's means.

    Empty unless at least two seeds trained every size. The curvature and the position of the optimum are kept.
    """
    mine = fit.method == fit.names.index(optimum.name)
    each = rows[rows["name"] == optimum.name].pivot_table(index=X, columns="seed", values="val_loss")
    each = each.reindex(fit.x[mine]).dropna(axis="columns")
    if not optimum.status.has_number or len(each.columns) < 2:
        return {}
    losses = {str(seed): np.array(fit.losses, float) for seed in each}
    for seed in each:
        losses[str(seed)][mine] = each[seed]
    return {seed: float(optimum.weights @ values) for seed, values in losses.items()}


def _at_each_size(
    rows: pd.DataFrame, references: Sequence[str], sequences: Sequences, rates: RateErrors
) -> dict[str, Any]:
    """Compare methods at each size that they share: means over seeds, with the scatter of each method."""
    differences = []
    for size, cells in rows.groupby("size", sort=False):
        variants = {str(name): variant for name, variant in cells.groupby("name", sort=False)}
        each = [seeds["val_loss"].to_numpy(float) for seeds in variants.values()]
        squares, own_df = np.array([len(y) * y.var() for y in each]), np.array([len(y) - 1.0 for y in each])
        noise = dict(zip(variants, zip(*shrunk_variances(squares, own_df), strict=True), strict=True))
        freedom = own_df.any()
        for name, reference in _pairs(list(variants), references):
            pair = variants[name], variants[reference]
            parts = [(noise[one][0] / len(variants[one]), noise[one][1]) for one in (name, reference)]
            seeds = math.sqrt(sum(part for part, _ in parts))
            losses, others = (_mean_losses(variant["cell"], sequences) for variant in pair)
            sampled = None if losses is None or others is None else losses - others
            found = Estimate(
                value=float(pair[0]["val_loss"].mean() - pair[1]["val_loss"].mean()), df=satterthwaite(parts),
                se=seeds if freedom or sampled is not None else math.nan, fit_se=None,
                seeds_se=seeds if freedom else None, sequences_se=None,
            )  # fmt: skip
            found = found if sampled is None else found.with_sequences(sampled)
            found = found.with_rates(rates.of(float(rows["budget"].iloc[0]), name, reference))
            differences.append({"method": name, "reference": reference, "size": str(size), **_described(found)})
    return {"window": None, "methods": [], "differences": differences}


def _with_settings(names: Iterable[str], method: str) -> list[str]:
    """The method as configured, with each of its other settings, and each other method that has other settings."""
    variants = [name for name in dict.fromkeys(names) if " " in name]
    own = [name for name in variants if name.startswith(f"{method} ")]
    return [method, *own, *(name.partition(" ")[0] for name in variants)]


def _pairs(names: Sequence[str], references: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of method and reference: every method against every reference, and with query BatchNorm against without."""
    found = [(name, same_variant(reference, name, names)) for reference in references for name in names]
    with_norm = [(name, name.replace("query_norm=true", "query_norm=false")) for name in names]
    found += [(name, other) for name, other in with_norm if other != name and other in names]
    return list(dict.fromkeys((name, other) for name, other in found if other is not None))


def _described(estimate: Estimate, *left_out: str) -> dict[str, Any]:
    """The value with its error by source, its interval and p, for JSON."""
    low, high = estimate.interval
    found = {**asdict(estimate), "low": low, "high": high, "p": estimate.p}
    return {key: value for key, value in found.items() if key not in left_out}


def _mean_losses(cells: Iterable[str], sequences: Sequences) -> Array | None:
    """Losses of the sequences (sequences,), averaged over the cells that have them; None if no cell has them."""
    known = [sequences[cell] for cell in cells if cell in sequences]
    return np.mean(known, axis=0) if known else None
