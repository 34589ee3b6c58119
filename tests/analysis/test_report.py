"""The page holds what the study's files hold, loads nothing, names what is missing, and fits on a desk and a phone."""

import base64
import html
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.figure import Figure
from synthetic_study import SWEEP, WRONG, script

from peerscale.config.compose import header
from peerscale.errors import exit_code
from peerscale.figures.answer import answer
from peerscale.figures.study_table import study_table
from peerscale.files import ROOT
from peerscale.records.record import Status
from peerscale.records.study import Study, collected, published, read_fits
from peerscale.records.table import read_runs

report = script("report")
SCRIPT = ROOT / "analysis" / "report.py"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TITLE = "validation perplexity against"


class Page(HTMLParser):
    """Tables as rows of texts, addresses, and the text that is read."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.addresses: list[str] = []
        self.texts: list[str] = []
        self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.in_cell = tag in ("td", "th")
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif self.in_cell:
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = False

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.in_cell:
            self.tables[-1][-1][-1] += data

    def table(self, *headings: str) -> list[dict[str, str]]:
        """The rows of the first table with these headings."""
        found = next(rows for rows in self.tables if set(headings) <= set(rows[0]))
        return [dict(zip(found[0], row, strict=True)) for row in found[1:]]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def without_scripts(source: str) -> str:
    return re.sub(r"<script>.*?</script>", "", source, flags=re.DOTALL)


@pytest.fixture(scope="module")
def study(collected_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The collected study with a cell resumed elsewhere, a table and two figures; tests leave it as it is."""
    runs = tmp_path_factory.mktemp("report")
    found = collected(SWEEP, runs)
    shutil.copytree(collected(SWEEP, collected_runs).folder, found.folder)
    records = [json.loads(line) for line in found.records.read_text().splitlines()]
    records[0]["bit_exact"] = False
    next(r for r in records if r["status"] == Status.FAILED)["reason"] = "a <script>alert(1)</script> in it"
    found.records.write_text("".join(json.dumps(record) + "\n" for record in records))
    table = pd.read_csv(found.runs)
    table.loc[table["status"] == Status.FAILED, "reason"] = "a <script>alert(1)</script> in it"
    table.to_csv(found.runs, index=False)
    found.figures.mkdir(exist_ok=True)
    for i, name in enumerate(("another_one", "isoflop")):
        Figure(figsize=(5.5, 2 + i), facecolor="#eeeeff").savefig(found.figures / f"{name}.png", dpi=220)
    found.table.write_text(study_table(SWEEP, read_runs(found.runs), read_fits(found.fits)))
    assert report.main([SWEEP, "--runs", str(runs)]) == 0
    return found


@pytest.fixture(scope="module")
def source(study: Study) -> str:
    return (study.folder / "report.html").read_text()


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def test_every_cell_with_its_loss(study: Study, page: Page) -> None:
    runs = pd.read_csv(study.runs)
    shown = {row["cell"]: row for row in page.table("cell", "loss, nats per token")}
    assert list(shown) == runs["cell"].tolist()
    for cell, status, loss, tokens in zip(runs["cell"], runs["status"], runs["val_loss"], runs["tokens"], strict=True):
        assert shown[cell]["status"] == status
        assert shown[cell]["loss, nats per token"] == ("—" if loss != loss else f"{loss:.4f}")
        assert shown[cell]["tokens"] == f"{tokens:,}"


def test_cells_gone_wrong_with_reasons_and_cells_resumed_elsewhere(page: Page) -> None:
    rows = {row["cell"]: row for row in page.table("cell", "reason")}
    assert {cell: row["status"] for cell, row in rows.items()} == {cell: str(status) for cell, status in WRONG.items()}
    reasons = {row["status"]: row["reason"] for row in rows.values()}
    assert "epochs" in reasons["dropped"] and reasons["diverged"] == "the training loss is nan at step 40"
    assert reasons["failed"] == "a <script>alert(1)</script> in it"
    assert any(table == [["cell"], ["dense-d8-1e11-s0"]] for table in page.tables)


def test_results_are_the_tables_of_table_md(study: Study, page: Page) -> None:
    lines = [line for line in study.table.read_text().splitlines() if line.startswith("|") and "---" not in line]
    written = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    shown = [row for rows in page.tables for row in rows]
    begin = shown.index(written[0])
    assert shown[begin : begin + len(written)] == written and len(written) > 50


