"""The claims of the PEER paper and what the published studies say of each: tables of two pages."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from peerscale.config.compose import header, sweep_text
from peerscale.errors import UserError
from peerscale.figures.answer import EQUALS, LEADS, TRAILS, UNDECIDED, outcome
from peerscale.figures.markdown import leaves_out_seeds, number, plus_minus, signed_interval, table, with_interval
from peerscale.figures.multipliers import COLUMNS, in_measured_time, paper_multipliers
from peerscale.figures.published import WITHOUT_NORM, paper_values, read_published
from peerscale.figures.style import label, size_label
from peerscale.plan.cell_names import budget_name
from peerscale.records.record import ENDED, Status
from peerscale.records.study import published, read_fits
from peerscale.records.table import read_runs
from peerscale.stats.claims import turned
from peerscale.stats.curves_of_runs import method_names, usable, without_brackets

BEGIN, END = "<!-- begin: make findings -->", "<!-- end -->"
"""Lines of a page between which its table stands."""

MAIN = ("isoflop_cpu", "every_block", "reproduce", "isoflop_rates_5e11")
"""The studies of losses at the optimum."""

EARLIER = "open: learning rates tuned at 5e11 FLOPs"
"""The verdict on what was measured before rates followed a law."""

ALL_USED = 0.99
"""Share of the experts from which all are called used."""

RIVALS = ("dense", "moe_token_choice", "moe", "pkm")

PARTS = {"fit_se": "sizes", "seeds_se": "seeds", "sequences_se": "sequences", "rate_se": "rates"}

VERDICTS = {
    LEADS: "holds",
    TRAILS: "does not hold: PEER is behind",
    EQUALS: "does not hold: equal",
    UNDECIDED: "cannot be told",
}

Row = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """A published study that tells about a claim."""

    sweep: str
    fits: Mapping[str, Any]
    runs: pd.DataFrame
    """Finished cells, without rate brackets."""
    earlier: bool
    """Whether its rates are from 5e11 FLOPs, so that it decides nothing (`EARLIER`)."""
    to_run: str
    """How many of its cells are still to run, empty if none; its claims are tested as if these had all run."""


def with_table(text: str, rows: Iterable[Row], page: Path) -> str:
    """The text of a page with its table replaced by these rows; raises `UserError` if it has no place for a table."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{page} needs the lines {BEGIN} and {END}, between which its table stands")
    return "\n".join([before + begin, "", *table(rows), "", end + after])


def difference_rows(results: Path) -> list[Row]:
    """A row a budget: PEER's loss less that of each rival, significant claims in bold, and PEER's multiplier.

    Links are those of the README.
    """
    rows: list[tuple[float, Row]] = []
    for found in _published(results, *MAIN):
        if found.earlier:
            continue
        claims = [c for c in found.fits["claims"] if c["method"] == "peer"]
        significant = {(c["rival"], _place(c)) for c in claims if outcome(c) in (LEADS, TRAILS)}
        gains = {one["budget"]: one for one in found.fits["multipliers"] if one["method"] == "peer"}
        timed = in_measured_time(pd.DataFrame(found.fits["multipliers"], columns=COLUMNS), found.fits["conventions"])
        in_time: dict[float, Any] = {one["budget"]: one for one in timed[timed["method"] == "peer"].to_dict("records")}
        for budget in [entry["budget"] for entry in found.fits["budgets"]]:
            texts: dict[str, list[str]] = {rival: [] for rival in RIVALS}
            for rival in RIVALS:
                for one in _differences(found, "peer", rival):
                    if one["budget"] == budget:
                        bold = "**" * ((rival, _place(one)) in significant)
                        at = " (without seeds)" * leaves_out_seeds(one)
                        at += f" at {size_label(one['size'])}" * bool(one["size"])
                        texts[rival].append(f"{bold}{plus_minus(one)}{bold}{at}")
            row = {f"PEER − {label(rival)}": ", ".join(each) or "—" for rival, each in texts.items()}
            for title, each in (("multiplier [95 %]", gains), ("in training time", in_time)):
                row[title] = _interval(each[budget], "multiplier") if budget in each else "—"
            if {*row.values()} != {"—"}:
                study = f"[{found.sweep}](results/{found.sweep}/table.md)"
                seeds = _fewest_to_most_seeds(found.runs[found.runs["budget"] == budget])
                rows.append((budget, {"FLOPs": budget_name(budget), **row, "seeds": seeds, "study": study}))
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


