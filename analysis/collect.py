"""Collect the records of a study into its tables and fits: runs.csv, records.jsonl, curves.csv, fits.json.

    .venv/bin/python analysis/collect.py SWEEP [key=value ...] [--with-published]

Reads the cells in runs/SWEEP, or in results/SWEEP if there are none, or both; writes runs/SWEEP/study. Every planned
cell has a row, even if it was dropped, failed or never run.
"""

import sys
from collections.abc import Sequence

from peerscale.errors import exit_code
from peerscale.records.study import study_parser
from peerscale.stats.collection import collect


def main(argv: Sequence[str] | None = None) -> int:
    parser = study_parser("collect", __doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides that the cells were run with")
    parser.add_argument("--with-published", action="store_true", help="add the published cells that were not run here")
    given = parser.parse_intermixed_args(argv)
    for line in collect(given.sweep, given.runs, given.results, given.overrides, with_published=given.with_published):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
