"""Figures 3a, 3b and 4 draw the table's numbers and the paper's; each study feeds its own."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from synthetic_ablations import ablation_runs, with_norm_of_one_seed

from peerscale.figures.ablations import (
    active_figure,
    experts_figure,
    query_norm_figure,
    varied,
)
from peerscale.figures.published import read_published
from peerscale.stats.curve import finished
from peerscale.stats.seeds import over_seeds, pooled_scatter
from toy_study import curve_of

T_975_8 = 2.306004135204166
"""Student's t, 16 degrees of freedom, two-sided 5 %: any statistical table."""


def points(axes: Axes) -> dict[str, dict[float, float]]:
    """Drawn x, of the tick that it stands at or beside, and y of each line with error bars, by label."""
    bars: Iterator = (c for c in axes.containers if isinstance(c, ErrorbarContainer))
    return {str(c.get_label()): dict(zip(ticks(axes, c.lines[0].get_xdata()), c.lines[0].get_ydata(), strict=True))
            for c in bars}  # fmt: skip


def ticks(axes: Axes, x: np.ndarray) -> np.ndarray:
    """For drawn abscissas the ticks within a tenth, beside which lines stand side by side; else themselves."""
    places = np.asarray([tick for tick in axes.get_xticks() if tick > 0], float)
    nearest = places[np.abs(np.log(np.asarray(x, float)[:, None] / places)).argmin(axis=1)]
    return np.where(np.isclose(x, nearest, rtol=0.1), nearest, x)


def test_each_study_varies_what_its_figure_shows() -> None:
    assert varied(finished(with_norm_of_one_seed())["curve"]) == {"ffn.n_experts"}
    assert varied(finished(ablation_runs("active"))["curve"]) == {"ffn.n_heads", "ffn.top_k"}
    assert varied(finished(ablation_runs("experts"))["curve"]) == {"ffn.n_experts", "ffn.query_norm"}


def test_a_setting_that_all_curves_of_a_method_have_is_not_varied() -> None:
    assert varied(map(curve_of, ["dense", "peer n_heads=1-top_k=8", "peer n_heads=2-top_k=8"])) == {"n_heads"}
    assert varied(map(curve_of, ["dense", "dense n_heads=1", "peer"])) == {"n_heads"}
    assert varied(map(curve_of, ["dense", "peer n_heads=1"])) == set()


def test_experts_are_the_tables_and_the_papers() -> None:
    runs = with_norm_of_one_seed()
    ours, paper = experts_figure(finished(runs), read_published(), "dense").axes
    drawn = points(ours)
    rows = runs[runs["method"] == "peer"]
    assert drawn["PEER"] == pytest.approx(dict(zip(rows["n_experts"], np.exp(rows["val_loss"]), strict=True)))
    dense = math.exp(float(runs.loc[runs["method"] == "dense", "val_loss"].iloc[0]))
    assert [line.get_ydata()[0] for line in ours.lines if line.get_label() == "_baseline"] == [pytest.approx(dense)]
    # Table 2, with BatchNorm, and table 1's dense model.
    (drawn,) = (c.lines[0] for c in paper.containers if c.get_label() == "PEER")
    np.testing.assert_array_equal(drawn.get_xydata(), [(2**14, 23.47), (2**16, 22.55), (2**18, 21.47), (2**20, 20.64)])
    assert [line.get_ydata()[0] for line in paper.lines if line.get_label() == "_baseline"] == [23.84]


def test_active_experts_are_lines_over_heads() -> None:
    runs = ablation_runs("active")
    peer = runs[runs["method"] == "peer"]
    figure = active_figure(finished(runs), "dense")
    drawn = points(figure.axes[0])
    assert set(drawn) == {f"{n} active" for n in (8, 16, 32, 64, 128, 256)}
    for label, line in drawn.items():
        rows = (
            peer[peer["ffn_heads"] * peer["top_k"] == int(label.removesuffix(" active"))]
            .groupby("ffn_heads", as_index=False)["val_loss"]
            .mean()
        )
        assert line == pytest.approx(dict(zip(rows["ffn_heads"], np.exp(rows["val_loss"]), strict=True)))


