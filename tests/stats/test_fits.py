"""What is written to a study's fits.json, against the surface that its losses were made from."""

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "figures"))

from synthetic_surface import BUDGETS, GRID, SURFACE, surface_runs

from peerscale.errors import UserError
from peerscale.files import write_json
from peerscale.stats.comparison import compare
from peerscale.stats.curve import from_names
from peerscale.stats.fits import fit_study, read_fits

Fits = dict[str, Any]


def near_the_optimum(runs: pd.DataFrame) -> pd.DataFrame:
    """Five of the seven sizes of each budget, which parabolas fit."""
    best = 6 * runs["budget"].map({budget: float(SURFACE.optimum(budget).params) for budget in BUDGETS})
    return runs[runs["flops_per_token"].between(best / 4, best * 4)]


@pytest.fixture(scope="module")
def fits() -> Fits:
    runs = surface_runs(noise=1e-4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peerscale.stats.fits.RESAMPLES", 100)  # which take most of the time
        return fit_study(runs, compare(near_the_optimum(runs), []))


def test_every_method_has_every_law(fits: Fits, tmp_path: Path) -> None:
    for name in ("dense", "peer"):
        laws = {key: fit["law"] for key, fit in fits["laws"].items() if fit["method"] == name}
        assert laws == {name: "isoflop", f"{name}/parametric": "parametric"}
    write_json(tmp_path / "fits.json", fits)
    assert json.loads((tmp_path / "fits.json").read_text()) == fits
    assert read_fits(tmp_path / "fits.json") == from_names(fits)


def test_fits_of_another_version_are_refused(fits: Fits, tmp_path: Path) -> None:
    for other in ({key: value for key, value in fits.items() if key != "curves"}, {"dense": {"law": "x"}}, [], 3):
        write_json(tmp_path / "fits.json", other)
        with pytest.raises(UserError, match=r"fits\.json: not the fits of a study .* make figures"):
            read_fits(tmp_path / "fits.json")


def test_the_surface_and_both_exponents_are_recovered_with_intervals(fits: Fits) -> None:
    laws = fits["laws"]
    surface = laws["dense/parametric"]
    assert surface["status"] == "converged"
    for key in ("E", "alpha", "beta", "a"):
        low, high = surface["ci"][key]
        assert surface[key] == pytest.approx(getattr(SURFACE, key), rel=0.03) and low <= surface[key] <= high
    assert surface["hold_out"]["budget"] == pytest.approx(BUDGETS[-1], rel=1e-6)
    assert surface["hold_out"]["predicted"] == pytest.approx(surface["hold_out"]["observed"], abs=2e-3)
    assert laws["dense"]["exponent"] == pytest.approx(SURFACE.a, abs=0.01)
    # PEER's surface is lower all over and has the same optimum.
    assert laws["peer/parametric"]["a"] == pytest.approx(SURFACE.a, abs=0.02)


def test_the_optima_are_the_surfaces(fits: Fits) -> None:
    for entry in fits["budgets"]:
        best = float(SURFACE.optimum(entry["budget"]).params)
        lowest = float(SURFACE.predict(best, entry["budget"] / (6 * best)))
        dense, peer = entry["methods"]
        assert dense["loss"] == pytest.approx(lowest, abs=3e-3) and dense["x"] == pytest.approx(6 * best, rel=0.05)
        gain = -0.02 * (lowest - SURFACE.E)
        assert peer["own"]["loss"] - dense["own"]["loss"] == pytest.approx(gain, abs=3e-4)
        # PEER's curvature is 2 % lower as well, which one curvature for both takes for a part of its gain.
        assert peer["loss"] - dense["loss"] == pytest.approx(gain, abs=2e-3)
        assert len(dense["sizes"]) == 5


def test_the_comparison_is_part_of_it(fits: Fits) -> None:
    found = compare(near_the_optimum(surface_runs(noise=1e-4)), [])
    assert {key: fits[key] for key in found if key != "laws"} == {k: v for k, v in found.items() if k != "laws"}
    assert found["laws"].items() <= fits["laws"].items()
    assert fits["rates"] == {"law": None, "tables": None}


def test_other_conventions_are_counted(fits: Fits) -> None:
    assert [(row["budget"], row["method"]) for row in fits["conventions"]] == [(budget, "peer") for budget in BUDGETS]
    for row in fits["conventions"]:  # parameters are a sixth of both methods' FLOPs
        assert row["multipliers"]["6 x active parameters"] == pytest.approx(row["multipliers"]["as counted"])


def test_two_budgets_have_no_surface() -> None:
    runs = surface_runs()
    two = runs[runs["budget"] < BUDGETS[-1]]
    assert fit_study(two, compare(two, []))["laws"] == {}
    one = runs[runs["size"] == f"d{len(GRID) // 2}"].groupby("method").head(1)
    assert fit_study(one, compare(one, []))["laws"] == {}


def test_json_keeps_strings_and_puts_numbers_on_one_line(tmp_path: Path) -> None:
    value = {"note": "window [ 1,  2 ]", "lines": "[\n 1\n]", "x": [1, 2.5, None], "deep": [[1, 2], [3]], "none": []}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == value
    assert '"x": [1, 2.5, null]' in text and "[1, 2]," in text
