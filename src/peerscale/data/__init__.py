"""Corpus -> tokens on disk -> batches that are a pure function of (seed, step).

`prepare.prepare` makes a corpus once, `open_corpus` reads it, `TrainBatches` and `EvaluationBatches` cut it up.
No torch here.
"""

from peerscale.data.batches import EvaluationBatches, TrainBatches
from peerscale.data.store import Corpus, Manifest, open_corpus, read_manifest

__all__ = ["Corpus", "EvaluationBatches", "Manifest", "TrainBatches", "open_corpus", "read_manifest"]
