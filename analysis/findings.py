"""Make the table of docs/findings.md anew: each claim of the PEER paper beside what the published studies measured.

.venv/bin/python analysis/findings.py [--results DIR] [--page FILE]
"""

import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from peerscale.errors import ArgumentParser, UserError, exit_code
from peerscale.files import ROOT, from_checkout, write_text
from peerscale.runs.study import RESULTS
from peerscale.viz.findings import findings_page


def main(argv: Sequence[str] | None = None) -> int:
    program = ".venv/bin/python analysis/findings.py"
    parser = ArgumentParser(prog=program, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="published studies")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "findings.md", metavar="FILE", help="the page")
    given = parser.parse_args(argv)
    if not given.results.is_dir():
        raise UserError(f"{given.results}: no folder of published studies")
    try:
        text = given.page.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{given.page}: {error.strerror}") from None
    write_text(given.page, findings_page(text, given.results))
    print(from_checkout(given.page))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
