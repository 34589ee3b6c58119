"""Forecasts of a larger budget: against known truths, and that one is made once, before what it forecasts is there."""

import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest

from made_up_study import LADDER, curves, ladder, record, with_sequences
from peerscale.errors import UserError
from peerscale.figures.forecasts import forecast_sections, forecast_table
from peerscale.files import write_json
from peerscale.records.publication import publish
from peerscale.records.study import Study, collected, published, read_fits
from peerscale.stats import frontiers
from peerscale.stats.comparison import compare
from peerscale.stats.forecasts import (
    Observation,
    finished_cells,
    fitted_cells,
    forecast,
    inside,
    make_forecast,
    observed,
    read_forecasts,
)

AT = 1e14


def by_quantity(found: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(one["method"], one["quantity"]): one for one in found}


def frontier(irreducible: float) -> Callable[[float], float]:
    """Losses at the optimum that fall by 0.4 nats from 1e12 to 1e13 FLOPs, whatever part of them is irreducible."""
    exponent = np.log10(1 - 0.41 / (4.77 - irreducible))
    return lambda compute: irreducible + (4.77 - irreducible) * (compute / 1e12) ** exponent


@pytest.mark.parametrize("irreducible", [0.0, 2.0])
def test_intervals_hold_the_truth(irreducible: float) -> None:
    """Over whole studies of three budgets, from runs to forecast; with an irreducible loss no true trend is a line.

    Methods need compute / gain for dense's loss, so that the true multiplier is the gain.
    """
    loss, gains = frontier(irreducible), {"dense": 1.0, "pkm": 0.9, "peer": 1.3}
    exact = {(name, c): loss(g * c) for name, g in gains.items() for c in LADDER[:3]}
    truth = {name: {"loss": loss(g * AT), "difference": loss(g * AT) - loss(AT), "multiplier": g}
             for name, g in gains.items()}  # fmt: skip
    hits, widths = defaultdict(list), defaultdict(list)
    with patch.object(frontiers, "DRAWS", 100):
        for seed in range(30):
            for one in forecast(compare(curves(exact, noise=0.01, rng=seed), []), AT):
                hits[one["quantity"]].append(one["low"] <= truth[one["method"]][one["quantity"]] <= one["high"])
                widths[one["quantity"]].append((one["high"] - one["low"]) / 2)
    assert {quantity: len(each) for quantity, each in hits.items()} == {"loss": 90, "difference": 60, "multiplier": 60}
    assert all(np.mean(each) > 0.87 for each in hits.values())
    # And they say something: a decade lowers the loss by 0.4, and a multiplier is about 1.
    assert (
        np.mean(widths["loss"]) < 0.08 and np.mean(widths["difference"]) < 0.05 and np.mean(widths["multiplier"]) < 0.4
    )


def test_exact_curves_are_carried_on() -> None:
    """40 C^-0.07 is a line without an irreducible loss; with one the loss falls less, so the value lies above."""
    found = by_quantity(forecast(compare(ladder(1.5, LADDER, noise=1e-5), []), AT))
    dense, peer = (40 * (g * AT) ** -0.07 for g in (1, 1.5))
    assert found["dense", "loss"]["low"] == pytest.approx(dense, rel=1e-3) and found["dense", "loss"]["value"] > dense
    assert found["peer", "multiplier"]["value"] == pytest.approx(1.5, rel=1e-3)
    assert found["peer", "difference"]["value"] == pytest.approx(peer - dense, abs=0.01)
    assert ("dense", "difference") not in found and ("dense", "multiplier") not in found
    assert [point["budget"] for point in found["peer", "loss"]["points"]] == LADDER


def test_budgets_from_the_forecast_one_on_change_nothing() -> None:
    runs = ladder(1.3, [*LADDER, AT, 3e14], noise=0.01)
    smaller = runs[runs["budget"] < AT]
    assert forecast(compare(runs, []), AT) == forecast(compare(smaller, []), AT) != []


