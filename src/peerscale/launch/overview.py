"""Overview of a study: its plan before it runs; its grid of losses while it runs and afterwards.

python -m peerscale.launch.overview plan SWEEP [key=value ...]
python -m peerscale.launch.overview status SWEEP [key=value ...]
python -m peerscale.launch.overview studies
"""

import contextlib
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from peerscale.config.compose import study_files
from peerscale.config.study import load_sweep
from peerscale.data.store import read_manifest
from peerscale.data.text import texts
from peerscale.errors import USER_ERROR, ArgumentParser, UserError, exit_code, positive_integer, positive_number
from peerscale.files import from_checkout
from peerscale.launch.outcomes import Outcome, Outcomes, further_line, outcomes
from peerscale.launch.progress import duration
from peerscale.launch.slurm import Job, jobs_folder, log_path, queued, read_job_ids
from peerscale.plan.cells import (
    Cell,
    count_cells,
    planned_cells,
    without_brackets,
)
from peerscale.plan.cost import CONVENTION
from peerscale.plan.memory import device_memory
from peerscale.plan.notices import evaluation_lines, rate_lines, short_methods
from peerscale.plan.plan import Verdict, decay_from
from peerscale.records.cell_names import budget_name
from peerscale.records.record import ENDED, Status
from peerscale.records.speed import makespan_s
from peerscale.records.study import RESULTS, RUNS, find_study, header, published, read_fits
from peerscale.records.table import read_records, read_runs


def plan_row(cell: Cell, outcome: Outcome) -> dict[str, str]:
    """The row of a cell in the plan's table: its cost, its training, and whether it is done or dropped."""
    plan = cell.plan
    state = "published" if outcome.done_published else "done" if outcome.done else plan.verdict
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
        "": state if not plan.reason else f"{plan.verdict}: {plan.reason}",
    }


LEGEND = """\
active: parameters that one token uses; layer: share of the training FLOPs in the replaced layer;
lr, table lr: peak learning rates of the backbone and of expert tables; FLOPs/budget: FLOPs used of those asked for"""
"""What the columns of the plan mean."""


def time_lines(cells: Sequence[Cell], price: float | None) -> list[str]:
    """How times are estimated, and the GPU-hours of all cells that train on GPUs, with their cost at `price` each."""
    lines, trainers = [], [cell.config.trainer for cell in cells if cell.config.trainer.accelerator == "gpu"]
    guessed = [cell.config.trainer for cell in cells if cell.estimate_is_guess]
    if any(trainer.accelerator != "gpu" for trainer in guessed):
        lines.append("time? is estimated from published runs: no finished cell of that method on this machine yet")
    for share, peak in dict.fromkeys((t.device_utilisation, t.device_flops_per_s) for t in guessed if t in trainers):
        lines.append(
            f"time? assumes trainer.device_utilisation {share:g} of trainer.device_flops_per_s {peak:.3g}: no "
            "finished cell of that method on a GPU yet"
        )
    if trainers:
        on_gpus = [cell for cell in cells if cell.config.trainer.accelerator == "gpu"]
        hours = sum(cell.estimate_s * cell.config.trainer.devices for cell in on_gpus) / 3600
        cost = f", {hours * price:,.0f} at {price:g} an hour" if price is not None else "; PRICE=2.5 gives their cost"
        largest = max(sum(device_memory(cell.config).values()) for cell in on_gpus) / 1e9
        lines.append(f"{hours:,.3g} GPU-hours{cost}; the largest cell takes about {largest:.3g} GB of a GPU's memory")
        parts = Counter(cell.config.surroundings.micro_batches for cell in on_gpus)
        if parts.keys() != {1}:
            lines.append(f"micro-batches: {', '.join(f'{m} of {parts[m]} cells' for m in sorted(parts))}")
    elif price is not None and cells:
        lines.append("no GPU-hours to price: no cell has trainer.accelerator=gpu")
    return lines


def branches_lines(cells: Sequence[Cell]) -> list[str]:
    """The FLOPs that branches save in these cells; no line if there are no branches."""
    shared = sum(
        decay_from(cell.config, cell.plan) * cell.config.tokens_per_step * cell.plan.cost.flops_per_token
        for cell in cells if cell.trunk
    )  # fmt: skip
    if not shared:
        return []
    whole, n = sum(cell.plan.flops for cell in cells), sum(bool(cell.trunk) for cell in cells)
    return [f"{n} cells are branches: {whole - shared:.3g} FLOPs are trained, {shared / whole:.0%} are saved"]