def _fewest_to_most_seeds(runs: pd.DataFrame) -> str:
    """How many seeds the models of the methods as configured have."""
    names = method_names(runs)
    usual = ~names.str.contains(" ")
    seeds = runs[usual].groupby([names[usual], "size"])["seed"].nunique()
    return " to ".join(str(n) for n in dict.fromkeys((seeds.min(), seeds.max()))) if len(seeds) else "—"


def verdict_rows(results: Path) -> list[Row]:
    """A row a claim: what the paper reports, what the studies in `results` measured, and whether the claim holds."""
    paper = read_published()
    main = _published(results, *MAIN)
    rows = [
        _row(f"PEER beats {label(rival)}", _paper_difference(paper, rival), main, _against(rival))
        for rival in ("dense", "moe_token_choice", "pkm", "moe")
    ]
    ratios = paper_multipliers(paper, ["peer"])["peer"]
    reported = ", ".join(f"{ratio:.2f} at {budget_name(budget)}" for budget, ratio in ratios.items())
    rows.append(_row("PEER's multiplier grows with the budget", f"multipliers {reported} (derived)", main, _growth))
    by_experts = paper_values(paper, "table 2", "peer", "ppl_c4")
    ends = [f"perplexity {by_experts[n]:.2f} with {int(n):,}" for n in (min(by_experts), max(by_experts))]
    of_experts = [one for one in main if any("n_experts" in name for name in _methods(one))]
    of_experts += _published(results, "experts")
    rows.append(_row("More experts help", "; ".join(ends), of_experts, _experts))
    in_words = "more active experts are better, with more heads (figure 3b, without numbers)"
    rows.append(_row("More active experts help", in_words, _published(results, "active"), _active))
    without = paper_values(paper, "table 2", WITHOUT_NORM, "ppl_c4")
    gains = [float(np.log(perplexity / without[n])) for n, perplexity in by_experts.items()]
    reported = f"{number(min(gains), '{:+.3f}')} to {number(abs(max(gains)), '{:.3f}')} nats (derived)"
    rows.append(_row("BatchNorm of the queries helps", reported, _published(results, "controls", "experts"), _norm))
    rows.append(
        _row("All experts are used", "100 % of up to 1,048,576", [*main, *_published(results, "experts")], _usage)
    )
    return rows


def _published(results: Path, *sweeps: str) -> list[Evidence]:
    """Those of the studies that are published."""
    found = []
    for sweep in sweeps:
        study = published(sweep, results)
        if study.fits.is_file():
            runs = read_runs(study.runs)
            left = (~runs["status"].isin([*ENDED, Status.DROPPED])).sum()
            to_run = f"; {left} of its {len(runs)} cells are still to run" if left else ""
            earlier, fits = "Withdrawn" in header(sweep_text(sweep)), read_fits(study.fits)
            usual = without_brackets(runs)
            found.append(Evidence(sweep=sweep, fits=fits, runs=usual[usable(usual)], earlier=earlier, to_run=to_run))
    return found


def _row(claim: str, paper: str, studies: Iterable[Evidence], judge: Callable[[Evidence], tuple[str, str]]) -> Row:
    """The row of a claim; a study with rates from 5e11 FLOPs counts only if no other has measured something of it."""
    told = [(found, measured, verdict) for found in studies for measured, verdict in [judge(found)] if measured]
    told = [one for one in told if not one[0].earlier] or told[:1]
    measured = [f"{text} ([{found.sweep}](../results/{found.sweep}/table.md))" for found, text, _ in told]
    judged = [(found.sweep, EARLIER if found.earlier else verdict + found.to_run) for found, _, verdict in told]
    verdicts = [f"{sweep}: " * (len(told) > 1) + verdict for sweep, verdict in judged]
    return {"claim": claim, "the paper": paper, "measured here": "; ".join(measured) or "—",
            "verdict": "; ".join(verdicts) or "not measured yet"}  # fmt: skip


