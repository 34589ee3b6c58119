"""The statistics of a study against regressions, t tests and corrections that are worked here by themselves."""

import itertools
import json
import math
import random
import re
import string
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from made_up_study import LADDER, SIZES, bowl, curves, ladder, of, record, run, with_columns, with_sequences
from peerscale.config.study import ClaimsConfig
from peerscale.data.batches import EvaluationBatches
from peerscale.files import write_json
from peerscale.records.record import Status
from peerscale.stats import frontiers
from peerscale.stats.comparison import compare, sequence_losses
from peerscale.stats.fits import fit_study

CLAIMS = ClaimsConfig(method="peer", rivals=["dense", "moe"])
FIVE = {("dense", 1e12): 4.50, ("moe", 1e12): 4.49, ("peer", 1e12): 4.46}


def minima(runs: pd.DataFrame, losses: np.ndarray) -> dict[str, float]:
    """Each method's minimum, by the normal equations of parabolas with one curvature."""
    z = np.log10(runs["flops_per_token"].to_numpy()) - 6
    methods = list(runs["method"].unique())
    one = np.array([[method == m for m in methods] for method in runs["method"]], float)
    design = np.column_stack([one, one * z[:, None], z**2])
    theta = np.linalg.solve(design.T @ design, design.T @ losses)
    n = len(methods)
    return {m: float(theta[i] - theta[n + i] ** 2 / (4 * theta[-1])) for i, m in enumerate(methods)}


# Methods that have curves.


def test_exact_parabolas_are_recovered() -> None:
    found = compare(curves(FIVE | {("dense", 3e12): 4.2, ("peer", 3e12): 4.15}), [], claims=CLAIMS)
    for entry in found["budgets"]:
        optimum = 7.5e5 * (entry["budget"] / 1e12) ** 0.5
        for method in entry["methods"]:
            assert method["loss"] == pytest.approx((FIVE | {("dense", 3e12): 4.2, ("peer", 3e12): 4.15})[
                method["name"], entry["budget"]
            ])  # fmt: skip
            assert method["x"] == pytest.approx(optimum) and method["status"] == "ok"
            assert method["own"]["loss"] == pytest.approx(method["loss"])
        assert entry["curvature"] == pytest.approx(0.9) and entry["scatter"] < 1e-12
    assert of(found, "peer", "dense")["value"] == pytest.approx(-0.04)
    assert of(found, "moe", "peer")["value"] == pytest.approx(0.03)
    assert of(found, "peer", "dense", 3e12)["value"] == pytest.approx(-0.05)
    assert [entry["budget"] for entry in found["budgets"]] == [1e12, 3e12]


def test_differences_of_noisy_curves_share_one_curvature() -> None:
    runs = curves(FIVE, noise=0.005)
    found, expected = compare(runs, [], claims=CLAIMS), minima(runs, runs["val_loss"].to_numpy())
    for pair in (("peer", "dense"), ("moe", "dense"), ("moe", "peer"), ("dense", "peer")):
        one = of(found, *pair)
        assert one["value"] == pytest.approx(expected[pair[0]] - expected[pair[1]], abs=1e-9)
        half = stats.t.ppf(0.975, one["df"]) * one["se"]
        assert (one["low"], one["high"]) == pytest.approx((one["value"] - half, one["value"] + half))
        assert one["fit_se"] == one["se"] and one["seeds_se"] is one["sequences_se"] is one["rate_se"] is None
    for one in found["budgets"][0]["methods"]:
        half = stats.t.ppf(0.975, one["df"]) * one["se"]
        assert (one["low"], one["high"]) == pytest.approx((one["loss"] - half, one["loss"] + half))
    assert of(found, "peer", "dense")["own"]["value"] != pytest.approx(of(found, "peer", "dense")["value"], abs=1e-6)


