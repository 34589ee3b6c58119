"""What a run costs and how it will be trained, before it is."""
