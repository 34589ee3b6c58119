"""The notebooks run from top to bottom, each in a kernel of its own, as small as they can be."""

import random
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from peerscale.files import ROOT
from peerscale.runs import read_runs


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


@pytest.mark.parametrize("name", ["add_a_layer", "explore"])
def test_is_kept_without_outputs(name: str) -> None:
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


def test_explore_reads_refits_predicts_and_compares_the_published_study() -> None:
    found = outputs("explore", RESAMPLES=20)
    assert pictures(found) == 2
    text = written(found)
    assert "50 cells, 50 with a loss" in text
    largest = read_runs("results/reproduce")["budget"].max()
    assert f"at {10 * largest:.2g} FLOPs" in text and "minus dense" in text and "extrapolated" in text


def test_a_new_layer_gets_to_the_figure(tmp_path: Path) -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghiklmnoprstu", k=rng.randint(2, 8))) for _ in range(400)]
    text = "\n".join(" ".join(rng.choices(words, k=8)) for _ in range(5000))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    data = {"path": str(tmp_path / "text.txt"), "directory": str(tmp_path / "data"), "vocab_size": 300}
    settings = {
        "data": {**data, "max_epochs": 100, "evaluation": {"validation": 512}},
        "size": {"n_layers": 2},
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
