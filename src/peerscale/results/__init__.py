"""From the cells of a study to its tables and fits, and to its published copy."""
