"""Upload the cells of a study, and its tables, fits and figures, to Weights & Biases: what is not there yet.

    .venv/bin/python analysis/sync.py SWEEP [--jobs N] [--timeout SECONDS]

It can be stopped and repeated at any time, also while the study runs: rows that the server has are not sent again.
Exit code 3 if something could not be uploaded.
"""

import sys
from collections.abc import Sequence

from peerscale.errors import UserError, exit_code
from peerscale.runs.study import study_parser
from peerscale.training.upload import upload


def main(argv: Sequence[str] | None = None) -> int:
    parser = study_parser("sync", __doc__)
    parser.add_argument("--jobs", type=int, default=4, metavar="N", help="cells uploaded at a time (default: 4)")
    wait = "the longest wait for the server (default: 60)"
    parser.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help=wait)
    given = parser.parse_args(argv)
    if given.jobs < 1 or given.timeout <= 0:
        raise UserError("--jobs must be at least 1 and --timeout above 0")
    for line in upload(given.sweep, given.runs, jobs=given.jobs, timeout_s=given.timeout):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
