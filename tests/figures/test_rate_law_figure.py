"""The figure and tables of the law of learning rates, of a made-up study whose law is known."""

import json
import math
from collections.abc import Collection
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from peerscale.config.schema import load
from peerscale.figures.rate_law import batches, finished_cells, rate_law_figure, rate_law_sections
from peerscale.laws.fitting import to_plain
from peerscale.plan.plan import plan
from peerscale.stats.curve import Curve, described_curves, finished, from_names
from peerscale.stats.rates import as_configuration, curves_of_law, fit_law, tries_rates
from toy_study import settings_text

BEST = {"dense": 0.005, "peer": 0.007}
"""At d_model 64, 1e7 tokens, 16 sequences."""
LOWEST = {8: 4.30, 16: 4.25, 32: 4.28}


def law_of(runs: pd.DataFrame, held_out: Collection[int] = ()) -> dict[str, Any]:
    """The law as `read_fits` gives it."""
    return from_names({"law": to_plain(fit_law(runs, held_out)), "curves": described_curves(curves_of_law(runs))})[
        "law"
    ]


def study() -> pd.DataFrame:
    """Two widths and budgets, a third width held out, two further batches at one corner, and rates of tables."""
    rows = []

    def row(
        method: str, budget: float, width: int, batch: int, seed: int, lr: float, table_lr: float, more: float
    ) -> None:
        best = BEST[method] * (width / 64) ** -0.5 * (budget / 1e13 * 64 / width) ** -0.3 * (batch / 16) ** 0.5
        rate = lr * (32 / width) ** 0.5
        settings = f"batch_sequences={batch}-lr={lr:g}" + f"-table_lr={table_lr:g}" * (table_lr > 0)
        rows.append({
            "cell": f"{method}-d{width}-{budget:g}-{settings}-s{seed}",
            "settings": settings_text(settings), "rate_factor": 1.0, "variant": "",
            "method": method, "size": f"d{width}", "d_model": width, "budget": budget, "seed": seed, "status": "done",
            "tokens": 1e7 * budget / 1e13 * 64 / width, "batch_sequences": batch, "lr": rate,
            "table_lr": table_lr or None, "val_set": "tuning",
            "steps": round(1e7 * budget / 1e13 * 64 / width / batch / 64),
            "val_loss": LOWEST[batch] + more + 0.06 * math.log(rate / best) ** 2,
        })  # fmt: skip

    for method in BEST:
        table = 0.02 if method == "peer" else 0.0
        for budget, width in ((3e12, 32), (3e12, 64), (1e13, 32), (1e13, 64), (1e13, 80)):
            for lr in 0.01 * 1.6 ** np.arange(-2, 3):
                row(method, budget, width, 16, 100, round(lr, 5), table, 0.0)
        for batch, seed in ((8, 100), (8, 101), (32, 100), (32, 101)):
            for lr in (0.006, 0.012):
                row(method, 1e13, 64, batch, seed, lr, table, 0.02 * (seed == 101))
    for table in (0.006, 0.06):
        row("peer", 1e13, 64, 16, 100, 0.01, table, table)
    return pd.DataFrame(rows)


def test_tables_tell_the_law_the_batches_and_the_rates_of_tables() -> None:
    runs = study()
    law = law_of(runs, [80])
    text = "\n".join(rate_law_sections(finished(runs), law))
    fit = text.partition("## Its fit\n\n")[2].splitlines()
    row = dict(zip(*(line.strip("| ").split(" | ") for line in (fit[0], fit[2])), strict=True))
    assert (row["nats per (ln rate)²"], row["curves held out"]) == ("0.060", "2")
    assert row["their rates off by a factor of"] == "1.00" and 0 <= float(row["p of equal exponents"].strip("< ")) <= 1
    assert "| a (width) | 0.50 [0.50, 0.50] | 0.50 [0.50, 0.50] | 0.50 [0.50, 0.50] |" in text
    assert "| c (batch) | 0.50 [0.50, 0.50] | 0.50 [0.50, 0.50] | 0.50 [0.50, 0.50] |" in text
    assert "| budget | width | method | batch 8 | batch 16 | batch 32 | 8 less 16 | 32 less 16 |" in text
    assert "| 1e13 | 64 | PEER | 4.3100 (2) | 4.2500 (1) | 4.2900 (2) | +0.0500 ± — | +0.0300 ± — |" in text
    assert "| budget | width | method | 0.006 | 0.02 | 0.06 |" in text and text.count("| 1e13 | 64 | PEER | 4.2") >= 1
    assert text.count("(held out)") == 2 and text.count("| 3e12 | 32 | dense | 16 | 100 | 5 |") == 1


