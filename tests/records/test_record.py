import functools
import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from peerscale.config.schema import Config, composed, load, to_dict
from peerscale.errors import UserError
from peerscale.plan.cells import single_cell
from peerscale.plan.plan import plan
from peerscale.records.fingerprint import ADDED_LATER, RECIPE_VERSION, differing_keys, fingerprint, hashed_config
from peerscale.records.record import (
    LOCK,
    RECORD,
    SCHEMA_VERSION,
    Record,
    Status,
    parse_record,
    read_cell,
    read_record,
    write_record,
)
from peerscale.records.table import read_records, write_records
from toy_study import CORPUS, record_of


def record(status: Status = Status.DONE, **fields: Any) -> Record:
    return record_of(single_cell(composed(["ffn=peer"])), status, **fields)


def test_round_trips_through_its_file(tmp_path: Path) -> None:
    assert read_record(tmp_path / "cell") is None
    full = record(
        Status.FAILED,
        reason="line one — é",
        sequence_losses=[5.1, 4.25],
        router={"expert_usage": 0.75, "unevenness": 1.5, "usage_tokens": 131072},
        environment={"hardware": "abacus", "n_threads": 1, "git_commit": None, "versions": {"torch": "2.8"}},
        bit_exact=False,
        traceback="Traceback:\n  ...",
    )
    write_record(tmp_path / "cell", full)
    back = read_record(tmp_path / "cell")
    assert back is not None
    assert back.status is Status.FAILED
    assert json.loads(json.dumps(asdict(back))) == json.loads(json.dumps(asdict(full)))
    assert fingerprint(back.hashed_config) == full.fingerprint
    assert [path.name for path in (tmp_path / "cell").iterdir()] == ["record.json"]


def test_a_loss_that_is_no_number_round_trips(tmp_path: Path) -> None:
    write_record(tmp_path, record(evaluation={"validation": {"loss": float("nan"), "ppl": float("inf")}}))
    back = read_record(tmp_path)
    assert back is not None
    assert back.evaluation["validation"]["loss"] != back.evaluation["validation"]["loss"]
    assert back.evaluation["validation"]["ppl"] == float("inf")


@pytest.mark.parametrize("read", [read_record, lambda folder: read_records(folder.parent)])
def test_a_value_that_changed_on_disk_is_noticed(read: Callable[[Path], object], tmp_path: Path) -> None:
    whole = replace(record(), cell="cell")
    write_record(tmp_path / "cell", whole)
    text = (tmp_path / "cell" / RECORD).read_text()
    assert "5.25" in text
    (tmp_path / "cell" / RECORD).write_text(text.replace("5.25", "5.05"))
    with pytest.raises(UserError, match="damaged, or changed by hand"):
        read(tmp_path / "cell")
    write_records(tmp_path, [whole])
    lines = (tmp_path / "records.jsonl").read_text()
    (tmp_path / "records.jsonl").write_text(lines.replace("5.25", "5.05"))
    with pytest.raises(UserError, match=r"records.jsonl:1: damaged"):
        read_records(tmp_path)


def test_a_record_from_before_checksums_counts(tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text(json.dumps(asdict(record())))
    assert read_record(tmp_path) == record()


def test_a_reader_needs_no_right_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a colleague's folder; the tests may run as root, who may write anywhere."""
    write_record(tmp_path, replace(record(), status=Status.RUNNING))
    (tmp_path / LOCK).touch()
    opened = os.open

    def read_only(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", read_only)
    found = read_cell(tmp_path)
    assert found is not None and found.status is Status.INTERRUPTED


def broken(tmp_path: Path, **change: Any) -> str:
    tree = {**json.loads(json.dumps(asdict(record()))), **change}
    (tmp_path / "record.json").write_text(json.dumps({key: value for key, value in tree.items() if value != "GONE"}))
    with pytest.raises(UserError) as refused:
        read_record(tmp_path)
    return str(refused.value)


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    for version in (SCHEMA_VERSION + 1, 1, None, "1"):
        message = broken(tmp_path, schema_version=version)
        problem = f"{path}: schema version {version}, but this peerscale reads version {SCHEMA_VERSION}"
        assert message == f"{problem}; to go on without it: mv '{tmp_path}' '{tmp_path}.old'"
    assert "schema version None" in broken(tmp_path, schema_version="GONE")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mood": "good"}, "mood: Unexpected keyword argument"),
        ({"status": "resting"}, "status"),
        ({"fingerprint": "GONE"}, "fingerprint"),
        ({"plan": None}, "plan"),
        ({"params": {"ffn": "many"}}, "params.ffn"),
        ({"evaluation": {"validation": {"loss": "low"}}}, "evaluation.validation.loss"),
    ],
)
def test_what_is_no_record_is_refused_naming_the_field(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    message = broken(tmp_path, **change)
    assert message.startswith(f"{tmp_path / 'record.json'}: {said}")
    assert "\n" not in message


@pytest.mark.parametrize(("text", "said"), [("{", "not JSON"), ("", "not JSON"), ("[1]", "schema version None")])
def test_a_file_that_holds_no_record_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(UserError, match=said):
        read_record(tmp_path)


def test_a_line_of_a_published_study_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"records\.jsonl:7: schema version 9"):
        parse_record({"schema_version": 9}, "records.jsonl:7")


