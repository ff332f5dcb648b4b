"""Models in memory: choosing layers, replacing them, loading packed checkpoints."""
