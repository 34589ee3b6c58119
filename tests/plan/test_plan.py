import functools
import json
import math
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from peerscale.config.schema import Config, load
from peerscale.data.batches import EvaluationBatches
from peerscale.errors import ConfigError
from peerscale.files import ROOT
from peerscale.plan.cost import cost
from peerscale.plan.notices import as_asked, beyond_law, evaluation_line
from peerscale.plan.plan import Verdict, plan, schedule, table_lr
from peerscale.records.fingerprint import hashed_config

FFNS = sorted(path.stem for path in (ROOT / "conf/ffn").glob("*.yaml"))


def sets(train: int) -> dict[str, int]:
    """Tokens of the sets of a corpus, held-out ones as large as anyone asks."""
    return {"train": train, "validation": 10**9, "tuning": 10**9}


@functools.cache
def configured(*overrides: str) -> Config:
    return load(overrides)


def steps_for(config: Config, steps: float) -> Config:
    """The same cell with a budget for so many steps."""
    return replace(config, budget=steps * cost(config).flops_per_token * config.batch_sequences * config.context)


@given(
    ffn=st.sampled_from(FFNS),
    d_model=st.sampled_from([8, 20, 64, 256]),
    log_budget=st.floats(8, 18),
    batch_sequences=st.sampled_from([16, 32, 128]),
    context=st.sampled_from([16, 64, 2048]),
    min_steps=st.integers(100, 2000),
    train_tokens=st.none() | st.integers(10**4, 10**12),
)
def test_meets_its_budget_or_is_dropped_for_a_reason(
    ffn, d_model, log_budget, batch_sequences, context, min_steps, train_tokens
) -> None:
    base = configured(f"ffn={ffn}", "data.train_tokens=null")
    config = replace(
        base,
        d_model=d_model,
        data=replace(base.data, evaluation={"validation": batch_sequences * context}),
        budget=10**log_budget,
        batch_sequences=batch_sequences,
        context=context,
        min_steps=min_steps,
    )
    planned = plan(config, set_tokens=sets(train=train_tokens) if train_tokens else None)
    per_step = cost(config).flops_per_token * batch_sequences * context
    exact = Fraction(config.budget) / per_step
    assert abs(planned.steps - exact) <= Fraction(1, 2)
    assert planned.tokens == planned.steps * batch_sequences * context
    assert planned.flops == planned.steps * per_step
    too_short = planned.steps < min_steps
    too_long = train_tokens is not None and planned.tokens > train_tokens
    less_than_a_batch = train_tokens is not None and train_tokens <= 2 * batch_sequences * context
    if planned.verdict is Verdict.OK:
        assert not too_short and not too_long
        assert planned.reason == ""
        assert abs(planned.flops / config.budget - 1) <= 0.005
        assert 1 <= planned.warmup_steps < planned.steps
    else:
        assert too_short or too_long or less_than_a_batch
        assert planned.reason.startswith("the train set has ") == less_than_a_batch
        if less_than_a_batch:
            return
        assert ("too few steps" in planned.reason) == too_short
        assert ("epochs are more than" in planned.reason) == (too_long and not too_short)
        named = float(planned.reason.split()[-1])
        limit = min_steps * per_step if too_short else train_tokens * cost(config).flops_per_token
        assert named == pytest.approx(limit, rel=0.005)


def test_drops_a_run_of_too_few_steps_and_names_the_smallest_budget() -> None:
    config = configured("ffn=peer", "d_model=32", "budget=1e12")
    planned = plan(steps_for(config, 199))
    assert planned.verdict is Verdict.DROP
    smallest = 200 * cost(config).flops_per_token * 1024
    named = f"the smallest budget for this cell is about {smallest:.2e}"
    assert planned.reason == f"too few steps, 199 of min_steps 200: {named}"


def test_warm_up_leaves_a_step_to_train() -> None:
    for steps in (1, 2, 300):
        planned = plan(steps_for(configured("ffn=dense", "optim.warmup_fraction=0.9999", "min_steps=1"), steps))
        assert (planned.verdict, planned.warmup_steps) == (Verdict.OK, steps - 1)


def test_drops_a_run_of_too_many_epochs() -> None:
    config = configured("ffn=dense", "data.train_tokens=null")
    config = steps_for(config, 500)  # of 1,024 tokens
    dropped = plan(config, set_tokens=sets(train=400 * 1024))
    largest = 400 * 1024 * cost(config).flops_per_token
    problem = "1.25 epochs are more than data.max_epochs 1"
    assert dropped.reason == f"{problem}: the largest budget for this cell is about {largest:.2e}"
    assert (dropped.verdict, dropped.epochs) == (Verdict.DROP, 1.25)
    assert plan(config, set_tokens=sets(train=500 * 1024)).verdict is Verdict.OK
    assert plan(config, set_tokens=sets(train=499 * 1024)).verdict is Verdict.DROP
    twice = replace(config, data=replace(config.data, max_epochs=2))
    assert plan(twice, set_tokens=sets(train=400 * 1024)).verdict is Verdict.OK


