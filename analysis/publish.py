"""Copy a study's tables, fits and figures from runs/SWEEP/study to results/SWEEP, to be committed.

    .venv/bin/python analysis/publish.py SWEEP [--replace]

Without --replace, published finished cells are neither removed nor replaced by cells of another configuration.
"""

import sys
from collections.abc import Sequence

from peerscale.command_line import study_parser
from peerscale.errors import exit_code
from peerscale.records.publication import publish
from peerscale.records.study import collected, published


def main(argv: Sequence[str] | None = None) -> int:
    parser = study_parser("publish", __doc__)
    parser.add_argument("--replace", action="store_true", help="remove or replace finished cells published before")
    given = parser.parse_args(argv)
    source, target = collected(given.sweep, given.runs), published(given.sweep, given.results)
    print(publish(source, target, replace_cells=given.replace))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
