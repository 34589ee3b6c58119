"""Collect the cells of a study into its records, tables and fits.

    .venv/bin/python analysis/collect.py SWEEP [key=value ...]

Reads the cells in runs/SWEEP; writes records.jsonl, sequence_losses.npz, runs.csv, curves.csv and fits.json into
runs/SWEEP/study. Every planned cell has a row, even if it was dropped, failed or never run.
"""

import sys
from collections.abc import Sequence

from peerscale.command_line import names_in, study_parser
from peerscale.errors import exit_code
from peerscale.stats.collection import collect


def main(argv: Sequence[str] | None = None) -> int:
    parser = study_parser("collect", __doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides that the cells were run with")
    named = "stop before the fits if one of these has no finished run"
    parser.add_argument("--methods", default="", metavar="NAMES", help=named)
    given = parser.parse_intermixed_args(argv)
    for line in collect(given.sweep, given.runs, given.overrides, names_in(given.methods)):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
