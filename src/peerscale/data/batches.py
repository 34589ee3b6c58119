"""Batches as pure functions of (seed, step): no state to save, none to restore.

Tokens are cut into windows of `context` tokens, each with the token after it: targets are inputs shifted by one. Two
windows of one batch are never neighbours in the text, since expert choice compares the sequences of a batch.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from peerscale.data.tokenizer import END_OF_TEXT_ID

Tokens = npt.NDArray[np.uint16]
Batch = npt.NDArray[np.int64]


def whole_batches(n_tokens: int, *, batch_sequences: int, context: int, apart: bool = True) -> int:
    """Batches that a set of `n_tokens` fills; none if it has fewer than `fewest_tokens`."""
    fewest = fewest_tokens(batch_sequences=batch_sequences, context=context, apart=apart)
    return (n_tokens - 1) // context // batch_sequences if n_tokens >= fewest else 0


def fewest_tokens(*, batch_sequences: int, context: int, apart: bool = True) -> int:
    """Tokens that a set needs for one batch, of whose windows, if `apart`, no two are neighbours; the last target is
    one more."""
    return (2 if apart else 1) * batch_sequences * context + 1


class TrainBatches:
    """Shuffled training batches without end; each epoch uses every window at most once.

    The windows are divided into `batch_sequences` equal strata of consecutive windows. The last window of each stratum
    is left out, and every step takes one window of each stratum, in an order of its own for each epoch and stratum; so
    two windows of a batch always have another between them.

    Args:
        tokens: the training set, shape (n,).
        seed: of the order.
        batch_sequences: windows in a batch, B.
        context: tokens in a window, T.
    """

    def __init__(self, tokens: Tokens, *, seed: int, batch_sequences: int, context: int) -> None:
        self._tokens = np.asarray(tokens)
        self._seed = seed
        self._context = context
        self._windows_per_stratum = whole_batches(len(tokens), batch_sequences=batch_sequences, context=context)
        assert self._windows_per_stratum, "a plan drops a cell that has no batch to train on"
        self.steps_per_epoch = self._windows_per_stratum - 1
        self._strata = np.arange(batch_sequences)
        self._epoch: int | None = None
        self._order = np.empty((batch_sequences, 0), dtype=np.int64)

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step, counted from 0: shape (B, T + 1)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = np.stack([self._permutation(epoch, stratum) for stratum in range(len(self._strata))])
            self._epoch = epoch
        return _gather(self._tokens, self._strata * self._windows_per_stratum + self._order[:, place], self._context)

    def _permutation(self, epoch: int, stratum: int) -> npt.NDArray[np.int64]:
        # Sorted raw bits, since numpy promises their stream for ever, but that of Generator.permutation for no version.
        bits = np.random.PCG64(np.random.SeedSequence([self._seed, epoch, stratum]))
        return np.argsort(bits.random_raw(self.steps_per_epoch), kind="stable")


class EvaluationBatches:
    """A fixed subset of a held-out set, spread evenly over all of it, in whole batches: the same whatever the seed.

    Args:
        tokens: the held-out set, shape (n,).
        n_tokens: tokens to evaluate on, rounded down to whole batches.
        batch_sequences: windows in a batch, B.
        context: tokens in a window, T.
        apart: whether no two windows of a batch may be neighbours.
    """

    def __init__(
        self, tokens: Tokens, n_tokens: int, *, batch_sequences: int, context: int, apart: bool = True
    ) -> None:
        self._tokens = np.asarray(tokens)
        self._context = context
        n_batches = n_tokens // (batch_sequences * context)
        n_chosen, n_windows = n_batches * batch_sequences, self._n_windows()
        shape = {"batch_sequences": batch_sequences, "context": context}
        assert 1 <= n_batches <= whole_batches(n_windows * context + 1, **shape, apart=apart)
        # Batch m takes every n_batches-th chosen window from the m-th on: far apart, and the subset does not depend on
        # how it is cut into batches.
        self._windows = (np.arange(n_chosen) * n_windows // n_chosen).reshape(batch_sequences, n_batches).T

    def _n_windows(self) -> int:
        return (len(self._tokens) - 1) // self._context

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> Batch:
        """Shape (B, T + 1)."""
        return _gather(self._tokens, self._windows[index], self._context)

    def counted(self, index: int) -> npt.NDArray[np.bool_]:
        """Which targets of a batch count: all, shape (B, T)."""
        return np.ones((len(self._windows[index]), self._context), dtype=bool)


class LastWordBatches(EvaluationBatches):
    """Passages of which only the last word counts, each at the start of a row of its own.

    After it the row goes on with the passages that follow it in the set. What comes later changes nothing before it in
    a causal model, and expert choice, which compares the rows of a batch at each position, finds text there as in
    training. Of a passage longer than the context the end is taken.

    Args:
        tokens: passages of two words or more, with an end of text between two.
        begins_word_V: the tokens that a space starts, with which every word but the first begins.
    """

    def __init__(
        self, tokens: Tokens, n_tokens: int, begins_word_V: npt.NDArray[np.bool_], *, context: int, **shape: Any
    ) -> None:
        ends_P = np.append(np.flatnonzero(np.asarray(tokens) == END_OF_TEXT_ID), len(tokens))
        word_starts = np.flatnonzero(begins_word_V[tokens])
        self._words_P = word_starts[np.searchsorted(word_starts, ends_P) - 1]
        self._ends_P = ends_P
        self._starts_P = np.maximum(np.append(0, ends_P[:-1] + 1), ends_P - context - 1)
        super().__init__(tokens, n_tokens, context=context, **shape)

    def _n_windows(self) -> int:
        return len(self._ends_P)

    def __getitem__(self, index: int) -> Batch:
        return self._tokens.take(self._places(index), mode="wrap").astype(np.int64)

    def counted(self, index: int) -> npt.NDArray[np.bool_]:
        targets_BT, chosen = self._places(index)[:, 1:], self._windows[index][:, None]
        return (self._words_P[chosen] <= targets_BT) & (targets_BT < self._ends_P[chosen])

    def _places(self, index: int) -> npt.NDArray[np.int64]:
        return self._starts_P[self._windows[index], None] + np.arange(self._context + 1)


def _gather(tokens: Tokens, windows: npt.NDArray[np.int64], context: int) -> Batch:
    return tokens[windows[:, None] * context + np.arange(context + 1)].astype(np.int64)
