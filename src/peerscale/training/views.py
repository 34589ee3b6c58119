"""The W&B workspace of a study, and a report with its figures, tables and how to read them.

They show what `make sync` has uploaded. Needs the package wandb-workspaces, an extra.
"""

import contextlib
import importlib
import json
from pathlib import Path
from typing import Any

import yaml

from peerscale.errors import UserError
from peerscale.files import write_text
from peerscale.runs.study import Study, read_json, usable
from peerscale.runs.table import read_runs

wr: Any = None
ws: Any = None
with contextlib.suppress(ImportError):
    wr = importlib.import_module("wandb_workspaces.reports.v2")
    ws = importlib.import_module("wandb_workspaces.workspaces")

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


def tracking_of(folder: Path) -> dict[str, Any]:
    """Project and entity, as the first cell of a study has them; raises `UserError` without cells or the package."""
    if ws is None:
        raise UserError("wandb-workspaces is not installed: .venv/bin/python -m pip install --editable '.[report]'")
    for path in sorted(folder.glob("*/config.yaml")):
        return yaml.safe_load(path.read_text(encoding="utf-8"))["tracking"]
    raise UserError(
        f"no cells in {folder}, whose config.yaml names the W&B project; first: make sweep SWEEP={folder.name}"
    )


def workspace_json(sweep: str, tracking: dict[str, Any]) -> str:
    """The workspace of a study as the server has it, without a server."""
    built = workspace(sweep, tracking["entity"] or "ENTITY", tracking["project"])
    return built._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=1) + "\n"  # no public way


def save(study: Study, tracking: dict[str, Any]) -> dict[str, str]:
    """Put workspace and report on the server, over those of an earlier call; their addresses."""
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    entity, project = tracking["entity"] or str(wandb.Api().default_entity), tracking["project"]
    views = study.folder / VIEWS
    known = read_json(views) if views.is_file() else {}
    saved = workspace(study.sweep, entity, project)
    if url := known.get("workspace"):
        before, wanted = ws.Workspace.from_url(url), saved
        saved, saved.sections, saved.runset_settings = before, wanted.sections, wanted.runset_settings
    saved.save()
    write_text(views, json.dumps({**known, "workspace": saved.url}) + "\n")
    text = report(study, entity, project)
    text.id = known.get("report", "")
    text.save()
    write_text(views, json.dumps({"workspace": saved.url, "report": text.id}) + "\n")
    return {"workspace": saved.url, "report": text.url}


def sections() -> dict[str, list[Any]]:
    """The panels by section."""
    by_method: dict[str, Any] = {"groupby": "ffn.method", "max_runs_to_show": 100}

    def lines(title: str, metric: str, x: str, **options: Any) -> Any:
        return wr.LinePlot(title=title, x=x, y=[metric], title_x=x, **by_method, **options)

    def bars(title: str, metrics: list[str], how: Any) -> Any:
        return wr.BarPlot(title=title, metrics=metrics, groupby_aggfunc=how, **by_method)

    budget = wr.Config("budget")
    return {
        "Loss": [lines(f"Training loss against {name}", "train/loss", name.lower(), log_x=True)
                 for name in ("FLOPs", "tokens")],
        "Final loss": [final(f"Final loss against {name}; colour: budget", f"derived.{column}", z=budget)
                       for name, column in (("parameters", "params_total"), ("FLOPs per token", "flops_per_token"))],
        "Router": [lines("Expert usage", "train/expert_usage", "tokens"),
                   lines("Unevenness, nats", "train/unevenness", "tokens")],
        "Speed": [lines("Tokens per second", "train/tokens_per_s", "tokens"),
                  bars("FLOP/s, mean", ["flops_per_s"], "mean")],
        "Failed and diverged": [bars("Failed and diverged cells", ["failed", "diverged"], "sum")],
    }  # fmt: skip


def final(title: str, x: str, **options: Any) -> Any:
    """Final losses against a number of the configuration."""
    return wr.ScatterPlot(title=title, x=wr.Config(x), y=wr.SummaryMetric("validation/loss"), log_x=True, **options)


def cells_of(sweep: str, *more: Any, job: str = "train") -> Any:
    """Which runs are shown."""
    return ws.And(ws.Metric("Group") == sweep, ws.Metric("JobType") == job, *more)


def workspace(sweep: str, entity: str, project: str) -> Any:
    """The workspace of a study."""
    pinned = ["summary:status", "summary:reason", "summary:signals"]
    return ws.Workspace(
        entity=entity, project=project, name=f"peerscale {sweep}",
        sections=[ws.Section(name=name, panels=panels, is_open=True) for name, panels in sections().items()],
        runset_settings=ws.RunsetSettings(filters=cells_of(sweep), pinned_columns=pinned),
    )  # fmt: skip


def report(study: Study, entity: str, project: str) -> Any:
    """The report: how to read it, figures, tables, final losses a budget, and every panel of the workspace."""
    runs = read_runs(study.runs)

    def grid(name: str, panels: list[Any], *more: Any, job: str = "train") -> Any:
        filters = cells_of(study.sweep, *more, job=job)
        return wr.PanelGrid(
            runsets=[wr.Runset(entity=entity, project=project, name=name, filters=filters)], panels=panels
        )

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
        blocks.append(grid(name, [final(name, "derived.params_total")], ws.Config("budget") == float(budget)))
    for name, panels in sections().items():
        blocks += [wr.H1(name), grid("cells", panels)]
    bad = runs[runs["status"].isin(["failed", "diverged"])]
    listed = "\n".join(f"- `{row.cell}`: {row.status}, {row.reason}" for row in bad.itertuples()) or "None."
    blocks.append(wr.MarkdownBlock(listed))
    title = f"peerscale {study.sweep}"
    return wr.Report(entity=entity, project=project, title=title, description="IsoFLOP study", blocks=blocks)
