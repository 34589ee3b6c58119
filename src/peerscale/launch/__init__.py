"""A study on this machine or on Slurm: its runs started, watched and repeated."""
