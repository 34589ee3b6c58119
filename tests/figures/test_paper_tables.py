"""Tables 1 and 2 and rankings by convention, against numbers worked out otherwise."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from synthetic_ablations import ablation_runs, with_norm_of_one_seed
from synthetic_study import SWEEP, minimum, shared_curvature
from synthetic_surface import surface_runs

from peerscale.config.schema import load
from peerscale.figures import paper_tables, study_table
from peerscale.figures.markdown import table
from peerscale.figures.published import paper_values, read_published
from peerscale.figures.style import label
from peerscale.plan.cell_names import budget_name
from peerscale.plan.cost import cost
from peerscale.records.study import collected
from peerscale.records.table import read_runs
from peerscale.stats.comparison import compare
from peerscale.stats.conventions import flops_by_convention
from peerscale.stats.curve import Curve, finished, from_names
from peerscale.stats.fits import fit_study, read_fits
from toy_study import curve_of, fits_with_curves

Study = tuple[pd.DataFrame, dict[str, Any]]
NAMES = ("dense", "moe", "moe_token_choice", "pkm", "peer")


@pytest.fixture(scope="module")
def study(collected_runs: Path) -> Study:
    files = collected(SWEEP, collected_runs)
    return read_runs(files.runs), read_fits(files.fits)


def test_published_numbers_are_the_papers() -> None:
    """Anchors and derived values: gaps of table 1 and the worth of a larger pool, as others have computed them."""
    published = read_published()
    assert set(published.columns) == {"item", "method", "x_name", "x", "metric", "value", "source"}
    assert not published.duplicated(["item", "method", "x", "metric", "value"]).any()
    assert published["source"].str.startswith("arXiv 2407.04153").all()
    rows = {(row["budget"], row["method"]): row for row in paper_tables.paper_perplexities(published)}
    gaps = {(6e18, "moe"): -0.108, (6e18, "pkm"): -0.084, (6e18, "peer"): -0.145}
    gaps |= {(2e19, "moe"): -0.067, (2e19, "pkm"): -0.053, (2e19, "peer"): -0.107}
    for (budget, name), gap in gaps.items():
        assert rows[budget_name(budget), label(Curve(name))]["difference to dense (nats)"] == f"−{-gap:.3f}"
    with_norm = list(paper_values(published, "table 2", "peer", "ppl_c4").values())
    assert np.diff(np.log(with_norm)) == pytest.approx([-0.040, -0.049, -0.039], abs=6e-4)
    uneven = paper_values(published, "table 2", "peer query_norm=false", "unevenness")
    assert math.exp(-uneven[1024**2]) == pytest.approx(0.22, abs=5e-3)
    assert paper_values(published, "table 2", "peer query_norm=false", "expert_usage")[1024**2] == 0.998
    assert paper_values(published, "table 3", "peer", "ppl_c4") == {}
    (top_k,) = published.loc[(published["metric"] == "top_k") & (published["method"] == "pkm"), "value"]
    assert top_k == 32


def test_table_1_is_each_sets_fit_at_the_validation_optimum(study: Study) -> None:
    runs, fits = study
    found = paper_tables.perplexities(fits)
    assert [row["method"].removesuffix(" †") for row in found] == [label(Curve(name)) for name in (*NAMES, *NAMES)]
    for budget, rows in ((1e11, found[:5]), (3e11, found[5:])):
        done = {
            name: runs[
                runs["cell"].str.startswith(f"{name}-") & (runs["budget"] == budget) & (runs["status"] == "done")
            ]
            for name in NAMES
        }
        validation, speeches = (
            shared_curvature(
                {name: (cells["flops_per_token"], np.log(cells[f"ppl_{s}"])) for name, cells in done.items()}
            )
            for s in ("validation", "speeches")
        )
        dense = minimum(validation["dense"])[1]
        for name, row in zip(NAMES, rows, strict=True):
            assert row["budget"] == budget_name(budget)
            x, loss = minimum(validation[name])
            assert row["validation"] == f"{math.exp(loss):.2f}"
            there = np.polynomial.Polynomial(speeches[name])(math.log10(x))
            assert float(row["speeches"]) == pytest.approx(math.exp(there), abs=0.0052)  # two digits, of seven
            assert row["difference to dense (nats)"] == f"{loss - dense:+.3f}".replace("-", "−")
            z = np.log10(done[name]["flops_per_token"])
            flagged = not 0.2 <= (math.log10(x) - z.min()) / (z.max() - z.min()) <= 0.8
            assert row["method"].endswith(" †") == flagged


def test_table_2_holds_ours_and_the_papers() -> None:
    runs = ablation_runs("experts")
    runs = finished(runs[runs["method"] == "peer"])
    rows = {row["experts"]: row for row in paper_tables.norm_rows(runs, read_published())}
    for (n, norm), cells in runs.groupby(["n_experts", runs["query_norm"].astype(str) == "True"]):
        row = rows[f"{n:,.0f}"]
        ours = {title: row[title].split(" / ")[norm] for title in ("perplexity", "experts used", "unevenness")}
        assert ours["perplexity"] == f"{np.prod(cells['ppl_validation']) ** (1 / 2):.2f}"
        assert ours["experts used"] == "90.0%"
        assert ours["unevenness"] == f"{cells['unevenness'].mean():.2f}"
    assert rows["1,048,576"]["paper: unevenness"] == "1.52 / 1.06"


def test_table_2_of_a_study_with_batchnorm_alone() -> None:
    runs = with_norm_of_one_seed()
    lines = table(paper_tables.norm_rows(finished(runs[runs["method"] == "peer"]), read_published()))
    first = next(line for line in lines if line.startswith("| 1,024 |"))
    assert first.startswith("| 1,024 | — / ") and first.endswith("| — | — | — |")
    last = lines[-1]
    assert last == (
        "| 1,048,576 | — | — | — | 20.73 / 20.64 | 99.8% / 100.0% | 1.52 / 1.06 |"
    )  # ours does not go so far


@pytest.mark.parametrize("method", ["dense", "moe", "pkm", "peer"])
def test_conventions_from_columns_are_those_from_the_configuration(method: str) -> None:
    config = load([f"ffn={method}", "d_model=64"])
    model = cost(config)
    row = {f"flops_{name}": n for name, n in model.flops.items()}
    row |= {"flops_per_token": model.flops_per_token, "params_active": model.params_active}
    row |= {"params_total": model.params_total}
    found = {name: float(column.iloc[0]) for name, column in flops_by_convention(pd.DataFrame([row])).items()}
    layers, context, d, forward_and_backward = 4, 64, 64, 3
    scores_and_values = forward_and_backward * layers * 2 * (2 * context * d)
    router = {"dense": 0, "moe": 2 * d * 32}.get(method, 2 * d * 4 * 32 + 2 * 4 * 64 * 32) * forward_and_backward
    assert found["as counted"] == model.flops_per_token
    assert found["causal attention"] == model.flops_per_token - scores_and_values / 2
    assert found["without router"] == model.flops_per_token - router
    assert found["6 x active parameters"] == 6 * model.params_active
    assert found["6 x total parameters"] == 6 * model.params_total


def ranked(*rows: tuple[float, str, float | None]) -> list[str]:
    """The table of one convention."""
    names = {name for _, name, _ in rows} | {str(curve_of(name).with_method("dense")) for _, name, _ in rows}
    budgets = [{"budget": 1e11, "methods": [{"name": name} for name in names]}]
    found = [{"budget": budget, "method": name, "multipliers": {"as counted": x}} for budget, name, x in rows]
    return table(study_table.conventions(fits_with_curves({"budgets": budgets, "conventions": found})))[2:]


def test_ranks_stand_beside_multipliers() -> None:
    lines = ranked((1e11, "moe", 0.9), (1e11, "pkm", 1.2), (1e11, "peer", 1.2), (3e11, "peer", None))
    assert lines == [
        "| 1e11 | dense | 1.000 (3) |",
        "| 1e11 | MoE (expert choice) | 0.900 (4) |",
        "| 1e11 | PKM | 1.200 (1) |",
        "| 1e11 | PEER | 1.200 (1) |",
        "| 3e11 | dense | 1.000 (1) |",
        "| 3e11 | PEER | — |",
    ]


def test_variants_are_ranked_beside_dense_at_their_own_settings() -> None:
    assert ranked((1e11, "peer batch_sequences=8", 1.1), (1e11, "peer batch_sequences=16", 0.8)) == [
        "| 1e11 | dense, batch 8 | 1.000 (2) |",
        "| 1e11 | PEER, batch 8 | 1.100 (1) |",
        "| 1e11 | dense, batch 16 | 1.000 (1) |",
        "| 1e11 | PEER, batch 16 | 0.800 (2) |",
    ]


def test_nothing_fitted_is_no_table(study: Study) -> None:
    _, fits = study
    assert table(study_table.conventions({**fits, "conventions": []})) == []
    assert paper_tables.perplexities({**fits, "budgets": []}) == []
    assert (
        table(study_table.multipliers({**fits, "multipliers": []}))
        == table(study_table.claims({**fits, "claims": []}))
        == []
    )
    assert study_table.difference_rows({**fits, "budgets": []}) == []


def difference(**changes: Any) -> dict[str, Any]:
    found = {
        "method": "peer", "reference": "dense", "size": "",
        "value": -0.033, "low": -0.049, "high": -0.0171, "se": 0.0075,
        "df": 14.6, "fit_se": 0.0066, "seeds_se": 0.0027, "sequences_se": 0.0011, "rate_se": None, "p": 0.0004,
        "own": {"value": -0.031, "se": 0.008},
    }  # fmt: skip
    return {**found, **changes}


def test_errors_stand_by_source_and_each_pair_once() -> None:
    unknown = {"method": "pkm", "reference": "dense", "size": "", "note": "pkm: too_few"}
    turned = difference(method="dense", reference="peer", value=0.033)
    entry = {"budget": 3e12, "differences": [difference(), unknown, turned, difference(size="d64", own=None)]}
    header, _, *rows = table(study_table.difference_rows(fits_with_curves({"budgets": [entry]})))
    numbers = "−0.033 [−0.049, −0.017] | 0.0066 | 0.0027 | 0.0011 | — | 0.0075 | 15"
    assert rows == [
        f"| 3e12 | PEER minus dense | {numbers} | −0.031 ± 0.008 |",
        f"| 3e12 | PEER minus dense, d_model 64 | {numbers} | — |",
    ]  # fmt: skip
    columns = [cell.strip() for cell in header.strip("|").split("|")]
    assert columns[3:8] == [
        "s.e. from sizes", "s.e. from seeds", "s.e. from sequences", "s.e. from learning rates", "s.e., all"
    ]  # fmt: skip
    bare = difference(seeds_se=None, df=None, own=None)
    assert table(study_table.difference_rows(fits_with_curves({"budgets": [{"budget": 3e12, "differences": [bare]}]})))[
        2
    ].endswith("| 0.0075 | ∞ | — |")


def claim(**changes: Any) -> dict[str, Any]:
    found = {
        "budget": 3e12, "size": "", "method": "peer", "rival": "dense", "value": -0.033, "low": -0.049, "high": -0.017,
        "p": 0.00004, "p_holm": 0.0123, "family": 4,
    }  # fmt: skip
    return {**found, **changes}


def test_claims_name_both_methods_and_their_common_settings_once() -> None:
    variant = {"method": "peer batch_sequences=8", "rival": "dense batch_sequences=8"}
    claims = [claim(), claim(**variant), claim(size="d40", p=None, p_holm=None), claim(method="peer n_experts=4096")]
    rows = table(study_table.claims(fits_with_curves({"claims": claims})))[2:]
    interval = "−0.033 [−0.049, −0.017]"
    assert rows == [
        f"| 3e12 | PEER minus dense | {interval} | < 0.0001 | 0.0123 | leads |",
        f"| 3e12 | PEER minus dense, batch 8 | {interval} | < 0.0001 | 0.0123 | leads |",
        f"| 3e12 | PEER minus dense, d_model 40 | {interval} | — | — | cannot be told apart from |",
        f"| 3e12 | PEER, 4,096 experts minus dense | {interval} | < 0.0001 | 0.0123 | leads |",
    ]


def test_a_dense_variant_is_compared_with_dense_and_a_set_that_a_budget_lacks_keeps_its_column() -> None:
    quiet = "dense initial_output_scale=0.25"
    budgets = []
    for budget, sets in ((1e12, {"validation": 4.0, "speeches": 4.5, "wikipedia": 5.0}), (1e13, {"wikipedia": 4.8})):
        methods = [{"name": name, "status": "ok", "sets": sets} for name in ("dense", quiet, "peer")]
        pairs = [(quiet, "dense", -0.1), ("peer", "dense", -0.04), ("peer", quiet, 0.06), ("dense", quiet, 0.1)]
        differences = [{"method": one, "reference": other, "size": "", "value": gap} for one, other, gap in pairs]
        budgets.append({"budget": budget, "methods": methods, "differences": differences})
    rows = table(paper_tables.perplexities(fits_with_curves({"budgets": budgets})))
    gaps = [row.split(" | ")[-1].rstrip(" |") for row in rows[2:]]
    assert gaps == ["+0.000", "−0.100", "−0.040"] * 2
    assert rows[-1] == f"| 1e13 | PEER | — | — | {math.exp(4.8):.2f} | −0.040 |"


def test_multipliers_are_listed_by_budget_with_their_intervals() -> None:
    found = [
        {"method": "peer", "reference": "dense", "budget": 3e12, "multiplier": 1.183, "low": 1.09, "high": 1.26},
        {"method": "peer", "reference": "dense", "budget": 1e12, "multiplier": 1.0, "low": None, "high": None},
    ]
    rows = table(study_table.multipliers(fits_with_curves({"multipliers": found})))[2:]
    assert rows == ["| 1e12 | PEER | 1.00 [none] |", "| 3e12 | PEER | 1.18 [1.09, 1.26] |"]


def test_exponents_of_two_approaches_stand_side_by_side(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peerscale.stats.fits.RESAMPLES", 100)
    runs = surface_runs(noise=1e-4)
    fits = from_names(fit_study(runs, compare(runs, [])))
    header, _, dense, peer = table(study_table.exponents(fits))
    laws = fits["laws"]
    assert header == "| method | 2: isoFLOP optima | 3: surface | largest budget: predicted | observed |"
    assert peer.startswith("| PEER |")
    cells = dense.strip("| ").split(" | ")
    shown = [float(cell.split(" ")[0]) for cell in cells[1:]]
    surface = laws["dense/parametric"]
    wanted = [laws["dense"]["exponent"], surface["a"]]
    wanted += [surface["hold_out"]["predicted"], surface["hold_out"]["observed"]]
    assert shown == pytest.approx(wanted, abs=5.1e-4)
    low, high = surface["ci"]["a"]
    assert cells[2].endswith(f"[{low:.3f}, {high:.3f}]")
    assert table(study_table.exponents(study[1])) == []  # two budgets have no exponent
