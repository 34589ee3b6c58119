"""The wheel, unpacked in a folder of its own, away from the checkout."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from peerscale.files import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what an installation of the wheel puts beside other packages."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=100)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_plans_trains_and_gives_its_layers_to_other_models_in_any_folder(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(f"line {n} of {n * 7919 % 1000} words" for n in range(6000)))
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "mine.yaml").write_text(
        "defaults: [override data: text, override tracking: disabled]\n"
        "sweep: {methods: [peer], grid: [{budget: 3e7, d_model: [8]}], min_sizes: 1}\n"
        "size: {n_layers: 2}\ncontext: 8\nmin_steps: 1\n"
        "data: {path: text.txt, vocab_size: 300, max_epochs: 100, evaluation: {validation: 512}}\n"
    )
    readme = (ROOT / "README.md").read_text()
    (lines,) = [code for code in re.findall(r"```python\n(.*?)```", readme, flags=re.S) if "import Peer, Pkm" in code]
    assert len(lines.strip().splitlines()) <= 8
    program = "from peerscale.launch import overview, run as launch\n"
    program += "overview.main(['plan', 'smoke'])\nlaunch.main(['mine'])\n"
    program += f"{lines}\nassert layer.w_down.grad is not None and layer.query.weight.grad.abs().sum() > 0\n"
    program += f"assert launch.__file__.startswith({str(installed)!r})"
    command, environment = [sys.executable, "-c", program], {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "10 cells" in done.stdout
    assert (tmp_path / "runs" / "mine" / "peer-d8-l2-3e7-s0" / "record.json").is_file()
    assert list((tmp_path / "data").glob("text-300-*"))
    assert not (installed / "runs").exists()
