"""The rows of the standing table: entrants against the reference, by the rules of docs/standing-table.md."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from peerscale.errors import UserError
from peerscale.laws.linear_fit import DETECTABLE, Array, StudentValue
from peerscale.plan.entrant import FINAL_SEEDS, SEEDS, SIZES
from peerscale.records.entry import Entry
from peerscale.records.record import Status
from peerscale.records.table import runs_table
from peerscale.stats.comparison import X, mean_losses, sequence_losses
from peerscale.stats.curve import by_budget, usable
from peerscale.stats.multiplier import compute_to_reach
from peerscale.stats.optima import Estimate, OptimaFit, holm

ALPHA = 0.05
COLUMNS = [
    "budget", "rank", "entrant", "difference", "low", "high", "p", "se", "df", "smallest", "multiplier",
    "multiplier_low", "multiplier_high", "multiplier_limit", "loss", "params_active", "params_total", "time", "sizes",
    "seeds", "failed", "trials", "mark", "date", "protocol", "version",
]  # fmt: skip
"""Of the table; `standing_rows` says what they are."""


def difference(
    entrant: pd.DataFrame,
    reference: pd.DataFrame,
    sequences: Mapping[str, Array] | None = None,
    tuning: Sequence[tuple[float, float]] = (),
) -> Estimate:
    """The entrant's loss less the reference's at equal FLOPs per token, as a mean over the entrant's sizes.

    Args:
        entrant, reference: their finished runs at one budget, with `cell`, `flops_per_token`, `val_loss`; the reference
            has at least three sizes. Its parabola and the entrant's share their curvature.
        sequences: losses of the same validation sequences by cell.
        tuning: standard errors from the choice of both sides' rates, each with its degrees of freedom.
    """
    runs = pd.concat([entrant, reference])
    of = [True] * len(entrant) + [False] * len(reference)
    fit = OptimaFit.of(of, runs[X].to_numpy(float), runs["val_loss"].to_numpy(float), at_least=1)
    at = fit.z[fit.method == fit.names.index(True)]
    powers = np.stack([np.ones(len(at)), at, at**2]).mean(axis=1)
    weights = powers @ (fit.to_curve(True) - fit.to_curve(False))
    behind = [
        mean_losses(runs["cell"][(np.array(of) == fit.names[m]) & (runs[X] == x).to_numpy()], sequences or {})
        for m, x in zip(fit.method, fit.x, strict=True)
    ]
    sampled = None if any(losses is None for losses in behind) else np.array(behind)
    return fit.estimate(weights, sampled).with_rates(tuning)


def tuning_error(finals: pd.DataFrame) -> tuple[float, float]:
    """How much the loss depends on which trial was chosen: the scatter of the finalists beyond that of their seeds.

    Args:
        finals: one row per run of a finalist, with `point`, a label, and `val_loss`.

    Returns:
        Its standard deviation in nats, and the degrees of freedom of that.
    """
    losses = [rows["val_loss"].to_numpy(float) for _, rows in finals.groupby("point")]
    between = np.var([each.mean() for each in losses], ddof=1)
    within = np.mean([each.var(ddof=1) / len(each) for each in losses])
    return math.sqrt(max(0.0, float(between - within))), len(losses) - 1.0


def reference_frontier(reference: pd.DataFrame) -> tuple[Array, Array]:
    """Budgets (budgets,) and the reference's losses at its compute optima there."""
    budgets, losses = [], []
    for budget, runs in by_budget(reference).items():
        fit = OptimaFit.of(["reference"] * len(runs), runs[X].to_numpy(float), runs["val_loss"].to_numpy(float))
        found = fit.optimum("reference")
        if found.status.has_number:
            budgets.append(budget)
            losses.append(found.loss)
    return np.array(budgets), np.array(losses)


def multiplier(found: StudentValue, budget: float, frontier: tuple[Array, Array]) -> tuple[float, float, float]:
    """The compute that the reference needs for the entrant's loss, over the budget, with its interval.

    NaN where the loss is above that of the reference's smallest budget, or the reference has no optimum at this one;
    infinite where it is below that of its largest.
    """
    compute, losses = frontier
    if budget not in compute:
        return math.nan, math.nan, math.nan
    here = float(losses[compute == budget][0])
    low, high = found.interval
    levels = here + np.array([found.value, high, low])
    reached = compute_to_reach(compute, losses, levels) / budget
    reached[levels < losses.min()] = math.inf
    reached[levels > losses.max()] = math.nan
    value, least, most = reached.tolist()
    return value, least, most


def ranks(rows: Sequence[StudentValue]) -> list[int]:
    """The rank of each row: one more than the number of rows that are better by Holm's test of all pairs.

    The error of a pair is that of both rows, as if nothing were common to them; the reference's is, so ranks are shared
    rather too often.
    """
    pairs = list(combinations(range(len(rows)), 2))
    less = [
        StudentValue(value=rows[i].value - rows[j].value, se=math.hypot(rows[i].se, rows[j].se),
                     df=min(rows[i].df, rows[j].df))
        for i, j in pairs
    ]  # fmt: skip
    better = [0] * len(rows)
    for (i, j), pair, p in zip(pairs, less, holm(np.array([pair.p for pair in less])), strict=True):
        if p < ALPHA:
            better[i if pair.value > 0 else j] += 1
    return [1 + n for n in better]


