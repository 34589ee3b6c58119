"""The statistics of a study, computed once: losses at the compute optimum, their differences, compute multipliers.

The results are written to `fits.json`, which figures and tables read. The errors include the misfit of sizes, seeds and
the sampling of validation sequences (`optima`). They include the choice of learning rates if a study brackets the rates
(`brackets`) or states what they cost.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from peerscale.config.study import MIN_SIZES, ClaimsConfig
from peerscale.laws.fitting import to_plain
from peerscale.laws.linear_fit import Array
from peerscale.records.record import Record, Status
from peerscale.stats.brackets import NOT_TUNED, RateError, RateErrors, fit_rate_brackets, rate_errors
from peerscale.stats.claims import claims_of
from peerscale.stats.curve import (
    Curve,
    by_budget,
    by_curve,
    curves_of,
    described_curves,
    finished,
    methods_of,
    to_names,
    without_brackets,
)
from peerscale.stats.frontiers import Budget, X, frontiers_of, multipliers_of, power_laws
from peerscale.stats.noise import shrunk_variances
from peerscale.stats.optima import Estimate, OptimaFit, satterthwaite

Sequences = Mapping[str, Array]
"""Losses of all validation sequences (sequences,), by cell."""

Pairs = Sequence[tuple[Curve, Curve]]
"""Curves, and those that they are compared with."""

COEFFICIENTS = 3
"""Of a parabola: with fewer sizes a method has no curve, whatever a study's `min_sizes` is."""


def compare(
    runs: pd.DataFrame,
    records: Sequence[Record],
    *,
    baseline: str = "dense",
    min_sizes: int = MIN_SIZES,
    claims: ClaimsConfig | None = None,
    rates_cost: float | None = None,
    trend_from: float | None = None,
    guests: Collection[str] = (),
    extrapolated: Collection[tuple[float, Curve]] = (),
) -> dict[str, Any]:
    """The statistics of a study as plain values for JSON.

    Args:
        runs: the study's table.
        records: the records of its cells, which have the losses of validation sequences.
        baseline: the method that all others are compared with.
        min_sizes: fewest sizes for a curve; methods with fewer at a budget are compared at each size that they share.
        claims: the family of claims; None: nothing is claimed.
        rates_cost: nats per token that a method may lose through rates that are not bracketed; None: not known.
        trend_from: smallest budget of the growth of multipliers; None: the smallest budget.
        guests: methods that take curvature and common variances from the others. `rates_cost` does not speak for them.
        extrapolated: budgets and curves with learning rates from beyond the runs that their law was fitted to.

    Returns:
        `x`, `loss`: the fitted columns. `baseline`: as given.
        `curves`: for the name of each curve its `method` and `settings`.
        `budgets`: for each budget `scatter`, `curvature`, `equality` (F test of a shared curvature),
        `methods` (optima) and `differences` between methods; all losses in nats per token with `se` and its parts.
        `claims`: each comparison of the family with its probability, uncorrected and with Holm's correction.
        `multipliers`, `growth`: the baseline's compute over a method's, and the slope of its logarithm.
        `laws`: the power law of each method's optimal size.
        `trend_from`: as given; absent if it was None.
        `rates`: `brackets`, `cost` and `errors` of learning rates by budget and method, if anything is known, and where
        they are `extrapolated`, if anywhere.
    """
    done, min_sizes, of_guest = finished(runs), max(min_sizes, COEFFICIENTS), methods_of(runs).isin(guests)
    done = done.assign(guest=done["curve"].map(lambda curve: curve.method in guests))
    places = [(budget, curve) for budget, rows in by_budget(done).items() for curve in by_curve(rows)]
    brackets = fit_rate_brackets(runs[~of_guest])
    rates = rate_errors(brackets, [place for place in places if place[1].method not in guests], rates_cost)
    rates.update(rate_errors(fit_rate_brackets(runs[of_guest]), ()))
    sequences = sequence_losses(records, set(done["cell"]))
    references = references_of(done["curve"], baseline, claims)
    entries: list[dict[str, Any]] = []
    fitted: list[Budget] = []
    for budget, rows in by_budget(done).items():
        enough = rows[rows.groupby("curve", sort=False)[X].transform("nunique") >= min_sizes]
        entry: dict[str, Any] = {"budget": budget, "methods": [], "differences": []}
        if len(enough):
            one = fit_budget(enough, min_sizes, sequences)
            fitted.append(one)
            entry |= described_fit(one, enough, references, rates)
        without = {*rows["curve"]} - {*enough["curve"]}
        alike = differences_at_each_size(rows, references, sequences, rates) if without else []
        entry["differences"] += [one for one in alike if without & {one["method"], one["reference"]}]
        entries.append(entry)
    frontiers = frontiers_of(fitted, rates)
    multipliers, slopes = multipliers_of(fitted, frontiers, baseline, trend_from or 0.0)
    found: dict[str, Any] = {
        "x": X, "loss": "val_loss", "baseline": baseline, "curves": described_curves(curves_of(runs)),
        **({"trend_from": trend_from} if trend_from else {}),
        "budgets": entries, "claims": claims_of(entries, claims, budgets_with_curves(runs, min_sizes)),
        "multipliers": multipliers, "growth": slopes, "laws": power_laws(fitted, frontiers),
    }  # fmt: skip
    if brackets or rates_cost is not None:
        unknown = {curve: RateError(math.nan, math.nan, NOT_TUNED * (curve.method in guests)) for _, curve in places}
        errors = [{"budget": at, "method": curve, **rates.get((at, curve), unknown[curve])._asdict()}
                  for at, curve in places]  # fmt: skip
        found["rates"] = {"brackets": brackets, "cost": rates_cost, "errors": errors}
    if here := [{"budget": at, "method": curve} for at, curve in places if (at, curve) in extrapolated]:
        found["rates"] = found.get("rates", {}) | {"extrapolated": here}
    return to_plain(to_names(found))


