"""The protocol of the standing table, driven with losses of a formula in place of training."""

import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from peerscale.errors import ConfigError, UserError
from peerscale.figures.standing import standing_figure, standing_table
from peerscale.launch import place
from peerscale.plan import entrant as protocol
from peerscale.plan.cell import Cell
from peerscale.plan.entrant import SEEDS, Entrant, Placing, drive, parse_entrant, read_entrant
from peerscale.records import entry as entries
from peerscale.records import outcome
from peerscale.records.entry import check_entry, losses_of, read_entries, write_entry
from peerscale.records.record import Record, Status, new_record, write_record
from peerscale.records.table import read_records, write_records
from peerscale.stats.standing import standing_rows

CHOICE = [{"ffn.n_heads": 1, "ffn.top_k": 64}, {"ffn.n_heads": 4, "ffn.top_k": 16}]


OUTSIDE = """
from peerscale.layers import layer_config
from peerscale.layers.dense import Dense, DenseConfig


@layer_config
class HalvedConfig(DenseConfig):
    method: str = "halved"

    def d_hidden(self, around):
        return around.d_ff // 2
"""


def loss_of(cell: Cell, best_lr: float = 1.3, best_table_lr: float = 0.01) -> float:
    """Lowest at some rates and with one head; falls with the budget; seeds scatter."""
    optim, ffn = cell.config.optim, cell.config.ffn
    size = math.log(cell.plan.cost.flops_per_token / 1.8e6 / (cell.config.budget / 1e13) ** 0.5) ** 2 / 20
    rates = math.log(optim.lr_factor / best_lr) ** 2 / 100
    rates += math.log((optim.table_lr or best_table_lr) / best_table_lr) ** 2 / 100
    few = 0.02 * (getattr(ffn, "n_heads", 1) > 1)
    seed = np.random.default_rng([cell.config.seed, cell.config.d_model]).normal(0, 0.004)
    return 4.2 - 0.1 * math.log(cell.config.budget / 1e13) + size + rates + few + seed - 0.03 * (ffn.method == "peer")


def record_of(cell: Cell, loss: Callable[[Cell], float] = loss_of) -> Record:
    result = {"loss": loss(cell), "se": 0.01, "tokens": 1.0, "bits_per_byte": 1.0, "ppl": 1.0}
    return new_record(cell, Status.DONE, "corpus", evaluation={cell.config.data.val_set: result})


def placed(
    standing: Path, name: str, entrant: Entrant, loss: Callable[[Cell], float] = loss_of
) -> tuple[list[list[Cell]], Path]:
    """Drive the whole protocol at the budget of tuning; returns its stages and the folder that it writes."""
    placing, stages, ran = Placing(name, entrant), [], {}

    def run(cells: Sequence[Cell]) -> protocol.Losses:
        stages.append([*cells])
        found = {cell.name: record_of(cell, loss) for cell in cells}
        ran.update(found)
        return losses_of(found)

    chosen = drive(placing.tuning(), run)
    budgets = [budget for budget in placing.sizes if budget <= 3e13]
    chosen_at = {budget: drive(placing.row(budget, chosen), run) for budget in budgets}
    return stages, write_entry(placing, ran, chosen_at, standing)