# The fingerprint

SIZE = ("d_model", "head_dim", "n_layers")
BASE = ("ffn=peer", "d_model=16", "budget=1e12", "optim.lr_rule=inverse_sqrt_width")


@functools.cache
def hashed(*overrides: str, corpus: str = CORPUS) -> str:
    return fingerprint(hashed_of(load([*BASE, *overrides]), corpus))


def hashed_of(config: Config, corpus: str = CORPUS) -> dict[str, Any]:
    return hashed_config(config, plan(config), corpus)


def test_is_16_hexadecimal_digits_and_stable() -> None:
    assert len(hashed()) == 16 and int(hashed(), 16) >= 0
    assert hashed() == hashed("ffn=peer", "seed=0")
    tree = hashed_of(load(BASE))
    assert fingerprint(dict(reversed(tree.items()))) == fingerprint(tree)
    assert fingerprint(json.loads(json.dumps(tree))) == fingerprint(tree)


@pytest.mark.parametrize(
    "override",
    [
        *("seed=1", "budget=1.1e12", "replaced=all", "batch_sequences=32", "context=32", "precision=bf16"),
        *("d_model=32", "n_layers=5", "head_dim=8"),
        *("ffn=pkm", "ffn.n_experts=1024", "ffn.top_k=8", "ffn.n_heads=2", "++ffn.query_norm=false", "++ffn.d_key=16"),
        *("++ffn.activation=relu", "++ffn.score=sigmoid", "++ffn.query_bias=false", "++ffn.shared_keys=false"),
        *("optim.lr=0.1", "optim.table_lr=0.1", "optim.lr_rule=constant", "optim.warmup_fraction=0.2"),
        *("optim.final_lr_fraction=0", "optim.weight_decay=0", "optim.beta1=0.8", "optim.beta2=0.9", "optim.eps=1e-7"),
        *("routing_group_sequences=4", "dense=swiglu"),
        *("optim.grad_clip=2", "data.vocab_size=1024", "data.evaluation.validation=1024", "data.val_set=speeches"),
    ],
)
def test_changes_with_everything_that_changes_the_result(override: str) -> None:
    assert hashed(override) != hashed()


@pytest.mark.parametrize(
    "override",
    [
        *("trainer.threads=2", "trainer.kernel=reference", "trainer.compile=off", "trainer.accelerator=cpu"),
        *("trainer.checkpoint_every_s=1", "trainer.log_every_steps=1", "trainer.keep_checkpoint=true"),
        *("trainer.runs_directory=elsewhere", "tracking.mode=online", "tracking.tags=[a]", "tracking.id_salt=x"),
        *("data.directory=elsewhere", "++data.path=elsewhere", "data.train_tokens=12345", "data.max_epochs=3"),
        *("data.name=verse", "+data.evaluation.news=0 +data.evaluation_files.news=news.jsonl"),
        *("min_steps=3", "routing_group_sequences=16"),
    ],
)
def test_stays_with_everything_that_does_not(override: str) -> None:
    assert hashed(*override.split()) == hashed()


def test_the_layer_of_other_blocks_does_not_count_where_there_are_none() -> None:
    assert hashed("replaced=all", "dense=swiglu") == hashed("replaced=all")
    assert hashed("ffn=engram", "replaced=all", "dense=swiglu") != hashed("ffn=engram", "replaced=all")


def test_eps_of_tables_and_tf32_count_where_they_change_numbers() -> None:
    gpu, tf32 = "trainer.accelerator=gpu", "trainer.tf32=true"
    assert hashed(gpu) == hashed("optim.table_eps=1e-15") != hashed()
    assert hashed(gpu, "optim.table_eps=1e-8") == hashed("trainer.accelerator=cpu", tf32) == hashed()
    assert hashed(gpu, "ffn=dense") == hashed("ffn=dense") != hashed(gpu, "ffn=dense", tf32)
    with pytest.raises(UserError, match="tf32 needs accelerator=gpu"):
        load([*BASE, tf32])


