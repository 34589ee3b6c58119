"""Multipliers with compute counted anew, where each convention counts a known share of a method's FLOPs."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from made_up_study import curves, run
from peerscale.stats.comparison import compare
from peerscale.stats.conventions import flops_by_convention, multipliers_by_convention
from peerscale.stats.curve import finished, from_names, to_names

LADDER = [1e12, 3e12, 1e13]
GAIN = 1.5


def study(shares: dict[str, float]) -> pd.DataFrame:
    """`shares`: what 6 x active parameters are of the FLOPs per token as counted; of PEER half are its router's."""
    runs = curves(
        {(m, c): 40 * (g * c) ** -0.07 for m, g in (("dense", 1.0), ("peer", GAIN)) for c in LADDER}, noise=1e-6
    )
    flops, peer = runs["flops_per_token"], runs["method"] == "peer"
    return runs.assign(
        params_active=flops * runs["method"].map(shares) / 6, params_total=flops / 6 * np.where(peer, 4, 1),
        flops_attention_scores=0.1 * flops, flops_attention_values=0.1 * flops,
        flops_query=np.where(peer, 0.3 * flops, 0.0), flops_sub_keys=np.where(peer, 0.2 * flops, 0.0),
    )  # fmt: skip


def by_convention(runs: pd.DataFrame) -> list[dict[str, Any]]:
    budgets = from_names(compare(runs, []))["budgets"]
    return to_names(multipliers_by_convention(finished(runs), budgets, "dense"))


def test_each_convention_counts_what_it_says() -> None:
    parts = {"flops_attention_scores": 100.0, "flops_attention_values": 60.0, "flops_router": 40.0, "flops_query": 7.0}
    row = run("moe", 1e12, 4.5, x=1000.0, params_active=50, params_total=90, **parts)
    counted = {name: float(flops.iloc[0]) for name, flops in flops_by_convention(pd.DataFrame([row])).items()}
    assert counted == {
        "as counted": 1000, "6 x active parameters": 300, "6 x total parameters": 540, "causal attention": 920,
        "without router": 953,
    }  # fmt: skip


def test_a_share_of_the_compute_scales_the_multiplier() -> None:
    runs = study({"dense": 0.8, "peer": 0.5})
    found = by_convention(runs)
    assert [(row["method"], row["budget"]) for row in found] == [("peer", c) for c in LADDER]
    for row in found:
        assert row["multipliers"] == pytest.approx({
            "as counted": GAIN, "6 x active parameters": GAIN * 0.8 / 0.5, "6 x total parameters": GAIN / 4,
            "causal attention": GAIN, "without router": GAIN / 0.5,
        }, rel=1e-3)  # fmt: skip


def test_settings_of_dense_are_not_compared_with_dense() -> None:
    """As in the multipliers of the study, where dense with other settings is a reference only."""
    runs = study({"dense": 0.8, "peer": 0.5})
    other = runs[runs["method"] == "dense"].assign(settings='{"optim.schedule": "wsd"}')
    both = pd.concat([runs, other], ignore_index=True)
    assert {row["method"] for row in by_convention(both)} == {"peer"}


def test_as_counted_is_the_studys_own_multiplier() -> None:
    runs = study({"dense": 0.8, "peer": 0.5})
    noisy = runs.assign(val_loss=runs["val_loss"] + np.random.default_rng(0).normal(0, 0.004, len(runs)))
    found = compare(noisy, [])
    counted = {row["budget"]: row["multipliers"]["as counted"] for row in by_convention(noisy)}
    assert {m["budget"]: m["multiplier"] for m in found["multipliers"]} == pytest.approx(counted)


def test_a_share_between_two_sizes_is_log_linear() -> None:
    """The optimum lies at a size; its neighbours' shares must not matter, and a share that grows as x^.5 must."""
    runs = study({"dense": 1.0, "peer": 1.0})
    x = runs["flops_per_token"]
    growing = runs.assign(params_active=np.where(runs["method"] == "dense", x, x * (x / 7.5e5) ** 0.5) / 6)
    found = by_convention(growing)
    counted = {row["budget"]: row["multipliers"]["6 x active parameters"] for row in found}
    # PEER's optimum is 7.5e5 (C / 1e12)^(1/2), so its compute counts C (C / 1e12)^(1/4): slower gains per counted FLOP.
    peers = {c: c * (c / 1e12) ** 0.25 for c in LADDER}
    dense_to_equal = GAIN * np.array(LADDER)
    at = np.exp(np.interp(np.log(LADDER[1:]), np.log(dense_to_equal), np.log(list(peers.values()))))
    assert counted[1e12] == pytest.approx(GAIN, rel=1e-3)
    assert [counted[c] for c in LADDER[1:]] == pytest.approx(np.array(LADDER[1:]) / at, rel=1e-3)


def test_nothing_to_count_without_dense_or_minima() -> None:
    runs = study({"dense": 1.0, "peer": 1.0})
    peer = runs[runs["method"] == "peer"]
    assert by_convention(peer) == []
    two_sizes = runs[runs["flops_per_token"] < 5e5]
    assert by_convention(two_sizes) == []
    one = runs[runs["budget"] == 1e12]
    (row,) = by_convention(one)
    assert np.isnan(list(row["multipliers"].values())).all()
