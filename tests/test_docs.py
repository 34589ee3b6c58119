"""Commands in the documents and help texts can be typed in the checkout's root as they stand."""

import re
from pathlib import Path

import pytest

from peerscale.files import ROOT

TEXTS = [
    *(ROOT / "docs" / f"{name}.md" for name in ("cluster", "fitting", "layers", "method", "runs", "speed")),
    *(ROOT / "analysis" / f"{name}.py" for name in ("dashboard", "fit")),
    *sorted((ROOT / "benchmarks").glob("*.py")),
]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_commands_name_the_environment(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"(?<![\w/.-])(?<!-m )(?:python3?|pip3?) (?:-m |install |analysis/|benchmarks/).*", text) == []
    for program in re.findall(r"\.venv/bin/python ((?:analysis|benchmarks)/\w+\.py)", text):
        assert (ROOT / program).is_file()


@pytest.mark.parametrize("name", ["cluster", "fitting", "layers", "method", "results", "runs", "speed"])
def test_make_targets_and_links_are_there(name: str) -> None:
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    named = set(re.findall(r"make ([a-z]+)", text))
    assert named <= targets
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", text)
    assert named or links
    assert all((ROOT / "docs" / link).exists() for link in links)


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")], ids=str)
def test_links_lead_to_headings_that_are_there(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#]*\.md)?#([^)]+)\)", page.read_text(encoding="utf-8")):
        text = (page.parent / target if target else page).read_text(encoding="utf-8")
        titles = (re.sub(r"[^\w\s-]", "", title).strip().lower() for title in re.findall(r"^#+ (.*)", text, flags=re.M))
        assert anchor in {title.replace(" ", "-") for title in titles}
