import functools
import json
import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from peerscale.config.schema import ConfigError, composed, load, parse_config
from peerscale.config.study import load_sweep
from peerscale.errors import UserError
from peerscale.files import OURS, ROOT
from peerscale.plan.cells import Cell, pending_cells, planned_cells, single_cell, state
from peerscale.plan.memory import in_micro_batches
from peerscale.plan.notices import diverged_lines, short_methods
from peerscale.plan.plan import Verdict
from peerscale.records.cell_names import budget_name
from peerscale.records.fingerprint import fingerprint, hashed_config
from peerscale.records.record import Status, write_record
from peerscale.records.table import read_runs
from toy_study import CORPUS, TOY, composed_by_hydra, kept_in, record_of, write_study

SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))
PUBLISHED = {path.parent.name for path in (ROOT / "results").glob("*/runs.csv")}
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
    """Planning composes layers and sizes and puts cells together itself; Hydra must make the same of each."""
    for cell in cells:
        axes = [f"{'++' * ('.' in key)}{key}={_quoted(value)}" for key, value in cell.axes.items() if key != "data"]
        config = cell.config
        has_file = (OURS / "conf" / "size" / f"{config.size.name}.yaml").is_file()
        size = config.size.name if has_file else f"d{config.size.d_model}"
        words = [f"ffn={config.ffn.name}", f"size={size}", f"budget={config.budget!r}"]
        rows = [row for row in load_sweep(file).grid if row.budget == config.budget and row.batch_sequences]
        batch = [f"batch_sequences={row.batch_sequences}" for row in rows[:1]]
        tree = composed_by_hydra([*words, f"seed={config.seed}", *batch, *axes, *overrides], file).tree
        del tree["sweep"]
        assert in_micro_batches(parse_config(tree)) == config
        assert pickle.loads(pickle.dumps(cell)) == cell, "a worker receives it as data"


def _quoted(value: Any) -> str:
    """A value in Hydra's grammar, in which a backslash is special only before a quote or the end."""
    if not isinstance(value, str):
        return json.dumps(value)
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value) + "'"


# Every file in sweeps/


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_every_study_plans(file: Path) -> None:
    """In one test, as planning takes a second: names, folders, results apart, sizes enough, and Hydra's opinion."""
    cells = planned_cells(file.stem)
    assert cells
    for cell in cells:
        assert cell.sweep == file.stem
        assert cell.plan.verdict is Verdict.OK or cell.plan.reason
        assert cell.folder == ROOT / "runs" / file.stem / cell.name
        config, axes = cell.config, r"(?:-[a-z_0-9]+=[\w.+-]+)*"
        head = re.escape(f"{config.ffn.name}-{config.size.name}-{budget_name(config.budget)}")
        assert re.fullmatch(rf"{head}{axes}-s{config.seed}", cell.name)
    names = {cell.name for cell in cells}
    assert len(names) == len(cells)
    fingerprints = [fingerprint(hashed_config(cell.config, cell.plan, CORPUS)) for cell in cells]
    assert len({*fingerprints}) == len(fingerprints), "two cells of one result"
    assert short_methods(cells, load_sweep(file.stem).min_sizes) == [], "as many sizes as a parabola wants"
    assert_planned_as_composed([cells[0], cells[-1]], file)
    if file.stem in PUBLISHED:
        published = set(read_runs(ROOT / "results" / file.stem)["cell"])
        assert published and published <= names, "published cells keep their names"


def test_published_studies_are_among_them() -> None:
    assert PUBLISHED and {file.stem for file in SWEEPS} >= PUBLISHED


# Studies made up here


