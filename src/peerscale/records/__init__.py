"""Records of runs, and the table of them."""
