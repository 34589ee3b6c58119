import functools
import json
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from peerscale.config.compose import composed
from peerscale.config.schema import load, parse_config
from peerscale.config.study import Part, load_sweep
from peerscale.config.study_file import read_study
from peerscale.errors import ConfigError, UserError
from peerscale.files import ROOT
from peerscale.plan.cell import Cell
from peerscale.plan.cell_names import budget_name
from peerscale.plan.cells import planned_cells, single_cell
from peerscale.plan.memory import in_memory
from peerscale.plan.notices import short_methods
from peerscale.plan.plan import Verdict
from peerscale.records.fingerprint import fingerprint, hashed_config
from peerscale.records.outcome import Outcome, outcome
from peerscale.records.record import Status, write_record
from peerscale.records.table import read_records
from toy_study import CORPUS, TOY, kept_in, record_of, write_study

SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))
PUBLISHED = {path.parent.name for path in (ROOT / "results").glob("*/records.jsonl")}
ONE = "grid: [{budget: 1e10, d_model: 8}]"
Write = Callable[..., Path]


@pytest.fixture
def study(tmp_path: Path) -> Write:
    """Writes a study, from its `sweep` section and other settings, into this test's folder."""
    return functools.partial(write_study, tmp_path)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> list[Cell]:
    return planned_cells(write_study(tmp_path_factory.mktemp("toy"), settings="min_steps: 65"))


@pytest.fixture
def cells(toy: list[Cell], tmp_path: Path) -> list[Cell]:
    """The cells of the toy study, three of them dropped, kept in this test's folder."""
    return [kept_in(tmp_path, cell) for cell in toy]


def assert_planned_as_composed(cells: Sequence[Cell], file: Path, overrides: Sequence[str] = ()) -> None:
    """Planning composes each layer and sets the keys of a cell itself; Hydra must make the same of them all."""
    study = load_sweep(file)
    for cell in cells:
        config = cell.config
        size = next(
            size
            for row in study.grid
            for size in row.sizes
            if row.budget == config.budget and all(getattr(config, key) == value for key, value in size.items())
        )
        keys = {**size, "budget": config.budget, "seed": config.seed}
        keys |= study.method_settings.get(config.ffn.name, {})
        keys |= {key: value for key, value in cell.axes.items() if key != "data"}
        words = [f"++{key}={_quoted(value)}" for key, value in keys.items()]
        tree = composed([f"ffn={config.ffn.name}", *words, *overrides], study=read_study(file)).tree
        assert in_memory(parse_config(tree)) == config
        assert pickle.loads(pickle.dumps(cell)) == cell, "a worker receives it as data"


def _quoted(value: Any) -> str:
    """A value in Hydra's grammar, in which a backslash is special only before a quote or the end."""
    if not isinstance(value, str):
        return json.dumps(value)
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value) + "'"


# Every file in sweeps/


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_every_study_plans_and_its_finished_runs_still_count(file: Path) -> None:
    """In one test, as planning takes a second: names, folders, sizes enough, Hydra's opinion, and published records."""
    cells = planned_cells(file.stem)
    assert cells and len(cells) == len([*load_sweep(file).points(Part())])
    for cell in cells:
        assert cell.plan.verdict is Verdict.OK or cell.plan.reason
        assert (cell.sweep, cell.folder) == (file.stem, ROOT / "runs" / file.stem / cell.name)
        config, axes = cell.config, r"(?:-[a-z_0-9]+=[\w.+-]+)*"
        head = re.escape(f"{config.ffn.name}-{config.size_name}-{budget_name(config.budget)}")
        assert re.fullmatch(rf"{head}{axes}-s{config.seed}", cell.name)
    fingerprints = [fingerprint(hashed_config(cell.config, cell.plan, CORPUS)) for cell in cells]
    assert len({*fingerprints}) == len(cells), "two cells of one result"
    assert short_methods(cells, load_sweep(file.stem).min_sizes) == [], "as many sizes as a curve wants"
    assert_planned_as_composed([cells[0], cells[-1]], file)
    if file.stem in PUBLISHED:
        planned = {cell.name: cell for cell in cells}
        records = read_records(ROOT / "results" / file.stem)
        assert len(records) == len(planned)
        for record in (record for record in records if record.status is not Status.PENDING):
            cell, corpus = planned[record.cell], record.hashed_config["data_fingerprint"]
            assert fingerprint(hashed_config(cell.config, cell.plan, corpus)) == record.fingerprint, record.cell
            assert fingerprint(record.hashed_config) == record.fingerprint, record.cell
            assert (cell.axes, cell.config.size_name) == (record.axes, record.size), record.cell


