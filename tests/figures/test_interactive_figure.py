"""The interactive Figure 1: the numbers of the table, the curves of the fits, and a drawing without a browser."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import vl_convert
from synthetic_study import GRID, METHODS, SWEEP, minimum, shared_curvature
from synthetic_surface import BUDGETS, surface_runs

from peerscale.figures.interactive import AXES, isoflop_html, isoflop_spec
from peerscale.records.study import collected, read_json
from peerscale.stats.comparison import compare

Study = tuple[pd.DataFrame, dict[str, Any]]
LABELS = ("dense", "MoE (expert choice)", "MoE (token choice)", "PKM", "PEER")


@pytest.fixture(scope="module")
def study(collected_runs: Path) -> Study:
    files = collected(SWEEP, collected_runs)
    return pd.read_csv(files.runs), read_json(files.fits)


def marks(spec: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(spec["data"]["values"])


def test_points_are_the_finished_cells_with_their_numbers(study: Study) -> None:
    runs, fits = study
    done = runs[runs["status"] == "done"].set_index("cell")
    shown = marks(isoflop_spec(runs, fits)).query("kind == 'fitted'").set_index("cell")
    assert {*shown.index} == {*done.index}
    for column in (*AXES, "flops"):
        np.testing.assert_allclose(shown[column], done.loc[shown.index, column])
    np.testing.assert_allclose(shown["loss"], done.loc[shown.index, "val_loss"])
    np.testing.assert_allclose(shown["drawn"], np.exp(done.loc[shown.index, "val_loss"]))


def test_curves_and_optima_are_the_fits(study: Study) -> None:
    runs, fits = study
    drawn = marks(isoflop_spec(runs, fits))
    for budget, title in zip(GRID, ("1e11 FLOPs", "3e11 FLOPs"), strict=True):
        rows = runs[(runs["budget"] == budget) & (runs["status"] == "done")]
        done = {name: rows[rows["cell"].str.startswith(f"{name}-")] for name in METHODS}
        curves = shared_curvature({name: (d["flops_per_token"], d["val_loss"]) for name, d in done.items()})
        for name, label in zip(METHODS, LABELS, strict=True):
            mine = drawn[(drawn["budget"] == title) & (drawn["method"] == label)]
            curve, (optimum,) = (
                mine[mine["kind"] == "curve"],
                mine[mine["kind"].str.contains("optimum")].to_dict("records"),
            )
            wanted = np.polynomial.Polynomial(curves[name])(np.log10(curve["flops_per_token"].astype(float)))
            np.testing.assert_allclose(np.log(curve["drawn"]), wanted, atol=1e-6)
            assert curve["params_total"].agg(["min", "max"]).tolist() == pytest.approx(
                done[name]["params_total"].agg(["min", "max"]).tolist()
            )
            assert curve["wall_s"].isna().all(), "no law says how a curve over FLOPs per token lies over time"
            assert (optimum["flops_per_token"], optimum["loss"]) == pytest.approx(minimum(curves[name]), rel=1e-5)


def test_sizes_left_out_of_the_fit_say_so_and_stay_in_sight() -> None:
    runs = surface_runs()
    sizes = {
        b: np.sort(runs.loc[(runs["budget"] == b) & (runs["method"] == "dense"), "flops_per_token"]) for b in BUDGETS
    }
    windows = {budget: (x[1] * 0.99, x[5] * 1.01) for budget, x in sizes.items()}
    shown = marks(isoflop_spec(runs, compare(runs, [], windows=windows))).set_index("cell").loc[runs["cell"]]
    inside = [
        low <= x <= high for x, (low, high) in zip(runs["flops_per_token"], runs["budget"].map(windows), strict=True)
    ]
    assert (shown["kind"] == "fitted").tolist() == inside
    above = shown["kind"] == "above the axis"
    assert above.any() and (shown.loc[above, "drawn"] < shown.loc[above, "perplexity"]).all()
    assert (shown.loc[~above, "drawn"] == shown.loc[~above, "perplexity"]).all()


def test_it_is_drawn_with_the_names_of_its_cells(study: Study) -> None:
    runs, fits = study
    svg = vl_convert.vegalite_to_svg(isoflop_spec(runs, fits))
    named = {*re.findall(r'aria-label="([^"]*-s0)"', svg)}
    assert named == {*runs.loc[runs["status"] == "done", "cell"]}


def test_what_stands_in_a_page_is_valid_and_ends_no_script_early(study: Study) -> None:
    runs, fits = study
    page = isoflop_html(runs.assign(wall_s=np.nan, variant="</script>"), {**fits, "budgets": []})
    assert page.count("</script") == 1 and page.endswith("</script>")
    spec = json.loads(page.rpartition('vegaEmbed("#figure-1", ')[2].rpartition(", {renderer")[0])
    assert {row["kind"] for row in spec["data"]["values"]} <= {"fitted"} and "wall_s" not in spec["data"]["values"][0]