def test_epochs_are_unknown_until_the_corpus_is() -> None:
    config = steps_for(configured("ffn=dense", "data.train_tokens=null"), 10**9)
    assert plan(config).epochs is None
    assert plan(config).verdict is Verdict.OK


def test_the_tokens_that_are_prepared_count_before_those_written_down() -> None:
    config = steps_for(configured("ffn=dense", "data.train_tokens=1000000"), 500)
    assert plan(config).epochs == pytest.approx(0.512)
    assert plan(config, set_tokens=sets(train=512_000)).epochs == pytest.approx(1)


@pytest.mark.parametrize(
    ("sequences", "n_experts", "capacity_factor", "capacity"),
    [(16, 32, 1, "0.5"), (16, 3, 1, "5.33333"), (24, 16, 1, "1.5"), (16, 16, 1.5, "1.5"), (4, 2, 8, "16")],
)
def test_drops_expert_choice_without_a_whole_capacity(sequences, n_experts, capacity_factor, capacity) -> None:
    config = configured(
        "ffn=moe",
        f"batch_sequences={sequences}",
        f"ffn.n_experts={n_experts}",
        f"ffn.capacity_factor={capacity_factor}",
    )
    planned = plan(steps_for(config, 300))
    assert planned.verdict is Verdict.DROP
    assert planned.reason == (
        f"expert choice needs a whole capacity in 1..{sequences}: {sequences} sequences x {capacity_factor} / "
        f"{n_experts} experts = {capacity}"
    )


def test_drops_experts_that_are_no_whole_part_of_a_dense_layer() -> None:
    planned = plan(steps_for(configured("ffn=fine_grained_moe", "ffn.granularity=3"), 300))
    assert (planned.verdict, planned.reason) == (Verdict.DROP, "ffn.granularity 3 does not divide d_ff 128")


@pytest.mark.parametrize(
    ("sequences", "n_experts", "factor"),
    [(16, 16, 1), (32, 16, 1), (16, 16, 2), (32, 8, 0.25), (100, 11, 1.1)],  # 100 * 1.1 is 110.00000000000001
)
def test_keeps_expert_choice_with_a_whole_capacity(sequences, n_experts, factor) -> None:
    config = configured(
        "ffn=moe", f"batch_sequences={sequences}", f"ffn.n_experts={n_experts}", f"ffn.capacity_factor={factor}"
    )
    assert plan(steps_for(config, 300)).verdict is Verdict.OK


def test_token_choice_needs_no_capacity() -> None:
    assert plan(steps_for(configured("ffn=moe_token_choice", "batch_sequences=3"), 300)).verdict is Verdict.OK


@pytest.mark.parametrize(("width", "factor"), [(32, 1.0), (8, 2.0), (128, 0.5)])
def test_rates_follow_the_width_and_table_rates_do_not(width: int, factor: float) -> None:
    settings = ("ffn=peer", f"d_model={width}", "optim.lr=0.01", "optim.table_lr=0.002")
    planned = plan(configured(*settings, "optim.lr_rule=inverse_sqrt_width"))
    assert planned.lr == pytest.approx(0.01 * factor)
    assert planned.table_lr == 0.002
    assert plan(configured(*settings, "optim.lr_rule=constant")).lr == 0.01
    assert plan(configured("ffn=dense", f"d_model={width}")).table_lr is None


def test_evaluation_tokens_are_those_of_all_sets() -> None:
    config = configured("ffn=dense", "data.evaluation={validation:4096,tuning:0,speeches:2048,wikipedia:1024}")
    planned = plan(config)
    assert planned.evaluation == {"validation": 4096, "speeches": 2048, "wikipedia": 1024}
    assert planned.evaluation_tokens == 7168
    assert evaluation_line(config, planned) == (
        "evaluation: validation 4,096 tokens; speeches 2,048 tokens; wikipedia 1,024 tokens"
    )
    assert as_asked(config, planned)


def test_a_set_is_evaluated_on_the_whole_batches_that_it_has() -> None:
    config = configured("ffn=dense", "data.evaluation={validation:131072,tuning:3000,speeches:65536,wikipedia:65536}")
    planned = plan(config, set_tokens={"train": 10**9, "validation": 44_290, "tuning": 9999, "wikipedia": 1024})
    assert planned.verdict is Verdict.OK
    assert planned.evaluation == {"validation": 43 * 1024, "tuning": 2 * 1024}
    assert not as_asked(config, planned)
    assert evaluation_line(config, planned) == (
        "evaluation: validation 44,032 of 131,072 tokens asked; tuning 2,048 of 3,000 tokens asked; speeches: not in "
        "this corpus, skipped; wikipedia: fewer tokens than the 1,025 that a batch of 16 x 64 needs, skipped"
    )


