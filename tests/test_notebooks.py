"""The notebooks run from top to bottom, each in a kernel of its own, as small as they can be."""

import hashlib
import importlib.util
import random
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from peerscale.errors import exit_code
from peerscale.files import ROOT
from peerscale.records.table import read_runs


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel or a notebook writes stays in the test's folder."""
    for variable in ("TMPDIR", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))


def outputs(name: str, **parameters: Any) -> list[nbformat.NotebookNode]:
    """All outputs of a notebook run with these values in place of those of its cell `parameters`."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    for parameter, value in parameters.items():
        assert f"\n{parameter} = " in f"\n{cell.source}"
        cell.source += f"\n{parameter} = {value!r}"
    where = {"metadata": {"path": str(ROOT / "notebooks")}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def written(found: list[nbformat.NotebookNode]) -> str:
    """Printed text and tables."""
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in found)


def pictures(found: list[nbformat.NotebookNode]) -> int:
    return sum("image/png" in output.get("data", {}) for output in found)


def committed(name: str) -> list[nbformat.NotebookNode]:
    """The code cells of a notebook as it is committed."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_the_long_notebook_is_kept_without_outputs() -> None:
    assert all(not cell.outputs and cell.execution_count is None for cell in committed("add_a_layer"))


def test_explore_is_kept_with_the_outputs_of_its_code() -> None:
    path = ROOT / "notebooks" / "explore.ipynb"
    cells = committed("explore")
    code = "\n\n".join(cell.source for cell in cells)
    executed = nbformat.read(path, as_version=4).metadata.get("executed")
    assert executed == hashlib.sha256(code.encode()).hexdigest(), "the code has changed since: make notebooks"
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "a kernel of its own, in order"
    found = [output for cell in cells for output in cell.outputs]
    assert not [output for output in found if output.output_type == "error" or output.get("name") == "stderr"]
    assert pictures(found) == 2
    assert "40 cells, 40 with a loss" in written(found)
    assert all(cell.outputs for cell in cells if not re.match("STUDY|from", cell.source)), "every result is shown"
    assert path.stat().st_size < 400_000


def test_executing_keeps_outputs_or_leaves_the_notebook_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("execute", ROOT / "notebooks" / "execute.py")
    assert spec and spec.loader
    execute = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(execute)
    path, notebook = tmp_path / "small.ipynb", nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell("x = 2", execution_count=7), nbformat.v4.new_code_cell("x + 3")]
    nbformat.write(notebook, path)
    assert exit_code(lambda: execute.main([str(path)])) == 0
    kept = nbformat.read(path, as_version=4)
    assert [cell.execution_count for cell in kept.cells] == [1, 2]
    assert kept.cells[1].outputs[0].data["text/plain"] == "5"
    assert kept.metadata == {"executed": hashlib.sha256(b"x = 2\n\nx + 3").hexdigest()}

    kept.cells[0].source = "x = 1 / 0"
    nbformat.write(kept, path)
    before = path.read_bytes()
    capsys.readouterr()
    for words in ([str(path)], [str(tmp_path / "none.ipynb")], [str(ROOT / "README.md")]):
        assert exit_code(lambda words=words: execute.main(words)) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[0].endswith("ZeroDivisionError: division by zero") and errors[1].startswith("error: no notebook ")
    assert errors[2].endswith("README.md is not a notebook (NotJSONError)")
    assert len(errors) == 3 and path.read_bytes() == before


def test_explore_reads_refits_predicts_and_compares_the_published_study() -> None:
    found = outputs("explore", RESAMPLES=20)
    assert pictures(found) == 2
    text = written(found)
    assert "40 cells, 40 with a loss" in text
    largest = read_runs("results/reproduce")["budget"].max()
    assert f"at {10 * largest:.2g} FLOPs" in text and "sequences_se" in text and "multiplier" in text


def test_a_new_layer_gets_to_the_figure(tmp_path: Path) -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghiklmnoprstu", k=rng.randint(2, 8))) for _ in range(400)]
    text = "\n".join(" ".join(rng.choices(words, k=8)) for _ in range(5000))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    data = {"path": str(tmp_path / "text.txt"), "directory": str(tmp_path / "data"), "vocab_size": 300}
    settings = {
        "data": {**data, "max_epochs": 100, "evaluation": {"validation": 512}},
        "n_layers": 2,
        "context": 8,
        "min_steps": 5,
        "tracking": {"mode": "disabled"},
    }
    found = outputs("add_a_layer", BUDGET=2e8, JOBS=1, CORPUS="text", SETTINGS=settings)
    text = written(found)
    assert "10 cells of 10" in text and "10 cells (10 done)" in text
    assert pictures(found) == 2
    (table,) = [output.data["text/markdown"] for output in found if "text/markdown" in output.get("data", {})]
    assert "gated" in table and "dense" in table
    assert not list((tmp_path / "TMPDIR").glob("peerscale-*"))
