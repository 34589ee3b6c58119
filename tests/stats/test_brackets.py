"""Rate brackets of made-up studies, whose best rates and losses are known."""

import json
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from made_up_study import LADDER, SIZES, curves, run, with_columns
from peerscale.stats import frontiers
from peerscale.stats.brackets import fit_rate_brackets
from peerscale.stats.comparison import compare
from peerscale.stats.curve import to_names, without_brackets
from peerscale.stats.fits import fit_study
from peerscale.stats.rate_law import fit_rates
from peerscale.stats.rate_parabolas import fit_brackets
from toy_study import settings_text

K = 0.06
"""Nats per squared factor of e."""
TRUE = {("dense", 1e12): 4.50, ("peer", 1e12): 4.46}
"""Losses at the best rates."""


def study(
    off: dict[str, float], *, true: dict[tuple[str, float], float] = TRUE, noise: float = 0.0, rng: int = 0,
    factors: tuple[float, ...] = (0.5, 2.0), bracketed: slice = slice(1, 4, 2), seeds: int = 1,
) -> pd.DataFrame:  # fmt: skip
    """Curves of each method at a rate whose logarithm is `off` below the best, with brackets at some sizes."""
    usual = {(m, c): loss + K * off.get(m, 0.0) ** 2 for (m, c), loss in true.items()}
    main = curves(usual, noise=noise, rng=rng, seeds=seeds).assign(lr=0.01)
    draw, rows = np.random.default_rng(rng + 10_000).normal, []
    for (method, budget), at in main[main["method"].isin(off)].groupby(["method", "budget"]):
        for x in np.sort(at["flops_per_token"].unique())[bracketed]:
            for cell in at[at["flops_per_token"] == x].to_dict("records"):
                for factor in factors:
                    change = K * ((math.log(factor) - off[str(method)]) ** 2 - off[str(method)] ** 2)
                    loss = cell["val_loss"] + change + math.sqrt(2) * noise * draw()
                    rows.append(run(str(method), float(str(budget)), loss, x=x, size=cell["size"], seed=cell["seed"],
                                    rate_factor=factor, lr=0.01 * factor))  # fmt: skip
    return pd.concat([main, pd.DataFrame(rows)], ignore_index=True)


def difference(found: dict[str, Any], budget: float = 1e12) -> dict[str, Any]:
    (one,) = (
        d for e in found["budgets"] if e["budget"] == budget for d in e["differences"]
        if (d["method"], d["reference"]) == ("peer", "dense")
    )  # fmt: skip
    return one


def test_exact_brackets_are_recovered() -> None:
    off = {"dense": 0.3, "peer": -0.5}
    found = to_names(fit_rate_brackets(study(off)))
    assert found is not None and found["curvature"] == pytest.approx(K) and found["df"] == 4 - 1
    assert [(one["budget"], one["method"]) for one in found["each"]] == [(1e12, "dense"), (1e12, "peer")] * 2
    for one in found["each"]:
        assert one["best"] == pytest.approx(math.exp(off[one["method"]]))
        assert one["gain"] == pytest.approx(K * off[one["method"]] ** 2) and one["se"] < 1e-9
        assert one["lowest"] == pytest.approx(one["losses"]["1"] - one["gain"])
        assert list(one["losses"]) == ["0.5", "1", "2"] and one["seeds"] == 1