# Studies made up here


def test_the_product_of_methods_pairs_axes_and_seeds(study: Write) -> None:
    cells = planned_cells(
        study(
            "{methods: [dense, peer], grid: [{budget: 1e10, d_model: [8, 12]}, {budget: 3e10, d_model: [16]}], "
            "seeds: [0, 5], axes: {optim.weight_decay: [0.0, 0.1]}, method_axes: {peer: {optim.table_lr: [1e-3, 0.5]}}}"
        )
    )
    names = [cell.name for cell in cells]
    assert len(names) == 3 * 2 * 2 + 3 * 2 * 2 * 2
    assert names[:2] == ["dense-d8-1e10-weight_decay=0.0-s0", "dense-d8-1e10-weight_decay=0.0-s5"]
    assert names[-1] == "peer-d16-3e10-weight_decay=0.1-table_lr=0.5-s5"
    last = cells[-1].config
    assert (last.ffn.method, last.d_model, last.budget, last.seed) == ("peer", 16, 3e10, 5)
    assert (last.optim.weight_decay, last.optim.table_lr) == (0.1, 0.5)
    assert {(cell.config.budget, cell.config.d_model) for cell in cells} == {(1e10, 8), (1e10, 12), (3e10, 16)}


def test_a_row_may_have_methods_axes_seeds_and_a_batch_of_its_own(study: Write) -> None:
    usual = load().optim.lr
    rows = [
        {"budget": 1e10, "d_model": 8, "batch_sequences": 8},
        {
            "budget": 2e10,
            "d_model": [8, 12],
            "methods": ["peer"],
            "axes": {"optim.table_lr": [0.5, 2e-2]},
            "seeds": [3],
        },
        {"budget": 2e10, "d_model": 8, "methods": ["dense"], "axes": {"optim.lr": [usual, 1.0]}},
    ]
    file = study(str({"methods": ["dense", "peer"], "grid": rows, "axes": {"context": [32]}}))
    cells = planned_cells(file)
    assert {cell.name: cell.config.batch_sequences for cell in cells} == {
        "dense-d8-1e10-context=32-s0": 8,
        "dense-d8-2e10-context=32-s0": 16,  # its usual rate makes no other cell
        "dense-d8-2e10-context=32-lr=1.0-s0": 16,
        "peer-d8-1e10-context=32-s0": 8,
        "peer-d8-2e10-context=32-table_lr=0.5-s3": 16,
        "peer-d8-2e10-context=32-s3": 16,
        "peer-d12-2e10-context=32-table_lr=0.5-s3": 16,
        "peer-d12-2e10-context=32-s3": 16,
    }
    assert all(cell.plan.tokens == cell.plan.steps * cell.config.batch_sequences * 32 for cell in cells)
    assert_planned_as_composed(cells, file)


def test_settings_of_one_method_are_in_no_name(study: Write) -> None:
    file = study(f"{{methods: [dense, peer], {ONE}, method_settings: {{peer: {{ffn.top_k: 8, min_steps: 7}}}}}}")
    dense, peer = planned_cells(file)
    assert (peer.name, peer.config.ffn.top_k, peer.config.min_steps) == ("peer-d8-1e10-s0", 8, 7)
    assert dense.config.min_steps == 200
    rows = "{budget: 1e10, d_model: 8, methods: [peer], axes: {ffn.top_k: [8, 16]}}"
    sweep = f"{{methods: [dense, peer], grid: [{{budget: 2e10, d_model: 8}}, {rows}], "
    cells = planned_cells(study(f"{sweep}method_settings: {{peer: {{ffn.top_k: 8}}}}}}"))
    assert [cell.name for cell in cells][2:] == ["peer-d8-1e10-s0", "peer-d8-1e10-top_k=16-s0"]


