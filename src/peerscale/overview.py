"""A study at a glance: its plan before it runs, its grid of losses while and after.

python -m peerscale.overview plan SWEEP [key=value ...]
python -m peerscale.overview status SWEEP [key=value ...]
"""

import sys
from collections import Counter
from collections.abc import Sequence

from peerscale.accounting import CONVENTION
from peerscale.config import load_sweep
from peerscale.data.store import read_manifest
from peerscale.errors import ArgumentParser, UserError, exit_code
from peerscale.plan import Verdict
from peerscale.progress import duration
from peerscale.runs.record import Status, read_record
from peerscale.slurm import Job, jobs_folder, log_path, queued, read_job_ids
from peerscale.sweeper import Cell, budget_name, evaluation_lines, planned_cells, short_methods, state


def plan_row(cell: Cell) -> dict[str, str]:
    """What a cell costs and what it will do, as the plan's table shows it."""
    plan = cell.plan
    return {
        "cell": cell.name,
        "params": f"{plan.cost.params_total:,}",
        "active": f"{plan.cost.params_active:,}",
        "FLOPs/token": f"{plan.cost.flops_per_token:,}",
        "layer": f"{plan.cost.layer_share:.1%}",
        "steps": f"{plan.steps:,}",
        "tokens": f"{plan.tokens:,}",
        "tokens/param": f"{plan.tokens_per_param:.1f}",
        "lr": f"{plan.lr:.3g}",
        "table lr": "-" if plan.table_lr is None else f"{plan.table_lr:.3g}",
        "FLOPs/budget": f"{plan.flops / cell.config.budget:.4f}",
        "time": duration(cell.estimate_s) + ("?" if cell.estimate_is_guess else ""),
        "": plan.verdict if not plan.reason else f"{plan.verdict}: {plan.reason}",
    }


def print_plan(sweep: str, overrides: Sequence[str]) -> int:
    """Print the plan; exit code 1 if a method keeps too few sizes at a budget."""
    cells = planned_cells(sweep, overrides)
    kept = [cell for cell in cells if cell.plan.verdict is Verdict.OK]
    rows = [plan_row(cell) for cell in cells]
    print(text_table([list(rows[0]), *(list(row.values()) for row in rows)]))
    flops, seconds = sum(cell.plan.flops for cell in kept), sum(cell.estimate_s for cell in kept)
    print(f"\n{len(kept)} cells of {len(cells)}, {flops:.3g} FLOPs ({CONVENTION}); {duration(seconds)} on one worker")
    if any(cell.estimate_is_guess for cell in kept):
        print("time? is a guess: no finished cell of that method on this machine yet")
    print(*evaluation_lines(cells), sep="\n", end="\n" if kept else "")
    if any(cell.plan.epochs is None for cell in cells):
        print("the corpus is not prepared and its tokens not known: cells may still be dropped, and sets be skipped")
    short = short_methods(cells, load_sweep(sweep).min_sizes)
    for line in short:
        print(f"error: {line}", file=sys.stderr)
    return 1 if short else 0


def print_status(sweep: str, overrides: Sequence[str]) -> int:
    """Print the grid, method and size by budget: a loss, or what became of the cell."""
    cells = planned_cells(sweep, overrides)
    manifest = read_manifest(cells[0].config.data)
    job_of = _slurm_jobs(cells)
    rows, notes = [], []
    for cell in cells:
        shown, note = _outcome(cell, manifest.fingerprint if manifest else None, job_of.get(cell.name))
        notes += [note] if note else []
        row, column = cell.name.replace(f"-{budget_name(cell.config.budget)}", "", 1), budget_name(cell.config.budget)
        rows.append((row, column, shown))
    budgets = list(dict.fromkeys(column for _, column, _ in rows))
    grid: dict[str, dict[str, str]] = {}
    for row, column, shown in rows:
        grid.setdefault(row, {})[column] = shown
    print(text_table([["", *budgets], *([row, *(shown.get(b, "") for b in budgets)] for row, shown in grid.items())]))
    counts = Counter("done" if shown[0].isdigit() else shown for _, _, shown in rows)
    print(f"\n{', '.join(f'{n} {status}' for status, n in counts.items())}; losses in nats per token ({sweep})")
    for note in notes:
        print(note)
    return 0


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first and the last to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    last = len(widths) - 1
    aligned = (
        (
            text.ljust(width) if i in (0, last) else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join("  ".join(row).rstrip() for row in aligned)


def _slurm_jobs(cells: Sequence[Cell]) -> dict[str, Job]:
    """The newest Slurm job of each cell that has one; none, with a notice, where the queue cannot be asked."""
    ids = read_job_ids(jobs_folder(cells[0]))
    try:
        alive = queued(ids.values())
    except UserError as error:
        print(f"notice: {error}", file=sys.stderr)
        return {}
    return {cell: alive.get(job_id, Job(id=job_id)) for cell, job_id in ids.items()}


def _outcome(cell: Cell, data_fingerprint: str | None, job: Job | None) -> tuple[str, str]:
    """What the grid shows for a cell, and a line below the grid if there is more to say."""
    if cell.plan.verdict is Verdict.DROP:
        return "dropped", f"{cell.name} dropped: {cell.plan.reason}"
    try:
        record = read_record(cell.folder)
        if record is not None and data_fingerprint is not None:
            state(cell, data_fingerprint)
    except UserError as error:
        return "refused", str(error)
    if record is not None and record.status is Status.DONE:
        loss = record.evaluation.get(cell.config.data.val_set, {}).get("loss")
        return ("done" if loss is None else f"{loss:.4f}"), ""
    if job is not None and job.state:
        return job.word, f"{cell.name} {job.word}: Slurm job {job.id} {job.detail}"
    ended = "" if job is None else f"Slurm job {job.id} has ended, see {log_path(jobs_folder(cell), job.id)}"
    if record is not None and record.status is not Status.RUNNING:
        return str(record.status), f"{cell.name} {record.status}: {record.reason}" + (f"; {ended}" if ended else "")
    if record is not None and _locked(cell):
        return "running", ""
    shown = "pending" if record is None and job is None else "interrupted"
    return shown, f"{cell.name} {shown}: {ended}" if ended else ""


def _locked(cell: Cell) -> bool:
    """Whether a process holds the cell now."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(cell.folder / "lock", timeout=0):
            return False
    except Timeout:
        return True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m peerscale.overview", description=__doc__.splitlines()[0])
    parser.add_argument("view", choices=["plan", "status"])
    parser.add_argument("sweep", help="name of a file in sweeps/, or a path")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of every cell")
    options = parser.parse_args(arguments)
    show = print_plan if options.view == "plan" else print_status
    return show(options.sweep, options.overrides)


if __name__ == "__main__":
    sys.exit(exit_code(main))
