"""What the layers compute: their weights and forward passes, in torch, which planning does without."""
