"""The tables of a study hold its numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from synthetic_ablations import ablation_records, ablation_runs
from synthetic_study import LOSS, OFFSET, SWEEP, minimum, shared_curvature

from peerscale.config.study import ClaimsConfig
from peerscale.errors import exit_code
from peerscale.figures import study_table, style
from peerscale.figures.figures import study_figures
from peerscale.figures.markdown import signed_interval, table
from peerscale.figures.verdicts import no_minimum
from peerscale.files import write_json
from peerscale.records.record import write_record
from peerscale.records.study import collected
from peerscale.records.table import read_runs
from peerscale.stats.collection import fits_of
from peerscale.stats.comparison import compare
from peerscale.stats.curve import Curve, curves_of, finished, from_names
from peerscale.stats.fits import fit_study, read_fits
from programs import program as script

figures = script("figures")


Tables = tuple[pd.DataFrame, dict[str, Any]]
LABELS = {"dense": "dense", "moe": "MoE (expert choice)", "moe_token_choice": "MoE (token choice)", "pkm": "PKM",
          "peer": "PEER"}  # fmt: skip


@pytest.fixture
def study(collected_runs: Path) -> Tables:
    files = collected(SWEEP, collected_runs)
    runs = read_runs(files.runs)
    return runs, read_fits(files.fits)


def rows_of(lines: list[str]) -> dict[tuple[str, str], dict[str, str]]:
    """The rows of the first table by budget and method."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {(row[0], row[1]): dict(zip(cells[0], row, strict=True)) for row in cells[2:]}


def number(text: str) -> float:
    return float(text.split()[0].replace("−", "-"))


def test_numbers(study: Tables) -> None:
    runs, fits = study
    rows = rows_of(table(study_table.optimum_rows(runs, fits)))
    assert len(rows) == 10
    for budget, at in ((1e11, "1e11"), (3e11, "3e11")):
        done = {
            name: runs[
                runs["cell"].str.startswith(f"{name}-") & (runs["budget"] == budget) & (runs["status"] == "done")
            ]
            for name in LABELS
        }
        curves = shared_curvature({name: (d["flops_per_token"], d["val_loss"]) for name, d in done.items()})
        for name, label in LABELS.items():
            row, (x, loss) = rows[at, label], minimum(curves[name])
            assert row["sizes"] == f"{len(done[name])} finished, {len(done[name])} fitted"
            assert number(row["optimal FLOPs per token"]) == pytest.approx(x, rel=5.1e-3)
            assert number(row["loss there"]) == pytest.approx(loss, abs=5.1e-5)
            c2, c1, c0 = np.polyfit(np.log10(done[name]["flops_per_token"]), done[name]["val_loss"], 2)
            assert number(row["loss with own curvature"]) == pytest.approx(c0 - c1**2 / (4 * c2), abs=5.1e-5)
            if name != "dense":
                # The synthetic truth, within the noise put on each size's loss.
                assert number(row["difference to dense [95 %]"]) == pytest.approx(OFFSET[budget][name], abs=0.012)
        # Sequences are shared, so that their mean difficulty moves all losses by the same.
        assert abs(number(rows[at, "dense"]["loss there"]) - LOSS[budget]) < 0.1
        assert rows[at, "dense"]["difference to dense [95 %]"] == "reference"


def test_flags_are_in_words(study: Tables) -> None:
    rows = rows_of(table(study_table.optimum_rows(*study)))
    assert rows["1e11", "dense"]["flags"] == "—"
    assert rows["1e11", "PKM"]["flags"].startswith("1 dropped")
    assert rows["3e11", "MoE (expert choice)"]["flags"].startswith("1 failed")
    assert rows["3e11", "PEER"]["flags"].startswith("1 diverged")


def test_three_sizes_of_a_single_method_have_an_optimum_without_an_error(study: Tables) -> None:
    runs, _ = study
    dense = runs[(runs["method"] == "dense") & (runs["status"] == "done")].sort_values("flops_per_token")
    three = dense.groupby("budget").nth([0, 2, 4])
    fits = from_names(compare(three, [], min_sizes=3))
    for row in rows_of(table(study_table.optimum_rows(three, fits))).values():
        assert row["sizes"] == "3 finished, 3 fitted" and "no error" in row["flags"]
    assert all(method["se"] is None for entry in fits["budgets"] for method in entry["methods"] if method["loss"])


