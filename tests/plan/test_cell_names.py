"""Names of cells: one for each cell, however its values are written."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peerscale.config.schema import composed
from peerscale.plan.cell_names import budget_name
from peerscale.plan.cells import planned_cells, single_cell
from peerscale.records.fingerprint import hashed_config
from toy_study import CORPUS, write_study


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["ffn=peer", "d_model=64", "budget=1e12"], "peer-d64-1e12-s0"),
        (["ffn=moe_token_choice", "seed=7"], "moe_token_choice-d32-2e11-s7"),
        (["ffn=peer", "ffn.top_k=8", "optim.lr=1e-3"], "peer-d32-2e11-lr=0.001-top_k=8-s0"),
        (["replaced=[1,3]"], "dense-d32-2e11-replaced=1_3-s0"),
        (["ffn=peer", "++ffn.query_norm=false"], "peer-d32-2e11-query_norm=false-s0"),
        (["trainer.threads=2", "tracking=disabled", "data.directory=x", "trainer=cpu"], "dense-d32-2e11-s0"),
        (["n_layers=6"], "dense-d32-l6-2e11-s0"),
        (["data.vocab_size=512", "context=32"], "dense-d32-2e11-vocab_size=512-context=32-s0"),
    ],
)
def test_a_cells_name_says_how_it_departs_from_the_usual(overrides: list[str], name: str) -> None:
    assert name_of(overrides) == name


def name_of(overrides: list[str]) -> str:
    return single_cell(composed(overrides)).name


@pytest.mark.parametrize(
    "spellings",
    [
        ["optim.lr=2e-2", "optim.lr=.02", "optim.lr=0.020", "++optim.lr=0.02", "optim.lr='0.02'"],
        ["optim.lr=1", "optim.lr=1.0", "optim.lr=1e0"],
        ["context=32", "context=32.0", "context='32'"],
        ["trainer.threads=1 ++ffn.variant=x", "++ffn.variant='x'"],
        ["replaced=[1,3]", "replaced=[ 1, 3 ]"],
        ["optim.lr=5 optim.lr=2e-2", "optim.lr=2e-2"],
        ["optim.table_lr=null", "optim.table_lr=Null"],
    ],
    ids=lambda spellings: spellings[0],
)
def test_a_value_has_one_name_however_it_is_written(spellings: list[str]) -> None:
    assert len({name_of(words) for words in map(_words, spellings)}) == 1


def _words(line: str) -> list[str]:
    return re.split(r" (?=[a-z+])", line)


def test_booleans_have_one_name() -> None:
    names = {name_of(["ffn=peer", f"++ffn.query_norm={word}"]) for word in ("False", "false")}
    assert names == {"peer-d32-2e11-query_norm=false-s0"}


def test_axes_and_overrides_name_a_value_alike(tmp_path: Path) -> None:
    sweep = "methods: [dense], grid: [{budget: 1e10, d_model: [8]}]"
    (axis,) = planned_cells(write_study(tmp_path, f"{{{sweep}, axes: {{optim.lr: [2e-2]}}}}"))
    (override,) = planned_cells(write_study(tmp_path, f"{{{sweep}}}"), ["optim.lr=.02"])
    assert axis.name == override.name == "dense-d8-1e10-lr=0.02-s0"


@pytest.mark.parametrize("override", ["min_steps=10", "data.max_epochs=2", "data.train_tokens=100000000"])
def test_what_the_fingerprint_leaves_out_is_not_in_the_name(override: str) -> None:
    plain, changed = single_cell(composed()), single_cell(composed([override]))
    assert hashed_config(plain.config, plain.plan, CORPUS) == hashed_config(changed.config, changed.plan, CORPUS)
    assert changed.name == plain.name


@pytest.mark.parametrize(
    ("budget", "name"),
    [(3e11, "3e11"), (1.5e12, "1.5e12"), (6e18, "6e18"), (1e10, "1e10"), (2.25e9, "2.25e9"), (9.99999999e11, "1e12")],
)
def test_budget_names(budget: float, name: str) -> None:
    assert budget_name(budget) == name


@given(st.floats(1e3, 1e25))
def test_a_budgets_name_is_the_budget(budget: float) -> None:
    assert float(budget_name(budget)) == pytest.approx(budget, rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["data=text", "data.path=/home/me/corpus/stories.txt"], "dense-d32-2e11-data=stories-s0"),
        (["data=text", "budget=1e9", "data.path=stories.jsonl.gz", "seed=3"], "dense-d32-1e9-data=stories-s3"),
        (["data=text", "data.path=/home/me/v1.2/"], "dense-d32-2e11-data=v1.2-s0"),
        (["data=text", "data.path='/home/me/my (new) texts.txt'"], "dense-d32-2e11-data=my_new_texts-s0"),
        (["data=text", "data.path=/home/me/x", "data.name=verse"], "dense-d32-2e11-data=verse-s0"),
        (["data=text", "data.path=/", "data.directory=/x"], "dense-d32-2e11-data=text-s0"),
        (
            ["optim.lr=0.1", "data=text", "data.vocab_size=300", "data.path=a.txt", "context=8"],
            "dense-d32-2e11-data=a-vocab_size=300-lr=0.1-context=8-s0",
        ),
        (["data=text", "data.path=c4.parquet"], "dense-d32-2e11-data=c4-s0"),
    ],
)
def test_a_corpus_stands_in_names_by_its_own_and_never_by_its_path(overrides: list[str], name: str) -> None:
    assert name_of(overrides) == name
