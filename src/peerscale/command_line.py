"""The command line of the programs in analysis/ that work on one study."""

from argparse import Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from peerscale.config.study_file import sweep_name
from peerscale.errors import ArgumentParser
from peerscale.plan.cell_names import corpus_label
from peerscale.plan.cells import planned_cells
from peerscale.records.study import RESULTS, RUNS, StudyFolder, collected, find_study


def study_parser(script: str, description: str | None) -> ArgumentParser:
    """The command line of `analysis/<script>.py`, which works on one study."""
    program = f".venv/bin/python analysis/{script}.py"
    parser = ArgumentParser(prog=program, description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("sweep", metavar="SWEEP", type=sweep_name, help="name of a study")
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="where cells are kept (default: runs)")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="DIR", help="where studies are published (default: results)"
    )
    return parser


def study_of(given: Namespace) -> StudyFolder:
    """The collected study, or else the published one; overrides of `data` choose the study on another corpus.

    Raises:
        UserError: wrong overrides, or there is no such study.
    """
    corpus = corpus_label(planned_cells(given.sweep, given.overrides)[0].axes) if given.overrides else ""
    return collected(given.sweep, given.runs, corpus) if corpus else find_study(given.sweep, given.runs, given.results)


def names_in(text: str) -> list[str]:
    """The names of a list such as `dense, peer`."""
    return [*filter(None, map(str.strip, text.split(",")))]
