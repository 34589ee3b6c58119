"""The statistics of a study, computed once: losses at the compute optimum, their differences, compute multipliers.

All of it is written to `fits.json`, which figures, tables and the report read. The errors hold the misfit of sizes,
seeds and the sampling of validation sequences (`laws.optima`), and the choice of learning rates where a study brackets
them (`runs.brackets`) or states what they cost.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from peerscale.laws.fitting import LEVEL as INTERVAL
from peerscale.laws.fitting import Bootstrap, percentile_interval, resample_counts, to_plain
from peerscale.laws.isoflop import MIN_BUDGETS, fit_power_law
from peerscale.laws.multiplier import compute_multipliers
from peerscale.laws.optima import Estimate, OptimaFit, Optimum, OptimumStatus, f_test, holm
from peerscale.laws.solver import Array, FitStatus
from peerscale.runs.brackets import RateError, RateErrors, fit_rate_brackets, rate_errors
from peerscale.runs.record import Record
from peerscale.runs.study import method_names, same_variant, usable, without_brackets
from peerscale.sweep_config import ClaimsConfig

X = "flops_per_token"
"""The size that all fits are over: it means the same for every method."""

CURVE_SIZES = 3
"""Sizes from which a method has a curve at a budget; below, it is compared with others at one and the same size."""

GROWTH_BUDGETS = 4
"""Budgets from which a growth of the multiplier is told."""

FAMILY_LEVEL = 0.05
"""Probability of any wrong claim in the family."""

DRAWS = 1000

Sequences = Mapping[str, list[float]]
"""Losses of each validation sequence by cell."""


class Budget(NamedTuple):
    """The fit of one budget, and the cells behind each size mean."""

    budget: float
    fit: OptimaFit
    optima: dict[str, Optimum]
    by_seed: dict[str, dict[str, float]]
    """The loss at each optimum with one seed's losses in place of the means, by seed."""
    sequences: Array | None
    """Losses of the validation sequences at every size mean (points, sequences)."""


def compare(
    runs: pd.DataFrame,
    records: Sequence[Record],
    *,
    windows: Mapping[float, tuple[float, float] | None] | None = None,
    claims: ClaimsConfig | None = None,
    rates_cost: float | None = None,
    trend_from: float | None = None,
) -> dict[str, Any]:
    """The statistics of a study in plain values for JSON.

    Args:
        runs: the study's table.
        records: of its cells, for the losses of validation sequences.
        windows: FLOPs per token (low, high) of the sizes that are fitted, by budget; none: all sizes.
        claims: the family of claims; none: PEER against every other method at every budget.
        rates_cost: nats per token that learning rates may cost a method where they are not bracketed; None: not known.
        trend_from: smallest budget that the growth of multipliers is taken from; None: the smallest that there is.

    Returns:
        `x`, `loss`: columns that were fitted.
        `budgets`: for each budget `window`, `scatter`, `curvature`, `equality` (F test of one curvature), `methods`
        (optima) and `differences` between methods; all losses in nats per token with `se` and its parts.
        `claims`: each comparison of the family with its probability, alone and corrected by Holm's method.
        `multipliers`, `growth`: dense's compute over a method's, and the slope of its logarithm. `by_seed` of a
        multiplier or a method: the same of each seed, where two or more trained every size.
        `laws`: the power law of each method's optimal size.
        `trend_from`: as given; only where it was.
        `rates`: `brackets`, `cost` and `errors` of learning rates by budget and method; only where there are any.
    """
    brackets, main = fit_rate_brackets(runs), without_brackets(runs)
    done = main.assign(name=method_names(main))[usable(main)]
    places = sorted(set(zip(done["budget"].astype(float), done["name"], strict=True)))
    rates = rate_errors(brackets, places, rates_cost)
    sequences = sequence_losses(records, set(done["cell"]))
    entries: list[dict[str, Any]] = []
    fitted: list[Budget] = []
    references = tuple(dict.fromkeys(("dense", "peer", *([claims.method] if claims else ()))))
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
    budgets, frontiers = np.array([one.budget for one in fitted]), _frontiers(fitted, rates)
    multipliers, slopes = _multipliers(budgets, frontiers, [one.by_seed for one in fitted], trend_from or 0.0)
    found: dict[str, Any] = {
        "x": X, "loss": "val_loss", **({"trend_from": trend_from} if trend_from else {}),
        "budgets": entries, "claims": _claims(entries, claims),
        "multipliers": multipliers, "growth": slopes, "laws": _power_laws(budgets, frontiers),
    }  # fmt: skip
    if brackets or rates_cost is not None:
        unknown = RateError(math.nan, math.nan, "")
        errors = [{"budget": at, "method": name, **rates.get((at, name), unknown)._asdict()} for at, name in places]
        found["rates"] = {"brackets": brackets, "cost": rates_cost, "errors": errors}
    return to_plain(found)