def test_the_fit_is_that_of_the_law_of_rates_and_its_error_that_of_simulated_noise() -> None:
    """The best rates of `stats.rate_law`, which has its own algebra, and the scatter of the gain over many draws."""
    log_best, factors = np.array([0.3, -0.5, 0.0, 0.6]), np.array([0.5, 1.0, 2.0])
    which = np.repeat(np.arange(4), 3)
    x, mean = np.tile(np.log(factors), 4), K * (np.tile(np.log(factors), 4) - log_best[which]) ** 2 + 4.0
    names, seeds, rng = [f"b{i}" for i in which], [0] * 12, np.random.default_rng(1)
    draws = []
    for _ in range(400):
        losses = mean + 0.002 * rng.normal(size=12)
        draws.append(fit_brackets(np.exp(x), losses, names, seeds))
    law = fit_rates(pd.DataFrame({"lr": np.exp(x), "loss": losses, "of": names}), by="of", reach=1e9)
    last = draws[-1]
    for key in ("curvature", "curvature_se", "scatter"):
        assert last[key] == pytest.approx(getattr(law, key))
    assert last["df"] == law.df == 3
    for one, curve in zip(last["each"], law.curves, strict=True):
        assert (one["best"], one["lowest"]) == pytest.approx((curve.best, curve.lowest))
    for i in (0, 1, 3):  # at the third's best rate the gain has no slope
        gains = np.array([draw["each"][i]["gain"] for draw in draws])
        assert gains.mean() == pytest.approx(K * log_best[i] ** 2, abs=0.0008)
        expected = math.sqrt(np.mean([draw["each"][i]["se"] ** 2 for draw in draws]))
        assert gains.std() == pytest.approx(expected, rel=0.12)
    third = pd.DataFrame([draw["each"][2] for draw in draws])
    expected = math.sqrt((third["se"] ** 2).mean())
    assert third["se"].min() > 0 and third["gain"].std() < expected < 2 * third["gain"].std()


def test_seeds_of_a_bracket_share_its_best_rate() -> None:
    """Two seeds with levels of their own, against one least-squares fit of all coefficients."""
    runs = study({"dense": 0.4, "peer": -0.2}, noise=0.004, rng=3, seeds=2, bracketed=slice(2, 3))
    found = fit_rate_brackets(runs)
    rows = runs[runs["flops_per_token"] == SIZES[2]]
    x, losses = np.log(rows["lr"] / 0.01).to_numpy(), rows["val_loss"].to_numpy()
    own = [[m == name for name in ("dense", "peer")] for m in rows["method"]]
    level = [[(m, s) == key for key in (("dense", 0), ("dense", 1), ("peer", 0), ("peer", 1))]
             for m, s in zip(rows["method"], rows["seed"], strict=True)]  # fmt: skip
    design = np.column_stack([x**2, np.array(own, float) * x[:, None], np.array(level, float)])
    (k, *slopes), rss, *_ = np.linalg.lstsq(design, losses, rcond=None)
    assert found is not None and found["df"] == 12 - 7 and found["scatter"] == pytest.approx(math.sqrt(rss[0] / 5))
    for one, slope in zip(found["each"], slopes[:2], strict=True):
        assert one["best"] == pytest.approx(math.exp(-slope / (2 * k))) and one["seeds"] == 2
        assert one["gain"] == pytest.approx(slope**2 / (4 * k))


def test_brackets_are_no_points_of_curves() -> None:
    """Whatever their losses are, only errors change by them."""
    runs = study({"dense": 0.3, "peer": -0.5}, noise=0.003)
    main = without_brackets(runs)
    assert len(main) == 10 and (runs["rate_factor"] != 1).sum() == 8
    with_them, without = (
        fit_study(table, compare(table.assign(ppl_x=1.0), [])) for table in (with_columns(runs), with_columns(main))
    )
    assert with_them["laws"] == without["laws"] and with_them["conventions"] == without["conventions"]
    assert without["rates"] == {"law": None, "tables": None} and with_them["rates"]["law"] is None
    a, b = with_them["budgets"][0], without["budgets"][0]
    assert [m["name"] for m in a["methods"]] == ["dense", "peer"]
    for key in ("scatter", "df", "curvature", "equality"):
        assert a[key] == b[key]
    for one, other in zip(a["methods"] + a["differences"], b["methods"] + b["differences"], strict=True):
        same = one.keys() - {"rate_se", "se", "df", "low", "high", "p", "own", "sets"}
        assert {k: one[k] for k in same} == {k: other[k] for k in same} and other["rate_se"] is None
        assert one["se"] > other["se"]


