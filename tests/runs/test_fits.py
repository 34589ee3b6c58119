"""The laws in a study's fits.json, against the surface that its losses were made from."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "viz"))

from synthetic_surface import BUDGETS, GRID, SURFACE, surface_curves, surface_runs

from peerscale.files import write_json
from peerscale.runs.fits import WITHIN, fit_study, isoflop_fits
from peerscale.runs.study import SIZE_COLUMNS, read_fits

Fits = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def fits() -> Fits:
    runs = surface_runs(noise=1e-4)
    return fit_study(runs, surface_curves(runs))


def test_every_method_has_every_law(fits: Fits, tmp_path: Path) -> None:
    for name in ("dense", "peer"):
        laws = {key: fit["law"] for key, fit in fits.items() if fit["method"] == name}
        isoflop = {name if x == "flops_per_token" else f"{name}/{x}": "isoflop" for x in SIZE_COLUMNS}
        assert laws == {**isoflop, f"{name}/parametric": "parametric", f"{name}/envelope": "envelope"}
    write_json(tmp_path / "fits.json", fits)
    assert read_fits(tmp_path / "fits.json") == json.loads(json.dumps(fits))


def test_the_surface_and_the_three_exponents_are_recovered_with_intervals(fits: Fits) -> None:
    surface = fits["dense/parametric"]
    assert surface["status"] == "converged"
    for key in ("E", "alpha", "beta", "a"):
        low, high = surface["ci"][key]
        assert surface[key] == pytest.approx(getattr(SURFACE, key), rel=0.03) and low <= surface[key] <= high
    assert surface["hold_out"]["budget"] == pytest.approx(BUDGETS[-1], rel=1e-6)
    assert surface["hold_out"]["predicted"] == pytest.approx(surface["hold_out"]["observed"], abs=2e-3)
    assert fits["dense"]["exponent"] == pytest.approx(SURFACE.a, abs=0.01)
    assert fits["dense/envelope"]["exponent"] == pytest.approx(SURFACE.a, abs=0.08)  # its sizes are a grid's
    # PEER's surface is lower all over and has the same optimum.
    assert fits["peer/parametric"]["a"] == pytest.approx(SURFACE.a, abs=0.02)


def test_sizes_far_above_the_lowest_loss_are_left_out() -> None:
    runs = surface_runs()
    lowest = runs.groupby("budget")["val_loss"].min()
    far = runs["val_loss"] > (1 + WITHIN) * runs["budget"].map(lowest)
    assert 0 < far.sum() < len(runs) // 2
    fit = isoflop_fits(runs, "flops_per_token")["dense"]
    for vertex in fit.vertices:
        mine = runs[(runs["method"] == "dense") & (runs["budget"] == vertex.budget)]
        near = mine[~far[mine.index]]
        kept = near if len(near) >= 5 else mine.nsmallest(5, "val_loss")
        assert vertex.sizes == tuple(sorted(kept["flops_per_token"]))
        z = np.log10(kept["flops_per_token"])
        c2, c1, _ = np.polyfit(z, kept["val_loss"], 2)
        assert vertex.x == pytest.approx(10 ** (-c1 / (2 * c2)), rel=1e-6)


def test_two_budgets_have_no_surface_and_one_size_no_envelope() -> None:
    runs = surface_runs()
    two = runs[runs["budget"] < BUDGETS[-1]]
    assert not any(key.endswith("/parametric") for key in fit_study(two, surface_curves(two)))
    one = runs[runs["size"] == f"d{len(GRID) // 2}"].groupby("method").head(1)
    assert set(fit_study(one, surface_curves(one))) == {
        *("dense", "peer"), *(f"{name}/{x}" for name in ("dense", "peer") for x in SIZE_COLUMNS[1:]),
    }  # fmt: skip