def test_the_product_of_methods_pairs_axes_and_seeds(study: Write) -> None:
    cells = planned_cells(
        study(
            "{methods: [dense, peer], grid: [{budget: 1e10, sizes: [d8, d12]}, {budget: 3e10, sizes: [d16]}], "
            "seeds: [0, 5], axes: {optim.weight_decay: [0.0, 0.1]}, method_axes: {peer: {optim.table_lr: [1e-3, 0.5]}}}"
        )
    )
    names = [cell.name for cell in cells]
    assert len(names) == 3 * 2 * 2 + 3 * 2 * 2 * 2
    assert names[0] == "dense-d8-1e10-weight_decay=0.0-s0"
    assert names[1] == "dense-d8-1e10-weight_decay=0.0-s5"
    assert names[-1] == "peer-d16-3e10-weight_decay=0.1-table_lr=0.5-s5"
    last = cells[-1].config
    assert (last.ffn.method, last.size.d_model, last.budget, last.seed) == ("peer", 16, 3e10, 5)
    assert (last.optim.weight_decay, last.optim.table_lr) == (0.1, 0.5)
    assert {(cell.config.budget, cell.config.size.name) for cell in cells} == {
        (1e10, "d8"),
        (1e10, "d12"),
        (3e10, "d16"),
    }


@pytest.mark.parametrize(
    "sweep",
    [
        "{methods: [peer, moe], grid: [{budget: 1e10, sizes: [d8, d112]}, {budget: 1.25e11, sizes: [d20]}]}",
        "{methods: [peer], grid: [{budget: 1e10, sizes: [d8]}], axes: {replaced: [middle, all, [1, 3]]}}",
        "{methods: [peer], grid: [{budget: 1e9, sizes: [d8, d16]}], axes: {size.n_layers: [2, 6], size.n_heads: [1]}}",
        "{methods: [pkm], grid: [{budget: 1e10, sizes: [d8]}], axes: {ffn.n_experts: [64, 256], ffn.top_k: [4, 8]}}",
        "{methods: [peer], grid: [{budget: 1e10, sizes: [d8]}], axes: {optim.table_lr: [null, 0.01, 1]}}",
        "{methods: [dense], grid: [{budget: 1e10, sizes: [d8]}], axes: {optim.lr_rule: [constant]}, seeds: [3, 4]}",
        "{methods: [dense], grid: [{budget: 1e10, sizes: [d8]}], axes: {trainer.keep_checkpoint: [true]}}",
        "{methods: [dense, moe], grid: [{budget: 1e10, sizes: [d8]}], method_axes: {moe: {ffn.n_experts: [4, 8]}}}",
    ],
)
def test_plans_what_hydra_composes(study: Write, sweep: str) -> None:
    file = study(sweep, "context: 32\nsize: {n_layers: 3}\noptim: {beta2: 0.9}")
    assert_planned_as_composed(planned_cells(file), file)


@pytest.mark.parametrize(
    "overrides",
    [
        ["size.n_layers=2", "size.n_heads=1", "optim.lr=0.1"],
        ["++ffn.top_k=8", "++ffn.n_experts=256", "++ffn.n_heads=1"],
        ["trainer.threads=2", "tracking=disabled", "tracking.tags=[a,b]"],
        ["replaced=all", "context=32"],
    ],
    ids=" ".join,
)
def test_overrides_of_every_cell_reach_its_job(study: Write, overrides: list[str]) -> None:
    sweep = TOY if not overrides[0].startswith("++ffn") else TOY.replace("dense, peer", "pkm, peer")
    file = study(sweep)
    cells = planned_cells(file, overrides)
    assert len(cells) == 8
    assert_planned_as_composed(cells[::3], file, overrides)


def test_a_part_of_a_study_has_the_names_and_configurations_that_it_has_in_the_whole(study: Write) -> None:
    file = study(
        "{methods: [dense, pkm, peer], grid: [{budget: 1e10, sizes: [d8, d12]}, {budget: 3e10, sizes: [d16]}], "
        "method_axes: {peer: {optim.table_lr: [1e-3, 0.5]}}}"
    )
    whole = planned_cells(file)
    part = planned_cells(file, ["sweep.methods=[pkm,dense]", "sweep.budgets=[1e10]", "trainer.threads=2"])
    assert {cell.name for cell in part} == {
        cell.name for cell in whole if cell.config.budget == 1e10 and cell.config.ffn.name != "peer"
    }
    assert_planned_as_composed(part, file, ["trainer.threads=2"])


@pytest.mark.parametrize("overrides", [["budget=1e12"], ["seed=3"], ["size=d32"], ["++size.n_layers=2"]], ids=" ".join)
def test_an_override_of_what_the_study_names_is_refused_or_reaches_plan_and_job(
    study: Write, overrides: list[str]
) -> None:
    file = study(TOY)
    try:
        cells = planned_cells(file, overrides)
    except ConfigError:
        return
    assert_planned_as_composed(cells[-1:], file, overrides)


