"""Checkpoints on disk: quantized, read back, compared and inspected without torch and without the model."""
