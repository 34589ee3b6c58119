"""What a run is: the typed configuration, the study, and how Hydra composes them."""