def test_an_override_of_an_axis_of_the_size_is_refused_or_reaches_plan_and_job(study: Write) -> None:
    file = study("{methods: [dense], grid: [{budget: 1e10, sizes: [d16]}], axes: {size.n_heads: [2]}}")
    try:
        cells = planned_cells(file, ["size.n_heads=4"])
    except ConfigError:
        return
    assert_planned_as_composed(cells[-1:], file)


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        (
            "{methods: [dense, dense], grid: [{budget: 1e10, sizes: [d8]}]}",
            "toy.yaml describes 1 cells twice, dense-d8-",
        ),
        ("{methods: [dense], grid: [{budget: 1e10, sizes: [d8, d8]}]}", "describes 1 cells twice, dense-d8-1e10-s0"),
        ("{methods: [dense], grid: [{budget: 1e10, sizes: [d8]}], seeds: [1, 1]}", "twice, dense-d8-1e10-s1 among"),
        ("{methods: [dens], grid: [{budget: 1e10, sizes: [d8]}]}", "unknown choice ffn=dens; there are: dense, "),
        ("{methods: [dense], grid: [{budget: 1e10, sizes: [d9]}]}", "unknown choice size=d9; there are: "),
        ("{methods: [dense], grid: [{budget: 1e10, sizes: [d8]}], axes: {optim.nosuch: [1]}}", "optim.nosuch"),
        (
            "{methods: [dense], grid: [{budget: 1e10, sizes: [d8]}], axes: {optim.lr: [-1]}}",
            "optim.lr: input should be",
        ),
        ("{methods: [dense], grid: []}", "grid: list should have at least 1 item"),
    ],
)
def test_a_wrong_study_is_refused_in_one_line(study: Write, sweep: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as refused:
        planned_cells(study(sweep))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "sweep",
    [
        "{methods: [dense], grid: [{budget: 1e10, sizes: [d8]}], axes: {optim.lr: []}}",
        "{methods: [dense], grid: [{budget: 1e10, sizes: [d8]}], seeds: [-1]}",
    ],
)
def test_a_study_of_no_possible_cell_is_refused(study: Write, sweep: str) -> None:
    try:
        planned_cells(study(sweep))
    except ConfigError:
        return
    except ValueError as error:
        raise error
    pytest.fail("planned")


def test_axes_of_a_method_that_is_not_in_the_study_are_refused(study: Write) -> None:
    with pytest.raises(ConfigError, match="per"):
        planned_cells(
            study("{methods: [peer], grid: [{budget: 1e10, sizes: [d8]}], method_axes: {per: {optim.table_lr: [1]}}}")
        )


def test_a_study_of_two_corpora_is_refused(study: Write) -> None:
    sweep = "{methods: [dense], grid: [{budget: 1e10, sizes: [d8]}], axes: {data.vocab_size: [2048, 512]}}"
    with pytest.raises(ConfigError, match="varies keys of data that make another corpus"):
        planned_cells(study(sweep))


def test_two_corpora_of_one_name_are_not_mixed(tmp_path: Path) -> None:
    file = write_study(tmp_path)
    own = ["min_steps=1", "data=text"]
    here, there = (planned_cells(file, [*own, f"data.path={tmp_path}/{at}/a.txt"])[0] for at in ("x", "y"))
    assert here.folder == there.folder
    write_record(here.folder, record_of(here, Status.DONE, corpus="e" * 16))
    with pytest.raises(UserError, match=r"holds a run of another configuration: data_fingerprint"):
        state(there, "f" * 16)


def test_a_single_cell_belongs_to_no_study() -> None:
    cell = single_cell(composed(["ffn=peer"]))
    assert cell.folder == ROOT / "runs/single/peer-d32-2e11-s0"
    assert (cell.config, cell.axes) == (in_micro_batches(load(["ffn=peer"])), {})


# What is still to be run


