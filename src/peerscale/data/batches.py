"""Batches as pure functions of (seed, step), so that there is no state to save or restore.

Tokens are cut into windows of `context` tokens, each followed by one more token: targets are inputs shifted by one. Two
windows of a training batch are never neighbours in the text, since expert choice compares the sequences of a batch.
"""

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.uint16]
Batch = npt.NDArray[np.int64]


def whole_batches(n_tokens: int, *, batch_sequences: int, context: int) -> int:
    """Number of batches that a set of `n_tokens` fills, each target included."""
    return max(0, n_tokens - 1) // context // batch_sequences


class TrainBatches:
    """An endless sequence of shuffled training batches; each epoch uses every window at most once.

    The windows are divided into `batch_sequences` equal strata of consecutive windows, and the last window of each
    stratum is left out. Every step takes one window of each stratum; every epoch and stratum has its own order. So
    there is always another window between two windows of a batch.

    Args:
        tokens: the training set, shape (n,), of at least two whole batches.
        seed: determines the order.
        batch_sequences: windows in a batch, B.
        context: tokens in a window, T.
    """

    def __init__(self, tokens: Tokens, *, seed: int, batch_sequences: int, context: int) -> None:
        self._tokens = np.asarray(tokens)
        self._seed = seed
        self._context = context
        self._windows_per_stratum = whole_batches(len(tokens), batch_sequences=batch_sequences, context=context)
        self.steps_per_epoch = self._windows_per_stratum - 1
        assert self.steps_per_epoch > 0, "a plan drops a cell that has no batch to train on"
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
    """

    def __init__(self, tokens: Tokens, n_tokens: int, *, batch_sequences: int, context: int) -> None:
        self._tokens = np.asarray(tokens)
        self._context = context
        n_batches = n_tokens // (batch_sequences * context)
        assert 1 <= n_batches <= whole_batches(len(tokens), batch_sequences=batch_sequences, context=context)
        n_chosen, n_windows = n_batches * batch_sequences, (len(tokens) - 1) // context
        # Batch m takes every n_batches-th chosen window, starting with the m-th. Its windows are neighbours only if the
        # set has no more than this batch, and the subset does not depend on how it is divided into batches.
        self._windows = (np.arange(n_chosen) * n_windows // n_chosen).reshape(batch_sequences, n_batches).T

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> Batch:
        """A batch, shape (B, T + 1)."""
        return _gather(self._tokens, self._windows[index], self._context)


def _gather(tokens: Tokens, windows: npt.NDArray[np.int64], context: int) -> Batch:
    return tokens[windows[:, None] * context + np.arange(context + 1)].astype(np.int64)
