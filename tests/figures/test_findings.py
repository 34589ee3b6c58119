"""The page of findings: verdicts from the claims and intervals of published studies, made anew byte for byte."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from scipy.stats import t as student

from peerscale.errors import UserError
from peerscale.figures.differences import to_dense
from peerscale.figures.findings import BEGIN, EARLIER, END, difference_rows, verdict_rows, with_table
from peerscale.figures.markdown import plus_minus
from peerscale.figures.style import label
from peerscale.files import ROOT
from peerscale.records.study import read_fits
from peerscale.records.table import read_runs

BUDGETS = (3e13, 1e14)


def difference(method: str, reference: str, value: float, half: float) -> dict[str, Any]:
    """As `fits.json` has it, of an optimum with errors of sizes and rates."""
    parts = {"fit_se": 0.003, "seeds_se": None, "sequences_se": 0.001, "rate_se": 0.004}
    ends = {"low": value - half, "high": value + half}
    return {"method": method, "reference": reference, "size": "", "value": value, **parts, **ends}


def publish(
    results: Path, sweep: str, differences: dict[float, list[dict[str, Any]]], claims: list[dict[str, Any]],
    runs: list[dict[str, Any]] | None = None, growth: tuple[float | None, ...] | None = None,
) -> None:  # fmt: skip
    folder = results / sweep
    folder.mkdir(parents=True)
    budgets = [{"budget": c, "methods": [], "differences": found} for c, found in differences.items()]
    slope = (
        []
        if growth is None
        else [{"method": "peer", "reference": "dense", **dict(zip(("slope", "low", "high"), growth, strict=True))}]
    )
    multipliers = [{"method": "peer", "reference": "dense", "budget": 1e14, "multiplier": 1.5, "low": 1.2, "high": 1.9}]
    fits = {
        "answer": "",
        "budgets": budgets,
        "claims": claims,
        "multipliers": multipliers,
        "growth": slope,
        "conventions": [{"method": "peer", "budget": 1e14, "multipliers": {"measured time": 1.0449}}],
        "laws": {},
        "rates": {},
    }
    (folder / "fits.json").write_text(json.dumps(fits))
    columns = {
        "cell": "c", "method": "peer", "variant": "", "size": "d64", "seed": 0, "budget": 1e14, "flops_per_token": 1,
        "val_loss": 4.0, "status": "done", "convention": "", "axes": "", "reason": "",
        "n_experts": None, "expert_usage": None,
    }  # fmt: skip
    pd.DataFrame([{**columns, **row} for row in runs or [{}]]).to_csv(folder / "runs.csv", index=False)


def claim(rival: str, budget: float, value: float, p_holm: float, equal: bool) -> dict[str, Any]:
    return {
        "budget": budget,
        "size": "",
        "method": "peer",
        "rival": rival,
        "value": value,
        "p_holm": p_holm,
        "equal": equal,
        "family": 2,
    }


def by_claim(results: Path) -> dict[str, dict[str, str]]:
    return {row["claim"]: row for row in verdict_rows(results)}


def test_a_claim_is_judged_by_holms_probability_and_the_margin(tmp_path: Path) -> None:
    values = {"dense": (-0.05, -0.04), "moe_token_choice": (0.001, -0.01), "pkm": (0.04, -0.002)}
    differences = {
        c: [difference("peer", rival, of[i], 0.02) for rival, of in values.items()] for i, c in enumerate(BUDGETS)
    }
    differences[1e14].append(difference("moe", "peer", 0.03, 0.01))  # subtracted the other way round
    claims = [
        claim("dense", 3e13, -0.05, 0.001, False), claim("dense", 1e14, -0.04, 0.04, False),
        claim("moe_token_choice", 3e13, 0.001, 0.9, True), claim("moe_token_choice", 1e14, -0.01, 0.3, False),
        claim("pkm", 3e13, 0.04, 0.001, False), claim("pkm", 1e14, -0.002, 0.06, False),
    ]  # fmt: skip
    publish(tmp_path, "isoflop_cpu", differences, claims, growth=(0.1, 0.05, 0.15))
    rows = by_claim(tmp_path)
    assert rows["PEER beats dense"]["verdict"] == "holds (at 1e14; 3e13)"
    assert (
        rows["PEER beats MoE (token choice)"]["verdict"] == "cannot be told (at 1e14); does not hold: equal (at 3e13)"
    )
    assert rows["PEER beats PKM"]["verdict"] == "cannot be told (at 1e14); does not hold: PEER is behind (at 3e13)"
    assert rows["PEER beats MoE (expert choice)"]["verdict"] == "holds, descriptive (at 1e14)"
    assert "1e14: −0.030 ± 0.010" in rows["PEER beats MoE (expert choice)"]["measured here"]
    measured = rows["PEER beats dense"]["measured here"]
    assert measured.startswith("1e14: −0.040 ± 0.020 (sizes 0.003, sequences 0.001, rates 0.004); 3e13: −0.050 ± 0.020")
    assert rows["PEER's multiplier grows with the budget"]["verdict"] == "holds"
    assert rows["More experts help"]["verdict"] == "not measured yet"


@pytest.mark.parametrize(
    "ends, verdict", [((0.01, 0.2), "holds"), ((-0.2, -0.01), "does not hold"), ((-0.1, 0.1), "cannot be told")]
)
def test_growth_is_judged_by_its_interval(tmp_path: Path, ends: tuple[float, float], verdict: str) -> None:
    publish(tmp_path, "isoflop_cpu", {1e14: []}, [], growth=(sum(ends) / 2, *ends))
    assert by_claim(tmp_path)["PEER's multiplier grows with the budget"]["verdict"] == verdict


def test_more_experts_are_judged_within_the_main_study(tmp_path: Path) -> None:
    more = [difference("peer n_experts=16384", "peer", -0.03, 0.01), difference("peer", "dense", -0.03, 0.01)]
    publish(tmp_path, "isoflop_cpu", {1e14: more, 3e13: [{**more[0], "high": 0.01}]}, [])
    row = by_claim(tmp_path)["More experts help"]
    assert row["verdict"] == "holds, descriptive (at 1e14); cannot be told, descriptive (at 3e13)"
    assert "16,384 experts at 1e14: −0.030 [−0.040, −0.020]" in row["measured here"]


def test_each_number_of_active_experts_has_its_best_heads(tmp_path: Path) -> None:
    losses = {(1, 16): -0.01, (2, 8): -0.02, (1, 32): -0.05, (2, 16): 0.01, (4, 16): -0.03}
    found = [difference(f"peer n_heads={h}-top_k={k}", "dense", loss, 0.04) for (h, k), loss in losses.items()]
    publish(tmp_path, "active", {1e13: found}, [])
    row = by_claim(tmp_path)["More active experts help"]
    assert row["measured here"].startswith(
        "active experts (best number of heads), less dense: 16 (2 heads): −0.020 ± 0.040, 32 (1 head): −0.050 ± 0.040, "
        "64 (4 heads): −0.030 ± 0.040"
    )
    told = "the lowest loss is that of 32 active experts, and their best number of heads does not grow"
    assert row["verdict"] == f"descriptive: {told}"


def test_batch_norm_is_with_less_without(tmp_path: Path) -> None:
    publish(tmp_path, "controls", {1e13: [difference("peer query_norm=false", "peer", 0.02, 0.01)]}, [])
    row = by_claim(tmp_path)["BatchNorm of the queries helps"]
    assert row["verdict"] == "holds, descriptive (at 1e13)" and "−0.020 [−0.030, −0.010]" in row["measured here"]
    assert row["the paper"].startswith("−0.004 to 0.000 nats")  # ln(20.64 / 20.73) and ln(23.47 / 23.47)


def test_a_study_says_how_many_cells_are_still_to_run(tmp_path: Path) -> None:
    cells = [{}, {"cell": "d", "status": "pending", "val_loss": None}, {"cell": "e", "status": "dropped"}]
    publish(tmp_path, "isoflop_cpu", {3e12: [difference("peer", "dense", -0.05, 0.02)]}, [], runs=cells)
    row = by_claim(tmp_path)["PEER beats dense"]
    assert row["verdict"] == "holds, descriptive (at 3e12); 1 of its 3 cells are still to run"
    assert row["measured here"].startswith("3e12: −0.050 ± 0.020")


def test_studies_with_tuned_rates_stand_side_by_side(tmp_path: Path) -> None:
    """And not beside an older one."""
    left = [{}, {"cell": "d", "status": "pending", "val_loss": None}]
    publish(tmp_path, "isoflop_rates_5e11", {1e13: [difference("peer", "pkm", -0.06, 0.02)]}, [])
    publish(tmp_path, "isoflop_cpu", {3e12: [difference("peer", "pkm", 0.01, 0.03)]}, [], runs=left)
    found, judged = difference("peer", "pkm", 0.02, 0.01), claim("pkm", 2e12, 0.02, 0.01, False)
    publish(tmp_path, "reproduce", {2e12: [found]}, [judged])
    row = by_claim(tmp_path)["PEER beats PKM"]
    assert row["verdict"] == (
        "isoflop_cpu: cannot be told, descriptive (at 3e12); 1 of its 2 cells are still to run; "
        "reproduce: does not hold: PEER is behind (at 2e12)"
    )
    assert "3e12: +0.010 ± 0.030" in row["measured here"] and "2e12: +0.020 ± 0.010" in row["measured here"]
    assert "1e13" not in row["measured here"]


def test_a_study_with_rates_of_a_small_budget_decides_nothing(tmp_path: Path) -> None:
    differences = {1e13: [difference("peer", "dense", -0.05, 0.02)]}
    publish(tmp_path, "isoflop_rates_5e11", differences, [claim("dense", 1e13, -0.05, 0.001, False)])
    runs = [{"n_experts": n, "expert_usage": used} for n, used in ((256, 1.0), (4096, 0.6), (4096, 0.7))]
    runs.append({"n_experts": 4096, "expert_usage": 0.1, "budget": 1e13})
    publish(tmp_path, "experts", {1e13: []}, [], runs)
    rows = by_claim(tmp_path)
    assert (
        rows["PEER beats dense"]["verdict"] == EARLIER and "−0.050 ± 0.020" in rows["PEER beats dense"]["measured here"]
    )
    assert rows["All experts are used"]["measured here"].startswith("100.0% of 256 at 1e14; 60.0% to 70.0% of 4,096")
    publish(tmp_path, "isoflop_cpu", differences, [claim("dense", 1e13, -0.05, 0.001, False)])
    assert by_claim(tmp_path)["PEER beats dense"]["verdict"] == "holds (at 1e13)"


@pytest.mark.parametrize(("name", "rows"), [("docs/findings.md", verdict_rows), ("README.md", difference_rows)])
def test_the_committed_pages_are_what_the_committed_studies_say(
    name: str, rows: Callable[[Path], list[dict[str, str]]]
) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert with_table(text, rows(ROOT / "results"), Path(name)) == text


def test_a_page_without_a_place_for_the_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"page\.md needs the lines"):
        with_table(f"{END}\n{BEGIN}\n", [], tmp_path / "page.md")


def test_the_readme_has_a_row_a_budget_with_significant_claims_in_bold(tmp_path: Path) -> None:
    at_size = {**difference("moe", "peer", 0.03, 0.01), "size": "d64"}
    differences = {
        1e14: [difference("peer", "dense", -0.04, 0.02), difference("pkm", "peer", -0.01, 0.02), at_size],
        3e13: [difference("peer", "dense", -0.05, 0.02)],
        1e12: [],
    }
    claims = [claim("dense", 1e14, -0.04, 0.01, False), claim("pkm", 1e14, 0.01, 0.2, False)]
    publish(tmp_path, "isoflop_cpu", differences, claims)
    publish(tmp_path, "isoflop_rates_5e11", {3e12: differences[3e13]}, [])
    smaller, larger = difference_rows(tmp_path)
    assert (
        smaller["FLOPs"] == "3e13"
        and smaller["PEER − dense"] == "−0.050 ± 0.020"
        and smaller["multiplier [95 %]"] == "—"
    )
    assert larger == {
        "FLOPs": "1e14", "PEER − dense": "**−0.040 ± 0.020**", "PEER − MoE (token choice)": "—",
        "PEER − MoE (expert choice)": "−0.030 ± 0.010 at d_model 64", "PEER − PKM": "+0.010 ± 0.020",
        "multiplier [95 %]": "1.50 [1.20, 1.90]", "in training time": "1.04 [0.84, 1.32]", "seeds": "1",
        "study": "[isoflop_cpu](results/isoflop_cpu/table.md)",
    }  # fmt: skip


def test_the_seeds_of_a_row_are_those_of_the_models_that_it_compares(tmp_path: Path) -> None:
    more = {"axes": '{"n_experts": 16384}', "n_experts": 16384}
    runs = [{"seed": 0}, {"seed": 1}, {"size": "d80"}, {"method": "dense"}, *({**more, "seed": n} for n in range(5))]
    publish(tmp_path, "isoflop_cpu", {1e14: [difference("peer", "dense", -0.04, 0.02)]}, [], runs)
    assert [row["seeds"] for row in difference_rows(tmp_path)] == ["1 to 2"]


def test_usage_is_judged_for_each_number_of_experts(tmp_path: Path) -> None:
    at = [(1024, 1.0, 1e14), (4096, 0.7, 1e13), (4096, 1.0, 1e14), (16384, 0.9, 1e14)]
    runs = [{"n_experts": n, "expert_usage": share, "budget": budget} for n, share, budget in at]
    publish(tmp_path, "isoflop_cpu", {1e14: []}, [], runs)
    verdict = by_claim(tmp_path)["All experts are used"]["verdict"]
    assert verdict == "holds for 1,024, 4,096, not for 16,384 experts (each at its largest budget)"


def test_what_has_no_interval_cannot_be_told(tmp_path: Path) -> None:
    unknown = {**difference("peer", "moe", -0.05, 0.02), "low": None, "high": None}
    publish(tmp_path, "isoflop_cpu", {1e14: [unknown]}, [], growth=(0.1, None, None))
    rows = by_claim(tmp_path)
    assert rows["PEER beats MoE (expert choice)"]["verdict"] == "cannot be told, descriptive (at 1e14)"
    assert rows["PEER beats MoE (expert choice)"]["measured here"].startswith("1e14: −0.050 ± — (")
    growth = rows["PEER's multiplier grows with the budget"]
    assert growth["verdict"] == "cannot be told" and "0.10 [none]" in growth["measured here"]


def test_an_interval_without_seeds_is_marked_and_decides_nothing(tmp_path: Path) -> None:
    one_seed = {**difference("peer", "moe", 0.047, 0.009), "fit_se": None, "size": "d112"}
    publish(tmp_path, "isoflop_cpu", {1e14: [one_seed]}, [])
    row = by_claim(tmp_path)["PEER beats MoE (expert choice)"]
    assert row["verdict"] == "open: one seed, descriptive (at 1e14, d_model 112)"
    shown = difference_rows(tmp_path)[0]["PEER − MoE (expert choice)"]
    assert shown == "+0.047 ± 0.009 (without seeds) at d_model 112"


def test_a_claim_about_a_variant_makes_no_other_difference_bold(tmp_path: Path) -> None:
    differences = [difference("peer", "dense", -0.02, 0.03), difference("peer n_experts=16384", "dense", -0.08, 0.02)]
    claims = [{**claim("dense", 1e14, -0.08, 0.001, False), "method": "peer n_experts=16384"},
              claim("dense", 1e14, -0.02, 0.6, False)]  # fmt: skip
    publish(tmp_path, "isoflop_cpu", {1e14: differences}, claims)
    assert difference_rows(tmp_path)[0]["PEER − dense"] == "−0.020 ± 0.030"


def test_a_rival_that_is_compared_at_two_sizes_has_both(tmp_path: Path) -> None:
    at_sizes = [
        {**difference("moe", "peer", value, 0.01), "size": size} for size, value in (("d64", 0.03), ("d80", -0.02))
    ]
    publish(tmp_path, "isoflop_cpu", {1e13: at_sizes}, [])
    row = by_claim(tmp_path)["PEER beats MoE (expert choice)"]
    assert (
        row["verdict"] == "holds, descriptive (at 1e13, d_model 64); does not hold, descriptive (at 1e13, d_model 80)"
    )
    assert "1e13, d_model 64: −0.030 ± 0.010" in row["measured here"]
    assert "1e13, d_model 80: +0.020 ± 0.010" in row["measured here"]


@pytest.mark.parametrize("norm", ["", "-query_norm=true"])
def test_of_several_numbers_of_experts_at_one_size_the_best_is_named(norm: str, tmp_path: Path) -> None:
    values = {256: -0.02, 1024: -0.05, 4096: -0.03}
    names = {f"peer n_experts={n}{norm}": value for n, value in values.items()}
    names |= {"peer n_experts=1024-query_norm=false": -0.09} if norm else {}
    found = [{**difference(name, "dense", value, 0.01), "size": "d64"} for name, value in names.items()]
    publish(tmp_path, "isoflop_cpu", {1e13: found}, [])
    row = by_claim(tmp_path)["More experts help"]
    assert row["verdict"] == "descriptive: the lowest loss is that of 1,024 experts"
    assert row["measured here"].count("experts at 1e13, d_model 64") == 3


def test_the_order_at_each_methods_better_batch_is_that_of_the_published_runs() -> None:
    runs = read_runs(ROOT / "results" / "archive.csv").query("sweep == 'batches'")
    runs["layer"] = runs["method"] + runs["variant"].fillna("")
    losses = runs.groupby(["layer", "batch_sequences", "d_model", "seed"])["val_loss"].first().unstack()
    best = losses.mean(axis=1).groupby(["layer", "batch_sequences"]).mean().groupby("layer").min()
    less = (best["peer"] - best).map("{:+.3f}".format)
    half = float(student.ppf(0.975, 20)) * math.sqrt(losses.var(axis=1).mean() * (1 / 4 + 1 / 4))
    words = (
        f"PEER's loss less dense's is {less['dense']}, less that of expert choice {less['moe']}, of token choice "
        f"{less['moetoken_choice']} and of PKM {less['pkm']}, each ± {half:.3f}"
    )
    assert words.replace("-", "−") in " ".join((ROOT / "docs" / "findings.md").read_text(encoding="utf-8").split())


def test_the_controls_of_the_page_are_those_of_the_published_fits() -> None:
    page = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    fits = read_fits(ROOT / "results" / "controls" / "fits.json")
    shown = re.findall(r"^\| ([^|]+) \| ([+−][^|]+) \|[^|]*\|$", page, flags=re.M)
    assert dict(shown) == {label(name): plus_minus(one) for (_, _, name), one in to_dense(fits).items()}
    (entry,) = fits["budgets"]
    ahead = {d["method"]: plus_minus(d) for d in entry["differences"] if d["reference"] == "peer"}
    for name, text in (("pkm", "PKM (by {})"), ("fine_grained_moe", "fine-grained MoE (by {})")):
        assert text.format(ahead[name].removeprefix("−")) in page
    runs = read_runs(ROOT / "results" / "isoflop_cpu" / "runs.csv")
    alike = runs[(runs["budget"] == 1e13) & (runs["size"] == "d64") & runs["axes"].fillna("").isin(["", "{}"])]
    means = alike.groupby("method")["val_loss"].mean()
    assert f"with a third seed, in `isoflop_cpu`, −{means['dense'] - means['peer']:.3f} at this size" in page