def sequence_losses(records: Sequence[Record], cells: set[str]) -> Sequences:
    """Losses of each validation sequence by cell, of the cells evaluated on the same sequences as most."""
    losses = {r.cell: r.sequence_losses for r in records if r.cell in cells and np.isfinite(r.sequence_losses).all()}
    lengths = [len(values) for values in losses.values() if values]
    usual = max(lengths, key=lengths.count, default=0)
    return {cell: values for cell, values in losses.items() if values and len(values) == usual}


def _by_curves(
    rows: pd.DataFrame, references: Sequence[str], window: tuple[float, float] | None, sequences: Sequences,
    rates: RateErrors,
) -> tuple[Budget | None, dict[str, Any]]:  # fmt: skip
    """One fit of all methods that have a curve, over one window."""
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
        "window": window, "scatter": shared.scatter, "df": shared.df, "seeds_sd": math.sqrt(shared.seeds_variance),
        "seeds_df": shared.seeds_df, "curvature": float(shared.curve(shared.names[0])[2]),
        "equality": f_test(shared, own), "methods": methods, "differences": differences,
    }  # fmt: skip


def _by_seed(rows: pd.DataFrame, fit: OptimaFit, optimum: Optimum) -> dict[str, float]:
    """The loss at an optimum with one seed's losses in place of the method's means.

    For two seeds or more that trained every size; the curvature and the place of the optimum stay those of all runs.
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
    """Methods compared at one and the same size: means over seeds, whose scatter is pooled over methods."""
    differences = []
    for size, cells in rows.groupby("size", sort=False):
        variants = {str(name): variant for name, variant in cells.groupby("name", sort=False)}
        freedom = len(cells) - len(variants)
        squares = sum(len(seeds) * float(seeds["val_loss"].to_numpy(float).var()) for seeds in variants.values())
        variance = squares / freedom if freedom else 0.0
        for name, reference in _pairs(list(variants), references):
            pair = variants[name], variants[reference]
            seeds = math.sqrt(variance * sum(1 / len(variant) for variant in pair))
            losses, others = (_mean_losses(variant["cell"], sequences) for variant in pair)
            sampled = None if losses is None or others is None else losses - others
            found = Estimate(
                value=float(pair[0]["val_loss"].mean() - pair[1]["val_loss"].mean()), df=freedom or math.inf,
                se=seeds if freedom or sampled is not None else math.nan, fit_se=None,
                seeds_se=seeds if freedom else None, sequences_se=None,
            )  # fmt: skip
            found = found if sampled is None else found.with_sequences(sampled)
            found = found.with_rates(rates.of(float(rows["budget"].iloc[0]), name, reference))
            differences.append({"method": name, "reference": reference, "size": str(size), **_described(found)})
    return {"window": None, "methods": [], "differences": differences}


def _pairs(names: Sequence[str], references: Sequence[str]) -> list[tuple[str, str]]:
    """Method and reference: each against every reference, and with query BatchNorm against without."""
    found = [(name, same_variant(reference, name, names)) for reference in references for name in names]
    with_norm = [(name, name.replace("query_norm=true", "query_norm=false")) for name in names]
    found += [(name, other) for name, other in with_norm if other != name and other in names]
    return list(dict.fromkeys((name, other) for name, other in found if other is not None))


def _described(estimate: Estimate, *left_out: str) -> dict[str, Any]:
    """The value with its error by source, its interval and p."""
    low, high = estimate.interval
    found = {**asdict(estimate), "low": low, "high": high, "p": estimate.p}
    return {key: value for key, value in found.items() if key not in left_out}


def _mean_losses(cells: Iterable[str], sequences: Sequences) -> Array | None:
    """Losses of the sequences (sequences,), averaged over those of the cells that have them; None if none has."""
    known = [sequences[cell] for cell in cells if cell in sequences]
    return np.mean(known, axis=0) if known else None


def _claims(budgets: Sequence[Mapping[str, Any]], claims: ClaimsConfig | None) -> list[dict[str, Any]]:
    """The comparisons of the family, each as method minus rival, with Holm's correction over all of them.

    Where a study names the family, variants along an axis are of it only if the method is there in no other way.
    """
    method = claims.method if claims else "peer"
    compared = {found[key] for entry in budgets for found in entry["differences"] for key in ("method", "reference")}
    as_configured = claims is not None and method in compared
    family: dict[tuple[Any, ...], dict[str, Any]] = {}
    for entry in budgets:
        if claims and claims.budgets and entry["budget"] not in claims.budgets:
            continue
        for found in entry["differences"]:
            # An error without misfit and seeds is no ground for a claim, nor is one size where others have curves.
            if found.get("fit_se") is None and (found.get("seeds_se") is None or entry["methods"]):
                continue
            for one in (found, _turned(found)):
                name, rival = (one[key].partition(" ")[0] for key in ("method", "reference"))
                if as_configured and one["method"] != method:
                    continue
                if name == method != rival and (not claims or rival in claims.rivals):
                    place = {"budget": entry["budget"], "size": one["size"], "method": one["method"],
                             "rival": one["reference"]}  # fmt: skip
                    family[tuple(place.values())] = place | {
                        k: one[k] for k in ("value", "se", "df", "low", "high", "p")
                    }
    corrected = holm(np.array([claim["p"] for claim in family.values()], float))
    found = [
        {**claim, "p_holm": p, "leads": bool(p < FAMILY_LEVEL and claim["value"] < 0)}
        for claim, p in zip(family.values(), corrected, strict=True)
    ]
    if claims and (margin := claims.equal_within) is not None:
        for claim in found:
            claim |= {"equal_within": margin, "equal": bool(-margin < claim["low"] and claim["high"] < margin)}
    return found


def _turned(found: Mapping[str, Any]) -> dict[str, Any]:
    """A difference the other way round: with PEER as the reference, PEER is the one that is subtracted."""
    ends = {"value": -found["value"], "low": -found["high"], "high": -found["low"]}
    return {**found, "method": found["reference"], "reference": found["method"], **ends}


def _frontiers(fitted: Sequence[Budget], rates: RateErrors) -> dict[str, Array]:
    """x and loss of each method's optimum at every budget, (2, 1 + draws, budgets): as fitted, then as drawn.

    The size means are drawn about the fit, under the errors of misfit and seeds, with a variance that is itself drawn,
    so that intervals are Student's. All budgets draw the same sequences. A method's losses are also drawn under the
    error of its learning rate, where that is known. NaN where a method has no number.
    """
    n = next((one.sequences.shape[1] for one in fitted if one.sequences is not None), 0)
    resampled = resample_counts(n, DRAWS, seed=0) / n - 1 / n if n else np.array(0)
    names = dict.fromkeys(name for one in fitted for name in one.optima)
    frontiers = {name: np.full((2, 1 + DRAWS, len(fitted)), math.nan) for name in names}
    for i, one in enumerate(fitted):
        variances, df = one.fit.variances
        rng = np.random.default_rng(round(one.budget))
        scale = np.sqrt(df / rng.chisquare(df, (DRAWS, 1))) if math.isfinite(df) else math.nan
        drawn = (
            one.fit.losses - one.fit.residuals + rng.normal(size=(DRAWS, len(variances))) * np.sqrt(variances) * scale
        )
        if one.sequences is not None:
            drawn += resampled @ one.sequences.T
        minima = np.stack(one.fit.optima_of(drawn))
        for method, (name, optimum) in enumerate(one.optima.items()):
            if optimum.status.has_number:
                frontiers[name][:, 0, i] = optimum.x, optimum.loss
                frontiers[name][:, 1:, i] = minima[:, :, method]
                for se, _ in rates.of(one.budget, name):
                    frontiers[name][1, 1:, i] += rng.normal(0, se, DRAWS)
    return frontiers


def _multipliers(
    budgets: Array,
    frontiers: Mapping[str, Array],
    by_seed: Sequence[Mapping[str, Mapping[str, float]]],
    trend_from: float,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Dense's compute over each method's by budget, and from four on the growth of its logarithm in log10 C."""
    found, slopes = [], []
    for name, (_, losses) in frontiers.items():
        reference = same_variant("dense", name, list(frontiers))
        if reference is None or name.partition(" ")[0] == "dense":
            continue
        each = compute_multipliers((budgets, frontiers[reference][1]), (budgets, losses))
        pair, known = {"method": name, "reference": reference}, np.isfinite(each[0])
        for i in np.flatnonzero(known).tolist():
            seeds = {}
            for seed in sorted(by_seed[i].get(name, {}).keys() & by_seed[i].get(reference, {}).keys()):
                dense, own = (
                    (budgets, np.where(budgets == budgets[i], by_seed[i][one][seed], frontiers[one][1][0]))
                    for one in (reference, name)
                )
                seeds[seed] = compute_multipliers(dense, own)[i]
            found.append({**pair, "budget": budgets[i], "multiplier": each[0, i], **_ends(each[1:, i]),
                          **({"by_seed": seeds} if seeds else {})})  # fmt: skip
        trend = known & (budgets >= trend_from)
        if trend.sum() >= GROWTH_BUDGETS:
            slope = math.log(10) * fit_power_law(budgets[trend], each[:, trend])[0]
            slopes.append({**pair, "slope": slope[0], **_ends(slope[1:])})
    return found, slopes


