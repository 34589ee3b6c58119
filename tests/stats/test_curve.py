"""What a curve is, by one row alone, and what it is compared with."""

import json

import pandas as pd
import pytest

from peerscale.stats.curve import Curve, by_curve, curves_of, described_curves, finished, from_names, to_names, usable
from toy_study import curve_of, settings_text


def table(*rows: tuple[str, str | None, str]) -> pd.DataFrame:
    """Method, variant, and settings such as `lr=0.001`."""
    frame = pd.DataFrame(rows, columns=["method", "variant", "settings"])
    return frame.assign(settings=frame["settings"].map(settings_text), rate_factor=1.0, status="done", val_loss=4.0)


ROWS = table(
    ("moe", None, ""), ("moe", "token_choice", ""), ("peer", None, "lr=0.001"), ("peer", None, "lr=0.003-top_k=8")
)


def test_a_curve_is_a_method_with_its_variant_and_settings_and_has_a_name() -> None:
    found = curves_of(ROWS)
    assert [*found] == [
        Curve("moe"), Curve("moe_token_choice"), Curve("peer", (("optim.lr", 0.001),)),
        Curve("peer", (("optim.lr", 0.003), ("top_k", 8))),
    ]  # fmt: skip
    assert [*map(str, found)] == ["moe", "moe_token_choice", "peer lr=0.001", "peer lr=0.003-top_k=8"]
    assert [*map(str, found.map(lambda each: each.without("optim.lr")))] == [
        "moe",
        "moe_token_choice",
        "peer",
        "peer top_k=8",
    ]
    assert found[3].plain == Curve("peer") and str(found[3].with_method("pkm")) == "pkm lr=0.003-top_k=8"


@pytest.mark.parametrize("i", range(len(ROWS)))
def test_what_a_row_is_does_not_depend_on_other_rows(i: int) -> None:
    """Not even on whether all of them have one setting, or all bracket a rate."""
    alone = ROWS.iloc[[i]]
    assert curves_of(alone)[i] == curves_of(ROWS)[i] and len(finished(alone)) == 1
    assert finished(alone.assign(rate_factor=0.5)).empty


def test_values_that_are_lists_make_curves_too() -> None:
    one, other = (
        curves_of(table(("peer", None, "")).assign(settings=f'{{"a.b": {value}}}'))[0] for value in ("[1, 2]", "[1, 3]")
    )
    assert one != other and len({one, other, one}) == 2 and str(one).startswith("peer b=")


def test_curves_ascend_by_their_numbers_and_find_their_rows() -> None:
    names = ["pkm", "peer n_experts=16384", "peer", "peer n_experts=4096", "peer n_experts=4096-query_norm=true"]
    assert [*map(str, sorted(map(curve_of, names)))] == [names[2], names[3], names[4], names[1], names[0]]
    rows = finished(pd.concat([ROWS, ROWS], ignore_index=True))
    assert {each: len(of) for each, of in by_curve(rows).items()} == dict.fromkeys(curves_of(ROWS), 2)


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
        ("peer lr=2", "moe lr=1", ["moe lr=1", "peer lr=1", "peer lr=2"], "peer lr=2"),
        ("moe", "peer", ["moe_token_choice", "peer"], None),
    ],
)  # fmt: skip
def test_the_curve_to_compare_with(reference: str, name: str, names: list[str], variant: str | None) -> None:
    found = curve_of(name).counterpart(curve_of(reference), [*map(curve_of, names)])
    assert (None if found is None else str(found)) == variant


def test_a_setting_is_switched_off_by_itself() -> None:
    both = Curve.of("peer", {"ffn.n_experts": 64, "ffn.query_norm": True, "ffn.bias": True})
    assert [*map(str, both.switched_off())] == [
        "peer n_experts=64-query_norm=false-bias=true",
        "peer n_experts=64-query_norm=true-bias=false",
    ]
    assert Curve("peer").switched_off() == []


def test_names_in_results_are_read_back_as_curves() -> None:
    curves = curves_of(ROWS)
    one = {
        "method": curves[3],
        "reference": curves[0],
        "note": "moe",
        "groups": {curves[2]: {"m": 1.0}},
        "value": [0.5],
    }
    fits = {"differences": [one], "curves": described_curves(curves), "baseline": "moe"}
    stored = json.loads(json.dumps(to_names(fits)))
    assert stored["differences"][0]["method"] == "peer lr=0.003-top_k=8"
    assert from_names(stored) == {**fits, "curves": {str(each): each for each in curves}}
