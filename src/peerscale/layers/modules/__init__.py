"""The weights and forward passes of the layers, in torch; planning does not import them."""
