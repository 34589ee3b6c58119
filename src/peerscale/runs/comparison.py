"""The statistics of a study, computed once: losses at the compute optimum, their differences, compute multipliers.

All of it is written to `fits.json`, which figures, tables and the report read. The errors hold the misfit of sizes,
seeds and the sampling of validation sequences (`laws.optima`); they leave out the choice of learning rates, unless a
study brackets them.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd
from scipy.stats import t as student

from peerscale.laws.bootstrap import LEVEL as INTERVAL
from peerscale.laws.bootstrap import Bootstrap, percentile_interval, resampled_losses
from peerscale.laws.multiplier import compute_multiplier, growth
from peerscale.laws.optima import Estimate, OptimaFit, Optimum, equality_of_curvatures, holm
from peerscale.laws.power_law import MIN_BUDGETS, fit_power_law
from peerscale.laws.results import Array, FitStatus, to_plain
from peerscale.runs.record import Record
from peerscale.runs.study import method_names, same_arm, usable

X = "flops_per_token"
"""The size that all fits are over: it means the same for every method."""

CURVE_SIZES = 3
"""Sizes from which a method has a curve at a budget; below, methods are compared at one and the same size."""

GROWTH_BUDGETS = 4
"""Budgets from which a growth of the multiplier is told."""

FAMILY_LEVEL = 0.05
"""Probability of any wrong claim in the family."""

DRAWS = 1000


class Claims(Protocol):
    """The family of comparisons that a study's file names."""

    @property
    def method(self) -> str: ...
    @property
    def rivals(self) -> Sequence[str]: ...
    @property
    def budgets(self) -> Sequence[float] | None: ...


class Budget(NamedTuple):
    """The fit of one budget, and the cells behind each size mean."""

    budget: float
    fit: OptimaFit
    optima: dict[str, Optimum]
    sequences: Array | None
    """Losses of the validation sequences at every size mean (points, sequences)."""


def compare(
    runs: pd.DataFrame,
    records: Sequence[Record],
    *,
    windows: Mapping[float, tuple[float, float] | None] | None = None,
    claims: Claims | None = None,
) -> dict[str, Any]:
    """The statistics of a study in plain values for JSON.

    Args:
        runs: the study's table.
        records: of its cells, for the losses of validation sequences.
        windows: FLOPs per token (low, high) of the sizes that are fitted, by budget; none: all sizes.
        claims: the family of claims; none: PEER against every other method at every budget.

    Returns:
        `x`, `loss`: columns that were fitted.
        `budgets`: for each budget `window`, `scatter`, `curvature`, `equality` (F test of one curvature), `methods`
        (optima) and `differences` between methods; all losses in nats per token with `se` and its parts.
        `claims`: each comparison of the family with its probability, alone and corrected by Holm's method.
        `multipliers`, `growth`: dense's compute over a method's, and the slope of its logarithm.
        `laws`: the power law of each method's optimal size.
    """
    done = runs.assign(name=method_names(runs))[usable(runs)]
    sequences = sequence_losses(records, set(done["cell"]))
    entries: list[dict[str, Any]] = []
    fitted: list[Budget] = []
    for budget in sorted(done["budget"].unique()):
        rows = done[done["budget"] == budget]
        sizes = rows.groupby("name")["size"].nunique()
        if sizes.max() >= CURVE_SIZES:
            one, entry = _by_curves(rows, (windows or {}).get(budget), sequences)
            fitted += [one] if one else []
        else:
            entry = _at_each_size(rows, sequences)
        entries.append({"budget": float(budget), **entry})
    draws = [_draws(one, sequences) for one in fitted]
    multipliers, slopes = _multipliers(fitted, draws)
    return to_plain(
        {
            "x": X, "loss": "val_loss", "budgets": entries, "claims": _claims(entries, claims),
            "multipliers": multipliers, "growth": slopes, "laws": _power_laws(fitted, draws),
        }
    )  # fmt: skip


def sequence_losses(records: Sequence[Record], cells: set[str]) -> dict[str, list[float]]:
    """Losses of each validation sequence by cell, of the cells evaluated on the same sequences as most."""
    losses = {r.cell: r.sequence_losses for r in records if r.cell in cells and np.isfinite(r.sequence_losses).all()}
    lengths = [len(values) for values in losses.values() if values]
    usual = max(lengths, key=lengths.count, default=0)
    return {cell: values for cell, values in losses.items() if values and len(values) == usual}


