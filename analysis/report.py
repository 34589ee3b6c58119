"""Write a self-contained HTML page of a study: answer, figures, results, setup, problems, how to repeat it.

    .venv/bin/python analysis/report.py SWEEP

Works on runs/SWEEP/study, or else on results/SWEEP, and writes report.html there. Run make figures first.
"""

import sys
from collections.abc import Sequence

from peerscale.command_line import study_parser
from peerscale.errors import exit_code
from peerscale.figures.report import report
from peerscale.files import write_text
from peerscale.records.study import find_study


def main(argv: Sequence[str] | None = None) -> int:
    arguments = study_parser("report", __doc__).parse_args(argv)
    study = find_study(arguments.sweep, arguments.runs, arguments.results)
    path = study.folder / "report.html"
    write_text(path, report(study))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