def test_the_error_is_the_root_mean_square_of_gains_and_their_errors() -> None:
    runs = study({"dense": 0.3, "peer": -0.5}, noise=0.002, rng=2)
    found, plain = compare(runs, []), compare(without_brackets(runs), [])
    brackets = found["rates"]["brackets"]
    ses = {
        name: math.sqrt(np.mean([b["gain"] ** 2 + b["se"] ** 2 for b in brackets["each"] if b["method"] == name]))
        for name in ("dense", "peer")
    }
    for method in found["budgets"][0]["methods"]:
        assert method["rate_se"] == pytest.approx(ses[method["name"]])
    one, before = difference(found), difference(plain)
    rate = math.hypot(*ses.values())
    scatter = sum(np.mean([b["se"] ** 2 for b in brackets["each"] if b["method"] == name]) for name in ses)
    of_one = {e["method"]: e for e in found["rates"]["errors"]}
    assert one["value"] == before["value"] and one["rate_se"] == pytest.approx(rate)
    assert one["se"] == pytest.approx(math.hypot(before["se"], rate))
    df = one["se"] ** 4 / (before["se"] ** 4 / before["df"] + scatter**2 / brackets["df"])
    half = stats.t.ppf(0.975, df) * one["se"]
    assert one["df"] == pytest.approx(df) and (one["low"], one["high"]) == pytest.approx(
        (one["value"] - half, one["value"] + half)
    )
    for name, error in of_one.items():
        alone = np.mean([b["se"] ** 2 for b in brackets["each"] if b["method"] == name])
        assert error["se"] == pytest.approx(ses[name]) and error["source"] == "brackets"
        assert error["df"] == pytest.approx(ses[name] ** 4 / (alone**2 / 3))


def test_what_is_not_bracketed_has_the_stated_cost_or_nothing() -> None:
    true = TRUE | {("dense", 3e12): 4.2, ("peer", 3e12): 4.15}
    runs = study({"dense": 0.3}, true=true, noise=0.002)
    runs = runs[~((runs["rate_factor"] != 1) & (runs["budget"] == 3e12))]
    known = {e["budget"]: e for e in compare(runs, [])["budgets"]}
    assert [m["rate_se"] is None for m in known[1e12]["methods"]] == [False, True]
    assert [m["rate_se"] for m in known[3e12]["methods"]] == [None, None]
    found = compare(runs, [], rates_cost=0.004)
    assert [(e["budget"], e["method"], e["source"]) for e in found["rates"]["errors"]] == [
        (1e12, "dense", "brackets"), (1e12, "peer", "cost"), (3e12, "dense", "cost"), (3e12, "peer", "cost"),
    ]  # fmt: skip
    one, before = difference(found, 3e12), difference(compare(without_brackets(runs), []), 3e12)
    assert one["rate_se"] == pytest.approx(0.004 * math.sqrt(2)) and found["rates"]["cost"] == 0.004
    # Both methods have the same stated cost, which is known as well as a standard deviation of three values.
    df = one["se"] ** 4 / (before["se"] ** 4 / before["df"] + one["rate_se"] ** 4 / 2)
    assert one["df"] == pytest.approx(df)


def test_coverage_where_each_methods_rate_is_off_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """The truth is the difference at the best rates; without brackets the interval holds noise alone."""
    monkeypatch.setattr(frontiers, "DRAWS", 2)  # of the multipliers' bootstrap, which costs most of the time
    rng, covered = np.random.default_rng(5), []
    for draw in range(50):
        runs = study({method: float(rng.normal(0, 0.5)) for method in ("dense", "peer")}, noise=0.003, rng=draw)
        both = (difference(compare(table, [])) for table in (runs, without_brackets(runs)))
        covered.append([one["low"] <= -0.04 <= one["high"] for one in both])
    with_brackets, without = np.mean(covered, axis=0)
    assert with_brackets >= 0.93 and without < 0.6, (with_brackets, without)


def test_multipliers_are_drawn_under_the_error_of_rates() -> None:
    """The interval of the multiplier's logarithm against propagation of the two errors through the frontier."""
    true = {(m, c): 40 * (g * c) ** -0.07 for m, g in (("dense", 1.0), ("peer", 1.5)) for c in LADDER}
    found = compare(study({}, true=true, noise=1e-6), [], rates_cost=0.01)
    (last,) = (m for m in found["multipliers"] if m["budget"] == 1e13)
    half = math.log(last["high"] / last["low"]) / 2
    # PEER's loss at 1e13 is reached by dense between 1e13 and 3e13, whose errors are weighted by the distances.
    loss = true["dense", 1e13]
    place = math.log(1.5) / math.log(3)  # of dense's frontier on its way to the next budget
    error = 0.01 * math.sqrt(1 + place**2 + (1 - place) ** 2)
    assert 0.7 < half / (1.96 * error / (0.07 * loss)) < 1.3
    narrow = compare(study({}, true=true, noise=1e-6), [])["multipliers"]
    assert all(math.log(m["high"] / m["low"]) < 0.01 for m in narrow)