def test_longest_first_without_what_is_done_or_dropped(cells: list[Cell]) -> None:
    assert sum(cell.plan.verdict is Verdict.DROP for cell in cells) > 0
    kept = [cell for cell in cells if cell.plan.verdict is Verdict.OK]
    assert pending_cells(cells, CORPUS) == sorted(kept, key=lambda cell: cell.estimate_s, reverse=True)
    for cell, status in zip(kept, (Status.DONE, Status.RUNNING, Status.FAILED), strict=False):
        write_record(cell.folder, record_of(cell, status))
    pending = pending_cells(cells, CORPUS)
    assert {cell.name for cell in pending} == {cell.name for cell in kept[1:]}
    estimates = [cell.estimate_s for cell in pending]
    assert estimates == sorted(estimates, reverse=True)


def test_the_state_is_the_plans_or_the_records(cells: list[Cell]) -> None:
    dropped = next(cell for cell in cells if cell.plan.verdict is Verdict.DROP)
    kept = next(cell for cell in cells if cell.plan.verdict is Verdict.OK)
    assert state(dropped, CORPUS) is Status.DROPPED
    assert state(kept, CORPUS) is Status.PENDING
    for status in (Status.RUNNING, Status.FAILED, Status.DIVERGED, Status.DONE):
        write_record(kept.folder, record_of(kept, status))
        assert state(kept, CORPUS) is status


def test_a_cell_of_another_configuration_is_refused_naming_what_differs(cells: list[Cell]) -> None:
    cell = cells[0]
    write_record(cell.folder, record_of(cell, Status.DONE, config={"context": 32, "precision": "bf16"}))
    with pytest.raises(UserError) as refused:
        pending_cells([cell], CORPUS)
    assert str(refused.value) == (
        f"{cell.folder} holds a run of another configuration: context 32 -> 64; precision 'bf16' -> 'fp32'. "
        f"To keep it and go on: mv '{cell.folder}' '{cell.folder}.old'"
    )


def test_a_cell_of_another_corpus_is_refused(cells: list[Cell]) -> None:
    cell = cells[0]
    write_record(cell.folder, record_of(cell, Status.DONE, corpus="f" * 16))
    with pytest.raises(UserError, match=f"data_fingerprint '{'f' * 16}' -> '{CORPUS}'"):
        state(cell, CORPUS)


def test_a_cell_run_with_another_kernel_is_the_same_cell(cells: list[Cell]) -> None:
    cell, trainer = cells[0], cells[0].config.trainer
    write_record(cell.folder, record_of(cell, Status.DONE, config={"min_steps": 1}))
    elsewhere = replace(cell.config, trainer=replace(trainer, kernel="reference", threads=2))
    assert state(replace(cell, config=elsewhere), CORPUS) is Status.DONE


def test_methods_short_of_sizes_are_named(cells: list[Cell]) -> None:
    assert [cell.name for cell in cells if cell.plan.verdict is Verdict.DROP] == [
        "dense-d12-1e10-s0",
        "peer-d8-1e10-s0",
        "peer-d12-1e10-s0",
    ]
    assert short_methods(cells, 1) == ["peer has 0 sizes left at 1e10, fewer than 1"]
    assert short_methods(cells, 2) == [
        "dense has 1 sizes left at 1e10, fewer than 2",
        "peer has 0 sizes left at 1e10, fewer than 2",
    ]
    assert len(short_methods(cells, 3)) == 4


def test_each_curve_of_a_method_needs_its_own_sizes(study: Write) -> None:
    grid = (
        "[{budget: 1e10, sizes: [d8, d12, d16]}, {budget: 1e10, sizes: [d20], methods: [dense]}, "
        "{budget: 1e10, sizes: [d8], methods: [peer], axes: {ffn.n_experts: [1024]}}, "
        "{budget: 1e10, sizes: [d20], methods: [dense], axes: {optim.lr_factor: [0.5]}}]"
    )
    cells = planned_cells(study(f"{{methods: [dense, peer], grid: {grid}}}", "min_steps: 1"))
    assert {cell.plan.verdict for cell in cells} == {Verdict.OK}
    assert short_methods(cells, 2) == ["peer n_experts=1024 has 1 sizes left at 1e10, fewer than 2"]
    assert short_methods(cells, 4) == [
        "peer has 3 sizes left at 1e10, fewer than 4",
        "peer n_experts=1024 has 1 sizes left at 1e10, fewer than 4",
    ]


# Lines for Hydra


