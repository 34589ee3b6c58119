"""One file of all results, whose paths are those of a checkout: tables, the study's file, and its cells' records."""

import tarfile
from pathlib import Path

from gpu.studies import STUDY

from peerscale.files import remove_abandoned, replacing
from peerscale.records.curves import METRICS
from peerscale.records.record import RECORD

TABLES = Path("results/bench/gpu")
KEPT = (RECORD, METRICS, "config.yaml")
"""Of a cell; its checkpoints stay."""


def members(folder: Path) -> dict[Path, Path]:
    """Where each file goes -> where it is."""
    found = {TABLES / path.name: path for path in sorted(folder.glob("*.json")) + sorted(folder.glob("*.md"))}
    if (study := folder / f"{STUDY}.yaml").is_file():
        found[Path("sweeps", study.name)] = study
    runs = folder / "runs" / STUDY
    for cell in sorted(runs.glob("*")):
        found |= {Path("runs", STUDY, cell.name, name): cell / name for name in KEPT if (cell / name).is_file()}
    return found


def write(folder: Path) -> Path:
    """The archive of all that is there, DIR/gpu.tar.gz."""
    target = folder / f"{STUDY}.tar.gz"
    remove_abandoned(folder)
    with replacing(target) as temporary, tarfile.open(temporary, "w:gz") as archive:
        for name, path in members(folder).items():
            archive.add(path, str(name))
    return target