def test_the_command_of_a_fit_runs(study: Study, source: str, tmp_path: Path) -> None:
    command = html.unescape(re.findall(r"<pre><code>(.*?)</code></pre>", source, re.DOTALL)[-1]).replace("\\\n", "")
    words = [str(study.folder) if word == f"runs/{SWEEP}/study" else word for word in shlex.split(command)]
    assert words[:2] == [".venv/bin/python", "analysis/fit.py"] and words[-2:] == ["--out", "fit.json"]
    assert script("fit").main([*words[2:-1], str(tmp_path / "fit.json")]) in (None, 0)
    assert len(json.loads((tmp_path / "fit.json").read_text())["vertices"]) == 2


def test_the_command_of_a_fit_names_the_curve(study: Study, tmp_path: Path) -> None:
    """Of a variant it is not the method; without two budgets there is no command."""
    found = collected(SWEEP, tmp_path)
    shutil.copytree(study.folder, found.folder)
    runs = read_runs(study.runs)
    of_variant = runs[runs["method"] == "peer"].assign(variant="mine")
    for rows, budgets in ((of_variant, 2), (of_variant[of_variant["budget"] == 1e11], 1)):
        rows.to_csv(found.runs, index=False)
        assert report.main([SWEEP, "--runs", str(tmp_path)]) == 0
        page = html.unescape((found.folder / "report.html").read_text())
        assert ("--where \"method == 'peer_mine'\" " in page, "analysis/fit.py isoflop" in page) == (budgets == 2,) * 2


def test_the_page_opens_with_the_answer_and_then_figure_1(study: Study, source: str) -> None:
    body = without_scripts(source).partition("<body>")[2]
    sentence = html.escape(answer(json.loads(study.fits.read_text())), quote=False)
    opening = rf'\s*<h1>{SWEEP}</h1>\s*<p class="answer">{re.escape(sentence)}</p>\s*<figure>.*?figures/isoflop\.png'
    assert re.match(opening, body, re.DOTALL)
    assert "<table" not in body[: body.index("<nav>")] and body.count("<p", 0, body.index("<figure>")) == 1
    assert sentence.startswith("At 3e11 FLOPs PEER ") and "at 1e11 it leads dense" in sentence


def test_a_study_without_claims_says_so_in_its_place(study: Study, tmp_path: Path) -> None:
    found = collected(SWEEP, tmp_path)
    shutil.copytree(study.folder, found.folder)
    fits = json.loads(study.fits.read_text())
    found.fits.write_text(json.dumps({**fits, "claims": [], "answer": answer({**fits, "claims": []})}))
    assert report.main([SWEEP, "--runs", str(tmp_path)]) == 0
    body = (found.folder / "report.html").read_text().partition("<body>")[2]
    assert '<p class="answer">No claim yet: no comparison of sweep.claims' in body.partition("<figure>")[0]


def test_every_table_has_headings_to_sort_by(source: str) -> None:
    tables = re.findall(r"<table>(.*?)</table>", without_scripts(source), re.DOTALL)
    assert len(tables) > 10
    for table in tables:
        assert re.match(r"\s*<thead>\s*<tr>(\s*<th[^>]*>[^<]*</th>)+\s*</tr>\s*</thead>\s*<tbody>", table), table[:300]


def test_figures_are_embedded_whole_and_nothing_is_loaded(study: Study, source: str, page: Page) -> None:
    images = [a.removeprefix("data:image/png;base64,") for a in page.addresses if a.startswith("data:image")]
    names = ("isoflop.png", "another_one.png")  # known figures first
    assert [base64.b64decode(image) for image in images] == [(study.figures / n).read_bytes() for n in names]
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert not re.search(r"@import|url\(|https?:|fetch\(", re.sub(r"base64,[\w+/=]+", "", without_scripts(source)))
    assert "default-src 'none'" in source  # so that a browser refuses what this test overlooks
    ids = set(re.findall(r'id="(\w+)"', source))
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= ids


