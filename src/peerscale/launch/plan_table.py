"""The plan of a study before it runs: what each cell costs, and how long all of them take."""

import sys
from collections.abc import Mapping, Sequence

import pandas as pd

from peerscale.config.study import load_sweep
from peerscale.config.study_file import read_study
from peerscale.errors import USER_ERROR
from peerscale.launch.speed import Estimate, estimates, makespan_s
from peerscale.plan.cell import Cell
from peerscale.plan.cells import planned_cells
from peerscale.plan.cost import CONVENTION
from peerscale.plan.memory import checkpoint_bytes, device_memory
from peerscale.plan.notices import evaluation_lines, rate_lines, short_methods
from peerscale.plan.plan import Verdict
from peerscale.records.outcome import outcomes
from peerscale.records.record import Status

LEGEND = """\
active: parameters that one token uses; layer: share of the training FLOPs in the replaced layer;
lr, table lr: peak learning rates of the backbone and of expert tables; FLOPs/budget: FLOPs used of those asked for"""
"""What the columns of the plan mean."""


def print_plan(sweep: str, overrides: Sequence[str], workers: int, price: float | None = None) -> int:
    """Print the plan; returns exit code 2 if a cell is refused, or a method keeps too few sizes at a budget.

    Args:
        sweep: name of a study, or its file.
        overrides: of every cell.
        workers: cells that run at once, for the time.
        price: of a GPU-hour.
    """
    file = read_study(sweep)
    cells = planned_cells(file, overrides)
    found = outcomes(cells)
    times = estimates(cells, found)
    ended = {one.cell.name: str(one.status) for one in found if one.status in (Status.DONE, Status.DIVERGED)}
    refused = {outcome.cell.name: outcome.refused for outcome in found if outcome.refused}
    state = {cell.name: str(cell.plan.verdict) for cell in cells}
    state |= ended | dict.fromkeys(refused, "refused")
    rows = [plan_row(cell, times[cell.name]) | {"": state[cell.name]} for cell in cells]
    print(pd.DataFrame(rows).set_index("cell").rename_axis(None).to_string())
    print(f"\n{LEGEND}")
    kept = [cell for cell in cells if cell.plan.verdict is Verdict.OK]
    print(*(f"{cell.name} dropped: {cell.plan.reason}\n" for cell in cells if cell not in kept), sep="", end="")
    print(f"{len(kept)} cells of {len(cells)}, {sum(cell.plan.flops for cell in kept):.3g} FLOPs ({CONVENTION})")
    left = [cell for cell in kept if cell.name not in ended]
    takes = f"{len(left)} cells to run, about {duration(makespan_s((times[cell.name].s for cell in left), workers))}"
    on = "one worker" if workers == 1 else f"{workers} workers"
    print(f"make sweep SWEEP={cells[0].sweep}: {f'{takes} on {on}' if left else 'nothing to run'}")
    for line in [*time_lines(left, times, price), *evaluation_lines(cells), *rate_lines(cells)]:
        print(line)
    if any(cell.plan.epochs is None for cell in cells):
        print("the corpus is not prepared and its size is not known: cells may still be dropped, and sets skipped")
    wrong = [*refused.values(), *short_methods(cells, load_sweep(file).min_sizes)]
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    return USER_ERROR if wrong else 0


def plan_row(cell: Cell, time: Estimate) -> dict[str, str]:
    """The row of a cell in the plan's table: its cost and its training."""
    plan, trainer = cell.plan, cell.config.trainer
    together = f" on {trainer.devices} GPUs" if trainer.accelerator == "gpu" and trainer.devices > 1 else ""
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
        "time": duration(time.s) + "?" * time.is_guess + together,
    }


def time_lines(cells: Sequence[Cell], times: Mapping[str, Estimate], price: float | None) -> list[str]:
    """How times are estimated, the GPU-hours of cells that train on GPUs, with their cost at `price` each, and what
    checkpoints take."""
    lines = []
    on_gpus = [cell for cell in cells if cell.config.trainer.accelerator == "gpu"]
    if any(times[cell.name].is_guess for cell in cells):
        by = "a share of the GPU's peak (trainer.device_utilisation)" if on_gpus else "committed runs"
        lines.append(f"time? is estimated from {by}: no finished cell of that method on this machine yet")
    if on_gpus:
        hours = sum(times[cell.name].s * cell.config.trainer.devices for cell in on_gpus) / 3600
        cost = f", {hours * price:,.0f} at {price:g} an hour" if price is not None else "; PRICE=2.5 gives their cost"
        largest = max(sum(device_memory(cell.config).values()) for cell in on_gpus) / 1e9
        lines.append(f"{hours:,.3g} GPU-hours{cost}; the largest cell takes about {largest:.3g} GB of a GPU's memory")
    if kept := [checkpoint_bytes(cell.config) for cell in cells if cell.config.trainer.keep_checkpoint]:
        lines.append(f"kept checkpoints (trainer.keep_checkpoint): {sum(kept) / 1e9:,.3g} GB on disk")
    return lines


def duration(seconds: float) -> str:
    """`45 s`, `6 min`, `3.2 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
