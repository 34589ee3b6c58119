"""The figure of differences draws the rows of differences.csv."""

import numpy as np
import pandas as pd

from peerscale.viz.differences import differences_figure
from peerscale.viz.style import colours

ROWS = pd.DataFrame(
    [
        (1e11, "peer", "dense", -0.11, -0.12, -0.10, False),
        (3e11, "peer", "dense", 0.004, 0.001, 0.007, True),
        (1e11, "pkm", "dense", -0.07, np.nan, np.nan, True),
        (3e11, "pkm", "dense", np.nan, np.nan, np.nan, True),
        (1e11, "dense", "peer", 0.11, 0.10, 0.12, False),
    ],
    columns=["budget", "method", "reference", "difference", "low", "high", "flagged"],
)


def test_points_and_intervals() -> None:
    axes = differences_figure(ROWS).axes[0]
    drawn = {
        (str(line.get_label()), *np.asarray(line.get_xdata(), float))
        for line in axes.lines
        if not str(line.get_label()).startswith("_")
    }
    assert drawn == {("peer", -0.11), ("peer", 0.004), ("pkm", -0.07)}
    intervals = [tuple(line.get_xdata()) for line in axes.lines if line.get_label() == "_interval peer"]
    assert intervals == [(-0.12, -0.10), (0.001, 0.007)]


def test_a_row_a_method_and_a_marker_a_budget() -> None:
    axes = differences_figure(ROWS).axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["PKM", "PEER"]
    peer = [line for line in axes.lines if line.get_label() == "peer"]
    assert len({line.get_marker() for line in peer}) == 2
    assert {round(float(np.asarray(line.get_ydata())[0])) for line in peer} == {1}
    assert [line.get_markerfacecolor() == "white" for line in peer] == [False, True]


def test_it_says_what_the_intervals_cover() -> None:
    figure = differences_figure(ROWS, note="FLOPs: some convention")
    assert "not seeds" in figure.get_supxlabel() and "some convention" in figure.get_supxlabel()
    figure.draw_without_rendering()


def test_arms_have_the_colours_of_the_studys_other_figures() -> None:
    arms = [f"{method} batch={n}" for method in ("dense", "peer") for n in (8, 16, 32, 64)]
    rows = pd.DataFrame([(1e11, arm, "dense", -0.1, -0.2, 0.0, False) for arm in arms[4:]], columns=ROWS.columns)
    lines = differences_figure(rows, methods=arms).axes[0].lines
    drawn = {line.get_label(): line.get_color() for line in lines if line.get_label() in arms}
    assert drawn == {arm: colours(arms)[arm] for arm in arms[4:]}
    assert drawn != colours(arms[4:])
