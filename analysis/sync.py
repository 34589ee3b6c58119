"""Upload the cells, tables, fits and figures of a study that are not on Weights & Biases yet.

    .venv/bin/python analysis/sync.py SWEEP [--jobs N] [--timeout SECONDS]

It can be stopped and repeated at any time, also while the study runs: rows that the server already has are not sent
again.
Exit code 3 if something could not be uploaded.
"""

import sys
from collections.abc import Sequence

from peerscale.command_line import study_parser
from peerscale.errors import exit_code, positive_integer, positive_number
from peerscale.train.upload import upload


def main(argv: Sequence[str] | None = None) -> int:
    parser = study_parser("sync", __doc__)
    at_once, wait = "cells uploaded at a time (default: 4)", "the longest wait for the server (default: 60)"
    parser.add_argument("--jobs", type=positive_integer, default=4, metavar="N", help=at_once)
    parser.add_argument("--timeout", type=positive_number, default=60.0, metavar="SECONDS", help=wait)
    given = parser.parse_args(argv)
    for line in upload(given.sweep, given.runs, jobs=given.jobs, timeout_s=given.timeout):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