def budgets_with_curves(runs: pd.DataFrame, min_sizes: int) -> set[float]:
    """Budgets at which a method has a curve once all cells that are not dropped have run."""
    planned = without_brackets(runs[runs["status"] != str(Status.DROPPED)])
    sizes = planned.assign(curve=curves_of(planned)).groupby(["budget", "curve"], sort=False)["size"].nunique()
    return {float(budget) for budget, _ in sizes[sizes >= min_sizes].index}


def references_of(curves: pd.Series, baseline: str, claims: ClaimsConfig | None) -> list[Curve]:
    """What every curve is compared with: the baseline, each curve of the method that is claimed, and its rivals."""
    found = [Curve(baseline)]
    if claims:
        found += [Curve(claims.method), *(curve for curve in curves.unique() if curve.method == claims.method)]
        found += map(Curve, claims.rivals)
    return list(dict.fromkeys(found))


def pairs_of(curves: Sequence[Curve], references: Sequence[Curve]) -> Pairs:
    """Pairs to compare: every curve with every reference, with its method as usual, and with a setting switched off."""
    found = [(curve, curve.counterpart(reference, curves)) for reference in references for curve in curves]
    found += [(curve, curve.plain) for curve in curves if curve.settings]
    found += [(curve, off) for curve in curves for off in curve.switched_off()]
    return list(dict.fromkeys((curve, other) for curve, other in found if other is not None and other in curves))


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


def fit_budget(rows: pd.DataFrame, min_sizes: int, sequences: Sequences) -> Budget:
    """Fit all curves of one budget together, with one curvature."""
    fit = optima_fit(rows, rows["val_loss"], min_sizes)
    of_curve = by_curve(rows)
    optima = {curve: fit.optimum(curve) for curve in of_curve}
    behind = [
        mean_losses(rows.loc[(rows["curve"] == fit.names[method]) & (rows[X] == size), "cell"], sequences)
        for method, size in zip(fit.method, fit.x, strict=True)
    ]
    sampled = None if any(losses is None for losses in behind) else np.array(behind)
    return Budget(float(rows["budget"].iloc[0]), fit, optima, sampled)


def optima_fit(rows: pd.DataFrame, losses: pd.Series, min_sizes: int, *, shared: bool = True) -> OptimaFit:
    """The fit of some losses of one budget's runs."""
    return OptimaFit.of(
        rows["curve"].tolist(), rows[X].to_numpy(float), losses.to_numpy(float), shared=shared, at_least=min_sizes,
        guests={*rows.loc[rows["guest"], "curve"]},
    )  # fmt: skip