def test_a_set_may_fill_just_one_batch() -> None:
    config = configured("ffn=dense", "data.evaluation={validation:2048,tuning:1024,speeches:1024,wikipedia:0}")
    planned = plan(config, set_tokens={"train": 10**9, "validation": 1025, "tuning": 1024})
    assert planned.evaluation == {"validation": 1024}
    assert planned.skipped == {
        "tuning": "fewer tokens than the 1,025 that a batch of 16 x 64 needs",
        "speeches": "not in this corpus",
    }


@given(
    held=st.integers(1, 5000),
    asked=st.integers(1, 5000),
    batch_sequences=st.integers(1, 20),
    context=st.integers(2, 20),
)
def test_what_the_plan_keeps_can_be_evaluated_and_nothing_more(held, asked, batch_sequences, context) -> None:
    shape = {"batch_sequences": batch_sequences, "context": context}
    base = configured("ffn=dense", "data.evaluation={validation:9}")
    config = replace(base, data=replace(base.data, evaluation={"validation": asked}), **shape)
    planned = plan(config, set_tokens={"train": 10**9, "validation": held})
    tokens, a_batch = np.zeros(held, np.uint16), batch_sequences * context
    if "validation" in planned.evaluation:
        batches = EvaluationBatches(tokens, planned.evaluation["validation"], **shape)
        assert len(batches) * a_batch == planned.evaluation["validation"] <= asked
        more = planned.evaluation["validation"] + a_batch
        if more > asked:
            return
    else:
        assert planned.verdict is Verdict.DROP
        more = a_batch
        batch = f"a batch of {batch_sequences} x {context} needs"
        assert planned.reason == f"data.val_set validation: fewer tokens than the {a_batch + 1:,} that {batch}"
        if asked < a_batch:
            return
    with pytest.raises(AssertionError):
        EvaluationBatches(tokens, more, **shape)


def test_drops_what_has_no_validation_set_or_training_batch() -> None:
    config = configured("ffn=dense", "data.val_set=speeches")
    assert plan(config, set_tokens=sets(train=10**9)).reason == "data.val_set speeches: not in this corpus"
    assert plan(configured("ffn=dense"), set_tokens=sets(train=2048)).reason == (
        "the train set has 2,048 tokens, fewer than the 2,049 that a batch of 16 x 64 needs"
    )


def test_tokens_per_parameter_are_of_all_parameters() -> None:
    planned = plan(steps_for(configured("ffn=peer"), 1000))
    assert planned.tokens_per_param == 1000 * 16 * 64 / planned.cost.params_total


@given(
    steps=st.integers(200, 5000),
    warmup=st.floats(0, 0.9),
    floor=st.floats(0, 1),
)
def test_schedule_warms_up_linearly_and_ends_with_the_run(steps: int, warmup: float, floor: float) -> None:
    base = configured("ffn=dense", "data.train_tokens=null")
    config = replace(base, optim=replace(base.optim, warmup_fraction=warmup, final_lr_fraction=floor))
    planned = plan(steps_for(config, steps))
    assert planned.steps == steps
    w = planned.warmup_steps
    assert abs(w - warmup * steps) <= 1
    assume(w < steps)
    factors = [schedule(config, planned, step) for step in range(steps)]
    assert factors[:w] == pytest.approx([(step + 1) / w for step in range(w)])
    assert max(factors) == factors[w - 1] == 1
    assert all(a >= b - 1e-12 for a, b in pairwise(factors[w - 1 :]))
    # The last step is one short of the floor, which the run reaches at its end and never passes.
    assert schedule(config, planned, steps) == pytest.approx(floor)
    assert floor - 1e-12 <= factors[-1] <= floor + (1 - floor) * (math.pi / (steps - w)) ** 2 / 4 + 1e-12


def test_schedule_is_the_cosine() -> None:
    config = configured("ffn=dense", "optim.warmup_fraction=0.25", "optim.final_lr_fraction=0.2")
    planned = plan(steps_for(config, 400))
    # Quarters of the 300 steps after a warm-up of 100: 0.2 + 0.8 (1 + cos(pi p)) / 2.
    factors = [schedule(config, planned, 100 + 75 * quarter) for quarter in range(5)]
    assert factors == pytest.approx([1.0, 0.6 + 0.4 * math.sqrt(0.5), 0.6, 0.6 - 0.4 * math.sqrt(0.5), 0.2])


