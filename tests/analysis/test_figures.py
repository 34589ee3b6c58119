"""Figures come from the tables alone, in any order of events, and repeat."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from synthetic_ablations import ablation_runs
from synthetic_study import SWEEP

from peerscale.errors import exit_code
from peerscale.figures.figures import study_figures
from peerscale.files import write_json
from peerscale.records.study import StudyFolder, collected, published
from peerscale.records.table import read_runs
from peerscale.stats.collection import fits_of
from programs import program as script

figures = script("figures")
SCRIPT = Path(__file__).parents[2] / "analysis" / "figures.py"


@pytest.fixture
def runs(collected_runs: Path, tmp_path: Path) -> Path:
    """The collected study's tables only, without its cells."""
    shutil.copytree(collected(SWEEP, collected_runs).folder, collected(SWEEP, tmp_path).folder)
    return tmp_path


def drawn(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_bytes_from_a_second_process(runs: Path) -> None:
    assert figures.main([SWEEP, "--runs", str(runs)]) == 0
    first = drawn(collected(SWEEP, runs).figures)
    names = ("isoflop", "curves", "differences", "multipliers")
    assert set(first) == {f"{name}.{kind}" for name in names for kind in ("png", "pdf")}
    environment = {**os.environ, "PYTHONHASHSEED": "5"}
    subprocess.run([sys.executable, SCRIPT, SWEEP, "--runs", runs], check=True, env=environment, capture_output=True)
    assert drawn(collected(SWEEP, runs).figures) == first


def test_a_published_table_alone_is_enough_with_another_meaning_of_size(runs: Path, tmp_path: Path) -> None:
    """Without curves there is no figure of them. What is committed stays as it is: figures go to one's own runs."""
    target = published(SWEEP, tmp_path / "results")
    target.folder.parent.mkdir()
    collected(SWEEP, runs).folder.rename(target.folder)
    target.curves.unlink()
    committed = {path: path.read_bytes() for path in (tmp_path / "results").rglob("*") if path.is_file()}
    options = ["--x", "flops_per_token", "--runs", str(tmp_path / "none"), "--results", str(tmp_path / "results")]
    assert figures.main([SWEEP, *options]) == 0
    names = ("isoflop_flops_per_token", "differences", "multipliers")
    own = collected(SWEEP, tmp_path / "none")
    assert set(drawn(own.figures)) == {f"{name}.{kind}" for name in names for kind in ("png", "pdf")}
    assert own.table.is_file() and not own.runs.exists()
    main_table = own.table.read_text().split("\n## ")[0]
    for line in csv.reader(own.csv.open()):
        assert f"| {' | '.join(line)} |" in main_table
    assert {path: path.read_bytes() for path in (tmp_path / "results").rglob("*") if path.is_file()} == committed


def fitted(sweep: str, runs: pd.DataFrame, folder: Path) -> StudyFolder:
    """The study in a folder, with its table of runs and its fits."""
    study = collected(sweep, folder)
    study.folder.mkdir(parents=True)
    runs.to_csv(study.runs, index=False)
    write_json(study.fits, fits_of(sweep, runs, []))
    return study


@pytest.mark.parametrize(("sweep", "names"), [("active", {"active"}), ("experts", {"experts", "query_norm"})])
def test_what_a_study_varies_decides_its_figures(sweep: str, names: set[str], tmp_path: Path) -> None:
    study = fitted(sweep, ablation_runs(sweep), tmp_path)
    assert figures.main([sweep, "--runs", str(tmp_path)]) == 0
    assert set(drawn(study.figures)) == {f"{name}.{kind}" for name in names for kind in ("png", "pdf")}


@pytest.mark.parametrize("method, norm", [("moe", None), ("peer", False), ("pkm", True)])
def test_settings_that_the_papers_figures_do_not_show_are_compared_with_dense(
    method: str, norm: bool | None, tmp_path: Path
) -> None:
    """Experts of MoE, of PEER without BatchNorm, and PKM with and without: each draws differences, and only these."""
    runs = ablation_runs("experts")
    dense, peer = runs[runs["method"] == "dense"], runs[(runs["method"] == "peer") & (runs["seed"] == 0)]
    rows = peer[(peer["query_norm"].astype(str) == str(norm is not False)) | (method == "pkm")]
    rows = rows.assign(method=method, query_norm=None if method == "moe" else rows["query_norm"])
    rows = rows[rows["n_experts"] == 1024] if method == "pkm" else rows
    study = fitted("mine", pd.concat([dense, rows]), tmp_path)
    assert figures.main(["mine", "--runs", str(tmp_path)]) == 0
    assert set(drawn(study.figures)) == {"differences.png", "differences.pdf"}


def test_two_settings_of_which_a_figure_shows_one_are_compared_with_dense(tmp_path: Path) -> None:
    """Heads and top k drawn over experts would be taken for seeds, and experts for seeds over heads."""
    runs = ablation_runs("experts")
    peer = runs[(runs["method"] == "peer") & (runs["query_norm"].astype(str) == "True")]
    both = pd.concat([runs[runs["method"] == "dense"], peer, peer.assign(ffn_heads=1, cell=peer["cell"] + "-1")])
    settings = [
        {"ffn.n_experts": n, "ffn.n_heads": h} for n, h in zip(peer["n_experts"], peer["ffn_heads"], strict=True)
    ]
    one = [{**each, "ffn.n_heads": 1} for each in settings]
    both["settings"] = [json.dumps({})] * (len(both) - 2 * len(peer)) + [json.dumps(each) for each in settings + one]
    study = fitted("mine", both, tmp_path)
    assert figures.main(["mine", "--runs", str(tmp_path)]) == 0
    assert set(drawn(study.figures)) == {"differences.png", "differences.pdf"}


def test_figures_of_former_settings_go_unless_another_meaning_of_size_is_asked_for(tmp_path: Path) -> None:
    study = fitted("active", ablation_runs("active"), tmp_path)
    study.figures.mkdir()
    former = study.figures / "experts.png"
    former.write_bytes(b"former")
    new = {"active.png", "active.pdf"}
    assert figures.main(["active", "--runs", str(tmp_path), "--x", "params_active"]) == 0
    assert set(drawn(study.figures)) == {*new, "experts.png"} and former.read_bytes() == b"former"
    assert figures.main(["active", "--runs", str(tmp_path)]) == 0
    assert set(drawn(study.figures)) == new


def test_cells_that_differ_in_their_rates_are_not_drawn_as_seeds(tmp_path: Path) -> None:
    study = collected("rates", tmp_path)
    study.folder.mkdir(parents=True)
    for name in ("runs.csv", "fits.json"):
        shutil.copyfile(published("rates").folder / name, study.folder / name)
    assert figures.main(["rates", "--runs", str(tmp_path)]) == 0
    assert set(drawn(study.figures)) == {"rates.png", "rates.pdf"}


def test_no_finished_cell_is_one_clear_line(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = collected(SWEEP, runs)
    table = pd.read_csv(study.runs)
    table[table["status"] != "done"].to_csv(study.runs, index=False)
    assert exit_code(lambda: figures.main([SWEEP, "--runs", str(runs)])) == 2
    assert capsys.readouterr().err == "error: study 'synthetic' has no finished cell to draw\n"


def test_a_figure_has_small_print_and_all_of_it_is_on_the_page() -> None:
    study = published("every_block")
    for name, figure in study_figures(study, read_runs(study.runs)):
        figure.draw_without_rendering()
        box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert box.x0 >= -0.01 and box.x1 <= width + 0.01 and box.y0 >= -0.01 and box.y1 <= height + 0.01
        note = figure.get_supxlabel().replace("\n", " ")
        assert note.endswith("gutenberg, validation set")
        assert note.startswith("bars: 95 %" if name == "differences" else ("star:", "lines:"))