def print_plan(sweep: str, overrides: Sequence[str], workers: int, results: Path, price: float | None = None) -> int:
    """Print the plan; returns exit code 2 if a method keeps too few sizes at a budget."""
    cells = planned_cells(sweep, overrides)
    if cells[0].config.data.train_tokens is None:
        texts(cells[0].config.data)  # raises for a wrong path now, not only when the corpus is prepared
    found = _outcomes(cells, results)
    kept = [cell for cell in cells if cell.plan.verdict is Verdict.OK]
    rows = [plan_row(cell, found.planned[cell.name]) for cell in cells]
    print(text_table([list(rows[0]), *(list(row.values()) for row in rows)]))
    print(f"\n{LEGEND}")
    print(f"{len(kept)} cells of {len(cells)}, {sum(cell.plan.flops for cell in kept):.3g} FLOPs ({CONVENTION})")
    outcome_of = {cell.name: found.planned[cell.name] for cell in kept}
    not_done = [cell for cell in kept if not outcome_of[cell.name].done]
    not_done_here = [cell for cell in kept if not outcome_of[cell.name].done or outcome_of[cell.name].published]
    command = f"make sweep SWEEP={cells[0].sweep}"
    print(f"{command}: {_to_run(not_done_here, workers)}")
    if published_ones := len(not_done_here) - len(not_done):
        print(f"{command} PUBLISHED=1: {_to_run(not_done, workers)}, as {published_ones} are published")
    for line in (*branches_lines(kept), *time_lines(not_done_here, price)):
        print(line)
    print(*evaluation_lines(cells), *rate_lines(cells), sep="\n", end="\n" if kept else "")
    if any(cell.plan.epochs is None for cell in cells):
        print("the corpus is not prepared and its size is not known: cells may still be dropped, and sets skipped")
    _print_notices(found)
    short = short_methods(cells, load_sweep(sweep, overrides).min_sizes)
    for line in short:
        print(f"error: {line}", file=sys.stderr)
    return USER_ERROR if short else 0


def _to_run(cells: Sequence[Cell], workers: int) -> str:
    if not cells:
        return "nothing to run"
    seconds = makespan_s((cell.estimate_s for cell in cells), workers)
    on = "one worker" if workers == 1 else f"{workers} workers"
    return f"{len(cells)} cells to run, about {duration(seconds)} on {on}"


def _outcomes(cells: Sequence[Cell], results: Path) -> Outcomes:
    manifest = read_manifest(cells[0].config.data)
    return outcomes(cells, published(cells[0].sweep, results), manifest.fingerprint if manifest else None)


def _print_notices(found: Outcomes) -> None:
    for notice in found.notices:
        print(notice, file=sys.stderr)


def print_status(sweep: str, overrides: Sequence[str], results: Path) -> int:
    """Print a grid of method and size by budget: losses, or the states of cells; then means over seeds and brackets."""
    cells = planned_cells(sweep, overrides)
    found = _outcomes(cells, results)
    name, job_of = cells[0].sweep, _slurm_jobs(cells)
    rows, notes, words = [], [], []
    usual = {cell.name for cell in without_brackets(cells)}
    for cell in cells:
        outcome = found.planned[cell.name]
        word, note = _word(cell, outcome, job_of.get(cell.name))
        notes += [note] if note else []
        words.append(word)
        evaluation = outcome.record.evaluation if outcome.record and outcome.done else {}
        loss = evaluation.get(cell.config.data.val_set, {}).get("loss")
        budget, mark = budget_name(cell.config.budget), PUBLISHED_MARK * outcome.published
        row = cell.name.replace(f"-{budget}", "", 1)
        rows.append({
            "budget": budget, "row": row, "model": row.removesuffix(f"-s{cell.config.seed}"), "loss": loss,
            "text": (word if loss is None else f"{loss:.4f}") + mark, "usual": cell.name in usual,
        })  # fmt: skip
    grid = pd.DataFrame(rows).astype({"loss": float})
    print(budget_table(grid[grid["usual"]], "row"))
    losses = grid[grid["usual"]].groupby(["model", "budget"], sort=False)["loss"].agg(["mean", "std", "count"])
    if (several := losses[losses["count"] > 1].reset_index()).size:
        several["text"] = [f"{row.mean:.4f} ± {row.std:.4f} ({row.count})" for row in several.itertuples()]
        print(f"\nmean ± standard deviation (number of seeds):\n{budget_table(several, 'model')}")
    if len(usual) < len(cells):
        print("\nrate brackets, at factors of the usual rate; they are not points of the curves:")
        print(budget_table(grid[~grid["usual"]], "row"))
    counts = {word: f"{n} {word}" for word, n in Counter(words).items()}
    if n_published := sum(found.planned[cell.name].done_published for cell in cells):
        where = f"{words.count('done') - n_published} run here in {from_checkout(cells[0].folder.parent)}"
        counts["done"] += f" ({where}, {n_published} published in {from_checkout(results / name)})"
    print(f"\n{', '.join(counts.values())}; losses in nats per token ({sweep})")
    if n_published:
        print(f"{PUBLISHED_MARK} is published; make sweep SWEEP={name} PUBLISHED=1 runs only the others")
    if found.further and not overrides:  # a plan of a part of the study would list too many
        print(further_line(list(found.further)))
    for note in notes:
        print(note)
    _print_notices(found)
    with contextlib.suppress(UserError):  # if the study was never fitted
        study = find_study(name, cells[0].folder.parents[1], results)
        print(f"\n{read_fits(study.fits)['answer']} ({from_checkout(study.fits)}, as last fitted)")
    return 0