def test_stages_follow_the_protocol(tmp_path: Path) -> None:
    entrant = Entrant(layer="peer", choice=CHOICE)
    stages, folder = placed(tmp_path, "two_of_peer", entrant)
    trials, finals, row, around, row_3e13 = stages
    assert len(trials) == 12 and {cell.config.seed for cell in trials} == {200}
    rates = np.array([[cell.config.optim.lr_factor, cell.config.optim.table_lr] for cell in trials], float)
    assert (np.abs(np.log(rates / [1, 0.02])) <= np.log([4, 30**0.5]) + 0.01).all()
    assert len(np.unique(rates, axis=0)) == 12
    assert {cell.config.ffn.columns(64)["ffn_heads"] for cell in trials} == {
        1,
        4,
    }
    assert {cell.config.data.val_set for cell in (*trials, *finals, *around)} == {"tuning"}
    best = sorted(trials, key=loss_of)[:3]
    assert sorted({json.dumps(cell.axes) for cell in finals}) == sorted(json.dumps(cell.axes) for cell in best)
    assert sorted({cell.config.seed for cell in finals}) == [201, 202] and len(finals) == 6
    mean = {axes: np.mean([loss_of(cell) for cell in finals if cell.axes == json.loads(axes)])
            for axes in {json.dumps(cell.axes) for cell in finals}}  # fmt: skip
    chosen = json.loads(min(mean, key=lambda axes: mean[axes]))
    assert all(cell.axes == chosen and cell.config.data.val_set == "validation" for cell in row)
    assert sorted((cell.config.d_model, cell.config.seed) for cell in row) == [
        (d, s) for d in (48, 64, 80) for s in (0, 1, 2)
    ]
    assert {cell.config.d_model for cell in around} == {96} and len(around) == 5
    assert {cell.config.budget for cell in row_3e13} == {3e13} and row_3e13[0].axes == min(around, key=loss_of).axes
    assert all(
        cell.config.replaced == [2, 4] and cell.config.batch_sequences == 32 for stage in stages for cell in stage
    )
    assert check_entry("two_of_peer", standing=tmp_path) == sum(map(len, stages))
    assert read_entries(tmp_path)[0].about["protocol"] == entries.protocol_hash() and folder == tmp_path / "two_of_peer"


def test_a_choice_at_an_end_widens_the_space_once(tmp_path: Path) -> None:
    stages, _ = placed(tmp_path, "dense", Entrant(layer="dense"), lambda cell: loss_of(cell, best_lr=9.0))
    trials, finals, more, finals_again, *_ = stages
    assert max(cell.config.optim.lr_factor for cell in trials) <= 4
    assert len(more) == 4 and all(4 <= cell.config.optim.lr_factor <= 16 for cell in more)
    assert len(finals_again) == 6 and {cell.name for cell in finals_again} != {cell.name for cell in finals}


def test_the_check_finds_missing_further_and_other_runs(tmp_path: Path) -> None:
    entrant = Entrant(layer="dense")
    _, folder = placed(tmp_path, "dense_in_two", entrant)
    records = entries.read_records(folder)
    other = {"fingerprint": "0" * 16, "hashed_config": records[0].hashed_config | {"context": 32}}
    for changed, message in (
        (records[1:], f"{records[0].cell} is missing"),
        ([*records, replace(records[0], cell="dense-d64-1e13-s9")], "dense-d64-1e13-s9 is there"),
        ([replace(records[0], **other), *records[1:]], "context"),
    ):  # fmt: skip
        entries.write_records(folder, changed)
        with pytest.raises(UserError, match=message):
            check_entry("dense_in_two", standing=tmp_path)
    entries.write_records(folder, records)
    about = json.loads((folder / entries.ENTRY).read_text())
    about["chosen"]["1e+13"]["optim.lr_factor"] = 7.0
    (folder / entries.ENTRY).write_text(json.dumps(about))
    with pytest.raises(UserError, match="its runs choose"):
        check_entry("dense_in_two", standing=tmp_path)


