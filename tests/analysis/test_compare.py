"""The line for each rival and budget says what the study's fits say."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from synthetic_study import METHODS, SWEEP

from peerscale.errors import exit_code
from peerscale.records.study import collected
from programs import program as script

compare = script("compare")


def lines_of(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[tuple[str, str], list[str]]:
    """The cells of each line by budget and comparison."""
    assert compare.main([SWEEP, "--runs", str(folder), *words]) == 0
    said, _, _, _, *rows = capsys.readouterr().out.splitlines()
    assert said == "p and intervals are not corrected for the number of comparisons"
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {(one[0], one[1]): one[2:] for one in cells}


def numbers(cell: str) -> list[float]:
    return [float(word) for word in cell.replace("−", "-").replace("[", "").replace("]", "").replace(",", "").split()]


def test_a_line_for_each_rival_and_budget(collected_runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fits: dict[str, Any] = json.loads(collected(SWEEP, collected_runs).fits.read_text())
    found = lines_of(collected_runs, capsys, "--methods", "peer", "--rivals", "dense, pkm")
    assert [*found] == [(b, f"PEER minus {rival}") for rival in ("dense", "PKM") for b in ("1e11", "3e11")]
    for entry, budget in zip(fits["budgets"], ("1e11", "3e11"), strict=True):
        (one,) = (d for d in entry["differences"] if d["method"] == "peer")
        (worth,) = (m for m in fits["multipliers"] if (m["method"], m["budget"]) == ("peer", entry["budget"]))
        difference, p, multiplier, smallest, caveats = found[budget, "PEER minus dense"]
        assert numbers(difference) == pytest.approx([one[key] for key in ("value", "low", "high")], abs=6e-4)
        assert p == "< 0.0001" if one["p"] < 1e-4 else float(p) == pytest.approx(one["p"], abs=6e-5)
        assert numbers(multiplier) == pytest.approx([worth[key] for key in ("multiplier", "low", "high")], abs=6e-3)
        assert float(smallest) == pytest.approx(2.8 * one["se"], abs=6e-4)
        assert caveats == "one seed; error of learning rates unknown"
        loss = {m["name"]: m["loss"] for m in entry["methods"]}
        difference, _, multiplier, *_ = found[budget, "PEER minus PKM"]
        assert numbers(difference)[0] == pytest.approx(loss["peer"] - loss["pkm"], abs=6e-4)
        assert math.copysign(1, numbers(difference)[0]) == math.copysign(1, 1 - numbers(multiplier)[0])


def test_without_names_every_method_and_without_rivals_all_others(
    collected_runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = lines_of(collected_runs, capsys)
    assert len(whole) == 2 * (len(METHODS) - 1) and all(pair.endswith(" minus dense") for _, pair in whole)
    assert len(lines_of(collected_runs, capsys, "--methods", "dense")) == 2 * (len(METHODS) - 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rivals", "dense,gated"], "gated: no method with finished runs in synthetic"),
        (["--methods", "peer", "--rivals", "peer"], "synthetic has nothing to compare peer with"),
        (["--methods", "peerr"], "peerr: no method with finished runs in synthetic, which has dense, moe, "),
    ],
)
def test_a_wrong_name_is_one_line(
    words: list[str], said: str, collected_runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert exit_code(lambda: compare.main([SWEEP, "--runs", str(collected_runs), *words])) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}") and error.count("\n") == 1
