"""Draw a study's figures and write its tables, only from its runs.csv, curves.csv and fits.json.

    .venv/bin/python analysis/figures.py SWEEP [--x COLUMN]

Works on runs/SWEEP/study, or else on results/SWEEP; writes figures/*.png, figures/*.pdf and table.md there, and prints
the main table.
"""

import sys
from collections.abc import Sequence

from peerscale.command_line import study_parser
from peerscale.config.study_file import header, sweep_text
from peerscale.errors import UserError, exit_code
from peerscale.figures import style
from peerscale.figures.figures import DEFAULT_X, study_figures
from peerscale.figures.isoflop import X_LABELS
from peerscale.figures.study_table import compares_curves, study_table
from peerscale.files import from_checkout, write_text
from peerscale.records.study import find_study, read_fits
from peerscale.records.table import read_runs
from peerscale.stats.curves_of_runs import usable, without_brackets


def main(argv: Sequence[str] | None = None) -> int:
    parser = study_parser("figures", __doc__)
    size = f"model size of the isoFLOP figure (default: {DEFAULT_X})"
    parser.add_argument("--x", choices=list(X_LABELS), default=DEFAULT_X, help=size)
    arguments = parser.parse_args(argv)
    study = find_study(arguments.sweep, arguments.runs, arguments.results)
    runs = read_runs(study.runs)
    if not usable(main := without_brackets(runs)).any():
        raise UserError(f"study {arguments.sweep!r} has no finished cell to draw")
    drawn = []
    for name, figure in study_figures(study, runs, arguments.x):
        for path in style.save(figure, study.figures / name):
            print(path)
            drawn.append(path)
    if arguments.x == DEFAULT_X:
        for former in {*study.figures.glob("[!.]*.*")} - {*drawn}:  # of other settings or other runs
            former.unlink()
    withdrawn = header(sweep_text(study.sweep)).get("Withdrawn", "")
    text = study_table(study.sweep, runs, read_fits(study.fits), withdrawn)
    write_text(study.table, text)
    shown, *further = text.split("\n## ") if compares_curves(main) else [text]
    print(f"\n{shown}")
    if further:
        titles = "; ".join(section.partition("\n")[0] for section in further)
        print(f"Further tables in {from_checkout(study.table)}: {titles}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