@pytest.mark.parametrize(
    ("sweep", "settings", "overrides"),
    [
        ("{methods: [peer, moe], grid: [{budget: 1e10, d_model: [8, 112]}, {budget: 1.25e11, d_model: 20}]}", "", []),
        (f"{{methods: [peer], {ONE}, axes: {{replaced: [middle, all, [1, 3]]}}}}", "optim: {beta2: 0.9}", []),
        ("{methods: [peer], grid: [{budget: 1e9, d_model: [8, 16], n_layers: [2, 6], head_dim: 4}]}", "", []),
        (f"{{methods: [pkm], {ONE}, axes: {{ffn.n_experts: [64, 256], ffn.top_k: [4, 8]}}}}", "n_layers: 3", []),
        (f"{{methods: [peer], {ONE}, axes: {{optim.table_lr: [null, 0.01, 1]}}}}", "head_dim: 4", ["context=32"]),
        (TOY, "batch_sequences: 8\nffn: {variant: x}", ["n_layers=2", "optim.lr=0.1", "tracking=disabled"]),
        (TOY, "", ["trainer.threads=2", "tracking.tags=[a,b]", "replaced=all", "context=32"]),
    ],
)
def test_plans_what_hydra_composes(study: Write, sweep: str, settings: str, overrides: list[str]) -> None:
    file = study(sweep, settings)
    if "variant" in settings:
        assert {cell.config.ffn.name for cell in planned_cells(file, overrides)} == {"dense_x", "peer_x"}
    else:
        assert_planned_as_composed(planned_cells(file, overrides), file, overrides)


def test_an_interpolation_follows_the_cell(study: Write) -> None:
    file = study("{methods: [dense], grid: [{budget: 1e10, d_model: [8, 16]}]}", "batch_sequences: ${d_model}")
    assert [cell.config.batch_sequences for cell in planned_cells(file)] == [8, 16]
    of_seed = planned_cells(study(f"{{methods: [dense], {ONE}, seeds: [8, 4]}}"), ["batch_sequences=${seed}"])
    assert [cell.config.batch_sequences for cell in of_seed] == [8, 4]


def test_a_cell_that_two_rows_give_is_planned_once(study: Write) -> None:
    grid = "{budget: 1e10, d_model: [8, 12, 8]}, {budget: 1e10, d_model: 8, axes: {optim.beta2: [0.9, 0.95]}}"
    names = [cell.name for cell in planned_cells(study(f"{{methods: [dense], grid: [{grid}]}}"))]
    assert names == ["dense-d8-1e10-s0", "dense-d12-1e10-s0", "dense-d8-1e10-beta2=0.9-s0"]


def test_a_part_of_a_study_has_the_names_and_configurations_that_it_has_in_the_whole(study: Write) -> None:
    file = study(
        "{methods: [dense, pkm, peer], grid: [{budget: 1e10, d_model: [8, 12]}, {budget: 3e10, d_model: 16, "
        "batch_sequences: 8}], method_axes: {peer: {optim.table_lr: [1e-3, 0.5]}}}",
        "batch_sequences: 32",
    )
    whole = {cell.name: cell for cell in planned_cells(file)}
    for budget in (1e10, 3e10):
        part = planned_cells(file, ["sweep.methods=[pkm,dense]", f"sweep.budgets=[{budget}]"])
        names = {n for n, cell in whole.items() if cell.config.budget == budget and cell.config.ffn.name != "peer"}
        assert {cell.name for cell in part} == names and all(cell == whole[cell.name] for cell in part)


