"""The `sweep` section of a study file."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from peerscale.config.errors import ConfigError
from peerscale.config.schema import load
from peerscale.config.study import ClaimsConfig, GridRow, SweepConfig, load_sweep, parse_sweep
from peerscale.files import ROOT
from peerscale.plan.cells import count_cells, planned_cells
from peerscale.records.fingerprint import hashed_config
from toy_study import CORPUS, write_study

NOT_POSITIVE = "input should be greater than 0, not"
STUDY = {"methods": ["dense"], "grid": [{"budget": 1e12, "sizes": ["d8"]}]}

SWEEP_MESSAGES = [
    ({"methods": []}, "sweep.methods: list should have at least 1 item after validation, not 0, not []"),
    ({"grid": []}, "sweep.grid: list should have at least 1 item after validation, not 0, not []"),
    ({"grid": [{"budget": 0, "sizes": ["d8"]}]}, f"sweep.grid.0.budget: {NOT_POSITIVE} 0"),
    ({"grid": [{"budget": 1e12}]}, "sweep.grid.0.sizes: missing"),
    ({"seeds": []}, "sweep.seeds: list should have at least 1 item after validation, not 0, not []"),
    ({"min_sizes": 0}, f"sweep.min_sizes: {NOT_POSITIVE} 0"),
    (
        {"grid": [{"budget": 1, "sizes": ["d8"], "window": 3}]},
        "sweep.grid.0.window: [low, high] in FLOPs per token, not 3",
    ),
    (
        {"grid": [{"budget": 1, "sizes": ["d8"], "window": [1, 2, 3]}]},
        "sweep.grid.0.window: [low, high] in FLOPs per token, not [1, 2, 3]",
    ),
    ({"grid": [{"budget": 1, "sizes": ["d8"], "window": [0, 2]}]}, f"sweep.grid.0.window.0: {NOT_POSITIVE} 0"),
    (
        {"grid": [{"budget": 1, "sizes": ["d8"], "window": [3e6, 1e6]}]},
        "sweep.grid.0: window [3e+06, 1e+06] must be [low, high] with low < high, in FLOPs per token",
    ),
    (
        {"grid": [{"budget": 1e12, "sizes": ["d8"], "window": [1, high]} for high in (2, 3)]},
        "grid has the windows [1, 2] and [1, 3] at 1e+12: a budget has one",
    ),
    ({"claims": {"method": "dense"}}, "sweep.claims.rivals: missing"),
    (
        {"claims": {"method": "dense", "rivals": []}},
        "sweep.claims.rivals: list should have at least 1 item after validation, not 0, not []",
    ),
    ({"claims": 3}, "sweep.claims: input should be a dictionary or an instance of ClaimsConfig, not 3"),
]


@pytest.mark.parametrize(("change", "message"), SWEEP_MESSAGES, ids=[message for _, message in SWEEP_MESSAGES])
def test_a_wrong_study_is_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    parse_sweep(STUDY)
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        parse_sweep({**STUDY, **change})


KEYS = "methods, grid, budgets, seeds, axes, method_axes, min_sizes, claims, branches, trend_from, held_out, rates_cost"


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (
            {"axis": {}},
            f"axis; there are: {KEYS}",
        ),
        (
            {"sizes": ["d8"]},
            f"sizes; there are: {KEYS}",
        ),
        (
            {"grid": [{"budget": 1e12, "sizes": ["d8"], "seed": [1]}]},
            "grid.0.seed; there are: budget, sizes, seeds, methods, axes, batch_sequences, window",
        ),
    ],
)
def test_an_unknown_key_of_a_study_is_refused_by_name(change: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=f"^unknown key sweep.{re.escape(key)}$"):
        parse_sweep({**STUDY, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"seeds": [-1]},
        {"axes": {"optim.lr": []}},
    ],
    ids=str,
)
def test_a_study_without_possible_cells_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        parse_sweep({**STUDY, **change})


# Rows of the grid with methods and axes of their own


def test_a_row_may_name_methods_and_axes_of_its_own(tmp_path: Path) -> None:
    grid = [row(1e10, "d8"), row(3e10, "d12", "d16", methods=["peer"], axes={"optim.lr": [0.02, 0.03]}, seeds=[0, 1])]
    study = {"methods": ["dense", "peer"], "grid": grid, "axes": {"context": [32]}, "min_sizes": 1}
    file = write_study(tmp_path, str(study))
    expected = {f"{method}-d8-1e10-context=32-s0" for method in ("dense", "peer")}
    expected |= {
        f"peer-{s}-3e10-context=32-lr={lr}-s{n}" for s in ("d12", "d16") for lr in (0.02, 0.03) for n in (0, 1)
    }
    cells = planned_cells(file)
    assert {cell.name for cell in cells} == expected and len(cells) == len(expected) == count_cells(load_sweep(file))
    assert {cell.config.optim.lr for cell in cells if "lr=0.03" in cell.name} == {0.03}
    part = planned_cells(file, ["sweep.methods=[dense]"])
    assert [cell.name for cell in part] == ["dense-d8-1e10-context=32-s0"]


def test_the_usual_value_in_a_row_makes_no_other_cell(tmp_path: Path) -> None:
    usual = load(["ffn=dense"]).optim.lr
    grid = [row(1e10, "d8", axes={"optim.lr": [usual, usual / 2]})]
    names = [cell.name for cell in planned_cells(write_study(tmp_path, str({"methods": ["dense"], "grid": grid})))]
    assert names == ["dense-d8-1e10-s0", f"dense-d8-1e10-lr={usual / 2}-s0"]


# The window of sizes that a fit takes


def row(budget: float, *sizes: str, **more: Any) -> dict[str, Any]:
    return {"budget": budget, "sizes": list(sizes), **more}


def test_a_row_has_a_batch_of_its_own_that_no_name_tells(tmp_path: Path) -> None:
    grid = [row(1e10, "d8", batch_sequences=8), row(2e10, "d8"), row(2e10, "d8", seeds=[1], batch_sequences=32)]
    file = write_study(tmp_path, str({"methods": ["dense"], "grid": grid}))
    cells = planned_cells(file)
    assert [cell.name for cell in cells] == ["dense-d8-1e10-s0", "dense-d8-2e10-s0", "dense-d8-2e10-s1"]
    assert [cell.config.batch_sequences for cell in cells] == [8, 16, 32]
    assert [cell.plan.tokens // cell.plan.steps for cell in cells] == [8 * 64, 16 * 64, 32 * 64]
    with pytest.raises(ConfigError, match="varies batch_sequences; its values are in the grid or the axes"):
        planned_cells(file, ["batch_sequences=64"])
    with pytest.raises(ConfigError, match="either one value of batch_sequences or an axis of it, not both"):
        parse_sweep({**STUDY, "grid": [row(1e10, "d8", batch_sequences=8, axes={"batch_sequences": [16]})]})


def test_a_window_given_in_one_row_holds_for_its_budget() -> None:
    grid = [row(1e12, "d8"), row(1e12, "d12", window=[1e5, 3e6]), row(3e12, "d16")]
    study = parse_sweep({**STUDY, "grid": grid})
    assert study.window(1e12) == (1e5, 3e6)
    assert study.window(3e12) is None
    assert study.rows == study.grid, "sizes outside of it are trained too"
    again = parse_sweep({**STUDY, "grid": [row(1e12, "d8", window=[1e5, 3e6]), row(1e12, "d12", window=[1e5, 3e6])]})
    assert again.window(1e12) == (1e5, 3e6)


# What a study claims

CLAIMS = {"method": "peer", "rivals": ["dense", "moe"]}
CLAIMING = {
    "methods": ["dense", "moe", "pkm", "peer"],
    "grid": [row(1e10, "d8", window=[1e4, 1e9]), row(3e10, "d12")],
    "method_axes": {"peer": {"optim.table_lr": [0.01]}},
    "claims": CLAIMS,
}


def test_claims_name_a_method_its_rivals_and_budgets() -> None:
    assert parse_sweep(STUDY).claims is None
    assert parse_sweep(CLAIMING).claims == ClaimsConfig(method="peer", rivals=["dense", "moe"], budgets=None)
    some = parse_sweep({**CLAIMING, "claims": {**CLAIMS, "budgets": [3e10]}}).claims
    assert some is not None and some.budgets == [3e10]


WRONG_CLAIMS = [
    ({"method": "per"}, "claims names per, but the methods are dense, moe, pkm, peer"),
    ({"rivals": ["dense", "mo"]}, "claims names mo, but the methods are dense, moe, pkm, peer"),
    ({"rivals": ["peer"]}, "claims names peer as its own rival"),
    ({"rivals": ["moe", "moe"]}, "claims.rivals has a value twice: moe, moe"),
    ({"budgets": [1e10, 2e10]}, "claims.budgets names 2e+10, but the grid has 1e+10, 3e+10"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_CLAIMS, ids=[message for _, message in WRONG_CLAIMS])
def test_claims_about_what_the_study_does_not_have_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        parse_sweep({**CLAIMING, "claims": {**CLAIMS, **change}})


def claiming(folder: Path, **claims: Any) -> Path:
    return write_study(folder, str({**CLAIMING, "claims": {**CLAIMS, **claims}}))


@pytest.mark.parametrize(
    "override", ["sweep.methods=[peer]", "sweep.methods=[dense,moe]", "sweep.budgets=[1e10]", "sweep.seeds=[1]"]
)
def test_a_part_of_a_study_has_cells_but_says_nothing_of_results(override: str, tmp_path: Path) -> None:
    """A method may be left out with all rows of a budget that the claims, or the trend, name."""
    grid = [row(1e10, "d8", methods=["dense"]), row(3e10, "d8", methods=["dense", "peer", "moe"])]
    study = {**CLAIMING, "grid": grid, "claims": {**CLAIMS, "budgets": [1e10]}, "trend_from": 1e10, "held_out": ["d8"]}
    part = load_sweep(write_study(tmp_path, str(study)), [override])
    assert part.rows and part.claims is None and part.trend_from is None and part.held_out == []


@pytest.mark.parametrize("key", ["claims.rivals=[pkm]", "trend_from=1e10", "rates_cost=0.1", "held_out=[d8]"])
def test_what_results_are_computed_from_cannot_be_overridden(key: str, tmp_path: Path) -> None:
    file = claiming(tmp_path)
    with pytest.raises(ConfigError, match=rf"^sweep\.{key[:4]}\w* is about results and cannot be overridden"):
        load_sweep(file, [f"sweep.{key}"])


def test_a_method_that_no_row_has_is_refused(tmp_path: Path) -> None:
    file = write_study(tmp_path, str({**STUDY, "grid": [row(1e10, "d8", methods=[*STUDY["methods"]])]}))
    with pytest.raises(ConfigError, match=r"^every row of the grid names its methods, and none has gated: "):
        load_sweep(file, ["sweep.methods=[gated]"])


def test_what_a_file_claims_is_checked_though_a_part_is_chosen(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^claims names per, but the methods are dense, moe, pkm, peer$"):
        load_sweep(claiming(tmp_path, method="per"), ["sweep.methods=[dense]"])


def test_windows_and_claims_change_no_cell(tmp_path: Path) -> None:
    plain = {**CLAIMING, "grid": [row(1e10, "d8"), row(3e10, "d12")]}
    del plain["claims"]
    with_both = planned_cells(claiming(tmp_path))
    without = planned_cells(write_study(tmp_path, str(plain)))
    assert [cell.name for cell in with_both] == [cell.name for cell in without]
    hashed = ([hashed_config(cell.config, cell.plan, CORPUS) for cell in cells] for cells in (with_both, without))
    assert next(hashed) == next(hashed)


# The template


def test_the_template_names_every_key_of_a_study() -> None:
    text = (ROOT / "sweeps/template.yaml").read_text()
    for field in fields(SweepConfig):
        assert re.search(rf"^  (# )?{field.name}:", text, flags=re.M), field.name
    for field in fields(GridRow):
        assert f"{field.name}: " in text, field.name


def test_every_line_of_the_template_that_is_commented_out_works(tmp_path: Path) -> None:
    text = (ROOT / "sweeps/template.yaml").read_text()
    file = tmp_path / "mine.yaml"
    file.write_text(
        re.sub(r"^  # (?=(axes|method_axes|budgets|  peer): )|^  # (?=method_axes:$)", "  ", text, flags=re.M)
    )
    cells = planned_cells(file)
    assert {cell.config.budget for cell in cells} == {2e11}
    assert len(cells) == (5 + 1) * (4 + 4 * 2)
