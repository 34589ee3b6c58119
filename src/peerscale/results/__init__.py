"""From the cells of a study to what is kept of it: its tables and fits, the published copy, the upload to W&B."""