def test_setup_recipe_and_versions(page: Page) -> None:
    rows = page.table("setting", "PEER")
    settings = {row["setting"]: row for row in rows}
    assert settings["ffn.top_k"] == {
        "setting": "ffn.top_k", "dense": "—", "MoE (expert choice)": "1", "MoE (token choice)": "1", "PKM": "32",
        "PEER": "16",
    }  # fmt: skip
    assert settings["budget"]["dense"] == "1e11, 3e11"
    assert len({*settings["optim.weight_decay"].values()}) == 2, "its name, and one value for all"
    assert list(settings).index("ffn.top_k") < list(settings).index("optim.weight_decay"), "what differs comes first"
    for told in (
        "per-operation, full attention, backward 2x",
        "0123456789ab",
        "At 1e11 FLOPs PEER leads dense",
        "kernel native",
    ):
        assert told in page.text


def test_the_question_is_the_opening_comment() -> None:
    text = "# Question: is a\n#           b? See: there.\n# Command:  make x\nsweep: {}\n# Late: no\n"
    assert header(text) == {"Question": "is a b? See: there.", "Command": "make x"}
    assert header("# just words\n# and more: so\nx: 1\n") == {"Question": "just words and more: so"}
    assert header("x: 1\n") == {}


def test_what_is_not_there_is_named(study: Study, tmp_path: Path) -> None:
    bare = published("unknown", tmp_path)
    bare.folder.mkdir()
    shutil.copyfile(study.runs, bare.runs)
    assert report.main(["unknown", "--runs", str(tmp_path / "none"), "--results", str(tmp_path)]) == 0
    page = Page((bare.folder / "report.html").read_text())
    for name in ("sweeps/unknown.yaml", "records.jsonl", "table.md"):
        assert f"{name} is not there" in page.text
    assert len(page.table("cell", "loss, nats per token")) == 50


def test_no_study_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["nowhere", "--runs", str(tmp_path), "--results", str(tmp_path)]
    assert exit_code(lambda: report.main(arguments)) == 2
    assert "first: make figures SWEEP=nowhere" in capsys.readouterr().err


def test_the_same_bytes_from_a_second_process(study: Study, source: str) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "5"}
    runs = study.folder.parents[1]
    subprocess.run([sys.executable, SCRIPT, SWEEP, "--runs", runs], check=True, env=environment, capture_output=True)
    assert (study.folder / "report.html").read_text() == source