def _by_curves(
    rows: pd.DataFrame, window: tuple[float, float] | None, sequences: Mapping[str, list[float]]
) -> tuple[Budget | None, dict[str, Any]]:
    """One fit of all methods that have a curve, over one window."""
    low, high = window or (0.0, math.inf)
    inside = rows[rows[X].between(low, high)]
    n_sizes = inside.groupby("name")[X].nunique()
    inside = inside[inside["name"].isin(n_sizes[n_sizes >= CURVE_SIZES].index)]
    if inside.empty:
        return None, {"window": window, "methods": [], "differences": []}
    names, x = inside["name"].tolist(), inside[X].to_numpy(float)
    shared, own = (OptimaFit.of(names, x, inside["val_loss"].to_numpy(float), shared=s) for s in (True, False))
    optima = {name: shared.optimum(name) for name in shared.names}
    budget = Budget(float(rows["budget"].iloc[0]), shared, optima, _points(shared, inside, sequences))
    others = {
        column.removeprefix("ppl_"): OptimaFit.of(names, x, np.log(inside[column].to_numpy(float)))
        for column in inside.columns
        if column.startswith("ppl_") and inside[column].notna().all()
    }
    methods = []
    for name, optimum in optima.items():
        mine, alone = rows[rows["name"] == name], own.optimum(name)
        known = optimum.status.has_number
        methods.append({
            "name": name, "status": optimum.status, "x": optimum.x, "x_interval": optimum.x_interval,
            "loss": optimum.loss, **(_error(shared.estimate(optimum.weights, budget.sequences)) if known else {}),
            "sizes": optimum.sizes, "left_out": sorted({*mine[X]} - {*optimum.sizes}),
            "coefficients": optimum.coefficients,
            "own": {"status": alone.status, "x": alone.x, "loss": alone.loss, "curvature": alone.coefficients[2]},
            "sets": {s: float(optimum.weights @ fit.losses) for s, fit in others.items()} if known else {},
        })  # fmt: skip
    differences = []
    for name, reference in _pairs(list(optima)):
        entry: dict[str, Any] = {"method": name, "reference": reference, "size": ""}
        pair = optima[name], optima[reference]
        if all(one.status.has_number for one in pair):
            weights = pair[0].weights - pair[1].weights
            alone = own.optimum(name), own.optimum(reference)
            both = all(one.status.has_number for one in alone)
            apart = own.estimate(alone[0].weights - alone[1].weights, budget.sequences) if both else None
            entry |= _described(shared.estimate(weights, budget.sequences))
            entry["own"] = {"value": apart.value, "se": apart.se} if apart else None
            entry["sets"] = {s: _described(fit.estimate(weights)) for s, fit in others.items()}
        else:
            entry["note"] = "; ".join(f"{one.name}: {one.status}" for one in pair if not one.status.has_number)
        differences.append(entry)
    return budget, {
        "window": window, "scatter": shared.scatter, "df": shared.df, "seeds_sd": math.sqrt(shared.seeds_variance),
        "seeds_df": shared.seeds_df, "curvature": float(shared.curve(shared.names[0])[2]),
        "equality": equality_of_curvatures(shared, own), "methods": methods, "differences": differences,
    }  # fmt: skip


def _at_each_size(rows: pd.DataFrame, sequences: Mapping[str, list[float]]) -> dict[str, Any]:
    """Methods compared at one and the same size: means over seeds, whose scatter is pooled over methods."""
    differences = []
    for size, cells in rows.groupby("size", sort=False):
        groups = {str(name): group for name, group in cells.groupby("name", sort=False)}
        freedom = len(cells) - len(groups)
        squares = sum(float(((g["val_loss"] - g["val_loss"].mean()) ** 2).sum()) for g in groups.values())
        for name, reference in _pairs(list(groups)):
            pair = [groups[name], groups[reference]]
            means = [float(group["val_loss"].mean()) for group in pair]
            seeds = math.sqrt(squares / freedom * sum(1 / len(g) for g in pair)) if freedom else None
            drawn = [[sequences[cell] for cell in g["cell"] if cell in sequences] for g in pair]
            sampled = None
            if all(drawn):
                each = np.mean(drawn[0], axis=0) - np.mean(drawn[1], axis=0)
                sampled = float(each.std(ddof=1)) / math.sqrt(len(each))
            parts = [(s, df) for s, df in ((seeds, freedom), (sampled, math.inf)) if s is not None]
            se = math.hypot(*(s for s, _ in parts)) if parts else math.nan
            df = freedom * (se / seeds) ** 4 if seeds else math.inf  # of Satterthwaite, as sequences are many
            found = Estimate(value=means[0] - means[1], se=se, df=df, fit_se=None, seeds_se=seeds, sequences_se=sampled)
            differences.append({"method": name, "reference": reference, "size": str(size), **_described(found)})
    return {"window": None, "methods": [], "differences": differences}


