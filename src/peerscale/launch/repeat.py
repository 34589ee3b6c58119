"""Train a published cell again, apart from all other runs, and compare its losses with the published ones.

python -m peerscale.launch.repeat SWEEP CELL
"""

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from peerscale.data.prepare import prepare
from peerscale.errors import ArgumentParser, FailedCells, UserError, exit_code
from peerscale.files import from_checkout
from peerscale.launch.outcomes import of_the_plan, published_study, read_published
from peerscale.launch.progress import Progress
from peerscale.plan.cells import FINISHED, planned_cells, state
from peerscale.records.record import Record, Status, read_record
from peerscale.train.run import run_cell

RUNS = "runs/repeated"
"""Where repeated cells are kept, so that no study counts them as its own."""

FORMER: dict[Any, str] = {"fused": "cpp", "native": "torch"}
"""Former names of kernels, in older records."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m peerscale.launch.repeat", description=__doc__.splitlines()[0])
    parser.add_argument("sweep", help="name of a published study, or its file")
    parser.add_argument("cell", help="name of a finished cell, as in results/SWEEP/runs.csv")
    parser.add_argument("--runs", default=RUNS, metavar="DIR", help=f"where it is trained (default: {RUNS})")
    parser.add_argument("--results", default="results", metavar="DIR", help="where studies are published")
    options = parser.parse_args(arguments)
    cells = planned_cells(options.sweep, [f"trainer.runs_directory={options.runs}"])
    study = published_study(cells[0].sweep, options.results)
    done = {name: record for name, record in read_published(study).items() if record.status is Status.DONE}
    chosen = [cell for cell in cells if cell.name == options.cell]
    if not chosen or options.cell not in done:
        near = get_close_matches(options.cell, [cell.name for cell in cells if cell.name in done], cutoff=0)
        raise UserError(f"{study.sweep} has no published cell {options.cell!r}; similar ones: {', '.join(near)}")
    corpus = prepare(chosen[0].config.data).manifest.fingerprint
    same, notices = of_the_plan(chosen, {options.cell: done[options.cell]}, study.folder, corpus)
    if not same:
        raise UserError(f"{notices[0].removeprefix('notice: ')}, so it cannot be repeated")
    cell = chosen[0]
    if state(cell, corpus) not in FINISHED:
        with Progress(cell.sweep, [cell]):
            run_cell(cell)
    record = read_record(cell.folder)
    if record is None or record.status is not Status.DONE:
        raise FailedCells(f"{cell.name} {record.status}: {record.reason}" if record else f"{cell.name} was not trained")
    print(f"{cell.name} of {cell.sweep}, trained again in {from_checkout(cell.folder)}:")
    print(*comparison(record, same[cell.name]), sep="\n")
    return 0


def comparison(here: Record, published: Record) -> list[str]:
    """A line for each held-out set, with both losses and their difference; and how the environments differ."""
    from peerscale.train.environment import EXACT_KEYS

    lines = []
    for name, values in published.evaluation.items():
        loss, difference = here.evaluation[name]["loss"], here.evaluation[name]["loss"] - values["loss"]
        said = f"differs by {difference:+.1e}" if difference else "the same, bit for bit"
        lines.append(f"  {name:<12} loss {loss:.4f}, published {values['loss']:.4f}: {said}")
    pairs = {key: (here.environment.get(key), published.environment.get(key)) for key in EXACT_KEYS}
    changed = [f"{key} {own} ({theirs})" for key, (own, theirs) in pairs.items() if own != FORMER.get(theirs, theirs)]
    return [*lines, f"  environment here (published): {', '.join(changed)}"] if changed else lines


if __name__ == "__main__":
    sys.exit(exit_code(main))
