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
from peerscale.runs.study import collected, published, read_json

table = script("table")


@pytest.fixture
def study(collected_runs: Path) -> tuple[pd.DataFrame, dict[str, Any], pd.DataFrame]:
    files = collected(SWEEP, collected_runs)
    return pd.read_csv(files.runs), read_json(files.fits), pd.read_csv(files.differences)


def rows_of(text: str) -> dict[tuple[str, str], list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")][2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {(row[0], row[1]): row[2:] for row in cells}


def number(text: str) -> float:
    return float(text.split()[0].replace("−", "-"))


def test_numbers(study: tuple[pd.DataFrame, dict[str, Any], pd.DataFrame]) -> None:
    runs, fits, differences = study
    rows = rows_of(table.report(SWEEP, runs, fits, differences))
    assert len(rows) == 10
    labels = {"dense": "dense", "moe": "MoE (expert choice)", "pkm": "PKM", "peer": "PEER"}
    for budget, at in ((1e11, "1e11"), (3e11, "3e11")):
        for name, label in labels.items():
            sizes, loss, by_total, best, difference, _ = rows[at, label]
            mine = runs["cell"].str.startswith(f"{name}-") & (runs["budget"] == budget)
            done = runs[mine & (runs["status"] == "done")]
            assert sizes == f"{len(done)} of 5"
            for text, x in ((loss, "flops_per_token"), (by_total, "params_total")):
                c2, c1, c0 = np.polyfit(np.log10(done[x]), done["val_loss"], 2)
                assert float(text) == pytest.approx(c0 - c1**2 / (4 * c2), abs=6e-5)
            lowest = done.loc[done["val_loss"].idxmin()]
            assert best == f"{lowest['size']}: {lowest['val_loss']:.4f}"
            if name != "dense":
                # The synthetic truth, within the noise put on each size's loss.
                assert number(difference) == pytest.approx(OFFSET[budget][name], abs=0.012)
        # Sequences are shared, so that their mean difficulty moves all losses by the same.
        assert abs(float(rows[at, "dense"][1]) - LOSS[budget]) < 0.1
        assert rows[at, "dense"][4] == "reference"


def test_flags_are_in_words(study: tuple[pd.DataFrame, dict[str, Any], pd.DataFrame]) -> None:
    rows = rows_of(table.report(SWEEP, *study))
    assert rows["1e11", "dense"][-1] == "—"
    assert rows["1e11", "PKM"][-1] == "1 dropped; fewer than five sizes"
    assert rows["3e11", "MoE (expert choice)"][-1] == "1 failed; fewer than five sizes"
    assert rows["3e11", "PEER"][-1] == "1 diverged; fewer than five sizes"


def test_conclusions(study: tuple[pd.DataFrame, dict[str, Any], pd.DataFrame]) -> None:
    first, second, larger, exponent = table.conclusions(*study)
    assert first.startswith("- PEER leads at 1e11: −0.1")
    assert "Flagged: PKM: fewer than five sizes." in first
    assert second.startswith("- PEER does not lead at 3e11: +0.0") and "over dense" in second
    assert "Flagged: PEER: fewer than five sizes" in second
    assert "sweeps/isoflop_cpu.yaml" in larger
    assert exponent == "- No scaling exponent is fitted from 2 budgets: a power law wants 3."


def others(*rows: tuple[str, float, float, float]) -> pd.DataFrame:
    """Differences of other methods to PEER."""
    frame = pd.DataFrame(rows, columns=["method", "difference", "low", "high"])
    return frame.assign(note=None)


@pytest.mark.parametrize(
    ("rows", "sentence", "leads"),
    [
        ([("dense", 0.1, 0.09, 0.11)], "PEER leads at 3e11: −0.100 ± 0.010 nats to dense.", True),
        ([("dense", -0.004, -0.007, -0.001)], "PEER does not lead at 3e11: +0.004 ± 0.003 nats over dense.", False),
        (
            [("dense", 0.002, -0.001, 0.005)],
            "PEER does not lead at 3e11: −0.002 ± 0.003 nats to dense, no clear difference.",
            False,
        ),
        (
            [("dense", 0.1, 0.09, 0.11), ("pkm", -0.02, -0.03, -0.01)],
            "PEER does not lead at 3e11: +0.020 ± 0.010 nats over PKM. "
            "It leads the others: −0.100 ± 0.010 nats to dense.",
            False,
        ),
        (
            [("dense", 0.1, np.nan, np.nan)],
            "PEER does not lead at 3e11: −0.100 (no interval) nats to dense, no clear difference.",
            False,
        ),
        (
            [("dense", np.nan, np.nan, np.nan)],
            "Whether PEER leads at 3e11 is unknown: no finished cells to compare.",
            False,
        ),
        ([], "Whether PEER leads at 3e11 is unknown: no finished cells to compare.", False),
    ],
)
def test_verdict(rows: list[tuple[str, float, float, float]], sentence: str, leads: bool) -> None:
    assert table.verdict(3e11, others(*rows)) == (sentence, leads)


def test_a_lead_smaller_than_the_scatter_of_the_points_is_none() -> None:
    rows = others(("dense", 0.01, 0.008, 0.012), ("pkm", 0.1, 0.09, 0.11), ("moe", -0.01, -0.012, -0.008))
    sentence, leads = table.verdict(3e11, rows, 0.02)
    assert not leads
    assert "−0.010 ± 0.002 nats to dense, within the scatter" in sentence
    assert "+0.010 ± 0.002 nats over MoE (expert choice), within the scatter" in sentence
    assert "It leads the others: −0.100 ± 0.010 nats to PKM." in sentence
    assert sentence.endswith("Points, of one seed each, scatter by 0.020 nats about the curves.")


def test_scatter_is_the_residual_deviation_of_all_parabolas() -> None:
    x = np.array([4.0, 5.0, 6.0, 7.0, 8.0])
    noise = {"dense": [0.1, -0.1, 0.2, -0.2, 0.0], "peer": [0.0, 0.0, 0.0, 0.0, 0.3]}
    frames, fits = [], {}
    for name, errors in noise.items():
        losses = 5 + (x - 6) ** 2 + np.array(errors)
        frames.append(pd.DataFrame({"name": name, "budget": 1e11, "flops_per_token": 10**x, "val_loss": losses}))
        fits[name] = {
            "vertices": [{"budget": 1e11, "coefficients": [float(c) for c in np.polyfit(x, losses, 2)[::-1]]}]
        }
    runs = pd.concat(frames).assign(status="done")
    residuals = [np.polyfit(x, 5 + (x - 6) ** 2 + np.array(e), 2, full=True)[1][0] for e in noise.values()]
    assert table.scatter(1e11, runs, fits) == pytest.approx((sum(residuals) / 4) ** 0.5)


def test_exponents_are_named_where_there_are_any(study: tuple[pd.DataFrame, dict[str, Any], pd.DataFrame]) -> None:
    runs, fits, differences = study
    changed = {**fits, "dense": {**fits["dense"], "exponent": 0.512}}
    lines = table.conclusions(runs, changed, differences)
    assert lines[-1] == "- Exponents of the optimal FLOPs per token in the budget: dense 0.512."


def test_a_study_of_one_method_has_a_table(study: tuple[pd.DataFrame, dict[str, Any], pd.DataFrame]) -> None:
    runs, fits, differences = study
    text = table.report(SWEEP, runs[runs["cell"].str.startswith("moe-")], fits, differences.iloc[:0])
    rows = rows_of(text)
    assert set(rows) == {("1e11", "MoE (expert choice)"), ("3e11", "MoE (expert choice)")}
    assert rows["1e11", "MoE (expert choice)"][4] == "—"
    assert "PEER" not in text


def test_peer_without_rivals(study: tuple[pd.DataFrame, dict[str, Any], pd.DataFrame]) -> None:
    runs, fits, differences = study
    text = table.report(SWEEP, runs[runs["cell"].str.startswith("peer-")], fits, differences.iloc[:0])
    assert "Whether PEER leads at 1e11 is unknown: no finished cells to compare." in text


def test_a_study_with_nothing_finished_has_a_table(study: tuple[pd.DataFrame, dict[str, Any], pd.DataFrame]) -> None:
    runs, _, differences = study
    rows = rows_of(table.report(SWEEP, runs[runs["status"] != "done"], {}, differences.iloc[:0]))
    assert rows["3e11", "PEER"] == ["0 of 1", "—", "—", "—", "—", "1 diverged"]


def test_it_prints_what_it_writes(collected_runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert table.main([SWEEP, "--runs", str(collected_runs)]) == 0
    printed = capsys.readouterr().out
    assert collected(SWEEP, collected_runs).table.read_text() == printed
    assert (
        "The interval covers the sampling of validation sequences, not seeds nor the choice of learning rate."
        in printed
    )


def test_the_papers_table_1_and_other_conventions_follow(
    collected_runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table.main([SWEEP, "--runs", str(collected_runs)])
    printed = capsys.readouterr().out
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
    assert "analysis/collect.py absent" in capsys.readouterr().err