def half_width(found: Mapping[str, Any]) -> float:
    """Half of Student's 95 % interval of an estimate in `fits.json`; NaN without an error."""
    if found.get("se") is None:
        return math.nan
    df = found["df"] or math.inf  # no number in JSON is infinite
    return float(student.ppf((1 + INTERVAL) / 2, df)) * found["se"]


def _pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Method and reference: each against dense, against PEER, and with query BatchNorm against without."""
    found = [(name, same_arm(reference, name, names)) for reference in ("dense", "peer") for name in names]
    with_norm = [(name, name.replace("query_norm=true", "query_norm=false")) for name in names]
    found += [(name, other) for name, other in with_norm if other != name and other in names]
    return list(dict.fromkeys((name, other) for name, other in found if other is not None))


def _described(estimate: Estimate) -> dict[str, Any]:
    low, high = estimate.interval
    return {"value": estimate.value, **_error(estimate), "low": low, "high": high, "p": estimate.p}


def _error(estimate: Estimate) -> dict[str, Any]:
    """The error by source; `rate_se` is for studies that bracket their learning rates."""
    return {
        "se": estimate.se, "df": estimate.df, "fit_se": estimate.fit_se, "seeds_se": estimate.seeds_se,
        "sequences_se": estimate.sequences_se, "rate_se": None,
    }  # fmt: skip


def _points(fit: OptimaFit, rows: pd.DataFrame, sequences: Mapping[str, list[float]]) -> Array | None:
    """Losses of the sequences at every size mean (points, sequences), averaged over its seeds; None if unknown."""
    points = []
    for method, x in zip(fit.method, fit.x, strict=True):
        cells = rows.loc[(rows["name"] == fit.names[method]) & (rows[X] == x), "cell"]
        known = [sequences[cell] for cell in cells if cell in sequences]
        if not known:
            return None
        points.append(np.mean(known, axis=0))
    return np.array(points)


def _claims(budgets: Sequence[Mapping[str, Any]], claims: Claims | None) -> list[dict[str, Any]]:
    """The comparisons of the family, each as method minus rival, with Holm's correction over all of them."""
    method = claims.method if claims else "peer"
    family: dict[str, dict[str, Any]] = {}
    for entry in budgets:
        if claims and claims.budgets and entry["budget"] not in claims.budgets:
            continue
        for found in entry["differences"]:  # with PEER as the reference they are the other way round
            arms = [found["method"].partition(" ")[0], found["reference"].partition(" ")[0]]
            for sign, (one, other), names in (
                (1, arms, (found["method"], found["reference"])),
                (-1, arms[::-1], (found["reference"], found["method"])),
            ):
                key = f"{entry['budget']:g} {found['size']} {names}"
                wanted = one == method and other != method and (not claims or other in claims.rivals)
                # An error without misfit and seeds is no ground for a claim.
                whole = found.get("fit_se") is not None or found.get("seeds_se") is not None
                if wanted and whole and key not in family:
                    ends = sorted((sign * found["low"], sign * found["high"]))
                    family[key] = {
                        "budget": entry["budget"], "size": found["size"], "method": names[0], "rival": names[1],
                        "value": sign * found["value"], "se": found["se"], "df": found["df"], "low": ends[0],
                        "high": ends[1], "p": found["p"],
                    }  # fmt: skip
    corrected = holm({key: claim["p"] for key, claim in family.items()})
    return [
        {**claim, "p_holm": corrected[key], "leads": corrected[key] < FAMILY_LEVEL and claim["value"] < 0}
        for key, claim in family.items()
    ]


