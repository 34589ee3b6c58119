"""Train a committed cell again, apart from all other runs, and compare its losses with the committed ones.

python -m peerscale.launch.repeat SWEEP CELL
"""

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from peerscale.data.prepare import prepare
from peerscale.errors import ArgumentParser, FailedCells, UserError, exit_code
from peerscale.files import from_checkout
from peerscale.plan.cells import planned_cells
from peerscale.records.outcome import FINISHED, outcome
from peerscale.records.record import Record, Status, differences, read_record
from peerscale.records.study import RESULTS
from peerscale.records.table import read_records
from peerscale.train.progress import Progress
from peerscale.train.run import run_cell

RUNS = "runs/repeated"
"""Where repeated cells are kept, so that no study counts them as its own."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m peerscale.launch.repeat", description=__doc__.splitlines()[0])
    parser.add_argument("sweep", help="name of a study in results/, or its file")
    parser.add_argument("cell", help="name of a finished cell, as in results/SWEEP/runs.csv")
    parser.add_argument("--runs", default=RUNS, metavar="DIR", help=f"where it is trained (default: {RUNS})")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where studies are committed")
    options = parser.parse_args(arguments)
    cells = {cell.name: cell for cell in planned_cells(options.sweep, [f"trainer.runs_directory={options.runs}"])}
    sweep = next(iter(cells.values())).sweep
    folder = options.results / sweep
    records = {r.cell: r for r in read_records(folder) if r.status is Status.DONE and r.cell in cells}
    if options.cell not in records:
        near = ", ".join(get_close_matches(options.cell, records, cutoff=0)) or "none"
        if not options.cell:
            raise UserError(f"CELL=NAME says which finished cell of {from_checkout(folder)} to repeat, such as {near}")
        raise UserError(f"{from_checkout(folder)} has no finished cell {options.cell!r}; similar ones: {near}")
    cell, committed = cells[options.cell], records[options.cell]
    corpus = prepare(cell.config.data).manifest.fingerprint
    if differ := differences(cell, committed, corpus):
        raise UserError(
            f"{from_checkout(folder)}: {cell.name} has another configuration than the plan, so it cannot be repeated: "
            f"{'; '.join(differ)}"
        )
    if outcome(cell, corpus).status not in FINISHED:
        with Progress(sweep, [cell]):
            run_cell(cell)
    record = read_record(cell.folder)
    if record is None or record.status is not Status.DONE:
        raise FailedCells(f"{cell.name} {record.status}: {record.reason}" if record else f"{cell.name} was not trained")
    print(f"{cell.name} of {sweep}, trained again in {from_checkout(cell.folder)}:")
    print(*comparison(record, committed), sep="\n")
    return 0


def comparison(here: Record, committed: Record) -> list[str]:
    """A line for each evaluation set, with both losses and their difference; and how the environments differ."""
    from peerscale.train.environment import EXACT_KEYS

    lines = []
    for name, values in committed.evaluation.items():
        loss, difference = here.evaluation[name]["loss"], here.evaluation[name]["loss"] - values["loss"]
        said = f"differs by {difference:+.1e}" if difference else "the same, bit for bit"
        lines.append(f"  {name:<12} loss {loss:.4f}, committed {values['loss']:.4f}: {said}")
    pairs = {key: (here.environment.get(key), committed.environment.get(key)) for key in EXACT_KEYS}
    changed = [f"{key} {own} ({theirs})" for key, (own, theirs) in pairs.items() if own != theirs]
    hint = "; remove that folder and repeat with AVX512=1" * ("mkl None (avx512)" in changed)
    return [*lines, f"  environment here (committed): {', '.join(changed)}{hint}"] if changed else lines


if __name__ == "__main__":
    sys.exit(exit_code(main))
