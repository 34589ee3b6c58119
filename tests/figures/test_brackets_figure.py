"""The figure and the table of rate brackets, of brackets that are written here by hand."""

import math
from typing import Any

import numpy as np
import pytest

from peerscale.figures.brackets import brackets_figure, brackets_section
from toy_study import fits_with_curves

K = 0.06


def bracket(method: str, best: float, *, budget: float = 1e13, size: str = "d64", **changes: Any) -> dict[str, Any]:
    losses = {f: 4.3 + K * math.log(float(f) / best) ** 2 for f in ("0.5", "1", "2")}
    gain = K * math.log(best) ** 2
    return {"budget": budget, "size": size, "method": method, "seeds": 1, "losses": losses, "best": best,
            "lowest": 4.3, "gain": gain, "se": 0.0012, **changes}  # fmt: skip


def fits(*each: dict[str, Any]) -> dict[str, Any]:
    brackets = {"curvature": K, "curvature_se": 0.004, "scatter": 0.002, "df": 2, "each": [*each]}
    return fits_with_curves({"rates": {"law": None, "brackets": brackets, "cost": 0.004, "errors": []}})


FOUND = fits(bracket("dense", 0.8), bracket("peer", 0.3), bracket("peer", 1.3, budget=3e13, size="d80"))


def test_a_panel_a_budget_and_size_with_points_parabolas_and_minima() -> None:
    figure = brackets_figure(FOUND)
    assert figure is not None
    first, second = figure.axes
    assert first.get_title().endswith("d_model 64") and second.get_title().endswith("d_model 80")
    lines = {str(line.get_label()): line for line in first.lines}
    points = {str(container.get_label()): container.lines[0] for container in first.containers}
    np.testing.assert_allclose(points["dense"].get_xdata(), [0.5, 1, 2])
    for name, best in (("dense", 0.8), ("peer", 0.3)):
        x, y = (np.asarray(data, float) for data in lines[f"_parabola {name}"].get_data())
        np.testing.assert_allclose(y, 4.3 + K * np.log(x / best) ** 2)
        assert points[name].get_color() == lines[f"_parabola {name}"].get_color()
    np.testing.assert_allclose(lines["_best dense"].get_xydata(), [(0.8, 4.3)])
    assert "_best peer" not in lines  # it lies beyond the rates tried
    assert first.get_xlabel() == "factor of the learning rate"
    figure.draw_without_rendering()


def test_the_table_has_losses_best_factor_and_gain() -> None:
    lines = brackets_section(FOUND)
    head, _, *rows = [line for line in lines if line.startswith("|")]
    assert head == (
        "| budget | size | method | seeds | loss at 0.5 | loss at 1 | loss at 2 | best factor | gain ± s.e. |"
    )
    assert rows[0] == "| 1e13 | d_model 64 | dense | 1 | 4.3133 | 4.3030 | 4.3504 | 0.80 | 0.0030 ± 0.0012 |"
    assert "| 0.30 (beyond those tried) | 0.0870 ± 0.0012 |" in rows[1] and "| 3e13 | d_model 80 | PEER |" in rows[2]
    text = "\n".join(lines)
    assert "0.060 ± 0.004 nats per (ln rate)²" in text and "scatter by 0.0020 nats" in text


def test_without_a_parabola_there_are_points_alone() -> None:
    undetermined = bracket("peer", 1.0, se=None) | dict.fromkeys(("best", "lowest", "gain"))
    assert "| — | — ± — |" in "\n".join(brackets_section(fits(undetermined)))
    figure = brackets_figure(fits(undetermined))
    assert figure is not None
    assert [str(line.get_label()) for line in figure.axes[0].lines if len(line.get_xdata())] == ["_nolegend_"]


@pytest.mark.parametrize("old", [{}, {"rates": {"law": None}}])
def test_without_brackets_there_is_nothing(old: dict[str, Any]) -> None:
    assert brackets_figure(old) is None and brackets_section(old) == []