def _ends(draws: Array) -> dict[str, float]:
    """Ends of the interval of draws; none where more than one in twenty would be an extrapolation."""
    low, high = percentile_interval(draws) if np.isfinite(draws).mean() >= INTERVAL else (math.nan, math.nan)
    return {"low": low, "high": high}


def _power_laws(budgets: Array, frontiers: Mapping[str, Array]) -> dict[str, Any]:
    """Each method's optima at two budgets or more, and from three on the power law through their sizes."""
    laws = {}
    for name, (x, losses) in frontiers.items():
        known = np.isfinite(x[0])
        if known.sum() < 2:
            continue
        whole = np.isfinite(x[1:, known]).all(axis=1)
        power = dict.fromkeys(("exponent", "coefficient"))
        draws = {"loss": losses[1:, known][whole]}
        if enough := known.sum() >= MIN_BUDGETS:
            fitted = dict(zip(power, fit_power_law(budgets[known], x[:, known]), strict=True))
            power = {key: float(values[0]) for key, values in fitted.items()}
            draws = {key: values[1:][whole] for key, values in fitted.items()} | draws
        bootstrap = Bootstrap(draws=draws, resamples=DRAWS, failed=int((~whole).sum()), seed=0)
        laws[name] = {
            "law": "isoflop", "method": name, "x": X, "n": int(known.sum()),
            "status": FitStatus.CONVERGED if enough else FitStatus.TOO_FEW_POINTS, **power, "ci": bootstrap.intervals(),
            "vertices": [
                {"budget": budget, "x": size, "loss": loss, "status": OptimumStatus.OK}
                for budget, size, loss in zip(budgets[known], x[0, known], losses[0, known], strict=True)
            ],
            "bootstrap": bootstrap,
        }  # fmt: skip
    return laws
