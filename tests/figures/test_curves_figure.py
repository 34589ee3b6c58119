"""The training curves draw the rows of curves.csv, and distances to dense that are known."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from synthetic_study import GRID, METHODS, SWEEP

from peerscale.figures.curves import SKIPPED_SHARE, curves_figure
from peerscale.records.study import collected
from toy_study import fits_with_curves, settings_text

Tables = tuple[pd.DataFrame, pd.DataFrame]


@pytest.fixture(scope="module")
def tables(collected_runs: Path) -> Tables:
    files = collected(SWEEP, collected_runs)
    return pd.read_csv(files.curves), pd.read_csv(files.runs)


def lines(axes: Axes) -> dict[str, np.ndarray]:
    return {str(line.get_label()): np.column_stack(line.get_data()) for line in axes.lines}


def fits_of(*differences: dict[str, Any], baseline: str = "dense", status: str = "ok") -> dict[str, Any]:
    methods = [{"name": name, "status": status} for name in ("dense", "peer")]
    entry = {"budget": 1e11, "methods": methods, "differences": [*differences]}
    return fits_with_curves({"budgets": [entry]}, baseline)


def test_without_the_baseline_each_methods_best_run_is_drawn(tables: Tables) -> None:
    curves, runs = tables
    figure = curves_figure(curves, runs, fits_with_curves({"budgets": []}, "gated"))
    assert len(figure.axes) == len(GRID) and figure.axes[0].get_ylabel() == "training loss (nats per token)"
    for axes, budget in zip(figure.axes, GRID, strict=True):
        drawn = lines(axes)
        assert set(drawn) == set(METHODS)
        for name, line in drawn.items():
            mine = runs[runs["cell"].str.startswith(f"{name}-") & (runs["budget"] == budget)].set_index("cell")
            rows = curves[curves["cell"] == mine["val_loss"].idxmin()]
            rows = rows[rows["flops"] >= SKIPPED_SHARE * budget]
            assert len(rows) > 5
            np.testing.assert_allclose(line, np.column_stack([rows["flops"] / budget, rows["loss"]]))


def straight(methods: dict[str, float]) -> Tables:
    """Curves of 5 - log10(FLOPs / 1e10) plus a constant by name; each logs at FLOPs of its own."""
    cells = [f"{name.partition(' ')[0]}-d8-1e11-{name.partition(' ')[2]}-s0".replace("--", "-") for name in methods]
    parts = []
    for i, (cell, constant) in enumerate(zip(cells, methods.values(), strict=True)):
        flops = np.geomspace(1e10 * (1 + 0.01 * i), 1e11, 20 + i)
        parts.append(pd.DataFrame({"cell": cell, "flops": flops, "loss": 5 + constant - np.log10(flops / 1e10)}))
    runs = pd.DataFrame({
        "cell": cells, "method": [name.partition(" ")[0] for name in methods], "variant": "", "seed": 0, "size": "d8",
        "settings": [settings_text(name.partition(" ")[2]) for name in methods], "rate_factor": 1.0,
        "budget": 1e11, "status": "done", "val_loss": 4.0,
    })  # fmt: skip
    return pd.concat(parts), runs


def test_the_distance_to_dense_at_equal_flops_is_drawn() -> None:
    figure = curves_figure(*straight({"dense": 0.0, "pkm": 0.05, "peer": -0.1}), fits_of())
    (axes,) = figure.axes
    drawn = lines(axes)
    assert set(drawn) == {"_baseline", "pkm", "peer"}
    for name, distance in (("pkm", 0.05), ("peer", -0.1)):
        assert len(drawn[name]) > 5 and SKIPPED_SHARE <= drawn[name][0, 0] < drawn[name][-1, 0] <= 1
        np.testing.assert_allclose(drawn[name][:, 1], distance, atol=1e-9)
    assert set(np.ravel(drawn["_baseline"][:, 1])) == {0}
    assert axes.get_ylabel() == "training loss minus dense's (nats per token)"
    assert "points on the right" not in figure.get_supxlabel()


def test_distances_are_means_over_a_fifth_of_the_run_and_no_others() -> None:
    curves, runs = straight({"dense": 0.0, "peer": 0.0})
    peer = curves["cell"] == "peer-d8-1e11-s0"  # of 21 points, so that a mean is over four
    noise = np.where(np.arange(peer.sum()) % 2, 0.3, -0.1)
    curves.loc[peer, "loss"] += noise
    drawn = lines(curves_figure(curves, runs, fits_of()).axes[0])["peer"]
    np.testing.assert_allclose(drawn[:, 1], 0.1, atol=1e-9)
    assert drawn[-1, 0] == pytest.approx(curves.loc[peer, "flops"].iloc[-2] / 1e11)  # the mean of the last four


@pytest.mark.parametrize(
    ("size", "status", "hollow"), [("", "ok", False), ("", "off_centre", True), ("d8", "ok", True)]
)
def test_the_point_apart_from_the_line_is_the_tables_difference(size: str, status: str, hollow: bool) -> None:
    found = {"method": "peer", "reference": "dense", "size": size, "value": -0.123, "low": -0.2, "high": 0.0}
    figure = curves_figure(*straight({"dense": 0.0, "peer": -0.1}), fits_of(found, status=status))
    (axes,) = figure.axes
    (point,) = (line for line in axes.lines if line.get_label() == "_difference peer")
    assert np.column_stack(point.get_data()).tolist() == [[1.0, -0.123]]
    assert (point.get_markerfacecolor() == "white") == hollow
    np.testing.assert_allclose(lines(axes)["peer"][:, 1], -0.1, atol=1e-9)
    assert "points on the right" in figure.get_supxlabel() and axes.get_title().endswith("\nd_model 8")


def test_variants_are_compared_with_dense_at_their_own_settings() -> None:
    constants = {"dense batch=8": 0.0, "dense batch=16": 0.3, "peer batch=8": 0.1, "peer batch=16": 0.1}
    drawn = lines(curves_figure(*straight(constants), fits_of()).axes[0])
    assert set(drawn) == {"_baseline", "peer batch=8", "peer batch=16"}
    assert drawn["peer batch=8"][-1, 1] == pytest.approx(0.1, abs=2e-3)
    assert drawn["peer batch=16"][-1, 1] == pytest.approx(-0.2, abs=2e-3)


def test_no_curves_at_all(tables: Tables) -> None:
    curves, runs = tables
    curves_figure(curves.iloc[:0], runs, fits_of()).draw_without_rendering()
