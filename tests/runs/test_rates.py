"""Best learning rates of made-up studies, whose losses are quadratic in the logarithm of the rate."""

import json
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_up_study import run
from scipy import stats

from peerscale.errors import UserError
from peerscale.laws.fitting import to_plain
from peerscale.runs.rates import fit_rates, settings_table

GRID = 0.01 * 2.0 ** np.arange(-2, 3)
BEST = {("dense", "d32"): 0.013, ("peer", "d32"): 0.009, ("dense", "d64"): 0.011, ("peer", "d64"): 0.008}
LOWEST = {("dense", "d32"): 4.6, ("peer", "d32"): 4.55, ("dense", "d64"): 4.5, ("peer", "d64"): 4.47}
CURVATURE = 0.06
"""Nats per squared factor of e."""


def study(
    best: dict[tuple[str, str], float] = BEST, *, grid: np.ndarray = GRID, noise: float = 0.0, seeds: int = 1,
    budget: float = 1e12,
) -> pd.DataFrame:  # fmt: skip
    rng = np.random.default_rng(0)
    rows = [
        run(method, budget, LOWEST[method, size] + CURVATURE * math.log(lr / at) ** 2 + noise * rng.normal(),
            size=size, seed=seed, settings=f"lr={lr:g}", lr=lr * (32 / int(size[1:])) ** 0.5, table_lr=math.nan)
        for (method, size), at in best.items() for lr in grid for seed in range(seeds)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def by_model(found: dict[str, list[dict[str, Any]]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(one["method"], one["size"]): one for one in found["best"]}


def test_the_best_rates_of_exact_quadratics() -> None:
    found = fit_rates(study())
    models = by_model(found)
    assert models.keys() == BEST.keys()
    for key, one in models.items():
        assert one["rate"] == pytest.approx(BEST[key]) and one["loss"] == pytest.approx(LOWEST[key])
        assert one["status"] == "ok" and one["budget"] == 1e12
        assert one["best_tried"]["rate"] == pytest.approx(0.01)  # of the grid, as the study sets it
        assert one["best_tried"]["loss"] == pytest.approx(LOWEST[key] + CURVATURE * math.log(0.01 / BEST[key]) ** 2)
    values = {d["size"]: d["value"] for d in found["differences"]}
    assert values == pytest.approx({"d32": -0.05, "d64": -0.03})
    assert {(d["method"], d["reference"]) for d in found["differences"]} == {("peer", "dense")}


def test_methods_are_compared_each_at_its_best_rate_with_the_scatter_about_the_parabolas() -> None:
    """Three rates near the best of each of four models: 12 losses less 4 (intercept and slope), less one curvature."""
    runs = study(noise=0.003)
    found = fit_rates(runs)
    runs["z"] = np.log(runs["cell"].str.extract(r"lr=([\d.]+)", expand=False).astype(float))
    near = runs[np.abs(runs["z"] - math.log(0.01)) < 0.7].reset_index()
    models = list(BEST)
    one = np.array(
        [[key == (m, s) for key in models] for m, s in zip(near["method"], near["size"], strict=True)], float
    )
    z = near["z"].to_numpy() - math.log(0.01)
    design = np.column_stack([one, one * z[:, None], z**2])
    theta, rss, *_ = np.linalg.lstsq(design, near["val_loss"].to_numpy(), rcond=None)
    covariance = np.linalg.inv(design.T @ design) * rss[0] / 3
    a, b, c = theta[:4], theta[4:8], theta[8]
    dense, peer = (models.index((name, "d64")) for name in ("dense", "peer"))
    gradient = np.zeros(9)
    gradient[[peer, dense]], gradient[[4 + peer, 4 + dense]] = (1, -1), (-b[peer] / (2 * c), b[dense] / (2 * c))
    gradient[8] = (b[peer] ** 2 - b[dense] ** 2) / (4 * c**2)
    difference = next(d for d in found["differences"] if d["size"] == "d64")
    lowest = a - b**2 / (4 * c)
    assert difference["value"] == pytest.approx(lowest[peer] - lowest[dense])
    se = math.sqrt(gradient @ covariance @ gradient)
    assert difference["se"] == pytest.approx(se) and difference["df"] == 3
    half = stats.t.ppf(0.975, 3) * se
    assert (difference["low"], difference["high"]) == pytest.approx(
        (difference["value"] - half, difference["value"] + half)
    )
    assert difference["leaves_out"] == "seeds"
    assert by_model(found)["peer", "d64"]["rate"] == pytest.approx(0.01 * math.exp(-b[peer] / (2 * c)))


def test_seeds_of_a_rate_are_in_the_error() -> None:
    found = fit_rates(study(noise=0.003, seeds=2))
    assert {d["leaves_out"] for d in found["differences"]} == {""}
    for key, one in by_model(found).items():
        assert one["rate"] == pytest.approx(BEST[key], rel=0.1)
        low, high = one["rate_interval"]
        assert low < BEST[key] < high and one["se"] > 0


def test_the_best_rate_tried_is_that_of_the_mean_over_seeds() -> None:
    runs = study(seeds=3)
    lucky = (runs["seed"] == 1) & runs["cell"].str.startswith("dense-d32") & runs["cell"].str.contains("lr=0.04-")
    assert lucky.sum() == 1
    runs.loc[lucky, "val_loss"] = 4.59  # the others of this rate are at 4.676
    one = by_model(fit_rates(runs))["dense", "d32"]
    assert one["best_tried"]["rate"] == pytest.approx(0.01)
    assert one["rate"] == pytest.approx(BEST["dense", "d32"])


@pytest.mark.parametrize(("at", "status"), [(0.002, "too_few"), (0.05, "too_few"), (0.02, "ok")])
def test_a_best_rate_at_the_edge_of_the_grid_has_a_status_and_no_number(at: float, status: str) -> None:
    found = fit_rates(study(BEST | {("peer", "d32"): at}))
    one = by_model(found)["peer", "d32"]
    assert one["status"] == status
    assert math.isnan(one["rate"]) == math.isnan(one["loss"]) == (status != "ok")
    assert one["best_tried"]["rate"] == pytest.approx(GRID[np.abs(np.log(GRID / at)).argmin()])
    assert [d["size"] for d in found["differences"]] == (["d32", "d64"] if status == "ok" else ["d64"])
    for key in (("dense", "d32"), ("dense", "d64"), ("peer", "d64")):  # the others are as without it
        assert by_model(found)[key]["rate"] == pytest.approx(BEST[key])


def test_a_minimum_beyond_a_fine_grid_is_outside_its_range() -> None:
    fine = 0.01 * 2 ** np.arange(0, 2.25, 0.25)
    one = by_model(fit_rates(study(BEST | {("peer", "d32"): 0.007}, grid=fine)))["peer", "d32"]
    assert one["status"] == "outside_range" and math.isnan(one["rate"])


def test_each_rate_stands_with_its_best_rate_of_the_tables() -> None:
    runs = study()
    tables = [
        runs.assign(
            cell=runs["cell"].str.replace("-s0", f"-table_lr={t:g}-s0"), table_lr=t, val_loss=runs["val_loss"] + worse
        )
        for t, worse in ((0.02, 0.03), (0.06, 0.0))
    ]
    both = pd.concat([t.assign(table_lr=t["table_lr"].where(t["method"] == "peer")) for t in tables], ignore_index=True)
    expected = by_model(fit_rates(runs))
    for key, one in by_model(fit_rates(both)).items():
        assert one["rate"] == pytest.approx(expected[key]["rate"]) and one["loss"] == pytest.approx(LOWEST[key])


def test_budgets_are_fitted_by_themselves_and_one_rate_has_no_best() -> None:
    runs = pd.concat([study(), study({k: at / 2 for k, at in BEST.items()}, budget=4e12)], ignore_index=True)
    rates = {(b["budget"], b["method"], b["size"]): b["rate"] for b in fit_rates(runs)["best"]}
    assert rates == pytest.approx(
        {(c, *k): at / (1 if c == 1e12 else 2) for c in (1e12, 4e12) for k, at in BEST.items()}
    )
    for grid in (GRID[2:3], GRID[1:3]):
        assert fit_rates(study(grid=grid)) == {"best": [], "differences": []}


def test_failed_cells_count_for_nothing_and_the_result_is_plain_json() -> None:
    runs = study(noise=0.003)
    failed = runs.iloc[:6].assign(status="diverged", val_loss=1.0, seed=7)
    found = to_plain(fit_rates(pd.concat([runs, failed], ignore_index=True)))
    assert found == to_plain(fit_rates(runs)) == json.loads(json.dumps(found, allow_nan=False))


def test_settings_are_sorted_by_their_mean_over_sizes() -> None:
    table = settings_table(study())
    assert list(table["name"].unique()) == ["dense", "peer"] and list(table.columns[-3:]) == ["d32", "d64", "mean"]
    for _, rows in table.groupby("name"):
        assert rows["mean"].is_monotonic_increasing and rows["mean"].to_numpy() == pytest.approx(
            rows[["d32", "d64"]].mean(axis=1).to_numpy()
        )
    runs = study()
    with pytest.raises(UserError, match="no setting was trained at every size"):
        settings_table(runs[(runs["size"] == "d32") == (runs["cell"].str.contains("lr=0.01-"))])
