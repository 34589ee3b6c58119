"""The rows of the standing table: entrants against the reference, by the rules of docs/standing-table.md."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import networkx
import numpy as np
import pandas as pd

from peerscale.errors import UserError
from peerscale.laws.linear_fit import DETECTABLE, Array, StudentValue
from peerscale.plan.entrant import FINAL_SEEDS, FINALISTS, SEEDS, SIZES, TRIAL_SEED, TUNING_BUDGET
from peerscale.records.entry import Entry
from peerscale.records.record import Status
from peerscale.records.table import runs_table
from peerscale.stats.comparison import X, mean_losses, sequence_losses
from peerscale.stats.curve import by_budget, usable
from peerscale.stats.multiplier import compute_to_reach
from peerscale.stats.optima import Estimate, OptimaFit, holm, satterthwaite

ALPHA = 0.05
COLUMNS = [
    "budget", "rank", "entrant", "difference", "low", "high", "p", "se", "df", "smallest", "multiplier",
    "multiplier_low", "multiplier_high", "multiplier_least", "multiplier_most", "loss", "params_active",
    "params_total", "time", "sizes", "seeds", "failed", "trials", "mark", "date", "protocol", "version",
]  # fmt: skip
"""Of the table; `standing_rows` says what they are."""


def difference(
    entrant: pd.DataFrame,
    reference: pd.DataFrame,
    sequences: Mapping[str, Array] | None = None,
    tuning: Sequence[tuple[float, float]] = (),
    other: pd.DataFrame | None = None,
) -> Estimate:
    """The entrant's loss less the reference's at equal FLOPs per token, as a mean over the entrant's sizes.

    Args:
        entrant, reference: their finished runs at one budget, with `cell`, `flops_per_token`, `val_loss`; the reference
            has at least three sizes. Its parabola and the entrant's share their curvature.
        sequences: losses of the same validation sequences by cell.
        tuning: standard errors from the choice of both sides' rates, each with its degrees of freedom.
        other: runs of another entrant, whose difference to the reference is then subtracted. Of the reference's error
            only that stays which the two do not have in common.
    """
    sides = [entrant, reference] if other is None else [entrant, other, reference]
    pairs = [_fit(side, reference) for side in sides[:-1]]
    each = [sign * _weights(fit) for sign, fit in zip((1, -1), pairs, strict=False)]
    own = [weights[fit.method == 0] for weights, fit in zip(each, pairs, strict=True)]
    of_reference = sum(weights[fit.method == 1] for weights, fit in zip(each, pairs, strict=True))
    fit = _fit(*sides)
    behind = [
        mean_losses(sides[m]["cell"][(sides[m][X] == x).to_numpy()], sequences or {})
        for m, x in zip(fit.method, fit.x, strict=True)
    ]
    sampled = None if any(losses is None for losses in behind) else np.array(behind)
    found = fit.estimate(np.concatenate([*own, of_reference]), sampled)
    df = satterthwaite((se**2, df) for se, df in tuning)  # the runs of both sides are independent
    return found.with_rates([(math.hypot(*(se for se, _ in tuning)), df)]) if tuning else found


def _fit(*sides: pd.DataFrame) -> OptimaFit:
    """The runs of some entrants, which are numbered."""
    runs = pd.concat(sides)
    of = np.repeat(np.arange(len(sides)), [len(side) for side in sides])
    return OptimaFit.of(of.tolist(), runs[X].to_numpy(float), runs["val_loss"].to_numpy(float), at_least=1)


def _weights(fit: OptimaFit) -> Array:
    """Weights of the size means (points,): the first side's curve less the second's, at the mean of its sizes."""
    at = fit.z[fit.method == 0]
    return np.stack([np.ones(len(at)), at, at**2]).mean(axis=1) @ (fit.to_curve(0) - fit.to_curve(1))


def tuning_error(finals: pd.DataFrame) -> tuple[float, float]:
    """How much the loss depends on which trial was chosen: the scatter of the finalists beyond that of their seeds.

    Args:
        finals: one row per run of a finalist, with `point`, a label, and `val_loss`.

    Returns:
        Its standard deviation in nats, and the degrees of freedom of that. NaN if too many diverged to know it: all
        finalists but one, or a seed of each.
    """
    losses = [rows["val_loss"].to_numpy(float) for _, rows in finals.groupby("point")]
    of_seeds = [each.var(ddof=1) for each in losses if len(each) > 1]
    if len(losses) < 2 or not of_seeds:
        return math.nan, math.nan
    between = np.var([each.mean() for each in losses], ddof=1)
    within = np.mean(of_seeds) * np.mean([1 / len(each) for each in losses])
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

    NaN if the reference has no optimum at this budget; 0 where the loss is above that of the reference's smallest
    budget, infinite where it is below that of its largest. The reference's losses are taken as exact.
    """
    compute, losses = frontier
    if budget not in compute:
        return math.nan, math.nan, math.nan
    here = float(losses[compute == budget][0])
    low, high = found.interval
    levels = here + np.array([found.value, high, low])
    reached = compute_to_reach(compute, losses, levels) / budget
    reached[levels < losses.min()] = math.inf
    reached[levels > losses.max()] = 0.0
    value, least, most = reached.tolist()
    return value, least, most


