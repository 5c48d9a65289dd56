"""Checkpoints: when they are written, in which format, and how they are read back."""
