"""Which learning rates each method trains best with, from a study that varies them.

    python analysis/tuning.py lr

For each method and setting, the mean over the sizes of the loss on the tuning split, best first; an edge of the grid
that wins is named, since the grid should then be extended for all methods.
"""

import sys
from collections.abc import Sequence

from peerscale.errors import exit_code
from peerscale.runs import read_runs
from peerscale.runs.study import study_parser
from peerscale.viz.rates import edges, settings_table


def main(argv: Sequence[str] | None = None) -> int:
    arguments = study_parser(__doc__.splitlines()[0]).parse_args(argv)
    cells = arguments.runs / arguments.sweep
    table = settings_table(read_runs(cells if cells.is_dir() else arguments.results / arguments.sweep))
    for method, rows in table.groupby("name", sort=False):
        print(f"\n{method}\n{rows.drop(columns='name').to_string(index=False, float_format='{:.4g}'.format)}")
        for edge in edges(rows):
            print(f"  {edge}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
