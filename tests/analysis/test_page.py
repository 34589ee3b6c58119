"""The page holds what the studies' files hold, escapes all of it, and loads nothing."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import vl_convert
from synthetic_study import GRID, METHODS, SWEEP, minimum, shared_curvature

from peerscale.errors import exit_code
from peerscale.figures.answer import answer
from peerscale.figures.page import chart_rows, isoflop_chart
from peerscale.records.study import collected
from peerscale.records.table import read_runs
from peerscale.stats.curve import Curve, finished
from peerscale.stats.fits import read_fits
from programs import program as script

LABELS = ("dense", "MoE (expert choice)", "MoE (token choice)", "PKM", "PEER")
EVIL = "</script><script>alert(1)</script>$library"
QUESTION = 'Is ![this](/etc/passwd) or <img src="file:///etc/passwd"> shown?'
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


class Read(HTMLParser):
    """Tags by name, addresses, and the text outside scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.addresses, self.texts = list[str](), list[str](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] != ["script"]:
            self.texts.append(data)


@pytest.fixture(scope="module")
def study(collected_runs: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    files = collected(SWEEP, collected_runs)
    return finished(read_runs(files.runs)), read_fits(files.fits)


@pytest.fixture(scope="module")
def source(collected_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of two studies, the second with a file in its question and script in its claims, cells and methods."""
    folder = tmp_path_factory.mktemp("page")
    for name in ("one", "two"):
        shutil.copytree(collected(SWEEP, collected_runs).folder, folder / name)
    fits = json.loads((folder / "two" / "fits.json").read_text())
    fits["curves"]["peer"]["method"] = EVIL
    (folder / "two" / "fits.json").write_text(json.dumps(fits))
    runs = pd.read_csv(folder / "two" / "runs.csv")
    runs.assign(cell=EVIL, variant=EVIL).to_csv(folder / "two" / "runs.csv", index=False)
    (folder / "standing").mkdir()
    (folder / "standing" / "table.csv").write_text("entrant,difference\nan entrant,-0.0123456\n")
    with pytest.MonkeyPatch.context() as patch:
        questions = {"two": f"# Question: {QUESTION}\nsweep: {{}}\n"}
        patch.setattr("peerscale.figures.page.sweep_text", lambda sweep: questions.get(sweep, ""))
        assert script("page").main(["--results", str(folder), "--out", str(folder / "page.html")]) == 0
    return (folder / "page.html").read_text(encoding="utf-8")


def text_of(read: Read) -> str:
    return " ".join(read.texts)


def test_every_study_has_its_answer_its_curves_and_its_table(source: str, study: tuple[pd.DataFrame, Any]) -> None:
    read = Read(source)
    assert read.tags.count("section") == read.tags.count("table") == 3 and read.tags.count("script") == 4
    assert source.index("The standing table") < source.index("<h2>one</h2>") and "an entrant" in text_of(read)
    text = text_of(read)
    assert answer(study[1]) in text and source.count('vegaEmbed("#figure-') == 2
    rows = source.partition("<h2>one</h2>")[2].partition("</section>")[0].partition("<tbody>")[2].split("</tr>")[:-1]
    shown = [re.findall("<td>(.*?)</td>", row)[:2] for row in rows]
    assert shown == [[budget, label] for budget in ("1e11", "3e11") for label in LABELS]


def test_what_files_say_is_text_and_nothing_is_loaded(source: str) -> None:
    read = Read(source)
    (readme,) = read.addresses
    assert readme.endswith("README.md") and "default-src 'none'" in source
    assert "alert(1)" in "".join(read.texts) and html.escape(EVIL) in source and source.count("<script>alert") == 0
    spec = json.loads(source.rpartition('vegaEmbed("#figure-two", ')[2].partition(", {renderer")[0])
    assert EVIL in json.dumps(spec)
    assert f"Question: {QUESTION}" in "".join(read.texts) and "img" not in read.tags


def test_points_curves_and_optima_are_those_of_the_files(study: tuple[pd.DataFrame, dict[str, Any]]) -> None:
    runs, fits = study
    marks = pd.DataFrame(chart_rows(runs, fits))
    done = runs[runs["status"] == "done"].set_index("cell")
    points = marks[marks["kind"] == "fitted"].set_index("cell")
    assert {*points.index} == {*done.index}
    np.testing.assert_allclose(points["perplexity"], np.exp(done.loc[points.index, "val_loss"]))
    np.testing.assert_allclose(points["params_total"], done.loc[points.index, "params_total"])
    for budget, title in zip(GRID, ("1e11 FLOPs", "3e11 FLOPs"), strict=True):
        rows = {name: done[(done["curve"] == Curve(name)) & (done["budget"] == budget)] for name in METHODS}
        curves = shared_curvature({name: (of["flops_per_token"], of["val_loss"]) for name, of in rows.items()})
        for name, label in zip(METHODS, LABELS, strict=True):
            mine = marks[(marks["budget"] == title) & (marks["method"] == label)]
            curve, optimum = mine[mine["kind"] == "curve"], mine[mine["kind"].str.contains("optimum")].iloc[0]
            wanted = np.polynomial.Polynomial(curves[name])(np.log10(curve["flops_per_token"].astype(float)))
            np.testing.assert_allclose(np.log(curve["perplexity"]), wanted, atol=1e-6)
            x, loss = minimum(curves[name])
            assert (optimum["flops_per_token"], np.log(optimum["perplexity"])) == pytest.approx((x, loss), rel=1e-5)


def test_it_is_drawn(study: tuple[pd.DataFrame, dict[str, Any]]) -> None:
    """Panels in the order of the budgets, a mark for every finished cell."""
    svg = vl_convert.vegalite_to_svg(isoflop_chart(*study).to_json())
    assert svg.index("1e11 FLOPs") < svg.index("3e11 FLOPs")
    assert all(f">{label}</text>" in svg for label in LABELS)
    for cell in study[0].loc[study[0]["status"] == "done", "cell"]:
        assert cell in svg


def opened(page: str, folder: Path) -> tuple[str, list[str]]:
    """The page as a headless browser shows it, and what the browser wrote to its console."""
    (folder / "page.html").write_text(page, encoding="utf-8")
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr",
        "--virtual-time-budget=30000", "--dump-dom",
    ]  # fmt: skip
    command = [BROWSER or "", *options, (folder / "page.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return shown.stdout, [line for line in shown.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(BROWSERS)} is installed")
def test_a_browser_draws_it_without_a_complaint_or_a_request(
    source: str, study: tuple[pd.DataFrame, dict[str, Any]], tmp_path: Path
) -> None:
    """The page forbids itself all requests, and the browser says so in the console if there is one."""
    shown, console = opened(source, tmp_path)
    assert [line for line in console if "WARN Infinite extent" not in line] == []  # the second study has no curves
    charts = re.findall(r'<svg [^>]*class="marks".*?</svg>', shown, flags=re.DOTALL)
    assert len(charts) == 2
    for cell in study[0]["cell"]:
        assert cell in charts[0]
    _, console = opened(source.replace("</html>", '<img src="https://example.org/x.png"></html>'), tmp_path)
    assert any("https://example.org/x.png" in line for line in console)


def test_without_studies_it_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(lambda: script("page").main(["--results", str(tmp_path)])) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: no committed studies\n"
