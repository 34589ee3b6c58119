"""The training curves draw the rows of curves.csv, and distances to dense that are known."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from synthetic_study import GRID, METHODS, SWEEP

from peerscale.figures.curves import SKIPPED_SHARE, curves_figure
from peerscale.records.study import collected
from toy_study import settings_text

Tables = tuple[pd.DataFrame, pd.DataFrame]


@pytest.fixture(scope="module")
def tables(collected_runs: Path) -> Tables:
    files = collected(SWEEP, collected_runs)
    return pd.read_csv(files.curves), pd.read_csv(files.runs)


def lines(axes: Axes) -> dict[str, np.ndarray]:
    return {str(line.get_label()): np.column_stack(line.get_data()) for line in axes.lines}


def test_above_is_each_methods_best_run(tables: Tables) -> None:
    curves, runs = tables
    figure = curves_figure(curves, runs, "dense")
    assert len(figure.axes) == 2 * len(GRID)
    for axes, budget in zip(figure.axes[: len(GRID)], GRID, strict=True):
        drawn = lines(axes)
        assert set(drawn) == set(METHODS)
        for name, line in drawn.items():
            mine = runs[runs["cell"].str.startswith(f"{name}-") & (runs["budget"] == budget)].set_index("cell")
            rows = curves[curves["cell"] == mine["val_loss"].idxmin()]
            rows = rows[rows["flops"] >= SKIPPED_SHARE * budget]
            assert len(rows) > 5
            np.testing.assert_array_equal(line, rows[["flops", "loss"]])


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


def test_below_is_the_distance_to_dense_at_equal_flops() -> None:
    _, below = curves_figure(*straight({"dense": 0.0, "pkm": 0.05, "peer": -0.1}), "dense").axes
    drawn = lines(below)
    assert set(drawn) == {"_baseline", "pkm", "peer"}
    for name, distance in (("pkm", 0.05), ("peer", -0.1)):
        inside = drawn[name][:, 0] >= 1.1e10
        np.testing.assert_allclose(drawn[name][inside, 1], distance, atol=1e-9)
    assert set(np.ravel(drawn["_baseline"][:, 1])) == {0}
    assert "dense" in below.get_ylabel()


def test_the_first_distance_is_to_dense_at_the_same_flops() -> None:
    """Also if dense's first drawn point comes after that of the other curve; the loss falls by 2 per decade here."""
    curves, runs = straight({"dense": 0.0, "peer": -0.1})
    curves = curves.assign(loss=curves["loss"] - np.log10(curves["flops"] / 1e10))
    dense = curves["cell"] == "dense-d8-1e11-s0"
    curves = curves[~dense | (curves["flops"] < 1.05e10) | (curves["flops"] > 2e10)]
    early = pd.DataFrame(
        {"cell": runs["cell"], "flops": 5e9, "loss": [5.0 - 2 * np.log10(0.5), 4.9 - 2 * np.log10(0.5)]}
    )
    drawn = lines(curves_figure(pd.concat([early, curves]), runs, "dense").axes[1])["peer"]
    assert drawn[0, 0] == pytest.approx(1.01e10)
    np.testing.assert_allclose(drawn[:, 1], -0.1, atol=1e-9)


def test_variants_are_compared_with_dense_at_their_own_settings() -> None:
    constants = {"dense batch=8": 0.0, "dense batch=16": 0.3, "peer batch=8": 0.1, "peer batch=16": 0.1}
    drawn = lines(curves_figure(*straight(constants), "dense").axes[1])
    assert set(drawn) == {"_baseline", "peer batch=8", "peer batch=16"}
    assert drawn["peer batch=8"][-1, 1] == pytest.approx(0.1, abs=2e-3)
    assert drawn["peer batch=16"][-1, 1] == pytest.approx(-0.2, abs=2e-3)


def test_without_dense_there_is_no_row_of_distances() -> None:
    methods = {"pkm": 0.0, "peer": 0.1}
    assert len(curves_figure(*straight(methods), "dense").axes) == 1
    _, below = curves_figure(*straight(methods), "pkm").axes
    assert lines(below)["peer"][-1, 1] == pytest.approx(0.1) and below.get_ylabel().startswith("loss minus PKM's")


def test_no_curves_at_all(tables: Tables) -> None:
    curves, runs = tables
    curves_figure(curves.iloc[:0], runs, "dense").draw_without_rendering()
