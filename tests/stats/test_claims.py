"""The family of claims of a study and its correction, worked by hand."""

from dataclasses import replace

import pandas as pd
import pytest
from test_comparison import FIVE, of

from made_up_study import LADDER, curves, run
from peerscale.config.study import ClaimsConfig
from peerscale.stats.comparison import compare


def test_the_family_is_what_the_study_names() -> None:
    runs = curves({(m, c): v for (m, _), v in FIVE.items() for c in LADDER[:3]}, noise=0.01)
    claims = ClaimsConfig(method="peer", rivals=["dense"], budgets=[3e12, 1e13])
    found = compare(runs, [], claims=claims)
    assert [(c["budget"], c["method"], c["rival"]) for c in found["claims"]] == [
        (3e12, "peer", "dense"), (1e13, "peer", "dense"),
    ]  # fmt: skip
    p = [of(found, "peer", "dense", budget)["p"] for budget in (3e12, 1e13)]
    small, large = sorted(p)
    expected = {small: min(1, 2 * small), large: min(1, max(2 * small, large))}
    for claim, alone in zip(found["claims"], p, strict=True):
        assert claim["p"] == alone and claim["p_holm"] == pytest.approx(expected[alone])
        assert claim["leads"] == (expected[alone] < 0.05 and claim["value"] < 0)


def test_a_named_family_counts_comparisons_that_have_not_run() -> None:
    """A verdict on the first budget must hold when the others have a result."""
    runs = curves({(m, c): v for (m, _), v in FIVE.items() for c in LADDER[:1]}, noise=0.01)
    claims = ClaimsConfig(method="peer", rivals=["dense", "moe"], budgets=LADDER[:3])
    found = compare(runs, [], claims=claims)["claims"]
    assert [c["family"] for c in found] == [6, 6]
    small, large = sorted(found, key=lambda c: c["p"])
    assert small["p_holm"] == pytest.approx(min(1, 6 * small["p"]))
    assert large["p_holm"] == pytest.approx(min(1, max(6 * small["p"], 5 * large["p"])))


def test_two_claims_at_one_budget_do_not_stand_for_one_at_another() -> None:
    """Dense is claimed at 1e12 and 1e13: two sizes have run at 1e12 and none at 1e13, so there are three claims."""
    rows = [run(m, 1e12, 4 + 0.1 * (m == "dense") + 0.002 * s, size=size, seed=s)
            for m in ("dense", "peer") for size in ("d32", "d64") for s in (0, 1)]  # fmt: skip
    claims = ClaimsConfig(method="peer", rivals=["dense"], budgets=[1e12, 1e13])
    found = compare(pd.DataFrame(rows), [], claims=claims)["claims"]
    assert [(c["size"], c["family"]) for c in found] == [("d32", 3), ("d64", 3)]
    assert min(c["p_holm"] for c in found) == pytest.approx(3 * found[0]["p"])


def test_without_a_named_family_nothing_is_claimed() -> None:
    assert compare(curves(FIVE, noise=0.004), [])["claims"] == []


def test_a_claim_may_be_the_negative_of_a_difference() -> None:
    """Dense is the baseline, and what is claimed."""
    runs = curves(FIVE, noise=0.004)
    (claim,) = compare(runs, [], claims=ClaimsConfig(method="dense", rivals=["peer"]))["claims"]
    (turned,) = compare(runs, [], claims=ClaimsConfig(method="peer", rivals=["dense"]))["claims"]
    assert [claim[k] for k in ("value", "low", "high")] == [-turned[k] for k in ("value", "high", "low")]
    assert (claim["p"], claim["leads"], turned["leads"]) == (turned["p"], False, True)


def test_a_lead_is_lower_and_a_worse_method_never_leads() -> None:
    better = compare(curves(FIVE, noise=0.002), [], claims=ClaimsConfig(method="peer", rivals=["dense", "moe"]))
    assert better["claims"] and all(c["leads"] and c["p_holm"] < 0.05 for c in better["claims"])
    claims = ClaimsConfig(method="peer", rivals=["dense"])
    worse = compare(curves({("dense", 1e12): 4.5, ("peer", 1e12): 4.6}, noise=0.002), [], claims=claims)
    (claim,) = worse["claims"]
    assert claim["p_holm"] < 0.05 and claim["value"] > 0 and not claim["leads"]


def test_a_study_may_claim_about_any_of_its_methods() -> None:
    runs = curves(FIVE | {("pkm", 1e12): 4.52}, noise=0.002)
    found = compare(runs, [], claims=ClaimsConfig(method="moe", rivals=["pkm", "dense"]))
    assert {c["rival"]: round(c["value"], 2) for c in found["claims"]} == {"pkm": -0.03, "dense": -0.01}
    assert {c["method"] for c in found["claims"]} == {"moe"}


def test_variants_are_not_of_a_named_family_whose_method_is_there_as_configured() -> None:
    lowest = FIVE | {("peer ffn.n_experts=16384", 1e12): 4.40}
    named = ClaimsConfig(method="peer", rivals=["dense", "moe"])
    found = compare(curves(lowest, noise=0.002), [], claims=named)
    assert [(c["method"], c["rival"]) for c in found["claims"]] == [("peer", "dense"), ("peer", "moe")]
    assert of(found, "peer n_experts=16384", "dense")["value"] == pytest.approx(-0.10, abs=0.01)


@pytest.mark.parametrize(
    ("margin", "equal"), [(0.05, {"moe": True, "dense": True}), (0.03, {"moe": True, "dense": False})]
)
def test_equal_is_an_interval_within_the_stated_margin(margin: float, equal: dict[str, bool]) -> None:
    lowest = {("dense", 1e12): 4.50, ("moe", 1e12): 4.47, ("peer", 1e12): 4.465}
    named = ClaimsConfig(method="peer", rivals=["dense", "moe"], equal_within=margin)
    found = compare(curves(lowest, noise=0.002), [], claims=named)
    assert {c["rival"]: c["equal"] for c in found["claims"]} == equal
    for claim in found["claims"]:
        assert claim["equal"] == (max(abs(claim["low"]), abs(claim["high"])) < margin)
    assert "equal" not in compare(curves(lowest), [], claims=replace(named, equal_within=None))["claims"][0]
