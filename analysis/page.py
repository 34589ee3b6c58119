"""Write one HTML page of the committed studies: answers, isoFLOP curves to look into, tables. It needs no network.

.venv/bin/python analysis/page.py [--results DIR] [--out FILE]
"""

import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from peerscale.errors import ArgumentParser, UserError, exit_code
from peerscale.figures.page import page
from peerscale.files import write_text
from peerscale.records.study import RESULTS, RUNS, published


def main(argv: Sequence[str] | None = None) -> int:
    program = ".venv/bin/python analysis/page.py"
    parser = ArgumentParser(prog=program, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="committed studies")
    parser.add_argument("--out", type=Path, default=RUNS / "page.html", metavar="FILE", help="default: runs/page.html")
    given = parser.parse_args(argv)
    studies = [published(path.parent.name, given.results) for path in sorted(given.results.glob("*/fits.json"))]
    if not studies:
        raise UserError(f"{given.results}: no committed studies")
    write_text(given.out, page(studies))
    print(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