def described_fit(one: Budget, rows: pd.DataFrame, references: Sequence[Curve], rates: RateErrors) -> dict[str, Any]:
    """What `fits.json` tells of the fit of one budget, whose runs are `rows`."""
    fit, optima, drawn = one.fit, one.optima, one.sequences
    own = optima_fit(rows, rows["val_loss"], fit.at_least, shared=False)
    alone = {curve: own.optimum(curve) for curve in optima}
    sets = {
        column.removeprefix("ppl_"): optima_fit(rows, rows[column].astype(float).map(math.log), fit.at_least)
        for column in rows.columns
        if column.startswith("ppl_") and rows[column].notna().all()
    }
    methods = []
    for curve, optimum in optima.items():
        has_number, apart = optimum.status.has_number, alone[curve]
        known = fit.estimate(optimum.weights, drawn).with_rates(rates.of(one.budget, curve)) if has_number else None
        methods.append({
            "name": curve, "status": optimum.status, "x": optimum.x, "x_interval": optimum.x_interval,
            "loss": optimum.loss, **(described(known, "value", "p") if known else {}), "sizes": optimum.sizes,
            "seeds_sd": math.sqrt(fit.noise.seeds[fit.names.index(curve)]) if fit.replicated else None,
            "coefficients": optimum.coefficients,
            "own": {"status": apart.status, "x": apart.x, "loss": apart.loss, "curvature": apart.coefficients[2]},
            "sets": {s: float(optimum.weights @ each.losses) for s, each in sets.items()} if has_number else {},
        })  # fmt: skip
    differences = []
    for curve, reference in pairs_of(list(optima), references):
        entry: dict[str, Any] = {"method": curve, "reference": reference, "size": ""}
        unknown = [each for each in (curve, reference) if not optima[each].status.has_number]
        if unknown:
            entry["note"] = "; ".join(f"{each}: {optima[each].status}" for each in unknown)
        else:
            weights = optima[curve].weights - optima[reference].weights
            of_rates = rates.of(one.budget, curve, reference)
            apart = own.estimate(alone[curve].weights - alone[reference].weights, drawn).with_rates(of_rates)
            entry |= described(fit.estimate(weights, drawn).with_rates(of_rates))
            entry["own"] = {"value": apart.value, "se": apart.se} if math.isfinite(apart.value) else None
            entry["sets"] = {s: described(each.estimate(weights).with_rates(of_rates)) for s, each in sets.items()}
        differences.append(entry)
    return {
        "scatter": fit.linear.scatter, "df": fit.linear.df, "seeds_sd": fit.seeds_sd,
        "seeds_df": int(fit.seed_df.sum()), "curvature": float(fit.curve(fit.names[0])[2]),
        "equality": own.linear.f_test(fit.linear), "methods": methods, "differences": differences,
    }  # fmt: skip


def differences_at_each_size(
    rows: pd.DataFrame, references: Sequence[Curve], sequences: Sequences, rates: RateErrors
) -> list[dict[str, Any]]:
    """Compare methods at each size that they share: means over seeds, with the scatter of each method."""
    differences = []
    for size, cells in rows.groupby("size", sort=False):
        of_curve = by_curve(cells)
        each = [seeds["val_loss"].to_numpy(float) for seeds in of_curve.values()]
        squares, own_df = np.array([len(y) * y.var() for y in each]), np.array([len(y) - 1.0 for y in each])
        members = np.array([not seeds["guest"].any() for seeds in of_curve.values()])
        noise = dict(zip(of_curve, zip(*shrunk_variances(squares, own_df, members), strict=True), strict=True))
        replicated = own_df[members if members.any() else ~members].any()
        for pair in pairs_of(list(of_curve), references):
            parts = [(noise[one][0] / len(of_curve[one]), noise[one][1]) for one in pair]
            seeds = math.sqrt(sum(part for part, _ in parts))
            losses, others = (mean_losses(of_curve[one]["cell"], sequences) for one in pair)
            sampled = None if losses is None or others is None else losses - others
            mean, other = (float(of_curve[one]["val_loss"].mean()) for one in pair)
            found = Estimate(
                value=mean - other, df=satterthwaite(parts),
                se=seeds if replicated or sampled is not None else math.nan, fit_se=None,
                seeds_se=seeds if replicated else None, sequences_se=None,
            )  # fmt: skip
            found = found if sampled is None else found.with_sequences(sampled)
            found = found.with_rates(rates.of(float(rows["budget"].iloc[0]), *pair))
            differences.append({"method": pair[0], "reference": pair[1], "size": str(size), **described(found)})
    return differences


def described(estimate: Estimate, *left_out: str) -> dict[str, Any]:
    """The value with its error by source, its interval and p, for JSON."""
    low, high = estimate.interval
    found = {**asdict(estimate), "low": low, "high": high, "p": estimate.p}
    return {key: value for key, value in found.items() if key not in left_out}


def mean_losses(cells: Iterable[str], sequences: Sequences) -> Array | None:
    """Losses of the sequences (sequences,), averaged over the cells that have them; None if no cell has them."""
    known = [sequences[cell] for cell in cells if cell in sequences]
    return np.mean(known, axis=0) if known else None