LAW = (
    "{reference_d_model: 64, reference_tokens: 1e7, reference_batch_sequences: 16, width_exponent: 0.4, "
    "tokens_exponent: 0.3, batch_exponent: 0.5, "
    "fitted_d_model: [32, 64], fitted_tokens: [1e5, 1e7], fitted_batch_sequences: [8, 32], fewest_steps: 1}"
)


def test_a_law_gives_the_rate_of_width_tokens_and_batch() -> None:
    law = ["optim.lr_rule=law", f"optim.lr_law={LAW}", "optim.lr=0.005", "budget=1e12", "batch_sequences=32"]
    here = plan(load([*law, "d_model=32"]))
    assert here.lr == pytest.approx(0.005 * (32 / 64) ** -0.4 * (here.tokens / 1e7) ** -0.3 * (32 / 16) ** 0.5)
    assert plan(load([*law, "d_model=32", "optim.lr_factor=0.5"])).lr == pytest.approx(here.lr / 2)
    assert beyond_law(load([*law, "d_model=32"]), here.tokens) == []
    assert beyond_law(load([*law, "d_model=96"]), 20_000_000) == ["d_model", "tokens"]
    short = load([*law, "d_model=32", "optim.lr_law.fewest_steps=300"])
    assert [beyond_law(short, steps * 32 * 64) for steps in (299, 300)] == [["steps"], []]
    bounded = ["d_model=32", *(override.replace("}", ", largest_lr: 0.011}") for override in law)]
    assert 0.029 > here.lr > 0.011 and plan(load(bounded)).lr == pytest.approx(0.011)
    assert plan(load([*bounded, "optim.lr_factor=2"])).lr == pytest.approx(0.022)
    assert beyond_law(load(["d_model=96", "optim.lr_rule=constant"]), 20_000_000) == [], "no law, no range"
    with pytest.raises(ConfigError, match=r"lr_rule law needs optim\.lr_law"):
        load(["optim.lr_rule=law", "optim.lr_law=null"])


TABLE_LAW = "optim.table_lr_law={reference_tokens: 1e6, tokens_exponent: 0.8, fitted_tokens: [1e6, 4e6]}"


def test_a_law_gives_the_rate_of_tables_by_the_length_of_the_run() -> None:
    words = ["ffn=peer", "d_model=32", "budget=1e12", "optim.table_lr=0.02"]
    law = load([*words, TABLE_LAW])
    planned = plan(law)
    assert planned.tokens > 1e6
    assert planned.table_lr == pytest.approx(0.02 * (planned.tokens / 1e6) ** -0.8)
    assert plan(load([*words, TABLE_LAW, "optim.lr_factor=0.5"])).table_lr == planned.table_lr, "of the main rate alone"
    assert table_lr(law, 900_000) == 0.02, "the law makes no rate larger"
    assert table_lr(law, 5_000_000) == table_lr(law, 4_000_000) == pytest.approx(0.02 * 4**-0.8)
    assert beyond_law(law, 5_000_000)[-1] == "tokens, for tables"
    constant = load([*words[:-1], f"optim.table_lr={planned.table_lr!r}"])
    hashed = (hashed_config(config, plan(config), "corpus") for config in (law, constant))
    assert len({json.dumps(one, sort_keys=True) for one in hashed}) == 1, "a cell is its rate, not the law's"
    assert plan(load(["ffn=dense", TABLE_LAW])).table_lr is None


def test_a_cell_is_the_same_whichever_rule_gave_its_rate() -> None:
    by_width = load(["d_model=32", "optim.lr=0.01", "optim.lr_rule=inverse_sqrt_width"])
    constant = load(["d_model=32", "optim.lr=0.02", "optim.lr_rule=constant", "optim.lr_factor=0.5"])
    first, second = (hashed_config(config, plan(config), "corpus") for config in (by_width, constant))
    assert first == second


def test_what_cannot_be_shared_is_dropped_with_its_reason() -> None:
    three = plan(load(["ffn=dense", "trainer.devices=3"]))
    assert three.verdict is Verdict.DROP
    assert three.reason == "16 sequences cannot be shared by trainer.devices 3"
    split = plan(load(["ffn=moe", "ffn.n_experts=4", "trainer.devices=4", "routing_group_sequences=8"]))
    assert split.reason == "routing_group_sequences 8 does not divide the 4 sequences of a device"
    odd = plan(load(["ffn=peer", "routing_group_sequences=6"]))
    assert odd.reason == "routing_group_sequences 6 does not divide batch_sequences 16"
    few = plan(load(["ffn=moe", "ffn.n_experts=16", "ffn.capacity_factor=1", "routing_group_sequences=8"]))
    assert few.reason == ("expert choice needs a whole capacity in 1..8: 8 sequences x 1 / 16 experts = 0.5")