def ranks(n: int, told_apart: Iterable[tuple[int, int]]) -> list[str]:
    """The ranks of each of `n` rows in the order of their losses, such as `1`, or `1, 2` of a row that has two.

    A rank is a largest set of rows of which no two are told apart, so two rows have a rank in common if, and only if,
    they are not (compact letter display: Piepho 2004). Ranks are in the order of their best rows.
    """
    alike = networkx.Graph()
    alike.add_nodes_from(range(n))
    alike.add_edges_from({*combinations(range(n), 2)} - {*told_apart})
    found = sorted(sorted(rows) for rows in networkx.find_cliques(alike))
    return [", ".join(str(rank) for rank, rows in enumerate(found, 1) if row in rows) for row in range(n)]


@dataclass(frozen=True)
class Runs:
    """The runs of one entrant."""

    entry: Entry

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per run that was not dropped; seeds are counted from the entrant's first."""
        table = runs_table(self.entry.records)
        table["cell"] = f"{self.entry.name}/" + table["cell"]  # two entrants may have cells of one name
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
        """`tuning_error` of its finalists, the best three of all trials."""
        runs = self.table[usable(self.table) & (self.table["budget"] == TUNING_BUDGET)]
        runs = runs.assign(point=runs["settings"].astype(str) + runs["rate_factor"].astype(str))
        finals = runs[runs["seed"].isin(FINAL_SEEDS)]
        trials = runs[(runs["seed"] == TRIAL_SEED) & runs["point"].isin(finals["point"])]
        return tuning_error(finals[finals["point"].isin(trials.nsmallest(FINALISTS, "val_loss")["point"])])

    @cached_property
    def sequences(self) -> dict[str, Array]:
        """Losses of the validation sequences by cell."""
        finished = {*self.finished["cell"].str.removeprefix(f"{self.entry.name}/")}
        return {f"{self.entry.name}/{cell}": losses
                for cell, losses in sequence_losses(self.entry.records, finished).items()}  # fmt: skip

    def at(self, budget: float) -> pd.DataFrame:
        """The finished runs of its row at a budget."""
        return self.finished[self.finished["budget"] == budget]