def test_every_key_is_either_hashed_or_known_to_be_operational() -> None:
    config = load(BASE)
    left_out = {
        *(f"trainer.{key}" for key in to_dict(config)["trainer"]),
        *(f"tracking.{key}" for key in to_dict(config)["tracking"]),
        *("min_steps", "data.directory", "data.name", "data.path", "data.train_tokens", "data.max_epochs"),
        # What these name is hashed: the layer's settings, the tokens of the corpus, the rates of this width.
        *("ffn.variant", "data.source", "optim.lr_rule", "optim.lr_factor", "optim.table_eps"),
        *(f"data.evaluation.{name}" for name, tokens in config.data.evaluation.items() if not tokens),
        *("routing_group_sequences", "dense"),  # where they are the usual ones
        *SIZE,  # hashed as size.d_model, size.n_layers and size.n_heads
    }
    for law in ("lr_law", "table_lr_law"):
        left_out |= {f"optim.{law}.{key}" for key in to_dict(config)["optim"][law]}
    assert {*flat(to_dict(config))} - {*flat(hashed_of(config))} == left_out
    assert {*flat(hashed_of(config))} - {*flat(to_dict(config))} == {
        *("data_fingerprint", "recipe_version", "optim.schedule", "size.d_model", "size.n_layers", "size.n_heads")
    }


def flat(tree: dict[str, Any], prefix: str = "") -> list[str]:
    return [
        key
        for name, value in tree.items()
        for key in (flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}"])
    ]


def test_changes_with_the_corpus_and_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(BASE)
    before = fingerprint(hashed_of(config))
    assert fingerprint(hashed_of(config, "f" * 16)) != before
    monkeypatch.setattr("peerscale.records.fingerprint.RECIPE_VERSION", RECIPE_VERSION + 1)
    assert fingerprint(hashed_of(config)) != before


def test_differing_keys_are_dotted_and_in_order() -> None:
    old = {"a": 1, "ffn": {"top_k": 8, "method": "peer"}, "size": {"d_model": 8}, "gone": None, "gone_too": 1}
    new = {"a": 1, "ffn": {"top_k": 16, "method": "peer"}, "size": 3, "new": "x"}
    assert differing_keys(old, new) == [
        "ffn.top_k 8 -> 16",
        "gone_too 1 -> None",
        "new None -> 'x'",
        "size {'d_model': 8} -> 3",
    ]
    assert differing_keys(old, old) == []


def test_a_folder_set_aside_as_the_error_says_stops_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "study" / "cell"
    folder.mkdir(parents=True)
    (folder / RECORD).write_text("{")
    with pytest.raises(UserError) as refused:
        read_records(tmp_path / "study")
    command = str(refused.value).rpartition("to go on without it: ")[2]
    subprocess.run(["sh", "-c", command], check=True)
    assert read_records(tmp_path / "study") == []


def test_a_running_record_is_interrupted_where_no_process_holds_its_lock(tmp_path: Path) -> None:
    write_record(tmp_path, replace(record(), status=Status.RUNNING))

    def status(read: Callable[[Path], Record | None]) -> Status:
        found = read(tmp_path)
        assert found is not None
        return found.status

    assert status(read_cell) is Status.INTERRUPTED
    assert not (tmp_path / LOCK).exists(), "looking leaves nothing behind"
    with FileLock(tmp_path / LOCK):
        assert status(read_cell) is Status.RUNNING
    assert status(read_cell) is Status.INTERRUPTED
    assert status(read_record) is Status.RUNNING


def test_the_names_of_rules_and_layers_are_not_hashed_but_what_they_stand_for() -> None:
    rule = load([*BASE, "optim.lr_rule=inverse_sqrt_width", "optim.lr=0.02"])
    value = load([*BASE, "optim.lr_rule=constant", f"optim.lr={0.02 * (32 / 16) ** 0.5!r}"])
    assert hashed_of(rule) == hashed_of(value)
    assert hashed("++ffn.variant=other") == hashed()
    assert hashed("replaced=[2]") == hashed("replaced=middle") != hashed("replaced=[1]")
    assert hashed("data.evaluation.speeches=0") == fingerprint(
        {
            **hashed_of(load(BASE)),
            "data": {
                **(data := hashed_of(load(BASE))["data"]),
                "evaluation": {name: tokens for name, tokens in data["evaluation"].items() if name != "speeches"},
            },
        }
    )


def test_a_key_added_later_is_hashed_only_where_it_departs_from_what_was(monkeypatch: pytest.MonkeyPatch) -> None:
    before = hashed()
    config = load(BASE)
    later = {**to_dict(config), "optim": {**to_dict(config)["optim"], "amsgrad": False}}
    monkeypatch.setattr("peerscale.records.fingerprint.to_dict", lambda _: json.loads(json.dumps(later)))
    assert fingerprint(hashed_of(config)) != before
    monkeypatch.setattr("peerscale.records.fingerprint.ADDED_LATER", {**ADDED_LATER, "optim.amsgrad": False})
    assert fingerprint(hashed_of(config)) == before
    later["optim"]["amsgrad"] = True
    assert fingerprint(hashed_of(config)) != before
