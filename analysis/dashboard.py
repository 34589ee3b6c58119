"""The W&B workspace of a study, and a report with its figures, fits and how to read them.

    .venv/bin/python analysis/dashboard.py SWEEP [--save]

Writes the workspace to runs/SWEEP/study/workspace.json, which needs no server. With --save it also puts both on the W&B
server; a second call updates them there. They show what `make sync` has uploaded. Needs the package
wandb-workspaces: .venv/bin/python -m pip install --editable '.[report]'
"""

import contextlib
import importlib
import json
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from peerscale.errors import FailedCells, UserError, exit_code
from peerscale.files import write_text
from peerscale.runs.study import Study, collected, read_json, study_parser, usable
from peerscale.runs.table import read_runs
from peerscale.training.tracking import WandbError, client_errors

wr: Any = None
ws: Any = None
with contextlib.suppress(ImportError):  # an extra, told of in `main`
    wr, ws = (
        importlib.import_module("wandb_workspaces.reports.v2"),
        importlib.import_module("wandb_workspaces.workspaces"),
    )

LOGIN = ".venv/bin/wandb login"

METHOD = "ffn.method"

VIEWS = "wandb-views.json"
"""File that remembers where the workspace and report were saved."""

HOW_TO_READ = """
Every run is one cell: a model of one method and size, trained with one budget of FLOPs. Losses are nats per token on
the same held-out tokens for every cell. FLOPs are counted per operation. The x axes are `flops` and `tokens`, because a
step of a larger model costs more compute. Final losses against parameters form one isoFLOP curve for each method and
budget; its minimum is the compute-optimal size. Usage is the share of experts that got any weight. Unevenness is the KL
divergence of the experts' shares from uniform, in nats (0 is even). A run's `signals` say at which step its loss
spiked, its router collapsed or its throughput halved.
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = study_parser(__doc__)
    parser.prog = ".venv/bin/python analysis/dashboard.py"
    parser.formatter_class = RawDescriptionHelpFormatter
    parser.add_argument("--save", action="store_true", help="put workspace and report on the W&B server")
    arguments = parser.parse_args(argv)
    if ws is None:
        raise UserError("wandb-workspaces is not installed: .venv/bin/python -m pip install --editable '.[report]'")
    study = collected(arguments.sweep, arguments.runs)
    if not study.runs.is_file():
        raise UserError(f"{study.runs} is not there; first: make figures SWEEP={arguments.sweep}")
    tracking = tracking_of(arguments.runs / arguments.sweep)
    entity, project = tracking["entity"] or "", tracking["project"]
    built = workspace(study.sweep, entity or "ENTITY", project)
    path = study.folder / "workspace.json"
    # The library has no public way to its JSON.
    write_text(path, built._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=1) + "\n")
    print(path)
    if not arguments.save:
        print(
            f"not on the server; to put it and a report there: {LOGIN}, make sync SWEEP={study.sweep}, then add --save"
        )
        return 0
    try:
        with client_errors():
            for name, url in save(study, entity, project).items():
                print(f"{name}: {url}")
    except WandbError as error:
        raise FailedCells(f"W&B server: {error}; {path} is written, but workspace and report are not saved") from None
    return 0


def tracking_of(folder: Path) -> dict[str, Any]:
    """Project and entity, as the first cell of a study has them."""
    for path in sorted(folder.glob("*/config.yaml")):
        return yaml.safe_load(path.read_text(encoding="utf-8"))["tracking"]
    raise UserError(
        f"no cells in {folder}, whose config.yaml names the W&B project; first: make sweep SWEEP={folder.name}"
    )


def sections() -> dict[str, list[Any]]:
    """The panels by section."""

    def lines(title: str, metric: str, x: str, **options: Any) -> Any:
        return wr.LinePlot(title=title, x=x, y=[metric], title_x=x, groupby=METHOD, max_runs_to_show=100, **options)

    def bars(title: str, metrics: list[str], how: Any) -> Any:
        return wr.BarPlot(title=title, metrics=metrics, groupby=METHOD, groupby_aggfunc=how, max_runs_to_show=100)

    return {
        "Loss": [
            lines("Training loss against FLOPs", "train/loss", "flops", log_x=True),
            lines("Training loss against tokens", "train/loss", "tokens", log_x=True),
        ],
        "Final loss": [
            final("Final loss against parameters; colour: budget", "derived.params_total", z=wr.Config("budget")),
            final(
                "Final loss against FLOPs per token; colour: budget", "derived.flops_per_token", z=wr.Config("budget")
            ),
        ],
        "Router": [
            lines("Expert usage", "train/expert_usage", "tokens"),
            lines("Unevenness, nats", "train/unevenness", "tokens"),
        ],
        "Speed": [
            lines("Tokens per second", "train/tokens_per_s", "tokens"),
            bars("FLOP/s, mean", ["flops_per_s"], "mean"),
        ],
        "Failed and diverged": [bars("Failed and diverged cells", ["failed", "diverged"], "sum")],
    }


def final(title: str, x: str, **options: Any) -> Any:
    """Final losses against a number of the configuration."""
    return wr.ScatterPlot(title=title, x=wr.Config(x), y=wr.SummaryMetric("validation/loss"), log_x=True, **options)


def cells_of(sweep: str, *more: Any, job: str = "train") -> Any:
    """Which runs are shown."""
    return ws.And(ws.Metric("Group") == sweep, ws.Metric("JobType") == job, *more)


def workspace(sweep: str, entity: str, project: str) -> Any:
    """The workspace of a study."""
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"peerscale {sweep}",
        sections=[ws.Section(name=name, panels=panels, is_open=True) for name, panels in sections().items()],
        runset_settings=ws.RunsetSettings(
            filters=cells_of(sweep),
            pinned_columns=["summary:status", "summary:reason", "summary:signals"],
        ),
    )


def report(study: Study, entity: str, project: str) -> Any:
    """The report: how to read it, figures, fits, final losses a budget, and every panel of the workspace."""
    runs = read_runs(study.runs)

    def grid(name: str, panels: list[Any], *more: Any) -> Any:
        runset = wr.Runset(entity=entity, project=project, name=name, filters=cells_of(study.sweep, *more))
        return wr.PanelGrid(runsets=[runset], panels=panels)

    figures = [f"figures/{path.stem}" for path in sorted(study.figures.glob("*.png"))]
    made = wr.Runset(entity=entity, project=project, name="study", filters=cells_of(study.sweep, job="study"))
    blocks = [
        wr.H1("How to read this"), wr.MarkdownBlock(HOW_TO_READ),
        wr.H1("Figures"),
        wr.PanelGrid(runsets=[made], panels=[wr.MediaBrowser(media_keys=figures, layout=wr.Layout(w=24, h=16))]),
        *([wr.MarkdownBlock(study.table.read_text(encoding="utf-8"))] if study.table.is_file() else []),
        wr.H1("Final loss against parameters, a budget each"),
    ]  # fmt: skip
    for budget in sorted(runs.loc[usable(runs), "budget"].unique()):
        name = f"{budget:g} FLOPs"
        blocks.append(grid(name, [final(name, "derived.params_total")], ws.Config("budget") == float(budget)))
    bad = runs[runs["status"].isin(["failed", "diverged"])]
    for name, panels in sections().items():
        blocks += [wr.H1(name), grid("cells", panels)]
    listed = "\n".join(f"- `{row.cell}`: {row.status}, {row.reason}" for row in bad.itertuples()) or "None."
    blocks.append(wr.MarkdownBlock(listed))
    return wr.Report(
        entity=entity, project=project, title=f"peerscale {study.sweep}", description="IsoFLOP study", blocks=blocks
    )


def save(study: Study, entity: str, project: str) -> dict[str, str]:
    """Put both on the server, over those of an earlier call; their addresses."""
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    entity = entity or str(wandb.Api().default_entity)
    views = study.folder / VIEWS
    known = read_json(views) if views.is_file() else {}
    saved = workspace(study.sweep, entity, project)
    if url := known.get("workspace"):
        before, wanted = ws.Workspace.from_url(url), saved
        saved, saved.sections, saved.runset_settings = before, wanted.sections, wanted.runset_settings
    saved.save()
    known["workspace"] = saved.url
    write_text(views, json.dumps(known) + "\n")
    text = report(study, entity, project)
    text.id = known.get("report", "")
    text.save()
    write_text(views, json.dumps({**known, "report": text.id}) + "\n")
    return {"workspace": saved.url, "report": text.url}


if __name__ == "__main__":
    sys.exit(exit_code(main))