def test_no_number_no_difference() -> None:
    """Of a minimum beyond the sizes the status is told, and no comparison made."""
    runs = curves(FIVE, noise=0.002)
    beyond = [run("pkm", 1e12, bowl(x, 4.4, at=4e6), x=x) for x in SIZES]
    edge = [run("null", 1e12, bowl(x, 4.6, at=1.7e6), x=x) for x in SIZES]
    found = compare(pd.concat([runs, pd.DataFrame(beyond + edge)], ignore_index=True), [])
    methods = {m["name"]: m for m in found["budgets"][0]["methods"]}
    assert {name: m["status"] for name, m in methods.items()} == {
        "dense": "ok", "moe": "ok", "peer": "ok", "pkm": "outside_range", "null": "off_centre",
    }  # fmt: skip
    assert methods["pkm"]["loss"] is None and methods["pkm"]["x"] is None and "se" not in methods["pkm"]
    assert "value" not in of(found, "pkm", "dense") and "pkm" in of(found, "pkm", "dense")["note"]
    assert "pkm" not in {m["method"] for m in found["multipliers"] + found["claims"]}
    assert methods["null"]["loss"] == pytest.approx(4.6, abs=0.01)
    assert of(found, "null", "dense")["value"] == pytest.approx(0.1, abs=0.01)
    assert compare(curves({("dense", 1e12): 4.5}, noise=0.01), [])["budgets"][0]["differences"] == []


def test_two_sizes_leave_no_curve() -> None:
    """All methods are then compared at each size."""
    runs = curves(FIVE)
    found = compare(runs[runs["flops_per_token"].isin(SIZES[1:3])], [])
    (entry,) = found["budgets"]
    assert entry["methods"] == []
    assert [one["size"] for one in entry["differences"] if one["method"] == "peer"] == [
        f"d{x / 1e4:.0f}" for x in SIZES[1:3]
    ]
    assert found["claims"] == found["multipliers"] == [] and found["laws"] == {}


def test_cells_that_failed_or_were_not_run_count_for_nothing() -> None:
    runs = curves(FIVE, noise=0.003)
    wrong = [
        run("dense", 1e12, 3.0, seed=1, status="running"), run("peer", 1e12, 9.0, seed=1, status="diverged"),
        run("moe", 1e12, math.nan, seed=1, status="pending"), run("peer", 1e12, math.inf, seed=2),
        run("dense", 9e12, math.nan, status="dropped"),
    ]  # fmt: skip
    assert compare(pd.concat([runs, pd.DataFrame(wrong)], ignore_index=True), []) == compare(runs, [])
    nothing = compare(pd.DataFrame(wrong), [])
    assert nothing["budgets"] == nothing["claims"] == []


def test_evaluation_sets_are_compared_at_the_minimum_of_the_validation_loss() -> None:
    runs = curves(FIVE, noise=0.003)
    gap = 0.4 - 0.06 * (runs["method"] == "peer")
    (entry,) = compare(runs.assign(ppl_speeches=np.exp(runs["val_loss"] + gap)), [])["budgets"]
    found = of({"budgets": [entry]}, "peer", "dense")
    assert found["sets"]["speeches"]["value"] == pytest.approx(found["value"] - 0.06)
    assert found["sets"]["speeches"]["se"] == pytest.approx(found["se"])
    for method in entry["methods"]:
        expected = method["loss"] + (0.34 if method["name"] == "peer" else 0.4)
        assert method["sets"]["speeches"] == pytest.approx(expected)
    assert compare(runs.assign(ppl_speeches=np.nan), [])["budgets"][0]["methods"][0]["sets"] == {}


@pytest.mark.filterwarnings("error")
def test_losses_without_any_curve_are_no_error() -> None:
    """Flat but for noise: whatever curvature chance makes, however small, nothing overflows."""
    for rng, noise in itertools.product(range(12), (0.0, 1e-12, 0.01)):
        draw = np.random.default_rng(rng)
        rows = [
            run(m, c, 4.5 + noise * draw.normal(), x=x) for m in ("dense", "peer") for c in LADDER[:3] for x in SIZES
        ]
        found = compare(pd.DataFrame(rows), [])
        json.dumps(found, allow_nan=False)
        assert all(m["status"] != "ok" or math.isfinite(m["loss"]) for e in found["budgets"] for m in e["methods"])


# Validation sequences.


