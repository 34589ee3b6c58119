"""IsoFLOP scaling-law experiments for transformer feed-forward layers: dense, MoE, PKM and PEER at matched compute."""
