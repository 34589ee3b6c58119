"""Place a layer in the standing table: tune it, train it, and print its row (docs/standing-table.md).

python -m peerscale.launch.place LAYER [key=value ...] [--budget 3e13] [--launcher joblib --jobs 2]

Every stage is looked up in the folders of its cells and in the entrant's folder in results/standing first, so the same
command goes on wherever it was stopped, and a larger --budget adds to a row that is there.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import yaml

from peerscale.config.compose import set_value
from peerscale.data.prepare import prepare
from peerscale.data.store import read_manifest
from peerscale.errors import ArgumentParser, FailedCells, UserError, exit_code, positive_integer, positive_number
from peerscale.files import from_checkout
from peerscale.launch.plan_table import duration
from peerscale.launch.run import LAUNCHERS, run_missing, slurm_settings
from peerscale.launch.speed import estimates, makespan_s
from peerscale.plan.cell import Cell
from peerscale.plan.cell_names import budget_name
from peerscale.plan.entrant import (
    FINAL_SEEDS,
    TUNING_BUDGET,
    TUNING_SIZE,
    Losses,
    Placing,
    Settings,
    drive,
    read_entrant,
)  # fmt: skip
from peerscale.records.entry import (
    Entry,
    check_entry,
    losses_of,
    of_data,
    protocol_hash,
    read_entry,
    table_folder,
    write_entry,
)
from peerscale.records.fingerprint import differing_keys, hashed_config
from peerscale.records.outcome import FINISHED, Outcome, outcomes
from peerscale.records.record import RECORD, Record, Status, differences, write_record


class Waiting(Exception):
    """The runs of a stage have not ended: Slurm or another process has them."""


def committed(cells: Sequence[Cell], entry: Entry | None) -> dict[str, Record]:
    """An entry's records of cells that have none in their folders, by name, where the configurations are the same.

    Records of an earlier protocol are left out.
    """
    if entry is None or entry.about["protocol"] != protocol_hash():
        return {}
    manifest = read_manifest(cells[0].config.data)
    fingerprint = manifest.fingerprint if manifest else None
    records = {record.cell: record for record in entry.records}
    missing = [cell for cell in cells if cell.name in records and not (cell.folder / RECORD).exists()]
    return {cell.name: records[cell.name] for cell in missing if not differences(cell, records[cell.name], fingerprint)}


def look_up(cells: Sequence[Cell]) -> list[Outcome]:
    """What became of the cells of a stage.

    Raises:
        UserError: a cell's folder holds a run of another configuration.
    """
    found = outcomes(cells)
    if refused := next((one.refused for one in found if one.refused), None):
        raise UserError(refused)
    return found


def run_stage(cells: Sequence[Cell], run: Callable[[Sequence[Cell]], Any]) -> dict[str, Record]:
    """Run the cells of a stage that have not ended; returns the records of those that have, by name.

    Raises:
        UserError: as of `look_up`.
        FailedCells: a cell failed, other than by a loss that diverged.
        Waiting: cells are still running, in Slurm or in another process.
    """
    found = look_up(cells)
    if pending := [outcome.cell for outcome in found if outcome.status not in FINISHED]:
        run(pending)
        found = outcomes(cells)
    if failed := [outcome.cell.name for outcome in found if outcome.status is Status.FAILED]:
        raise FailedCells(f"{len(failed)} of {len(cells)} runs failed, {failed[0]} among them")
    if any(outcome.status not in FINISHED for outcome in found):
        raise Waiting
    return {one.cell.name: one.record for one in found if one.record}


def refuse_other_settings(placing: Placing) -> None:
    """Raise `UserError` if overrides change what the protocol has the same for all."""
    if (allowed := of_data(placing.overrides)) == [*placing.overrides]:
        return

    def first(overrides: Sequence[str]) -> dict[str, Any]:
        cell = next(placing._replace(overrides=overrides).tuning())[0]
        return hashed_config(cell.config, cell.plan, "")

    if found := differing_keys(first(allowed), first(placing.overrides)):
        raise UserError(f"the protocol is the same for all layers, and overrides change {'; '.join(found)}")


def print_plan(placing: Placing, entry: Entry | None, budgets: Sequence[float], jobs: int) -> None:
    """What the command would train. Runs to come count as the best, so that those that follow from them are listed."""
    seconds: list[float] = []

    def show(stages: Iterator[str], cells: Sequence[Cell]) -> Losses:
        ended = {one.cell.name: one.record for one in look_up(cells) if one.status in FINISHED}  # None: dropped
        known = committed(cells, entry) | {name: record for name, record in ended.items() if record}
        missing = [cell for cell in cells if cell.name not in known and cell.name not in ended]
        each = [time.s for time in estimates(missing).values()] if missing else []
        seconds.extend(each)
        flops = sum(cell.plan.flops for cell in missing)
        to_run = f"{len(missing)} runs, {flops:.3g} FLOPs, {duration(sum(each))} on one worker" if missing else ""
        done = f"{len(known)} runs are done" if known else ""
        dropped = f"{n} dropped" if (n := len(cells) - len(missing) - len(known)) else ""
        print(f"{next(stages)}: {', '.join(filter(None, [to_run, done, dropped]))}")
        return {**losses_of(known), **{cell.name: 0.0 for cell in missing}}

    of_tuning = ["trials", "new seeds of the best", "trials beyond the range", "new seeds of the best then"]
    chosen = drive(placing.tuning(), partial(show, iter(of_tuning)))
    for budget in budgets:
        of_row = [*["rates around the chosen"] * (budget > TUNING_BUDGET), f"row at {budget_name(budget)}"]
        drive(placing.row(budget, chosen), partial(show, iter(of_row)))
    print(f"in all {len(seconds)} runs, about {duration(makespan_s(seconds, jobs))} on {jobs} worker{'s' * (jobs > 1)}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m peerscale.launch.place", description=__doc__.splitlines()[0])
    parser.add_argument("layer", help="an entrant of sweeps/standing, or a layer of conf/ffn")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="overrides of every run")
    parser.add_argument("--budget", type=positive_number, default=TUNING_BUDGET, help="largest budget of the row")
    parser.add_argument("--launcher", choices=LAUNCHERS, default="local", help="as in python -m peerscale.launch")
    parser.add_argument("--jobs", type=positive_integer, metavar="N", help="runs at once")
    parser.add_argument("--plan", action="store_true", help="show runs, FLOPs and time, and stop")
    parser.add_argument("--tune", action="store_true", help="stop after tuning, and print lines for the layer's file")
    parser.add_argument("--check", action="store_true", help="check that results/standing has exactly the runs wanted")
    options = parser.parse_intermixed_args(arguments)
    if options.check and (options.plan or options.tune):
        parser.error("--check goes with neither --plan nor --tune")
    if options.check:
        print(f"{options.layer}: {check_entry(options.layer, options.overrides)} runs, as the protocol asks")
        return 0
    placing = Placing(options.layer, read_entrant(options.layer), options.overrides)
    if options.budget not in placing.sizes:
        allowed = ", ".join(f"{budget:g}" for budget in placing.sizes)
        raise UserError(f"--budget {options.budget:g}: a row has the budgets {allowed}")
    entry = read_entry(table_folder(options.overrides) / placing.name)
    largest = max([options.budget, *map(float, entry.about["chosen"] if entry else ())])  # a row keeps its budgets
    budgets = [budget for budget in placing.sizes if budget <= largest]
    if not options.tune:
        refuse_other_settings(placing)
    if options.plan:
        print_plan(placing, entry, [] if options.tune else budgets, options.jobs or 1)
        return 0
    slurm = slurm_settings(options.launcher, options.overrides, options.jobs)
    ran: dict[str, Record] = {}

    def run(cells: Sequence[Cell]) -> Losses:
        known = committed(cells, entry)
        for cell in cells:
            if cell.name in known:
                write_record(cell.folder, known[cell.name])  # from then on a run like any other
        found = run_stage(cells, partial(run_missing, launcher=options.launcher, jobs=options.jobs, slurm=slurm))
        ran.update(found)
        return losses_of(found)

    prepare(next(placing.tuning())[0].config.data)
    try:
        chosen = drive(placing.tuning(), run)
        print(f"{placing.name}: chosen by {len(ran)} runs: {chosen}")
        if options.tune:
            print_settings(placing, chosen)
            return 0
        of_budget = {budget: drive(placing.row(budget, chosen), run) for budget in budgets}
    except Waiting:
        print(f"runs of {placing.name} have not ended; the same command goes on when they have", file=sys.stderr)
        return 0
    folder = write_entry(placing, ran, of_budget, table_folder(options.overrides))
    print(f"{len(ran)} runs -> {from_checkout(folder)}; next: make standing")
    return 0


def print_settings(placing: Placing, chosen: Settings) -> None:
    """The lines that give the layer's file the rates and settings that were chosen."""
    (cell,) = placing.cells([chosen], TUNING_BUDGET, [TUNING_SIZE], FINAL_SEEDS[:1])
    tree: dict[str, Any] = {}
    for key, value in chosen.items():
        set_value(tree, key, value)
    optim = cell.config.optim
    del tree["optim"]["lr_factor"]
    tree["optim"] = {"lr": float(f"{optim.lr * optim.lr_factor:.3g}"), **tree["optim"]}
    print(yaml.safe_dump(tree, sort_keys=False, default_flow_style=None), end="")


if __name__ == "__main__":
    sys.exit(exit_code(main))
