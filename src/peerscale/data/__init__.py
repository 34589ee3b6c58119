"""Corpus -> tokens on disk -> batches that are a pure function of (seed, step).

`prepare` makes a corpus once, from `gutenberg`, `code` or the user's `text`; `store` reads it, `batches` cuts it into
batches. This package does not import torch.
"""