def told_by_browser(path: Path) -> dict[str, Any]:
    """The JSON that a page's scripts leave in its only paragraph."""
    assert CHROMIUM is not None
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += f" --disable-component-update --disable-sync --user-data-dir={path.parent / 'profile'} --hide-scrollbars"
    command = [CHROMIUM, *flags.split(), "--virtual-time-budget=20000", "--dump-dom", f"file://{path}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    dumped = re.search(r"<p>(\{.*\})</p>", done.stdout)
    assert dumped is not None, done.stderr[-2000:]
    return json.loads(html.unescape(dumped[1]))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path: apt-get install chromium")
def test_figure_1_changes_its_axis_and_switches_methods_and_budgets(study: Study, source: str, tmp_path: Path) -> None:
    act = """
    const settled = () => new Promise(done => setTimeout(done, 500));
    const labels = role => [...document.querySelectorAll(`#figure-1 svg [aria-roledescription="${role}"]`)];
    const look = () => ({
      points: labels("point").map(point => point.getAttribute("aria-label")),
      curves: document.querySelectorAll("#figure-1 svg .mark-line.role-mark path").length,
      titles: [...document.querySelectorAll("#figure-1 svg .role-title-text")].map(title => title.textContent),
    });
    const boxes = () => [...document.querySelectorAll(".vega-bind label")];
    const box = name => boxes().find(label => label.textContent.trim() === name).querySelector("input");
    const found = { refused: [] };
    addEventListener("securitypolicyviolation", event => found.refused.push(event.violatedDirective));
    addEventListener("load", async () => {
      while (!document.querySelector("#figure-1 svg")) await settled();
      found.first = look();
      box("PEER").click();
      box("1e11 FLOPs").click();
      await settled();
      found.fewer = look();
      const axis = document.querySelector(".vega-bind select");
      axis.value = "wall_s";
      axis.dispatchEvent(new Event("input"));
      axis.dispatchEvent(new Event("change"));
      await settled();
      found.time = look();
      const point = labels("point")[0];
      const { x, y } = point.getBoundingClientRect(), options = { bubbles: true, clientX: x + 3, clientY: y + 3 };
      for (const kind of ["pointerover", "pointermove"]) point.dispatchEvent(new PointerEvent(kind, options));
      await settled();
      found.tip = document.querySelector("#vg-tooltip-element")?.textContent ?? "";
      const loaded = performance.getEntriesByType("resource").map(entry => entry.name);
      found.loaded = loaded.filter(name => !name.startsWith("data:"));
      document.body.innerHTML = "<p>" + JSON.stringify(found) + "</p>";
    });
    """
    (tmp_path / "page.html").write_text(source.replace("<body>", f"<body><script>{act}</script>", 1))
    found = told_by_browser(tmp_path / "page.html")
    runs = pd.read_csv(study.runs)
    done = runs[runs["status"] == "done"]
    drawn = {
        key: {label for label in found[key]["points"] if "optimum" not in label} for key in ("first", "fewer", "time")
    }
    assert drawn["first"] == {*done["cell"]} and found["first"]["curves"] == 10
    assert {*found["first"]["titles"]} == {f"{TITLE} parameters, total", "1e11 FLOPs", "3e11 FLOPs"}
    kept = done[(done["method"] != "peer") & (done["budget"] == 3e11)]
    assert drawn["fewer"] == {*kept["cell"]} and found["fewer"]["curves"] == 4
    assert drawn["time"] == {*kept["cell"]} and found["time"]["curves"] == 0
    assert {*found["time"]["titles"]} == {f"{TITLE} training time (s)", "3e11 FLOPs"}
    cell = done.set_index("cell").loc[found["time"]["points"][0]]
    for told in (cell.name, f"{cell['val_loss']:.4f}", f"{cell['flops_per_token']:,}", f"{cell['params_total']:,}"):
        assert told in found["tip"]
    assert found["refused"] == found["loaded"] == []


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path: apt-get install chromium")
def test_in_a_browser_it_fits_both_widths_and_sorts(source: str, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    pages = {"desk": (1280, source), "phone": (390, source)}
    pages["control"] = (390, source.replace(".box { overflow: auto;", ".box { overflow: visible;"))  # tables stick out
    frames = "".join(
        f'<iframe id="{name}" style="width:{width}px; height:900px; border:0" srcdoc="{html.escape(text)}"></iframe>'
        for name, (width, text) in pages.items()
    )
    measure = """
    const found = {};
    for (const frame of document.querySelectorAll("iframe")) {
      const page = frame.contentDocument, root = page.documentElement;
      const table = [...page.querySelectorAll("table")].find(t => t.tHead.textContent.includes("bits per byte"));
      const heads = [...table.tHead.rows[0].cells], i = heads.findIndex(head => head.textContent.startsWith("loss"));
      const sorts = [...page.querySelectorAll("table")].map(({ tHead: { rows: [{ cells: [first] }] } }) => {
        first.click();
        return first.ariaSort;
      });
      const column = () => [...table.tBodies[0].rows].map(row => row.cells[i].textContent);
      heads[i].click();
      const up = column();
      heads[i].click();
      const images = [...page.images].map(image => image.naturalWidth);
      found[frame.id] = {inner: root.clientWidth, scroll: root.scrollWidth, up, down: column(), images, sorts};
    }
    document.body.innerHTML = "<p>" + JSON.stringify(found) + "</p>";
    """
    measured = f'<script>addEventListener("load", () => {{{measure}}})</script>'
    (tmp_path / "frames.html").write_text(f'<!DOCTYPE html><meta charset="utf-8"><body>{frames}{measured}')
    found = told_by_browser(tmp_path / "frames.html")
    for name, width in (("desk", 1280), ("phone", 390)):
        seen = found[name]
        assert (seen["inner"], seen["scroll"]) == (width, width)
        assert seen["images"] == [1210], "Figure 1 is drawn in the page"
        losses = [float(text) for text in seen["up"] if text != "—"]
        assert losses == sorted(losses) and len(losses) == 47
        assert seen["down"] == [*(f"{loss:.4f}" for loss in reversed(losses)), "—", "—", "—"]
        assert seen["up"][-3:] == ["—"] * 3
        assert set(seen["sorts"]) == {"ascending"} and len(seen["sorts"]) == without_scripts(source).count("<table>")
    assert found["control"]["scroll"] > 390