PUBLISHED_MARK = "*"
"""Marks published cells in the grid."""


def budget_table(cells: pd.DataFrame, row: str) -> str:
    """A table of the column `text`, with a row for each value of the column `row` and a column for each budget."""
    budgets, texts = cells["budget"].unique(), cells.set_index([row, "budget"])["text"]
    return text_table([["", *budgets], *([r, *(texts.get((r, b), "") for b in budgets)] for r in cells[row].unique())])


def print_studies(runs: Path, results: Path) -> int:
    """Print every study of sweeps/: its question, its number of cells, and how many are finished here and published."""
    for file in study_files():
        table = published(file.stem, results).runs
        try:
            planned = f"{count_cells(load_sweep(file))} cells"
            here = Counter(record.status for record in read_records(runs / file.stem))
            there = Counter(read_runs(table)["status"] if table.is_file() else ())
        except UserError as error:
            print(f"{file.stem:<16} cannot be read: {error}")
            continue
        state = [f"{here[Status.DONE]} finished here", f"{there[Status.DONE]} published"]
        state += [f"{there[Status.DROPPED]} dropped"] if there[Status.DROPPED] else []
        print(f"{file.stem:<16} {planned}: {', '.join(state)}")
        question = header(file.read_text(encoding="utf-8")).get("Question", "its file states no question")
        print(textwrap.fill(question, 100, initial_indent="    ", subsequent_indent="    "))
    print("\nmake status SWEEP=NAME shows the cells of a study; make plan SWEEP=NAME shows what they cost")
    return 0


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first and the last to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = ["<", *[">"] * (len(widths) - 2), "<"]
    aligned = [[f"{text:{side}{n}}" for text, side, n in zip(row, sides, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in aligned)


def _slurm_jobs(cells: Sequence[Cell]) -> dict[str, Job]:
    """The newest Slurm job of each cell that has one; if the queue cannot be read, prints a notice and returns none."""
    ids = read_job_ids(jobs_folder(cells[0]))
    try:
        alive = queued(ids.values())
    except UserError as error:
        print(f"notice: {error}", file=sys.stderr)
        return {}
    return {cell: alive.get(job_id, Job(id=job_id)) for cell, job_id in ids.items()}


def _word(cell: Cell, outcome: Outcome, job: Job | None) -> tuple[str, str]:
    """The state of a cell as one word, and a line below the grid if there is more to say."""
    record = outcome.record
    if outcome.done:
        return "done", ""
    if cell.plan.verdict is Verdict.DROP:
        return "dropped", f"{cell.name} dropped: {cell.plan.reason}"
    if outcome.refused:
        return "refused", outcome.refused
    if job is not None and job.state:
        return job.word, f"{cell.name} {job.word}: Slurm job {job.id} {job.detail}"
    ended = "" if job is None else f"Slurm job {job.id} has ended, see {log_path(jobs_folder(cell), job.id)}"
    if record is not None and record.status in ENDED:
        return str(record.status), f"{cell.name} {record.status}: {record.reason}" + (f"; {ended}" if ended else "")
    if record is not None and record.status is Status.RUNNING:
        return "running", ""
    shown = "pending" if record is None and job is None else "interrupted"
    return shown, f"{cell.name} {shown}: {ended}" if ended else ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m peerscale.launch.overview", description=__doc__.splitlines()[0])
    parser.add_argument("view", choices=["plan", "status", "studies"])
    parser.add_argument("sweep", nargs="?", help="name of a file in sweeps/, or a path")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="overrides of every cell")
    parser.add_argument(
        "--jobs", type=positive_integer, default=1, metavar="N", help="workers assumed for the plan's time"
    )
    parser.add_argument(
        "--price", type=positive_number, metavar="NUMBER", help="price of a GPU-hour, for the plan's cost"
    )
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="where `studies` looks for cells")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where studies are published")
    options = parser.parse_intermixed_args(arguments)
    if options.view == "studies":
        return print_studies(options.runs, options.results)
    if options.sweep is None:
        raise UserError(f"{options.view} needs the name of a study; make studies lists them")
    if options.view == "plan":
        return print_plan(options.sweep, options.overrides, options.jobs, options.results, options.price)
    return print_status(options.sweep, options.overrides, options.results)


if __name__ == "__main__":
    sys.exit(exit_code(main))
