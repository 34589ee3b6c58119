"""The closing table's numbers, and sentences that say what the numbers do."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from synthetic_ablations import ablation_records
from synthetic_study import LOSS, OFFSET, SWEEP, script

from peerscale.errors import exit_code
from peerscale.runs.record import write_record
from peerscale.runs.study import collected, method_names, published, read_json
from peerscale.runs.table import read_runs

table = script("table")


Tables = tuple[pd.DataFrame, dict[str, Any], pd.DataFrame]


@pytest.fixture
def study(collected_runs: Path) -> Tables:
    files = collected(SWEEP, collected_runs)
    runs = read_runs(files.runs)
    return runs.assign(name=method_names(runs)), read_json(files.fits), pd.read_csv(files.differences)


def rows_of(lines: list[str]) -> dict[tuple[str, str], list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][2:]
    return {(row[0], row[1]): row[2:] for row in cells}


def number(text: str) -> float:
    return float(text.split()[0].replace("−", "-"))


def test_numbers(study: Tables) -> None:
    runs, fits, differences = study
    rows = rows_of(table.closing_table(runs, fits, differences))
    assert len(rows) == 10
    labels = {"dense": "dense", "moe": "MoE (expert choice)", "pkm": "PKM", "peer": "PEER"}
    for budget, at in ((1e11, "1e11"), (3e11, "3e11")):
        for name, label in labels.items():
            sizes, loss, by_total, difference, _ = rows[at, label]
            mine = runs["cell"].str.startswith(f"{name}-") & (runs["budget"] == budget)
            done = runs[mine & (runs["status"] == "done")]
            assert sizes == f"{len(done)} of 5"
            for text, x in ((loss, "flops_per_token"), (by_total, "params_total")):
                c2, c1, c0 = np.polyfit(np.log10(done[x]), done["val_loss"], 2)
                assert number(text) == pytest.approx(c0 - c1**2 / (4 * c2), abs=6e-5)
                assert text.endswith("†") == (len(done) < 5)
            if name != "dense":
                # The synthetic truth, within the noise put on each size's loss.
                assert number(difference) == pytest.approx(OFFSET[budget][name], abs=0.012)
        # Sequences are shared, so that their mean difficulty moves all losses by the same.
        assert abs(number(rows[at, "dense"][1]) - LOSS[budget]) < 0.1
        assert rows[at, "dense"][3] == "reference"


def test_flags_are_in_words(study: Tables) -> None:
    rows = rows_of(table.closing_table(*study))
    assert rows["1e11", "dense"][-1] == "—"
    assert rows["1e11", "PKM"][-1] == "1 dropped; too few"
    assert rows["3e11", "MoE (expert choice)"][-1] == "1 failed; too few"
    assert rows["3e11", "PEER"][-1] == "1 diverged; too few"


def conclusions(*tables: Any) -> list[str]:
    return [line for line in table.closing_table(*tables) if line.startswith("- ")]


def test_conclusions(study: Tables) -> None:
    first, second, larger, exponent = conclusions(*study)
    assert first.startswith("- PEER leads at 1e11: −0.1") and "scatter by 0.00" in first
    assert second.startswith("- PEER does not lead at 3e11") and "+0.0" in second and "nats to dense" in second
    assert "sweeps/isoflop_cpu.yaml" in larger
    assert exponent.endswith("from three budgets on: none.")


def others(*rows: tuple[str, float, float, float]) -> pd.DataFrame:
    """Differences of other methods to PEER."""
    frame = pd.DataFrame(rows, columns=["method", "difference", "low", "high"])
    return frame.assign(note=None)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([("dense", 0.1, 0.09, 0.11)], "PEER leads at 3e11: −0.100 ± 0.010 nats to dense."),
        ([("dense", -0.004, -0.007, -0.001)], "PEER does not lead at 3e11: +0.004 ± 0.003 nats to dense."),
        ([("dense", 0.002, -0.001, 0.005)], "PEER does not lead at 3e11: −0.002 ± 0.003 nats to dense."),
        (
            [("pkm", -0.02, -0.03, -0.01), ("dense", 0.1, 0.09, 0.11)],
            "PEER does not lead at 3e11, though over dense: −0.100 ± 0.010 nats to dense; +0.020 ± 0.010 nats to PKM.",
        ),
        ([("dense", 0.1, np.nan, np.nan)], "PEER does not lead at 3e11: −0.100 ± — nats to dense."),
        ([("dense", np.nan, np.nan, np.nan)], "Whether PEER leads at 3e11 is unknown: no finished cells to compare."),
        ([], "Whether PEER leads at 3e11 is unknown: no finished cells to compare."),
    ],
)
def test_verdict(rows: list[tuple[str, float, float, float]], sentence: str) -> None:
    assert table.verdict(3e11, others(*rows)) == sentence


def test_a_lead_smaller_than_the_scatter_of_the_points_is_none() -> None:
    rows = others(("dense", 0.01, 0.008, 0.012), ("pkm", 0.1, 0.09, 0.11), ("moe", -0.01, -0.012, -0.008))
    sentence = table.verdict(3e11, rows, 0.02)
    assert sentence.startswith("PEER does not lead at 3e11, though over PKM: −0.010 ± 0.002 nats to dense;")
    assert sentence.endswith("Points scatter by 0.020 nats about the curves; less is no lead.")


def test_scatter_is_the_residual_deviation_of_all_parabolas() -> None:
    x = np.array([4.0, 5.0, 6.0, 7.0, 8.0, 9.0])  # the last is left out of both
    noise = {"dense": [0.1, -0.1, 0.2, -0.2, 0.0, 5.0], "peer": [0.0, 0.0, 0.0, 0.0, 0.3, 7.0]}
    frames, fits = [], {}
    for name, errors in noise.items():
        losses = 5 + (x - 6) ** 2 + np.array(errors)
        frames.append(pd.DataFrame({"name": name, "budget": 1e11, "flops_per_token": 10**x, "val_loss": losses}))
        coefficients = [float(c) for c in np.polyfit(x[:5], losses[:5], 2)[::-1]]
        fits[name] = {"vertices": [{"budget": 1e11, "coefficients": coefficients, "sizes": list(10 ** x[:5])}]}
    runs = pd.concat(frames).assign(status="done")
    residuals = [np.polyfit(x[:5], (x - 6)[:5] ** 2 + np.array(e[:5]), 2, full=True)[1][0] for e in noise.values()]
    assert table.scatter(runs, fits) == pytest.approx((sum(residuals) / 4) ** 0.5)


def test_exponents_are_named_where_there_are_any(study: Tables) -> None:
    runs, fits, differences = study
    changed = {**fits, "dense": {**fits["dense"], "exponent": 0.512}}
    assert conclusions(runs, changed, differences)[-1].endswith("from three budgets on: dense 0.512.")


def test_a_study_of_one_method_has_a_table(study: Tables) -> None:
    runs, fits, differences = study
    lines = table.closing_table(runs[runs["cell"].str.startswith("moe-")], fits, differences.iloc[:0])
    rows = rows_of(lines)
    assert set(rows) == {("1e11", "MoE (expert choice)"), ("3e11", "MoE (expert choice)")}
    assert rows["1e11", "MoE (expert choice)"][3] == "—"
    assert "PEER" not in "".join(lines)


def test_peer_without_rivals(study: Tables) -> None:
    runs, fits, differences = study
    lines = conclusions(runs[runs["cell"].str.startswith("peer-")], fits, differences.iloc[:0])
    assert lines[0] == "- Whether PEER leads at 1e11 is unknown: no finished cells to compare."


def test_a_study_with_nothing_finished_has_a_table(study: Tables) -> None:
    runs, _, differences = study
    rows = rows_of(table.closing_table(runs[runs["status"] != "done"], {}, differences.iloc[:0]))
    assert rows["3e11", "PEER"] == ["0 of 1", "—", "—", "—", "1 diverged"]


def test_it_prints_the_answer_and_names_the_further_tables(
    collected_runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert table.main([SWEEP, "--runs", str(collected_runs)]) == 0
    printed = capsys.readouterr().out
    written = collected(SWEEP, collected_runs).table.read_text()
    answer, further = printed.rstrip("\n").rsplit("\n", 1)
    assert written.startswith(answer)
    assert "PEER leads" in answer.splitlines()[-1] or "Exponents" in answer.splitlines()[-1]
    headings = [line.removeprefix("## ") for line in written.splitlines() if line.startswith("## ")]
    assert further == f"Further tables in {collected(SWEEP, collected_runs).table}: {'; '.join(headings)}"
    assert (
        "The interval covers the sampling of validation sequences, not seeds nor the choice of learning rate."
        in printed
    )


def test_the_papers_table_1_and_other_conventions_follow(
    collected_runs: Path,
) -> None:
    table.main([SWEEP, "--runs", str(collected_runs)])
    printed = collected(SWEEP, collected_runs).table.read_text()
    assert "| 6e18 | PEER | 20.63 | 20.68 | 17.65 | 19.01 | 25.48 | −0.145 |" in printed
    assert "c4, curation_corpus, lambada, pile, wikitext are absent here" in printed
    assert "## Ranking under other FLOP conventions" in printed
    assert "table 2" not in printed


def test_settings_of_one_size_are_compared_with_dense_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for record in ablation_records("experts"):
        folder = tmp_path / "experts" / record.cell
        folder.mkdir(parents=True)
        write_record(folder, record)
    arguments = ["experts", "--runs", str(tmp_path)]
    assert script("collect").main(arguments) == 0 and table.main(arguments) == 0
    printed = capsys.readouterr().out
    losses = {record.cell: np.array(record.sequence_losses) for record in ablation_records("experts")}
    paired = losses["peer-d64-3e12-n_experts=4096-s0"] - losses["dense-d64-3e12-s0"]
    (line,) = (line for line in printed.splitlines() if line.startswith("| d64, 3e12 | PEER n_experts=4096 |"))
    difference, low, high = (float(text.strip("[],").replace("−", "-")) for text in line.split("|")[7].split())
    # The bootstrap's interval of a mean of paired differences is the normal one.
    half = 1.96 * paired.std(ddof=1) / len(paired) ** 0.5
    assert (difference, low, high) == pytest.approx(
        (paired.mean(), paired.mean() - half, paired.mean() + half), abs=2e-3
    )
    assert line.split("|")[4].strip() == f"{losses['peer-d64-3e12-n_experts=4096-s0'].mean():.4f}"
    assert "| 16,384 | — / " in printed and "23.47 / 23.47" in printed


def test_rates_are_listed_best_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published("lr", tmp_path).folder.mkdir()
    shutil.copyfile(published("lr").runs, published("lr", tmp_path).runs)
    arguments = ["lr", "--runs", str(tmp_path / "none"), "--results", str(tmp_path)]
    assert script("collect").main(arguments) == 0, "a table without records is left as it is"
    assert table.main(arguments) == 0
    printed = capsys.readouterr().out
    means = [
        float(line.split("|")[-2]) for line in printed.partition("## PEER")[2].splitlines() if line.startswith("| 0")
    ]
    assert len(means) >= 9
    assert means[0] == min(means)
    assert "on the tuning set" in printed


def test_an_uncollected_study_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["absent", "--runs", str(tmp_path), "--results", str(tmp_path)]
    assert exit_code(lambda: table.main(arguments)) == 2
    assert "first: make figures SWEEP=absent" in capsys.readouterr().err