def test_a_difference_without_a_minimum_says_whose_and_why() -> None:
    note = "peer n_experts=16384: outside_range; dense: curvature"
    said = "peer n_experts=16384 (no minimum: outside range); dense (no minimum: curvature)"
    assert no_minimum(note) == said and not no_minimum("")


@pytest.mark.parametrize("status", ["outside_range", "curvature"])
def test_a_degenerate_minimum_has_its_flag_and_no_number(study: Tables, status: str) -> None:
    runs, _ = study
    if status == "outside_range":
        slope = np.log10(runs["flops_per_token"])
        changed = runs.assign(val_loss=runs["val_loss"] + np.where(runs["method"] == "dense", 3 * slope, 0))
    else:
        changed = runs.assign(val_loss=10 - runs["val_loss"])
    fits = from_names(compare(changed, []))
    rows = rows_of(table(study_table.optimum_rows(runs, fits)))
    dense = rows["1e11", "dense"]
    assert (dense["optimal FLOPs per token"], dense["loss there"]) == ("—", "—")
    assert dense["flags"] == status.replace("_", " ")
    assert rows["1e11", "PEER"]["difference to dense [95 %]"] == "—", (
        "nothing stands against a number that is not there"
    )


def test_how_the_fits_came_out_is_told(study: Tables) -> None:
    runs, fits = study
    entry, row = fits["budgets"][0], study_table.fit_rows(finished(runs), fits)[0]
    f, p = entry["equality"]["f"], entry["equality"]["p"]
    assert row == {
        "budget": "1e11", "batch, sequences": "16",
        "scatter about the curves": f"{entry['scatter']:.4f} ({entry['df']})", "scatter of seeds": "—",
        "F of one curvature": f"{f:.2f} (4, {entry['df'] - 4})", "p": f"{p:.2f}",
    }  # fmt: skip
    assert entry["df"] == 24 - 11, "24 finished cells; five intercepts, five slopes, one curvature"


def test_layers_are_told_by_their_settings(study: Tables) -> None:
    runs, _ = study
    assert table(study_table.layer_rows(finished(runs)))[2:] == [
        "| MoE (expert choice) | 16 | — | — | 1 |", "| MoE (token choice) | 16 | — | 1 | — |",
        "| PKM | 4,096 | 4 | 32 | — |", "| PEER | 4,096 | 4 | 16 | — |",
    ]  # fmt: skip
    assert study_table.layer_rows(finished(runs[runs["method"] == "dense"])) == []


def test_a_difference_of_one_size_says_what_its_interval_leaves_out() -> None:
    found = {"value": -0.0374, "low": -0.042, "high": -0.033, "fit_se": None, "seeds_se": None, "sequences_se": 0.002}
    assert signed_interval(found) == "−0.037 [−0.042, −0.033] (sequences only)"
    assert signed_interval({**found, "seeds_se": 0.003}) == "−0.037 [−0.042, −0.033]"
    assert signed_interval({**found, "fit_se": 0.003}) == "−0.037 [−0.042, −0.033]"
    assert signed_interval(None) == signed_interval({"note": "peer: too_few"}) == "—"


def test_growth_is_told_if_it_is_known(study: Tables) -> None:
    runs, fits = finished(study[0]), study[1]
    assert "## Growth of the multiplier" not in study_table.at_the_optimum(runs, fits)
    slope = {"method": Curve("peer"), "slope": 0.123, "low": 0.05, "high": 0.2}
    assert "| PEER | +0.123 [+0.050, +0.200] |" in study_table.at_the_optimum(runs, {**fits, "growth": [slope]})


def test_a_study_of_one_method_has_a_table(study: Tables) -> None:
    runs, _ = study
    alone = runs[runs["cell"].str.startswith("moe-")]
    lines = table(study_table.optimum_rows(alone, from_names(compare(alone, []))))
    rows = rows_of(lines)
    assert set(rows) == {("1e11", "MoE (expert choice)"), ("3e11", "MoE (expert choice)")}
    assert rows["1e11", "MoE (expert choice)"]["difference to dense [95 %]"] == "—"
    assert "PEER" not in "".join(lines)