@pytest.mark.parametrize(
    "start",
    [
        "",
        "defaults: [config, _self_]\nhydra: {mode: MULTIRUN}\n",  # as studies once had to begin
        "defaults: [config]\n",
        "defaults: [override data: text]\n",
        "defaults: [base, _self_]\n",
    ],
    ids=lambda start: start.partition("\n")[0],
)
def test_a_study_needs_no_lines_for_hydra_and_may_have_them(start: str, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("defaults: [config, _self_]\nseed: 3\n")
    file = tmp_path / "mine.yaml"
    file.write_text(f"{start}sweep: {TOY}\ncontext: 32\ndata: {{path: x, evaluation: {{validation: 512}}}}\n")
    cells = planned_cells(file, ["batch_sequences=8"])
    assert len(cells) == 8
    assert {(cell.config.context, cell.config.batch_sequences) for cell in cells} == {(32, 8)}
    assert {cell.config.data.source for cell in cells} == {"text" if "text" in start else "gutenberg"}
    assert_planned_as_composed(cells[::3], file, ["batch_sequences=8"])


@pytest.mark.parametrize(
    ("start", "overrides"),
    [
        ("hydra: {mode: RUN}\n", ["sweep.budgets=[1e10]"]),
        ("defaults: [config, _self_]\n", ["sweep.methods=[peer]", "ffn.n_experts=1024", "sweep.seeds=[1]"]),
        ("", ["optim.lr=.02", "data=text", "data.path=x", "data.evaluation={validation:512}"]),
    ],
)
def test_a_sweep_runs_the_cells_that_the_plan_lists(
    start: str, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peerscale.launch.run as launch

    ran: list[Cell] = []
    corpus = SimpleNamespace(manifest=SimpleNamespace(fingerprint=CORPUS))
    monkeypatch.setattr(launch, "prepare", lambda config: corpus)
    monkeypatch.setattr(launch, "outcomes", lambda cells: ran.extend(cells) or [])
    file = tmp_path / "mine.yaml"
    file.write_text(f"{start}sweep: {TOY}\n")
    assert launch.main([str(file), *overrides]) == 0
    assert ran and ran == planned_cells(file, overrides)


# What a study cannot smuggle in


@pytest.mark.parametrize(
    "values",  # whose cells have different names
    [
        ["a,b", "[1", "{a:1}", "x=y", "it's", "null", "True", ""],
        ["a\\b", "end\\", " a ", "a seed=3", "choice(1,2)"],
        ["a\\'b"],
    ],
)
def test_a_text_of_an_axis_stays_one_text(study: Write, values: list[str]) -> None:
    axes = json.dumps({"tracking.project": values})
    file = study(f"{{methods: [dense], grid: [{{budget: 1e10, sizes: [d8]}}], axes: {axes}}}")
    cells = planned_cells(file)
    assert [cell.config.tracking.project for cell in cells] == values
    assert {cell.config.seed for cell in cells} == {0}
    assert_planned_as_composed(cells, file)


@pytest.mark.parametrize("key", ["optim.lr=3,seed", "~optim.lr", "hydra.mode", "sweep.seeds", "seed", "optim lr", ""])
def test_an_axis_is_a_key_and_nothing_more(study: Write, key: str) -> None:
    axes = json.dumps({key: [1]})
    with pytest.raises(ConfigError, match="axes: "):
        planned_cells(study(f"{{methods: [dense], grid: [{{budget: 1e10, sizes: [d8]}}], axes: {axes}}}"))


def test_a_diverged_cell_is_left_alone_and_named(cells: list[Cell]) -> None:
    first, second, *_ = kept = [cell for cell in cells if cell.plan.verdict is Verdict.OK]
    write_record(first.folder, record_of(first, Status.DIVERGED, reason="the training loss is nan at step 40"))
    write_record(second.folder, record_of(second, Status.FAILED, reason="RuntimeError"))
    assert {cell.name for cell in pending_cells(cells, CORPUS)} == {cell.name for cell in kept[1:]}
    assert diverged_lines(cells, CORPUS) == [
        f"{first.name} diverged: the training loss is nan at step 40; "
        f"to run it again anyway: mv '{first.folder}' '{first.folder}.old'"
    ]
