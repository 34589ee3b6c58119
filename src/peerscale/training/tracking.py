"""Metrics of a cell, to `metrics.jsonl` and to Weights & Biases; the only training module that imports wandb."""

import json
import os
from pathlib import Path
from typing import Any

from peerscale.config import Config
from peerscale.files import write_text
from peerscale.runs.table import METRICS, read_metrics


class Tracker:
    """Writes each row to both; rows carry step, tokens and flops, so that either can be the x axis."""

    def __init__(
        self, folder: Path, config: Config, *, sweep: str, cell: str, run_id: str, summary: dict[str, Any]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / METRICS
        self.file = self.path.open("a", encoding="utf-8")
        self.run = _start_wandb(folder, config, sweep=sweep, cell=cell, run_id=run_id, summary=summary)

    def log(self, row: dict[str, float]) -> None:
        """One row of training metrics."""
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.run is not None:
            axes = {key: row[key] for key in ("tokens", "flops")}
            metrics = {f"train/{key}": value for key, value in row.items() if key not in ("step", "tokens", "flops")}
            self.run.log({**axes, **metrics}, step=int(row["step"]))

    def finish(self, summary: dict[str, Any], *, failed: bool = False) -> None:
        """Close both; `summary` becomes the W&B run's."""
        self.file.close()
        if self.run is not None:
            self.run.summary.update(summary)
            self.run.finish(exit_code=1 if failed else 0)
            self.run = None


def cut_back(folder: Path, step: int) -> None:
    """Drop the rows of `metrics.jsonl` after `step`, which a resumed run writes again."""
    if (folder / METRICS).exists():
        kept = [json.dumps(row) + "\n" for row in read_metrics(folder) if row["step"] <= step]
        write_text(folder / METRICS, "".join(kept))


def _start_wandb(
    folder: Path, config: Config, *, sweep: str, cell: str, run_id: str, summary: dict[str, Any]
) -> Any | None:
    tracking = config.tracking
    if tracking.mode == "disabled":
        return None
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    from peerscale.config import to_dict

    run = wandb.init(
        mode=tracking.mode,
        project=tracking.project,
        entity=tracking.entity,
        dir=folder,
        id=run_id,
        resume="allow",
        name=cell,
        group=sweep,
        job_type="train",
        tags=[sweep, config.ffn.name, config.size.name, *tracking.tags],
        config={**to_dict(config), "derived": summary},
        settings=wandb.Settings(console="off", silent=True, x_disable_stats=True, x_disable_meta=True),
    )
    run.define_metric("tokens")
    run.define_metric("flops")
    run.define_metric("train/*", step_metric="tokens")
    return run
