"""The command line of the programs in analysis/ that work on one study."""

from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from peerscale.errors import ArgumentParser
from peerscale.records.study import RESULTS, RUNS


def study_parser(script: str, description: str | None) -> ArgumentParser:
    """The command line of `analysis/<script>.py`, which works on one study."""
    program = f".venv/bin/python analysis/{script}.py"
    parser = ArgumentParser(prog=program, description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("sweep", metavar="SWEEP", help="name of a study")
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="where cells are kept (default: runs)")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="DIR", help="where studies are published (default: results)"
    )
    return parser