def _against(rival: str) -> Callable[[Evidence], tuple[str, str]]:
    """PEER minus a rival, for the claims about it, or for every difference where the study claims nothing about it."""

    def judge(found: Evidence) -> tuple[str, str]:
        claims = {_place(c): c for c in found.fits["claims"] if (c["method"], c["rival"]) == ("peer", rival)}
        measured, verdicts = [], []
        for one in _differences(found, "peer", rival):
            place = _place(one)
            if claims and place not in claims:
                continue
            parts = ", ".join(f"{word} {one[key]:.3f}" for key, word in PARTS.items() if one.get(key) is not None)
            measured.append(f"{place}: {plus_minus(one)} ({parts})")
            verdicts.append((VERDICTS[outcome(claims[place])] if claims else _told(one) + ", descriptive", place))
        return "; ".join(measured), _by_verdict(verdicts)

    return judge


def _told(one: Mapping[str, Any]) -> str:
    """What an interval by itself says of the claim that a difference is negative."""
    if leaves_out_seeds(one):
        return "open: one seed"
    low, high = np.array([one["low"], one["high"]], float)  # NaN if it is not known
    return "holds" if high < 0 else "does not hold" if low > 0 else "cannot be told"


def _by_verdict(verdicts: Iterable[tuple[str, str]]) -> str:
    """`holds (at 1e14; 3e13); cannot be told (at 3e12)` from pairs of verdict and place."""
    at: dict[str, list[str]] = {}
    for verdict, place in verdicts:
        at.setdefault(verdict, []).append(place)
    return "; ".join(f"{verdict} (at {'; '.join(places)})" for verdict, places in at.items())


def _growth(found: Evidence) -> tuple[str, str]:
    each = sorted((one for one in found.fits["multipliers"] if one["method"] == "peer"), key=lambda one: -one["budget"])
    values = "; ".join(f"{budget_name(one['budget'])}: {_interval(one, 'multiplier')}" for one in each)
    slope = next((one for one in found.fits["growth"] if one["method"] == "peer"), None)
    if slope is None:
        return values, "cannot be told: needs four budgets of one kind of model"
    low, high = np.array([slope["low"], slope["high"]], float)
    return f"ln multiplier per decade {_interval(slope, 'slope')}; {values}", _told({"low": -high, "high": -low})


def _experts(found: Evidence) -> tuple[str, str]:
    """Further numbers of experts against the usual one at the optimum, or each against dense at one size."""
    reference = "peer" if "peer" in _methods(found) else "dense"
    usual = re.compile(r"peer n_experts=(\d+)(-query_norm=true)?")
    variants = {int(match[1]): match[0] for match in map(usual.fullmatch, _methods(found)) if match}
    pairs = [(n, one) for n in sorted(variants) for one in _differences(found, variants[n], reference)]
    texts = [f"{n:,} experts at {_place(one)}: {signed_interval(one)}" for n, one in pairs]
    if reference == "dense" and pairs:
        best = min(pairs, key=lambda pair: pair[1]["value"])[0]
        return "; ".join(texts), f"descriptive: the lowest loss is that of {best:,} experts"
    return "; ".join(texts), _by_verdict((f"{_told(one)}, descriptive", _place(one)) for _, one in pairs)


