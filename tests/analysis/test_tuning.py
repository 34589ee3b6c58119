"""The learning-rate table against means worked out by hand."""

import pandas as pd
import pytest
from synthetic_study import script

from peerscale.errors import UserError

tuning = script("tuning")


def run(method: str, size: str, lr: str, loss: float, table_lr: float | None = None, status: str = "done") -> dict:
    axes = f"lr={lr}" + (f"-table_lr={table_lr}" if table_lr else "")
    return {
        "cell": f"{method}-{size}-5e11-{axes}-s0",
        "method": method,
        "variant": "",
        "size": size,
        "seed": 0,
        "table_lr": table_lr,
        "val_loss": loss,
        "status": status,
    }


def test_orders_settings_by_their_mean_over_sizes_and_names_an_edge() -> None:
    runs = [
        run("dense", size, lr, loss)
        for lr, losses in {"0.01": (5.0, 5.2), "0.02": (5.1, 4.9), "1e-05": (6.0, 7.0)}.items()
        for size, loss in zip(("d16", "d32"), losses, strict=True)
    ]
    runs += [run("dense", "d16", "0.04", 1.0), run("dense", "d32", "0.04", float("nan"), status="diverged")]
    table = tuning.settings_table(pd.DataFrame(runs))
    assert list(table["lr"]) == [0.02, 0.01, 1e-05], "a setting that diverged at one size is no setting"
    assert list(table["mean"]) == pytest.approx([5.0, 5.1, 6.5])
    assert tuning.edges(table) == ["the best lr, 0.02, is at the edge of its grid: extend it"]


def test_two_rates_are_one_setting() -> None:
    losses = {("0.01", 0.1): 3.0, ("0.01", 0.2): 2.0, ("0.02", 0.1): 1.0, ("0.02", 0.2): 4.0}
    runs = [run("peer", "d16", lr, loss, table_lr) for (lr, table_lr), loss in losses.items()]
    table = tuning.settings_table(pd.DataFrame(runs))
    assert list(zip(table["lr"], table["table_lr"], strict=True)) == [
        (0.02, 0.1),
        (0.01, 0.2),
        (0.01, 0.1),
        (0.02, 0.2),
    ]


def test_says_so_when_nothing_is_complete() -> None:
    runs = [run("dense", "d16", "0.01", 5.0), run("dense", "d32", "0.02", 5.0)]
    with pytest.raises(UserError, match="no setting was trained at every size"):
        tuning.settings_table(pd.DataFrame(runs))
