"""Frontier, multiplier and time figures against the synthetic study's tables."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from synthetic_study import GRID, SWEEP

from peerscale.runs.study import collected
from peerscale.viz.frontier import envelope, frontier_figure, frontier_table, time_figure


@pytest.fixture(scope="module")
def runs(collected_runs: Path) -> pd.DataFrame:
    return pd.read_csv(collected(SWEEP, collected_runs).runs).assign(variant=lambda rows: rows["variant"].fillna(""))


@pytest.fixture(scope="module")
def table(runs: pd.DataFrame) -> pd.DataFrame:
    return frontier_table(runs).set_index(["name", "budget"])


def minimum(runs: pd.DataFrame, name: str, budget: float) -> float:
    """Loss at the vertex, by numpy."""
    rows = runs[runs["cell"].str.startswith(f"{name}-") & (runs["budget"] == budget) & (runs["status"] == "done")]
    c2, c1, c0 = np.polyfit(np.log10(rows["flops_per_token"]), rows["val_loss"], 2)
    return c0 - c1**2 / (4 * c2)


def test_losses_and_multipliers(runs: pd.DataFrame, table: pd.DataFrame) -> None:
    low, high = GRID
    dense = {budget: minimum(runs, "dense", budget) for budget in GRID}
    slope = np.log(dense[high] / dense[low]) / np.log(high / low)
    for (name, budget), row in table.iterrows():
        assert row["loss"] == pytest.approx(minimum(runs, name, budget), rel=1e-8)
        assert row["loss_low"] < row["loss"] < row["loss_high"]
        if name == "dense":
            assert np.isnan(row["multiplier"])
            continue
        # Two budgets of dense are one straight line in logarithms, also beyond them.
        needed = low * (row["loss"] / dense[low]) ** (1 / slope)
        assert row["multiplier"] == pytest.approx(needed / budget, rel=1e-6)
        assert row["low"] < row["multiplier"] < row["high"]
        assert row["extrapolated"] == (not dense[high] <= row["loss"] <= dense[low])
    flagged = {index for index, row in table.iterrows() if row["flagged"]}
    assert flagged == {("pkm", 1e11), ("moe", 3e11), ("peer", 3e11)}  # a cell of five went wrong


def test_flagged_and_extrapolated_points_are_hollow(table: pd.DataFrame) -> None:
    figure = frontier_figure(table.reset_index(), note="FLOPs: some convention")
    losses, multipliers = figure.axes
    for axes, column in ((losses, "loss"), (multipliers, "multiplier")):
        for collection in axes.collections:
            name = str(collection.get_label())
            if name.startswith("_"):
                continue
            rows = table.loc[name].sort_index()
            drawn = np.asarray(collection.get_offsets())
            np.testing.assert_allclose(drawn[:, 1], rows[column])
            np.testing.assert_allclose(drawn[:, 0], rows.index, rtol=0.1)
            hollow = rows["flagged"] | (rows["extrapolated"] & (column == "multiplier"))
            assert [face[:3].min() == 1 for face in collection.get_facecolors()] == list(hollow)
    assert "some convention" in figure.get_supxlabel()
    figure.draw_without_rendering()


def test_without_dense_there_is_a_frontier_alone(runs: pd.DataFrame) -> None:
    alone = frontier_table(runs[runs["method"] == "peer"])
    assert alone["multiplier"].isna().all()
    assert len(frontier_figure(alone).axes) == 1


def test_no_minimum_is_no_row(runs: pd.DataFrame) -> None:
    assert frontier_table(runs[runs["size"] == "d16"]).empty


def test_the_envelope_is_what_nothing_cheaper_beats() -> None:
    rows = pd.DataFrame({"wall_s": [4.0, 1.0, 2.0, 3.0, 2.0], "val_loss": [4.0, 6.0, 5.5, 5.7, 5.0]})
    assert envelope(rows, "wall_s").to_numpy().tolist() == [[1, 6], [2, 5], [4, 4]]


def test_time_shows_every_finished_cell_and_the_envelopes(runs: pd.DataFrame) -> None:
    rng = np.random.default_rng(0)
    timed = runs.assign(wall_s=rng.uniform(10, 100, len(runs)))
    figure = time_figure(timed)
    done = timed[timed["status"] == "done"]
    for axes, column in zip(figure.axes, ("budget", "wall_s", "bytes_moved"), strict=True):
        cells = [line.get_xydata() for line in axes.lines if str(line.get_label()).startswith("_cells")]
        drawn = sorted(map(tuple, np.concatenate(cells)))
        assert drawn == sorted(zip(done[column], done["val_loss"], strict=True))
    (line,) = (line for line in figure.axes[1].lines if line.get_label() == "peer")
    peer = done[done["method"] == "peer"]
    for x, y in line.get_xydata():
        assert y == peer.loc[peer["wall_s"] <= x, "val_loss"].min()
    assert figure.axes[1].get_xlabel() == "training time (s)"
    assert "kernel native, threads a cell 1" in figure.get_supxlabel()


def test_energy_is_shown_where_every_finished_cell_tells_it(runs: pd.DataFrame) -> None:
    told = runs.assign(energy_j=np.where(runs["status"] == "done", 5.0 * np.arange(len(runs)) + 1, np.nan))
    assert [axes.get_xlabel() for axes in time_figure(told).axes][-1] == "energy of the machine (J)"
    told.loc[told.index[told["status"] == "done"][0], "energy_j"] = np.nan
    assert len(time_figure(told).axes) == 3
