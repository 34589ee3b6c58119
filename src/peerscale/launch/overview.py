"""Overview of a study: its plan before it runs; its grid of losses while it runs and afterwards; all studies.

python -m peerscale.launch.overview plan SWEEP [key=value ...]
python -m peerscale.launch.overview status SWEEP [key=value ...]
python -m peerscale.launch.overview studies
"""

import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from peerscale.config.study import Part, load_sweep
from peerscale.config.study_file import header, study_files
from peerscale.errors import ArgumentParser, UserError, exit_code, positive_integer, positive_number
from peerscale.launch.plan_table import print_plan
from peerscale.launch.status_table import print_status
from peerscale.records.record import Status
from peerscale.records.study import RESULTS, RUNS
from peerscale.records.table import read_records, read_runs


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m peerscale.launch.overview", description=__doc__.splitlines()[0])
    parser.add_argument("view", choices=["plan", "status", "studies"])
    parser.add_argument("sweep", nargs="?", help="name of a file in sweeps/, or a path")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="overrides of every cell")
    parser.add_argument("--jobs", type=positive_integer, default=1, metavar="N", help="workers, for the plan's time")
    parser.add_argument("--price", type=positive_number, metavar="NUMBER", help="of a GPU-hour, for the plan's cost")
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="where `studies` looks for cells")
    options = parser.parse_intermixed_args(arguments)
    if options.view == "studies":
        return print_studies(options.runs)
    if options.sweep is None:
        raise UserError(f"{options.view} needs the name of a study; make studies lists them")
    if options.view == "plan":
        return print_plan(options.sweep, options.overrides, options.jobs, options.price)
    return print_status(options.sweep, options.overrides)


def print_studies(runs: Path) -> int:
    """Print every study of sweeps/: its question, and how many of its cells are finished, in `runs` and in results/."""
    for file in study_files():
        committed = RESULTS / file.stem / "runs.csv"
        try:
            planned = len([*load_sweep(file).points(Part())])
            here = Counter(record.status for record in read_records(runs / file.stem))[Status.DONE]
            there = Counter(read_runs(committed)["status"])[Status.DONE] if committed.is_file() else 0
        except UserError as error:
            print(f"{file.stem:<16} cannot be read: {error}")
            continue
        print(f"{file.stem:<16} {planned} cells: {here} finished here, {there} in results/")
        question = header(file.read_text(encoding="utf-8")).get("Question", "its file states no question")
        print(textwrap.fill(question, 100, initial_indent="    ", subsequent_indent="    "))
    print("\nmake status SWEEP=NAME shows the cells of a study; make plan SWEEP=NAME shows what they cost")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
