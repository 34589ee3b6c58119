"""Statistics of studies: optima, comparisons, multipliers, claims and learning rates."""
