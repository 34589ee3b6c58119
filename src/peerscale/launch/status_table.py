"""The status of a study: a grid of the losses of its cells, or else of what became of them."""

import sys
from collections import Counter
from collections.abc import Sequence

import pandas as pd

from peerscale.errors import UserError
from peerscale.launch.slurm import jobs_folder, log_path, queued, read_job_ids
from peerscale.plan.cell import Cell
from peerscale.plan.cell_names import budget_name
from peerscale.plan.cells import planned_cells
from peerscale.records.matching import further_line
from peerscale.records.outcome import Outcome, outcomes
from peerscale.records.record import FAILED, RECORD, Status, cell_folders


def print_status(sweep: str, overrides: Sequence[str]) -> int:
    """Print a grid of method and size by budget, of losses or what became of the cells; then reasons."""
    cells = planned_cells(sweep, overrides)
    job_of = _slurm_jobs(cells)
    grid, rows, words, notes = {}, [], Counter(), []
    for outcome in outcomes(cells):
        cell, budget = outcome.cell, budget_name(outcome.cell.config.budget)
        word, note = word_and_note(outcome, *job_of.get(cell.name, ("", "")))
        words[word] += 1
        notes += [note] * bool(note)
        losses = outcome.record.evaluation if outcome.record and word == Status.DONE else {}
        text = f"{losses[cell.config.data.val_set]['loss']:.4f}" if cell.config.data.val_set in losses else word
        rows.append(cell.name.replace(f"-{budget}", "", 1))
        grid.setdefault(budget, {})[rows[-1]] = text
    print(pd.DataFrame(grid, index=[*dict.fromkeys(rows)]).fillna("").to_string())
    print(f"\n{', '.join(f'{n} {word}' for word, n in words.items())}; losses in nats per token ({sweep})")
    there = {folder.name for folder in cell_folders(cells[0].folder.parent) if (folder / RECORD).is_file()}
    further = sorted(there - {cell.name for cell in cells})
    if further and not overrides:  # a plan of a part of the study would list too many
        print(further_line(further))
    print(*(f"{note}\n" for note in notes), sep="", end="")
    return 0


def word_and_note(outcome: Outcome, job_id: str, job: str) -> tuple[str, str]:
    """The state of a cell as one word, and a line below the grid if there is more to say.

    Args:
        outcome: what is in the cell's folder.
        job_id: its newest Slurm job, if it has one.
        job: Slurm's state of this job and its details; empty if it has ended.
    """
    cell, record = outcome.cell, outcome.record
    if outcome.status is Status.DONE:
        return "done", ""
    if outcome.status is Status.DROPPED:
        return "dropped", f"{cell.name} dropped: {cell.plan.reason}"
    if outcome.refused:
        return "refused", outcome.refused
    if job:
        word = "queued" if job.startswith("PENDING") else "running"
        return word, f"{cell.name} {word}: Slurm job {job_id} {job.partition(' ')[2]}"
    notes = [record.reason] if record and record.status in FAILED else []
    if job_id:
        notes.append(f"Slurm job {job_id} has ended, see {log_path(jobs_folder(cell), job_id)}")
    word = "interrupted" if job_id and record is None else str(outcome.status)
    return word, f"{cell.name} {word}: {'; '.join(notes)}" if notes and word != Status.RUNNING else ""


def _slurm_jobs(cells: Sequence[Cell]) -> dict[str, tuple[str, str]]:
    """For each cell that has one, its newest Slurm job and that job's state; none, with a notice, without `squeue`."""
    ids = read_job_ids(jobs_folder(cells[0]))
    try:
        alive = queued(ids.values())
    except UserError as error:
        print(f"notice: {error}", file=sys.stderr)
        return {}
    return {cell: (job_id, " ".join(alive.get(job_id, ()))) for cell, job_id in ids.items()}
