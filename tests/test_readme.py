"""The README's promises: its commands exist, its Python runs, and its recipe for a new layer works as written."""

import math
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from scipy.stats import t as student

from peerscale.cells import planned_cells
from peerscale.files import ROOT
from peerscale.plan import Verdict
from peerscale.runs import read_runs
from peerscale.runs.claims import turned
from peerscale.runs.study import read_fits
from peerscale.viz.markdown import plus_minus

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """Fenced code blocks, without the indentation of a list."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, flags=re.S | re.M)
    return [re.sub(rf"^{indent}", "", body, flags=re.M) for indent, body in found]


def test_every_make_target_that_the_readme_names_is_there() -> None:
    named = set(re.findall(r"make ([a-z]+)", README)) - {"sure"}
    help_text = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    offered = set(re.findall(r"^  make ([a-z]+)", help_text, flags=re.M))
    assert named and named <= offered
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.M)
    assert phony and offered <= set(phony.group(1).split())


def test_files_that_the_readme_links_to_are_there() -> None:
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", README)
    assert len(links) > 5
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing


def test_the_walk_through_the_code_is_as_long_as_contributing_says() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## The walk")[2].partition("\nImport rules")[0]
    found = re.search(r"some ([\d,]+) lines", section)
    files = [ROOT / "src" / "peerscale" / name for name in re.findall(r"`([\w/]+\.py)`", section)]
    assert found and len(files) > 20 and len({*files}) == len(files)
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
    assert abs(lines - int(found.group(1).replace(",", ""))) < 100


def test_the_python_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = [block for block in blocks(README, "python") if "read_runs" in block]
    monkeypatch.chdir(ROOT)
    exec(code, {})


def test_the_study_of_the_readme_plans_as_it_stands(tmp_path: Path) -> None:
    (text,) = [block for block in blocks(README, "yaml") if block.startswith("sweep:")]
    (tmp_path / "mine.yaml").write_text(text)
    cells = planned_cells(tmp_path / "mine.yaml")
    dense, peer = (Counter(c.config.size.name for c in cells if c.config.ffn.method == m) for m in ("dense", "peer"))
    assert dense == dict.fromkeys(("d16", "d20", "d24", "d32", "d48"), 4), "two seeds of two batches"
    assert peer == {size: 2 * n for size, n in dense.items()}, "of two numbers of experts each"
    assert {cell.config.budget for cell in cells} == {9e11}
    assert [cell.name for cell in cells if cell.plan.verdict is Verdict.DROP] == []
    assert f"its {len(cells)} cells" in README


@pytest.mark.parametrize(
    ("study", "budget", "method", "reference"),
    [
        ("reproduce", 2.2e12, "peer", "dense"),
        ("reproduce", 2.2e12, "peer", "moe"),
        ("reproduce", 2.2e12, "peer", "moe_token_choice"),
        ("reproduce", 2.2e12, "peer", "pkm"),
        ("reproduce", 7e11, "peer", "dense"),
        ("isoflop_cpu", 3e12, "peer", "dense"),
        ("isoflop_cpu", 1e13, "peer", "dense"),
        ("isoflop_cpu", 1e13, "peer", "pkm"),
        ("isoflop_cpu", 1e13, "peer", "moe_token_choice"),
        ("isoflop_rates_5e11", 3e12, "peer", "pkm"),
    ],
)
def test_the_numbers_of_the_readme_are_the_published_fits(
    study: str, budget: float, method: str, reference: str
) -> None:
    fits = read_fits(ROOT / "results" / study / "fits.json")
    (entry,) = [entry for entry in fits["budgets"] if entry["budget"] == budget]
    pairs = {(d["method"], d["reference"]): d for d in entry["differences"] if not d["size"]}
    found = pairs.get((method, reference)) or turned(pairs[reference, method])
    said = plus_minus(found)
    assert (said if study != "isoflop_rates_5e11" else said.lstrip("−")) in README
    for worth in fits["multipliers"]:
        if (study, budget, worth["method"], worth["budget"]) == ("reproduce", 2.2e12, "peer", 2.2e12):
            numbers = f"{worth['multiplier']:.2f} [{worth['low']:.2f}, {worth['high']:.2f}]"
            assert numbers in " ".join(README.split())


def test_the_order_at_each_methods_better_batch_is_that_of_the_published_runs() -> None:
    runs = read_runs(ROOT / "results" / "batches" / "runs.csv")
    runs["layer"] = runs["method"] + runs["variant"].fillna("")
    losses = runs.groupby(["layer", "batch_sequences", "d_model", "seed"])["val_loss"].first().unstack()
    best = losses.mean(axis=1).groupby(["layer", "batch_sequences"]).mean().groupby("layer").min()
    dense, expert_choice, token_choice, peer, pkm = (peer_less := best["peer"] - best).round(3).map("{:+.3f}".format)
    assert list(peer_less.index) == ["dense", "moe", "moetoken_choice", "peer", "pkm"] and peer == "+0.000"
    assert dense == expert_choice
    half = float(student.ppf(0.975, 20)) * math.sqrt(losses.var(axis=1).mean() * (1 / 4 + 1 / 4))
    words = f"{dense} to dense and expert choice, {token_choice} to token choice and {pkm} to PKM, each ± {half:.3f}"
    assert words.replace("-", "−") in " ".join(README.split())
