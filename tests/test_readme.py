"""The README's promises: its commands exist, its Python runs, and its recipe for a new layer works as written."""

import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from peerscale.cells import planned_cells
from peerscale.files import ROOT
from peerscale.plan import Verdict
from peerscale.runs.study import read_fits

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


def test_the_python_of_the_readme_runs() -> None:
    (code,) = [block for block in blocks(README, "python") if "read_runs" in block]
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


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


def test_a_new_layer_takes_what_the_readme_says(tmp_path: Path) -> None:
    recipe = README.split("## Add a layer")[1].split("\n## ")[0]
    module, dataclass, build_case, cost_case = blocks(recipe, "python")
    (yaml,) = blocks(recipe, "yaml")
    for folder in ("src", "conf", "sweeps"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    package = tmp_path / "src" / "peerscale"
    imports = "import torch.nn.functional as F\nfrom torch import Tensor, nn\n\n\n"
    (package / "model" / "gated.py").write_text(imports + module)
    (tmp_path / "conf" / "ffn" / "gated.yaml").write_text(yaml)

    def insert(path: Path, anchor: str, before: str, *, indent: str = "") -> None:
        text = path.read_text()
        assert text.count(anchor) == 1, (path, anchor)
        path.write_text(text.replace(anchor, re.sub(r"^(?=.)", indent, before, flags=re.M) + anchor))

    insert(package / "config.py", "def _blocks(value", dataclass + "\n\n")
    insert(package / "config.py", " | Sparse, Field(discriminator", " | GatedConfig")
    last = "        case _:\n            assert_never(ffn)\n"
    insert(package / "model" / "__init__.py", last, build_case, indent=" " * 8)
    insert(package / "accounting.py", last, cost_case, indent=" " * 8)
    new_import = "from peerscale.model.gated import Gated\nfrom peerscale.config import GatedConfig\n"
    insert(package / "model" / "__init__.py", "from peerscale.model.dense import", new_import)
    insert(package / "accounting.py", "from peerscale.config import", "from peerscale.config import GatedConfig\n")
    check = """
from peerscale.config import load
from peerscale.accounting import cost
from peerscale.model import build_model
import peerscale.files
config = load(["ffn=gated", "size=d32"])
model = build_model(config)
assert cost(config).params_total == sum(p.numel() for p in model.parameters())
layer = model.blocks[1].ffn
for linear, std in ((layer.gate, 32**-0.5), (layer.down, 32**-0.5), (layer.up, 85**-0.5 / 8**0.5)):
    assert abs(linear.weight.std().item() / std - 1) < 0.1, "1 / fan-in, the last over sqrt(2 x 4 layers)"
print(peerscale.files.ROOT, type(layer).__name__)
"""
    environment = {"PYTHONPATH": str(tmp_path / "src"), "PATH": "/usr/bin:/bin"}
    result = subprocess.run([sys.executable, "-c", check], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(tmp_path), "Gated"]


@pytest.mark.parametrize(
    ("study", "budget", "method", "reference"),
    [
        ("reproduce", 2.7e12, "peer", "dense"),
        ("isoflop_cpu", 3e12, "peer", "dense"),
        ("isoflop_cpu", 1e13, "peer", "dense"),
        ("batch", 3e12, "peer batch_sequences=32", "dense batch_sequences=32"),
    ],
)
def test_the_numbers_of_the_readme_are_the_published_fits(
    study: str, budget: float, method: str, reference: str
) -> None:
    fits = read_fits(ROOT / "results" / study / "fits.json")
    (entry,) = [entry for entry in fits["budgets"] if entry["budget"] == budget]
    (found,) = [d for d in entry["differences"] if (d["method"], d["reference"]) == (method, reference)]
    said = f"{-found['value']:.3f} ± {(found['high'] - found['low']) / 2:.3f}"
    assert said in README
    for worth in fits["multipliers"]:
        if study == "isoflop_cpu" and worth["method"] == "peer" and worth["budget"] == budget:
            numbers = f"{worth['multiplier']:.2f} [{worth['low']:.2f}, {worth['high']:.2f}]"
            assert numbers in " ".join(README.split())