def test_budgets_below_the_start_of_the_trend_change_nothing() -> None:
    runs = ladder(1.3, [3e11, *LADDER], noise=0.01)
    without = compare(runs[runs["budget"] > 3e11], [])
    found = {
        one["method"]: one for one in forecast(compare(runs, [], trend_from=1e12), AT) if one["quantity"] == "loss"
    }
    for one in forecast(without, AT):
        if one["quantity"] == "loss":
            assert found[one["method"]] == one
    assert [point["budget"] for point in found["peer"]["points"]] == LADDER


def test_two_budgets_are_too_few() -> None:
    assert forecast(compare(ladder(1.3, LADDER[:2], noise=0.01), []), AT) == []


def test_a_method_without_an_optimum_at_three_budgets_has_no_forecast() -> None:
    runs = ladder(1.3, LADDER[:3], noise=0.01)
    runs = runs[(runs["method"] == "dense") | (runs["budget"] > 1e12)]
    assert {one["method"] for one in forecast(compare(runs, []), AT)} == {"dense"}


def test_validation_sequences_are_no_error_of_a_forecast() -> None:
    """They shift every loss by one amount: the forecast and what it forecasts alike."""
    runs = ladder(1.3, LADDER[:3], noise=0.01)
    shifted, records, _ = with_sequences(runs, own=1e-6)
    before, after = (by_quantity(forecast(compare(*study), AT)) for study in ((runs, []), (shifted, records)))
    for key, one in after.items():
        errors, others = ([point["se"] for point in found["points"]] for found in (one, before[key]))
        assert errors == pytest.approx(others, rel=0.02 if key[1] == "loss" else 0.1)