def test_one_size_is_compared_with_the_error_of_rates() -> None:
    rows = [
        run(m, 3e12, loss + 0.004 * seed, size="d64", seed=seed, lr=0.01)
        for m, loss in (("dense", 4.5), ("peer", 4.47)) for seed in range(2)
    ]  # fmt: skip
    rows += [
        run(m, 3e12, loss + K * math.log(f) ** 2 + 0.001 * (m == "peer") * (f > 1), size="d64", lr=0.01 * f,
            rate_factor=f)
        for m, loss in (("dense", 4.5), ("peer", 4.47)) for f in (0.5, 2.0)
    ]  # fmt: skip
    found = compare(pd.DataFrame(rows), [])
    (one,) = (d for d in found["budgets"][0]["differences"] if (d["method"], d["reference"]) == ("peer", "dense"))
    assert one["size"] == "d64" and one["rate_se"] > 0 and one["value"] == pytest.approx(-0.03)
    assert one["se"] == pytest.approx(math.hypot(one["seeds_se"], one["rate_se"]))


def test_brackets_that_determine_nothing_give_no_error_and_are_told() -> None:
    flat = study({"dense": 0.0, "peer": 0.0}, noise=0.0)
    flat.loc[flat["rate_factor"] != 1, "val_loss"] -= 0.2  # lower on both sides
    found = compare(flat, [])
    assert found["rates"]["brackets"]["each"][0]["best"] is None and difference(found)["rate_se"] is None
    single = study({"dense": 0.3}, bracketed=slice(2, 3), noise=0.003)
    found = compare(single, [])
    (bracket,) = found["rates"]["brackets"]["each"]
    assert bracket["gain"] > 0 and bracket["se"] is None and difference(found)["rate_se"] is None
    two = study({"dense": 0.3}, factors=(2.0,))
    assert compare(two, [])["rates"]["brackets"]["curvature"] is None  # two rates know no curvature
    json.dumps(found, allow_nan=False)


def test_a_bracket_wants_its_finished_cell_at_the_usual_rate() -> None:
    runs = study({"dense": 0.3, "peer": -0.5}, noise=0.001)
    first = runs["flops_per_token"] == SIZES[1]
    failed = runs.assign(status=runs["status"].mask(first & ~(runs["rate_factor"] != 1), "failed"))
    half = runs.assign(val_loss=runs["val_loss"].mask(first & (runs["lr"] < 0.01), math.nan))
    assert [len(found["each"]) for table in (runs, failed, half) if (found := fit_rate_brackets(table))] == [4, 2, 4]
    assert fit_rate_brackets(without_brackets(runs)) is None


def test_other_axes_keep_brackets_apart() -> None:
    runs = pd.concat(
        [renamed(study({"dense": 0.3, "peer": o}, noise=0.001, rng=n), f"batch_sequences={n}") for n, o in
         ((8, 0.2), (16, -0.4))], ignore_index=True,
    )  # fmt: skip
    found = compare(runs, [])
    names = {f"{m} batch_sequences={n}" for m in ("dense", "peer") for n in (8, 16)}
    assert {m["name"] for m in found["budgets"][0]["methods"]} == names
    best = {b["method"]: math.log(b["best"]) for b in found["rates"]["brackets"]["each"]}
    assert best.keys() == names
    assert (best["peer batch_sequences=8"], best["peer batch_sequences=16"]) == pytest.approx((0.2, -0.4), abs=0.1)


def renamed(runs: pd.DataFrame, settings: str) -> pd.DataFrame:
    return runs.assign(settings=settings_text(settings), cell=runs["cell"] + settings)
