"""Make a W&B report of a study: how to read it, its figures and tables, and panels of its cells.

    .venv/bin/python analysis/dashboard.py SWEEP

The report is saved on the W&B server, where a second call updates it. It shows the cells that `make sync` has uploaded.
Needs the package wandb-workspaces: .venv/bin/python -m pip install --editable '.[report]'
"""

import contextlib
import importlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from peerscale.command_line import study_parser
from peerscale.errors import FailedCells, UserError, exit_code
from peerscale.files import write_text
from peerscale.records.record import cell_folders
from peerscale.records.study import StudyFolder, collected, read_json
from peerscale.records.table import read_runs
from peerscale.stats.curve import usable

wr: Any = None
expr: Any = None
with contextlib.suppress(ImportError):
    wr = importlib.import_module("wandb_workspaces.reports.v2")
    expr = importlib.import_module("wandb_workspaces.expr")

VIEWS = "wandb-views.json"
"""File that stores where the report was saved."""

LINES = (
    ("Training loss against FLOPs", "train/loss", "flops"),
    ("Training loss against tokens", "train/loss", "tokens"),
    ("Loss on a part of the validation set", "train/val_loss", "tokens"),
    ("Gradient norm", "train/grad_norm", "tokens"),
    ("Learning rate", "train/lr", "tokens"),
    ("Learning rate of expert tables", "train/table_lr", "tokens"),
    ("Expert usage", "train/expert_usage", "tokens"),
    ("Unevenness, nats", "train/unevenness", "tokens"),
    ("Tokens per second", "train/tokens_per_s", "tokens"),
)
"""Panels of the cells by method: title, metric and x axis."""

HOW_TO_READ = """
Every run is one cell: a model of one method and size, trained with one budget of FLOPs. Losses are nats per token on
the same held-out tokens for every cell. FLOPs are counted per operation. The x axes are `flops` and `tokens`, because a
step of a larger model costs more compute. Final losses against parameters form one isoFLOP curve for each method and
budget; its minimum is the compute-optimal size. Usage is the share of experts that got any weight. Unevenness is the KL
divergence of the experts' shares from uniform, in nats (0 is even).
"""


def main(argv: Sequence[str] | None = None) -> int:
    given = study_parser("dashboard", __doc__).parse_args(argv)
    study = collected(given.sweep, given.runs)
    if not study.runs.is_file():
        raise UserError(f"{study.runs} is not there; first: make figures SWEEP={given.sweep}")
    tracking = tracking_of(given.runs / given.sweep)
    try:
        print(save(study, tracking))
    except Exception as error:  # the client raises many types
        said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise FailedCells(f"W&B server: {said}; the report is not saved") from None
    return 0


def tracking_of(folder: Path) -> dict[str, Any]:
    """W&B project and entity of the first cell of a study; raises `UserError` without cells or without the package."""
    if wr is None:
        raise UserError("wandb-workspaces is not installed: .venv/bin/python -m pip install --editable '.[report]'")
    for cell in cell_folders(folder):
        if (path := cell / "config.yaml").is_file():
            return yaml.safe_load(path.read_text(encoding="utf-8"))["tracking"]
    raise UserError(
        f"no cells in {folder}, whose config.yaml names the W&B project; first: make sweep SWEEP={folder.name}"
    )


def save(study: StudyFolder, tracking: dict[str, Any]) -> str:
    """Save the report on the server, replacing that of an earlier call; returns its address."""
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    log_figures(study, tracking)
    views = study.folder / VIEWS
    text = report(study, tracking["entity"] or str(wandb.Api().default_entity), tracking["project"])
    text.id = read_json(views).get("report", "") if views.is_file() else ""
    text.save()
    write_text(views, json.dumps({"report": text.id}) + "\n")
    return text.url


def log_figures(study: StudyFolder, tracking: dict[str, Any]) -> None:
    """Log a study's figures to its run `<sweep>-study`, from which the report shows them."""
    import wandb

    run = wandb.init(
        project=tracking["project"],
        entity=tracking["entity"],
        id=re.sub(r"[^\w-]", "-", f"{study.sweep}-study{tracking['id_salt']}"),
        name=f"{study.sweep}-study",
        group=study.sweep,
        job_type="study",
        mode="online",
        resume="allow",
        settings=wandb.Settings(console="off", silent=True, x_disable_stats=True, x_disable_meta=True),
    )
    run.log({f"figures/{path.stem}": wandb.Image(str(path)) for path in sorted(study.figures.glob("*.png"))})
    run.finish()


def final(title: str, x: str, **options: Any) -> Any:
    """A panel of final losses against a number of the configuration."""
    return wr.ScatterPlot(title=title, x=wr.Config(x), y=wr.SummaryMetric("validation/loss"), log_x=True, **options)


def report(study: StudyFolder, entity: str, project: str) -> Any:
    """The report: how to read it, figures, tables, final losses per budget, and the metrics of the cells."""
    runs = read_runs(study.runs)

    def grid(name: str, panels: list[Any], *more: Any, job: str = "train") -> Any:
        filters = expr.And(expr.Metric("Group") == study.sweep, expr.Metric("JobType") == job, *more)
        shown = wr.Runset(entity=entity, project=project, name=name, filters=filters)
        return wr.PanelGrid(runsets=[shown], panels=panels)

    figures = [f"figures/{path.stem}" for path in sorted(study.figures.glob("*.png"))]
    browser = wr.MediaBrowser(media_keys=figures, layout=wr.Layout(w=24, h=16))
    blocks = [
        wr.H1("How to read this"), wr.MarkdownBlock(HOW_TO_READ),
        wr.H1("Figures"), grid("study", [browser], job="study"),
        *([wr.MarkdownBlock(study.table.read_text(encoding="utf-8"))] if study.table.is_file() else []),
        wr.H1("Final loss against parameters, a budget each"),
    ]  # fmt: skip
    for budget in sorted(runs.loc[usable(runs), "budget"].unique()):
        name = f"{budget:g} FLOPs"
        blocks.append(grid(name, [final(name, "derived.params_total")], expr.Config("budget") == float(budget)))
    lines = [
        wr.LinePlot(title=title, x=x, y=[metric], title_x=x, log_x=x == "flops", groupby="derived.name",
                    max_runs_to_show=100)
        for title, metric, x in LINES
    ]  # fmt: skip
    scatter = final("Final loss against parameters; colour: budget", "derived.params_total", z=wr.Config("budget"))
    blocks += [wr.H1("Cells"), grid("cells", [scatter, *lines])]
    bad = runs[runs["status"].isin(["failed", "diverged"])]
    listed = "\n".join(f"- `{row.cell}`: {row.status}, {row.reason}" for row in bad.itertuples()) or "None."
    blocks += [wr.H1("Failed and diverged"), wr.MarkdownBlock(listed)]
    title = f"peerscale {study.sweep}"
    return wr.Report(entity=entity, project=project, title=title, description="IsoFLOP study", blocks=blocks)


if __name__ == "__main__":
    sys.exit(exit_code(main))