def test_batches_differ_with_an_error_from_the_seeds_of_all_methods() -> None:
    lowest = {
        ("dense", 16): (4.30, 4.31), ("dense", 32): (4.27, 4.30), ("dense", 8): (4.35, 4.35),
        ("peer", 16): (4.20, 4.24), ("peer", 32): (4.21, 4.22),
    }  # fmt: skip
    curves = pd.DataFrame([
        {"budget": 1e13, "d_model": 64, "name": Curve(method), "batch_sequences": batch, "seed": seed, "lowest": loss}
        for (method, batch), losses in lowest.items()
        for seed, loss in zip((100, 101), losses, strict=True)
    ])  # fmt: skip
    dense, peer = batches(curves)
    # differences by seed: dense 32: -.03, -.01; dense 8: .05, .04; peer 32: .01, -.02; three degrees of freedom
    error = math.sqrt((2 * 0.01**2 + 2 * 0.005**2 + 2 * 0.015**2) / 3 / 2)
    assert dense["32 less 16"] == f"−0.0200 ± {error:.4f}" and dense["8 less 16"] == f"+0.0450 ± {error:.4f}"
    assert peer["32 less 16"] == f"−0.0050 ± {error:.4f}" and peer["8 less 16"] == peer["batch 8"] == "—"
    assert list(dense) == list(peer) and dense["batch 32"] == "4.2850 (2)"


def test_the_usual_batch_is_the_most_common_of_models_with_several() -> None:
    """One model was tried at batches 8 and 32 only, all others at 16 alone; two table rates of a batch count once."""
    rows = [("dense", 16, 4.3)] * 5 + [("peer", 8, 4.25), ("peer", 32, 4.2), ("peer", 8, 4.45)]
    curves = pd.DataFrame([
        {"budget": 1e13, "d_model": 64 + 16 * i * (name == "dense"), "name": Curve(name), "batch_sequences": batch,
         "seed": 100, "lowest": loss} for i, (name, batch, loss) in enumerate(rows)
    ])  # fmt: skip
    (peer,) = batches(curves)
    assert peer["32 less 8"].startswith("−0.0500 ± ") and peer["batch 8"] == "4.2500 (1)"


def test_the_law_as_configuration_gives_the_rates_of_the_law() -> None:
    runs = study()
    law = law_of(runs, [80])
    text = "\n".join(rate_law_sections(finished(runs), law))
    printed = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    settings, m = printed["optim"], printed["methods"]["dense"]["optim"]["lr"]
    assert printed["methods"].keys() == {"dense", "peer"}
    assert m == pytest.approx(law["groups"][Curve("dense")]["m"], rel=0.005)
    words = [
        f"optim.lr_rule={settings['lr_rule']}",
        f"optim.lr_law={json.dumps(settings['lr_law']).replace(chr(34), '')}",
    ]
    for width, batch in ((32, 8), (64, 16), (64, 32)):
        config = load([*words, f"d_model={width}", f"batch_sequences={batch}", "budget=1e13", f"optim.lr={m}"])
        planned = plan(config)
        best = BEST["dense"] * (width / 64) ** -0.5 * (planned.tokens / 1e7) ** -0.3 * (batch / 16) ** 0.5
        assert planned.lr == pytest.approx(best, rel=0.02)
    assert settings["lr_law"]["largest_lr"] == pytest.approx(runs["lr"].max(), rel=0.01)
    assert settings["lr_law"]["fitted_d_model"] == [32, 64] and settings["lr_law"]["fitted_batch_sequences"] == [8, 32]
    assert settings["lr_law"]["fewest_steps"] == runs["steps"].min()
    of_one_batch = runs[runs["batch_sequences"] == 16]
    assumed = as_configuration(law_of(of_one_batch, [80]), of_one_batch)["optim"]["lr_law"]
    assert (assumed["batch_exponent"], assumed["fitted_batch_sequences"]) == (0.5, [16, 16])