@pytest.mark.parametrize(
    ("value", "error", "answer"),
    [(1.05, 0.01, "yes"), (1.12, 0.01, "no"), (1.12, 0.08, "no, but within both errors"), (0.7, 0.1, "no"),
     (1.12, None, "no")],
)  # fmt: skip
def test_inside(value: float, error: float | None, answer: str) -> None:
    ends = (None, None) if error is None else (value - error, value + error)
    assert inside({"value": 1.0, "low": 0.9, "high": 1.1}, Observation(value, *ends)) == answer


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Three budgets, collected."""
    found = collected("made_up", tmp_path / "runs")
    found.folder.mkdir(parents=True)
    fill(found, LADDER[:3])
    return found


def fill(study: Study, budgets: list[float]) -> None:
    runs = ladder(1.3, budgets, noise=0.01)
    runs.assign(convention="made up").to_csv(study.runs, index=False)
    write_json(study.fits, {**compare(runs, []), "answer": "", "rates": {}})


def made(tmp_path: Path, budget: float = AT) -> tuple[dict[str, Any], Path]:
    return make_forecast("made_up", budget, tmp_path / "runs", tmp_path / "results")


def test_what_is_written(study: Study, tmp_path: Path) -> None:
    found, path = made(tmp_path)
    assert path == tmp_path / "results/made_up/forecast-1e14.json" and json.loads(path.read_text()) == found
    assert found["from"] == [{"budget": c, "cells": 10} for c in LADDER[:3]]
    assert found["commit"] and found["made"].endswith("+00:00") and found["budget"] == AT
    assert found["leaves_out"][0] == "the choice of learning rates"
    assert found["forecasts"] == forecast(read_fits(study.fits), AT)
    text = "\n".join(forecast_table(found))
    assert "| dense |" in text and "from 30 cells (10 of 1e12, 10 of 3e12, 10 of 1e13 FLOPs)" in text


def test_cells_that_all_share_a_setting_are_counted_beside_brackets() -> None:
    shared = {"optim.weight_decay": 0.2}
    usual = ladder(1.3, LADDER[:3], noise=0.01).assign(axes=json.dumps(shared), lr=0.01)
    bracketed = usual[usual["budget"] == LADDER[0]]
    doubled = {"cell": bracketed["cell"] + "-lr_factor=2.0", "axes": json.dumps({**shared, "optim.lr_factor": 2.0})}
    runs = pd.concat([usual, bracketed.assign(**doubled, lr=0.02)], ignore_index=True)
    fits = compare(runs, [])
    assert {method["name"] for entry in fits["budgets"] for method in entry["methods"]} == {"dense", "peer"}
    assert fitted_cells(runs, fits) == dict.fromkeys(LADDER[:3], 10)


def test_a_forecast_says_that_the_batch_changes(study: Study, tmp_path: Path) -> None:
    runs = pd.read_csv(study.runs)
    runs.assign(batch_sequences=runs["budget"].map({1e12: 16, 3e12: 32, 1e13: 32})).to_csv(study.runs, index=False)
    changes = "the change of the batch (16 sequences at 1e12, 32 sequences at 3e12 and 1e13)"
    assert changes in made(tmp_path)[0]["leaves_out"]


def test_a_forecast_is_made_once(study: Study, tmp_path: Path) -> None:
    _, path = made(tmp_path)
    before = path.read_bytes()
    fill(study, LADDER)
    with pytest.raises(UserError, match=r"forecast-1e14\.json is there already"):
        made(tmp_path)
    assert path.read_bytes() == before
    assert made(tmp_path, 3e14)[1].name == "forecast-3e14.json"


def test_too_late(study: Study, tmp_path: Path) -> None:
    """Whether the finished cells are collected, published, or only run so far."""
    cells = finished_cells("made_up", 1e13, tmp_path / "runs", tmp_path / "results")
    assert len(cells) == 10 and cells == finished_cells("made_up", 9e12, tmp_path / "runs", tmp_path / "results")
    with pytest.raises(UserError, match=r"10 cells of made_up at 1e13 FLOPs or more have finished, such as dense-"):
        made(tmp_path, 1e13)
    target = published("made_up", tmp_path / "results")
    target.folder.mkdir(parents=True)
    fill(target, [AT])
    with pytest.raises(UserError, match=r"10 cells of made_up at 1e14"):
        made(tmp_path)
    shutil.rmtree(target.folder)
    run_since = [replace(record("peer-d64-1e14-s0", np.ones(2)), budget=AT)]
    with (
        patch("peerscale.stats.forecasts.read_records", return_value=run_since),
        pytest.raises(UserError, match="peer-d64"),
    ):
        made(tmp_path)
    assert list((tmp_path / "results").rglob("forecast*")) == []


def test_publishing_keeps_it_and_the_table_shows_it_once_there_is_something_to_compare(
    study: Study, tmp_path: Path
) -> None:
    found, path = made(tmp_path)
    target = published("made_up", tmp_path / "results")
    assert forecast_sections(read_forecasts(target), read_fits(study.fits)) == []
    fill(study, [*LADDER[:3], AT])
    study.table.write_text("# made_up")
    study.figures.mkdir()
    publish(study, target)
    assert json.loads(path.read_text()) == found and target.runs.is_file()
    fits = read_fits(target.fits)
    lines = forecast_sections(read_forecasts(target), fits)
    assert lines[0] == "## Forecast" and len([line for line in lines if line.startswith("| 1e14")]) == 4
    (entry,) = (entry for entry in fits["budgets"] if entry["budget"] == AT)
    seen = {(one["method"], one["quantity"]): there for one, there in observed(found, fits)}
    assert seen["dense", "loss"].value == entry["methods"][0]["loss"]
    assert {one["reference"]: one["value"] for one in entry["differences"]}["dense"] == seen["peer", "difference"].value
    assert seen["peer", "multiplier"].value == next(m["multiplier"] for m in fits["multipliers"] if m["budget"] == AT)


def test_a_file_that_is_no_forecast(tmp_path: Path) -> None:
    (tmp_path / "forecast-1e14.json").write_text("{}")
    with pytest.raises(UserError, match=r"forecast-1e14.json: not a forecast as make forecast writes it"):
        read_forecasts(Study(sweep="any", folder=tmp_path))
