from wandb_server import wandb_server  # noqa: F401