def standing_rows(entries: Sequence[Entry]) -> pd.DataFrame:
    """The standing table: one row per entrant and budget, the best first at each, and one of the reference.

    Columns: budget, rank, entrant, difference, low, high, p, se, df, smallest (the smallest effect that could have been
    told), multiplier, multiplier_low, multiplier_high, multiplier_least and multiplier_most (the smallest and the
    largest that the reference's budgets can tell), loss (mean over sizes), params_active, params_total (at the middle
    size), time (of training at equal FLOPs over the reference's; NaN: not measured), sizes, seeds, failed (how many of
    these runs have no loss; without any the row has no numbers), trials (the runs up to this budget that chose), mark,
    date, protocol (its hash), version (the commits that trained it, `+` if the checkout had changes).

    Raises:
        UserError: there is not exactly one reference, or nothing else; or rows followed different protocols.
    """
    references = [entry for entry in entries if entry.about["entrant"]["reference"]]
    if len(references) != 1:
        raise UserError(f"{len(references)} references; a table has one")
    if len(protocols := {entry.about["protocol"]: entry.name for entry in entries}) > 1:
        different = ", ".join(f"{name} {protocol}" for protocol, name in protocols.items())
        raise UserError(f"rows of different protocols, which cannot be compared: {different}")
    runs = {entry.name: Runs(entry) for entry in entries}
    reference = runs[references[0].name]
    frontier = reference_frontier(reference.finished)
    rows = [
        _row(one, reference, budget, frontier)
        for one in runs.values() if one is not reference
        for budget in {*one.of_rows["budget"]} & {*reference.finished["budget"]}
    ]  # fmt: skip
    if not rows:
        raise UserError(f"only the reference, {reference.entry.name}, is there; other rows come from make place")
    rows += [_row(reference, reference, budget, frontier) for budget in {row["budget"] for row in rows}]
    table = pd.DataFrame(rows, columns=COLUMNS).sort_values(["budget", "difference"], ascending=[False, True])
    for budget, at in table[table["difference"].notna()].groupby("budget"):
        pairs = [*combinations(range(len(at)), 2)]
        entrants = [runs[name] for name in at["entrant"]]
        p = [_less(entrants[i], entrants[j], reference, float(str(budget))).p for i, j in pairs]
        told_apart = [pair for pair, corrected in zip(pairs, holm(np.array(p)), strict=True) if corrected < ALPHA]
        table.loc[at.index, "rank"] = ranks(len(at), told_apart)
    return table.reset_index(drop=True)


def _less(one: Runs, other: Runs, reference: Runs, budget: float) -> Estimate:
    """The `difference` of one entrant less that of another; one of them may be the reference."""
    if one is reference:
        one, other = other, one
    sequences = one.sequences | other.sequences | reference.sequences
    third = None if other is reference else other.at(budget)
    return difference(one.at(budget), reference.at(budget), sequences, [one.tuning, other.tuning], third)


def _row(one: Runs, reference: Runs, budget: float, frontier: tuple[Array, Array]) -> dict[str, Any]:
    """The row of an entrant at one budget. The reference's is that of its runs at the sizes of entrants."""
    itself, entrant = one is reference, one.entry.about["entrant"]
    runs, done = one.of_rows[one.of_rows["budget"] == budget], one.at(budget)
    commits = sorted({*runs["git_commit"].dropna().map(_short)})
    if itself:
        runs, done = (of[of["d_model"].isin(SIZES[budget])] for of in (runs, done))
    middle = runs.sort_values(X).iloc[len(runs) // 2]
    row = {
        "budget": budget, "rank": None, "entrant": one.entry.name, "params_active": int(middle["params_active"]),
        "params_total": int(middle["params_total"]), "time": one.entry.time_over_reference or math.nan,
        "sizes": runs["size"].nunique(), "seeds": runs["seed"].nunique(), "failed": len(runs) - len(done),
        "trials": int((~one.table["seed"].isin(SEEDS) & (one.table["budget"] <= budget)).sum()),
        "mark": "reference" if itself else entrant["mark"],
        **{key: one.entry.about[key] for key in ("date", "protocol")},
        "version": ", ".join(commits),
    }  # fmt: skip
    if done.empty:
        return row
    none = StudentValue(value=0.0, se=0.0, df=math.inf)
    found = none if itself else _less(one, reference, reference, budget)
    value, least, most = multiplier(found, budget, frontier)
    return row | {
        "difference": found.value, "low": found.interval[0], "high": found.interval[1], "p": found.p, "se": found.se,
        "df": found.df, "smallest": DETECTABLE * found.se if found.se else math.nan, "multiplier": value,
        "multiplier_low": least, "multiplier_high": most,
        "multiplier_least": min(frontier[0], default=math.nan) / budget,
        "multiplier_most": max(frontier[0], default=math.nan) / budget, "loss": done["val_loss"].mean(),
    }  # fmt: skip


def _short(commit: str) -> str:
    return commit[:7] + "+" * commit.endswith("+dirty")
