"""Corpus -> tokens on disk -> batches that are a pure function of (seed, step).

`prepare` makes a corpus once, `store` reads it, `batches` cuts it up.
No torch here.
"""
