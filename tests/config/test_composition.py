"""How files and overrides become a configuration, and what that may import."""

import subprocess
import sys
from pathlib import Path

import pytest

from peerscale.config.compose import composed
from peerscale.config.schema import load, parse_config
from peerscale.config.study_file import read_study
from peerscale.errors import ConfigError
from peerscale.files import ROOT
from peerscale.layers.peer import PeerConfig


def test_a_studys_settings_lie_between_conf_and_overrides(tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    study.write_text("defaults: [config, _self_]\nsweep: {methods: [peer]}\nmin_steps: 7\ncontext: 32\n")
    config = parse_config(composed(["ffn=peer", "context=16"], study=read_study(study)).tree)
    assert (config.min_steps, config.context, config.batch_sequences) == (7, 16, 16)
    assert isinstance(config.ffn, PeerConfig)


def test_composes_inside_a_running_hydra_and_leaves_it_as_it_was(tmp_path: Path) -> None:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    (tmp_path / "other.yaml").write_text("answer: 42\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        assert load(["ffn=peer"]).ffn.method == "peer"
        with pytest.raises(ConfigError):
            load(["ffn=nosuch"])
        assert hydra_compose("other").answer == 42


HEAVY = ("torch", "lightning", "wandb", "datasets")


def test_planning_and_analysis_import_no_training_library() -> None:
    program = f"""
import sys
for statement in (
    "import peerscale.config.schema, peerscale.plan.cost, peerscale.plan.plan, peerscale.laws",
    "import peerscale.figures.isoflop, peerscale.train.progress",
    "import peerscale.records.table, peerscale.records.study, peerscale.records.record, peerscale.launch.speed",
    "import peerscale.data.prepare, peerscale.train.run, peerscale.launch.run",
    "from peerscale.launch.overview import main; main(['plan', 'smoke']); main(['status', 'smoke'])",
):
    exec(statement)
    found = {{*sys.modules}} & {{*{HEAVY}}}
    assert not found or found == {{"torch"}} and "main(" in statement, (statement, found)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
