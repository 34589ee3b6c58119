"""The statistics of methods that have one size, or too few for a curve, against t tests worked by hand."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from made_up_study import SIZES, curves, of, run, with_sequences
from own_variances import own_variances
from peerscale.config.study import ClaimsConfig
from peerscale.stats.comparison import compare

CLAIMS = ClaimsConfig(method="peer", rivals=["dense", "moe"])
FIVE = {("dense", 1e12): 4.50, ("moe", 1e12): 4.49, ("peer", 1e12): 4.46}


def at_one_size(seeds: int) -> pd.DataFrame:
    rng = np.random.default_rng(8)
    rows = [
        run(method, 3e12, mean + 0.008 * rng.normal(), size="d64", seed=seed)
        for method, mean in (("dense", 4.5), ("peer", 4.47)) for seed in range(seeds)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_seeds_of_one_size_give_welchs_two_sample_test() -> None:
    """With variances that are shrunk towards each other."""
    runs = at_one_size(3)
    found = compare(runs, [])
    one = of(found, "peer", "dense", 3e12, "d64")
    peer, dense = (runs.loc[runs["method"] == m, "val_loss"].to_numpy() for m in ("peer", "dense"))
    parts = [(variance / 3, df) for variance, df in own_variances([peer, dense])]
    se = math.sqrt(sum(part for part, _ in parts))
    df = se**4 / sum(part**2 / df for part, df in parts)
    assert one["value"] == pytest.approx(peer.mean() - dense.mean())
    assert one["se"] == pytest.approx(se, rel=1e-3) and one["df"] == pytest.approx(df, rel=1e-3)
    assert one["p"] == pytest.approx(2 * stats.t.sf(abs(one["value"]) / se, df), rel=1e-2)
    assert one["seeds_se"] == one["se"] and one["fit_se"] is None
    assert found["claims"] == [], "only what a study names is claimed at a single size"
    (claim,) = compare(runs, [], claims=ClaimsConfig(method="peer", rivals=["dense"]))["claims"]
    assert (claim["size"], claim["p"], claim["p_holm"]) == ("d64", one["p"], one["p"])


@pytest.mark.parametrize("sizes", [["d48", "d75"], ["d48", "d75", "d120"]])
def test_a_method_without_a_curve_is_compared_at_its_sizes_and_claims_nothing(sizes: list[str]) -> None:
    """Three sizes, too few for a curve, tell no less than two."""
    whole = curves(FIVE, noise=0.004, seeds=2, seed_sd=0.004)
    runs = whole[(whole["method"] != "moe") | whole["size"].isin(sizes)]
    claims = ClaimsConfig(method="peer", rivals=["dense"])
    found, without = (compare(table, [], claims=claims) for table in (runs, runs[runs["method"] != "moe"]))
    assert [(d["method"], d["reference"], d["size"]) for d in found["budgets"][0]["differences"] if d["size"]] == [
        ("moe", reference, size) for size in sizes for reference in ("dense", "peer")
    ]
    assert [m["name"] for m in found["budgets"][0]["methods"]] == ["dense", "peer"]
    here = {m: runs.loc[(runs["method"] == m) & (runs["size"] == "d48"), "val_loss"] for m in ("dense", "moe", "peer")}
    one = of(found, "moe", "dense", size="d48")
    assert one["value"] == pytest.approx(here["moe"].mean() - here["dense"].mean())
    own = dict(zip(here, own_variances([losses.to_numpy() for losses in here.values()]), strict=True))
    assert one["seeds_se"] == pytest.approx(math.sqrt((own["moe"][0] + own["dense"][0]) / 2), rel=1e-3)
    assert found["claims"] == without["claims"] and found["multipliers"] == without["multipliers"]


def test_sequences_are_added_to_seeds() -> None:
    """With unequal numbers of seeds, and a third method that only tells of their scatter."""
    more = [run("pkm", 3e12, loss, size="d64", seed=i) for i, loss in enumerate((4.50, 4.52))]
    runs = pd.concat([at_one_size(4).iloc[:-1], pd.DataFrame(more)], ignore_index=True)
    runs, records, losses = with_sequences(runs)
    groups = [runs.loc[runs["method"] == m, "val_loss"].to_numpy() for m in ("dense", "peer", "pkm")]
    (dense, dense_df), (peer, peer_df), _ = own_variances(groups)
    seeds = math.sqrt(dense / 4 + peer / 3)
    each = losses[4:7].mean(axis=0) - losses[:4].mean(axis=0)
    sampled = each.std(ddof=1) / 16
    one = of(compare(runs, records), "peer", "dense", 3e12, "d64")
    assert one["seeds_se"] == pytest.approx(seeds, rel=1e-3) and one["sequences_se"] == pytest.approx(sampled)
    assert one["se"] == pytest.approx(math.hypot(one["seeds_se"], sampled))
    df = one["se"] ** 4 / ((dense / 4) ** 2 / dense_df + (peer / 3) ** 2 / peer_df + sampled**4 / 255)
    assert one["df"] == pytest.approx(df, rel=1e-2)


def test_one_seed_at_one_size_claims_nothing() -> None:
    runs, records, losses = with_sequences(at_one_size(1))
    found = compare(runs, records)
    one = of(found, "peer", "dense", 3e12, "d64")
    assert one["se"] == one["sequences_se"] == pytest.approx((losses[1] - losses[0]).std(ddof=1) / 16)
    assert one["seeds_se"] is None and one["low"] < one["value"] < one["high"]
    assert found["claims"] == []
    bare = of(compare(runs, []), "peer", "dense", 3e12, "d64")
    assert bare["value"] == one["value"] and bare["se"] is bare["low"] is bare["p"] is None


@pytest.mark.parametrize(("rest", "claimed"), [("pending", []), ("dropped", ["dense"])])
def test_one_size_decides_nothing_while_the_other_sizes_of_a_curve_are_to_run(rest: str, claimed: list[str]) -> None:
    runs = curves({("peer", 1e12): 4.9, ("dense", 1e12): 5.0}, seeds=2, seed_sd=0.01)
    runs.loc[runs["flops_per_token"] != SIZES[2], ["status", "val_loss"]] = [rest, math.nan]
    claims = ClaimsConfig(method="peer", rivals=["dense"])
    found = compare(runs, [], claims=claims)
    assert of(found, "peer", "dense", size="d75")["value"] < 0, "described"
    assert [claim["rival"] for claim in found["claims"]] == claimed


def test_two_sizes_are_compared_each_by_itself() -> None:
    rows = [
        run(m, 1e12, loss, size=size, seed=seed, x=x)
        for size, x, losses in (("d32", 4e5, (4.5, 4.4)), ("d64", 8e5, (4.6, 4.55)))
        for m, loss in zip(("dense", "peer"), losses, strict=True) for seed in range(2)
    ]  # fmt: skip
    rng = np.random.default_rng(1)
    runs = pd.DataFrame(rows).assign(val_loss=lambda t: t["val_loss"] + 0.001 * rng.normal(size=len(t)))
    found = compare(runs, [], claims=ClaimsConfig(method="peer", rivals=["dense"]))
    values = {size: of(found, "peer", "dense", 1e12, size)["value"] for size in ("d32", "d64")}
    assert values == pytest.approx({"d32": -0.1, "d64": -0.05}, abs=0.005)
    assert [c["size"] for c in found["claims"]] == ["d32", "d64"]


def test_batchnorm_on_queries_is_compared_with_the_same_layer_without() -> None:
    rows = [
        run("peer", 3e12, loss + 0.002 * seed, size="d64", seed=seed, settings=f"n_experts={n}-query_norm={norm}")
        for n, shift in ((1024, -0.01), (4096, 0.02)) for norm, loss in (("true", 4.4 + shift), ("false", 4.4))
        for seed in range(2)
    ]  # fmt: skip
    (entry,) = compare(pd.DataFrame(rows), [])["budgets"]
    assert {d["method"]: round(d["value"], 6) for d in entry["differences"]} == {
        "peer n_experts=1024-query_norm=true": -0.01, "peer n_experts=4096-query_norm=true": 0.02,
    }  # fmt: skip
    assert all(d["reference"] == d["method"].replace("true", "false") for d in entry["differences"])


def test_fewer_sizes_are_a_curve_if_the_study_says_so() -> None:
    runs = curves(FIVE, sizes=SIZES[1:4])
    assert compare(runs, [])["budgets"][0]["methods"] == []
    three, two = (compare(table, [], min_sizes=2) for table in (runs, runs[runs["flops_per_token"] < SIZES[3]]))
    assert of(three, "peer", "dense")["value"] == pytest.approx(-0.04)
    assert three["claims"] and two["budgets"][0]["methods"] == two["claims"] == [], "two sizes determine no parabola"