def test_query_norm_shows_means_and_intervals() -> None:
    runs = ablation_runs("experts")
    runs = runs[runs["method"] == "peer"]
    figure = query_norm_figure(finished(runs), read_published(), "dense")
    ours, paper, unevenness = figure.axes
    by_point = runs.groupby(["query_norm", "n_experts"])["val_loss"]
    assert len(by_point) == 8 and (by_point.size() == 2).all()  # so 8 degrees of freedom
    pooled = math.sqrt(by_point.var(ddof=1).mean())
    for norm, label in ((True, "PEER with query BatchNorm"), (False, "without")):
        rows = runs[runs["query_norm"].astype(str) == str(norm)]
        (container,) = (c for c in ours.containers if c.get_label() == label)
        segments = container.lines[2][0].get_segments()
        for (n, group), segment in zip(rows.groupby("n_experts"), segments, strict=True):
            losses = group["val_loss"].to_numpy(float)
            assert points(ours)[label][n] == pytest.approx(math.exp(losses.mean()))
            half = T_975_8 * pooled / math.sqrt(2)
            np.testing.assert_allclose(segment[:, 1], np.exp([losses.mean() - half, losses.mean() + half]), rtol=1e-9)
        assert points(unevenness)[label] == pytest.approx(rows.groupby("n_experts")["unevenness"].mean().to_dict())
    assert [list(c.lines[0].get_ydata()) for c in paper.containers] == [
        [23.47, 22.55, 21.47, 20.64],
        [23.47, 22.61, 21.54, 20.73],
    ]
    dotted = [list(c.lines[0].get_ydata()) for c in unevenness.containers if c.get_label() == "_paper"]
    assert dotted == [[0.30, 0.44, 0.66, 1.06], [0.45, 0.63, 0.97, 1.52]]


def test_one_seed_has_the_standard_error() -> None:
    runs = with_norm_of_one_seed()
    rows = over_seeds(runs[runs["method"] == "peer"], ["n_experts"])
    errors = runs[runs["method"] == "peer"].set_index("n_experts")["val_loss_se"]
    assert list(rows["high"] - rows["mean"]) == pytest.approx(list(errors[rows["n_experts"]]))
    assert (
        over_seeds(runs, ["cell"], "layer_share")["high"] == over_seeds(runs, ["cell"], "layer_share")["mean"]
    ).all()


def test_the_scatter_of_seeds_is_pooled_over_groups() -> None:
    values = pd.Series([1.0, 3.0, 10.0, 10.0, 13.0, 5.0])
    sd, df = pooled_scatter(values, [list("aabbbc")])
    assert (sd, df) == (pytest.approx(math.sqrt((2 + 6) / 3)), 3)
    assert math.isnan(pooled_scatter(values[:2], [list("ab")])[0])


FIGURES = {
    "experts": (lambda done: experts_figure(done, read_published(), "dense"), "experts"),
    "active": (lambda done: active_figure(done, "dense"), "active"),
    "query_norm": (
        lambda done: query_norm_figure(done[done["method"] == "peer"], read_published(), "dense"),
        "experts",
    ),
}


@pytest.mark.parametrize(("draw", "sweep"), FIGURES.values(), ids=FIGURES)
def test_no_two_labels_of_an_axis_overlap(draw: Callable[..., Figure], sweep: str) -> None:
    runs = ablation_runs(sweep)
    runs.loc[runs.index[-1], ["status", "val_loss"]] = ["diverged", np.nan]
    figure = draw(finished(runs))
    figure.draw_without_rendering()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            boxes = [label.get_window_extent() for label in axis.get_ticklabels() if label.get_text()]
            assert boxes
            assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
