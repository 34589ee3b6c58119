import functools
import math
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from peerscale.accounting import cost
from peerscale.config import Config, ConfigError, load
from peerscale.files import ROOT
from peerscale.plan import Verdict, plan, schedule

FFNS = sorted(path.stem for path in (ROOT / "conf/ffn").glob("*.yaml"))


@functools.cache
def configured(*overrides: str) -> Config:
    return load(overrides)


def steps_for(config: Config, steps: float) -> Config:
    """The same cell with a budget for so many steps."""
    return replace(config, budget=steps * cost(config).flops_per_token * config.batch_sequences * config.context)


@given(
    ffn=st.sampled_from(FFNS),
    size=st.sampled_from(["d8", "d20", "d64", "d256"]),
    log_budget=st.floats(8, 18),
    batch_sequences=st.sampled_from([16, 32, 128]),
    context=st.sampled_from([16, 64, 2048]),
    min_steps=st.integers(100, 2000),
    train_tokens=st.none() | st.integers(10**4, 10**12),
)
def test_meets_its_budget_or_is_dropped_for_a_reason(
    ffn, size, log_budget, batch_sequences, context, min_steps, train_tokens
) -> None:
    config = replace(
        configured(f"ffn={ffn}", f"size={size}", "data.train_tokens=null"),
        budget=10**log_budget,
        batch_sequences=batch_sequences,
        context=context,
        min_steps=min_steps,
    )
    planned = plan(config, train_tokens=train_tokens)
    per_step = cost(config).flops_per_token * batch_sequences * context
    exact = Fraction(config.budget) / per_step
    assert abs(planned.steps - exact) <= Fraction(1, 2)
    assert planned.tokens == planned.steps * batch_sequences * context
    assert planned.flops == planned.steps * per_step
    too_short = planned.steps < min_steps
    too_long = train_tokens is not None and planned.tokens > train_tokens
    if planned.verdict is Verdict.OK:
        assert not too_short and not too_long
        assert planned.reason == ""
        assert abs(planned.flops / config.budget - 1) <= 0.005
        assert 1 <= planned.warmup_steps < planned.steps
    else:
        assert too_short or too_long
        assert ("min_steps" in planned.reason) == too_short
        assert ("max_epochs" in planned.reason) == (too_long and not too_short)


@pytest.mark.parametrize("steps", [0, 1, 199])
def test_drops_a_run_of_too_few_steps(steps: int) -> None:
    planned = plan(steps_for(configured("ffn=peer", "budget=1e12"), max(steps, 0.01)))
    assert (planned.verdict, planned.reason) == (Verdict.DROP, f"{steps} steps < min_steps 200")


def test_keeps_a_run_of_just_enough_steps() -> None:
    assert plan(steps_for(configured("ffn=peer"), 200)).verdict is Verdict.OK


def test_drops_a_run_that_is_all_warm_up() -> None:
    config = configured("ffn=dense", "optim.warmup_fraction=1")
    planned = plan(steps_for(config, 300))
    assert (planned.verdict, planned.reason) == (Verdict.DROP, "warm-up of 300 steps leaves none of 300")


def test_drops_a_run_of_too_many_epochs() -> None:
    config = configured("ffn=dense", "data.train_tokens=null")
    config = steps_for(config, 500)  # of 1,024 tokens
    dropped = plan(config, train_tokens=400 * 1024)
    assert (dropped.verdict, dropped.reason) == (Verdict.DROP, "1.25 epochs > max_epochs 1")
    assert dropped.epochs == 1.25
    assert plan(config, train_tokens=500 * 1024).verdict is Verdict.OK
    twice = replace(config, data=replace(config.data, max_epochs=2))
    assert plan(twice, train_tokens=400 * 1024).verdict is Verdict.OK


def test_epochs_are_unknown_until_the_corpus_is() -> None:
    config = steps_for(configured("ffn=dense", "data.train_tokens=null"), 10**9)
    assert plan(config).epochs is None
    assert plan(config).verdict is Verdict.OK


def test_the_tokens_that_are_prepared_count_before_those_written_down() -> None:
    config = steps_for(configured("ffn=dense", "data.train_tokens=1000000"), 500)
    assert plan(config).epochs == pytest.approx(0.512)
    assert plan(config, train_tokens=512_000).epochs == pytest.approx(1)


@pytest.mark.parametrize(
    ("sequences", "n_experts", "capacity_factor", "capacity"),
    [(16, 32, 1, "0.5"), (16, 3, 1, "5.33333"), (24, 16, 1, "1.5"), (16, 16, 0.5, "0.5"), (16, 16, 1.5, "1.5")],
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


@pytest.mark.parametrize(("sequences", "n_experts", "factor"), [(16, 16, 1), (32, 16, 1), (16, 16, 2), (32, 8, 0.25)])
def test_keeps_expert_choice_with_a_whole_capacity(sequences, n_experts, factor) -> None:
    config = configured(
        "ffn=moe", f"batch_sequences={sequences}", f"ffn.n_experts={n_experts}", f"ffn.capacity_factor={factor}"
    )
    assert plan(steps_for(config, 300)).verdict is Verdict.OK


def test_a_capacity_is_whole_whatever_its_factor_rounds_to() -> None:
    # 100 x 1.1 / 11 = 10, but 100 * 1.1 is 110.00000000000001 in floating point.
    config = configured("ffn=moe", "batch_sequences=100", "ffn.n_experts=11", "ffn.capacity_factor=1.1")
    assert plan(steps_for(config, 300)).verdict is Verdict.OK


def test_refuses_expert_choice_that_wants_more_tokens_than_there_are() -> None:
    # 4 sequences x 8 / 2 experts: each expert would take 16 of the 4 tokens at a position.
    try:
        config = configured("ffn=moe", "batch_sequences=4", "ffn.n_experts=2", "ffn.capacity_factor=8")
    except ConfigError:
        return
    assert plan(steps_for(config, 300)).verdict is Verdict.DROP


def test_token_choice_needs_no_capacity() -> None:
    assert plan(steps_for(configured("ffn=moe_token_choice", "batch_sequences=3"), 300)).verdict is Verdict.OK


@pytest.mark.parametrize(("size", "factor"), [("d32", 1.0), ("d8", 2.0), ("d128", 0.5)])
def test_rates_follow_the_width_and_table_rates_do_not(size: str, factor: float) -> None:
    settings = ("ffn=peer", f"size={size}", "optim.lr=0.01", "optim.table_lr=0.002")
    planned = plan(configured(*settings))
    assert planned.lr == pytest.approx(0.01 * factor)
    assert planned.table_lr == 0.002
    assert plan(configured(*settings, "optim.lr_rule=constant")).lr == 0.01
    assert plan(configured("ffn=dense", f"size={size}")).table_lr is None


def test_evaluation_tokens_are_those_of_all_sets() -> None:
    evaluation = "data.evaluation={validation:100,tuning:0,speeches:20,wikipedia:3}"
    assert plan(configured("ffn=dense", evaluation)).evaluation_tokens == 123


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
