"""Make two tables anew from the published studies: the claims of the PEER paper, in docs/findings.md, and the README's.

.venv/bin/python analysis/findings.py [--results DIR] [--page FILE] [--readme FILE]
"""

import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from peerscale.errors import ArgumentParser, UserError, exit_code
from peerscale.figures.findings import difference_rows, verdict_rows, with_table
from peerscale.files import ROOT, from_checkout, write_text
from peerscale.records.study import RESULTS


def main(argv: Sequence[str] | None = None) -> int:
    program = ".venv/bin/python analysis/findings.py"
    parser = ArgumentParser(prog=program, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="published studies")
    for name, default in {"--page": ROOT / "docs" / "findings.md", "--readme": ROOT / "README.md"}.items():
        parser.add_argument(name, type=Path, default=default, metavar="FILE", help=f"default: {from_checkout(default)}")
    given = parser.parse_args(argv)
    if not given.results.is_dir():
        raise UserError(f"{given.results}: no folder of published studies")
    pages = {}
    for page, rows in ((given.page, verdict_rows), (given.readme, difference_rows)):
        try:
            pages[page] = with_table(page.read_text(encoding="utf-8"), rows(given.results), page)
        except OSError as error:
            raise UserError(f"{page}: {error.strerror}") from None
    for page, text in pages.items():
        write_text(page, text)
        print(from_checkout(page))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
