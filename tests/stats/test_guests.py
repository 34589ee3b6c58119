"""Methods that a study's file does not name: they move none of its numbers, and their own are worked here by hand."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_comparison import FIVE

from made_up_study import curves
from peerscale.config.study import ClaimsConfig
from peerscale.figures.study_table import study_table
from peerscale.files import ROOT
from peerscale.records.table import read_records, read_runs
from peerscale.stats.collection import fits_of
from peerscale.stats.comparison import compare
from peerscale.stats.curve import Curve, from_names
from peerscale.stats.guests import compare_with_guests
from peerscale.stats.optima import OptimaFit

NAMES = ("one", "two", "three")


def without_guests(value: Any) -> Any:
    """Results without those that tell of a guest."""
    if isinstance(value, dict):
        return {k: without_guests(v) for k, v in value.items() if k not in (*NAMES, "guests")}
    if isinstance(value, list):
        named = [one for one in value if isinstance(one, dict)]
        told = [one for one in named if {*NAMES} & {v for v in one.values() if isinstance(v, str)}]
        return [without_guests(one) for one in value if one not in told]
    return value


def leaves(value: Any, where: str = "") -> dict[str, Any]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {place: leaf for k, v in items for place, leaf in leaves(v, f"{where}.{k}").items()}
    return {where: value}


@pytest.fixture(scope="module")
def reproduce() -> tuple[pd.DataFrame, dict[str, Any], dict[str, Any]]:
    """The runs of the study with dense under three more names, their fits, and those that are committed."""
    folder = ROOT / "results" / "reproduce"
    runs, records, committed = read_runs(folder), read_records(folder), json.loads((folder / "fits.json").read_text())
    dense = runs[runs["method"] == "dense"]
    more = [dense.assign(method=name, cell=dense["cell"].str.replace("dense", name)) for name in NAMES]
    theirs = [replace(r, method=name, cell=r.cell.replace("dense", name))
              for name in NAMES for r in records if r.method == "dense"]  # fmt: skip
    runs = pd.concat([*more, runs], ignore_index=True)
    beyond = {(one["budget"], one["method"]) for one in from_names(committed)["rates"]["extrapolated"]}
    beyond |= {(2.2e12, Curve(name)) for name in NAMES}
    return runs, fits_of("reproduce", runs, [*records, *theirs], beyond), committed


def test_dense_under_three_more_names_moves_no_committed_number(reproduce: tuple[Any, Any, Any]) -> None:
    _, found, committed = reproduce
    own, before = leaves(without_guests(found)), leaves(committed)
    assert own.keys() == before.keys() and len(own) > 2000
    for place, value in before.items():  # to seven digits, as processors differ
        assert own[place] == (pytest.approx(value, rel=1.5e-6, abs=1e-12) if isinstance(value, float) else value), place


def test_dense_under_another_name_equals_dense(reproduce: tuple[Any, Any, Any]) -> None:
    runs, found, _ = reproduce
    for entry in found["budgets"]:
        of = {one["name"]: one for one in entry["methods"]}
        for name in NAMES:
            assert [of[name][key] for key in ("loss", "x")] == pytest.approx(
                [of["dense"][key] for key in ("loss", "x")]
            )
            one, other = (next(d for d in entry["differences"] if (d["method"], d["reference"]) == pair)
                          for pair in ((name, "dense"), ("peer", "dense")))  # fmt: skip
            assert one["value"] == pytest.approx(0, abs=1e-12) and one["p"] > 0.999
            width, usual = one["high"] - one["low"], other["high"] - other["low"]
            assert 0.7 * usual < width < 1.3 * usual and one["rate_se"] < other["rate_se"]
    worth = {m["method"]: m for m in found["multipliers"] if m["budget"] == 2.2e12}
    assert all(worth[n]["low"] < 0.95 < worth[n]["multiplier"] < 1.05 < worth[n]["high"] for n in NAMES)
    assert worth["one"] == {**worth["three"], "method": "one"}, "guests do not move each other"
    assert {e["source"] for e in found["rates"]["errors"] if e["method"] in NAMES} == {"not tuned"}
    lines = study_table("reproduce", runs, from_names(found)).splitlines()
    assert lines[2].startswith("**At 2.2e12 FLOPs PEER leads dense") and "file does not name" in lines[6]
    (verdict,) = (line for line in lines if line.startswith("| 2.2e12 | one minus dense | ") and line.count("|") == 8)
    assert verdict.endswith(" | one seed; one not tuned; rates of one and dense extrapolated |")
    (parts,) = (line for line in lines if line.startswith("| 2.2e12 | one minus dense | ") and line.count("|") == 11)
    assert parts.split(" | ")[6] == "not tuned"


def two_steps(x: np.ndarray, losses: dict[str, np.ndarray], guest: str) -> tuple[float, float, float]:
    """The curvature of all methods but the guest, and loss and log10 x of the guest's minimum with it."""
    z = np.log10(x) - 6
    members = [name for name in losses if name != guest]
    rows = [np.concatenate([np.eye(len(members))[i], at * np.eye(len(members))[i], [at**2]])
            for i in range(len(members)) for at in z]  # fmt: skip
    c = np.linalg.lstsq(np.array(rows), np.concatenate([losses[name] for name in members]), rcond=None)[0][-1]
    b, a = np.polyfit(z, losses[guest] - c * z**2, 1)
    return c, a - b**2 / (4 * c), 6 - b / (2 * c)


