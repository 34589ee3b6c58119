"""Our law for retrieved experts: it finds the form that made the data, and reports those that lose."""

import json

import numpy as np
import pandas as pd
import pytest

from peerscale.errors import UserError
from peerscale.laws import fit_peer
from peerscale.laws.moe import FORMS, PeerFit, PeerLaw
from peerscale.laws.solver import FitStatus

TRUTHS = {
    "active": PeerLaw(E=1.6, A=300.0, B=500.0, alpha=0.3, beta=0.28),
    "experts": PeerLaw(E=1.6, A=300.0, B=500.0, alpha=0.3, beta=0.28, chi=0.06),
    "granularity": PeerLaw(E=1.6, A=300.0, B=500.0, alpha=0.3, beta=0.28, gamma=-0.05),
    "product": PeerLaw(E=1.6, A=500.0, B=500.0, alpha=0.3, beta=0.28, chi=0.06, gamma=0.04),
    "memory": PeerLaw(E=1.4, A=300.0, B=500.0, alpha=0.3, beta=0.28, H=20.0, eta=0.25, theta=0.2),
}


def runs(law: PeerLaw, noise: float = 0.0) -> pd.DataFrame:
    rows = [
        (n, d, x, g)
        for n in (1e7, 5e7, 2.5e8)
        for d in (2e8, 2e9, 2e10)
        for x in (1024, 16384, 262144)
        for g in (16, 64, 256)
    ]
    table = pd.DataFrame(rows, columns=["N", "D", "X", "G"])
    scatter = np.exp(noise * np.random.default_rng(0).standard_normal(len(table)))
    return table.assign(loss=law.predict(table["N"], table["D"], table["X"], table["G"]) * scatter)


def fit(table: pd.DataFrame, **options) -> PeerFit:
    return fit_peer(table, params="N", tokens="D", experts="X", granularity="G", loss="loss", **options)


def test_the_law_written_out() -> None:
    law = PeerLaw(E=1.0, A=2.0, B=3.0, alpha=0.1, beta=0.2, chi=0.3, gamma=0.4, H=5.0, eta=0.6, theta=0.7)
    expected = 1 + 2 / (7**0.1 * 11**0.3 * 13**0.4) + 5 / (11**0.6 * 13**0.7) + 3 / 17**0.2
    assert law.predict(7, 17, 11, 13) == pytest.approx(expected)


@pytest.mark.parametrize("form", list(FORMS))
def test_chooses_the_form_that_made_the_data(form: str) -> None:
    result = fit(runs(TRUTHS[form], noise=0.002), objective="mse-log")
    assert result.chosen == form and result.status is FitStatus.CONVERGED
    assert {candidate.form for candidate in result.candidates} == FORMS.keys()
    errors = [candidate.error for candidate in result.candidates]
    assert errors == sorted(errors) and errors[0] < 0.02 and (form == "active" or errors[-1] > 1.5 * errors[0])
    assert result.predict(1e9, 5e10, 1e6, 256) == pytest.approx(TRUTHS[form].predict(1e9, 5e10, 1e6, 256), abs=0.02)
    assert result.hold_out.n == 9


def test_recovers_coefficients_without_noise() -> None:
    result, truth = fit(runs(TRUTHS["product"])), TRUTHS["product"]
    for name in ("E", "A", "B", "alpha", "beta", "chi", "gamma"):
        assert getattr(result, name) == pytest.approx(getattr(truth, name), rel=1e-3), name
    assert (result.H, result.eta, result.theta) == (0, 0, 0)


def test_intervals_and_json() -> None:
    result = fit(runs(TRUTHS["experts"], noise=0.002), bootstrap=50)
    low, high = result.interval(lambda law: law.predict(1e9, 5e10, 1e6, 256))
    assert low < result.predict(1e9, 5e10, 1e6, 256) < high and "chi" in result.ci and "eta" not in result.ci
    stored = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert stored["chosen"] == "experts" and len(stored["candidates"]) == 5
    assert stored["candidates"][0]["held_out"].keys() == {"budget", "experts", "granularity"}


def test_an_axis_without_variation_does_not_count_and_too_few_runs_are_refused() -> None:
    result = fit(runs(TRUTHS["experts"]).query("G == 64"))
    assert result.candidates[0].held_out.keys() == {"budget", "experts"}
    with pytest.raises(UserError, match="6 rows are too few to choose a form"):
        fit(runs(TRUTHS["experts"]).head(6))
