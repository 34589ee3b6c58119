import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from peerscale.data.batches import EvaluationBatches, TrainBatches


def counting(n_tokens):
    """Token i is i, so that a batch shows where it comes from."""
    return np.arange(n_tokens, dtype=np.uint16)


def windows(batch, context):
    """The window numbers of a batch of `counting` tokens, after checking that each row is one whole window."""
    assert batch.dtype == np.int64
    assert np.array_equal(batch, batch[:, :1] + np.arange(context + 1))
    number, remainder = np.divmod(batch[:, 0], context)
    assert not remainder.any()
    return number


shapes = {"batch_sequences": st.integers(1, 9), "context": st.integers(2, 17)}


@given(seed=st.integers(0, 2**40), windows_per_row=st.integers(2, 12), extra=st.integers(0, 100), **shapes)
def test_an_epoch_uses_no_window_twice_and_no_batch_has_neighbours(
    seed, windows_per_row, extra, batch_sequences, context
):
    tokens = counting(batch_sequences * windows_per_row * context + 1 + extra)
    batches = TrainBatches(tokens, seed=seed, batch_sequences=batch_sequences, context=context)
    for epoch in range(2):
        seen = []
        for step in range(batches.steps_per_epoch):
            batch = batches[epoch * batches.steps_per_epoch + step]
            assert batch.shape == (batch_sequences, context + 1)
            numbers = windows(batch, context)
            assert (np.diff(np.sort(numbers)) >= 2).all()
            seen.extend(numbers.tolist())
        assert len(set(seen)) == len(seen) == batches.steps_per_epoch * batch_sequences
        # All but the last window of each row's part of the corpus, and less than one window per row at the end.
        assert len(seen) >= (len(tokens) - 1) // context - 2 * batch_sequences + 1


def test_a_batch_depends_on_seed_and_step_alone():
    tokens = counting(5000)
    options = {"batch_sequences": 4, "context": 16}
    straight = TrainBatches(tokens, seed=3, **options)
    expected = [straight[step] for step in range(3 * straight.steps_per_epoch)]
    resumed = TrainBatches(tokens, seed=3, **options)
    for step in np.random.default_rng(0).permutation(len(expected)):
        assert np.array_equal(resumed[int(step)], expected[step])

    n = straight.steps_per_epoch
    other = TrainBatches(tokens, seed=4, **options)
    assert any(not np.array_equal(other[step], expected[step]) for step in range(n))
    assert any(not np.array_equal(expected[n + step], expected[step]) for step in range(n))


def test_rows_of_a_batch_are_shuffled_independently():
    batches = TrainBatches(counting(60_000), seed=0, batch_sequences=4, context=8)
    orders = np.stack([windows(batches[step], 8) for step in range(batches.steps_per_epoch)], axis=1)
    correlations = np.corrcoef(np.vstack([orders, np.arange(batches.steps_per_epoch)]))
    assert np.abs(correlations[~np.eye(5, dtype=bool)]).max() < 0.1  # 1,873 steps: 4 standard deviations


def test_batches_are_those_of_earlier_runs():
    # A literal, since runs resume with it: if it must change, raise the recipe version.
    batches = TrainBatches(counting(4000), seed=7, batch_sequences=3, context=10)
    drawn = np.stack([batches[step] for step in (0, 1, 131, 132, 1000)])
    assert windows(drawn[0], 10).tolist() == [37, 196, 290]
    assert (
        hashlib.sha256(drawn.astype("<i8").tobytes()).hexdigest()
        == "f0aa87ea31064ed8022cf6a40f4566c851e5c6142efa6159aa1cbebb20b73cb3"
    )


@given(n_batches=st.integers(1, 12), remainder=st.integers(0, 5), slack=st.integers(0, 600), **shapes)
def test_evaluation_takes_distinct_windows_far_apart(n_batches, remainder, slack, batch_sequences, context):
    asked = n_batches * batch_sequences * context + min(remainder, batch_sequences * context - 1)
    tokens = counting(n_batches * batch_sequences * context + 1 + slack)
    batches = EvaluationBatches(tokens, asked, batch_sequences=batch_sequences, context=context)
    assert len(batches) == n_batches
    assert n_batches * batch_sequences * context == sum(b[:, 1:].size for b in batches)
    chosen = [windows(batch, context) for batch in batches]
    for numbers in chosen:
        assert n_batches == 1 or (np.diff(np.sort(numbers)) >= 2).all()
    together = np.sort(np.concatenate(chosen))
    assert len(set(together.tolist())) == len(together)
    n_windows = (len(tokens) - 1) // context
    steps = np.diff(np.append(together, n_windows))  # spread evenly, from the first window on
    assert together[0] == 0 and steps.max() - steps.min() <= 1


def test_evaluation_is_the_same_text_however_it_is_batched():
    def chosen(batch_sequences):
        batches = EvaluationBatches(counting(9000), 4096, batch_sequences=batch_sequences, context=16)
        return sorted(number for batch in batches for number in windows(batch, 16).tolist())

    assert chosen(4) == chosen(16) == chosen(32)
