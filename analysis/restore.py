"""Put the committed records of a study, results/SWEEP, into runs/SWEEP, where they are cells like any other.

    .venv/bin/python analysis/restore.py SWEEP

A cell that has a record in runs/SWEEP stays as it is.
"""

import sys
from collections.abc import Sequence

from peerscale.command_line import study_parser
from peerscale.errors import exit_code
from peerscale.records.publication import restore
from peerscale.records.study import published


def main(argv: Sequence[str] | None = None) -> int:
    given = study_parser("restore", __doc__).parse_args(argv)
    source = published(given.sweep, given.results)
    restored, left = restore(source, given.runs)
    print(f"{restored} cells restored from {source.folder}; {left} were in {given.runs / given.sweep} already")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
