"""Browse the W&B runs of a study in the terminal, offline and listed by cell.

    .venv/bin/python analysis/browse.py SWEEP

The client's viewer (`wandb leet`) shows one folder of runs and lists the runs by folder name. This script therefore
first makes links to the runs, named after their cells, in runs/SWEEP/study/wandb.
"""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from peerscale.command_line import study_parser
from peerscale.errors import UserError, exit_code
from peerscale.files import replacing


def main(argv: Sequence[str] | None = None) -> int:
    arguments = study_parser("browse", __doc__).parse_args(argv)
    cells = arguments.runs / arguments.sweep
    links = named_links(cells)
    if not links:
        raise UserError(
            f"no W&B runs in {cells}; train cells, and not with tracking=disabled: make sweep SWEEP={arguments.sweep}"
        )
    folder = cells / "study" / "wandb"
    with replacing(folder) as temporary:
        temporary.mkdir()
        for name, run in links.items():
            (temporary / name).symlink_to(run)
    if not sys.stdout.isatty():
        raise UserError(f"this needs a terminal; in one: .venv/bin/wandb leet {folder}")
    os.execv(sys.executable, [sys.executable, "-m", "wandb", "leet", str(folder)])


def named_links(cells: Path) -> dict[str, Path]:
    """The W&B runs in the cells' folders, by names that start with the cell's name and that the viewer accepts.

    The viewer lists folders called `run-...`. It finds a run's file by the text after `run-<date>_<time>-` in the name.
    """
    found = {}
    for run in sorted(cells.glob("*/wandb/*run-*")):
        cell, dated = run.parents[1].name, re.search(r"run-\d{8}_\d{6}-.+", run.name)
        if dated and cell != "study":
            found[f"run-{cell[:200]} {dated[0]}"] = run.resolve()  # a file name may have 255 bytes
    return found


if __name__ == "__main__":
    sys.exit(exit_code(main))
