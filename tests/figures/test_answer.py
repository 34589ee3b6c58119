"""Sentences that say what the claims of a study say, no more."""

from typing import Any

import pytest

from peerscale.figures.answer import answer, verdicts


def claim(value: float, rival: str = "dense", budget: float = 3e12, p_holm: float | None = 0.001, **more: Any) -> dict:
    found = {"budget": budget, "size": "", "method": "peer", "rival": rival, "value": value, "p_holm": p_holm}
    return {**found, "low": value - 0.015, "high": value + 0.015, **more}


def fits(*claims: dict) -> dict[str, Any]:
    return {"claims": list(claims), "budgets": [{"budget": 3e12, "differences": [{}] * bool(claims)}]}


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
    assert verdicts(claims) == [sentence]


def test_a_probability_of_five_percent_is_no_lead() -> None:
    assert "cannot be told apart" in verdicts([claim(-0.034, p_holm=0.05)])[0]
    assert "leads" in verdicts([claim(-0.034, p_holm=0.0499)])[0]


def test_the_answer_has_the_largest_budget_first_and_ends_with_the_distance_to_dense() -> None:
    claims = [claim(-0.01, budget=1e12, p_holm=0.5), claim(-0.03, budget=1e13)]
    assert answer(fits(*claims)) == (
        "At 1e13 FLOPs PEER leads dense; at 1e12 it cannot be told apart from dense. "
        "Against dense at 1e13: −0.030 ± 0.015 nats."
    )


def test_neighbouring_budgets_with_one_outcome_are_told_once() -> None:
    budgets = (1e12, 3e12, 1e13, 3e13)
    claims = [claim(-0.03, budget=b, p_holm=0.5 if b == 1e12 else 0.001) for b in budgets]
    assert answer(fits(*claims)).startswith(
        "At 3e13, 1e13 and 3e12 FLOPs PEER leads dense; at 1e12 it cannot be told apart from dense."
    )
    claims = [claim(-0.03, budget=b, p_holm=0.5 if b == 3e12 else 0.001) for b in budgets[:3]]
    assert answer(fits(*claims)).startswith(
        "At 1e13 FLOPs PEER leads dense; at 3e12 it cannot be told apart from dense; at 1e12 it leads dense."
    )


def test_without_dense_there_is_no_distance_to_it() -> None:
    assert answer(fits(claim(-0.03, "moe"))) == "At 3e12 FLOPs PEER leads MoE (expert choice)."


def test_variants_are_told_one_by_one_at_the_largest_budget() -> None:
    arms = [
        claim(value, f"dense batch_sequences={n}", budget, p, method=f"peer batch_sequences={n}")
        for budget in (1e12, 3e12)
        for n, value, p in ((8, -0.02, 0.14), (16, -0.03, 0.004))
    ]
    assert answer(fits(*arms)) == (
        "At 3e12 FLOPs, batch 8, PEER cannot be told apart from dense (−0.020 ± 0.015). "
        "At 3e12 FLOPs, batch 16, PEER leads dense (−0.030 ± 0.015)."
    )


def test_what_is_missing_is_said() -> None:
    assert answer(fits()) == (
        "No answer yet: no comparison of sweep.claims (by default PEER or dense with another) can be made."
    )
    known = {"claims": [], "budgets": [{"budget": 3e12, "methods": [], "differences": [{"value": -0.1, "se": 0.001}]}]}
    assert (
        answer(known)
        == "No claim: at single sizes only what sweep.claims names is claimed, and only where errors include seeds."
    )
    later = {"budget": 3e12, "methods": [], "differences": [{"value": -0.1, "fit_se": 0.01}]}
    assert answer({"claims": [], "budgets": [later]}).startswith("No claim yet: no comparison of sweep.claims")
    nowhere = {"budget": 1e10, "methods": [{"loss": None}], "differences": [{"note": "dense: curvature"}]}
    text = answer({"claims": [], "budgets": [nowhere]})
    assert text == "No answer: too few methods have a minimum at 1e10 FLOPs (see their flags)."


def test_a_study_that_tunes_rates_claims_nothing() -> None:
    law = {"rates": {"law": {"curvature": 0.06}}}
    assert (
        answer({**fits(claim(-0.034)), **law})
        == "No claim: the study tunes learning rates; its table.md has their law."
    )
    assert answer({**fits(claim(-0.034)), "rates": {"law": None}}).startswith("At 3e12 FLOPs PEER leads dense")
