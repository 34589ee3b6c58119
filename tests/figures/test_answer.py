"""Sentences that say what the claims of a study say, no more."""

from typing import Any

import pytest

from peerscale.figures.answer import answer
from toy_study import fits_with_curves


def claim(value: float, rival: str = "dense", budget: float = 3e12, p_holm: float | None = 0.001, **more: Any) -> dict:
    found = {"budget": budget, "size": "", "method": "peer", "rival": rival, "value": value, "p_holm": p_holm}
    return {**found, "low": value - 0.015, "high": value + 0.015, **more}


@pytest.mark.parametrize(
    ("claims", "sentence"),
    [
        ([claim(-0.034)], "At 3e12 FLOPs PEER leads dense (−0.034 ± 0.015)."),
        ([claim(0.034)], "At 3e12 FLOPs PEER trails dense (+0.034 ± 0.015)."),
        ([claim(-0.034, p_holm=0.06)], "At 3e12 FLOPs PEER cannot be told apart from dense (−0.034 ± 0.015)."),
        ([claim(0.003, p_holm=0.4, equal=True)], "At 3e12 FLOPs PEER equals dense (+0.003 ± 0.015)."),
        ([claim(-0.01, equal=True)], "At 3e12 FLOPs PEER leads dense (−0.010 ± 0.015)."),
        ([claim(0.0, p_holm=None)], "At 3e12 FLOPs PEER cannot be told apart from dense (+0.000 ± 0.015)."),
        (
            [claim(-0.02, "pkm"), claim(0.02, "moe", p_holm=0.2), claim(-0.034), claim(0.05, "moe_token_choice")],
            "At 3e12 FLOPs PEER leads dense (−0.034 ± 0.015) and PKM (−0.020 ± 0.015), and trails MoE (token choice) "
            "(+0.050 ± 0.015), and cannot be told apart from MoE (expert choice) (+0.020 ± 0.015).",
        ),
        (
            [claim(-0.034, size="d40", method="peer batch_sequences=8", rival="dense batch_sequences=8")],
            "At 3e12 FLOPs, d_model 40, batch 8, PEER leads dense (−0.034 ± 0.015).",
        ),
    ],
)
def test_a_sentence_for_each_place(claims: list[dict], sentence: str) -> None:
    assert answer(fits_with_curves({"claims": claims})) == sentence


def test_a_probability_of_five_percent_is_no_lead() -> None:
    assert "cannot be told apart" in answer(fits_with_curves({"claims": [claim(-0.034, p_holm=0.05)]}))
    assert "leads" in answer(fits_with_curves({"claims": [claim(-0.034, p_holm=0.0499)]}))


def test_variants_are_told_one_by_one_at_the_largest_budget() -> None:
    arms = [
        claim(value, f"dense batch_sequences={n}", budget, p, method=f"peer batch_sequences={n}")
        for budget in (1e12, 3e12)
        for n, value, p in ((8, -0.02, 0.14), (16, -0.03, 0.004))
    ]
    assert answer(fits_with_curves({"claims": arms})) == (
        "At 3e12 FLOPs, batch 8, PEER cannot be told apart from dense (−0.020 ± 0.015). "
        "At 3e12 FLOPs, batch 16, PEER leads dense (−0.030 ± 0.015)."
    )


def test_only_the_largest_budget_is_told_and_no_claim_is_said() -> None:
    claims = [claim(-0.01, budget=1e12, p_holm=0.5), claim(-0.03, "moe", budget=1e13)]
    assert (
        answer(fits_with_curves({"claims": claims})) == "At 1e13 FLOPs PEER leads MoE (expert choice) (−0.030 ± 0.015)."
    )
    assert answer({"claims": []}) == "No claim."