def test_a_guest_has_the_curvature_of_the_others_and_its_own_line() -> None:
    x, rng = np.geomspace(3e5, 2e6, 5), np.random.default_rng(3)
    losses = {name: 4.4 + 0.9 * np.log10(x / 7e5) ** 2 + rng.normal(0, 0.01, 5) for name in ("dense", "peer", "new")}
    losses["new"] += 0.5 * np.log10(x / 7e5) ** 2  # another curvature
    names, sizes = np.repeat([*losses], 5).tolist(), np.tile(x, 3)

    def fit(values: np.ndarray, n: int = 15) -> OptimaFit:
        return OptimaFit.of(names[:n], sizes[:n], values[:n], guests={"new"})

    values = np.concatenate([*losses.values()])
    together, alone = fit(values), fit(values, 10)
    c, loss, at = two_steps(x, losses, "new")
    found = together.optimum("new")
    assert (found.coefficients[2], found.loss, np.log10(found.x)) == pytest.approx((c, loss, at))
    slopes = [(fit(values + 1e-5 * one).optimum("new").loss - fit(values - 1e-5 * one).optimum("new").loss) / 2e-5
              for one in np.eye(15)]  # fmt: skip
    assert found.weights == pytest.approx(np.array(slopes), abs=1e-6)
    assert together.noise.misfit == pytest.approx(alone.noise.misfit)
    assert together.noise.multiple[:2] == pytest.approx(alone.noise.multiple)
    assert together.optimum("peer").loss == pytest.approx(alone.optimum("peer").loss)
    noisy = fit(values + np.repeat([0, 0.03], [10, 5]) * np.array([1, -1, 1, -1, 1] * 3))
    assert noisy.noise.misfit == pytest.approx(alone.noise.misfit)
    assert noisy.estimate(noisy.optimum("new").weights).se > together.estimate(found.weights).se


def test_claims_and_brackets_of_a_study_do_not_see_guests() -> None:
    lowest = {**FIVE, ("new", 1e12): 4.3}
    runs = curves(lowest, noise=0.004, seeds=2, seed_sd=0.004).assign(lr=0.01)
    at = runs[runs["size"] == "d75"]
    tried = [at.assign(rate_factor=f, lr=0.01 * f, val_loss=at["val_loss"] + 0.01 * f) for f in (0.5, 2.0)]
    table, methods = pd.concat([runs, *tried], ignore_index=True), ["dense", "moe", "peer"]
    options: dict[str, Any] = {"claims": ClaimsConfig(method="peer", rivals=["dense", "moe"]), "rates_cost": 0.01}
    found = compare_with_guests(table, [], methods, **options)
    own = compare(table[table["method"] != "new"], [], **options)
    assert found["claims"] == own["claims"] != [] and found["rates"]["brackets"] == own["rates"]["brackets"]
    assert {e["source"] for e in found["rates"]["errors"]} == {"brackets"}, "the guest's rates were bracketed too"


def test_a_study_that_has_only_guests_compares_them() -> None:
    runs = curves(FIVE, noise=0.004)
    assert compare_with_guests(runs, [], ["pkm"]) == {**compare(runs, []), "guests": ["dense", "moe", "peer"]}


def test_two_guests_are_compared_with_each_other_if_one_is_the_baseline() -> None:
    runs = curves({**FIVE, ("new", 1e12): 4.3, ("other", 1e12): 4.35}, noise=0.001)
    found = compare_with_guests(runs, [], ["dense", "moe", "peer"], baseline="other")
    pairs = {(d["method"], d["reference"]): d["value"] for d in found["budgets"][0]["differences"]}
    assert pairs.keys() == {(name, "other") for name in ("dense", "moe", "peer", "new")}
    assert pairs["new", "other"] == pytest.approx(-0.05, abs=0.003)
