"""Batches as pure functions of (seed, step), so that there is no state to save or restore.

Tokens are cut into windows of `context` tokens, each followed by one more token: targets are inputs shifted by one. Two
windows of a batch are never neighbours in the text, since expert choice compares the sequences of a batch.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from peerscale.data.tokenizer import END_OF_TEXT_ID

Tokens = npt.NDArray[np.uint16]
Batch = npt.NDArray[np.int64]


def whole_batches(n_tokens: int, *, batch_sequences: int, context: int, apart: bool = True) -> int:
    """Number of batches that a set of `n_tokens` fills; 0 if it has fewer than `fewest_tokens`."""
    fewest = fewest_tokens(batch_sequences=batch_sequences, context=context, apart=apart)
    return (n_tokens - 1) // context // batch_sequences if n_tokens >= fewest else 0


def fewest_tokens(*, batch_sequences: int, context: int, apart: bool = True) -> int:
    """Tokens that a set needs for one batch, including the last target. With `apart`, no two windows of a batch may be
    neighbours."""
    return (2 if apart else 1) * batch_sequences * context + 1


class TrainBatches:
    """An endless sequence of shuffled training batches; each epoch uses every window at most once.

    The windows are divided into `batch_sequences` equal strata of consecutive windows, and the last window of each
    stratum is left out. Every step takes one window of each stratum; every epoch and stratum has its own order. So
    there is always another window between two windows of a batch.

    Args:
        tokens: the training set, shape (n,).
        seed: determines the order.
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
        """The batch of a step (counted from 0), shape (B, T + 1)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = np.stack([self._permutation(epoch, stratum) for stratum in range(len(self._strata))])
            self._epoch = epoch
        return _gather(self._tokens, self._strata * self._windows_per_stratum + self._order[:, place], self._context)

    def _permutation(self, epoch: int, stratum: int) -> npt.NDArray[np.int64]:
        # Sorted raw bits: numpy guarantees that their stream never changes, but not that of Generator.permutation.
        bits = np.random.PCG64(np.random.SeedSequence([self._seed, epoch, stratum]))
        return np.argsort(bits.random_raw(self.steps_per_epoch), kind="stable")


class EvaluationBatches:
    """A fixed subset of a held-out set in whole batches, spread evenly over the set; it does not depend on the seed.

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
        # Batch m takes every n_batches-th chosen window, starting with the m-th. Its windows are far apart, and the
        # subset does not depend on how it is divided into batches.
        self._windows = (np.arange(n_chosen) * n_windows // n_chosen).reshape(batch_sequences, n_batches).T

    def _n_windows(self) -> int:
        return (len(self._tokens) - 1) // self._context

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> Batch:
        """A batch, shape (B, T + 1)."""
        return _gather(self._tokens, self._windows[index], self._context)

    def counted(self, index: int) -> npt.NDArray[np.bool_]:
        """Which targets of a batch are scored: all, shape (B, T)."""
        return np.ones((len(self._windows[index]), self._context), dtype=bool)


class LastWordBatches(EvaluationBatches):
    """Passages in which only the last word is scored; each passage is at the start of its own row.

    The rest of the row holds the passages that follow in the set. In a causal model this has no effect on the passage
    itself, and expert choice, which compares the rows of a batch at each position, sees text there as in training. If a
    passage is longer than the context, its end is used.

    Args:
        tokens: passages of at least two words, separated by end-of-text tokens.
        begins_word_V: which tokens start with a space; every word except the first starts with such a token.
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
