"""Write one HTML page of what is committed: the standing table, and the answer, curves and table of each study.
It needs no network.

.venv/bin/python analysis/page.py [--results DIR] [--out FILE]
"""

import os
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from peerscale.errors import ArgumentParser, UserError, exit_code
from peerscale.figures.page import page
from peerscale.files import write_text
from peerscale.records.study import RESULTS, RUNS, published

FIRST = ("isoflop_cpu", "reproduce")
"""Studies that the page begins with."""


def main(argv: Sequence[str] | None = None) -> int:
    program = ".venv/bin/python analysis/page.py"
    parser = ArgumentParser(prog=program, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="committed studies")
    parser.add_argument("--out", type=Path, default=RUNS / "page.html", metavar="FILE", help="default: runs/page.html")
    given = parser.parse_args(argv)
    names = sorted((path.parent.name for path in given.results.glob("*/fits.json")), key=_place)
    studies = [published(name, given.results) for name in names]
    if not studies:
        raise UserError(f"{given.results}: no committed studies")
    table = given.results / "standing" / "table.csv"
    standing = pd.read_csv(table) if table.is_file() else None
    readme = Path(os.path.relpath(RESULTS.parent / "README.md", given.out.parent)).as_posix()
    write_text(given.out, page(studies, standing, readme=readme))
    print(given.out)
    return 0


def _place(name: str) -> tuple[int, str]:
    return FIRST.index(name) if name in FIRST else len(FIRST), name


if __name__ == "__main__":
    sys.exit(exit_code(main))
