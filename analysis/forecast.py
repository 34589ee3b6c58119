"""Write a forecast for a larger budget from the smaller budgets of a study, before the cells of that budget run.

    .venv/bin/python analysis/forecast.py SWEEP BUDGET

Reads the collected study in runs/SWEEP/study, or else results/SWEEP; writes results/SWEEP/forecast-BUDGET.json, to be
committed, and prints it as a table. Refused if a cell of that budget or a larger one has finished, or if the file
exists already.
"""

import sys
from collections.abc import Sequence

from peerscale.errors import exit_code, positive_number
from peerscale.figures.forecasts import forecast_table
from peerscale.files import from_checkout
from peerscale.plan.cell_names import budget_name
from peerscale.records.study import study_parser
from peerscale.stats.forecasts import make_forecast


def main(argv: Sequence[str] | None = None) -> int:
    parser = study_parser("forecast", __doc__)
    about = "training FLOPs to forecast, such as 1e14"
    parser.add_argument("budget", metavar="BUDGET", type=positive_number, help=about)
    given = parser.parse_args(argv)
    made, path = make_forecast(given.sweep, given.budget, given.runs, given.results)
    print("\n".join(forecast_table(made)))
    file = from_checkout(path)
    print(f"\n-> {file}; before the cells of {budget_name(given.budget)} run: git add {file} && git commit")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