NO_EFFECT = "has no effect: every cell has its own from `sweep:`"
REFUSED = [
    # Nothing in a study's file is ignored
    (f"{{methods: [dense], {ONE}}}", "seed: 3", [], f"toy.yaml: seed {NO_EFFECT}"),
    ("{methods: [dense], grid: [{budget: 1e10, d_model: 8, head_dim: 4}]}", "head_dim: 8", [], f"head_dim {NO_EFFECT}"),
    (f"{{methods: [dense], {ONE}, axes: {{optim.lr: [1, 2]}}}}", "optim: {lr: 3}", [], f"optim.lr {NO_EFFECT}"),
    (f"{{methods: [dense], {ONE}, method_settings: {{dense: {{seed: 7}}}}}}", "", [],
     "toy.yaml: sweep: method_settings.dense gives seed, which rows of the grid give"),
    (f"{{methods: [dense], {ONE}, axes: {{budget: [3e10]}}}}", "", [],
     "axes gives budget, which rows of the grid give"),
    ("{methods: [dense], grid: [{budget: 1e10, d_model: 8, head_dim: 4, axes: {head_dim: [8]}}]}", "", [],
     "grid.0.axes gives head_dim, which rows of the grid give"),
    (f"{{methods: [dense], {ONE}, method_settings: {{dense: {{optim: {{lr: 1}}}}}}}}", "", [],
     "optim is a section: name its keys, such as optim.lr"),
    # What a study varies is not overridden
    (f"{{methods: [dense], {ONE}}}", "", ["seed=3"], "varies seed: change it there, or choose a part"),
    (f"{{methods: [dense], {ONE}}}", "", ["ffn=peer"], "varies ffn: change it there, or choose a part"),
    (f"{{methods: [dense], {ONE}, axes: {{optim.lr: [1]}}}}", "", ["optim.lr=3"], "varies optim.lr: change it there"),
    ("{methods: [dense], grid: [{budget: 1e10, d_model: 8, n_layers: 3}]}", "", ["n_layers=4"], "varies n_layers: "),
    (f"{{methods: [dense], {ONE}}}", "", ["sweep.budgets=[1e10,2e10]"],
     "toy.yaml has no budget 2e+10; there are 1e+10"),
    ("{methods: [dense], grid: [{budget: 1e10, d_model: 8, seeds: [1]}]}", "", ["sweep.seeds=[2]"],
     "no cells in the part that sweep.seeds=[2] "),
    # Wrong keys and values
    (f"{{methods: [dens], {ONE}}}", "", [], "Could not find 'ffn/dens' Available options in 'ffn': balanced_moe "),
    (f"{{methods: [dense], {ONE}}}", "batch_sequence: 3", [],
     "toy.yaml: dense: batch_sequence: Unexpected keyword argument; did you mean batch_sequences?"),
    (f"{{methods: [dense], {ONE}}}", "defaults: [nosuch]", [], "Could not load 'nosuch'."),
    (f"{{methods: [dense], {ONE}}}", "batch_sequences: ${nosuch}", [], "Interpolation key 'nosuch' not found"),
    (f"{{methods: [dense], {ONE}, axes: {{optim.nosuch: [1]}}}}", "", [], "dense: optim.nosuch: Unexpected keyword"),
    (f"{{methods: [dense], {ONE}, axes: {{ffn.top_k: [1]}}}}", "", [], "dense: ffn.top_k: Unexpected keyword"),
    (f"{{methods: [dense], {ONE}, axes: {{budget.x: [1]}}}}", "", [], "budget.x: budget has no keys"),
    (f"{{methods: [dense], {ONE}, axes: {{'optim.lr=3,seed': [1]}}}}", "", [], "optim.lr=3,seed: Unexpected keyword"),
    (f"{{methods: [dense], {ONE}, axes: {{optim.lr: [-1]}}}}", "", [], "optim.lr: Input should be greater than 0"),
    (f"{{methods: [dense], {ONE}, axes: {{hydra.mode: [1]}}}}", "", [], "dense: hydra: Unexpected keyword argument"),
    # The cells together
    ("{methods: [dense], grid: [{budget: 1e10, d_model: 8}, {budget: 1e10, d_model: 8, batch_sequences: 8}]}", "",
     [], "toy has two cells dense-d8-1e10-s0, which differ in keys that a name does not tell"),
    (f"{{methods: [dense], {ONE}, axes: {{data.vocab_size: [2048, 512]}}}}", "", [],
     "varies keys of data: a study has one corpus and one evaluation set"),
    (f"{{methods: [dense], {ONE}, axes: {{data.val_set: [validation, speeches]}}}}", "", [],
     "varies keys of data: a study has one corpus and one evaluation set"),
]  # fmt: skip


