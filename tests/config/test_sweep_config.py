"""The `sweep` section of a study file, and what a study's file may hold."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from peerscale.config.study import ClaimsConfig, GridRow, Part, SweepConfig, load_sweep, part_of
from peerscale.config.study_file import read_study, sweep_file
from peerscale.errors import ConfigError
from peerscale.files import ROOT
from peerscale.plan.cells import planned_cells
from toy_study import write_study

STUDY: dict[str, Any] = {"methods": ["dense"], "grid": [{"budget": 1e12, "d_model": [8]}]}


def row(budget: float, *widths: int, **more: Any) -> dict[str, Any]:
    return {"budget": budget, "d_model": list(widths), **more}


CLAIMS = {"method": "peer", "rivals": ["dense", "moe"]}
CLAIMING = {
    "methods": ["dense", "moe", "pkm", "peer"],
    "grid": [row(1e10, 8), row(3e10, 12)],
    "method_axes": {"peer": {"optim.table_lr": [0.01]}},
    "claims": CLAIMS,
}


def sweep_of(folder: Path, study: dict[str, Any]) -> SweepConfig:
    return load_sweep(write_study(folder, str(study)))


METHODS = "but there are dense, moe, peer, pkm"
AT_LEAST_1 = "List should have at least 1 item after validation, not 0, not []"
MESSAGES = [
    ({"methods": []}, f".methods: {AT_LEAST_1}"),
    ({"grid": [{"budget": 0, "d_model": 8}]}, ".grid.0.budget: Input should be greater than 0, not 0"),
    ({"grid": [{"budget": 1e12}]}, ".grid.0.d_model: Field required"),
    ({"grid": [row(1e12, 8, head_dim=[8, 4])]},
     ".grid.0: head_dim has 2 values for 1 of d_model; give one, or as many"),
    ({"grid": [row(1e12, 8, seed=[1])]}, ".grid.0.seed: Unexpected keyword argument; did you mean seeds?"),
    ({"axis": {}}, ".axis: Unexpected keyword argument; did you mean axes?"),
    ({"axes": {"optim.lr": 1}}, ".axes.optim.lr: Input should be a valid list, not 1"),
    ({"seeds": [-1]}, ".seeds.0: Input should be greater than or equal to 0, not -1"),
    ({"held_out": [12]}, ": held_out names 12, but there are 8"),
    ({"baseline": "moe"}, ": baseline names moe, but there are dense"),
    ({"method_settings": {"per": {"optim.lr": 1}}}, ": method_settings names per, but there are dense"),
    ({**CLAIMING, "claims": {**CLAIMS, "method": "per"}}, f": claims.method names per, {METHODS}"),
    ({**CLAIMING, "claims": {**CLAIMS, "rivals": ["peer"]}},
     ": claims.rivals names peer, but there are dense, moe, pkm"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), MESSAGES, ids=[message for _, message in MESSAGES])
def test_a_wrong_study_is_refused_in_one_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^toy.yaml: sweep{re.escape(message)}$"):
        sweep_of(tmp_path, {**STUDY, **change})


def test_a_row_has_one_value_for_all_its_sizes_or_one_for_each() -> None:
    one = GridRow(budget=1e12, d_model=64, head_dim=8)
    assert one.sizes == [{"d_model": 64, "head_dim": 8}]
    several = GridRow(budget=1e12, d_model=[256, 384, 384], n_layers=[4, 6, 8], head_dim=64)
    assert several.sizes == [
        {"d_model": width, "head_dim": 64, "n_layers": n} for width, n in ((256, 4), (384, 6), (384, 8))
    ]


def test_what_a_study_says_of_its_results(tmp_path: Path) -> None:
    plain = sweep_of(tmp_path, STUDY)
    assert (plain.claims, plain.baseline, plain.min_sizes) == (None, "dense", 4)
    study = sweep_of(tmp_path, {**CLAIMING, "baseline": "moe"})
    assert study.claims == ClaimsConfig(method="peer", rivals=["dense", "moe"]) and study.baseline == "moe"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "dense-1 peer-1 dense-2 peer-2 peer-7"),
        (["sweep.methods=[peer]"], "peer-1 peer-2 peer-7"),
        (["sweep.methods=[gated,dense]"], "gated-1 dense-1 gated-2 dense-2"),
        (["sweep.budgets=[1e10]"], "dense-1 peer-1 dense-2 peer-2"),
        (["sweep.seeds=[2]", "optim.lr=1"], "dense-2 peer-2"),
        (["sweep.seeds=[7]", "sweep.methods=[peer]"], "peer-7 peer-7"),
        (["sweep.seeds=[3,7]", "sweep.budgets=[3e10]"], "peer-7"),
        (["sweep.methods=[dense]", "sweep.budgets=[3e10]"], ""),
    ],
)
def test_a_part_of_a_study_also_chooses_among_what_rows_have_of_their_own(
    overrides: list[str], expected: str, tmp_path: Path
) -> None:
    grid = [row(1e10, 8), row(3e10, 8, methods=["peer"], seeds=[7])]
    study = sweep_of(tmp_path, {"methods": ["dense", "peer"], "grid": grid, "seeds": [1, 2]})
    points = [f"{point.method}-{point.keys['seed']}" for point in study.points(part_of(overrides))]
    assert sorted(points) == sorted(expected.split())


@pytest.mark.parametrize("override", ["sweep.rates_cost=0.1", "~sweep.claims", "sweep.method=[peer]"])
def test_a_part_is_chosen_by_methods_budgets_and_seeds_alone(override: str) -> None:
    with pytest.raises(ConfigError, match=r"^sweep\.\w+ cannot be overridden, only sweep\.methods, sweep\.budgets, sw"):
        part_of([override])


# The file


def test_a_study_is_found_by_name_or_path() -> None:
    assert sweep_file("smoke") == sweep_file(ROOT / "sweeps/smoke.yaml") == ROOT / "sweeps/smoke.yaml"
    known = ", ".join(sorted(path.stem for path in (ROOT / "sweeps").glob("*.yaml")))
    with pytest.raises(ConfigError, match=f"^no sweep file nosuch.yaml; in sweeps/ there are: {known}$"):
        sweep_file("nosuch")


FILES = [
    ("seed: 1\n", "toy.yaml: input should be a mapping with a `sweep:` section"),
    ("- 1\n", "toy.yaml: input should be a mapping with a `sweep:` section"),
    ("3\n", "toy.yaml: Invalid loaded object type: int"),
    ("sweep: 3\n", "toy.yaml: input should be a mapping with a `sweep:` section"),
    ("sweep: {}\ndefaults: dense\n", "toy.yaml: defaults should be a list of choices, such as [override data: text]"),
    ("sweep: {}\ndefaults: [1]\n", "toy.yaml: defaults should be a list of choices, such as [override data: text]"),
    ("sweep: {}\nseed: 1\nseed: 2\n", "toy.yaml: while constructing a mapping"),
    ("sweep: !!python/object/apply:os.system ['true']\n", "toy.yaml: could not determine a constructor for the tag"),
    ("sweep: {seeds: '${nosuch}'}\n", "toy.yaml: Interpolation key 'nosuch' not found"),
    ("sweep: {}\n# gr\udcfcn\n", "toy.yaml: 'utf-8' codec can't decode byte"),
]


@pytest.mark.parametrize(("text", "message"), FILES, ids=[text for text, _ in FILES])
def test_a_file_that_is_no_study_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "toy.yaml"
    file.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}") as refused:
        read_study(file)
    assert "\n" not in str(refused.value)


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
    keys = "axes|method_axes|method_settings|held_out|  peer"
    file.write_text(re.sub(rf"^  # (?=({keys}): )|^  # (?=method_axes:$)", "  ", text, flags=re.M))
    cells = planned_cells(file)
    assert len(cells) == len([*load_sweep(file).points(Part())]) == (5 + 5 + 1) * (4 + 4 * 2)
    assert {cell.config.ffn.n_heads for cell in cells if cell.config.ffn.method == "peer"} == {8}
