"""Operators on the rows of tables, with their gradients and optimiser, for CPUs and GPUs.

For models of any kind: `backends.choose_operators` gives a backend, whose methods `operators.Operators` describes;
`cross_entropy.linear_cross_entropy` is the loss of a linear head, `row_sparse_adamw.RowSparseAdamW` an AdamW that
updates only the rows that were read. From `operators` the way leads to a backend's parts: `cpp_operators` and the C++
sources, or `triton_operators` and its kernels; `reference` is the definition that they are tested against.
"""
