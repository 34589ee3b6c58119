"""The figure, the table and the sentences about rate brackets, of brackets that are written here by hand."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from peerscale.figures.brackets import bars, brackets_figure, brackets_section, how_rates_count, what_intervals_hold
from toy_study import axes_text

K = 0.06


def bracket(method: str, best: float, *, budget: float = 1e13, size: str = "d64", **changes: Any) -> dict[str, Any]:
    losses = {f: 4.3 + K * math.log(float(f) / best) ** 2 for f in ("0.5", "1", "2")}
    gain = K * math.log(best) ** 2
    return {"budget": budget, "size": size, "method": method, "seeds": 1, "losses": losses, "best": best,
            "lowest": 4.3, "gain": gain, "se": 0.0012, **changes}  # fmt: skip


def fits(*each: dict[str, Any], errors: tuple[tuple[str, float | None, str], ...] = ()) -> dict[str, Any]:
    brackets = {"curvature": K, "curvature_se": 0.004, "scatter": 0.002, "df": 2, "each": [*each]} if each else None
    rows = [{"budget": 1e13, "method": m, "se": se, "df": None, "source": source} for m, se, source in errors]
    return {"rates": {"law": None, "brackets": brackets, "cost": 0.004, "errors": rows}}


RUNS = pd.DataFrame({
    "method": "peer", "variant": "", "status": ["done", "done", "failed"], "val_loss": [4.3, 4.31, math.nan],
    "axes": ["", axes_text("lr_factor=0.5"), axes_text("lr_factor=2")],
})  # fmt: skip
FOUND = fits(bracket("dense", 0.8), bracket("peer", 0.3), bracket("peer", 1.3, budget=3e13, size="d80"))


def test_a_panel_a_budget_and_size_with_points_parabolas_and_minima() -> None:
    figure = brackets_figure(FOUND, note="FLOPs: some convention")
    assert figure is not None
    first, second = figure.axes
    assert first.get_title().endswith("d_model 64") and second.get_title().endswith("d_model 80")
    lines = {str(line.get_label()): line for line in first.lines}
    np.testing.assert_allclose(lines["dense"].get_xdata(), [0.5, 1, 2])
    for name, best in (("dense", 0.8), ("peer", 0.3)):
        x, y = (np.asarray(data, float) for data in lines[f"_parabola {name}"].get_data())
        np.testing.assert_allclose(y, 4.3 + K * np.log(x / best) ** 2)
        assert lines[name].get_color() == lines[f"_parabola {name}"].get_color()
    np.testing.assert_allclose(lines["_best dense"].get_xydata(), [(0.8, 4.3)])
    assert "_best peer" not in lines  # it lies beyond the rates tried
    assert "some convention" in figure.get_supxlabel() and first.get_xlabel() == "factor of the usual rate"
    figure.draw_without_rendering()


def test_the_table_has_losses_best_factor_and_gain() -> None:
    lines = brackets_section(RUNS, FOUND)
    head, _, *rows = [line for line in lines if line.startswith("|")]
    assert head == (
        "| budget | size | method | seeds | loss at 0.5 | loss at 1 | loss at 2 | best factor | gain ± s.e. |"
    )
    assert rows[0] == "| 1e13 | d_model 64 | dense | 1 | 4.3133 | 4.3030 | 4.3504 | 0.80 | 0.0030 ± 0.0012 |"
    assert "| 0.30 (beyond those tried) | 0.0870 ± 0.0012 |" in rows[1] and "| 3e13 | d_model 80 | PEER |" in rows[2]
    text = "\n".join(lines)
    assert "0.060 ± 0.004 nats per (ln rate)²" in text and "scatter by 0.0020 nats" in text
    assert "- Brackets: cells without a result: 1 failed." in text


def test_what_gives_no_error_is_told() -> None:
    undetermined = bracket("peer", 1.0, se=None) | dict.fromkeys(("best", "lowest", "gain"))
    text = "\n".join(brackets_section(RUNS, fits(undetermined)))
    assert "do not rise on both sides" in text and "—" not in text and "parabola" not in text
    figure = brackets_figure(fits(undetermined))
    assert figure is not None and [str(line.get_label()) for line in figure.axes[0].lines] == ["peer"]
    assert "lines" not in figure.get_supxlabel() and "do not rise" in figure.get_supxlabel()
    two = undetermined | {"losses": {"0.5": 4.31, "1": 4.3}}
    assert "two rates give no parabola, so they give no error." in "\n".join(brackets_section(RUNS, fits(two)))
    single = fits(bracket("peer", 0.8, se=None))
    single["rates"]["brackets"]["df"] = 0
    assert "So few losses leave no scatter" in "\n".join(brackets_section(RUNS, single))


@pytest.mark.parametrize("old", [{}, {"rates": {"law": None}}])
def test_without_brackets_everything_is_said_as_before(old: dict[str, Any]) -> None:
    assert brackets_figure(old) is None and brackets_section(RUNS, old) == []
    assert what_intervals_hold(old) == "They leave out the choice of learning rates."
    assert how_rates_count(old) == "Learning rates: only in a study that brackets them."
    assert bars(old).endswith("seeds and validation sequences, not from learning rates")


def test_sentences_say_what_is_held_and_where_it_comes_from() -> None:
    both = fits(errors=(("dense", 0.01, "brackets"), ("peer", 0.004, "cost"), ("pkm", None, "")))
    assert what_intervals_hold(both) == "They include the choice of learning rates wherever an error from it is known."
    told = how_rates_count(both)
    assert "gain² + s.e.²" in told and "not corrected for the gain" in told
    assert told.endswith("A method without a bracket at the budget has the 0.004 nats that the study's file states.")
    assert "sequences and learning rates" in bars(both)
    both["rates"]["cost"] = None
    assert how_rates_count(both).endswith("adds nothing.")