@dataclass(frozen=True)
class Runs:
    """The runs of one entrant."""

    entry: Entry

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per run that was not dropped; seeds are counted from the entrant's first."""
        table = runs_table(self.entry.records)
        table["seed"] -= self.entry.about["entrant"]["first_seed"]
        return table[table["status"] != str(Status.DROPPED)]

    @cached_property
    def of_rows(self) -> pd.DataFrame:
        """Those that a row is made of."""
        return self.table[self.table["seed"].isin(SEEDS)]

    @cached_property
    def finished(self) -> pd.DataFrame:
        """Those of them that have a loss."""
        return self.of_rows[usable(self.of_rows)]

    @cached_property
    def tuning(self) -> tuple[float, float]:
        """`tuning_error` of its finalists."""
        finals = self.table[self.table["seed"].isin(FINAL_SEEDS) & usable(self.table)]
        return tuning_error(finals.assign(point=finals["settings"].astype(str) + finals["rate_factor"].astype(str)))


def standing_rows(entries: Sequence[Entry]) -> pd.DataFrame:
    """The standing table: one row per entrant and budget, the best first at each, and one of the reference.

    Columns: budget, rank, entrant, difference, low, high, p, se, df, smallest (the smallest effect that could have been
    told), multiplier, multiplier_low, multiplier_high, multiplier_limit (the largest that the reference's budgets can
    tell), loss (mean over sizes), params_active, params_total (at the middle size), time (of training at equal FLOPs
    over the reference's; NaN: not measured), sizes, seeds, failed (how many of these runs have no loss; without any the
    row has no numbers), trials (all runs but those of the row), mark, date, protocol (its hash), version (the commits
    that trained it).

    Raises:
        UserError: there is not exactly one reference, or nothing else.
    """
    references = [entry for entry in entries if entry.about["entrant"]["reference"]]
    if len(references) != 1:
        raise UserError(f"results/standing has {len(references)} references; a table has one")
    reference = Runs(references[0])
    frontier = reference_frontier(reference.finished)
    rows = []
    for entry in entries:
        if entry is not reference.entry:
            one = Runs(entry)
            budgets = {*one.of_rows["budget"]} & {*reference.finished["budget"]}
            rows += [_row(one, reference, budget, frontier) for budget in budgets]
    if not rows:
        raise UserError(f"only the reference, {reference.entry.name}, is there; next: make place LAYER=NAME")
    rows += [_row(reference, reference, budget, frontier) for budget in {row["budget"] for row in rows}]
    table = pd.DataFrame(rows, columns=COLUMNS)
    for _, at in table[table["difference"].notna()].groupby("budget"):
        each = [StudentValue(value=row["difference"], se=row["se"], df=row["df"]) for _, row in at.iterrows()]
        table.loc[at.index, "rank"] = ranks(each)
    return table.sort_values(["budget", "difference"], ascending=[False, True], ignore_index=True)


def _row(one: Runs, reference: Runs, budget: float, frontier: tuple[Array, Array]) -> dict[str, Any]:
    """The row of an entrant at one budget. The reference's is that of its runs at the sizes of entrants."""
    itself, entrant = one is reference, one.entry.about["entrant"]
    runs, done, against = (of[of["budget"] == budget] for of in (one.of_rows, one.finished, reference.finished))
    if itself:
        runs, done = (of[of["d_model"].isin(SIZES[budget])] for of in (runs, done))
    middle = runs.sort_values(X).iloc[len(runs) // 2]
    row = {
        "budget": budget, "entrant": one.entry.name, "params_active": int(middle["params_active"]),
        "params_total": int(middle["params_total"]), "time": one.entry.time_over_reference or math.nan,
        "sizes": runs["size"].nunique(), "seeds": runs["seed"].nunique(), "failed": len(runs) - len(done),
        "trials": len(one.table) - len(one.of_rows), "mark": "reference" if itself else entrant["mark"],
        **{key: one.entry.about[key] for key in ("date", "protocol")},
        "version": ", ".join(sorted({commit[:7] for commit in runs["git_commit"].dropna()})),
    }  # fmt: skip
    if done.empty:
        return row
    found = StudentValue(value=0.0, se=0.0, df=math.inf)
    if not itself:
        both = [*one.entry.records, *reference.entry.records]
        sequences = sequence_losses(both, {*done["cell"], *against["cell"]})
        found = difference(done, against, sequences, [one.tuning, reference.tuning])
    value, least, most = multiplier(found, budget, frontier)
    return row | {
        "difference": found.value, "low": found.interval[0], "high": found.interval[1], "p": found.p, "se": found.se,
        "df": found.df, "smallest": DETECTABLE * found.se if found.se else math.nan, "multiplier": value,
        "multiplier_low": least, "multiplier_high": most,
        "multiplier_limit": max(frontier[0], default=math.nan) / budget, "loss": done["val_loss"].mean(),
    }  # fmt: skip
