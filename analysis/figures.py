"""Draw a study's figures and write its tables, only from its runs.csv, curves.csv and fits.json.

    .venv/bin/python analysis/figures.py SWEEP [key=value ...] [--x COLUMN]

Reads runs/SWEEP/study, or else results/SWEEP, whose files stay as they are; writes figures/*.png, figures/*.pdf,
table.md and, except for studies of learning rates, its first part as table.csv into runs/SWEEP/study, and prints the
main table. Overrides of `data` choose the study on another corpus, whose folder has the corpus in its name.
"""

import sys
from collections.abc import Sequence

import pandas as pd

from peerscale.command_line import study_of, study_parser
from peerscale.config.study_file import header, sweep_text
from peerscale.errors import UserError, exit_code
from peerscale.figures import style
from peerscale.figures.figures import DEFAULT_X, study_figures
from peerscale.figures.isoflop import X_LABELS
from peerscale.figures.study_table import compares_curves, main_rows, study_table
from peerscale.files import from_checkout, write_text
from peerscale.records.study import collected
from peerscale.records.table import read_runs
from peerscale.stats.curve import finished
from peerscale.stats.fits import read_fits
from peerscale.stats.rates import tries_rates


def main(argv: Sequence[str] | None = None) -> int:
    parser = study_parser("figures", __doc__)
    size = f"model size of the isoFLOP figure (default: {DEFAULT_X})"
    parser.add_argument("--x", choices=list(X_LABELS), default=DEFAULT_X, help=size)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides that the cells were run with")
    arguments = parser.parse_intermixed_args(argv)
    study = study_of(arguments)
    shown = study if study.folder.is_relative_to(arguments.runs) else collected(arguments.sweep, arguments.runs)
    runs, fits = read_runs(study.runs), read_fits(study.fits)
    if finished(runs).empty:
        raise UserError(f"study {arguments.sweep!r} has no finished cell to draw")
    drawn = []
    for name, figure in study_figures(study, runs, arguments.x):
        for path in style.save(figure, shown.figures / name):
            print(path)
            drawn.append(path)
    if arguments.x == DEFAULT_X:
        for former in {*shown.figures.glob("[!.]*.*")} - {*drawn}:  # of other settings or other runs
            former.unlink()
    withdrawn = header(sweep_text(study.sweep)).get("Withdrawn", "")
    text = study_table(study.sweep, runs, fits, withdrawn)
    write_text(shown.table, text)
    if not tries_rates(runs):
        write_text(shown.csv, pd.DataFrame(main_rows(runs, fits)).to_csv(index=False))
    main_table, *further = text.split("\n## ") if compares_curves(fits) else [text]
    print(f"\n{main_table}")
    if further:
        titles = "; ".join(section.partition("\n")[0] for section in further)
        print(f"Further tables in {from_checkout(shown.table)}: {titles}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