def _draws(one: Budget, sequences: Mapping[str, list[float]]) -> tuple[Array, Array]:
    """x and loss of every method's optimum, (draws, methods), under the errors of misfit, seeds and sequences.

    The size means are drawn about the fit, with a variance that is itself drawn, so that intervals are Student's; all
    budgets draw the same sequences.
    """
    variances, df = one.fit.variances()
    rng = np.random.default_rng(round(one.budget))
    scale = np.sqrt(df / rng.chisquare(df, (DRAWS, 1))) if math.isfinite(df) else np.full((DRAWS, 1), math.nan)
    losses = one.fit.losses - one.fit.residuals + rng.normal(size=(DRAWS, len(variances))) * np.sqrt(variances) * scale
    if one.sequences is not None:
        losses = losses + resampled_losses(one.sequences, resamples=DRAWS) - one.sequences.mean(axis=1)
    return one.fit.minima(losses)


def _frontier(fitted: Sequence[Budget], name: str) -> Array:
    """A method's loss at every budget; NaN where it has none."""
    return np.array([b.optima[name].loss if name in b.optima else math.nan for b in fitted])


def _drawn(fitted: Sequence[Budget], draws: Sequence[tuple[Array, Array]], name: str, which: int) -> Array:
    """A method's drawn x (which 0) or loss (1), (draws, budgets)."""
    unknown = np.full(DRAWS, math.nan)
    return np.stack(
        [d[which][:, b.fit.names.index(name)] if name in b.optima else unknown
         for b, d in zip(fitted, draws, strict=True)], axis=1,
    )  # fmt: skip


def _multipliers(
    fitted: Sequence[Budget], draws: Sequence[tuple[Array, Array]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Dense's compute over each method's by budget, and the growth of its logarithm where four budgets have one."""
    budgets = np.array([one.budget for one in fitted])
    names = list(dict.fromkeys(itertools.chain.from_iterable(one.optima for one in fitted)))
    found, slopes = [], []
    for name in names:
        reference = same_arm("dense", name, names)
        if reference is None or name.partition(" ")[0] == "dense":
            continue
        own, dense = _frontier(fitted, name), _frontier(fitted, reference)
        drawn = [_drawn(fitted, draws, one, 1) for one in (reference, name)]
        values = np.array([compute_multiplier((budgets, dense), (budgets, own), i) for i in range(len(budgets))])
        each = np.array([
            [compute_multiplier((budgets, d), (budgets, m), i) for i in range(len(budgets))]
            for d, m in zip(*drawn, strict=True)
        ])  # fmt: skip
        known = np.isfinite(values)
        for i in np.flatnonzero(known):
            interval = percentile_interval(each[:, i])
            found.append({
                "method": name, "reference": reference, "budget": budgets[i], "multiplier": values[i],
                "low": interval[0], "high": interval[1],
            })  # fmt: skip
        if known.sum() >= GROWTH_BUDGETS:
            low, high = percentile_interval(growth(budgets[known], each[:, known]))
            slope = float(growth(budgets[known], values[known]))
            slopes.append({"method": name, "reference": reference, "slope": slope, "low": low, "high": high})
    return found, slopes


def _power_laws(fitted: Sequence[Budget], draws: Sequence[tuple[Array, Array]]) -> dict[str, Any]:
    """The power law through each method's optimal sizes, of those that have three budgets or more."""
    laws = {}
    names = list(dict.fromkeys(itertools.chain.from_iterable(one.optima for one in fitted)))
    for name in names:
        with_number = [i for i, b in enumerate(fitted) if name in b.optima and math.isfinite(b.optima[name].x)]
        if len(with_number) < MIN_BUDGETS:
            continue
        budgets = np.array([fitted[i].budget for i in with_number])
        exponent, coefficient = fit_power_law(budgets, np.array([fitted[i].optima[name].x for i in with_number]))
        drawn = _drawn(fitted, draws, name, 0)[:, with_number]
        whole = np.isfinite(drawn).all(axis=1)
        each = dict(zip(("exponent", "coefficient"), fit_power_law(budgets, drawn[whole]), strict=True))
        bootstrap = Bootstrap(draws=each, resamples=DRAWS, failed=int((~whole).sum()), seed=0)
        laws[name] = {
            "law": "isoflop", "method": name, "x": X, "n": len(budgets), "status": FitStatus.CONVERGED,
            "exponent": float(exponent), "coefficient": float(coefficient), "ci": bootstrap.intervals(),
            "bootstrap": bootstrap.to_dict(),
        }  # fmt: skip
    return laws