@pytest.mark.parametrize(("sweep", "settings", "overrides", "message"), REFUSED, ids=[case[3] for case in REFUSED])
def test_a_wrong_study_is_refused_in_one_line(
    study: Write, sweep: str, settings: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as refused:
        planned_cells(study(sweep, settings), overrides)
    assert "\n" not in str(refused.value)


def test_a_row_that_takes_a_section_away_is_another_curve(study: Write) -> None:
    grid = "[{budget: 1e14, d_model: 64}, {budget: 1e14, d_model: 80, axes: {optim.table_lr_law: [null]}}]"
    usual, without = planned_cells(study(f"{{methods: [peer], grid: {grid}}}", ""))
    assert (usual.axes, without.axes) == ({}, {"optim.table_lr_law": None})
    assert usual.plan.table_lr < without.plan.table_lr == without.config.optim.table_lr


def test_two_corpora_of_one_name_are_not_mixed(tmp_path: Path) -> None:
    file = write_study(tmp_path)
    own = ["min_steps=1", "data=text"]
    for at in ("x", "y"):
        (tmp_path / at).mkdir()
        (tmp_path / at / "a.txt").touch()
    here, there = (planned_cells(file, [*own, f"data.path={tmp_path}/{at}/a.txt"])[0] for at in ("x", "y"))
    assert here.folder == there.folder
    write_record(here.folder, record_of(here, Status.DONE, corpus="e" * 16))
    with pytest.raises(UserError, match=r"holds a run of another configuration: data_fingerprint"):
        outcome(there, "f" * 16)


def test_a_single_cell_belongs_to_no_study() -> None:
    cell = single_cell(composed(["ffn=peer"]))
    assert cell.folder == ROOT / "runs/single/peer-d32-2e11-s0"
    assert (cell.config, cell.axes) == (in_memory(load(["ffn=peer"])), {})


# Notices


def test_methods_short_of_sizes_are_named(cells: list[Cell]) -> None:
    assert [cell.name for cell in cells if cell.plan.verdict is Verdict.DROP] == [
        "dense-d12-1e10-s0",
        "peer-d8-1e10-s0",
        "peer-d12-1e10-s0",
    ]
    assert short_methods(cells, 1) == ["peer has 0 sizes left at 1e10, fewer than 1"]
    assert short_methods(cells, 2) == [
        "dense has 1 size left at 1e10, fewer than 2",
        "peer has 0 sizes left at 1e10, fewer than 2",
    ]
    assert len(short_methods(cells, 3)) == 4


def test_each_curve_of_a_method_needs_its_own_sizes(study: Write) -> None:
    grid = (
        "[{budget: 1e10, d_model: [8, 12, 16]}, {budget: 1e10, d_model: [20], methods: [dense]}, "
        "{budget: 1e10, d_model: [8], methods: [peer], axes: {ffn.n_experts: [1024]}}, "
        "{budget: 1e10, d_model: [20], methods: [dense], axes: {optim.lr_factor: [0.5]}}]"
    )
    cells = planned_cells(study(f"{{methods: [dense, peer], grid: {grid}}}", "min_steps: 1"))
    assert {cell.plan.verdict for cell in cells} == {Verdict.OK}
    assert short_methods(cells, 2) == ["peer n_experts=1024 has 1 size left at 1e10, fewer than 2"]
    assert short_methods(cells, 4) == [
        "peer has 3 sizes left at 1e10, fewer than 4",
        "peer n_experts=1024 has 1 size left at 1e10, fewer than 4",
    ]


# Lines for Hydra


@pytest.mark.parametrize(
    "start", ["", "defaults: [config, _self_]\n", "defaults: [override data: text]\n"], ids=lambda start: start.strip()
)
def test_a_study_needs_no_lines_for_hydra_and_may_have_them(start: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    (tmp_path / "x.txt").write_text("Once upon a time")
    file.write_text(
        f"{start}sweep: {TOY}\ncontext: 32\ndata: {{path: {tmp_path}/x.txt, evaluation: {{validation: 512}}}}\n"
    )
    cells = planned_cells(file, ["batch_sequences=8"])
    assert len(cells) == 8
    assert {(cell.config.context, cell.config.batch_sequences) for cell in cells} == {(32, 8)}
    assert {cell.config.data.source for cell in cells} == {"text" if "text" in start else "gutenberg"}


def test_a_sweep_runs_the_cells_that_the_plan_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import peerscale.launch.run as launch

    ran: list[Cell] = []

    def planned(cells: list[Cell]) -> list[Outcome]:
        ran.extend(cells)
        return [Outcome(cell=cell, status=Status.DONE) for cell in cells]

    corpus = SimpleNamespace(manifest=SimpleNamespace(fingerprint=CORPUS))
    monkeypatch.setattr(launch, "prepare", lambda config: corpus)
    monkeypatch.setattr(launch, "outcomes", planned)
    overrides = ["sweep.methods=[peer]", "ffn.n_experts=1024", "sweep.seeds=[1]", "data.evaluation={validation:512}"]
    file = write_study(tmp_path)
    assert launch.main([str(file), *overrides]) == 0
    assert ran and ran == planned_cells(file, overrides)


@pytest.mark.parametrize("values", [["a,b", "[1", "{a:1}", "x=y", "it's", "null", "True"], ["a\\b", "end\\", " a "]])
def test_a_text_of_an_axis_stays_one_text(study: Write, values: list[str]) -> None:
    file = study(f"{{methods: [dense], {ONE}, axes: {json.dumps({'tracking.project': values})}}}")
    cells = planned_cells(file)
    assert [cell.config.tracking.project for cell in cells] == values
    assert_planned_as_composed(cells, file)