def test_a_study_with_nothing_finished_has_a_table(study: Tables) -> None:
    runs, _ = study
    nothing = runs[runs["status"] != "done"]
    row = rows_of(table(study_table.optimum_rows(nothing, from_names(compare(nothing, [])))))["3e11", "PEER"]
    assert row["sizes"] == "0 finished, 0 fitted" and row["flags"] == "1 diverged"
    assert {row[column] for column in ("optimal FLOPs per token", "loss there", "loss with own curvature")} == {"—"}


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing them takes some seconds, and the tables do not need them."""
    monkeypatch.setattr(style, "save", lambda figure, stem: [])


def test_it_prints_the_answer_and_names_the_further_tables(
    collected_runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert figures.main([SWEEP, "--runs", str(collected_runs)]) == 0
    printed = capsys.readouterr().out
    study = collected(SWEEP, collected_runs)
    written = study.table.read_text()
    said = "**Every method minus dense, uncorrected for the number of comparisons:**"
    assert written.splitlines()[:3] == [f"# {SWEEP}: losses at equal compute", "", said]
    headings = [line.removeprefix("## ") for line in written.splitlines() if line.startswith("## ")]
    assert {"Differences", "Compute multiplier"} <= set(headings)
    shown, further = printed.partition("# ")[2].rstrip("\n").rsplit("\n", 1)
    assert written.startswith(f"# {shown}")
    assert "## " not in shown and further == f"Further tables in {study.table}: {'; '.join(headings)}"
    assert "| 6e18 | PEER | 20.63 | 20.68 | 17.65 | 19.01 | 25.48 | −0.145 |" in written, "the paper's table 1"
    assert "## Ranking under other FLOP conventions" in written
    assert "table 2" not in written


def test_settings_of_one_size_are_compared_with_dense_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of_one_seed = [record for record in ablation_records("experts") if record.seed == 0]
    for record in of_one_seed:
        folder = tmp_path / "experts" / record.cell
        folder.mkdir(parents=True)
        write_record(folder, record)
    arguments = ["experts", "--runs", str(tmp_path)]
    assert script("collect").main(arguments) == 0 and figures.main(arguments) == 0
    printed = capsys.readouterr().out
    losses = {record.cell: np.array(record.sequence_losses) for record in of_one_seed}
    paired = losses["peer-d64-1e13-n_experts=4096-query_norm=true-s0"] - losses["dense-d64-1e13-s0"]
    (line,) = (
        line
        for line in printed.splitlines()
        if line.startswith("| 1e13 | d_model 64 | PEER, 4,096 experts, BatchNorm |")
    )
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[6].endswith("] (sequences only)"), "one seed"
    difference, low, high = (float(text.strip("[],").replace("−", "-")) for text in cells[6].split()[:3])
    half = 1.96 * paired.std(ddof=1) / len(paired) ** 0.5
    assert (difference, low, high) == pytest.approx(
        (paired.mean(), paired.mean() - half, paired.mean() + half), abs=6e-4
    )
    assert cells[4] == f"{losses['peer-d64-1e13-n_experts=4096-query_norm=true-s0'].mean():.4f}"
    assert "| 1e13 | d_model 64 | dense | 1 |" in printed and "reference" in printed
    assert "| 16,384 | " in printed and "23.47 / 23.47" in printed


def test_controls_whose_rates_follow_the_law_are_compared_with_dense_of_the_usual_settings(tmp_path: Path) -> None:
    for record in ablation_records("controls"):
        write_record(tmp_path / "controls" / record.cell, record)
    arguments = ["controls", "--runs", str(tmp_path)]
    assert script("collect").main(arguments) == 0 and figures.main(arguments) == 0
    study = collected("controls", tmp_path)
    runs = read_runs(study.runs)
    assert runs.loc[runs["method"] == "peer", "lr"].nunique() > 1, "by the law, since their tokens differ"
    assert [name for name, _ in study_figures(study, runs)] == ["differences"]
    lines = study.table.read_text("utf-8").splitlines()
    rows = {line.split(" | ")[2]: line.split(" | ") for line in lines if line.startswith("| 1e13 | d_model 64")}
    losses = runs.assign(name=curves_of(runs).map(str)).groupby("name")["val_loss"].mean()
    apart = losses["dense initial_output_scale=0.25"] - losses["dense"]
    assert rows["dense"][6] == "reference"
    assert rows["dense, initial output scale 0.25"][6].startswith(f"{apart:+.3f} [".replace("-", "−"))
    assert "PEER, 1 head" in rows and lines[0] == "# controls: settings at one size"
    with_norm, without = (np.exp(losses[name]) for name in ("peer", "peer query_norm=false"))
    assert any(line.startswith(f"| 4,096 | {without:.2f} / {with_norm:.2f} |") for line in lines), "not with one head"


def test_claims_at_one_size_are_told() -> None:
    runs = ablation_runs("experts")
    claims = ClaimsConfig(method="peer", rivals=["dense"])
    compared = compare(runs, ablation_records("experts"), claims=claims)
    text = study_table.study_table("experts", runs, from_names(fit_study(runs, compared)))
    assert text.splitlines()[2].startswith("**At 1e13 FLOPs, d_model 64, 1,024 experts, BatchNorm, PEER leads dense (")
    assert text.splitlines()[4].startswith("Verdicts are corrected for 8 claims (Holm); the intervals, ")
    assert "\n## Claims\n" in text and "p, corrected for 8 claims" in text


def test_the_best_rate_is_the_minimum_of_the_parabolas(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Losses exactly on parabolas in ln rate: minima at 0.02 and 0.03."""
    losses = {"dense": (0.02, 4.0), "peer": (0.03, 3.95)}
    rows = [
        {
            "sweep": "mine", "cell": f"{name}-d16-5e11-lr={lr:g}-s0", "settings": f'{{"optim.lr": {lr}}}',
            "rate_factor": 1.0,
            "method": name, "variant": "", "size": "d16", "seed": 0, "budget": 5e11, "status": "done",
            "reason": "", "val_set": "tuning", "table_lr": np.nan, "lr": lr,
            "val_loss": best + 0.3 * np.log(lr / at) ** 2 + 1e-6 * (-1) ** i, "val_loss_se": 0.01,
            "flops_per_token": 1e5, "flops_attention_scores": 0, "flops_attention_values": 0, "params_total": 1000,
            "params_active": 1000, "tokens": 10000, "convention": "counted", "d_model": 16, "batch_sequences": 16,
        }
        for name, (at, best) in losses.items() for i, lr in enumerate((0.0125, 0.0175, 0.025, 0.035, 0.05))
    ]  # fmt: skip
    study = collected("mine", tmp_path)
    study.folder.mkdir(parents=True)
    pd.DataFrame(rows).to_csv(study.runs, index=False)
    write_json(study.fits, fits_of("mine", pd.DataFrame(rows), []))
    assert figures.main(["mine", "--runs", str(tmp_path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 5e11 | 16 |")]
    best = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [(row[2], *map(float, row[6:8])) for row in best] == [("dense", 0.02, 4.0), ("PEER", 0.03, 3.95)]


def test_an_uncollected_study_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["absent", "--runs", str(tmp_path), "--results", str(tmp_path)]
    assert exit_code(lambda: figures.main(arguments)) == 2
    assert "first: make figures SWEEP=absent" in capsys.readouterr().err


def test_a_study_of_two_sizes_is_listed_size_by_size() -> None:
    runs = ablation_runs("active")
    two = pd.concat([runs, runs.assign(size="d48-h6", cell=runs["cell"] + " larger")], ignore_index=True)
    fits = from_names(fit_study(two, compare(two, [])))
    lines = study_table.study_table("mine", two, fits).splitlines()
    sizes = [line.split(" | ")[1] for line in lines if line.startswith("| 1e13 | d_model")]
    assert lines[0] == "# mine: settings at several sizes"
    assert sizes == [size for size in ("d_model 64", "d_model 48 (6 heads)") for _ in range(len(sizes) // 2)]