def test_a_row_goes_on_from_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a machine that has none of its runs, only what is missing is trained, and its larger budget is kept."""
    trained: list[str] = []

    def train(cells: Sequence[Cell], **_: object) -> None:
        for cell in cells:
            trained.append(cell.name)
            write_record(cell.folder, record_of(cell))

    for module in (place, outcome):
        monkeypatch.setattr(module, "read_manifest", lambda data: SimpleNamespace(fingerprint="corpus"))
    monkeypatch.setattr(place, "prepare", lambda data: None)
    monkeypatch.setattr(place, "run_missing", train)
    monkeypatch.setattr(place, "table_folder", lambda overrides: tmp_path)
    stages, folder = placed(tmp_path, "dense", read_entrant("dense"))
    records = read_records(folder)
    trials, _, row, *_ = stages
    fourth = sorted(trials, key=loss_of)[3].name
    for lost, expected in (
        ({row[0].name, row[1].name}, [["12"], ["6"], ["2", "7"], ["3"], ["9"], ["2"]]),
        ({fourth}, [["1", "11"], ["2", "4"], ["9"], ["3"], ["9"], ["24"]]),  # it counts as the best
    ):
        write_records(folder, [one for one in records if one.cell not in lost])
        assert place.main(["dense", "--plan", f"trainer.runs_directory={tmp_path / 'runs'}"]) == 0
        assert [re.findall(r"(\d+) runs", line) for line in capsys.readouterr().out.splitlines()] == expected
    write_records(folder, records[1:])
    assert place.main(["dense", f"trainer.runs_directory={tmp_path / 'runs'}"]) == 0
    assert trained == [records[0].cell]
    assert check_entry("dense", standing=tmp_path) == sum(map(len, stages)) and stages[-1][0].config.budget == 3e13

    other = {"fingerprint": "0" * 16, "hashed_config": records[0].hashed_config | {"context": 32}}
    write_records(folder, [replace(records[0], **other), *records[1:]])
    trained.clear()
    assert place.main(["dense", f"trainer.runs_directory={tmp_path / 'again'}"]) == 0
    assert trained == [records[0].cell], "a run of another configuration counts for nothing"
    (folder / entries.ENTRY).write_text((folder / entries.ENTRY).read_text().replace(entries.protocol_hash(), "0" * 12))
    trained.clear()
    assert place.main(["dense", f"trainer.runs_directory={tmp_path / 'anew'}"]) == 0
    assert len(trained) == len(records), "runs of another protocol neither"


def test_rows_of_different_protocols_are_not_compared(tmp_path: Path) -> None:
    placed(tmp_path, "dense", Entrant(layer="dense", replaced="all", reference=True))
    _, folder = placed(tmp_path, "peer", Entrant(layer="peer"))
    path = folder / entries.ENTRY
    path.write_text(path.read_text().replace(entries.protocol_hash(), "0" * 12))
    with pytest.raises(UserError, match=r"rows of different protocols, .*: dense [0-9a-f]{12}, peer 0{12}$"):
        standing_rows(read_entries(tmp_path))
    with pytest.raises(
        UserError, match=f"peer: followed the protocol 0{{12}}, which is now {entries.protocol_hash()}$"
    ):
        check_entry("peer", standing=tmp_path)


def test_without_an_entry_the_check_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"mine is not there to be checked; first: make place LAYER=mine$"):
        check_entry("mine", standing=tmp_path)


def test_rows_follow_from_the_records_and_move_nobody(tmp_path: Path) -> None:
    placed(tmp_path, "dense", Entrant(layer="dense", replaced="all", reference=True))
    placed(tmp_path, "peer", Entrant(layer="peer"))
    alone = standing_rows(read_entries(tmp_path))
    assert [*zip(alone["budget"], alone["entrant"], strict=True)] == [
        *((3e13, "peer"), (3e13, "dense"), (1e13, "peer"), (1e13, "dense"))
    ]
    peer = alone[alone["entrant"] == "peer"]
    for _, row in peer.iterrows():
        assert row["low"] < -0.01 < row["high"] and row["multiplier"] > 1 and row["smallest"] < 0.03
    assert [*alone["multiplier_most"]] == [1, 1, 3, 3], "dense was trained at 5e12, 1e13 and 3e13"
    bounds = {"multiplier_low": 0.0, "multiplier_high": math.inf}
    beyond = standing_table(alone.assign(**bounds), "dense").splitlines()
    assert [re.findall(r"\[< (\S+), > (\S+)\]", line) for line in beyond if "[peer]" in line] == [
        *([("0.167", "1")], [("0.5", "3")])
    ]
    reference = alone[alone["entrant"] == "dense"]
    assert [*reference["difference"]] == [0, 0] and [*reference["multiplier"]] == pytest.approx([1, 1])
    assert [*reference["sizes"]] == [3, 3], "those of the other rows, so that mean losses are of the same sizes"
    placed(tmp_path, "pkm", Entrant(layer="pkm"), lambda cell: loss_of(cell) + 0.1)
    both = standing_rows(read_entries(tmp_path))
    same = both[both["entrant"] == "peer"].drop(columns="rank").reset_index(drop=True)
    assert same.equals(peer.drop(columns="rank").reset_index(drop=True))
    assert [*both[both["budget"] == 1e13]["entrant"]] == ["peer", "dense", "pkm"]
    assert [*both[both["budget"] == 1e13]["rank"]] == ["1", "2", "3"]


def test_a_row_is_repeated_with_other_seeds(tmp_path: Path) -> None:
    first, _ = placed(tmp_path, "dense", Entrant(layer="dense", replaced="all", reference=True))
    again = Entrant(layer="dense", replaced="all", first_seed=1000, mark="control")
    stages, _ = placed(tmp_path, "again", again)
    assert not {cell.name for cells in first for cell in cells} & {cell.name for cells in stages for cell in cells}
    assert check_entry("again", standing=tmp_path) == sum(map(len, stages))
    row = standing_rows(read_entries(tmp_path)).set_index("entrant").loc["again"]
    assert {*row["seeds"]} == {3} and {*row["sizes"]} == {3}
    assert (row["difference"] != 0).all() and (row["low"] < 0).all() and (row["high"] > 0).all()


def test_runs_without_a_loss_are_shown(tmp_path: Path) -> None:
    placed(tmp_path, "dense", Entrant(layer="dense", replaced="all", reference=True))
    with pytest.raises(UserError, match=r"only the reference, dense, is there; other rows come from make place"):
        standing_rows(read_entries(tmp_path))
    _, folder = placed(tmp_path, "peer", Entrant(layer="peer"))
    records = read_records(folder)
    wide = {one.cell for one in records if one.seed in SEEDS and (one.budget, one.size[:3]) == (1e13, "d80")}
    for lost, numbers in ((wide, True), ({one.cell for one in records if one.seed in SEEDS}, False)):
        write_records(folder, [
            replace(one, status=Status.DIVERGED, evaluation={}) if one.cell in lost else one for one in records
        ])  # fmt: skip
        rows = standing_rows(read_entries(tmp_path))
        (row,) = rows[(rows["entrant"] == "peer") & (rows["budget"] == 1e13)].to_dict("records")
        assert (row["failed"], row["sizes"]) == (len(lost & {one.cell for one in records if one.budget == 1e13}), 3)
        assert math.isfinite(row["difference"]) == (row["rank"] is not None) == numbers
        (line,) = (x for x in standing_table(rows, "dense").partition("## 1e13")[2].splitlines() if "[peer]" in x)
        assert f"3 x 3, {row['failed']} failed" in line and ("| — | [peer]" in line) != numbers
        standing_figure(rows)


def test_a_name_without_a_file_is_a_layer() -> None:
    assert asdict(read_entrant("fine_grained_moe")) == asdict(Entrant(layer="fine_grained_moe"))
    assert read_entrant("relu_squared") == Entrant(layer="relu_squared", replaced="all")


def test_a_choice_may_set_the_layer_alone() -> None:
    parse_entrant({"layer": "peer", "choice": [{"ffn.top_k": 8}, {}]}, "x.yaml: ")
    with pytest.raises(ConfigError, match=r"x\.yaml: choice\.0\.batch_sequences.* '\^ffn"):
        parse_entrant({"layer": "peer", "choice": [{"batch_sequences": 64}]}, "x.yaml: ")


def test_models_of_more_than_ten_times_the_parameters_of_dense_are_refused() -> None:
    space = [{"ffn.n_experts": 48}]
    with pytest.raises(ConfigError, match=r"moe-d64.* parameters, more than 10 times those of dense, 328,256"):
        next(Placing("many", Entrant(layer="moe", choice=space)).tuning())


def test_the_reference_is_the_dense_layer_of_the_other_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "entrant_files", lambda: {"gated": tmp_path / "gated.yaml"})
    (tmp_path / "gated.yaml").write_text("{layer: swiglu, replaced: all, reference: true}")
    assert {cell.config.dense for cell in next(Placing("peer", Entrant(layer="peer")).tuning())} == {"swiglu"}


def test_the_folder_of_an_outside_layer_has_its_module_and_is_checked_without_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, elsewhere, standing = tmp_path / "home", tmp_path / "elsewhere", tmp_path / "standing"
    (home / "conf/ffn").mkdir(parents=True)
    elsewhere.mkdir()
    (home / "conf/ffn/halved.yaml").write_text(
        "# @package _global_\nffn: {class: halved_layer.HalvedConfig}\noptim: {lr: 0.005}\n"
    )
    (home / "halved_layer.py").write_text(OUTSIDE)
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(home)
    (home / "conf/ffn/hot.yaml").write_text("# @package _global_\ndefaults: [halved, _self_]\noptim: {lr: 0.05}\n")
    stages, folder = placed(standing, "halved", Entrant(layer="hot"))
    assert sorted(path.name for path in folder.rglob("*.*")) == [
        *("entrant.json", "halved.yaml", "halved_layer.py", "hot.yaml", "records.jsonl", "sequence_losses.npz")
    ]
    monkeypatch.chdir(elsewhere)
    del sys.modules["halved_layer"]
    sys.path.remove(str(home))
    assert check_entry("halved", standing=standing) == sum(map(len, stages))
    assert sys.modules["halved_layer"].__file__ == str(folder / "halved_layer.py")


def test_what_was_chosen_is_printed_as_the_layers_file_has_it(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = {"optim.lr_factor": 0.5, "optim.table_lr": 0.03, "optim.weight_decay": 0.3, "ffn.top_k": 8}
    place.print_settings(Placing("peer", read_entrant("peer")), chosen)
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed == {"optim": {"lr": 0.00277, "table_lr": 0.03, "weight_decay": 0.3}, "ffn": {"top_k": 8}}


def test_overrides_that_choose_no_corpus_choose_no_table(tmp_path: Path) -> None:
    others = ["slurm.partition=short", "ffn.n_experts=9216", "sweep.min_sizes=1"]
    assert entries.table_folder(others) == entries.STANDING
    assert entries.table_folder([*others, "data=code"]) == entries.STANDING.with_name("standing_code")


def test_overrides_leave_the_protocol_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    others = ["optim=row_sparse_adamw", "context=32"]
    with pytest.raises(
        UserError, match=r"the same for all layers, and overrides change context 64 -> 32; .*optim.name"
    ):
        place.main(["dense", "--plan", *others])
    assert place.main(["dense", "--plan", "trainer.runs_directory=elsewhere", "data=code"]) == 0
    assert place.main(["dense", "--plan", "--tune", *others]) == 0, "what is no row may differ"
    capsys.readouterr()


def test_the_plan_of_tuning_alone_has_no_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert place.main(["dense", "--tune", "--plan"]) == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()[:2]] == [
        *("trials", "new seeds of the best")
    ]


@pytest.mark.parametrize("options", [[], ["--plan"]])
def test_a_folder_with_a_run_of_another_configuration_is_refused(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, "prepare", lambda data: None)
    monkeypatch.setattr(place, "table_folder", lambda overrides: tmp_path)
    here = f"trainer.runs_directory={tmp_path / 'runs'}"
    cell = next(Placing("dense", read_entrant("dense"), [here]).tuning())[0]
    write_record(cell.folder, record_of(replace(cell, config=replace(cell.config, context=32))))
    with pytest.raises(UserError, match=r"holds a run of another configuration: context"):
        place.main(["dense", here, *options])
