"""Compare methods of a study with rivals, one line for each rival and budget.

    .venv/bin/python analysis/compare.py SWEEP [key=value ...] [--methods NAME,...] [--rivals NAME,...]

Reads runs.csv, records.jsonl and fits.json in runs/SWEEP/study, or else results/SWEEP; writes nothing.
"""

import sys
from collections.abc import Sequence

from peerscale.command_line import names_in, study_of, study_parser
from peerscale.errors import UserError, exit_code
from peerscale.figures.markdown import table
from peerscale.figures.verdicts import verdict_rows
from peerscale.records.table import read_records, read_runs
from peerscale.stats.collection import compared
from peerscale.stats.curve import from_names, require_methods
from peerscale.stats.fits import read_fits


def main(argv: Sequence[str] | None = None) -> int:
    parser = study_parser("compare", __doc__)
    parser.add_argument("--methods", default="", metavar="NAMES", help="what is compared (default: every method)")
    whom = "with what (default: the study's baseline, or with --methods every other method)"
    parser.add_argument("--rivals", default="", metavar="NAMES", help=whom)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides that the cells were run with")
    given = parser.parse_intermixed_args(argv)
    study = study_of(given)
    runs, records, fits = read_runs(study.runs), read_records(study.folder), read_fits(study.fits)
    methods, rivals = names_in(given.methods), names_in(given.rivals)
    known = require_methods([*methods, *rivals], runs, given.sweep)
    rivals = rivals or (known if methods else [fits["baseline"]])
    beyond = {(one["budget"], one["method"]) for one in fits["rates"].get("extrapolated", ())}
    each = [fits if rival == fits["baseline"] else from_names(compared(given.sweep, runs, records, beyond, rival))
            for rival in rivals]  # fmt: skip
    if not (rows := [row for found in each for row in verdict_rows(found, methods or known)]):
        raise UserError(f"{given.sweep} has nothing to compare {', '.join(methods or known)} with")
    family = {claim["family"] for claim in fits["claims"]}
    verdicts = "".join(f"; the verdicts of make figures are, for {n} claims (Holm)" for n in family)
    print(f"p and intervals are not corrected for the number of comparisons{verdicts}\n")
    print(*table(rows), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