def test_the_figure_has_a_panel_a_corner_with_the_rates_of_the_law() -> None:
    runs = study()
    figure = rate_law_figure(finished(runs), law_of(runs, [80]))
    titles = [axes.get_title() for axes in figure.axes]
    assert [title.split("\n")[1] for title in titles] == [
        "d_model 32", "d_model 64", "d_model 32", "d_model 64", "d_model 80 (held out)"
    ]  # fmt: skip
    corners = [(3e12, 32), (3e12, 64), (1e13, 32), (1e13, 64), (1e13, 80)]
    for axes, (budget, width) in zip(figure.axes, corners, strict=True):
        lines = {str(line.get_label()): line for line in axes.lines}
        for method in BEST:
            fitted = np.sort(lines[method].get_xdata())
            grey = lines[f"_left out {method}"].get_xdata() if f"_left out {method}" in lines else np.empty(0)
            assert len(fitted) + len(grey) == 5, "neither other batches nor other table rates"
            lowest = lines[method].get_xdata()[np.argmin(lines[method].get_ydata())]
            assert np.abs(np.log(fitted / lowest)).max() <= math.log(3.2)
            assert (np.abs(np.log(grey / lowest)) > math.log(3.2)).all()
            curve = lines[f"_parabola {method}"].get_xdata()
            assert (curve[0], curve[-1]) == pytest.approx((fitted[0], fitted[-1]))
            best = BEST[method] * (width / 64) ** -0.5 * (budget / 1e13 * 64 / width) ** -0.3
            ((x, y),) = lines[f"_law {method}"].get_xydata()
            assert (x, y) == pytest.approx((best, 4.25), rel=1e-6)
            assert (lines[method].get_markerfacecolor() == "white") == (width == 80)
    assert any("_left out" in str(line.get_label()) for axes in figure.axes for line in axes.lines)


def test_the_law_has_the_variables_that_the_study_varies() -> None:
    """At one budget tokens fall with width: best = m width^-0.5 (1 / width)^-0.3, so the exponent of width is 0.2."""
    runs = study()
    law = fit_law(runs[runs["budget"] == 1e13])
    assert law and set(law["fitted"]) == {"width", "batch"}
    for method, one in law["groups"].items():
        assert one["m"] * (64 / one["width_0"]) ** -one["a"] == pytest.approx(BEST[method])
        assert (one["a"], one["b"], one["c"]) == pytest.approx((0.2, 0.0, 0.5))
    alone = runs[(runs["budget"] == 1e13) & (runs["d_model"] == 64) & (runs["batch_sequences"] == 16)]
    law = fit_law(alone)
    assert law and law["fitted"] == {}
    assert {name: one["m"] for name, one in law["groups"].items()} == pytest.approx(BEST)
    text = "\n".join(rate_law_sections(finished(alone), law_of(alone)))
    assert "| dense | 0.005 [0.005, 0.005] |" in text and "| 0.060 |" in text
    assert "## Its exponents" not in text and "As configuration" not in text, "nothing for other widths or lengths"
    (axes,) = rate_law_figure(finished(alone), law_of(alone)).axes
    marked = {str(line.get_label()): line.get_xdata()[0] for line in axes.lines if "_law" in str(line.get_label())}
    assert marked == pytest.approx({f"_law {name}": at for name, at in BEST.items()})


def test_a_study_without_rates_or_with_one_rate_a_curve_has_no_law() -> None:
    runs = study()
    for settings in ("", settings_text("lr=0.01")):
        changed = runs.assign(settings=settings)
        assert fit_law(changed) is None and not tries_rates(changed)
    assert fit_law(runs.groupby(["method", "size", "budget"]).head(1)) is None


def test_before_the_law_is_determined_losses_are_listed_and_drawn() -> None:
    runs = study()
    runs.loc[(runs["d_model"] != 64) | (runs["budget"] != 1e13), ["status", "val_loss"]] = ["pending", math.nan]
    assert tries_rates(runs) and fit_law(runs, [80]) is None
    text = "\n".join(finished_cells(finished(runs), len(runs)))
    assert text.count("| 1e13 | 64 | ") == (runs["status"] == "done").sum()
    assert f"{(runs['status'] == 'done').sum()} of {len(runs)} cells, which do not determine a law" in text
    (axes,) = rate_law_figure(finished(runs), None).axes
    lines = {str(line.get_label()): len(line.get_xdata()) for line in axes.lines}
    assert lines == {"dense": 5, "peer": 5}, "of the usual batch and table rate, and no parabola"
