"""Which rows of a table of runs make one curve."""

import pandas as pd
import pytest

from peerscale.stats.curves_of_runs import method_names, same_variant, usable
from toy_study import axes_text


def table(*rows: tuple[str, str | None, str, str]) -> pd.DataFrame:
    """Method, variant, cell, and settings such as `lr=0.001`."""
    frame = pd.DataFrame(rows, columns=["method", "variant", "cell", "axes"])
    return frame.assign(seed=0, axes=frame["axes"].map(axes_text))


def test_a_curve_is_named_by_method_and_variant() -> None:
    rows = table(("moe", None, "moe-d8-1e11-s0", ""), ("moe", "token_choice", "moe_token_choice-d8-1e11-s0", ""))
    assert list(method_names(rows)) == ["moe", "moe_token_choice"]


def test_variants_of_an_axis_are_curves_of_their_own() -> None:
    rows = table(
        ("dense", None, "dense-d8-1e11-s0", ""),
        ("peer", None, "peer-d8-1e11-lr=0.001-s0", "lr=0.001"),
        ("peer", None, "peer-d8-1e11-lr=0.003-top_k=8-s0", "lr=0.003-top_k=8"),
    )
    assert list(method_names(rows)) == ["dense", "peer lr=0.001", "peer lr=0.003-top_k=8"]
    assert list(method_names(rows, without=["optim.lr"])) == ["dense", "peer", "peer top_k=8"]


def test_a_setting_common_to_all_cells_is_no_variant() -> None:
    rows = table(*((method, None, f"{method}-d8-1e11-context=8-s0", "context=8") for method in ("dense", "peer")))
    assert list(method_names(rows)) == ["dense", "peer"]


def test_only_finished_cells_with_a_loss_are_usable() -> None:
    rows = pd.DataFrame(
        {"status": ["done", "diverged", "done", "done", "failed"], "val_loss": [4.0, 5.0, float("inf"), None, None]}
    )
    assert list(usable(rows)) == [True, False, False, False, False]


@pytest.mark.parametrize(
    ("reference", "name", "names", "variant"),
    [
        ("dense", "peer", ["dense", "peer"], "dense"),
        ("dense", "peer batch_sequences=8", ["dense batch_sequences=8", "dense", "peer batch_sequences=8"],
         "dense batch_sequences=8"),
        ("dense", "peer top_k=8", ["dense", "peer top_k=8"], "dense"),
        ("dense", "dense lr=1", ["dense", "dense lr=1"], "dense"),
        ("dense", "dense", ["dense", "peer"], None),
        ("dense", "dense lr=1", ["dense lr=1", "peer lr=1"], None),
        ("peer", "dense lr=1", ["dense lr=1", "peer lr=1", "peer lr=2"], "peer lr=1"),
        ("peer", "moe", ["moe", "peer lr=2"], None),
        ("moe", "peer", ["moe_token_choice", "peer"], None),
    ],
)  # fmt: skip
def test_the_curve_to_compare_with(reference: str, name: str, names: list[str], variant: str | None) -> None:
    assert same_variant(reference, name, names) == variant