def _active(found: Evidence) -> tuple[str, str]:
    """For each number of active experts, the best number of heads and its loss less dense's, at one size."""
    best: dict[int, tuple[int, dict[str, Any]]] = {}
    for match in filter(None, (re.fullmatch(r"peer n_heads=(\d+)-top_k=(\d+)", name) for name in _methods(found))):
        heads, active = int(match[1]), int(match[1]) * int(match[2])
        for one in _differences(found, match[0], "dense"):
            if active not in best or one["value"] < best[active][1]["value"]:
                best[active] = heads, one
    if not best:
        return "", ""
    texts = [f"{n} ({heads} head{'s' * (heads > 1)}): {plus_minus(one)}" for n, (heads, one) in sorted(best.items())]
    lowest = min(best, key=lambda n: best[n][1]["value"])
    heads = [best[n][0] for n in sorted(best)]
    grows = "grows" if heads == sorted(heads) and heads[0] < heads[-1] else "does not grow"
    told = f"descriptive: the lowest loss is that of {lowest} active experts, and their best number of heads {grows}"
    return f"active experts (best number of heads), less dense: {', '.join(texts)}", told


def _norm(found: Evidence) -> tuple[str, str]:
    """PEER with BatchNorm minus PEER without it, at one size."""
    pairs = [(name, name.replace("query_norm=true", "query_norm=false")) for name in _methods(found)]
    texts, told = [], []
    for name, other in [(name, other) for name, other in pairs if name != other] + [("peer", "peer query_norm=false")]:
        for one in _differences(found, name, other):
            experts = name.partition("n_experts=")[2].partition("-")[0]
            place = f"{int(experts):,} experts" if experts else _place(one)
            texts.append(f"{place}: {signed_interval(one)}")
            told.append((f"{_told(one)}, descriptive", place))
    return "; ".join(texts), _by_verdict(told)


def _usage(found: Evidence) -> tuple[str, str]:
    """The share of used experts with BatchNorm, from lowest to highest cell, at the largest budget of each number."""
    rows = found.runs[found.runs["method"] == "peer"]
    rows = rows[rows.get("query_norm", pd.Series(index=rows.index)).astype(str) != "False"]
    rows = rows[rows["budget"] == rows.groupby("n_experts")["budget"].transform("max")]
    texts, lowest = [], {}
    for (n, budget), usage in rows.groupby(["n_experts", "budget"])["expert_usage"]:
        lowest[int(n)] = usage.min()
        ends = dict.fromkeys(f"{share:.1%}" for share in (usage.min(), usage.max()))
        texts.append(f"{' to '.join(ends)} of {int(n):,} at {budget_name(budget)}")
    used = [n for n, share in lowest.items() if share >= ALL_USED]
    few, many = (", ".join(f"{n:,}" for n in lowest if (n in used) is are) for are in (True, False))
    told = f"holds for {few}, not for {many} experts (each at its largest budget)" if used else "does not hold"
    return "; ".join(texts), "holds" if len(used) == len(lowest) else told


def _methods(found: Evidence) -> list[str]:
    differences = [one for entry in found.fits["budgets"] for one in entry["differences"]]
    return list(dict.fromkeys(one[key] for one in differences for key in ("method", "reference")))


def _differences(found: Evidence, method: str, reference: str) -> list[dict[str, Any]]:
    """Method minus reference at each budget, the largest first, and size, whichever of the two the study subtracts."""
    known: dict[tuple[float, str], dict[str, Any]] = {}  # a study may have a pair both ways
    for entry in sorted(found.fits["budgets"], key=lambda entry: -entry["budget"]):
        for one in entry["differences"]:
            if {one["method"], one["reference"]} == {method, reference} and one.get("value") is not None:
                known[entry["budget"], one["size"]] = {"budget": entry["budget"], **one}
    return [one if one["method"] == method else turned(one) for one in known.values()]


def _place(one: Mapping[str, Any]) -> str:
    """`1e13`, or of a comparison at one size `1e13, d_model 64`."""
    return ", ".join(filter(None, (budget_name(one["budget"]), size_label(one["size"]))))


def _interval(one: Mapping[str, Any], key: str) -> str:
    return with_interval(one[key], (one["low"], one["high"]), "{:.2f}")


def _paper_difference(paper: pd.DataFrame, rival: str) -> str:
    own, other = (paper_values(paper, "table 1", name, "ppl_c4") for name in ("peer", rival))
    texts = [f"{number(float(np.log(own[b] / other[b])), '{:+.3f}')} nats at {budget_name(b)}" for b in other]
    return "; ".join(texts) or "not compared"
