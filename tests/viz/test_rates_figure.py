"""The learning-rate figure draws, at each rate, the best of the other."""

import numpy as np
import pandas as pd

from peerscale.viz.rates import rates_figure

LOSSES = {
    ("0.01", 0.1): 3.0,
    ("0.01", 0.2): 2.0,
    ("0.02", 0.1): 1.0,
    ("0.02", 0.2): 4.0,
    ("0.03", 0.1): 5.0,
    ("0.03", 0.2): 6.0,
}


def table() -> pd.DataFrame:
    rows = [("peer", size, lr, rate, loss + shift)
            for size, shift in (("d16", 0.0), ("d32", 0.5)) for (lr, rate), loss in LOSSES.items()]  # fmt: skip
    rows += [("dense", size, lr, None, loss) for size in ("d16", "d32") for lr, loss in (("0.01", 3.0), ("0.02", 2.0))]
    frame = pd.DataFrame(rows, columns=["method", "size", "lr", "table_lr", "val_loss"])
    cells = frame["method"] + "-" + frame["size"] + "-5e11-lr=" + frame["lr"] + "-s0"
    return frame.assign(cell=cells, variant="", status="done", budget=5e11, seed=0, lr=1.0)


def test_lines_and_stars() -> None:
    figure = rates_figure(table())
    assert [axes.get_title() for axes in figure.axes] == ["d16", "d32", "mean of d16 and d32"]
    small, large, tables = ({str(line.get_label()): line for line in axes.lines} for axes in figure.axes)
    np.testing.assert_array_equal(small["peer"].get_xydata(), [(0.01, 2), (0.02, 1), (0.03, 5)])
    np.testing.assert_array_equal(large["peer"].get_xydata(), [(0.01, 2.5), (0.02, 1.5), (0.03, 5.5)])
    np.testing.assert_array_equal(tables["peer"].get_xydata(), [(0.1, 1.25), (0.2, 2.25)])
    assert "dense" not in tables
    np.testing.assert_array_equal(small["_best peer"].get_xydata(), [(0.02, 1)])
    assert small["_best peer"].get_markerfacecolor() != "white"
    assert small["_best dense"].get_markerfacecolor() == "white", "a winner at the edge of the grid is hollow"
    assert "dense 2, PEER 6" in figure.get_supxlabel() and "1 seed" in figure.get_supxlabel()
    figure.draw_without_rendering()


def test_one_rate_needs_no_panel_of_tables() -> None:
    runs = table()
    assert len(rates_figure(runs[runs["method"] == "dense"]).axes) == 2
