"""The README's promises: its commands exist, its Python runs, and its recipe for a new layer works as written."""

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from peerscale.files import ROOT
from peerscale.plan.cells import planned_cells
from peerscale.plan.plan import Verdict

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """Fenced code blocks, without the indentation of a list."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, flags=re.S | re.M)
    return [re.sub(rf"^{indent}", "", body, flags=re.M) for indent, body in found]


def test_is_one_page_and_begins_with_a_command() -> None:
    assert len(README.split()) <= 1200
    assert len(README.partition("make reproduce")[0].split()) < 250


PAGES = [ROOT / "README.md", *(path for path in (ROOT / "docs").glob("*.md") if path.stem != "lab-notebook")]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_no_paragraph_is_long_or_full_of_numbers(path: Path) -> None:
    not_prose = r"```.*?```|\]\([^)]*\)|`[^`\n]*`|^\|.*?$"
    text = re.sub(not_prose, "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
    for paragraph in re.split(r"\n\s*\n|\n(?=- |\d+\. )", text):
        assert len(paragraph.split()) <= 90, paragraph
        budgets_and_settings = (
            r"(?:[\d.]+·)?10[⁰¹²³⁴⁵⁶⁷⁸⁹]+|d_model \d+|top \d+|[\d,]+ (?:heads?|experts)|[A-Z] = [\d,]+"
        )
        assert len(re.findall(r"\d[\d,.]*", re.sub(budgets_and_settings, "", paragraph))) <= 6, paragraph


def test_every_make_target_that_the_readme_names_is_there() -> None:
    named = set(re.findall(r"make ([a-z]+)", README)) - {"sure"}
    help_text = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    offered = set(re.findall(r"^  make ([a-z]+)", help_text, flags=re.M))
    assert named and named <= offered
    phony = re.findall(r"^(?:TARGETS|OF_A_SWEEP) +:= (.*)$", (ROOT / "Makefile").read_text(), flags=re.M)
    assert len(phony) == 2 and offered <= set(" ".join(phony).split())


def test_files_that_the_readme_links_to_are_there() -> None:
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", README)
    assert len(links) > 5
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing


def test_the_python_of_the_readme_and_of_fitting_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    pages = README + (ROOT / "docs/fitting.md").read_text(encoding="utf-8")
    others = [block for block in blocks(pages, "python") if "layer_config" not in block]
    assert len(others) == 2
    for code in others:
        exec(code, {})


def test_the_study_of_the_readme_plans_as_it_stands(tmp_path: Path) -> None:
    (text,) = [block for block in blocks(README, "yaml") if block.startswith("sweep:")]
    (tmp_path / "mine.yaml").write_text(text)
    cells = planned_cells(tmp_path / "mine.yaml")
    dense, peer = (Counter(c.config.size_name for c in cells if c.config.ffn.method == m) for m in ("dense", "peer"))
    assert dense == dict.fromkeys(("d16", "d20", "d24", "d32", "d48"), 4), "two seeds of two batches"
    assert peer == {size: 2 * n for size, n in dense.items()}, "of two numbers of experts each"
    assert {cell.config.budget for cell in cells} == {9e11}
    assert [cell.name for cell in cells if cell.plan.verdict is Verdict.DROP] == []
    assert f"whose {len(cells)} runs" in README
