"""How the package hangs together; the rules between folders are those of import-linter in pyproject.toml."""

import ast
import graphlib
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from peerscale.files import PACKAGE, ROOT


def imported_by(file: Path) -> set[Path]:
    """The files of the package that a file imports as it is imported itself, without those for types alone."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("peerscale"):
            place = PACKAGE.parent / (node.module or "").replace(".", "/")
            modules = [place / f"{alias.name}.py" for alias in node.names]
            found |= {module if module.is_file() else place.with_suffix(".py") for module in modules}
    return {file if file.is_file() else file.with_suffix("") / "__init__.py" for file in found}


IMPORTS = {file: imported_by(file) for file in PACKAGE.rglob("*.py")}


def lines(files: Iterable[Path]) -> int:
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def test_there_is_no_circle_of_files() -> None:
    graphlib.TopologicalSorter(IMPORTS).prepare()  # names the files of a circle


def test_a_circle_would_be_found() -> None:
    cells, record = PACKAGE / "plan/cells.py", PACKAGE / "records/record.py"
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({**IMPORTS, PACKAGE / "plan/cell.py": {record, cells}}).prepare()


def test_the_walk_is_as_short_as_contributing_says() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## The walk")[2].partition("Import rules")[0]
    walk = {PACKAGE / name for name in re.findall(r"`([a-z_]+/[a-z_]+\.py)`", section)}
    said = [int(number.replace(",", "")) for number in re.findall(r"at most ([\d,]+\d)", section)]
    reached, further = set(), {*walk}
    while further:
        reached |= further
        further = {found for file in further for found in IMPORTS[file]} - reached
    reached = {file for file in reached if file.parent.name != "ops"}
    found = [lines(walk), lines(reached)]
    longest = sorted(((lines([file]), str(file.relative_to(PACKAGE)), file in walk) for file in reached), reverse=True)
    assert len(said) == 2 and all(map(int.__le__, found, said)), (found, said, longest)


def test_no_file_is_long() -> None:
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "analysis").glob("*.py"), *(ROOT / "tests").rglob("*.py")]
    assert [file for file in files if lines([file]) > 420] == []
