"""The training curves draw the rows of curves.csv."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from synthetic_study import GRID, SWEEP

from peerscale.runs.study import collected
from peerscale.viz.curves import SKIPPED_SHARE, curves_figure


@pytest.fixture(scope="module")
def tables(collected_runs: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    files = collected(SWEEP, collected_runs)
    return pd.read_csv(files.curves), pd.read_csv(files.runs)


def test_a_line_a_finished_cell(tables: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    curves, runs = tables
    figure = curves_figure(curves, runs)
    for axes, budget in zip(figure.axes, GRID, strict=True):
        done = runs[(runs["budget"] == budget) & (runs["status"] == "done")]
        lines = {line.get_label(): line for line in axes.lines}
        assert set(lines) == set(done["cell"])
        for cell, line in lines.items():
            rows = curves[curves["cell"] == cell]
            rows = rows[rows["flops"] >= SKIPPED_SHARE * budget]
            assert len(rows) > 5
            np.testing.assert_array_equal(line.get_xdata(), rows["flops"])
            np.testing.assert_array_equal(line.get_ydata(), rows["loss"])


def test_the_best_run_of_each_method_stands_out(tables: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    curves, runs = tables
    figure = curves_figure(curves, runs)
    for axes, budget in zip(figure.axes, GRID, strict=True):
        bold = {str(line.get_label()) for line in axes.lines if line.get_alpha() == 1}
        assert len(bold) == 5
        losses = runs.set_index("cell")["val_loss"]
        for cell in bold:
            prefix = cell.split("-")[0]
            mine = [c for c in losses.index if c.startswith(f"{prefix}-") and f"-{budget:.0e}".replace("e+", "e") in c]
            assert losses[cell] == losses[mine].min()


def test_no_curves_at_all(tables: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    curves, runs = tables
    curves_figure(curves.iloc[:0], runs).draw_without_rendering()
    curves_figure(curves, runs[runs["status"] != "done"].iloc[:1]).draw_without_rendering()