def test_the_error_of_sequences_is_that_of_the_difference_at_each() -> None:
    runs, records, losses = with_sequences(curves({k: v for k, v in FIVE.items() if k[0] != "moe"}, noise=0.004))
    found = compare(runs, records)
    means, step = losses.mean(axis=1), 1e-5
    gradient = []
    for i in range(len(means)):  # of peer's minimum less dense's, by differences
        ends = [minima(runs, means + s * step * np.eye(len(means))[i]) for s in (1, -1)]
        gradient.append((ends[0]["peer"] - ends[0]["dense"] - ends[1]["peer"] + ends[1]["dense"]) / (2 * step))
    each = np.array(gradient) @ losses
    one = of(found, "peer", "dense")
    assert one["sequences_se"] == pytest.approx(each.std(ddof=1) / 16, rel=1e-4)
    assert one["se"] == pytest.approx(math.hypot(one["fit_se"], one["sequences_se"]))
    assert found["budgets"][0]["methods"][0]["sequences_se"] == pytest.approx(0.5 / 16, rel=0.15)


def test_sequences_are_paired_whatever_the_batch() -> None:
    """A record has them in the order in which evaluation takes them from the text."""
    text = np.random.default_rng(0).normal(size=256)
    records = []
    for batch in (8, 32):
        batches = EvaluationBatches(np.arange(2049), 2048, batch_sequences=batch, context=8)
        sequences = np.concatenate([batches[i][:, 0] // 8 for i in range(len(batches))])
        records.append(replace(record(f"{batch}", text[sequences]), batch_sequences=batch))
    assert records[0].sequence_losses != records[1].sequence_losses
    for found in sequence_losses(records, {"8", "32"}).values():
        np.testing.assert_array_equal(found, text)


def test_each_budget_has_its_own_number_of_sequences() -> None:
    """Whole batches of 16 and 32 need not cover the same part of a set; and one cell has fewer than its neighbours."""
    counts = {"a": (1e12, 688, 16), "b": (1e12, 688, 16), "c": (1e12, 672, 16), "d": (1e13, 672, 32)}
    records = [
        replace(record(cell, np.arange(n) / n), budget=budget, batch_sequences=batch)
        for cell, (budget, n, batch) in counts.items()
    ]
    assert {cell: len(values) for cell, values in sequence_losses(records, {*counts}).items()} == {
        "a": 688, "b": 688, "d": 672,
    }  # fmt: skip


def test_budgets_of_different_sequences_are_drawn_together() -> None:
    both = [with_sequences(curves({(m, c): v for (m, _), v in FIVE.items()}, noise=0.004), n=n)
            for c, n in ((1e12, 256), (3e12, 320))]  # fmt: skip
    records = [
        replace(one, budget=c) for (_, of_budget, _), c in zip(both, (1e12, 3e12), strict=True) for one in of_budget
    ]
    found = compare(pd.concat([runs for runs, _, _ in both]), records)
    assert all(one["sequences_se"] > 0 for entry in found["budgets"] for one in entry["differences"])
    assert all(one["low"] < one["multiplier"] < one["high"] for one in found["multipliers"])


def test_what_is_common_to_all_methods_leaves_no_error_of_a_difference() -> None:
    runs, records, _ = with_sequences(curves(FIVE, noise=0.004), own=0.0)
    found = compare(runs, records, claims=CLAIMS)
    for pair in (("peer", "dense"), ("moe", "peer")):
        assert of(found, *pair)["sequences_se"] < 1e-12
        assert of(found, *pair)["se"] == pytest.approx(of(found, *pair)["fit_se"])


def test_sequences_that_are_missing_leave_their_part_out() -> None:
    both = FIVE | {("dense", 3e12): 4.2, ("peer", 3e12): 4.15}
    runs, records, _ = with_sequences(curves(both, noise=0.004))
    lost = runs.loc[runs["budget"] == 3e12, "cell"].iloc[0]
    whole = compare(runs, records)
    kept = [record(r.cell, np.array([])) if r.cell == lost else r for r in records]
    other = [record(r.cell, np.array(r.sequence_losses[:16])) if r.cell == lost else r for r in records]
    for found in (compare(runs, kept), compare(runs, other), compare(runs, [r for r in records if r.cell != lost])):
        assert of(found, "peer", "dense", 3e12)["sequences_se"] is None
        assert of(found, "peer", "dense", 3e12)["value"] == of(whole, "peer", "dense", 3e12)["value"]
        assert of(found, "peer", "dense") == of(whole, "peer", "dense")
    failed = record("dense-failed", np.zeros(256), Status.FAILED)
    assert compare(runs, [*records, failed]) == whole


# Claims.


def test_variants_are_compared_with_the_same_variant() -> None:
    lowest = {
        (f"{method} batch_sequences={n}", 1e12): loss + shift
        for method, loss in (("dense", 4.5), ("peer", 4.46)) for n, shift in ((8, 0.1), (16, 0.0))
    }  # fmt: skip
    found = compare(curves(lowest, noise=0.002), [])["budgets"][0]["differences"]
    same = [d for d in found if d["reference"].startswith("dense ")]
    assert [(d["method"], d["reference"]) for d in same] == [
        (f"peer batch_sequences={n}", f"dense batch_sequences={n}") for n in (8, 16)
    ]
    assert all(d["value"] == pytest.approx(-0.04, abs=0.01) for d in same)
    plain = compare(curves({("dense", 1e12): 4.5, ("peer top_k=4", 1e12): 4.4, ("peer top_k=8", 1e12): 4.45}), [])
    assert [(d["method"], d["reference"]) for d in plain["budgets"][0]["differences"]] == [
        ("peer top_k=4", "dense"), ("peer top_k=8", "dense"),
    ]  # fmt: skip


def test_other_settings_are_compared_with_the_usual_ones_of_all_methods_and_are_no_claims() -> None:
    more, others = "peer n_experts=16384", "moe n_experts=32"
    lowest = {("dense", 1e12): 4.5, ("moe", 1e12): 4.45, ("peer", 1e12): 4.46, (more, 1e12): 4.41}
    ours = curves(lowest, noise=0.004)
    two_sizes = curves({(others, 1e12): 4.44}, noise=0.004, sizes=SIZES[1:3])
    found = compare(
        pd.concat([ours, two_sizes], ignore_index=True), [], claims=ClaimsConfig(method="peer", rivals=["moe"])
    )
    to_dense = {name: of(found, name, "dense")["value"] for name in ("moe", more)}
    assert of(found, "moe", more)["value"] == pytest.approx(to_dense["moe"] - to_dense[more])
    for size, x in (("d48", SIZES[1]), ("d75", SIZES[2])):
        (loss,) = two_sizes.loc[two_sizes["flops_per_token"] == x, "val_loss"]
        at = ours[ours["flops_per_token"] == x].set_index("cell")["val_loss"]
        for rival, start in (("moe", f"moe-{size}-1e+12-s0"), (more, f"peer-{size}-1e+12-n_experts=16384-s0")):
            assert of(found, others, rival, size=size)["value"] == pytest.approx(loss - at[start])
    assert [(claim["method"], claim["rival"], claim["size"]) for claim in found["claims"]] == [("peer", "moe", "")]


def test_a_claim_is_against_the_rival_of_the_same_settings() -> None:
    both = {(f"{method} batch_sequences={n}", 1e12): loss + shift
            for method, loss in (("dense", 4.5), ("peer", 4.46)) for n, shift in ((8, 0.1), (16, 0.0))}  # fmt: skip
    quiet = {("dense", 1e12): 4.5, ("dense initial_output_scale=0.25", 1e12): 4.4, ("peer", 1e12): 4.46}
    claims = ClaimsConfig(method="peer", rivals=["dense"])
    for lowest, expected in (
        (both, {(f"peer batch_sequences={n}", f"dense batch_sequences={n}") for n in (8, 16)}),
        (quiet, {("peer", "dense")}),
    ):
        found = compare(curves(lowest, noise=0.002), [], claims=claims)["claims"]
        assert {(c["method"], c["rival"]) for c in found} == expected
        assert {c["family"] for c in found} == {len(expected)}


def test_a_trend_of_which_nothing_has_finished_is_no_error() -> None:
    below = {(method, budget): loss * (budget / 1e12) ** -0.07
             for method, loss in (("dense", 4.5), ("peer", 4.46)) for budget in (3e11, 1e12)}  # fmt: skip
    started, whole = (compare(curves(below, noise=1e-5), [], trend_from=start) for start in (3e12, None))
    assert started["growth"] == [] and started["multipliers"] == whole["multipliers"] != []


def test_each_setting_is_compared_with_the_usual_ones_of_its_method() -> None:
    rows = [run(*of.split(" ")[:1], 1e12, 4.5 - 0.01 * i, size="d64", settings=of.partition(" ")[2])
            for i, of in enumerate(("pkm", "pkm ffn.top_k=8", "pkm ffn.top_k=64", "peer ffn.top_k=8"))]  # fmt: skip
    (entry,) = compare(pd.DataFrame(rows), [], baseline="dense")["budgets"]
    assert {(d["method"], d["reference"]): round(d["value"], 6) for d in entry["differences"]} == {
        ("pkm top_k=8", "pkm"): -0.01, ("pkm top_k=64", "pkm"): -0.02,
    }  # fmt: skip


def renamed(value: Any, names: dict[str, str]) -> Any:
    """JSON with other names of methods, wherever they stand."""
    text = json.dumps(value)
    for old, new in names.items():
        text = re.sub(rf'"{old}(?=["/ ])', f'"{new}', text)
    return json.loads(text)


def test_methods_with_other_names_have_the_same_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names made of random letters, even for the baseline: nothing is known of a method by its name."""
    monkeypatch.setattr(frontiers, "DRAWS", 20)
    monkeypatch.setattr("peerscale.stats.fits.RESAMPLES", 2)
    methods = ("dense", "moe", "moe_token_choice", "pkm", "peer")
    letters = random.Random(5)
    names = {method: "".join(letters.choices(string.ascii_lowercase, k=7)) for method in methods}
    lowest = {
        (m, c): 40 * (g * c) ** -0.07 for c in LADDER for m, g in zip(methods, (1, 1.2, 1.1, 1.3, 1.5), strict=True)
    }
    lowest |= {("peer ffn.n_experts=16384", c): 3.0 + 40 * (1.6 * c) ** -0.07 - 3.0 for c in LADDER[:3]}
    main = with_columns(curves(lowest, noise=0.003, seeds=2, seed_sd=0.003)).assign(lr=0.01)
    at = main[(main["budget"] == 1e12) & main["size"].isin(["d48", "d75"]) & (main["settings"] == "")]
    brackets = [at.assign(rate_factor=f, lr=0.01 * f, cell=at["cell"] + f"{f}", val_loss=at["val_loss"] + 0.01 * f)
                for f in (0.5, 2.0)]  # fmt: skip
    two_sizes = (
        main[main["method"] == "pkm"].query("size == 'd48' or size == 'd75'").assign(settings='{"ffn.top_k": 8}')
    )
    runs = pd.concat([main, *brackets, two_sizes], ignore_index=True)
    runs, records, _ = with_sequences(runs.assign(cell=[f"c{i}" for i in range(len(runs))]), n=32)
    for claims in (None, ClaimsConfig(method="peer", rivals=["dense", "pkm"], equal_within=0.02)):
        fits = []
        for named in (lambda name: name, names.get):
            ours = claims and ClaimsConfig(
                method=named(claims.method), rivals=[named(rival) for rival in claims.rivals], equal_within=0.02
            )
            table = runs.assign(method=runs["method"].map(named))
            fits.append(
                fit_study(table, compare(table, records, baseline=named("dense"), claims=ours, rates_cost=0.01))
            )
        assert (
            bool(fits[0]["claims"]) == bool(claims)
            and fits[0]["multipliers"]
            and fits[0]["growth"]
            and fits[0]["conventions"]
        )
        assert fits[0]["rates"]["brackets"] and f"{methods[-1]}/parametric" in fits[0]["laws"]
        assert renamed(fits[0], names) == fits[1]


def test_everything_is_plain_json(tmp_path: Path) -> None:
    runs, records, _ = with_sequences(ladder(1.3, LADDER, noise=0.004, seeds=2, seed_sd=0.004), n=32)
    lone = pd.DataFrame([run("peer", 5e11, 5.0, size="d64"), run("dense", 5e11, 5.1, size="d64")])
    found = compare(pd.concat([runs, lone], ignore_index=True), records)
    write_json(tmp_path / "fits.json", found)
    assert json.loads((tmp_path / "fits.json").read_text()) == found
    assert compare(pd.concat([runs, lone], ignore_index=True), records) == found  # nothing is left to chance
