"""Learning rates: the table against means worked out by hand; the figure draws, at each rate, the best of the other."""

import numpy as np
import pandas as pd
import pytest

from peerscale.errors import UserError
from peerscale.viz.rates import edges, rates_figure, settings_table
from toy_study import axes_text

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
    axes = ("lr=" + frame["lr"]).map(axes_text)
    return frame.assign(cell=cells, axes=axes, variant="", status="done", budget=5e11, seed=0, lr=1.0)


def test_lines_and_stars() -> None:
    figure = rates_figure(table())
    assert [axes.get_title() for axes in figure.axes] == ["d_model 16", "d_model 32", "mean over sizes"]
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


def run(method: str, size: str, lr: str, loss: float, table_lr: float | None = None, status: str = "done") -> dict:
    axes = f"lr={lr}" + (f"-table_lr={table_lr}" if table_lr else "")
    return {
        "cell": f"{method}-{size}-5e11-{axes}-s0",
        "axes": axes_text(axes),
        "method": method,
        "variant": "",
        "size": size,
        "seed": 0,
        "lr": 1.0,
        "table_lr": table_lr,
        "val_loss": loss,
        "status": status,
    }


def test_orders_settings_by_their_mean_over_sizes_and_names_an_edge() -> None:
    runs = [
        run("dense", size, lr, loss)
        for lr, losses in {"0.01": (5.0, 5.2), "0.02": (5.1, 4.9), "1e-05": (6.0, 7.0)}.items()
        for size, loss in zip(("d16", "d32"), losses, strict=True)
    ]
    runs += [run("dense", "d16", "0.04", 1.0), run("dense", "d32", "0.04", float("nan"), status="diverged")]
    table = settings_table(pd.DataFrame(runs))
    assert list(table["lr"]) == [0.02, 0.01, 1e-05], "a setting that diverged at one size is no setting"
    assert list(table["mean"]) == pytest.approx([5.0, 5.1, 6.5])
    assert edges(table) == ["the best lr, 0.02, is at the edge of its grid: extend it"]


def test_two_rates_are_one_setting() -> None:
    losses = {("0.01", 0.1): 3.0, ("0.01", 0.2): 2.0, ("0.02", 0.1): 1.0, ("0.02", 0.2): 4.0}
    runs = [run("peer", "d16", lr, loss, table_lr) for (lr, table_lr), loss in losses.items()]
    table = settings_table(pd.DataFrame(runs))
    assert list(zip(table["lr"], table["table_lr"], strict=True)) == [
        (0.02, 0.1),
        (0.01, 0.2),
        (0.01, 0.1),
        (0.02, 0.2),
    ]


def test_says_so_when_nothing_is_complete() -> None:
    runs = [run("dense", "d16", "0.01", 5.0), run("dense", "d32", "0.02", 5.0)]
    with pytest.raises(UserError, match="no setting was trained at every size"):
        settings_table(pd.DataFrame(runs))


def test_what_varies_besides_rates_is_another_curve() -> None:
    runs = [run("peer", "d16", "0.01", 3.0 + n, rate) for n, rate in enumerate((1e-05, 0.2, 0.3))]
    runs += [
        {
            **r,
            "axes": r["axes"].replace('"optim.lr": 0.01', f'"n_experts": {n}, "name": "adamw"'),
            "val_loss": r["val_loss"] + n,
        }
        for r in runs
        for n in (4, 9)
    ]
    table = settings_table(pd.DataFrame(runs[3:]))
    assert dict(table.groupby("name")["mean"].apply(list)) == {
        f"peer n_experts={n}-name=adamw": [3.0 + n, 4.0 + n, 5.0 + n] for n in (4, 9)
    }
    assert set(table["lr"]) == {1.0}, "where the study sets no rate it is the cells'"
    (axes,) = rates_figure(pd.DataFrame(runs[3:]).assign(budget=5e11)).axes
    assert axes.get_title() == "d_model 16" and len(axes.lines) == 4, "two curves and their stars"


def test_a_rate_that_a_study_leaves_alone_keeps_its_sizes_together() -> None:
    runs = [
        {**run("peer", size, "0.01", 3.0, rate), "lr": lr, "axes": axes_text(f"table_lr={rate}"), "budget": 5e11}
        for size, lr in (("d16", 0.014), ("d32", 0.01))
        for rate in (0.1, 0.2)
    ]
    assert list(settings_table(pd.DataFrame(runs))["lr"]) == [0.014, 0.014]
    assert [axes.get_title() for axes in rates_figure(pd.DataFrame(runs)).axes] == ["mean over sizes"]
